/* Write token-major K and V of new tokens into suffix tiles: K channel-major, V token-major. */
#include "contract.h"
#include "kvkern.h"

#include <string.h>

void kv_append(const kv_append_call *call) {
    const int64_t head_dim = call->head_dim;
    for (int64_t b = 0; b < call->num_readers; b++) {
        const int64_t skipped = call->max_count - call->count[b];
        for (int64_t h = 0; h < call->num_kv_heads; h++) {
            const uint16_t *k = call->k + b * call->stride_kb + h * call->stride_kh + skipped * call->stride_kt;
            const uint16_t *v = call->v + b * call->stride_vb + h * call->stride_vh + skipped * call->stride_vt;
            const int64_t base = b * call->stride_sb + h * call->stride_sh;
            for (int64_t i = 0; i < call->count[b]; i++) {
                const int64_t slot = call->first_slot[b] + i;
                const int64_t place = slot % TILE_TOKENS, tile = base + slot / TILE_TOKENS * call->stride_st;
                for (int64_t channel = 0; channel < head_dim; channel++)
                    call->suffix_k[tile + channel * TILE_TOKENS + place] = k[i * call->stride_kt + channel];
                memcpy(call->suffix_v + tile + place * head_dim, v + i * call->stride_vt, (size_t)head_dim * sizeof *v);
            }
        }
    }
}
