/* Scratch of one call. Up to 1 MB of it is memory that the calling thread keeps until it ends: a decode step faults no page in. */
#ifndef KVKERN_SCRATCH_H
#define KVKERN_SCRATCH_H

#include <stdint.h>

/* Aligned as malloc's, or NULL when there is no memory. One at a time: a call gives its scratch back before another takes some. */
void *take_scratch(int64_t bytes);
void give_scratch(void *scratch);

#endif
