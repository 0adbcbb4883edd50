// selected_versions.h: forward versions 1 to 3 of the selected branch, for selected.cu.
#ifndef DEV_CUDA_SELECTED_VERSIONS_H
#define DEV_CUDA_SELECTED_VERSIONS_H
#include "../../fsa/kernels.h"
#include "../../fsa/mma.cuh"
#include "common.h"

struct VersionArgs {
    FsaPlan plan;
    FsaLists lists; // version 3: one slab
    int q_heads, kv_heads, group, block, topk;
    float scale;
    const int32_t *indices;
    void *partial; // version 3: [kv head's Nq*T, group, D]
    float *stats;  // version 3: lse in base 2, of partials [Nq*T, group] and of rows [Nq, group]
    float *row_stats;
    int head; // version 3: the kv head of this launch
};

// ---- version 1 --------------------------------------------------------------------------------------
// A warp computes one (token, head), a key at a time.
template <typename T, int D>
__global__ void selected_v1_kernel(VersionArgs a, const T *q, const T *k, const T *v, T *o, float *lse) {
    constexpr int PER = D / 32;
    int64_t row = blockIdx.x * 4ll + threadIdx.x / 32;
    if (row >= a.plan.nq * a.q_heads) return;
    int64_t token = row / a.q_heads, seq, pos;
    int head = (int)(row % a.q_heads) / a.group, lane = threadIdx.x % 32;
    fsa_row(a.plan, token, &seq, &pos);
    float acc[PER] = {}, most = -INFINITY, sum = 0;
    for (int t = 0; t < a.topk; t++) {
        int index = a.indices[(head * a.plan.nq + token) * a.topk + t];
        if (index < 0) continue;
        for (int64_t key = (int64_t)index * a.block; key < (int64_t)(index + 1) * a.block && key <= pos;
             key++) {
            int64_t at = ((a.plan.cu_seqlens[seq] + key) * a.kv_heads + head) * D + lane * PER;
            float s = 0;
            for (int i = 0; i < PER; i++) s += (float)q[row * D + lane * PER + i] * (float)k[at + i];
            for (int i = 16; i > 0; i /= 2) s += __shfl_xor_sync(0xffffffffu, s, i);
            s *= a.scale * FSA_LOG2E;
            float new_most = fmaxf(most, s), shrink = exp2f(most - new_most), p = exp2f(s - new_most);
            most = new_most;
            sum = sum * shrink + p;
            for (int i = 0; i < PER; i++) acc[i] = acc[i] * shrink + p * (float)v[at + i];
        }
    }
    for (int i = 0; i < PER; i++) o[row * D + lane * PER + i] = (T)(sum > 0 ? acc[i] / sum : 0);
    if (lane == 0) lse[row] = sum > 0 ? (most + log2f(sum)) * FSA_LN2 : -INFINITY;
}

