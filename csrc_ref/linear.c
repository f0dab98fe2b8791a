/* Linear under the contract (B1): y = RNE16 of run sums; a run is one chain over its k; run sums are added left to right.
 *
 * The weight lies k-major, [in][out]: output channels are lanes, as keys are in a K tile. A few rows go over bands of the
 * weight, every byte of it read once and in the order of memory; many rows go over panels of 64 channels, copied together
 * once and then read from the cache.
 */
#include "chain.h"
#include "kvkern.h"

#define LANES TILE_TOKENS
#define BAND_LANES 4096 /* of all rows: their accumulators stay in the first-level cache */
#define STEP 8          /* weight rows between a load of the accumulators and a store */
#define LINE_PAIRS (CACHE_LINE_BYTES / 4)
#define SLAB_ROWS 256   /* rows that share one copy of a panel */

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
#define ADD_LOOP(AHEAD, ROWS) /* AHEAD: weight rows that are fetched meanwhile, to be read once */    \
    for (int64_t line = 0; line < half; line += LINE_PAIRS) {                                         \
        for (int row = 0; row < AHEAD; row++)                                                         \
            __builtin_prefetch((const lane_pair *)(weight + (STEP + row) * stride) + line, 0, 0);     \
        for (int64_t i = line; i < line + LINE_PAIRS; i++) {                                          \
            float e = even[i], o = odd[i];                                                            \
            ROWS                                                                                      \
            even[i] = e;                                                                              \
            odd[i] = o;                                                                               \
        }                                                                                             \
    }

/* acc += x times up to STEP of the `left` weight rows, lanes split as in chain.h; returns how many were added. */
static int64_t add_rows(int64_t left, const float *x, const uint16_t *weight, int64_t stride, int64_t half, float *restrict even,
                        float *restrict odd) {
    if (left >= 2 * STEP) {
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

/* 1 to MAX_ROWS rows, whole units of lanes. */
static void band(const kv_linear_call *call, const float *x, int64_t first, int64_t lanes) {
    float acc[2][BAND_LANES], total[2][BAND_LANES]; /* each: even lanes of every row, then odd lanes */
    const int64_t half = lanes / 2, run = run_length(call->in), in = call->in, stride = call->stride_w;
    for (int64_t start = 0; start < in; start += run) {
        const int64_t end = min_of(start + run, in);
        const uint16_t *weight = call->weight + first;
        for (int odd = 0; odd < 2; odd++) memset(acc[odd], 0, (size_t)(call->rows * half) * sizeof(float));
        for (int64_t k = start, step = 0; k < end; k += step)
            for (int64_t row = 0; row < call->rows; row++)
                step = add_rows(end - k, x + row * in + k, weight + k * stride, stride, half, acc[0] + row * half, acc[1] + row * half);
        for (int64_t i = 0; i < call->rows * half; i++)
            for (int odd = 0; odd < 2; odd++) total[odd][i] = start ? total[odd][i] + acc[odd][i] : acc[odd][i];
    }
    for (int64_t row = 0; row < call->rows; row++)
        for (int64_t i = 0; i < half; i++)
            for (int odd = 0; odd < 2; odd++)
                call->y[row * call->stride_y + first + 2 * i + odd] = rounded(total[odd][row * half + i]);
}

/* What a thread needs for panels; too much for a small stack. */
typedef struct {
    uint16_t copy[LINEAR_RUN_LONG * LANES];
    float total[SLAB_ROWS][LANES];
} panel_space;

/* Any number of rows up to SLAB_ROWS, the lanes of one unit. */
static void panel(const kv_linear_call *call, panel_space *space, const float *x, int64_t row_begin, int64_t rows, int64_t unit) {
    uint16_t *copy = space->copy;
    float(*total)[LANES] = space->total;
    const int64_t run = run_length(call->in), in = call->in, first = unit * LANES;
    const int64_t lanes = min_of(LANES, call->out - first);
    memset(copy, 0, sizeof space->copy);
    for (int64_t start = 0; start < in; start += run) {
        const int64_t count = min_of(run, in - start);
        for (int64_t k = 0; k < count; k++)
            memcpy(copy + k * LANES, call->weight + (start + k) * call->stride_w + first, (size_t)lanes * sizeof *copy);
        for (int64_t row = 0; row < rows; row += MAX_ROWS) {
            float sums[MAX_ROWS][LANES] = {{0.0f}}, *acc[MAX_ROWS];
            const float *factors[MAX_ROWS];
            const int width = (int)min_of(MAX_ROWS, rows - row);
            for (int r = 0; r < width; r++) {
                acc[r] = sums[r];
                factors[r] = x + (row + r) * in + start;
            }
            chain(width, LANES, acc, factors, copy, LANES, count, copy);
            for (int r = 0; r < width; r++)
                for (int lane = 0; lane < LANES; lane++)
                    total[row + r][lane] = start ? total[row + r][lane] + sums[r][lane] : sums[r][lane];
        }
    }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t lane = 0; lane < lanes; lane++)
            call->y[(row_begin + row) * call->stride_y + first + lane] = rounded(total[row][lane]);
}

int64_t kv_linear_scratch_bytes(const kv_linear_call *call) {
    return call->num_threads * (int64_t)sizeof(panel_space) + min_of(call->rows, SLAB_ROWS) * call->in * (int64_t)sizeof(float);
}

void kv_linear(const kv_linear_call *call) {
    const int64_t units = (call->out + LANES - 1) / LANES, threads = call->num_threads;
    const int64_t whole = call->rows <= MAX_ROWS ? call->out / LANES : 0; /* units that go in bands */
    const int64_t most = call->rows <= MAX_ROWS ? BAND_LANES / LANES / MAX_ROWS * (MAX_ROWS / call->rows) : 1;
    const int64_t share = whole ? min_of((whole + threads - 1) / threads, most) : 1;
    panel_space *spaces = call->scratch;
    float *x = (float *)(spaces + threads);
    for (int64_t first = 0; first < call->rows; first += SLAB_ROWS) {
        const int64_t rows = min_of(SLAB_ROWS, call->rows - first);
        int64_t taken = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
        {
            int64_t mine;
#pragma omp atomic capture
            mine = taken++;
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++)
                for (int64_t k = 0; k < call->in; k++) x[row * call->in + k] = widen(call->x[(first + row) * call->stride_x + k]);
#pragma omp for schedule(dynamic) nowait
            for (int64_t unit = 0; unit < whole; unit += share)
                band(call, x, unit * LANES, min_of(share, whole - unit) * LANES);
#pragma omp for schedule(dynamic)
            for (int64_t unit = whole; unit < units; unit++) panel(call, &spaces[mine], x, first, rows, unit);
        }
    }
}
