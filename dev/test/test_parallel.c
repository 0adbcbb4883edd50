// test_parallel.c: tests how a model, a batch and the samples are partitioned over 1 to 16 ranks
// (llmc/zero.h, llmc/context_parallel.h and the ranks of the data loader).
#include "../../llmc/context_parallel.h"
#include "../../llmc/dataloader.h"
#include "../../llmc/zero.h"
#include "test.h"

enum { RANKS = 16 };

// ---- ZeRO

// Checks that every parameter has one owner, that shards are dense, and that partitions are aligned and even.
static void check_zero(const ModelConfig *c, const char *name, int stage, int ranks) {
    int64_t total, count = param_table(c, NULL, &total), next = 0, owned = 0, max_owned = 0;
    ParamTensor *tensors = (ParamTensor *)xcalloc((size_t)count, sizeof *tensors);
    param_table(c, tensors, &total);
    ZeroPartition z[RANKS];
    int good = 1;
    for (int r = 0; r < ranks; r++) zero_partition_build(&z[r], stage, r, ranks, tensors, count);
    CHECK(z[0].num_units == c->layers + 2, "%s: %lld units", name, (long long)z[0].num_units);
    for (int64_t u = 0; u < z[0].num_units; u++) {
        CHECK(z[0].units[u].begin == (u ? z[0].units[u - 1].end : 0), "%s: unit %lld", name, (long long)u);
        for (int r = 0; r < ranks; r++) {
            int64_t begin, end;
            zero_owned(&z[r], u, r, &begin, &end);
            if (z[r].stage == 0) {
                good &= begin == z[r].units[u].begin && end == z[r].units[u].end &&
                        z[r].units[u].shard_offset == begin;
                continue;
            }
            good &= begin == next && end >= begin && begin % ZERO_ALIGN == 0;
            good &= r == ranks - 1 || end - begin == z[r].units[u].partition_size;
            good &= end - begin - z[r].units[u].partition_size < ranks * ZERO_ALIGN;
            next = end;
            // a unit's offset in the shard is the number of elements that this rank owns in earlier units
            int64_t before = 0, b, e;
            for (int64_t i = 0; i < u; i++) zero_owned(&z[r], i, r, &b, &e), before += e - b;
            good &= z[r].units[u].shard_offset == before;
        }
        if (z[0].stage) good &= next == z[0].units[u].end;
    }
    CHECK(good, "%s, stage %d, %d ranks: partitions do not fit together", name, stage, ranks);
    for (int r = 0; r < ranks; r++) {
        owned += z[r].shard_size;
        if (z[r].shard_size > max_owned) max_owned = z[r].shard_size;
    }
    if (z[0].stage == 0)
        CHECK(owned == ranks * total, "%s: %lld parameters owned", name, (long long)owned);
    else
        CHECK(owned == total && max_owned <= total / ranks + z[0].num_units * 2 * ZERO_ALIGN * ranks,
              "%s, %d ranks: %lld owned of %lld, at most %lld", name, ranks, (long long)owned,
              (long long)total, (long long)max_owned);
    for (int64_t i = 0; i < count; i++) {
        const ParamTensor *t = &tensors[i];
        int64_t u = zero_find_unit(&z[0], t->offset),
                last_unit = zero_find_unit(&z[0], t->offset + t->size - 1);
        int64_t expected = t->layer >= 0 ? t->layer + 1 : i == 0 ? 0 : c->layers + 1;
        good &= u == expected && last_unit == expected;
    }
    CHECK(good, "%s, stage %d, %d ranks: a tensor is in another unit", name, stage, ranks);
    for (int r = 0; r < ranks; r++) zero_partition_free(&z[r]);
    free(tensors);
}

static void test_zero(void) {
    int presets_count;
    const Preset *p = presets(&presets_count);
    for (int i = 0; i < presets_count; i++) {
        ModelConfig c;
        config_from_preset(&c, &p[i]);
        if (c.vocab_size == 0) config_set_vocab(&c, 257);
        for (int attn = ATTN_NSA; attn <= ATTN_FULL; attn++) {
            c.attn = attn;
            for (int stage = 0; stage <= 2; stage++)
                for (int ranks = 1; ranks <= RANKS; ranks++) check_zero(&c, p[i].name, stage, ranks);
        }
    }
}

// ---- context parallel

