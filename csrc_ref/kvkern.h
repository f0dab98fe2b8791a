/* The C interface of kvkern: the numeric contract. kvkern/kernels/native*.py mirror the structs. */
#ifndef KVKERN_H
#define KVKERN_H

#include <stdint.h>

#define KVKERN_ABI 3

/* Status codes. */
enum { KVKERN_OK = 0, KVKERN_NO_MEMORY = 1 };

/* One attention call of one layer. Strides and offsets count bf16 elements; the innermost axis of q, out and tiles is dense.
 *
 * Reader b has prefix_len[reader_prefix[b]] prefix keys, then suffix_len[b] suffix keys. Its last query_len[b] rows of q are
 * queries (the rows before them are padding and come out as +0); query t sees every key but the max_query_len - 1 - t last.
 * Tile n of a reader holds the keys 64n .. 64n+63: tiles before 64 * (prefix_len / 64) come from the pool, the others from
 * its suffix tiles, of which the first begins with a copy of the prefix's last prefix_len % 64 tokens.
 */
typedef struct {
    int64_t num_readers, max_query_len, num_q_heads, num_kv_heads, head_dim;
    const uint16_t *q; /* [readers, q_heads, max_query_len, head_dim] */
    int64_t stride_qb, stride_qh, stride_qt;
    uint16_t *out; /* [readers, max_query_len, q_heads, head_dim] */
    int64_t stride_ob, stride_ot, stride_oh;
    float *lse; /* [readers, q_heads, max_query_len], natural log, or NULL */

    const uint16_t *pool;
    const int64_t *block_table; /* [prefixes, max_blocks, 2]: offsets of a block's K and V from pool */
    int64_t max_blocks, block_tiles;
    int64_t stride_tile;  /* from a tile to the next inside a block */
    int64_t layer_offset; /* from the tile's start to this layer's first KV head */
    const int32_t *prefix_len, *reader_prefix, *suffix_len, *query_len;

    const uint16_t *suffix_k, *suffix_v; /* [readers, kv_heads, suffix_tiles, head_dim * 64] */
    int64_t stride_sb, stride_sh, stride_st;

    float sm_scale;
    int64_t key_run; /* 512, 1024, or 0 for stock's rule */
    int64_t scratch_bound_bytes, num_threads;
} kv_attention;

/* Bytes that kv_attend takes while it runs: it splits max_query_len to stay under scratch_bound_bytes, or takes what one query
 * position of every reader needs, if that is more. */
int64_t kv_attend_scratch_bytes(const kv_attention *call);
int kv_attend(const kv_attention *call);

/* Token-major K and V of new tokens, to be written into suffix tiles. Reader b's last count[b] of max_count tokens go to
 * slots first_slot[b] .. of its suffix (slot 64 n + i is place i of suffix tile n). */
typedef struct {
    int64_t num_readers, num_kv_heads, head_dim, max_count;
    const uint16_t *k, *v; /* [readers, kv_heads, max_count, head_dim] */
    int64_t stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt;
    const int32_t *first_slot, *count;
    uint16_t *suffix_k, *suffix_v;
    int64_t stride_sb, stride_sh, stride_st;
} kv_append_call;

void kv_append(const kv_append_call *call);

/* y = x W^T (B1). The weight is k-major: [in][out], its row k `stride_w` elements from the one before. Innermost axes are dense. */
typedef struct {
    int64_t rows, in, out;
    const uint16_t *x; /* [rows, in] */
    int64_t stride_x;
    const uint16_t *weight;
    int64_t stride_w;
    uint16_t *y; /* [rows, out] */
    int64_t stride_y;
    int64_t num_threads;
} kv_linear_call;

int kv_linear(const kv_linear_call *call);

/* y = RNE16(RNE16(x / rms(x)) weight) (B2), width a multiple of 32 under 8,192. */
void kv_rms_norm(const uint16_t *x, int64_t stride_x, const uint16_t *weight, float eps, uint16_t *y, int64_t stride_y, int64_t rows,
                 int64_t width);

/* y = RNE16(silu[gate] up) (B4), elementwise; silu has 65,536 entries. Without up: y = silu[gate]. */
void kv_silu(const uint16_t *gate, const uint16_t *up, const uint16_t *silu, uint16_t *y, int64_t count);

/* For tests: exp_c, and RNE16, elementwise. */
void kv_exp(const float *x, float *y, int64_t n);
void kv_round16(const float *x, uint16_t *y, int64_t n);
int64_t kv_abi(void);
const char *kv_contract_id(void);

#endif
