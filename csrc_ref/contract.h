/* Constants of the numeric contract eager-bf16-v1. kvkern/contract.py is the twin; a test compares them bit for bit. */
#ifndef KVKERN_CONTRACT_H
#define KVKERN_CONTRACT_H

#define CONTRACT_ID "eager-bf16-v1"

#define TILE_TOKENS 64   /* tokens of one tile; also the lanes of one score chain */
#define SUM_LANES 16     /* A4: lanes of the softmax sum, by key index mod 16 */
#define KEY_RUN 512      /* A5: keys of one output chain under the contract */
#define KEY_RUN_LONG 1024 /* A5: the same in stock, for 2 query rows or more over more than 1,024 keys */

#define LINEAR_RUN 512         /* B1: terms of one chain of a Linear */
#define LINEAR_RUN_LONG 1024   /* B1: the same above LINEAR_LONG_ABOVE input channels */
#define LINEAR_LONG_ABOVE 1024

/* A6: exp_c. */
#define EXP_LOG2E 0x1.715476p+0f
#define EXP_LN2_HI 0x1.62e4p-1f
#define EXP_LN2_LO 0x1.7f7d1cp-20f
#define EXP_C6 0x1.a057b4p-13f
#define EXP_C5 0x1.6d2d92p-10f
#define EXP_C4 0x1.11114cp-7f
#define EXP_C3 0x1.5554f4p-5f
#define EXP_C2 0x1.555556p-3f
#define EXP_C1 0x1p-1f
#define EXP_MIN -104.0f

#define BF16_NAN 0x7fc0

#endif
