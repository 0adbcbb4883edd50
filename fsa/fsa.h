// fsa.h: the public C API of libfsa, native sparse attention on NVIDIA GPUs (sm_80 and up). Papers: NSA,
// arXiv 2502.11089 (the method); FSA, arXiv 2508.18224 (the loop order of the selected branch: KV blocks in
// the outer loop). The equations, with the names used here, are in README.md; example.c is a complete
// program.
#ifndef FSA_H
#define FSA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The version of this header, and of the whole project. A function or field that MAJOR.MINOR has stays in all
// later versions of MAJOR.
#define FSA_VERSION_MAJOR 0
#define FSA_VERSION_MINOR 1
#define FSA_VERSION_PATCH 0

#pragma GCC visibility push(default) // libfsa.so exports the functions of this header, no others

// Returns the version of the library that is linked: 1000 * FSA_VERSION_MAJOR + FSA_VERSION_MINOR.
int fsa_version(void);

// Compression phi: how a window of cmp_len tokens becomes one compressed token (NSA, "Token Compression").
typedef enum {
    FSA_PHI_MEAN = 0,   // average of the window
    FSA_PHI_LINEAR = 1, // (window + position embedding) times a weight [cmp_len*head_dim, head_dim]
} FsaPhi;

// Visibility rule: the keys that a query at position t of its sequence sees.
typedef enum {
    FSA_CAUSAL = 0,     // tokens 0..t
    FSA_WINDOW = 1,     // tokens t - window + 1 .. t
    FSA_COMPRESSED = 2, // compression windows i with cmp_stride*i + cmp_len - 1 <= t
    // Tokens 0..t of the selected blocks. Only the C reference accepts this value. No GPU function does: the
    // selected branch has functions of its own, fsa_selected_forward and fsa_selected_backward.
    FSA_SELECTED = 3,
} FsaVisibility;

// The 16-bit type of all GPU arrays that are not said to be fp32.
typedef enum {
    FSA_BF16 = 0,
    FSA_FP16 = 1,
} FsaDtype;

// Status that every GPU function returns. fsa_last_error describes the error in one line.
typedef enum {
    FSA_OK = 0,
    FSA_ERROR_CONFIG = 1,    // the FsaConfig breaks a rule or is not supported on the GPU
    FSA_ERROR_ARGUMENT = 2,  // a pointer is NULL or misaligned; a count or an enum value is out of range
    FSA_ERROR_WORKSPACE = 3, // the workspace is NULL, misaligned or too small
    FSA_ERROR_CUDA = 4,      // a launch or a CUDA call failed, or an earlier CUDA error is pending
} FsaStatus;

enum { FSA_MAX_HEAD_DIM = 512, FSA_MAX_TOPK = 4096 };

// Shape of the attention. fsa_config_check checks the rules stated here.
typedef struct {
    int q_heads;        // Hq, query heads: a multiple of Hkv; g = Hq/Hkv, the GQA group size, is 1 to 16
    int kv_heads;       // Hkv, key-value heads
    int head_dim;       // d, channels per head: even, at most FSA_MAX_HEAD_DIM; on the GPU 64 or 128
    int cmp_len;        // l, tokens of a compression window; at most block
    int cmp_stride;     // s, tokens between the starts of windows; divides cmp_len and block
    int block;          // B, tokens of a selection block; a multiple of 16
    int topk;           // T, blocks per query, initial and local blocks included; at most FSA_MAX_TOPK
    int init_blocks;    // initial blocks: the first of a sequence, always selected
    int local_blocks;   // local blocks: the last ones up to the query's own, always selected
    int window;         // W, tokens that the sliding branch sees; at least 1
    FsaPhi phi;         // compression
    int gate_per_token; // 0: three gates for each query head; 1: three gates for each token
    float scale;        // factor of q.k before softmax; 0: 1/sqrt(head_dim)
    int recompute;      // 1: forward does not save the branches' outputs, backward recomputes them (GPU)
    int reserved[4];    // must be 0; room for the fields of later versions
} FsaConfig;

// A segment: the queries at positions pos .. pos + len - 1 of sequence seq. The query arrays hold the
// segments one after another. Segments ascend by (seq, pos) and do not overlap. Segments and sequences may be
// empty. Training on whole sequences has one segment per sequence: (seq, 0, length).
typedef struct {
    int64_t seq, pos, len;
} FsaSegment;

// Checks a configuration against the rules of FsaConfig. Returns 0 if it obeys them. Otherwise returns -1 and
// writes one line to msg: the field, its value, the rule, and a value to try if there is one. Writes at most
// msg_size bytes, including the terminating NUL. msg may be NULL if msg_size is 0.
int fsa_config_check(const FsaConfig *c, char *msg, size_t msg_size);

