/* One to MAX_ROWS rows of a Linear (B1) over a band of output channels: every byte of the weight is read once, and rows of the
 * weight follow each other as in memory. Fetched ahead by 16 rows, since a row of a band is shorter than a page. */
#ifndef KVKERN_BANDS_H
#define KVKERN_BANDS_H

#include "chain.h"
#include "kvkern.h"

#define BAND_LANES 4096 /* of all rows: their accumulators stay in the first-level cache */
#define LINE_LANES (CACHE_LINE_BYTES / 2)
#define STEP 8   /* weight rows between a load of the accumulators and a store */
#define AHEAD 16 /* weight rows from those that are added to those that are fetched meanwhile */

static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t run_length(int64_t in) { return in <= LINEAR_LONG_ABOVE ? LINEAR_RUN : LINEAR_RUN_LONG; }
static uint16_t rounded(float value) { return value == value ? rne16(value) : BF16_NAN; }

#define ADD(j)                                                                                  \
    {                                                                                           \
        const lane_pair w = ((const lane_pair *)(weight + (j) * stride))[i];                    \
        e = fmaf(x[j], from_bits(w << 16), e);                                                  \
        o = fmaf(x[j], from_bits(w & 0xffff0000u), o);                                          \
    }
#define ADD_PAIR(j) ADD((j) + 1) ADD(j) /* the odd row of a pair goes first */
#define ADD_LOOP(FETCHED, ROWS) /* FETCHED: rows to fetch, into the second-level cache, since they are read once */ \
    for (int64_t line = 0; line < half; line += LINE_LANES / 2) {                                                  \
        for (int row = 0; row < FETCHED; row++)                                                                    \
            __builtin_prefetch((const lane_pair *)(weight + (AHEAD + row) * stride) + line, 0, 1);                 \
        for (int64_t i = line; i < line + LINE_LANES / 2; i++) {                                                   \
            float e = even[i], o = odd[i];                                                                         \
            ROWS                                                                                                   \
            even[i] = e;                                                                                           \
            odd[i] = o;                                                                                            \
        }                                                                                                          \
    }

/* acc += x times up to STEP of the run's `left` weight rows, lanes split as in chain.h; returns how many were added.
 * `follow`: rows that follow in the weight, of this run and the later ones. */
static int64_t add_rows(int64_t left, int64_t follow, const float *x, const uint16_t *weight, int64_t stride, int64_t half,
                        float *restrict even, float *restrict odd) {
    if (left >= STEP && follow >= AHEAD + STEP) {
        ADD_LOOP(STEP, ADD_PAIR(0) ADD_PAIR(2) ADD_PAIR(4) ADD_PAIR(6))
        return STEP;
    }
    if (left >= STEP) {
        ADD_LOOP(0, ADD_PAIR(0) ADD_PAIR(2) ADD_PAIR(4) ADD_PAIR(6))
        return STEP;
    }
    if (left >= 2) {
        ADD_LOOP(0, ADD_PAIR(0))
        return 2;
    }
    ADD_LOOP(0, ADD(0))
    return 1;
}

/* The sums of the run that starts at `start`, of 1 to MAX_ROWS rows and whole lines of lanes: even lanes of every row, then odd. */
static void run_sums(const kv_linear_call *call, const float *x, int64_t first, int64_t lanes, int64_t start, float *sums) {
    const int64_t half = lanes / 2, in = call->in, stride = call->stride_w, end = min_of(start + run_length(in), in);
    float *even = sums, *odd = sums + call->rows * half;
    memset(sums, 0, (size_t)(call->rows * lanes) * sizeof(float));
    for (int64_t k = start, step = 0; k < end; k += step)
        for (int64_t row = 0; row < call->rows; row++)
            step = add_rows(end - k, in - k, x + row * in + k, call->weight + k * stride + first, stride, half, even + row * half,
                            odd + row * half);
}

static void store(const kv_linear_call *call, int64_t first, int64_t lanes, const float *total) {
    const int64_t half = lanes / 2;
    for (int64_t row = 0; row < call->rows; row++)
        for (int64_t i = 0; i < half; i++)
            for (int odd = 0; odd < 2; odd++)
                call->y[row * call->stride_y + first + 2 * i + odd] = rounded(total[(odd * call->rows + row) * half + i]);
}

#endif
