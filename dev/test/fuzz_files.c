// fuzz_files.c: loads mutated shards, answers, tokenizers, checkpoints, logs and evaluation files with the
// trainers' own code. Each file must be loaded or refused with one line; a crash, a sanitizer's report or a
// hang is a failure. Then changes every byte of a checkpoint; no change may be accepted.
//
// usage: fuzz_files [FOLDER]. SECONDS=N in the environment runs for N seconds (5), COUNT=N for at least N
// files (0). SEED=N repeats a run. A file that fails stays in FOLDER (by default a new one in /tmp).
#include "../../llmc/run.h"
#include "test.h"
#include "tokenizer_bin.h"
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum {
    SHARD16,
    SHARD32,
    ANSWERS,
    BYTES,
    WORDS,
    BPE,
    SENTENCEPIECE,
    LLMC,
    CHECKPOINT,
    LOG,
    EVAL32,
    EVAL16,
    KINDS
};
static const char *const KIND_NAMES[KINDS] = {"shard of 16-bit tokens",
                                              "shard of 32-bit tokens",
                                              "answers",
                                              "tokenizer of bytes",
                                              "tokenizer of words",
                                              "tokenizer of BPE",
                                              "tokenizer of SentencePiece",
                                              "llm.c's tokenizer",
                                              "checkpoint",
                                              "log",
                                              "evaluation file",
                                              "llm.c's evaluation file"};
enum { MAX_BYTES = 1 << 16, FILES_PER_CHILD = 250, HANG_SECONDS = 20 };
enum { SEQ = 16, VOCAB = 300 };

typedef struct {
    unsigned char data[2 * MAX_BYTES];
    int64_t size;
} File;

static char root[1024];
static File seeds[KINDS];
static ModelConfig model;
static int64_t num_params;

// The result of a child, in memory that it shares with its parent.
static struct {
    int64_t index; // of the file that it loads
    int64_t loaded[KINDS], refused[KINDS];
} * shared;

static jmp_buf refused;
static char message[2 * PATH_BYTES];

// Replaces the end of the process in die(): returns to load_file.
static void catch_error(const char *text) {
    snprintf(message, sizeof message, "%s", text);
    longjmp(refused, 1);
}

static void path_of(char *path, const char *name) {
    snprintf(path, PATH_BYTES, "%s/%s", root, name);
}

static void read_seed(int kind, const char *name) {
    char path[PATH_BYTES];
    path_of(path, name);
    FILE *f = fopen(path, "rb");
    if (!f) die("cannot read %s: %s", path, strerror(errno));
    seeds[kind].size = (int64_t)fread(seeds[kind].data, 1, MAX_BYTES, f);
    fclose(f);
}

static void write_whole(const char *name, const void *data, int64_t size) {
    char path[PATH_BYTES];
    path_of(path, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0 || write(fd, data, (size_t)size) != size) {
        perror(path);
        _exit(98);
    }
    close(fd);
}

static void make_shard(const char *name, int64_t vocab_size) {
    char path[PATH_BYTES];
    ShardWriter w;
    path_of(path, name);
    shard_writer_open(&w, path, vocab_size);
    for (int32_t i = 0; i < 8 * (SEQ + 1); i++) {
        int32_t token = i * 7 % VOCAB;
        shard_writer_add(&w, &token, 1);
    }
    shard_writer_commit(&w);
}