// Returns the number of compression windows of a sequence of n tokens: floor((n - l)/s) + 1, or 0 if n < l.
int64_t fsa_num_windows(const FsaConfig *c, int64_t n);

// ---------------------------------------------------------------------------------------------
// The GPU library
//
// N is the number of keys (tokens) of a batch, Nq of queries, M of compression windows. Arrays are row-major:
//   q, o, dout, dq               [Nq, Hq, d]     16-bit (dtype)
//   k, v, dk, dv                 [N, Hkv, d]     16-bit
//   kc, vc                       [M, Hkv, d]     16-bit; compressed keys and values, by sequence
//   gate_logits, dgate_logits    [Nq, Hq, 3]     16-bit; compressed, selected, sliding
//                                [Nq, 3]         the same with gate_per_token
//   lse                          [Nq, Hq]        fp32; natural log-sum-exp of a branch; -inf: no visible key
//   block_indices                [Hkv, Nq, T]    int32; ascending block numbers in the sequence, then -1
//
// Every function checks the whole FsaConfig, also the fields that it does not need: full attention, too,
// needs valid cmp_len, cmp_stride, block, topk and window. RoPE rounds the rotated q and k to 16 bits.
//
// Row strides. The 16-bit arrays of tokens may be views of larger matrices, such as q in the output of one
// QKV matmul. X_stride is the number of elements from a token's row of X to the next one, at least the length
// of a row and a multiple of 8. 0 means packed: the rows follow each other. A row itself is contiguous. The
// elements between rows are neither read nor written. gate_logits and dgate_logits need no alignment beyond
// their element's: any gate_stride from the length of a row on.
//
// Argument structs. Set all fields to zero, then `size`, then what is needed:
//     FsaForward a = {.size = sizeof a, .q = q, .k = k, ...};
// A field that is not set has its default, which its comment states; a pointer has none unless its comment
// says so. Later versions add fields at the end. A library accepts a struct of another version if the fields
// that it does not know are zero.
//
// Pointers are device pointers, aligned to 16 bytes, unless said otherwise; c, b and the argument structs are
// on the host, and not NULL. No output overlaps an input, another output, saved or the workspace, but where a
// comment allows it. A function launches kernels on `stream` and returns. It allocates nothing, never
// synchronizes, and may be called from several threads that have separate workspaces. Results are bitwise
// reproducible on the same GPU. NaN or Inf in one sequence never reaches another sequence. It does reach the
// gradients of phi's weights.
//
// Errors common to all functions that launch kernels:
//   FSA_ERROR_CONFIG      fsa_config_check fails; head_dim is not 64 or 128; kv_heads > 65,535; where blocks
//                         are selected: the free blocks of a query exceed shared memory. With d = 128,
//                         T - init_blocks - local_blocks can be about 490 for g = 4, and 99 for g = 16
//   FSA_ERROR_ARGUMENT    a pointer that is needed is NULL, misaligned, host memory or memory of another GPU;
//                         a stride or the size of a struct breaks its rule; dtype is unknown; a count of b
//                         breaks its rule; Nq*T >= 2^31 or Nq*Hq >= 2^32; a stride times Nq or N > 2^35;
//                         the stream belongs to another GPU (CUDA 12.8 or later knows); the environment
//                         variable FSA_KERNELS is set, and neither "portable" nor "sm90"
//   FSA_ERROR_WORKSPACE   workspace is NULL, not aligned to 256 bytes, or smaller than fsa_workspace_size
//   FSA_ERROR_CUDA        a CUDA error of an earlier call is pending on the calling thread. It stays pending
// A function finds these errors before its first step, and launches nothing. It finds the following one only
// at the step that it concerns, after it has launched the earlier steps:
//   FSA_ERROR_CUDA        a launch, a copy or another CUDA call failed. fsa_last_error has the name of the
//                         kernel or call, and CUDA's text. The function resets the error (cudaGetLastError)

typedef struct CUstream_st *FsaStream; // a cudaStream_t

// Packed sequences and their queries. The counts are on the host; the arrays are on the device. Counts are at
// least 0; num_queries is below 2^31, num_keys below 2^30. Keys need a sequence, queries a segment and a key.
// The functions do not read the arrays' content before they launch, so it is not checked: cu_seqlens ascends
// from 0 to N; 0 <= seq < num_seqs, 0 <= pos, pos + len is at most the length of sequence seq, segments
// ascend as FsaSegment says, and the sum of all len is Nq; block indices obey the rules of
// fsa_selected_forward. Other content makes kernels read and write out of bounds.
typedef struct {
    int64_t num_queries, num_keys; // Nq, N
    int64_t num_seqs, num_segments;
    const int64_t *cu_seqlens;  // [num_seqs + 1] first key of each sequence; cu_seqlens[num_seqs] = N
    const FsaSegment *segments; // [num_segments]; both arrays are aligned to 8 bytes
    int64_t reserved[2];        // must be 0; room for the fields of later versions
} FsaDeviceBatch;

