// context_parallel.h: one batch of packed sequences shared by several ranks. Each rank computes the queries
// of its own tokens, and sees all keys.
//
// The batch is cut into chunks of equally many tokens. Each rank gets equally many chunks, chosen so that the
// attention's work is balanced. With one sequence there are 2 chunks per rank, assigned in zigzag order: rank
// r has chunks r and 2*ranks - 1 - r.
//
// Rows have two orders. Sequence order is that of the packed batch. Rank order is what an all-gather returns:
// the chunks of rank 0, ascending, then those of rank 1, and so on. chunk_perm [chunks] maps one to the
// other: the i-th chunk in rank order is chunk chunk_perm[i] in sequence order. Rank r has the chunks
// chunk_perm[i] with r*chunks/ranks <= i < (r+1)*chunks/ranks.
#ifndef LLMC_CONTEXT_PARALLEL_H
#define LLMC_CONTEXT_PARALLEL_H
#include "mfu.h"

// Minimum bytes of keys in one all-gather: all KV heads of Llama 3 8B up to 128K tokens. The transfers of each
// head group take SMs from the attention's kernels, so few groups are faster, and need more memory. Tests set less.
#ifndef CP_HEAD_GROUP_BYTES
#define CP_HEAD_GROUP_BYTES (256 << 20)
#endif

// Returns how many equal head groups the KV heads are cut into. The keys and values of n tokens are gathered
// one head group after another. The result is the largest number of groups that leaves CP_HEAD_GROUP_BYTES of
// 16-bit keys in a group; it is 1 for one rank.
static inline int cp_num_head_groups(const FsaConfig *f, int64_t n, int ranks) {
    int groups = ranks > 1 ? f->kv_heads : 1;
    while (groups > 1 && (f->kv_heads % groups != 0 ||
                          n * (f->kv_heads / groups) * f->head_dim * 2 < (int64_t)CP_HEAD_GROUP_BYTES))
        groups--;
    return groups;
}

// Returns how many chunks n tokens in num_seqs sequences are cut into; n must be a multiple of 2*ranks.
// Sequences differ in work, so finer chunks balance better. Each cut costs a segment, so a chunk keeps at
// least 512 tokens.
static inline int64_t cp_num_chunks(int64_t n, int64_t num_seqs, int ranks) {
    int64_t chunks = ranks > 1 ? 2 * ranks : 1;
    while (ranks > 1 && num_seqs > 1 && n % (2 * chunks) == 0 && n / (2 * chunks) >= 512 &&
           chunks < 32 * ranks)
        chunks *= 2;
    return chunks;
}

// Returns the attention's work for the first n tokens of a sequence, in visible (query, key) pairs.
static inline double cp_attention_work(const ModelConfig *c, int64_t n) {
    const FsaConfig *f = &c->fsa;
    if (c->attn == ATTN_FULL) return visible_pairs(f, FSA_CAUSAL, n);
    if (c->attn == ATTN_WINDOW) return visible_pairs(f, FSA_WINDOW, n);
    // block scores cost a seventh of the compressed branch's forward and backward pass
    return visible_pairs(f, FSA_COMPRESSED, n) * 7 / 6 + visible_pairs(f, FSA_SELECTED, n) +
           visible_pairs(f, FSA_WINDOW, n);
}

