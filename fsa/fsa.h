// fsa.h: Native Sparse Attention (arXiv 2502.11089) with Flash Sparse Attention's loop order
// (arXiv 2508.18224). The mathematics, with the names used here, is in fsa/README.md.
#ifndef FSA_H
#define FSA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// How a window of cmp_len tokens becomes one compressed token.
typedef enum {
    FSA_PHI_MEAN = 0,   // the average
    FSA_PHI_LINEAR = 1, // (window + position embedding) times a weight [cmp_len*head_dim, head_dim]
} FsaPhi;

// Which keys a query at position t of its sequence sees.
typedef enum {
    FSA_CAUSAL = 0,     // tokens 0..t
    FSA_WINDOW = 1,     // the last `window` tokens up to t, t among them
    FSA_COMPRESSED = 2, // windows i with cmp_stride*i + cmp_len - 1 <= t
    FSA_SELECTED = 3,   // tokens up to t of the chosen blocks
} FsaVisibility;

// The 16-bit type of q, k, v, o and their gradients on the GPU.
typedef enum {
    FSA_BF16 = 0,
    FSA_FP16 = 1,
} FsaDtype;

// What every GPU entry returns; fsa_last_error tells more in words.
typedef enum {
    FSA_OK = 0,
    FSA_ERROR_CONFIG = 1,    // the FsaConfig breaks a rule or isn't supported on the GPU
    FSA_ERROR_ARGUMENT = 2,  // a pointer, size or enum argument is wrong
    FSA_ERROR_WORKSPACE = 3, // the workspace is too small or misaligned
    FSA_ERROR_CUDA = 4,      // a launch failed
} FsaStatus;

enum { FSA_MAX_HEAD_DIM = 512, FSA_MAX_TOPK = 4096 };

typedef struct {
    int q_heads;        // Hq, a multiple of kv_heads; Hq/Hkv = g, the GQA group, is 1 to 16
    int kv_heads;       // Hkv
    int head_dim;       // d, even, at most FSA_MAX_HEAD_DIM
    int cmp_len;        // l, tokens in a compression window; at most block
    int cmp_stride;     // s, tokens between window starts; divides cmp_len and block
    int block;          // B, tokens in a selection block; a multiple of 16
    int topk;           // T, blocks that a query selects, forced ones included; at most FSA_MAX_TOPK
    int init_blocks;    // the first blocks of a sequence, always selected
    int local_blocks;   // the last blocks up to the query's own, always selected
    int window;         // W, tokens that the sliding branch sees
    FsaPhi phi;         // compression
    int gate_per_token; // 0: a gate triple for each query head; 1: one for all heads of a token
    float scale;        // of q.k before softmax; 0 means 1/sqrt(head_dim)
    int recompute;      // 1: forward doesn't keep the branches' outputs, backward computes them again (GPU)
} FsaConfig;

// Queries `pos` to `pos + len - 1` of sequence `seq`. Query arrays hold the rows of the segments one
// after another. Segments ascend by (seq, pos) and do not overlap; they and sequences may be empty. Plain
// training has one segment for each sequence, (seq, 0, length).
typedef struct {
    int64_t seq, pos, len;
} FsaSegment;

// Checks `c` against the rules above. Returns 0, or -1 with one line in msg (at most msg_size bytes,
// always terminated) that names the field and its value.
int fsa_config_check(const FsaConfig *c, char *msg, size_t msg_size);

// Windows of a sequence of n tokens: floor((n - l)/s) + 1 where n >= l, else 0.
int64_t fsa_num_windows(const FsaConfig *c, int64_t n);

// ---------------------------------------------------------------------------------------------
// The GPU library (libfsa). Every pointer below is a device pointer, 16-byte aligned, unless said
// otherwise. q, k, v, o, gate logits and their gradients are 16-bit, of the type `dtype`. head_dim is
// 64 or 128. Layouts are those of reference.h: q, o [Nq, Hq, d]; k, v [N, Hkv, d]; lse [Nq, Hq] fp32;
// indices [Hkv, Nq, T]. An entry launches kernels on `stream` and returns; it allocates nothing and
// never synchronizes, and may be called from several threads with separate workspaces. Same input,
// same GPU: same bits. What is no number in a sequence (NaN, infinity) stays in it and in the parameters'
// gradients.

typedef struct CUstream_st *FsaStream; // a cudaStream_t

// Packed sequences and the queries asked of them. The counts are known to the host, the arrays lie on
// the device.
typedef struct {
    int64_t num_queries, num_keys; // Nq, N
    int64_t num_seqs, num_segments;
    int64_t max_len;            // tokens of the longest sequence, or more
    const int64_t *cu_seqlens;  // [num_seqs + 1]
    const FsaSegment *segments; // [num_segments]
} FsaDeviceBatch;

