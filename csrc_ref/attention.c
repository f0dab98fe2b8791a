/* Attention of one layer: plan the rows, then four passes over packed tiles (contract A1 to A8).
 *
 *   scores   t = RNE16(RNE16(RNE16(q k) c) + 0)     threads over heads and spans of tiles
 *   softmax  max, exp, 16-lane sum, p                threads over rows
 *   output   one chain per (row, channel, run)       threads over heads and runs
 *   fold     run sums added left to right, RNE16     threads over rows
 *
 * Rows of all readers of a prefix stand side by side, so a prefix tile is read once for all of them. No thread adds to what
 * another one holds: bits depend on the inputs alone.
 */
#include <stdlib.h>

#include "chain.h"
#include "kvkern.h"
#include "scratch.h"
#include "softmax.h"

#define SPAN_TILES (KEY_RUN / TILE_TOKENS) /* tiles of one work item of the score pass, and of the shortest run */

/* One reader inside a slice of query positions. */
typedef struct {
    int64_t b, prefix, run;           /* run: its KEY_RUN */
    int64_t shared_tiles, tiles;      /* tiles from the pool; tiles in all */
    int64_t first_query, num_queries; /* its query positions inside the slice */
    int64_t first_row;                /* its first row inside each KV head's rows */
    int64_t keys;                     /* all keys of the reader in this call */
} reader_plan;

/* One query row: a reader, a query position, a query head. */
typedef struct {
    float *q, *t, *runs; /* [head_dim], [64 tiles] scores and then p, [num_runs, head_dim] */
    int64_t visible, query, head;
    const reader_plan *reader;
    int is_nan;
} row_plan;

/* Work: the rows of readers first..last-1 of one KV head against the tiles begin..end-1. */
typedef struct {
    int64_t kv_head, first, last, begin, end;
} span;

typedef struct {
    const kv_attention *call;
    int64_t first_query, end_query, group, rows_per_head, num_score_spans, num_output_spans;
    reader_plan *readers;
    row_plan *rows; /* [kv_heads, rows_per_head] */
    span *score_spans, *output_spans;
} slice_plan;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t key_run(const kv_attention *call, int64_t b, int64_t keys) {
    if (call->key_run) return call->key_run;
    return call->query_len[b] == 1 || keys <= 1024 ? KEY_RUN : KEY_RUN_LONG;
}

static int64_t keys_of(const kv_attention *call, int64_t b) {
    return (int64_t)call->prefix_len[call->reader_prefix[b]] + call->suffix_len[b];
}

/* ---- planning -------------------------------------------------------------------------------------------------------- */

/* Scratch = fixed + per_query * query positions. */
static void scratch_need(const kv_attention *call, int64_t *fixed, int64_t *per_query) {
    int64_t spans = 0, rows = 0;
    for (int64_t b = 0; b < call->num_readers; b++) {
        const int64_t tiles = ceil_div(keys_of(call, b), TILE_TOKENS);
        const int64_t floats = call->head_dim + tiles * TILE_TOKENS + (tiles / (KEY_RUN / TILE_TOKENS) + 1) * call->head_dim;
        rows += call->num_q_heads * ((int64_t)sizeof(row_plan) + floats * (int64_t)sizeof(float));
        spans += call->num_kv_heads * (2 * (tiles / SPAN_TILES) + 4);
    }
    *fixed = call->num_readers * (int64_t)sizeof(reader_plan) + spans * (int64_t)sizeof(span) + 5 * 64;
    *per_query = rows;
}

/* Query positions of every reader that are computed at once. */
static int64_t slice_queries(const kv_attention *call, int64_t fixed, int64_t per_query) {
    return max_of(1, min_of(call->max_query_len, (call->scratch_bound_bytes - fixed) / max_of(per_query, 1)));
}

int64_t kv_attend_scratch_bytes(const kv_attention *call) {
    int64_t fixed, per_query;
    scratch_need(call, &fixed, &per_query);
    return fixed + per_query * slice_queries(call, fixed, per_query);
}

