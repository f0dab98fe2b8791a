/* Everything of the model under the contract that has no matrix: RMSNorm (B2) and SiLU (B4). */
#include "arith.h"
#include "kvkern.h"

#define NORM_LANES 8
#define NORM_GROUPS 4
#define NORM_ROW (NORM_LANES * NORM_GROUPS)
#define NORM_FLUSH 16 /* rows of 4 x 8 squares between two flushes */

/* The sum of squares: 4 x 8 accumulators, flushed into a second set every 16 rows; then groups, then lanes, in order. */
static float sum_of_squares(const uint16_t *x, int64_t width) {
    float first[NORM_ROW] = {0.0f}, second[NORM_ROW] = {0.0f}, sum = 0.0f;
    for (int64_t row = 0; row < width / NORM_ROW; row++) {
        for (int i = 0; i < NORM_ROW; i++) {
            const float value = widen(x[row * NORM_ROW + i]);
            first[i] += value * value;
        }
        if ((row + 1) % NORM_FLUSH == 0)
            for (int i = 0; i < NORM_ROW; i++) {
                second[i] += first[i];
                first[i] = 0.0f;
            }
    }
    for (int i = 0; i < NORM_ROW; i++) first[i] += second[i];
    for (int group = 1; group < NORM_GROUPS; group++)
        for (int lane = 0; lane < NORM_LANES; lane++) first[lane] += first[group * NORM_LANES + lane];
    for (int lane = 0; lane < NORM_LANES; lane++) sum += first[lane];
    return sum;
}

void kv_rms_norm(const uint16_t *x, int64_t stride_x, const uint16_t *weight, float eps, uint16_t *y, int64_t stride_y, int64_t rows,
                 int64_t width) {
    for (int64_t row = 0; row < rows; row++, x += stride_x, y += stride_y) {
        const float inverse = 1.0f / sqrtf(sum_of_squares(x, width) / (float)width + eps);
        for (int64_t i = 0; i < width; i++) {
            const float value = round16(round16(widen(x[i]) * inverse) * widen(weight[i]));
            y[i] = value == value ? (uint16_t)(to_bits(value) >> 16) : BF16_NAN;
        }
    }
}

void kv_silu(const uint16_t *gate, const uint16_t *up, const uint16_t *silu, uint16_t *y, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const uint16_t activated = silu[gate[i]];
        const float value = up ? widen(activated) * widen(up[i]) : 0.0f;
        y[i] = !up ? activated : value == value ? rne16(value) : BF16_NAN;
    }
}
