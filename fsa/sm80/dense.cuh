// sm80/dense.cuh: what the dense kernels of sm80/ share: the tile of queries of a thread block that loops
// over keys, the stages of K and V in shared memory, and the mask.
#ifndef FSA_SM80_DENSE_CUH
#define FSA_SM80_DENSE_CUH
#include "../dense.cuh"
#include "tile.cuh"

enum { DENSE_THREADS = 128, DENSE_KEYS = 64 }; // threads of a thread block; keys of a tile of K and V

// The queries of a thread block, of one head, and the keys that they see.
struct QueryTile {
    int q_head, kv_head;
    RowTile rows;
    int first_pos;  // position of the first query
    int begin, end; // keys begin .. end - 1 of the sequence; begin is a multiple of DENSE_KEYS
    int64_t key0;   // key 0 of the sequence
};
// Returns the rows of q of this thread block, for tiles of ROWS queries. Tiles with late queries, which see
// more keys, come first. The heads of a tile are neighbors.
template <int ROWS> __device__ __forceinline__ RowTile find_queries(const DenseParams &p) {
    int64_t num_tiles = gridDim.x / p.q_heads, tile = num_tiles - 1 - blockIdx.x / p.q_heads;
    return find_row_tile(p.batch.cu_queries, p.batch.num_segments, ROWS, tile);
}
// Returns the query tile with these rows, at least one.
__device__ __forceinline__ QueryTile make_query_tile(const DenseParams &p, const RowTile &rows) {
    QueryTile t;
    t.q_head = blockIdx.x % p.q_heads, t.kv_head = t.q_head / (p.q_heads / p.kv_heads);
    t.rows = rows;
    FsaSegment segment = p.batch.segments[rows.cu_index];
    t.first_pos = (int)segment.pos + rows.first;
    int last_pos = t.first_pos + rows.rows - 1;
    t.end = p.mask.end_key(last_pos), t.begin = p.mask.first_key(t.first_pos) / DENSE_KEYS * DENSE_KEYS;
    t.key0 = p.cu_keys[segment.seq];
    return t;
}

// K and V of one KV head in two stages of shared memory, tiles of DENSE_KEYS keys.
template <typename T, int D> struct KvStages {
    enum { TILE_BYTES = DENSE_KEYS * D * 2 };
    const T *k, *v; // key 0 of the sequence
    int64_t k_stride, v_stride;
    int end;                 // keys from here on become zeros
    uint32_t smem_k, smem_v; // [2 stages][DENSE_KEYS, D]
    __device__ __forceinline__ KvStages(const DenseParams &p, const QueryTile &tile, uint32_t smem)
        : k_stride(p.k.stride), v_stride(p.v.stride), end(tile.end), smem_k(smem),
          smem_v(smem + 2 * TILE_BYTES) {
        k = (const T *)p.k.data + tile.key0 * k_stride + tile.kv_head * D;
        v = (const T *)p.v.data + tile.key0 * v_stride + tile.kv_head * D;
    }
    __device__ __forceinline__ uint32_t k_tile(int stage) const { return smem_k + stage * TILE_BYTES; }
    __device__ __forceinline__ uint32_t v_tile(int stage) const { return smem_v + stage * TILE_BYTES; }
    // Starts the copy of keys j .. j + DENSE_KEYS - 1.
    __device__ __forceinline__ void load(int j, int stage) const {
        load_tile_pair<DENSE_KEYS, D, DENSE_THREADS>(k_tile(stage), k + j * k_stride, k_stride, v_tile(stage),
                                                     v + j * v_stride, v_stride, end - j);
    }
};

// Sets the scores that the mask hides to -inf. s: 16 queries from position t0 on x 8*N keys from j0 on.
template <int N>
__device__ __forceinline__ void mask_scores(float (&s)[N][4], const DenseMask &mask, int t0, int j0) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int t = t0 + e / 2 * 8 + lane / 4, j = j0 + n * 8 + lane % 4 * 2 + e % 2;
            if (!mask.visible(t, j)) s[n][e] = -INFINITY;
        }
    }
}
// Returns whether the mask hides some of the keys j0 .. j0 + num_keys - 1 from some of the queries at
// positions t0 .. t0 + num_queries - 1.
__device__ __forceinline__ bool needs_mask(const DenseMask &mask, int t0, int num_queries, int j0,
                                           int num_keys) {
    return !mask.visible(t0, j0 + num_keys - 1) || j0 < mask.first_key(t0 + num_queries - 1);
}
#endif