static int by_prefix_and_run(const void *left, const void *right) {
    const reader_plan *a = left, *b = right;
    if (a->prefix != b->prefix) return a->prefix < b->prefix ? -1 : 1;
    if (a->run != b->run) return a->run < b->run ? -1 : 1;
    return a->b < b->b ? -1 : 1;
}

static void *carve(char **free_space, int64_t bytes) {
    char *start = *free_space;
    *free_space = start + ceil_div(bytes, 64) * 64;
    return start;
}

static void plan_readers(slice_plan *plan) {
    const kv_attention *call = plan->call;
    for (int64_t b = 0; b < call->num_readers; b++) {
        reader_plan *reader = &plan->readers[b];
        const int64_t keys = keys_of(call, b);
        const int64_t visible = max_of(0, keys - (call->max_query_len - plan->end_query));
        reader->b = b;
        reader->prefix = call->reader_prefix[b];
        reader->keys = keys;
        reader->run = key_run(call, b, keys);
        reader->tiles = ceil_div(visible, TILE_TOKENS);
        reader->shared_tiles = min_of(reader->tiles, call->prefix_len[reader->prefix] / TILE_TOKENS);
        reader->first_query = max_of(plan->first_query, call->max_query_len - call->query_len[b]);
        reader->num_queries = max_of(0, plan->end_query - reader->first_query);
    }
    qsort(plan->readers, (size_t)call->num_readers, sizeof(reader_plan), by_prefix_and_run);
    plan->rows_per_head = 0;
    for (int64_t i = 0; i < call->num_readers; i++) {
        plan->readers[i].first_row = plan->rows_per_head;
        plan->rows_per_head += plan->readers[i].num_queries * plan->group;
    }
}

static void plan_rows(slice_plan *plan, char **free_space) {
    const kv_attention *call = plan->call;
    plan->rows = carve(free_space, plan->rows_per_head * call->num_kv_heads * (int64_t)sizeof(row_plan));
    float *floats = (float *)*free_space;
    row_plan *row = plan->rows;
    for (int64_t kv_head = 0; kv_head < call->num_kv_heads; kv_head++)
        for (int64_t i = 0; i < call->num_readers; i++) {
            const reader_plan *reader = &plan->readers[i];
            const int64_t num_runs = ceil_div(reader->tiles * TILE_TOKENS, reader->run);
            for (int64_t query = reader->first_query; query < plan->end_query; query++)
                for (int64_t g = 0; g < plan->group; g++, row++) {
                    row->reader = reader;
                    row->query = query;
                    row->head = kv_head * plan->group + g;
                    row->visible = max_of(0, reader->keys - (call->max_query_len - 1 - query));
                    row->q = floats;
                    row->t = row->q + call->head_dim;
                    row->runs = row->t + reader->tiles * TILE_TOKENS;
                    floats = row->runs + num_runs * call->head_dim;
                }
        }
}

static int64_t add_spans(span *spans, int64_t kv_head, int64_t first, int64_t last, int64_t begin, int64_t end, int64_t step) {
    int64_t count = 0;
    for (int64_t tile = begin; tile < end; tile += step, count++)
        spans[count] = (span){kv_head, first, last, tile, min_of(tile + step, end)};
    return count;
}

/* Readers of one prefix with one run length form a team: they share score spans up to the prefix, and all output runs. */
static void plan_spans(slice_plan *plan) {
    const kv_attention *call = plan->call;
    const reader_plan *readers = plan->readers;
    plan->num_score_spans = plan->num_output_spans = 0;
    for (int64_t kv_head = 0; kv_head < call->num_kv_heads; kv_head++)
        for (int64_t first = 0, last; first < call->num_readers; first = last) {
            int64_t shared = 0, tiles = 0;
            for (last = first; last < call->num_readers && readers[last].prefix == readers[first].prefix &&
                               readers[last].run == readers[first].run; last++) {
                shared = max_of(shared, readers[last].shared_tiles);
                tiles = max_of(tiles, readers[last].tiles);
                plan->num_score_spans +=
                    add_spans(plan->score_spans + plan->num_score_spans, kv_head, last, last + 1,
                              readers[last].shared_tiles, readers[last].tiles, SPAN_TILES);
            }
            plan->num_score_spans += add_spans(plan->score_spans + plan->num_score_spans, kv_head, first, last, 0, shared, SPAN_TILES);
            plan->num_output_spans += add_spans(plan->output_spans + plan->num_output_spans, kv_head, first, last, 0, tiles,
                                                readers[first].run / TILE_TOKENS);
        }
}

