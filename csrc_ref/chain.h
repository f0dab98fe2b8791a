/* A1 and A5 are one operation: rows of x times a matrix of bf16 rows, one fp32 chain per lane, pairs taken odd before even.
 *
 * Scores: x = q, a matrix row = one channel of a K tile, lanes = keys. Outputs: x = p, a matrix row = one key of a V tile,
 * lanes = channels. Lanes never meet, so the compiler vectorises the plain loops without changing a bit.
 */
#ifndef KVKERN_CHAIN_H
#define KVKERN_CHAIN_H

#include "arith.h"

#define MAX_ROWS 4 /* x rows per pass: 4 x 64 accumulators stay in 16 wide registers */

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* acc[r][lane] = chain over `count` matrix rows, starting from acc. `rows` and `lanes` are compile-time constants. */
ALWAYS_INLINE void chain_fixed(const int rows, const int lanes, float *const *acc, const float *const *x,
                               const uint16_t *matrix, int64_t stride, int64_t count) {
    float sum[MAX_ROWS][TILE_TOKENS];
    for (int r = 0; r < rows; r++)
        for (int lane = 0; lane < lanes; lane++) sum[r][lane] = acc[r][lane];
    const int64_t paired = count & ~(int64_t)1;
    for (int64_t pair = 0; pair < paired; pair += 2) {
        for (int odd = 1; odd >= 0; odd--) {
            const uint16_t *m = matrix + (pair + odd) * stride;
            float wide[TILE_TOKENS];
            for (int lane = 0; lane < lanes; lane++) wide[lane] = widen(m[lane]);
            for (int r = 0; r < rows; r++) {
                const float factor = x[r][pair + odd];
                for (int lane = 0; lane < lanes; lane++) sum[r][lane] = fmaf(factor, wide[lane], sum[r][lane]);
            }
        }
    }
    if (paired != count) { /* a single last key stands alone */
        const uint16_t *m = matrix + paired * stride;
        for (int r = 0; r < rows; r++)
            for (int lane = 0; lane < lanes; lane++) sum[r][lane] = fmaf(x[r][paired], widen(m[lane]), sum[r][lane]);
    }
    for (int r = 0; r < rows; r++)
        for (int lane = 0; lane < lanes; lane++) acc[r][lane] = sum[r][lane];
}

#define CHAIN_CASE(ROWS)                                                                       \
    case ROWS:                                                                                 \
        if (lanes == TILE_TOKENS) chain_fixed(ROWS, TILE_TOKENS, acc, x, matrix, stride, count); \
        else chain_fixed(ROWS, 16, acc, x, matrix, stride, count);                             \
        break;

/* The same for 1 to MAX_ROWS rows and 64 or 16 lanes. */
static void chain(int rows, int lanes, float *const *acc, const float *const *x, const uint16_t *matrix, int64_t stride,
                  int64_t count) {
    switch (rows) {
        CHAIN_CASE(1)
        CHAIN_CASE(2)
        CHAIN_CASE(3)
        CHAIN_CASE(4)
    }
}

#endif
