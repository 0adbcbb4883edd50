// context_parallel.h: one batch of packed sequences over several ranks, which together see all keys and each
// compute some of the queries. The batch is cut into blocks of equally many tokens. Each rank gets equally
// many blocks, chosen so that the attention's work is even: with one sequence, 2 blocks a rank, block r goes
// with block 2*ranks - 1 - r.
//
// A rank's tokens are its blocks, ascending. Gathered in the order of ranks, they make the slots: slot i
// holds the block place[i], and rank r's slots begin at r * blocks/ranks.
#ifndef LLMC_CONTEXT_PARALLEL_H
#define LLMC_CONTEXT_PARALLEL_H
#include "config.h"

// Bytes of keys that are worth a transfer: at NVLink's 400 GB/s 16 MiB take 40 us, between hosts several
// times as long, beside which the 10 to 20 us that a transfer takes to start are few. Tests set less.
#ifndef CP_GROUP_BYTES
#define CP_GROUP_BYTES (16 << 20)
#endif

// Groups that the heads are cut into, equal ones, whose keys and values of n tokens are gathered one group
// after another: as many as leave a group CP_GROUP_BYTES of keys.
static inline int cp_groups(const FsaConfig *f, int64_t n, int ranks) {
    int groups = ranks > 1 ? f->kv_heads : 1;
    while (groups > 1 && (f->kv_heads % groups != 0 ||
                          n * (f->kv_heads / groups) * f->head_dim * 2 < (int64_t)CP_GROUP_BYTES))
        groups--;
    return groups;
}

// Blocks that n tokens in num_seqs sequences are cut into; n must be a multiple of 2*ranks. Documents are
// of uneven work, so they are cut finer, but each cut costs a segment: not below 512 tokens.
static inline int64_t cp_blocks(int64_t n, int64_t num_seqs, int ranks) {
    int64_t blocks = ranks > 1 ? 2 * ranks : 1;
    while (ranks > 1 && num_seqs > 1 && n % (2 * blocks) == 0 && n / (2 * blocks) >= 512 &&
           blocks < 32 * ranks)
        blocks *= 2;
    return blocks;
}

// Work of the attention, in visible pairs, of a sequence's first n tokens.
static inline double cp_work_of(const ModelConfig *c, int64_t n) {
    const FsaConfig *f = &c->fsa;
    if (c->attn == ATTN_FULL) return visible_pairs(f, FSA_CAUSAL, n);
    if (c->attn == ATTN_WINDOW) return visible_pairs(f, FSA_WINDOW, n);
    // block scores: a seventh of the compressed branch's forward and backward pass
    return visible_pairs(f, FSA_COMPRESSED, n) * 7 / 6 + visible_pairs(f, FSA_SELECTED, n) +
           visible_pairs(f, FSA_WINDOW, n);
}

// The sequence that token t belongs to; empty ones hold none.
static inline int64_t cp_sequence(const int64_t *cu_seqlens, int64_t num_seqs, int64_t t) {
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

// Fills place [blocks] and, unless it is NULL, work [ranks].
static inline void cp_divide(const ModelConfig *c, const int64_t *cu_seqlens, int64_t num_seqs, int ranks,
                             int64_t blocks, int32_t *place, double *work) {
    int64_t n = cu_seqlens[num_seqs], size = n / blocks, each = blocks / ranks;
    double *cost = (double *)xcalloc((size_t)blocks, sizeof *cost);
    double *sum = (double *)xcalloc((size_t)ranks, sizeof *sum);
    int64_t *count = (int64_t *)xcalloc((size_t)ranks, sizeof *count);
    int *owner = (int *)xcalloc((size_t)blocks, sizeof *owner);
    for (int64_t b = 0; b < blocks; b++) {
        int64_t begin = b * size, end = begin + size;
        for (int64_t s = cp_sequence(cu_seqlens, num_seqs, begin); s < num_seqs && cu_seqlens[s] < end; s++) {
            int64_t from = cu_seqlens[s] > begin ? cu_seqlens[s] : begin;
            int64_t to = cu_seqlens[s + 1] < end ? cu_seqlens[s + 1] : end;
            if (to > from) cost[b] += cp_work_of(c, to - cu_seqlens[s]) - cp_work_of(c, from - cu_seqlens[s]);
        }
        owner[b] = -1;
    }
    // The dearest block that is left goes to the rank with the least work that has room; of equals to the
    // first.
    for (int64_t i = 0; i < blocks; i++) {
        int64_t dearest = -1;
        int least = -1;
        for (int64_t b = 0; b < blocks; b++)
            if (owner[b] < 0 && (dearest < 0 || cost[b] > cost[dearest])) dearest = b;
        for (int r = 0; r < ranks; r++)
            if (count[r] < each && (least < 0 || sum[r] < sum[least])) least = r;
        owner[dearest] = least;
        sum[least] += cost[dearest];
        count[least]++;
    }
    int64_t slot = 0;
    for (int r = 0; r < ranks; r++) {
        for (int64_t b = 0; b < blocks; b++)
            if (owner[b] == r) place[slot++] = (int32_t)b;
        if (work) work[r] = sum[r];
    }
    free(cost), free(sum), free(count), free(owner);
}

// The queries of `rank` as segments, at most num_seqs + blocks/ranks of them. Returns how many.
static inline int64_t cp_segments(const int64_t *cu_seqlens, int64_t num_seqs, int ranks, int64_t blocks,
                                  const int32_t *place, int rank, FsaSegment *segments) {
    int64_t size = cu_seqlens[num_seqs] / blocks, each = blocks / ranks, count = 0;
    for (int64_t i = 0; i < each; i++) {
        int64_t begin = place[rank * each + i] * size, end = begin + size;
        for (int64_t s = cp_sequence(cu_seqlens, num_seqs, begin); s < num_seqs && cu_seqlens[s] < end; s++) {
            int64_t from = cu_seqlens[s] > begin ? cu_seqlens[s] : begin;
            int64_t to = cu_seqlens[s + 1] < end ? cu_seqlens[s + 1] : end, pos = from - cu_seqlens[s];
            FsaSegment *last = count ? &segments[count - 1] : NULL;
            if (to <= from) continue;
            if (last && last->seq == s && last->pos + last->len == pos) {
                last->len += to - from;
                continue;
            }
            segments[count].seq = s, segments[count].pos = pos, segments[count].len = to - from;
            count++;
        }
    }
    return count;
}

// The rows of `rank` out of the whole batch's, or back: `to` and `from` hold rows of `bytes`.
static inline void cp_take_rows(int ranks, int64_t n, int64_t blocks, const int32_t *place, int rank,
                                void *to, const void *from, size_t bytes) {
    int64_t each = blocks / ranks;
    size_t size = (size_t)(n / blocks) * bytes;
    for (int64_t i = 0; i < each; i++)
        memcpy((char *)to + (size_t)i * size, (const char *)from + (size_t)place[rank * each + i] * size,
               size);
}
static inline void cp_place_rows(int64_t n, int64_t blocks, const int32_t *place, void *to, const void *from,
                                 size_t bytes) {
    size_t size = (size_t)(n / blocks) * bytes;
    for (int64_t i = 0; i < blocks; i++)
        memcpy((char *)to + (size_t)place[i] * size, (const char *)from + (size_t)i * size, size);
}
#endif