/* ---- passes ---------------------------------------------------------------------------------------------------------- */

static const uint16_t *tile_of(const kv_attention *call, const reader_plan *reader, int64_t kv_head, int64_t tile, int is_v) {
    const int64_t head_size = call->head_dim * TILE_TOKENS;
    const int64_t shared_tiles = call->prefix_len[reader->prefix] / TILE_TOKENS;
    if (tile < shared_tiles) {
        const int64_t block = tile / call->block_tiles, place = tile % call->block_tiles;
        const int64_t offset = call->block_table[(reader->prefix * call->max_blocks + block) * 2 + is_v];
        return call->pool + offset + place * call->stride_tile + call->layer_offset + kv_head * head_size;
    }
    return (is_v ? call->suffix_v : call->suffix_k) + reader->b * call->stride_sb + kv_head * call->stride_sh +
           (tile - shared_tiles) * call->stride_st;
}

/* The tile to fetch while this one is read. The reader may end before it: another one of its prefix reads on. */
static int64_t following(const reader_plan *reader, int64_t tile) { return tile + 1 < reader->tiles ? tile + 1 : tile; }

static row_plan *rows_begin(const slice_plan *plan, int64_t kv_head, int64_t reader) {
    return plan->rows + kv_head * plan->rows_per_head + plan->readers[reader].first_row;
}

static row_plan *rows_end(const slice_plan *plan, int64_t kv_head, int64_t reader) {
    return rows_begin(plan, kv_head, reader) + plan->readers[reader].num_queries * plan->group;
}

static void widen_query(const kv_attention *call, row_plan *row) {
    const uint16_t *q = call->q + row->reader->b * call->stride_qb + row->head * call->stride_qh + row->query * call->stride_qt;
    for (int64_t channel = 0; channel < call->head_dim; channel++) row->q[channel] = widen(q[channel]);
}

static void score_tile(const kv_attention *call, row_plan *begin, row_plan *end, int64_t tile, const uint16_t *k,
                       const uint16_t *upcoming) {
    for (row_plan *row = begin; row < end; row += MAX_ROWS) {
        const int rows = (int)min_of(MAX_ROWS, end - row);
        float sums[MAX_ROWS][TILE_TOKENS] = {{0.0f}};
        float *acc[MAX_ROWS];
        const float *q[MAX_ROWS];
        int64_t visible = 0;
        for (int r = 0; r < rows; r++) {
            acc[r] = sums[r];
            q[r] = row[r].q;
            visible = max_of(visible, row[r].visible);
        }
        if (visible <= tile * TILE_TOKENS) continue;
        chain(rows, TILE_TOKENS, acc, q, k, TILE_TOKENS, call->head_dim, upcoming);
        for (int r = 0; r < rows; r++) {
            float *t = row[r].t + tile * TILE_TOKENS;
            if (row[r].visible <= tile * TILE_TOKENS) continue;
            for (int lane = 0; lane < TILE_TOKENS; lane++)
                t[lane] = round16(round16(round16(sums[r][lane]) * call->sm_scale) + 0.0f);
        }
    }
}