// ---- version 2 --------------------------------------------------------------------------------------
// Vanilla NSA's order: a thread block takes one (token, kv head), its g rows padded to the 16 of an mma tile,
// and walks over the chosen blocks; each of the four warps takes every fourth block, and their results are
// merged at the end. q and K come straight from memory in fragments, their 4-byte units transposed as in
// fsa/selected.cu. Each token loads T*B rows of K and V: 512 KiB at T*B = 1024, d = 128.
template <typename T, int D>
__global__ void __launch_bounds__(128)
    selected_v2_kernel(VersionArgs a, const T *q, const T *k, const T *v, T *o, float *lse) {
    constexpr int GROUPS = D / 32, CHUNKS = D / 8;
    extern __shared__ __align__(128) char smem[];
    __shared__ float merge_max[4][16], merge_sum[4][16];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, c = lane % 4, g = a.group;
    const int64_t token = blockIdx.x;
    const int head = blockIdx.y;
    int64_t seq, pos;
    fsa_row(a.plan, token, &seq, &pos);
    const int64_t kv_row = (int64_t)a.kv_heads * D, q_at = (token * a.q_heads + head * g) * D;
    const T *k_head = k + a.plan.cu_seqlens[seq] * kv_row + head * D,
            *v_head = v + a.plan.cu_seqlens[seq] * kv_row + head * D;
    const uint32_t v_base = smem_address(smem) + warp * 64 * D * 2;
    const float scale_log2 = a.scale * FSA_LOG2E;
    uint4 fq[2][GROUPS];
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < GROUPS; j++) {
            fq[i][j] = quad + 8 * i < g ? ((const uint4 *)(q + q_at + (quad + 8 * i) * D))[4 * j + c]
                                        : make_uint4(0, 0, 0, 0);
        }
    }
    float acc[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int t = warp; t < a.topk; t += 4) {
        int index = a.indices[(head * a.plan.nq + token) * a.topk + t];
        if (index < 0) continue;
        for (int64_t key0 = (int64_t)index * a.block; key0 < (int64_t)(index + 1) * a.block && key0 <= pos;
             key0 += 64) {
            int keys = (int)min(min((int64_t)64, (int64_t)(index + 1) * a.block - key0), pos + 1 - key0);
            __syncwarp();
            for (int i = lane; i < 64 * CHUNKS; i += 32) {
                int r = i / CHUNKS, chunk = i % CHUNKS;
                cp_async_16(v_base + swizzled<D>(r, chunk),
                            v_head + (key0 + min(r, keys - 1)) * kv_row + chunk * 8, r < keys);
            }
            cp_async_commit();
            float s[8][4];
#pragma unroll
            for (int n = 0; n < 8; n++) {
                s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
                const uint4 *row = (const uint4 *)(k_head + (key0 + min(n * 8 + quad, keys - 1)) * kv_row);
#pragma unroll
                for (int j = 0; j < GROUPS; j++) {
                    uint4 b = row[4 * j + c];
                    const uint32_t a0[4] = {fq[0][j].x, fq[1][j].x, fq[0][j].y, fq[1][j].y};
                    const uint32_t a1[4] = {fq[0][j].z, fq[1][j].z, fq[0][j].w, fq[1][j].w};
                    mma_16816<T>(s[n], a0, b.x, b.y);
                    mma_16816<T>(s[n], a1, b.z, b.w);
                }
            }
            float shrink[2];
            for (int i = 0; i < 2; i++) {
                float m = most[i];
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    for (int j = 0; j < 2; j++) {
                        float &x = s[n][2 * i + j];
                        x = n * 8 + 2 * c + j < keys ? x * scale_log2 : -INFINITY;
                        m = fmaxf(m, x);
                    }
                }
                m = quad_max(m);
                shrink[i] = exp2f(most[i] - m);
                most[i] = m;
                sum[i] *= shrink[i];
            }
            uint32_t p[4][4];
#pragma unroll
            for (int n = 0; n < 8; n++) {
                float e[4];
                for (int i = 0; i < 4; i++) {
                    e[i] = exp2_fast(s[n][i] - most[i / 2]);
                    sum[i / 2] += e[i];
                }
                p[n / 2][(n & 1) * 2] = pack2<T>(e[0], e[1]);
                p[n / 2][(n & 1) * 2 + 1] = pack2<T>(e[2], e[3]);
            }
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                for (int i = 0; i < 4; i++) acc[n][i] *= shrink[i / 2];
            }
            cp_async_wait<0>();
            __syncwarp();
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
#pragma unroll
                for (int n = 0; n < D / 8; n += 2) {
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, v_base + swizzled<D>(kk * 16 + (lane & 15), n + lane / 16));
                    mma_16816<T>(acc[n], p[kk], b[0], b[1]);
                    mma_16816<T>(acc[n + 1], p[kk], b[2], b[3]);
                }
            }
        }
    }
    __syncthreads();
    float *merge = (float *)smem; // [4][16][D]
    for (int i = 0; i < 2; i++) {
        float l = quad_sum(sum[i]);
        if (c == 0) merge_max[warp][quad + 8 * i] = most[i], merge_sum[warp][quad + 8 * i] = l;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *(float2 *)(merge + (warp * 16 + quad + 8 * i) * D + n * 8 + 2 * c) =
                make_float2(acc[n][2 * i], acc[n][2 * i + 1]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < g * D; i += 128) {
        int r = i / D;
        float m = -INFINITY, total = 0, x = 0;
        for (int w = 0; w < 4; w++) m = fmaxf(m, merge_max[w][r]);
        for (int w = 0; w < 4; w++) {
            float f = merge_max[w][r] == -INFINITY ? 0 : exp2f(merge_max[w][r] - m);
            total += f * merge_sum[w][r];
            x += f * merge[(w * 16 + r) * D + i % D];
        }
        o[q_at + i] = (T)(total > 0 ? x / total : 0);
        if (i % D == 0)
            lse[token * a.q_heads + head * g + r] = total > 0 ? (m + log2f(total)) * FSA_LN2 : -INFINITY;
    }
}

