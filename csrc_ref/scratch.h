/* Scratch of one call. Small scratch lies in memory that the calling thread keeps: a decode step faults no page in. */
#ifndef KVKERN_SCRATCH_H
#define KVKERN_SCRATCH_H

#include <stdint.h>
#include <stdlib.h>

#define KEPT_BYTES (1 << 20)

static _Thread_local _Alignas(64) char kept_scratch[KEPT_BYTES];

static void *take_scratch(int64_t bytes) { return bytes <= KEPT_BYTES ? kept_scratch : malloc((size_t)bytes); }

static void give_scratch(void *scratch) {
    if (scratch != kept_scratch) free(scratch);
}

#endif