// Parameters of the compression for phi = linear: wk, wv [Hkv, l*d, d], whose row r*d + c multiplies channel
// c of the window's token r; pe [Hkv, l, d], NULL: no position embedding. phi = mean has none: all NULL.
typedef struct {
    const void *wk, *pe, *wv;
} FsaPhiWeights;
// Their gradients, fp32, of the same shapes. Backward adds to them. dpe is ignored if pe is NULL.
typedef struct {
    float *dwk, *dpe, *dwv;
} FsaPhiGradients;

// The operation that a workspace is for.
typedef enum {
    FSA_FORWARD = 0,            // fsa_forward
    FSA_BACKWARD = 1,           // fsa_backward
    FSA_SELECTED_FORWARD = 2,   // fsa_selected_forward
    FSA_SELECTED_BACKWARD = 3,  // fsa_selected_backward
    FSA_SELECT_BLOCKS = 4,      // fsa_select_blocks
    FSA_ATTENTION_FORWARD = 5,  // fsa_attention_forward
    FSA_ATTENTION_BACKWARD = 6, // fsa_attention_backward
} FsaOperation;

// Returns one line that describes the last error of a GPU function on the calling thread; "" before the first
// error.
const char *fsa_last_error(void);

// Returns the bytes of workspace that an operation needs on the current GPU; 0 after an error, which
// fsa_last_error describes. The workspace must be aligned to 256 bytes. Only b's counts are read. A batch
// whose counts are all at least as large needs at least as much, so one workspace for the largest batch
// serves all.
size_t fsa_workspace_size(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaOperation op);

// Returns the bytes that fsa_forward saves for fsa_backward; 0 after an error, and for an empty batch. They
// hold the rotated q and k, kc and vc, the lse of the three branches, the block indices and, unless
// c->recompute is set, the outputs of the three branches: 3*Nq*Hq*d*2 bytes, about two thirds of all. With
// c->recompute, backward runs the forward pass of the branches again. A batch whose counts are all at least
// as large needs at least as much.
size_t fsa_saved_size(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b);
// Returns the block indices [Hkv, Nq, T] inside `saved`, a device pointer; NULL after an error.
const int32_t *fsa_saved_block_indices(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                                       const void *saved);

typedef struct {
    size_t size;             // sizeof(FsaForward)
    const void *q, *k, *v;   // q and k before RoPE
    const void *gate_logits; // before the sigmoid
    int64_t q_stride, k_stride, v_stride, gate_stride;
    FsaPhiWeights phi;
    const double *inv_freq;       // [d/2] double, radians per token; NULL: no RoPE
    const int32_t *block_indices; // the blocks to attend to, as fsa_selected_forward takes them; NULL: they
                                  // are selected by their scores
    void *o; // output: the gated sum of the three branches. It may be q, with the same stride
    int64_t o_stride;
    void *saved; // output: fsa_saved_size bytes for fsa_backward
    void *workspace;
    size_t workspace_bytes;
} FsaForward;
// Computes native sparse attention, all steps (NSA, "Algorithm Design"). Errors: those common to all.
int fsa_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const FsaForward *args,
                FsaStream stream);

typedef struct {
    size_t size;             // sizeof(FsaBackward)
    const void *k, *v;       // of forward, k before RoPE
    const void *gate_logits; // of forward
    const void *dout;        // the gradient of o
    int64_t k_stride, v_stride, gate_stride, dout_stride;
    FsaPhiWeights phi;      // of forward
    const double *inv_freq; // of forward
    const void *saved;      // of forward
    void *dq, *dk, *dv;     // outputs; dq and dk are the gradients of q and k before RoPE
    void *dgate_logits;     // output
    int64_t dq_stride, dk_stride, dv_stride, dgate_stride;
    FsaPhiGradients dphi; // outputs, added to; ignored for phi = mean
    void *workspace;
    size_t workspace_bytes;
} FsaBackward;
// Computes the gradients of fsa_forward. c, dtype and b are those of forward. No gradient flows through the
// block selection. Equations: README.md, "Backward". Errors: those common to all.
int fsa_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const FsaBackward *args,
                 FsaStream stream);

