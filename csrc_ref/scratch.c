#include "scratch.h"

#include <pthread.h>
#include <stdlib.h>

#define KEPT_BYTES (1 << 20)

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t kept;
static int has_key;

static void make_key(void) { has_key = pthread_key_create(&kept, free) == 0; }

void *take_scratch(int64_t bytes) {
    pthread_once(&once, make_key);
    if (bytes > KEPT_BYTES || !has_key) return malloc((size_t)bytes);
    void *scratch = pthread_getspecific(kept);
    if (!scratch) {
        scratch = malloc(KEPT_BYTES);
        if (scratch && pthread_setspecific(kept, scratch)) {
            free(scratch);
            scratch = NULL;
        }
    }
    return scratch;
}

void give_scratch(void *scratch) {
    if (!has_key || scratch != pthread_getspecific(kept)) free(scratch);
}
