/* A2 to A4 and A8 for one row: scores in, probabilities out, in place. */
#ifndef KVKERN_SOFTMAX_H
#define KVKERN_SOFTMAX_H

#include "arith.h"

/* Integers in the order of the floats they stand for; NaNs lie beyond both infinities. */
static inline int32_t order_key(float value) {
    const int32_t bits = (int32_t)to_bits(value);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline float from_order_key(int32_t key) { return from_bits((uint32_t)(key ^ ((key >> 31) & 0x7fffffff))); }

/* t: `visible` scores, followed by room up to a multiple of 16. Leaves p there, +0 past `visible`.
 * Returns the row's log-sum-exp in natural log, or NaN when the row is odd (A8) and p is not to be used. */
static float softmax_row(float *t, int64_t visible) {
    const int64_t padded = (visible + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
    const int32_t infinity = order_key(INFINITY), minus_infinity = order_key(-INFINITY);
    int32_t top = INT32_MIN, bottom = INT32_MAX;
    for (int64_t j = 0; j < visible; j++) { /* the max by integers: order-free, so the loop may take any width */
        const int32_t key = order_key(t[j]);
        top = key > top ? key : top;
        bottom = key < bottom ? key : bottom;
    }
    if (top >= infinity || top <= minus_infinity || bottom < minus_infinity) return NAN;
    const float max = from_order_key(top);
    for (int64_t j = visible; j < padded; j++) t[j] = -INFINITY;

    float sum[SUM_LANES] = {0.0f};
    for (int64_t j = 0; j < padded; j++) t[j] = exp_c(t[j] - max);
    for (int64_t j = 0; j < padded; j += SUM_LANES)
        for (int lane = 0; lane < SUM_LANES; lane++) sum[lane] += t[j + lane];
    for (int half = SUM_LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half];
    const float reciprocal = 1.0f / sum[0];
    for (int64_t j = 0; j < padded; j++) t[j] = round16(t[j] * reciprocal);
    return (float)((double)max + log((double)sum[0]));
}

#endif