// ---- version 3 --------------------------------------------------------------------------------------
// FSA as in its paper, KV block outside: a statistics kernel computes QK^T for the softmax's log-sum-exps, a
// main kernel computes it again and writes each block's part of the output, a reduction adds the parts. One
// kv head at a time; a thread block takes V3_TILES tiles of 16 rows of a block's list. STATS: the statistics
// kernel, else the main kernel.
enum { V3_TILES = 256 };
template <typename T, int D, bool STATS>
__global__ void __launch_bounds__(128) selected_v3_kernel(VersionArgs a, const T *q, const T *k, const T *v) {
    constexpr int CHUNKS = D / 8;
    extern __shared__ __align__(128) char smem[];
    const uint32_t k_base = smem_address(smem), v_base = k_base + 64 * D * 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, c = lane % 4, g = a.group;
    const uint32_t *entries = a.lists.entries + a.head * a.plan.nq * a.topk;
    const uint32_t *offsets = a.lists.offsets + a.head * (a.lists.blocks + 1);
    const float scale_log2 = a.scale * FSA_LOG2E;
    const int64_t kv_row = (int64_t)a.kv_heads * D, block = blockIdx.x;
    if (block >= a.plan.cu_blocks[a.plan.num_seqs]) return;
    const uint32_t first = offsets[block], last = offsets[block + 1];
    const int rows = (int)(last - first) * g, first_tile = blockIdx.y * V3_TILES;
    const int tiles = min((rows + 15) / 16, first_tile + V3_TILES);
    if (first_tile >= tiles) return;
    const int64_t seq = fsa_find(a.plan.cu_blocks, a.plan.num_seqs, block),
                  in_seq = block - a.plan.cu_blocks[seq];
    const int64_t key0 = a.plan.cu_seqlens[seq] + in_seq * a.block;
    const int keys = (int)min((int64_t)a.block, a.plan.cu_seqlens[seq + 1] - key0);
    for (int i = threadIdx.x; i < 64 * CHUNKS; i += 128) {
        int r = i / CHUNKS, chunk = i % CHUNKS;
        int64_t from = (key0 + min(r, keys - 1)) * kv_row + a.head * D + chunk * 8;
        cp_async_16(k_base + swizzled<D>(r, chunk), k + from, r < keys);
        if (!STATS) cp_async_16(v_base + swizzled<D>(r, chunk), v + from, r < keys);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int tile = first_tile + warp; tile < tiles; tile += 4) {
        uint32_t fq[D / 16][4];
        uint32_t entry[2];
        int limit[2];
        for (int i = 0; i < 2; i++) {
            int r = min(tile * 16 + quad + 8 * i, rows - 1);
            entry[i] = entries[first + r / g];
            int64_t token = entry[i] / (uint32_t)a.topk, s, pos;
            fsa_row(a.plan, token, &s, &pos);
            limit[i] = (int)min((int64_t)keys - 1, pos - in_seq * a.block);
            const uint32_t *from = (const uint32_t *)(q + (token * a.q_heads + a.head * g + r % g) * D);
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++)
                fq[kk][i] = from[kk * 8 + c], fq[kk][i + 2] = from[kk * 8 + 4 + c];
        }
        float s[8][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t b[4];
                ldmatrix_x4(b, k_base +
                                   swizzled<D>(n * 8 + (lane & 7) + lane / 16 * 8, kk * 2 + (lane / 8 & 1)));
                mma_16816<T>(s[n], fq[kk], b[0], b[1]);
                mma_16816<T>(s[n + 1], fq[kk], b[2], b[3]);
            }
        }
        float base[2];
        for (int i = 0; i < 2; i++) {
            int r = tile * 16 + quad + 8 * i;
            int64_t token = entry[i] / (uint32_t)a.topk;
            base[i] = STATS ? -INFINITY : a.row_stats[token * g + min(r, rows - 1) % g];
#pragma unroll
            for (int n = 0; n < 8; n++) {
                for (int j = 0; j < 2; j++) {
                    float &x = s[n][2 * i + j];
                    x = n * 8 + 2 * c + j <= limit[i] ? x * scale_log2 : -INFINITY;
                    if (STATS) base[i] = fmaxf(base[i], x);
                }
            }
            if (!STATS) continue;
            base[i] = quad_max(base[i]);
            float sum = 0;
#pragma unroll
            for (int n = 0; n < 8; n++)
                sum += exp2_fast(s[n][2 * i] - base[i]) + exp2_fast(s[n][2 * i + 1] - base[i]);
            sum = quad_sum(sum);
            if (c == 0 && r < rows) a.stats[(int64_t)entry[i] * g + r % g] = base[i] + log2f(sum);
        }
        if constexpr (!STATS) {
            uint32_t p[4][4];
#pragma unroll
            for (int n = 0; n < 8; n++) {
                p[n / 2][(n & 1) * 2] = pack2<T>(exp2_fast(s[n][0] - base[0]), exp2_fast(s[n][1] - base[0]));
                p[n / 2][(n & 1) * 2 + 1] =
                    pack2<T>(exp2_fast(s[n][2] - base[1]), exp2_fast(s[n][3] - base[1]));
            }
            float acc[D / 8][4] = {};
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
#pragma unroll
                for (int n = 0; n < D / 8; n += 2) {
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, v_base + swizzled<D>(kk * 16 + (lane & 15), n + lane / 16));
                    mma_16816<T>(acc[n], p[kk], b[0], b[1]);
                    mma_16816<T>(acc[n + 1], p[kk], b[2], b[3]);
                }
            }
            for (int i = 0; i < 2; i++) {
                int r = tile * 16 + quad + 8 * i;
                if (r >= rows) continue;
                uint32_t *to = (uint32_t *)((T *)a.partial + ((int64_t)entry[i] * g + r % g) * D);
#pragma unroll
                for (int n = 0; n < D / 8; n++) to[n * 4 + c] = pack2<T>(acc[n][2 * i], acc[n][2 * i + 1]);
            }
        }
    }
}

