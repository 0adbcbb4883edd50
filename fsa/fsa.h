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
    FSA_ERROR_CONFIG = 1,      // the FsaConfig breaks a rule or isn't supported on the GPU
    FSA_ERROR_ARGUMENT = 2,    // a pointer, size or enum argument is wrong
    FSA_ERROR_WORKSPACE = 3,   // the workspace is too small or misaligned
    FSA_ERROR_CUDA = 4,        // a launch failed
} FsaStatus;

typedef struct {
    int q_heads;        // Hq, a multiple of kv_heads; Hq/Hkv = g, the GQA group, is 1 to 16
    int kv_heads;       // Hkv
    int head_dim;       // d, even
    int cmp_len;        // l, tokens in a compression window; at most block
    int cmp_stride;     // s, tokens between window starts; divides cmp_len and block
    int block;          // B, tokens in a selection block; a multiple of 16
    int topk;           // T, blocks that a query selects, forced ones included
    int init_blocks;    // the first blocks of a sequence, always selected
    int local_blocks;   // the last blocks up to the query's own, always selected
    int window;         // W, tokens that the sliding branch sees
    FsaPhi phi;         // compression
    int gate_per_token; // 0: a gate triple for each query head; 1: one for all heads of a token
    float scale;        // of q.k before softmax; 0 means 1/sqrt(head_dim)
} FsaConfig;

// Queries `pos` to `pos + len - 1` of sequence `seq`. Query arrays hold the rows of the segments one
// after another. Segments ascend by (seq, pos) and do not overlap. Plain training has one segment
// for each sequence, (seq, 0, length).
typedef struct {
    int64_t seq, pos, len;
} FsaSegment;

// Checks `c` against the rules above. Returns 0, or -1 with one line in msg (at most msg_size bytes,
// always terminated) that names the field and its value.
int fsa_config_check(const FsaConfig *c, char *msg, size_t msg_size);

// Windows of a sequence of n tokens: floor((n - l)/s) + 1 where n >= l, else 0.
int64_t fsa_num_windows(const FsaConfig *c, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
