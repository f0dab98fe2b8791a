/* A1 and A5 are one operation: rows of x times a matrix of bf16 rows, one fp32 chain per lane, pairs taken odd before even.
 *
 * Scores: x = q, a matrix row = one channel of a K tile, lanes = keys. Outputs: x = p, a matrix row = one key of a V tile,
 * lanes = channels. Lanes never meet, so the compiler vectorises the plain loops without changing a bit.
 */
#ifndef KVKERN_CHAIN_H
#define KVKERN_CHAIN_H

#include "arith.h"

#define MAX_ROWS 4 /* x rows per pass: 4 x 64 accumulators stay in 16 wide registers */
#define CACHE_LINE_BYTES 64

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Two neighbouring lanes of a little-endian bf16 row in one word: a shift widens the even one, a mask the odd one. */
typedef uint32_t __attribute__((may_alias, aligned(2))) lane_pair;

/* acc[r][lane] = chain over `count` matrix rows, starting from acc. `rows` and `lanes` are compile-time constants.
 * Meanwhile the matrix at `upcoming`, of the same form, is fetched into the second-level cache. */
ALWAYS_INLINE void chain_fixed(const int rows, const int lanes, float *const *acc, const float *const *x,
                               const uint16_t *matrix, int64_t stride, int64_t count, const uint16_t *upcoming) {
    const int half = lanes / 2;
    float even[MAX_ROWS][TILE_TOKENS / 2], odd[MAX_ROWS][TILE_TOKENS / 2];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < half; i++) {
            even[r][i] = acc[r][2 * i];
            odd[r][i] = acc[r][2 * i + 1];
        }
    const int64_t paired = count & ~(int64_t)1;
    for (int64_t pair = 0; pair < paired; pair += 2) {
        for (int second = 1; second >= 0; second--) { /* the odd row of a pair goes first */
            const lane_pair *m = (const lane_pair *)(matrix + (pair + second) * stride);
            for (int byte = 0; byte < 2 * lanes; byte += CACHE_LINE_BYTES)
                __builtin_prefetch((const char *)(upcoming + (pair + second) * stride) + byte, 0, 1);
            float wide_even[TILE_TOKENS / 2], wide_odd[TILE_TOKENS / 2];
            for (int i = 0; i < half; i++) wide_even[i] = from_bits(m[i] << 16);
            for (int i = 0; i < half; i++) wide_odd[i] = from_bits(m[i] & 0xffff0000u);
            for (int r = 0; r < rows; r++) {
                const float factor = x[r][pair + second];
                for (int i = 0; i < half; i++) even[r][i] = fmaf(factor, wide_even[i], even[r][i]);
                for (int i = 0; i < half; i++) odd[r][i] = fmaf(factor, wide_odd[i], odd[r][i]);
            }
        }
    }
    if (paired != count) { /* a single last key stands alone */
        const lane_pair *m = (const lane_pair *)(matrix + paired * stride);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < half; i++) {
                even[r][i] = fmaf(x[r][paired], from_bits(m[i] << 16), even[r][i]);
                odd[r][i] = fmaf(x[r][paired], from_bits(m[i] & 0xffff0000u), odd[r][i]);
            }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < half; i++) {
            acc[r][2 * i] = even[r][i];
            acc[r][2 * i + 1] = odd[r][i];
        }
}

#define CHAIN_CASE(ROWS)                                                                          \
    case ROWS:                                                                                    \
        if (lanes == TILE_TOKENS)                                                                 \
            chain_fixed(ROWS, TILE_TOKENS, acc, x, matrix, stride, count, upcoming);              \
        else                                                                                      \
            chain_fixed(ROWS, 16, acc, x, matrix, stride, count, upcoming);                       \
        break;

/* The same for 1 to MAX_ROWS rows and 64 or 16 lanes. */
static void chain(int rows, int lanes, float *const *acc, const float *const *x, const uint16_t *matrix, int64_t stride,
                  int64_t count, const uint16_t *upcoming) {
    switch (rows) {
        CHAIN_CASE(1)
        CHAIN_CASE(2)
        CHAIN_CASE(3)
        CHAIN_CASE(4)
    }
}

#endif