// Writes one valid file of each kind, and reads it as the seed of the mutations.
static void make_seeds(void) {
    char path[PATH_BYTES], bytes[256], msg[256];
    const char *pieces[VOCAB], *const words[] = {"<|endoftext|>", "Mara :", "lamp", "a", "ab", "abc"};
    int lengths[VOCAB];
    int32_t ranks[VOCAB];
    make_shard("s.bin", 60000);
    read_seed(SHARD16, "s.bin");
    make_shard("s.bin", 70000);
    read_seed(SHARD32, "s.bin");

    Answer list[8];
    for (int i = 0; i < 8; i++) list[i].index = i * (SEQ + 1) + 9, list[i].distance = 4;
    Answers answers = {8, SEQ, list};
    path_of(path, "s.bin");
    answers_save(&answers, path);
    read_seed(ANSWERS, "s.answers");

    for (int i = 0; i < VOCAB; i++) {
        bytes[i & 255] = (char)i;
        pieces[i] = i < 256 ? &bytes[i] : i < 260 ? "ab" : words[i % 6];
        lengths[i] = i < 256 ? 1 : (int)strlen(pieces[i]);
        ranks[i] = i < 256 ? -1 : i;
    }
    path_of(path, "tokenizer.bin");
    tokenizer_write(path, TOKENIZER_BYTES, 257, 256, pieces, lengths, NULL);
    read_seed(BYTES, "tokenizer.bin");
    tokenizer_write(path, TOKENIZER_BPE, VOCAB, 299, pieces, lengths, ranks);
    read_seed(BPE, "tokenizer.bin");
    write_sentencepiece(path, PREFIX_ALWAYS, 0, SP_UNKNOWN);
    read_seed(SENTENCEPIECE, "tokenizer.bin");
    for (int i = 0; i < 6; i++) pieces[i] = words[i], lengths[i] = (int)strlen(words[i]);
    tokenizer_write(path, TOKENIZER_WORDS, 6, 0, pieces, lengths, NULL);
    read_seed(WORDS, "tokenizer.bin");
    unsigned char *llmc = seeds[LLMC].data;
    uint32_t header[256] = {TOKENIZER_LLMC_MAGIC, 2, 258, 257};
    memcpy(llmc, header, sizeof header);
    int64_t n = sizeof header;
    for (int i = 0; i < 258; i++) {
        llmc[n++] = i < 256 ? 1 : 2;
        if (i < 256) llmc[n++] = (unsigned char)i;
        if (i >= 256) llmc[n++] = 'a', llmc[n++] = (unsigned char)(i - 156);
    }
    seeds[LLMC].size = n;

    config_from_preset(&model, preset_find("tiny"));
    model.layers = 1;
    model.channels = 8;
    model.hidden = 8;
    model.fsa.q_heads = model.fsa.kv_heads = 1;
    model.fsa.head_dim = 8;
    config_set_vocab(&model, 16);
    if (config_check(&model, msg, sizeof msg)) die("the test's model is invalid: %s", msg);
    param_table(&model, NULL, &num_params);
    float *values = (float *)xcalloc((size_t)num_params, sizeof *values);
    for (int64_t i = 0; i < num_params; i++) values[i] = (float)i * 0.5f;
    TrainState state = {.step = 3,
                        .tokens = 300,
                        .position = 5,
                        .epoch_samples = 8,
                        .seed = 1,
                        .seq_len = SEQ,
                        .total_batch = 32};
    checkpoint_save(root, &model, &state, values, values, values, num_params);
    free(values);
    read_seed(CHECKPOINT, "ckpt_00000003.bin");

    int length = 0;
    for (int i = 1; i <= 9; i++)
        length += snprintf(
            (char *)seeds[LOG].data + length, 256,
            "{\"step\":%d,\"loss\":%g,\"lr\":0.001,\"norm\":1.5,\"ms\":3.1}\n{\"step\":%d,\"val_loss\":2}\n",
            i, 5.0 / i, i);
    seeds[LOG].size = length;

    // three examples of two choices: the header, then the values from `label` on
    const int32_t eval_header[256] = {EVAL_MAGIC, 1, EVAL_CHOICE, 3, VOCAB, 1},
                  llmc_header[256] = {EVAL_LLMC_MAGIC, 1, 3, 40};
    memcpy(seeds[EVAL32].data, eval_header, 1024), memcpy(seeds[EVAL16].data, llmc_header, 1024);
    seeds[EVAL32].size = seeds[EVAL16].size = 1024;
    for (uint16_t i = 0; i < 3; i++) {
        const int32_t values[] = {i % 2, 2, 500, 3, 5, 6, i, 7, 1, 9, 4, 2, 10, 299};
        const uint16_t llmc_values[] = {65535, 28, i, i % 2, 2, 3, 5, 6, i, 1, 9, 2, 10, 299};
        memcpy(seeds[EVAL32].data + seeds[EVAL32].size, values, sizeof values);
        memcpy(seeds[EVAL16].data + seeds[EVAL16].size, llmc_values, sizeof llmc_values);
        seeds[EVAL32].size += (int64_t)sizeof values, seeds[EVAL16].size += (int64_t)sizeof llmc_values;
    }
}

