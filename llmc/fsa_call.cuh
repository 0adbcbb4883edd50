// fsa_call.cuh: how the trainer calls libfsa: the type of the attention's arrays, and checked calls.
#ifndef LLMC_FSA_CALL_CUH
#define LLMC_FSA_CALL_CUH
#include "cuda_common.cuh"
#include "../fsa/fsa.h"

// The type of the attention's inputs and outputs: floatX, but fp16 in the fp32 build.
#ifdef ENABLE_FP32
typedef __half attnX;
#else
typedef floatX attnX;
#endif
#if defined(ENABLE_FP32) || defined(ENABLE_FP16)
static const FsaDtype attn_dtype = FSA_FP16;
#else
static const FsaDtype attn_dtype = FSA_BF16;
#endif
static const bool attn_needs_convert = sizeof(attnX) != sizeof(floatX);

// Exits with the file, the line, the call and the error's text unless `call`, a function of fsa.h, returns
// FSA_OK.
#define fsa_check(call)                                                                                      \
    do {                                                                                                     \
        int status_ = (call);                                                                                \
        if (status_) die("%s:%d: %s", __FILE__, __LINE__, fsa_last_error());                                 \
    } while (0)
#endif