static void score_span(const slice_plan *plan, const span *work) {
    const reader_plan *reader = &plan->readers[work->first];
    row_plan *begin = rows_begin(plan, work->kv_head, work->first), *end = rows_end(plan, work->kv_head, work->last - 1);
    for (int64_t tile = work->begin; tile < work->end; tile++) {
        const uint16_t *k = tile_of(plan->call, reader, work->kv_head, tile, 0);
        score_tile(plan->call, begin, end, tile, k, tile_of(plan->call, reader, work->kv_head, following(reader, tile), 0));
    }
}

/* Adds the tile's keys to one to MAX_ROWS chains. A key that only some of the rows see must not touch the others (A7). */
static void output_rows(const kv_attention *call, row_plan *row, int rows, int64_t run, int64_t tile, const uint16_t *v,
                        const uint16_t *upcoming) {
    const int64_t first_key = tile * TILE_TOKENS;
    int64_t fewest = TILE_TOKENS, most = 0;
    for (int r = 0; r < rows; r++) {
        const int64_t seen = min_of(TILE_TOKENS, max_of(0, row[r].visible - first_key));
        fewest = min_of(fewest, seen);
        most = max_of(most, seen);
    }
    if (most == 0) return;
    if (fewest != most) {
        for (int r = 0; r < rows; r++) output_rows(call, row + r, 1, run, tile, v, upcoming);
        return;
    }
    for (int64_t channel = 0; channel < call->head_dim;) {
        const int lanes = call->head_dim - channel >= TILE_TOKENS ? TILE_TOKENS : 16;
        float *acc[MAX_ROWS];
        const float *p[MAX_ROWS];
        for (int r = 0; r < rows; r++) {
            acc[r] = row[r].runs + run * call->head_dim + channel;
            p[r] = row[r].t + first_key;
        }
        chain(rows, lanes, acc, p, v + channel, call->head_dim, most, upcoming + channel);
        channel += lanes;
    }
}

static void output_tile(const slice_plan *plan, row_plan *begin, row_plan *end, int64_t kv_head, int64_t run, int64_t tile) {
    const reader_plan *reader = begin->reader;
    const uint16_t *v = tile_of(plan->call, reader, kv_head, tile, 1);
    const uint16_t *upcoming = tile_of(plan->call, reader, kv_head, following(reader, tile), 1);
    for (row_plan *row = begin; row < end; row += MAX_ROWS)
        output_rows(plan->call, row, (int)min_of(MAX_ROWS, end - row), run, tile, v, upcoming);
}

static void output_span(const slice_plan *plan, const span *work) {
    const kv_attention *call = plan->call;
    const reader_plan *readers = plan->readers;
    const int64_t run = work->begin * TILE_TOKENS / readers[work->first].run;
    row_plan *begin = rows_begin(plan, work->kv_head, work->first), *end = rows_end(plan, work->kv_head, work->last - 1);
    if (begin == end) return;
    for (row_plan *row = begin; row < end; row++)
        if (row->visible > work->begin * TILE_TOKENS)
            memset(row->runs + run * call->head_dim, 0, (size_t)call->head_dim * sizeof(float));
    for (int64_t tile = work->begin; tile < work->end; tile++) {
        if (tile < call->prefix_len[readers[work->first].prefix] / TILE_TOKENS) {
            output_tile(plan, begin, end, work->kv_head, run, tile);
            continue;
        }
        for (int64_t i = work->first; i < work->last; i++)
            if (tile < readers[i].tiles && readers[i].num_queries)
                output_tile(plan, rows_begin(plan, work->kv_head, i), rows_end(plan, work->kv_head, i), work->kv_head, run, tile);
    }
}

static void fold_row(const kv_attention *call, const row_plan *row) {
    uint16_t *out = call->out + row->reader->b * call->stride_ob + row->query * call->stride_ot + row->head * call->stride_oh;
    const int64_t num_runs = ceil_div(row->visible, row->reader->run), head_dim = call->head_dim;
    if (row->visible == 0 || row->is_nan) {
        for (int64_t channel = 0; channel < head_dim; channel++) out[channel] = row->visible ? BF16_NAN : 0;
        return;
    }
    float *sum = row->runs;
    for (int64_t run = 1; run < num_runs; run++)
        for (int64_t channel = 0; channel < head_dim; channel++) sum[channel] += row->runs[run * head_dim + channel];
    for (int64_t channel = 0; channel < head_dim; channel++) out[channel] = sum[channel] == sum[channel] ? rne16(sum[channel]) : BF16_NAN;
}

