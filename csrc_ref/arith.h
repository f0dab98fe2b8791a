/* Scalar arithmetic of the contract: bf16 widening, rounding by integers, exp_c. Build with -ffp-contract=off. */
#ifndef KVKERN_ARITH_H
#define KVKERN_ARITH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "contract.h"

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float widen(uint16_t bf16) { return from_bits((uint32_t)bf16 << 16); }

/* RNE16: fp32 to bf16, nearest even. A NaN may leave as another NaN or infinity: callers handle it (A8). */
static inline uint16_t rne16(float value) {
    uint32_t bits = to_bits(value);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return (uint16_t)(bits >> 16);
}

/* RNE16, kept in fp32. */
static inline float round16(float value) {
    uint32_t bits = to_bits(value);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return from_bits(bits & 0xffff0000u);
}

static inline float power_of_two(int32_t exponent) { return from_bits((uint32_t)(exponent + 127) << 23); }

/* A6: exp(x) for x <= 0. */
static inline float exp_c(float x) {
    float clamped = x < EXP_MIN ? EXP_MIN : x; /* keeps the conversion to int defined for -inf */
    float n = rintf(clamped * EXP_LOG2E);
    float s = fmaf(n, -EXP_LN2_HI, clamped);
    s = fmaf(n, -EXP_LN2_LO, s);
    float u = EXP_C6;
    u = fmaf(u, s, EXP_C5);
    u = fmaf(u, s, EXP_C4);
    u = fmaf(u, s, EXP_C3);
    u = fmaf(u, s, EXP_C2);
    u = fmaf(u, s, EXP_C1);
    u = 1.0f + fmaf(s * s, u, s);
    int32_t whole = (int32_t)n;
    int32_t half = whole >> 1;
    u = (u * power_of_two(half)) * power_of_two(whole - half);
    return x < EXP_MIN ? 0.0f : u;
}

#endif
