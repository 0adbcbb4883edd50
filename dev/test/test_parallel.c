// test_parallel.c: how a model, a batch and the samples are divided over 1 to 16 ranks (llmc/zero.h,
// llmc/context_parallel.h, the data loader's ranks).
#include "../../llmc/context_parallel.h"
#include "../../llmc/dataloader.h"
#include "../../llmc/zero.h"
#include "test.h"

enum { RANKS = 16 };

// ---- ZeRO

// Every parameter has one owner, shards are dense, parts aligned and even.
static void check_zero(const ModelConfig *c, const char *name, int stage, int ranks) {
    int64_t total, count = param_table(c, NULL, &total), next = 0, sum = 0, most = 0;
    ParamTensor *tensors = (ParamTensor *)xcalloc((size_t)count, sizeof *tensors);
    param_table(c, tensors, &total);
    Zero z[RANKS];
    int good = 1;
    for (int r = 0; r < ranks; r++) zero_build(&z[r], stage, r, ranks, tensors, count);
    CHECK(z[0].num_units == (ranks > 1 ? c->layers + 2 : 1), "%s: %lld units", name,
          (long long)z[0].num_units);
    for (int64_t u = 0; u < z[0].num_units; u++) {
        CHECK(z[0].units[u].begin == (u ? z[0].units[u - 1].end : 0), "%s: unit %lld", name, (long long)u);
        for (int r = 0; r < ranks; r++) {
            int64_t begin, end;
            zero_owned(&z[r], u, r, &begin, &end);
            if (z[r].stage == 0) {
                good &=
                    begin == z[r].units[u].begin && end == z[r].units[u].end && z[r].units[u].shard_offset == begin;
                continue;
            }
            good &= begin == next && end >= begin && begin % ZERO_ALIGN == 0;
            good &= r == ranks - 1 || end - begin == z[r].units[u].partition_size;
            good &= end - begin - z[r].units[u].partition_size < ranks * ZERO_ALIGN;
            next = end;
            // the shard is what this rank has owned so far
            int64_t before = 0, b, e;
            for (int64_t i = 0; i < u; i++) zero_owned(&z[r], i, r, &b, &e), before += e - b;
            good &= z[r].units[u].shard_offset == before;
        }
        if (z[0].stage) good &= next == z[0].units[u].end;
    }
    CHECK(good, "%s, stage %d, %d ranks: parts do not fit together", name, stage, ranks);
    for (int r = 0; r < ranks; r++) {
        sum += z[r].shard_size;
        if (z[r].shard_size > most) most = z[r].shard_size;
    }
    if (z[0].stage == 0)
        CHECK(sum == ranks * total, "%s: %lld numbers", name, (long long)sum);
    else
        CHECK(sum == total && most <= total / ranks + z[0].num_units * 2 * ZERO_ALIGN * ranks,
              "%s, %d ranks: %lld owned of %lld, at most %lld", name, ranks, (long long)sum, (long long)total,
              (long long)most);
    for (int64_t i = 0; i < count; i++) {
        const ParamTensor *t = &tensors[i];
        int64_t u = zero_find_unit(&z[0], t->offset), last = zero_find_unit(&z[0], t->offset + t->size - 1);
        int64_t want = ranks == 1 ? 0 : t->layer >= 0 ? t->layer + 1 : i == 0 ? 0 : c->layers + 1;
        good &= u == want && last == want;
    }
    CHECK(good, "%s, stage %d, %d ranks: a tensor is in another unit", name, stage, ranks);
    for (int r = 0; r < ranks; r++) zero_free(&z[r]);
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

// Every row of the batch is a query of one rank, at its own place; returns the greatest work over the mean.
static double check_division(const ModelConfig *c, const int64_t *cu, int64_t num_seqs, int ranks) {
    int64_t n = cu[num_seqs], blocks = cp_num_blocks(n, num_seqs, ranks), row = 0;
    int32_t *place = (int32_t *)xcalloc((size_t)blocks, sizeof *place);
    FsaSegment *segments = (FsaSegment *)xcalloc((size_t)(num_seqs + blocks), sizeof *segments);
    int64_t *rows = (int64_t *)xcalloc((size_t)n, sizeof *rows),
            *mine = (int64_t *)xcalloc((size_t)n, sizeof *mine);
    unsigned char *seen = (unsigned char *)xcalloc((size_t)n, 1);
    double work[RANKS], most = 0, sum = 0;
    int good = blocks % ranks == 0 && n % blocks == 0;
    CHECK(good, "%lld tokens, %d ranks: %lld blocks", (long long)n, ranks, (long long)blocks);
    cp_assign_blocks(c, cu, num_seqs, ranks, blocks, place, work);
    for (int64_t i = 0; i < n; i++) rows[i] = i;
    for (int r = 0; r < ranks; r++) {
        int64_t count = cp_segments(cu, num_seqs, ranks, blocks, place, r, segments), at = 0;
        good &= count <= num_seqs + blocks / ranks;
        cp_gather_rows(ranks, n, blocks, place, r, mine, rows, sizeof *rows);
        for (int64_t i = 0; i < count; i++) {
            const FsaSegment *g = &segments[i], *before = g - 1;
            good &= g->len > 0 && g->pos >= 0 && g->pos + g->len <= cu[g->seq + 1] - cu[g->seq];
            // as fsa.h wants them, and no needless cut
            if (i > 0)
                good &= g->seq > before->seq || (g->seq == before->seq && g->pos > before->pos + before->len);
            for (int64_t t = 0; t < g->len && good; t++, at++) {
                int64_t key = cu[g->seq] + g->pos + t;
                good &= at < n / ranks && mine[at] == key && !seen[key];
                seen[key] = 1;
            }
        }
        good &= at == n / ranks;
        sum += work[r];
        if (work[r] > most) most = work[r];
    }
    int64_t *gathered = (int64_t *)xcalloc((size_t)n, sizeof *gathered);
    int64_t *back = (int64_t *)xcalloc((size_t)n, sizeof *back);
    for (int r = 0; r < ranks; r++, row += n / ranks)
        cp_gather_rows(ranks, n, blocks, place, r, gathered + row, rows, sizeof *rows);
    cp_scatter_rows(n, blocks, place, back, gathered, sizeof *rows);
    for (int64_t i = 0; i < n; i++) good &= back[i] == i;
    CHECK(good, "%lld tokens in %lld sequences, %d ranks: rows are missing, doubled or misplaced",
          (long long)n, (long long)num_seqs, ranks);
    free(place), free(segments), free(rows), free(mine), free(seen), free(gathered), free(back);
    return sum > 0 ? most / (sum / ranks) : 1;
}

static void test_context_parallel(void) {
    ModelConfig c;
    config_from_preset(&c, preset_find("llama3-8b"));
    Rng rng;
    rng_seed(&rng, 11, 0);
    for (int attn = ATTN_NSA; attn <= ATTN_WINDOW; attn++) {
        c.attn = attn;
        double worst = 1, worst_documents = 1;
        for (int ranks = 1; ranks <= RANKS; ranks++) {
            // one long sequence: 2 blocks a rank, as even as it gets
            int64_t cu[400] = {0, 65536 / (2 * ranks) * 2 * ranks};
            CHECK(cp_num_blocks(cu[1], 1, ranks) == (ranks > 1 ? 2 * ranks : 1), "%d ranks", ranks);
            double even = check_division(&c, cu, 1, ranks);
            if (even > worst) worst = even;
            // documents of any length, empty ones too, one of them half of all
            for (int repeat = 0; repeat < 3; repeat++) {
                int64_t n = (int64_t)2 * ranks * 4096, at = 0, count = 0;
                while (at < n && count < 390) {
                    int64_t length =
                        count == 3 ? n / 2 : (int64_t)(rng_uniform(&rng) * rng_uniform(&rng) * 6000);
                    if (count == 389 || at + length > n) length = n - at;
                    cu[++count] = at += length;
                }
                even = check_division(&c, cu, count, ranks);
                if (even > worst_documents) worst_documents = even;
            }
            // lengths that nothing divides, of a few tokens
            int64_t odd[4] = {0, 1, 1, 2 * ranks * 3};
            check_division(&c, odd, 3, ranks);
        }
        CHECK(worst < 1.01, "attention %d: %.4f times the mean work", attn, worst);
        CHECK(worst_documents < 1.1, "attention %d, documents: %.4f times the mean work", attn,
              worst_documents);
    }
    // groups of heads: equal ones, as small as a transfer should be
    FsaConfig *f = &c.fsa; // (32, 8) heads of 128: 16 MiB are 65,536 tokens of one
    CHECK(cp_num_head_groups(f, 65536, 2) == 8 && cp_num_head_groups(f, 65536, 1) == 1, "llama3-8b: groups of 64K tokens");
    CHECK(cp_num_head_groups(f, 65535, 2) == 4 && cp_num_head_groups(f, 16384, 2) == 2 && cp_num_head_groups(f, 4096, 2) == 1,
          "llama3-8b: groups of fewer tokens");
    CHECK(cp_num_head_groups(f, (int64_t)1 << 32, 16) == 8, "llama3-8b: groups of 4G tokens");
    f->kv_heads = 6;
    CHECK(cp_num_head_groups(f, 16384, 2) == 1 && cp_num_head_groups(f, 24576, 2) == 2 && cp_num_head_groups(f, 40000, 2) == 3,
          "6 kv heads");
    // of one sequence, rank r has blocks r and 2*ranks - 1 - r
    int64_t cu[2] = {0, 8192};
    int32_t place[8];
    c.attn = ATTN_FULL;
    cp_assign_blocks(&c, cu, 1, 4, 8, place, NULL);
    for (int r = 0; r < 4; r++) {
        int32_t low = place[2 * r], high = place[2 * r + 1];
        CHECK(low + high == 7 && low < 4, "rank %d has blocks %d and %d", r, low, high);
    }
}

// ---- samples

// `ranks` ranks, `context` of which share each batch, see the samples that one rank sees.
static void test_samples(void) {
    enum { LEN = 4, STEP = 48, STEPS = 5, SAMPLES = 100 };
    char folder[] = "/tmp/test_parallel_XXXXXX", path[64];
    if (!mkdtemp(folder)) die("mkdtemp: %s", strerror(errno));
    snprintf(path, sizeof path, "%s/s_000000.bin", folder);
    ShardWriter w;
    shard_writer_open(&w, path, 65536);
    for (int32_t i = 0; i < SAMPLES * (LEN + 1); i++) shard_writer_add(&w, &i, 1);
    shard_writer_commit(&w);
    int32_t want[STEPS * STEP], inputs[STEP * LEN], targets[STEP * LEN];
    for (int ranks = 1; ranks <= RANKS; ranks++) {
        for (int context = 1; context <= ranks; context++) {
            int data = ranks / context, batch = STEP / data, good = 1;
            if (ranks % context || STEP % data) continue;
            for (int r = 0; r < ranks; r++) {
                DataLoader l;
                loader_open(&l, path, batch, LEN, 65536, 1, 5, r / context, data);
                for (int step = 0; step < STEPS; step++) {
                    loader_next(&l, inputs, targets);
                    for (int row = 0; row < batch; row++) {
                        int32_t *place = &want[step * STEP + r / context * batch + row];
                        if (ranks == 1) *place = inputs[row * LEN];
                        good &= *place == inputs[row * LEN];
                    }
                }
                good &= l.epoch == STEPS * STEP / SAMPLES && l.position == STEPS * STEP % SAMPLES;
                loader_close(&l);
            }
            CHECK(good, "%d ranks, %d a sequence: other samples", ranks, context);
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