typedef struct {
    size_t size;           // sizeof(FsaSelectedForward)
    const void *q, *k, *v; // q and k after RoPE
    int64_t q_stride, k_stride, v_stride;
    const int32_t *block_indices;
    void *o;    // output
    float *lse; // output
    int64_t o_stride;
    void *workspace;
    size_t workspace_bytes;
} FsaSelectedForward;
// Computes the selected branch alone (NSA, "Token Selection", in FSA's loop order): attention of q to k and v
// over the tokens of a query's blocks up to the query itself. The blocks of a query in block_indices are
// distinct, ascending, and not after the query's own block; the list is padded with -1. It must contain the
// initial blocks (the first init_blocks) and the local blocks (the last local_blocks), as far as they exist.
// The lists of fsa_select_blocks do. On Hopper, forward attends to these blocks without reading the list. A
// caller whose lists do not contain them sets both counts to 0; lists may then have any length from 0 to T.
// Errors: those common to all.
int fsa_selected_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                         const FsaSelectedForward *args, FsaStream stream);

typedef struct {
    size_t size;           // sizeof(FsaSelectedBackward)
    const void *q, *k, *v; // of forward
    const void *o;         // of forward
    const void *dout;      // the gradient of o
    int64_t q_stride, k_stride, v_stride, o_stride, dout_stride;
    const float *lse;             // of forward
    const int32_t *block_indices; // of forward
    void *dq, *dk, *dv;           // outputs
    int64_t dq_stride, dk_stride, dv_stride;
    void *workspace;
    size_t workspace_bytes;
} FsaSelectedBackward;
// Computes the gradients of fsa_selected_forward. Errors: those common to all.
int fsa_selected_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                          const FsaSelectedBackward *args, FsaStream stream);

typedef struct {
    size_t size;    // sizeof(FsaSelectBlocks)
    const void *q;  // after RoPE
    const void *kc; // after RoPE; floor(N/s) rows must exist; may be NULL if that is 0
    int64_t q_stride, kc_stride;
    const float *lse_c;     // lse of the compressed branch, from fsa_attention_forward with FSA_COMPRESSED
    int32_t *block_indices; // output
    void *workspace;
    size_t workspace_bytes;
} FsaSelectBlocks;
// Computes the block selection alone (NSA, "Token Selection"). A query gets min(T, blocks up to its own)
// blocks: the initial and local blocks, and of the others those with the greatest scores; ties go to the
// lower index. Errors: those common to all.
int fsa_select_blocks(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                      const FsaSelectBlocks *args, FsaStream stream);

typedef struct {
    size_t size;           // sizeof(FsaAttentionForward)
    FsaVisibility rule;    // FSA_CAUSAL, FSA_WINDOW or FSA_COMPRESSED
    const void *q, *k, *v; // FSA_COMPRESSED: k and v are kc and vc
    int64_t q_stride, k_stride, v_stride;
    const double *inv_freq; // [d/2] double, radians per token: RoPE of q and k; NULL: q and k are used as
                            // they are. FSA_COMPRESSED needs NULL
    void *o;                // output
    float *lse;             // output
    int64_t o_stride;
    void *workspace;
    size_t workspace_bytes;
} FsaAttentionForward;
// Computes attention under a visibility rule: o = softmax(scale q k^T) v over the visible keys, after RoPE of
// q and k if inv_freq is set. For FSA_COMPRESSED the host knows only that M <= N/s, so kernels may load all
// floor(N/s) rows of kc and vc: these rows must exist, but rows from M may be uninitialized. k and v may be
// NULL if that number is 0. Errors: those common to all; FSA_ERROR_ARGUMENT for another rule.
int fsa_attention_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                          const FsaAttentionForward *args, FsaStream stream);

typedef struct {
    size_t size;           // sizeof(FsaAttentionBackward)
    FsaVisibility rule;    // of forward
    const void *q, *k, *v; // of forward
    const void *o;         // of forward
    const void *dout;      // the gradient of o
    int64_t q_stride, k_stride, v_stride, o_stride, dout_stride;
    const double *inv_freq; // of forward
    const float *lse;       // of forward
    void *dq, *dk, *dv;     // outputs: the gradients of q, k and v as they were passed, before RoPE
    int64_t dq_stride, dk_stride, dv_stride;
    void *workspace;
    size_t workspace_bytes;
} FsaAttentionBackward;
// Computes the gradients of fsa_attention_forward. For FSA_COMPRESSED the rows of dk and dv from M on are not
// written; k, v, dk and dv may be NULL if floor(N/s) is 0. Errors: those of forward.
int fsa_attention_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                           const FsaAttentionBackward *args, FsaStream stream);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
#endif