// Checks that every row of the batch is a query of exactly one rank, and that gather and scatter are inverse.
// Returns the largest work of a rank divided by the mean work.
static double check_block_assignment(const ModelConfig *c, const int64_t *cu, int64_t num_seqs, int ranks) {
    int64_t n = cu[num_seqs], chunks = cp_num_chunks(n, num_seqs, ranks), row = 0;
    int32_t *chunk_perm = (int32_t *)xcalloc((size_t)chunks, sizeof *chunk_perm);
    FsaSegment *segments = (FsaSegment *)xcalloc((size_t)(num_seqs + chunks), sizeof *segments);
    int64_t *rows = (int64_t *)xcalloc((size_t)n, sizeof *rows),
            *local = (int64_t *)xcalloc((size_t)n, sizeof *local);
    unsigned char *seen = (unsigned char *)xcalloc((size_t)n, 1);
    double work[RANKS], max_work = 0, total_work = 0;
    int good = chunks % ranks == 0 && n % chunks == 0;
    CHECK(good, "%lld tokens, %d ranks: %lld chunks", (long long)n, ranks, (long long)chunks);
    cp_assign_chunks(c, cu, num_seqs, ranks, chunks, chunk_perm, work);
    for (int64_t i = 0; i < n; i++) rows[i] = i;
    for (int r = 0; r < ranks; r++) {
        int64_t count = cp_segments(cu, num_seqs, ranks, chunks, chunk_perm, r, segments), position = 0;
        good &= count <= num_seqs + chunks / ranks;
        cp_gather_rows(ranks, n, chunks, chunk_perm, r, local, rows, sizeof *rows);
        for (int64_t i = 0; i < count; i++) {
            const FsaSegment *g = &segments[i], *previous = g - 1;
            good &= g->len > 0 && g->pos >= 0 && g->pos + g->len <= cu[g->seq + 1] - cu[g->seq];
            // segments are ascending, as fsa.h requires, and adjacent segments are merged
            if (i > 0)
                good &= g->seq > previous->seq ||
                        (g->seq == previous->seq && g->pos > previous->pos + previous->len);
            for (int64_t t = 0; t < g->len && good; t++, position++) {
                int64_t key = cu[g->seq] + g->pos + t;
                good &= position < n / ranks && local[position] == key && !seen[key];
                seen[key] = 1;
            }
        }
        good &= position == n / ranks;
        total_work += work[r];
        if (work[r] > max_work) max_work = work[r];
    }
    int64_t *gathered = (int64_t *)xcalloc((size_t)n, sizeof *gathered);
    int64_t *scattered = (int64_t *)xcalloc((size_t)n, sizeof *scattered);
    for (int r = 0; r < ranks; r++, row += n / ranks)
        cp_gather_rows(ranks, n, chunks, chunk_perm, r, gathered + row, rows, sizeof *rows);
    cp_scatter_rows(n, chunks, chunk_perm, scattered, gathered, sizeof *rows);
    for (int64_t i = 0; i < n; i++) good &= scattered[i] == i;
    CHECK(good, "%lld tokens in %lld sequences, %d ranks: rows are missing, doubled or misplaced",
          (long long)n, (long long)num_seqs, ranks);
    free(chunk_perm), free(segments), free(rows), free(local), free(seen), free(gathered), free(scattered);
    return total_work > 0 ? max_work / (total_work / ranks) : 1;
}