// Changes a file in one to four ways. number_bytes: size of the numbers in the file; 0: various.
static void mutate(File *f, Rng *r, int number_bytes) {
    static const int64_t values[] = {0,         1,         -1,           2,         255,       256,
                                     65535,     65536,     INT32_MAX,    INT32_MIN, INT64_MAX, INT64_MIN,
                                     1ll << 40, 1ll << 61, -(1ll << 40), 31};
    for (int64_t k = 1 + rng_below(r, 4); k > 0 && f->size > 0; k--) {
        int64_t at = rng_below(r, rng_below(r, 2) ? f->size : f->size < 64 ? f->size : 64);
        int64_t width = number_bytes ? number_bytes : (int64_t)1 << rng_below(r, 4),
                value = values[rng_below(r, 16)];
        double fraction;
        switch (rng_below(r, 9)) {
        case 0:
            f->data[at] ^= (unsigned char)(1 << rng_below(r, 8));
            break;
        case 1:
            f->data[at] = (unsigned char)rng_below(r, 256);
            break;
        case 2: // an aligned number of 1, 2, 4 or 8 bytes
        case 3:
            at -= at % width;
            if (at + width <= f->size) memcpy(f->data + at, &value, (size_t)width);
            break;
        case 4: // a number that is nearly the one there
            at -= at % width;
            if (at + width > f->size) break;
            memcpy(&value, f->data + at, (size_t)width);
            value = (int64_t)((uint64_t)value + (uint64_t)rng_below(r, 5) - 2);
            memcpy(f->data + at, &value, (size_t)width);
            break;
        case 5:
            f->size = rng_below(r, f->size + 1);
            break;
        case 6: // append
            for (int64_t n = rng_below(r, 40); n > 0 && f->size < 2 * MAX_BYTES; n--)
                f->data[f->size++] = (unsigned char)rng_below(r, 256);
            break;
        case 7: { // copy a part to another place
            int64_t from = rng_below(r, f->size), n = 1 + rng_below(r, 64);
            if (from + n <= f->size && at + n <= f->size) memmove(f->data + at, f->data + from, (size_t)n);
            break;
        }
        default: // a double, as the model's fields in a checkpoint
            at -= at % 8;
            fraction = rng_below(r, 3) == 0 ? NAN : (double)value * (rng_below(r, 2) ? 0.37 : 1e30);
            if (at + 8 <= f->size) memcpy(f->data + at, &fraction, 8);
        }
    }
}

// Gives a mutated checkpoint the right checksums, so that the checks behind them are reached.
static void repair_checksums(File *f) {
    if (f->size < CHECKPOINT_HEADER_BYTES) return;
    checkpoint_put_word(f->data, 511, (int64_t)checksum(f->data, CHECKPOINT_HEADER_BYTES - 8, 0));
    if (f->size != checkpoint_bytes(num_params, 3)) return;
    for (int a = 0; a < 3; a++) {
        uint64_t sum = checksum(f->data + CHECKPOINT_HEADER_BYTES + 4 * num_params * a,
                                4 * (size_t)num_params, checkpoint_chunk_seed(a, 0));
        memcpy(f->data + CHECKPOINT_HEADER_BYTES + 12 * num_params + 8 * a, &sum, 8);
    }
}