// Version 3's log-sum-exp of each row over its slots. A thread a row.
static __global__ void selected_v3_row_stats_kernel(VersionArgs a, float *lse) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= a.plan.nq * a.group) return;
    int64_t token = i / a.group;
    int r = (int)(i % a.group);
    float most = -INFINITY, sum = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int t = 0; t < a.topk; t++) {
            if (a.indices[(a.head * a.plan.nq + token) * a.topk + t] < 0) continue;
            float x = a.stats[(token * a.topk + t) * a.group + r];
            if (pass == 0)
                most = fmaxf(most, x);
            else
                sum += exp2f(x - most);
        }
    }
    a.row_stats[i] = most + log2f(sum);
    lse[token * a.q_heads + a.head * a.group + r] = a.row_stats[i] * FSA_LN2;
}

// Version 3's reduction. A thread takes eight channels of a row.
template <typename T, int D> __global__ void selected_v3_reduce_kernel(VersionArgs a, T *o) {
    int64_t i = blockIdx.x * 256ll + threadIdx.x, row = i / (D / 8), token = row / a.group;
    if (token >= a.plan.nq) return;
    int r = (int)(row % a.group);
    float acc[8] = {};
    for (int t = 0; t < a.topk; t++) {
        if (a.indices[(a.head * a.plan.nq + token) * a.topk + t] < 0) continue;
        uint4 x =
            ((const uint4 *)((const T *)a.partial + ((token * a.topk + t) * a.group + r) * D))[i % (D / 8)];
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
        for (int j = 0; j < 4; j++) {
            float2 f = unpack2<T>(words[j]);
            acc[2 * j] += f.x;
            acc[2 * j + 1] += f.y;
        }
    }
    uint4 *to = (uint4 *)(o + (token * a.q_heads + a.head * a.group + r) * D);
    to[i % (D / 8)] = make_uint4(pack2<T>(acc[0], acc[1]), pack2<T>(acc[2], acc[3]), pack2<T>(acc[4], acc[5]),
                                 pack2<T>(acc[6], acc[7]));
}

