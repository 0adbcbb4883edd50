// head_groups.cuh: the attention's head groups with context parallel (context_parallel.h): the memory of one
// group, and the transfers of its keys, values and their gradients between the GPUs.
#ifndef LLMC_HEAD_GROUPS_CUH
#define LLMC_HEAD_GROUPS_CUH
#include "arena.cuh"
#include "fsa_call.cuh"
#include "micro_batch.cuh"

// n: tokens on this GPU; keys: tokens of the whole sequences. Without context parallel there is one group,
// which needs no memory here.
typedef struct {
    Gpus *gpus;            // that share a batch; NULL: one GPU alone
    int count;             // number of head groups
    int64_t kv_width;      // Hkv/count*d: elements of a token's keys in one group
    size_t saved_bytes[3]; // of a head group's part of LayerActivations.saved, by AttnMode
    attnX *k[3], *v[3];    // [keys, Hkv/count, d] gathered k and v, or dk and dv (kv_buffer)
    attnX *gather_scratch; // [keys, Hkv/count, d] rows in rank order
    attnX *dgate_logits;   // [count, n, 3] with gate_per_token and several groups; else NULL
} HeadGroups;

// Cuts the heads into groups for batches of at most num_keys tokens (cp_num_head_groups).
static void head_groups_build(HeadGroups *g, const FsaConfig *f, int64_t num_keys, Gpus *gpus) {
    g->gpus = gpus;
    g->count = cp_num_head_groups(f, num_keys, gpus ? gpus->cp_size : 1);
    g->kv_width = f->kv_heads / g->count * f->head_dim;
}

static void head_groups_print(const HeadGroups *g, const FsaConfig *f) {
    if (g->gpus && g->gpus->cp_size > 1)
        printf("context parallel: gathers keys and values of %d of the %d kv heads at a time\n",
               f->kv_heads / g->count, f->kv_heads);
}

// Returns the attention's configuration for one head group.
static FsaConfig head_group_config(const FsaConfig *f, const HeadGroups *g) {
    FsaConfig group = *f;
    group.q_heads /= g->count, group.kv_heads /= g->count;
    return group;
}

// Sets the bytes that the attention of one head group keeps for its backward pass. Those of nsa are the most.
static void head_groups_set_saved_bytes(HeadGroups *g, const FsaConfig *f, const Batch *max_batch) {
    const FsaConfig group = head_group_config(f, g);
    const FsaDeviceBatch b = fsa_device_batch(max_batch);
    g->saved_bytes[ATTN_NSA] = fsa_saved_size(&group, attn_dtype, &b);
    g->saved_bytes[ATTN_FULL] = g->saved_bytes[ATTN_WINDOW] =
        (max_batch->n * group.q_heads * sizeof(float) + 255) / 256 * 256;
}

// Returns the workspace that fsa.h needs for one head group, whatever the lengths of the sequences.
static size_t head_group_workspace_bytes(const ModelConfig *c, const HeadGroups *g, const Batch *max_batch,
                                         int training) {
    const FsaConfig group = head_group_config(&c->fsa, g), *f = &group;
    const FsaDeviceBatch b = fsa_device_batch(max_batch);
    size_t bytes = 0;
    for (int attn : {c->attn, (int32_t)ATTN_FULL}) {
        if (attn != c->attn && c->full_every == 0) continue;
        const bool nsa = attn == ATTN_NSA;
        const size_t forward =
            fsa_workspace_size(f, attn_dtype, &b, nsa ? FSA_FORWARD : FSA_ATTENTION_FORWARD);
        if (forward == 0) {
            char message[512];
            config_name_flags(fsa_last_error(), message, sizeof message);
            die("%s", message);
        }
        bytes = std::max(bytes, forward);
        if (training)
            bytes = std::max(
                bytes, fsa_workspace_size(f, attn_dtype, &b, nsa ? FSA_BACKWARD : FSA_ATTENTION_BACKWARD));
    }
    return bytes;
}

// Assigns the arrays of one head group in `scratch`. n, num_keys: the largest batch.
static void head_groups_memory_layout(HeadGroups *g, const ModelConfig *c, int64_t n, int64_t num_keys,
                                      int training, Arena *scratch) {
    const FsaConfig *f = &c->fsa;
    const int64_t count = g->count, keys = num_keys * f->kv_heads / count * f->head_dim;
    for (int i = 0; num_keys > n && i < (count > 1 ? 3 : training ? 2 : 1); i++) {
        arena_alloc(scratch, &g->k[i], keys);
        arena_alloc(scratch, &g->v[i], keys);
    }
    if (num_keys > n) arena_alloc(scratch, &g->gather_scratch, keys);
    // with gate_per_token every head group has its own gradient of the same logits
    if (training && c->attn == ATTN_NSA && f->gate_per_token && count > 1)
        arena_alloc(scratch, &g->dgate_logits, count * n * 3);
}

// The head groups rotate through three k (and v) buffers. While head group i is processed,
//   kv_buffer(i)       holds its gathered keys,
//   dkv_buffer(i)      receives their gradients; it held the keys of head group i - 1,
//   the third buffer   sends the gradients of head group i - 1, then receives the keys of head group i + 1.
static int kv_buffer(int i) {
    return 2 * i % 3;
}
static int dkv_buffer(int i) {
    return (2 * i + 1) % 3;
}

// Starts to gather head group i of k and v [n, Hkv, d], before RoPE, from all GPUs that share batch b. Rows
// of k are k_stride elements apart, rows of v v_stride. Does nothing if there is no such head group. The
// caller waits with compute_waits_for_transfers.
static void all_gather_kv(const HeadGroups *g, const Batch *b, const attnX *k, int64_t k_stride,
                          const attnX *v, int64_t v_stride, int i, cudaStream_t stream) {
    const int64_t width = g->kv_width;
    if (!kv_is_sharded(b) || i == g->count) return;
    transfers_wait_for_compute(g->gpus, stream);
    gpus_all_gather_rows(g->gpus, g->k[kv_buffer(i)], g->gather_scratch, k + i * width, b->num_keys, width,
                         k_stride, b->chunk_perm, b->num_chunks);
    gpus_all_gather_rows(g->gpus, g->v[kv_buffer(i)], g->gather_scratch, v + i * width, b->num_keys, width,
                         v_stride, b->chunk_perm, b->num_chunks);
}

// Starts to sum the gradients of head group i's keys and values over all GPUs that share batch b. Each GPU
// gets the sums for its own tokens in dk and dv [n, Hkv, d], with row strides as k and v. Does nothing if
// i < 0. The caller waits with compute_waits_for_transfers.
static void reduce_scatter_dkv(const HeadGroups *g, const Batch *b, attnX *dk, int64_t k_stride, attnX *dv,
                               int64_t v_stride, int i, cudaStream_t stream) {
    const int64_t width = g->kv_width;
    if (!kv_is_sharded(b) || i < 0) return;
    transfers_wait_for_compute(g->gpus, stream);
    gpus_reduce_scatter_rows(g->gpus, dk + i * width, g->k[dkv_buffer(i)], g->gather_scratch, b->num_keys,
                             width, k_stride, b->chunk_perm, b->num_chunks);
    gpus_reduce_scatter_rows(g->gpus, dv + i * width, g->v[dkv_buffer(i)], g->gather_scratch, b->num_keys,
                             width, v_stride, b->chunk_perm, b->num_chunks);
}
#endif