// Makes file number `index` of the run.
static int make_file(File *f, uint64_t seed, int64_t index) {
    Rng r;
    int kind = (int)(index % KINDS);
    rng_seed(&r, seed, (uint64_t)index);
    memcpy(f->data, seeds[kind].data, (size_t)seeds[kind].size);
    f->size = seeds[kind].size;
    mutate(f, &r, kind == ANSWERS ? 8 : 0);
    if (kind == CHECKPOINT && rng_below(&r, 4) > 0) repair_checksums(f);
    return kind;
}

static void load_shard(const char *path) {
    DataLoader l;
    int32_t inputs[2 * SEQ], targets[2 * SEQ];
    loader_open(&l, path, 2, SEQ, VOCAB, 1, 1, 0, 1);
    for (int i = 0; i < 6; i++) loader_next(&l, inputs, targets);
    loader_close(&l);
}

// Loads the answers, and counts them as the trainer's validation does.
static void load_answers(const char *path) {
    static Run r;
    int32_t inputs[SEQ], targets[SEQ], argmax[SEQ] = {0};
    memset(&r, 0, sizeof r);
    loader_open(&r.val, path, 1, SEQ, VOCAB, 0, 1, 0, 1);
    r.answers = (Answers *)xcalloc(1, sizeof *r.answers);
    ValidationCounts *counts = (ValidationCounts *)xcalloc(sizeof *counts + VOCAB, 1);
    answers_load(r.answers, &r.val.shards[0]);
    for (int64_t s = 0; s < r.val.samples; s++) {
        loader_next(&r.val, inputs, targets);
        run_count_recall(&r, s, argmax, targets, counts);
    }
    answers_free(r.answers);
    free(r.answers), free(counts);
    loader_close(&r.val);
}

static void load_tokenizer(const char *path) {
    static const char *const texts[] = {"Mara : lamp a ab abc", "abc ab  12345 it's\n\n x",
                                        "\xff\xc3\xa9 \xe2\x82 he<|a|>b  hello <|strip|> \xe6\xbc\xa2",
                                        "lamp"};
    Tokenizer t;
    int32_t tokens[64];
    if (tokenizer_load(&t, path) != 0) return;
    FILE *null = fopen("/dev/null", "w");
    for (int i = 0; i < t.vocab_size && i < 400; i++) {
        int32_t token = i;
        tokenizer_print(&t, null, &token, 1, i == 0);
    }
    // the vocabulary of words has only the words of texts[0]
    for (int i = t.kind == TOKENIZER_WORDS ? 0 : 3; i >= 0; i--) {
        int64_t n = tokenizer_encode(&t, texts[i], (int64_t)strlen(texts[i]), i & 1, tokens, 64);
        tokenizer_print(&t, null, tokens, n < 64 ? n : 64, 1);
    }
    tokenizer_is_eos(&t, 1);
    tokenizer_free(&t);
    fclose(null);
}

static void load_checkpoint(const char *path) {
    char msg[CHECKPOINT_MSG_BYTES];
    const ParamInit init = {1, {0, 0, 0}};
    Checkpoint k;
    TrainState state;
    int64_t n;
    if (checkpoint_open(&k, path, msg) != 0 || checkpoint_verify(path, msg) != 0) die("%s", msg);
    checkpoint_close(&k);
    param_table(&k.config, NULL, &n);
    if (n > 1000000) die("the model is too large for its file");
    float *values = (float *)xmalloc(3 * (size_t)n * sizeof *values);
    checkpoint_load(path, &k.config, &init, &state, values, k.arrays == 3 ? values + n : NULL,
                    k.arrays == 3 ? values + 2 * n : NULL, n);
    free(values);
}

static void load_log(void) {
    Logger l;
    logger_open(&l, root, 5);
    logger_close(&l);
}