static void softmax_pass(const kv_attention *call, row_plan *row) {
    if (row->visible == 0) {
        row->is_nan = 0;
        return;
    }
    const float lse = softmax_row(row->t, row->visible);
    row->is_nan = lse != lse;
    if (call->lse) call->lse[(row->reader->b * call->num_q_heads + row->head) * call->max_query_len + row->query] = lse;
}

static void run_slice(const slice_plan *plan) {
    const kv_attention *call = plan->call;
    const int64_t num_rows = plan->rows_per_head * call->num_kv_heads;
#pragma omp parallel num_threads((int)call->num_threads) if (call->num_threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_rows; i++) widen_query(call, &plan->rows[i]);
#pragma omp for schedule(guided) /* long stretches first: the upcoming tile is mostly this thread's own */
        for (int64_t i = 0; i < plan->num_score_spans; i++) score_span(plan, &plan->score_spans[i]);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_rows; i++) softmax_pass(call, &plan->rows[i]);
#pragma omp for schedule(guided)
        for (int64_t i = 0; i < plan->num_output_spans; i++) output_span(plan, &plan->output_spans[i]);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_rows; i++) fold_row(call, &plan->rows[i]);
    }
}

/* Rows that are padding, and the log-sum-exp of rows that see nothing. */
static void clear_padding(const kv_attention *call) {
    for (int64_t b = 0; b < call->num_readers; b++)
        for (int64_t query = 0; query < call->max_query_len - call->query_len[b]; query++)
            for (int64_t head = 0; head < call->num_q_heads; head++)
                memset(call->out + b * call->stride_ob + query * call->stride_ot + head * call->stride_oh, 0,
                       (size_t)call->head_dim * sizeof(uint16_t));
    if (call->lse)
        for (int64_t i = 0; i < call->num_readers * call->num_q_heads * call->max_query_len; i++) call->lse[i] = -INFINITY;
}

int kv_attend(const kv_attention *call) {
    int64_t fixed, per_query;
    scratch_need(call, &fixed, &per_query);
    if (call->num_readers == 0 || call->max_query_len == 0) return KVKERN_OK;
    clear_padding(call);
    const int64_t fit = slice_queries(call, fixed, per_query);
    void *scratch = take_scratch(kv_attend_scratch_bytes(call));
    if (!scratch) return KVKERN_NO_MEMORY;
    for (int64_t first = 0; first < call->max_query_len; first += fit) {
        slice_plan plan = {.call = call, .first_query = first, .end_query = min_of(first + fit, call->max_query_len),
                           .group = call->num_q_heads / call->num_kv_heads};
        char *free_space = scratch;
        int64_t spans = 0;
        for (int64_t b = 0; b < call->num_readers; b++) spans += ceil_div(keys_of(call, b), TILE_TOKENS) / SPAN_TILES + 2;
        plan.readers = carve(&free_space, call->num_readers * (int64_t)sizeof(reader_plan));
        plan.score_spans = carve(&free_space, spans * call->num_kv_heads * (int64_t)sizeof(span));
        plan.output_spans = carve(&free_space, spans * call->num_kv_heads * (int64_t)sizeof(span));
        plan_readers(&plan);
        plan_rows(&plan, &free_space);
        plan_spans(&plan);
        run_slice(&plan);
    }
    give_scratch(scratch);
    return KVKERN_OK;
}

void kv_exp(const float *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = exp_c(x[i]);
}

void kv_round16(const float *x, uint16_t *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = rne16(x[i]);
}

int64_t kv_abi(void) { return KVKERN_ABI; }
const char *kv_contract_id(void) { return CONTRACT_ID; }