// Runs versions 1 to 3. Version 3 needs blocks of at most 64 tokens and memory of its own.
template <typename T, int D> struct Versions {
    const FsaConfig &c;
    VersionArgs a;
    Buffer<char> *lists_memory = NULL;
    Buffer<T> *partial = NULL;
    Buffer<float> *stats = NULL, *row_stats = NULL;
    Versions(const FsaConfig &config, const FsaPlan &p, int version) : c(config) {
        memset(&a, 0, sizeof a);
        a.plan = p, a.q_heads = c.q_heads, a.kv_heads = c.kv_heads, a.group = c.q_heads / c.kv_heads;
        a.block = c.block, a.topk = c.topk, a.scale = c.scale ? c.scale : 1 / sqrtf((float)D);
        if (version != 3) return;
        // The lists are the library's, in one slab.
        lists_memory = new Buffer<char>((int64_t)fsa_lists_bytes(&c, &p, p.nq));
        a.lists = fsa_lists_place(&c, &p, p.nq, lists_memory->get());
        partial = new Buffer<T>(p.nq * c.topk * a.group * D);
        stats = new Buffer<float>(p.nq * c.topk * a.group);
        row_stats = new Buffer<float>(p.nq * a.group);
        a.partial = partial->get(), a.stats = stats->get(), a.row_stats = row_stats->get();
    }
    ~Versions() {
        delete lists_memory;
        delete partial;
        delete stats;
        delete row_stats;
    }
    void forward(int version, const T *q, const T *k, const T *v, const int32_t *indices, T *o, float *lse) {
        a.indices = indices;
        int64_t nq = a.plan.nq;
        if (version == 1)
            selected_v1_kernel<T, D><<<(unsigned)((nq * a.q_heads + 3) / 4), 128>>>(a, q, k, v, o, lse);
        if (version == 2) {
            int smem = 4 * 64 * D * 2;
            CUDA_CHECK(cudaFuncSetAttribute(selected_v2_kernel<T, D>,
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
            selected_v2_kernel<T, D><<<dim3((unsigned)nq, a.kv_heads), 128, smem>>>(a, q, k, v, o, lse);
        }
        if (version == 3) {
            FSA_CHECK(fsa_lists(&c, &a.plan, indices, &a.lists, 0));
            dim3 grid((unsigned)a.lists.blocks,
                      (unsigned)((nq * a.group + 16 * V3_TILES - 1) / (16 * V3_TILES)));
            for (a.head = 0; a.head < a.kv_heads; a.head++) {
                selected_v3_kernel<T, D, true><<<grid, 128, 64 * D * 2>>>(a, q, k, v);
                selected_v3_row_stats_kernel<<<(unsigned)((nq * a.group + 255) / 256), 256>>>(a, lse);
                selected_v3_kernel<T, D, false><<<grid, 128, 2 * 64 * D * 2>>>(a, q, k, v);
                selected_v3_reduce_kernel<T, D>
                    <<<(unsigned)((nq * a.group * (D / 8) + 255) / 256), 256>>>(a, o);
            }
        }
        CUDA_CHECK(cudaGetLastError());
    }
};
#endif