// Loads an evaluation file, and scores it.
static void load_eval_file(const char *path) {
    enum { TOKENS = 2 * SEQ };
    static const float losses[TOKENS];
    static const int32_t argmax[TOKENS];
    int32_t inputs[TOKENS], targets[TOKENS];
    int64_t cu_seqlens[TOKENS + 1];
    EvalFile f;
    eval_load(&f, "-mc", path, EVAL_CHOICE, VOCAB, NULL, "");
    EvalBatch b = {inputs, targets, cu_seqlens, 0, TOKENS};
    EvalResult *results = (EvalResult *)xcalloc((size_t)f.num_choices, sizeof *results);
    for (int64_t first = 0, next; first < f.num_choices && f.choices[first].tokens <= SEQ; first = next) {
        next = eval_fill_batch(&f, first, SEQ, &b);
        eval_read_batch(&f, first, next, &b, losses, argmax, results);
    }
    eval_accuracy(&f, results);
    free(results);
    eval_free(&f);
}

// Loads a file. Returns whether it was loaded; otherwise `message` says why not.
static int load_file(const File *f, int kind) {
    static const char *const names[KINDS] = {"s.bin",         "s.bin",         "s.answers",
                                             "tokenizer.bin", "tokenizer.bin", "tokenizer.bin",
                                             "tokenizer.bin", "tokenizer.bin", "ckpt_00000003.bin",
                                             "log.jsonl",     "eval.bin",      "eval.bin"};
    char path[PATH_BYTES];
    write_whole(names[kind], f->data, f->size);
    path_of(path, kind == ANSWERS ? "s.bin" : names[kind]);
    if (setjmp(refused) != 0) {
        // what die() leaves behind, since the process goes on
        die_called = 0;
        atomic_unfinished = NULL;
        return 0;
    }
    if (kind <= SHARD32) load_shard(path);
    if (kind == ANSWERS) load_answers(path);
    if (kind >= BYTES && kind <= LLMC) load_tokenizer(path);
    if (kind == CHECKPOINT) load_checkpoint(path);
    if (kind == LOG) load_log();
    if (kind >= EVAL32) load_eval_file(path);
    return 1;
}

// Loads files [first, first + FILES_PER_CHILD) in this process, a child, in a folder of its own.
static void child(uint64_t seed, int64_t first) {
    static File f;
    char path[PATH_BYTES];
    path_of(path, "stderr");
    if (freopen(path, "w", stderr) == NULL) _exit(97);
    setvbuf(stderr, NULL, _IONBF, 0);
    die_hook = catch_error;
    write_whole("s.bin", seeds[SHARD16].data, seeds[SHARD16].size);
    for (shared->index = first; shared->index < first + FILES_PER_CHILD; shared->index++) {
        int kind = make_file(&f, seed, shared->index);
        alarm(HANG_SECONDS);
        if (kind == ANSWERS) write_whole("s.bin", seeds[SHARD16].data, seeds[SHARD16].size);
        if (load_file(&f, kind)) {
            shared->loaded[kind]++;
        } else {
            shared->refused[kind]++;
            if (strchr(message, '\n') || !message[0]) {
                fprintf(stderr, "not one line: %s\n", message);
                abort();
            }
        }
        close_range(3, 1000, 0); // die() leaves files open
        if (ftruncate(2, 0) != 0 || lseek(2, 0, SEEK_SET) != 0) _exit(96);
    }
    _exit(0);
}

// Keeps the file that failed and prints what is known about it.
static void report_failure(uint64_t seed, int status) {
    static File f;
    char name[64], command[PATH_BYTES];
    int kind = make_file(&f, seed, shared->index);
    int hang = WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM;
    snprintf(name, sizeof name, "failed_%llu_%lld", (unsigned long long)seed, (long long)shared->index);
    write_whole(name, f.data, f.size);
    CHECK(0, "%s %s/%s: %s", KIND_NAMES[kind], root, name, hang ? "hang" : "crash");
    snprintf(command, sizeof command, "head -c 2000 '%s/stderr'", root);
    if (system(command) != 0) printf("no stderr\n");
}

