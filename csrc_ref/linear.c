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
#define LINE_LANES (CACHE_LINE_BYTES / 2)
#define STEP 8   /* weight rows between a load of the accumulators and a store */
#define AHEAD 16 /* weight rows from those that are added to those that are fetched meanwhile */
#define SLAB_ROWS 256 /* rows that share one copy of a panel */

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

static void few_rows(const kv_linear_call *call, panel_space *spaces, float *widened) {
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
                panel(call, &spaces[mine], x, 0, call->rows, plan.whole);
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

int64_t kv_linear_scratch_bytes(const kv_linear_call *call) {
    int64_t floats = min_of(call->rows, SLAB_ROWS) * call->in;
    if (call->rows <= MAX_ROWS) {
        const few_plan plan = plan_few(call);
        floats = call->rows * (call->num_threads * call->in + (plan.apart ? plan.runs * plan.bands * plan.lanes : 0));
    }
    return call->num_threads * (int64_t)sizeof(panel_space) + floats * (int64_t)sizeof(float);
}

void kv_linear(const kv_linear_call *call) {
    panel_space *spaces = call->scratch;
    float *widened = (float *)(spaces + call->num_threads);
    (call->rows <= MAX_ROWS ? few_rows : many_rows)(call, spaces, widened);
}