// The compression's parameters for phi = linear, 16-bit, as in reference.h; NULL for phi = mean. pe may
// be NULL.
typedef struct {
    const void *wk, *pe, *wv;
} FsaPhiWeights;
typedef struct {
    float *dwk, *dpe, *dwv; // fp32; backward adds to them
} FsaPhiGradients;

// What a workspace is for.
typedef enum {
    FSA_FORWARD = 0,
    FSA_BACKWARD = 1,
    FSA_SELECTED_FORWARD = 2,
    FSA_SELECTED_BACKWARD = 3,
    FSA_SELECT_BLOCKS = 4,
    FSA_ATTENTION_FORWARD = 5,
    FSA_ATTENTION_BACKWARD = 6,
} FsaOperation;

// One line about the last error on the calling thread.
const char *fsa_last_error(void);

// Bytes of workspace (aligned to 256) that an operation needs; 0 with an error set where it can't run.
// Only the counts of `b` are read; a batch that is greater in some and smaller in none needs at least as
// much.
size_t fsa_workspace_size(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaOperation op);

// Bytes that forward keeps for backward: q and k rotated, the compressed keys and values, output (unless
// c->recompute) and lse of the three branches, and the choice of blocks. The outputs are 3*Nq*Hq*d*2 bytes,
// some two thirds of it; without them backward takes a forward pass of the branches longer. Grows with the
// counts as the workspace does.
size_t fsa_saved_size(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b);
// Where in `saved` the choice of blocks lies.
const int32_t *fsa_saved_block_indices(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b,
                                 const void *saved);

// The whole attention: q, k before RoPE -> o. inv_freq: [d/2] doubles, NULL rotates nothing. gate_logits
// [Nq, Hq, 3], or [Nq, 3] with gate_per_token. indices: a choice to use instead of choosing, as
// fsa_selected_forward takes it, or NULL.
int fsa_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q, const void *k,
                const void *v, const FsaPhiWeights *phi, const double *inv_freq, const void *gate_logits,
                const int32_t *block_indices, void *o, void *saved, void *workspace, size_t workspace_bytes,
                FsaStream stream);
// Gradients of q and k before RoPE; overwrites dq, dk, dv and dgate_logits, adds to dphi's arrays.
int fsa_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *k, const void *v,
                 const FsaPhiWeights *phi, const double *inv_freq, const void *gate_logits, const void *dout,
                 const void *saved, void *dq, void *dk, void *dv, const FsaPhiGradients *dphi,
                 void *dgate_logits, void *workspace, size_t workspace_bytes, FsaStream stream);

// The selected branch alone, with the caller's choice: distinct blocks, ascending, none after the query's
// own, then -1. Every row has the forced blocks among them, the first init_blocks and the last local_blocks,
// as far as there are so many, as fsa_select_blocks's rows have: forward may take them for chosen without looking.
// Methods that force no block set both counts to 0; rows may then be of any length. Nothing is rotated here
// and below.
int fsa_selected_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q,
                         const void *k, const void *v, const int32_t *block_indices, void *o, float *lse,
                         void *workspace, size_t workspace_bytes, FsaStream stream);
int fsa_selected_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q,
                          const void *k, const void *v, const int32_t *block_indices, const void *o,
                          const float *lse, const void *dout, void *dq, void *dk, void *dv, void *workspace,
                          size_t workspace_bytes, FsaStream stream);

// The choice of blocks alone, from rotated q, compressed keys kc [M, Hkv, d] (see below) and the compressed
// branch's lse.
int fsa_select_blocks(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, const void *q, const void *kc,
               const float *lse_c, int32_t *block_indices, void *workspace, size_t workspace_bytes,
               FsaStream stream);

// Attention over all tokens, the last `window` tokens, or the compressed windows: k and v are then kc and vc,
// and dk and dv their gradients, [M, Hkv, d], M windows in all. The host knows only that M <= N/s; copies may
// therefore touch, and never use, kc and vc up to row floor(N/s), which must be the caller's memory.
int fsa_attention_forward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaVisibility rule,
                       const void *q, const void *k, const void *v, void *o, float *lse, void *workspace,
                       size_t workspace_bytes, FsaStream stream);
int fsa_attention_backward(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b, FsaVisibility rule,
                        const void *q, const void *k, const void *v, const void *o, const float *lse,
                        const void *dout, void *dq, void *dk, void *dv, void *workspace,
                        size_t workspace_bytes, FsaStream stream);

#ifdef __cplusplus
}
#endif
#endif