static void test_context_parallel(void) {
    ModelConfig c;
    config_from_preset(&c, preset_find("llama3-8b"));
    Rng rng;
    rng_seed(&rng, 11, 0);
    for (int attn = ATTN_NSA; attn <= ATTN_WINDOW; attn++) {
        c.attn = attn;
        double max_imbalance = 1, max_imbalance_documents = 1;
        for (int ranks = 1; ranks <= RANKS; ranks++) {
            // one long sequence: 2 chunks per rank
            int64_t cu[400] = {0, 65536 / (2 * ranks) * 2 * ranks};
            CHECK(cp_num_chunks(cu[1], 1, ranks) == (ranks > 1 ? 2 * ranks : 1), "%d ranks", ranks);
            double imbalance = check_block_assignment(&c, cu, 1, ranks);
            if (imbalance > max_imbalance) max_imbalance = imbalance;
            // documents of random lengths, including 0; one of them has half of all tokens
            for (int repeat = 0; repeat < 3; repeat++) {
                int64_t n = (int64_t)2 * ranks * 4096, length_sum = 0, count = 0;
                while (length_sum < n && count < 390) {
                    int64_t length =
                        count == 3 ? n / 2 : (int64_t)(rng_uniform(&rng) * rng_uniform(&rng) * 6000);
                    if (count == 389 || length_sum + length > n) length = n - length_sum;
                    cu[++count] = length_sum += length;
                }
                imbalance = check_block_assignment(&c, cu, count, ranks);
                if (imbalance > max_imbalance_documents) max_imbalance_documents = imbalance;
            }
            // sequences of a few tokens, whose lengths are not multiples of anything
            int64_t odd[4] = {0, 1, 1, 2 * ranks * 3};
            check_block_assignment(&c, odd, 3, ranks);
        }
        CHECK(max_imbalance < 1.01, "attention %d: %.4f times the mean work", attn, max_imbalance);
        CHECK(max_imbalance_documents < 1.1, "attention %d, documents: %.4f times the mean work", attn,
              max_imbalance_documents);
    }
    // head groups: equal groups with at least 256 MiB of keys
    FsaConfig *f = &c.fsa; // (32, 8) heads of 128: the keys of 1M tokens and one head have 256 MiB
    CHECK(cp_num_head_groups(f, 1048576, 2) == 8 && cp_num_head_groups(f, 1048576, 1) == 1,
          "llama3-8b: groups of 1M tokens");
    CHECK(cp_num_head_groups(f, 1048575, 2) == 4 && cp_num_head_groups(f, 262144, 2) == 2 &&
              cp_num_head_groups(f, 131072, 2) == 1,
          "llama3-8b: groups of fewer tokens");
    CHECK(cp_num_head_groups(f, (int64_t)1 << 32, 16) == 8, "llama3-8b: groups of 4G tokens");
    f->kv_heads = 6;
    CHECK(cp_num_head_groups(f, 262144, 2) == 1 && cp_num_head_groups(f, 393216, 2) == 2 &&
              cp_num_head_groups(f, 640000, 2) == 3,
          "6 kv heads");
    // with one sequence, rank r has chunks r and 2*ranks - 1 - r
    int64_t cu[2] = {0, 8192};
    int32_t chunk_perm[8];
    c.attn = ATTN_FULL;
    cp_assign_chunks(&c, cu, 1, 4, 8, chunk_perm, NULL);
    for (int r = 0; r < 4; r++) {
        int32_t low = chunk_perm[2 * r], high = chunk_perm[2 * r + 1];
        CHECK(low + high == 7 && low < 4, "rank %d has chunks %d and %d", r, low, high);
    }
}

// ---- samples

// All ranks together get the samples that one rank alone gets. The cp_size ranks of a group share a batch.
static void test_samples(void) {
    enum { LEN = 4, STEP = 48, STEPS = 5, SAMPLES = 100 };
    char folder[] = "/tmp/test_parallel_XXXXXX", path[64];
    if (!mkdtemp(folder)) die("mkdtemp: %s", strerror(errno));
    snprintf(path, sizeof path, "%s/s_000000.bin", folder);
    ShardWriter w;
    shard_writer_open(&w, path, 65536);
    for (int32_t i = 0; i < SAMPLES * (LEN + 1); i++) shard_writer_add(&w, &i, 1);
    shard_writer_commit(&w);
    int32_t expected[STEPS * STEP], inputs[STEP * LEN], targets[STEP * LEN];
    for (int ranks = 1; ranks <= RANKS; ranks++) {
        for (int cp_size = 1; cp_size <= ranks; cp_size++) {
            int dp_size = ranks / cp_size, batch = STEP / dp_size, good = 1;
            if (ranks % cp_size || STEP % dp_size) continue;
            for (int r = 0; r < ranks; r++) {
                DataLoader l;
                loader_open(&l, path, batch, LEN, 65536, 1, 5, r / cp_size, dp_size);
                for (int step = 0; step < STEPS; step++) {
                    loader_next(&l, inputs, targets);
                    for (int row = 0; row < batch; row++) {
                        int32_t *sample = &expected[step * STEP + r / cp_size * batch + row];
                        if (ranks == 1) *sample = inputs[row * LEN];
                        good &= *sample == inputs[row * LEN];
                    }
                }
                good &= l.epoch == STEPS * STEP / SAMPLES && l.position == STEPS * STEP % SAMPLES;
                loader_close(&l);
            }
            CHECK(good, "%d ranks, -cp %d: other samples", ranks, cp_size);
        }
    }
    unlink(path), rmdir(folder);
}

int main(void) {
    test_zero();
    test_context_parallel();
    test_samples();
    return test_end("test_parallel");
}