// Changes every `stride`-th byte of a checkpoint, and every byte of its header; cuts it at every length that
// is a multiple of stride. None may be accepted. Returns the number of damaged checkpoints.
static int64_t flip_checkpoint(int64_t stride) {
    char path[PATH_BYTES], msg[CHECKPOINT_MSG_BYTES];
    int64_t accepted = 0, flips = 0;
    path_of(path, "flipped.bin");
    write_whole("flipped.bin", seeds[CHECKPOINT].data, seeds[CHECKPOINT].size);
    CHECK(checkpoint_verify(path, msg) == 0, "the unchanged checkpoint: %s", msg);
    int fd = open(path, O_RDWR);
    for (int64_t i = 0; i < seeds[CHECKPOINT].size; i += i < CHECKPOINT_HEADER_BYTES ? 1 : stride, flips++) {
        unsigned char byte = seeds[CHECKPOINT].data[i] ^ (unsigned char)(1 << i * 5 % 8);
        if (pwrite(fd, &byte, 1, i) != 1) die("cannot write %s", path);
        accepted += checkpoint_verify(path, msg) == 0;
        if (pwrite(fd, seeds[CHECKPOINT].data + i, 1, i) != 1) die("cannot write %s", path);
    }
    for (int64_t size = seeds[CHECKPOINT].size - 1; size >= 0; size -= 10 * stride, flips++) {
        if (ftruncate(fd, size) != 0) die("cannot truncate %s", path);
        accepted += checkpoint_verify(path, msg) == 0;
    }
    close(fd);
    CHECK(accepted == 0, "%lld of %lld damaged checkpoints are accepted", (long long)accepted,
          (long long)flips);
    return flips;
}

static int64_t number_from(const char *name, int64_t otherwise) {
    const char *text = getenv(name);
    return text && *text ? parse_int(name, text, 0, INT64_MAX) : otherwise;
}

int main(int argc, char **argv) {
    char made[] = "/tmp/fuzz_files_XXXXXX";
    if (argc < 2 && mkdtemp(made) == NULL) die("cannot make a folder below /tmp: %s", strerror(errno));
    snprintf(root, sizeof root, "%s", argc > 1 ? argv[1] : made);
    make_dirs(root);
    double seconds = (double)number_from("SECONDS", 5), begin;
    int64_t count = number_from("COUNT", 0), files = 0, hangs = 0, crashes = 0;
    uint64_t seed = (uint64_t)number_from("SEED", (int64_t)time(NULL));
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    make_seeds();
    int64_t flips = flip_checkpoint(seconds >= 60 ? 1 : 20);
    begin = now_seconds();
    while ((now_seconds() - begin < seconds || files < count) && crashes + hangs < 20) {
        int status;
        fflush(stdout); // the child must not print it again
        pid_t pid = fork();
        if (pid == 0) child(seed, files);
        waitpid(pid, &status, 0);
        files = WIFEXITED(status) && WEXITSTATUS(status) == 0 ? files + FILES_PER_CHILD : shared->index + 1;
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
        hangs += WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM;
        crashes += !(WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM);
        report_failure(seed, status);
    }
    for (int k = 0; k < KINDS; k++) {
        printf("%-24s %8lld loaded %8lld refused\n", KIND_NAMES[k], (long long)shared->loaded[k],
               (long long)shared->refused[k]);
        int64_t all = shared->loaded[k] + shared->refused[k];
        CHECK(all < 100 || shared->loaded[k] > 0, "no %s was loaded", KIND_NAMES[k]);
        // a log is never refused: lines that are not the trainer's are left out
        CHECK(all < 100 || shared->refused[k] > 0 || k == LOG, "no %s was refused", KIND_NAMES[k]);
    }
    printf("seed %llu: %lld mutated files in %.0f s: %lld crashes, %lld hangs; %lld damaged checkpoints\n",
           (unsigned long long)seed, (long long)files, now_seconds() - begin, (long long)crashes,
           (long long)hangs, (long long)flips);
    CHECK(crashes + hangs == 0, "%lld crashes, %lld hangs", (long long)crashes, (long long)hangs);
    if (argc < 2 && test_failed == 0 && fork() == 0) execlp("rm", "rm", "-rf", made, (char *)NULL);
    while (wait(NULL) > 0) continue;
    return test_end("fuzz_files");
}