// Returns the sequence that contains token t; an empty sequence contains none.
static inline int64_t cp_find_sequence(const int64_t *cu_seqlens, int64_t num_seqs, int64_t t) {
    int64_t lo = 0, hi = num_seqs;
    while (hi - lo > 1) {
        int64_t mid = (lo + hi) / 2;
        if (cu_seqlens[mid] <= t)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

// Assigns the chunks of a batch to ranks: fills chunk_perm [chunks] and, unless it is NULL, work [ranks], the
// attention's work of each rank in visible pairs. cu_seqlens [num_seqs + 1]; chunks as cp_num_chunks returns.
static inline void cp_assign_chunks(const ModelConfig *c, const int64_t *cu_seqlens, int64_t num_seqs,
                                    int ranks, int64_t chunks, int32_t *chunk_perm, double *work) {
    int64_t n = cu_seqlens[num_seqs], chunk_size = n / chunks, chunks_per_rank = chunks / ranks;
    double *cost = (double *)xcalloc((size_t)chunks, sizeof *cost);
    double *sum = (double *)xcalloc((size_t)ranks, sizeof *sum);
    int64_t *count = (int64_t *)xcalloc((size_t)ranks, sizeof *count);
    int *owner = (int *)xcalloc((size_t)chunks, sizeof *owner);
    for (int64_t b = 0; b < chunks; b++) {
        int64_t begin = b * chunk_size, end = begin + chunk_size;
        for (int64_t s = cp_find_sequence(cu_seqlens, num_seqs, begin); s < num_seqs && cu_seqlens[s] < end;
             s++) {
            int64_t first = cu_seqlens[s] > begin ? cu_seqlens[s] : begin;
            int64_t last = cu_seqlens[s + 1] < end ? cu_seqlens[s + 1] : end;
            if (last > first)
                cost[b] +=
                    cp_attention_work(c, last - cu_seqlens[s]) - cp_attention_work(c, first - cu_seqlens[s]);
        }
        owner[b] = -1;
    }
    // Greedy: the costliest chunk left goes to the rank with the least work among those that still lack
    // chunks. Ties go to the lower index.
    for (int64_t i = 0; i < chunks; i++) {
        int64_t costliest = -1;
        int min_rank = -1;
        for (int64_t b = 0; b < chunks; b++)
            if (owner[b] < 0 && (costliest < 0 || cost[b] > cost[costliest])) costliest = b;
        for (int r = 0; r < ranks; r++)
            if (count[r] < chunks_per_rank && (min_rank < 0 || sum[r] < sum[min_rank])) min_rank = r;
        owner[costliest] = min_rank;
        sum[min_rank] += cost[costliest];
        count[min_rank]++;
    }
    int64_t i = 0;
    for (int r = 0; r < ranks; r++) {
        for (int64_t b = 0; b < chunks; b++)
            if (owner[b] == r) chunk_perm[i++] = (int32_t)b;
        if (work) work[r] = sum[r];
    }
    free(cost), free(sum), free(count), free(owner);
}

// Writes the queries of `rank` as segments, at most num_seqs + chunks/ranks of them. Returns the number of
// segments.
static inline int64_t cp_segments(const int64_t *cu_seqlens, int64_t num_seqs, int ranks, int64_t chunks,
                                  const int32_t *chunk_perm, int rank, FsaSegment *segments) {
    int64_t chunk_size = cu_seqlens[num_seqs] / chunks, chunks_per_rank = chunks / ranks, count = 0;
    for (int64_t i = 0; i < chunks_per_rank; i++) {
        int64_t begin = chunk_perm[rank * chunks_per_rank + i] * chunk_size, end = begin + chunk_size;
        for (int64_t s = cp_find_sequence(cu_seqlens, num_seqs, begin); s < num_seqs && cu_seqlens[s] < end;
             s++) {
            int64_t first = cu_seqlens[s] > begin ? cu_seqlens[s] : begin;
            int64_t last = cu_seqlens[s + 1] < end ? cu_seqlens[s + 1] : end, pos = first - cu_seqlens[s];
            FsaSegment *prev = count ? &segments[count - 1] : NULL;
            if (last <= first) continue;
            if (prev && prev->seq == s && prev->pos + prev->len == pos) {
                prev->len += last - first;
                continue;
            }
            segments[count].seq = s, segments[count].pos = pos, segments[count].len = last - first;
            count++;
        }
    }
    return count;
}

// Copies the rows of `rank` out of `src` [n rows, sequence order] into `dst` [n/ranks rows]; a row has
// `bytes` bytes.
static inline void cp_gather_rows(int ranks, int64_t n, int64_t chunks, const int32_t *chunk_perm, int rank,
                                  void *dst, const void *src, size_t bytes) {
    int64_t chunks_per_rank = chunks / ranks;
    size_t chunk_bytes = (size_t)(n / chunks) * bytes;
    for (int64_t i = 0; i < chunks_per_rank; i++)
        memcpy((char *)dst + (size_t)i * chunk_bytes,
               (const char *)src + (size_t)chunk_perm[rank * chunks_per_rank + i] * chunk_bytes, chunk_bytes);
}
// Copies `src` [n rows, rank order] to `dst` [n rows, sequence order].
static inline void cp_scatter_rows(int64_t n, int64_t chunks, const int32_t *chunk_perm, void *dst,
                                   const void *src, size_t bytes) {
    size_t chunk_bytes = (size_t)(n / chunks) * bytes;
    for (int64_t i = 0; i < chunks; i++)
        memcpy((char *)dst + (size_t)chunk_perm[i] * chunk_bytes, (const char *)src + (size_t)i * chunk_bytes,
               chunk_bytes);
}
#endif
