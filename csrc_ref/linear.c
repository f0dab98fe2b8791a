/* Linear under the contract (B1): y = RNE16 of run sums; a run is one chain over its k; run sums are added left to right.
 *
 * The weight lies k-major, [in][out]: output channels are lanes, as keys are in a K tile. A few rows go over bands of the
 * weight (bands.h); many rows go over panels of 64 channels, copied together once and then read from the cache.
 */
#include "bands.h"
#include "scratch.h"

#define LANES TILE_TOKENS
#define SLAB_ROWS 256 /* rows that share one copy of a panel */

/* What a thread needs for panels; too much for a small stack. */
typedef struct {
    uint16_t copy[LINEAR_RUN_LONG * LANES];
    float total[SLAB_ROWS][LANES];
} panel_space;

/* Any number of rows up to SLAB_ROWS, the lanes first .. first + lanes - 1, at most LANES. */
static void panel(const kv_linear_call *call, panel_space *space, const float *x, int64_t row_begin, int64_t rows, int64_t first) {
    uint16_t *copy = space->copy;
    float(*total)[LANES] = space->total;
    const int64_t run = run_length(call->in), in = call->in;
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

static void widen_rows(const kv_linear_call *call, int64_t first, int64_t rows, float *x) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < call->in; k++) x[row * call->in + k] = widen(call->x[(first + row) * call->stride_x + k]);
}

/* How a few rows go: in bands of `lanes`, their runs one after the other, or apart where there are many. What is left of a line
 * of lanes at the end of the weight's rows goes as a panel. */
typedef struct {
    int64_t runs, apart, whole, lanes, bands;
} few_plan;

static few_plan plan_few(const kv_linear_call *call) {
    const int64_t runs = (call->in + run_length(call->in) - 1) / run_length(call->in), lines = call->out / LINE_LANES;
    const int64_t apart = call->in > LINEAR_LONG_ABOVE; /* then a thread reads whole rows of the weight, one after the other */
    const int64_t team = apart ? 1 : call->num_threads, most = team * (BAND_LANES / LINE_LANES / call->rows);
    const int64_t bands = (lines + most - 1) / most * team, share = bands ? (lines + bands - 1) / bands : 1;
    return (few_plan){runs, apart, lines * LINE_LANES, share * LINE_LANES, (lines + share - 1) / share};
}

/* x, widened by every thread, and the run sums where runs go apart. */
static int64_t few_floats(const kv_linear_call *call) {
    const few_plan plan = plan_few(call);
    return call->rows * (call->num_threads * call->in + (plan.apart ? plan.runs * plan.bands * plan.lanes : 0));
}

static void few_rows(const kv_linear_call *call, panel_space *space, float *widened) {
    const few_plan plan = plan_few(call);
    const int64_t run = run_length(call->in), size = call->rows * plan.lanes, items = plan.bands * (plan.apart ? plan.runs : 1);
    float *sums = widened + call->num_threads * call->rows * call->in; /* [runs, bands, size], where runs go apart */
    int64_t taken = 0;
#pragma omp parallel num_threads((int)call->num_threads) if (call->num_threads > 1)
    {
        int64_t mine;
#pragma omp atomic capture
        mine = taken++;
        float *x = widened + mine * call->rows * call->in;
        widen_rows(call, 0, call->rows, x);
#pragma omp for schedule(dynamic) nowait
        for (int64_t item = 0; item < items + (plan.whole < call->out); item++) {
            if (item == items) {
                panel(call, space, x, 0, call->rows, plan.whole);
                continue;
            }
            const int64_t first = item % plan.bands * plan.lanes, lanes = min_of(plan.lanes, plan.whole - first);
            float total[BAND_LANES], next[BAND_LANES];
            if (plan.apart) {
                run_sums(call, x, first, lanes, item / plan.bands * run, sums + item * size);
            } else {
                run_sums(call, x, first, lanes, 0, total);
                for (int64_t start = run; start < call->in; start += run) {
                    run_sums(call, x, first, lanes, start, next);
                    for (int64_t i = 0; i < call->rows * lanes; i++) total[i] += next[i];
                }
                store(call, first, lanes, total);
            }
        }
        if (plan.apart) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t band = 0; band < plan.bands; band++) {
                const int64_t lanes = min_of(plan.lanes, plan.whole - band * plan.lanes);
                float *total = sums + band * size;
                for (int64_t item = band + plan.bands; item < items; item += plan.bands)
                    for (int64_t i = 0; i < call->rows * lanes; i++) total[i] += sums[item * size + i];
                store(call, band * plan.lanes, lanes, total);
            }
        }
    }
}

static void many_rows(const kv_linear_call *call, panel_space *spaces, float *widened) {
    const int64_t threads = call->num_threads;
    for (int64_t first = 0; first < call->rows; first += SLAB_ROWS) {
        const int64_t rows = min_of(SLAB_ROWS, call->rows - first);
        int64_t taken = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
        {
            int64_t mine;
#pragma omp atomic capture
            mine = taken++;
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++) widen_rows(call, first + row, 1, widened + row * call->in);
#pragma omp for schedule(dynamic)
            for (int64_t lane = 0; lane < call->out; lane += LANES) panel(call, &spaces[mine], widened, first, rows, lane);
        }
    }
}

int kv_linear(const kv_linear_call *call) {
    const int is_few = call->rows <= MAX_ROWS;
    const int64_t panels = is_few ? 1 : call->num_threads;
    const int64_t floats = is_few ? few_floats(call) : min_of(call->rows, SLAB_ROWS) * call->in;
    panel_space *spaces = take_scratch(panels * (int64_t)sizeof *spaces + floats * (int64_t)sizeof(float));
    if (!spaces) return KVKERN_NO_MEMORY;
    (is_few ? few_rows : many_rows)(call, spaces, (float *)(spaces + panels));
    give_scratch(spaces);
    return KVKERN_OK;
}
