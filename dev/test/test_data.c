// test_data.c: tests files, random numbers, shards and their loader, tokenizers, sampler, schedule, and the
// programs of data/. usage: test_data [FOLDER], the folder to write to; by default a new one in /tmp.
#include "../../llmc/dataloader.h"
#include "../../llmc/sampler.h"
#include "../../llmc/schedule.h"
#include "../../llmc/tokenizer.h"
#include "test.h"
#include "tokenizer_bin.h"
#include <glob.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#if defined(__SANITIZE_ADDRESS__)
#define TEST_ASAN // gcc
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TEST_ASAN // clang
#endif
#endif

// These replace the C library's functions, so that a test can kill a program before its n-th change of names.
static int changes_left = -1; // changes of names until the process is killed; -1: never

static void count_change(void) {
    if (changes_left >= 0 && changes_left-- == 0) kill(getpid(), SIGKILL);
}

int rename(const char *from, const char *to) {
    count_change();
    return renameat(AT_FDCWD, from, AT_FDCWD, to);
}

int unlink(const char *path) {
    count_change();
    return unlinkat(AT_FDCWD, path, 0);
}

// Includes the two programs of data/ as functions, and renames the names that both define.
#define main recall_main
#define EOT RECALL_EOT
#define USAGE RECALL_USAGE
#define make_tokenizer recall_make_tokenizer
#include "../../data/recall.c"
#undef main
#undef EOT
#undef USAGE
#undef make_tokenizer
#define main text_main
#define EOT TEXT_EOT
#define USAGE TEXT_USAGE
#define make_tokenizer text_make_tokenizer
#include "../../data/text.c"
#undef main

// ---------------------------------------------------------------------------------------------------------
// Helpers

static char root[1024];       // folder of all files
static char child_err[65536]; // stderr of the last child process
static char child_out[65536]; // stdout of the last child process

// Returns the path of `name` in root, in one of 8 buffers that are reused in turn.
static const char *in_root(const char *name) {
    static char paths[8][PATH_BYTES];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, PATH_BYTES, "%s/%s", root, name);
    return path;
}

static int64_t read_file(const char *path, char *out, int64_t max) {
    FILE *f = fopen(path, "rb");
    if (f == NULL) return -1;
    int64_t n = (int64_t)fread(out, 1, (size_t)max, f);
    fclose(f);
    return n;
}

static void write_file(const char *path, const void *data, int64_t n) {
    FILE *f = fopen(path, "wb");
    if (f == NULL || fwrite(data, 1, (size_t)n, f) != (size_t)n) die("the test cannot write %s", path);
    fclose(f);
}

static int exists(const char *path) {
    return access(path, F_OK) == 0;
}

static int count_files(const char *pattern) {
    glob_t found;
    int n = glob(in_root(pattern), 0, NULL, &found) == 0 ? (int)found.gl_pathc : 0;
    if (n > 0) globfree(&found);
    return n;
}

static pid_t child_begin(void) {
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        if (freopen(in_root("stderr"), "wb", stderr) == NULL ||
            freopen(in_root("stdout"), "wb", stdout) == NULL) {
            _exit(99);
        }
    }
    return pid;
}

static int child_end(pid_t pid) {
    int status = 0;
    waitpid(pid, &status, 0);
    int64_t n = read_file(in_root("stderr"), child_err, sizeof(child_err) - 1);
    child_err[n > 0 ? n : 0] = 0;
    n = read_file(in_root("stdout"), child_out, sizeof(child_out) - 1);
    child_out[n > 0 ? n : 0] = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// Runs the statements in a child process, and sets `code` to its exit code.
#define IN_CHILD(code, ...)                                                                                  \
    do {                                                                                                     \
        pid_t pid_ = child_begin();                                                                          \
        if (pid_ == 0) {                                                                                     \
            __VA_ARGS__;                                                                                     \
            fflush(NULL);                                                                                    \
            _exit(0);                                                                                        \
        }                                                                                                    \
        code = child_end(pid_);                                                                              \
    } while (0)

// Checks that the statements exit with code 1 and one line "error: ..." on stderr that contains `text`.
#define DIES(text, ...)                                                                                      \
    do {                                                                                                     \
        int code_;                                                                                           \
        IN_CHILD(code_, __VA_ARGS__);                                                                        \
        const char *end_ = strchr(child_err, '\n');                                                          \
        CHECK(code_ == 1, "exit code %d: %s", code_, child_err);                                             \
        CHECK(strncmp(child_err, "error: ", 7) == 0 && end_ != NULL && end_[1] == 0 &&                       \
                  strstr(child_err, text) != NULL,                                                           \
              "'%s' is not one line with '%s'", child_err, text);                                            \
    } while (0)

// Runs a program of data/ with a command line of words; returns its exit code.
static int run_program(int (*program_main)(int, char **), const char *line) {
    char copy[PATH_BYTES * 2], *argv[64];
    int argc = 0, code;
    snprintf(copy, sizeof(copy), "program %s", line);
    for (char *word = strtok(copy, " "); word != NULL; word = strtok(NULL, " ")) argv[argc++] = word;
    argv[argc] = NULL;
    IN_CHILD(code, exit(program_main(argc, argv)));
    return code;
}

static const char *line_of(const char *format, ...) {
    static char line[PATH_BYTES * 2];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    return line;
}

// Writes a shard of n tokens first, first + 1, ...
static void make_shard(const char *path, int64_t first, int64_t n, int64_t vocab_size) {
    ShardWriter w;
    shard_writer_open(&w, path, vocab_size);
    for (int64_t i = 0; i < n; i++) {
        int32_t token = (int32_t)(first + i);
        shard_writer_add(&w, &token, 1);
    }
    shard_writer_commit(&w);
}

// Writes a file with a shard's header of three words and `bytes` zero bytes behind the header.
static void raw_shard(const char *path, int32_t magic, int32_t version, int32_t count, int64_t bytes) {
    int64_t size = SHARD_HEADER_BYTES + bytes;
    char *data = (char *)xcalloc((size_t)size, 1);
    int32_t header[3] = {magic, version, count};
    memcpy(data, header, sizeof(header));
    write_file(path, data, size);
    free(data);
}

// ---------------------------------------------------------------------------------------------------------
// utils.h

static void write_some(const char *path, const char *text, int commit) {
    AtomicFile a;
    atomic_open(&a, path);
    atomic_write(&a, text, strlen(text));
    if (commit)
        atomic_commit(&a);
    else
        die("failing on purpose, 3 * 7 = %d", 21);
}

static void write_beyond_limit(const char *path) {
    struct rlimit limit = {10000, 10000};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    char block[4096] = {0};
    AtomicFile a;
    atomic_open(&a, path);
    for (int i = 0; i < 100; i++) atomic_write(&a, block, sizeof(block));
    atomic_commit(&a);
}

static void test_files(void) {
    char text[64];
    const char *path = in_root("atomic.txt");
    write_some(path, "first", 1);
    CHECK(read_file(path, text, 64) == 5 && memcmp(text, "first", 5) == 0, "content");
    CHECK(!exists(in_root("atomic.txt.tmp")), "the temporary file is still there");
    write_some(path, "second one", 1);
    CHECK(read_file(path, text, 64) == 10 && memcmp(text, "second one", 10) == 0, "replaced content");

    DIES("failing on purpose, 3 * 7 = 21", write_some(path, "third", 0));
    CHECK(read_file(path, text, 64) == 10 && memcmp(text, "second one", 10) == 0,
          "target touched by a failure");
    CHECK(!exists(in_root("atomic.txt.tmp")), "a failure left its temporary file");
    DIES("File too large", write_beyond_limit(path));
    CHECK(read_file(path, text, 64) == 10, "target touched by a full disk");
    CHECK(!exists(in_root("atomic.txt.tmp")), "a full disk left its temporary file");

    DIES("No such file", write_some(in_root("no_folder/a.txt"), "x", 1));
    DIES("Not a directory", write_some(in_root("atomic.txt/a.txt"), "x", 1));
    make_dirs(in_root("deep/er/still"));
    make_dirs(in_root("deep/er/still/"));
    CHECK(exists(in_root("deep/er/still")), "make_dirs");
    DIES("it is a folder; choose", write_some(in_root("deep"), "x", 1));
    DIES("a file has that name", make_dirs(in_root("atomic.txt/sub")));
    DIES("a file has that name", make_dirs(in_root("atomic.txt")));
    if (geteuid() != 0) {
        make_dirs(in_root("readonly"));
        chmod(in_root("readonly"), 0555);
        DIES("Permission denied", write_some(in_root("readonly/a.txt"), "x", 1));
        DIES("Permission denied", make_dirs(in_root("readonly/sub")));
        chmod(in_root("readonly"), 0755);
    } else {
        SKIP("a folder without write permission: root may write anywhere");
    }
    CHECK(parse_int("-x", "-12", -20, 5) == -12 && parse_double("-y", "0.25", 0, 1) == 0.25, "parse");
    DIES("-x 6: must be a whole number from 1 to 5\n", parse_int("-x", "6", 1, 5));
    DIES("-x 3k: must be a whole number", parse_int("-x", "3k", 1, 5));
    DIES("-x (no value): must be", parse_int("-x", NULL, 1, 5));
    DIES("-y nan: must be a number from 0 to 1\n", parse_double("-y", "nan", 0, 1));
#ifdef TEST_ASAN
    SKIP("running out of memory: the address sanitizer reports it itself");
#else
    DIES("out of memory", xmalloc((size_t)1 << 60));
#endif
}

// ---------------------------------------------------------------------------------------------------------
// rand.h

static void test_random(void) {
    Rng a, b;
    rng_seed(&a, 5, 1);
    rng_seed(&b, 5, 1);
    int same = 1;
    for (int i = 0; i < 100; i++) same &= rng_u64(&a) == rng_u64(&b);
    CHECK(same, "one seed, two sequences");
    Rng c = a; // a checkpoint
    CHECK(rng_u64(&a) == rng_u64(&c), "a copied state goes on differently");
    CHECK(rng_u64_at(rng_key(5, 1), 0) != rng_u64_at(rng_key(5, 2), 0), "streams");
    CHECK(rng_u64_at(rng_key(5, 1), 0) != rng_u64_at(rng_key(6, 1), 0), "seeds");

    double sum = 0, sum2 = 0, low = 1, high = 0, normal = 0, normal2 = 0, normal4 = 0, lag = 0, last = 0;
    int n = 200000, counts[7] = {0};
    for (int i = 0; i < n; i++) {
        double u = rng_uniform(&a), z = rng_normal_at(9, 3, i);
        sum += u;
        sum2 += u * u;
        low = u < low ? u : low;
        high = u > high ? u : high;
        normal += z;
        normal2 += z * z;
        normal4 += z * z * z * z;
        lag += z * last;
        last = z;
        counts[rng_below(&a, 7)]++;
    }
    CHECK(fabs(sum / n - 0.5) < 0.005 && fabs(sum2 / n - 1.0 / 3) < 0.005, "uniform moments");
    CHECK(low >= 0 && low < 1e-3 && high < 1 && high > 1 - 1e-3, "uniform range %g %g", low, high);
    CHECK(fabs(normal / n) < 0.02 && fabs(normal2 / n - 1) < 0.02 && fabs(normal4 / n - 3) < 0.1,
          "normal moments");
    CHECK(fabs(lag / n) < 0.02, "neighbouring normals are correlated: %g", lag / n);
    for (int i = 0; i < 7; i++) CHECK(fabs(counts[i] * 7.0 / n - 1) < 0.03, "below: %d of %d", counts[i], i);
    CHECK(rng_normal_at(9, 3, 77) == rng_normal_at(9, 3, 77), "normal is no pure function");
    CHECK(rng_below(&a, 1) == 0, "below 1");
    int low_third = 0; // a range that divides 2^64 badly: the remainder alone would give 3/4
    for (int i = 0; i < 20000; i++) low_third += rng_below(&a, (int64_t)3 << 61) < (int64_t)1 << 62;
    CHECK(fabs(low_third / 20000.0 - 2.0 / 3) < 0.02, "below 3 * 2^61 is biased: %d of 20000", low_third);

    int64_t x[100], seen[100] = {0};
    int moved = 0;
    for (int i = 0; i < 100; i++) x[i] = i;
    rng_shuffle(x, 100, 3, 4);
    for (int i = 0; i < 100; i++) {
        seen[x[i]]++;
        moved += x[i] != i;
    }
    for (int i = 0; i < 100; i++) CHECK(seen[i] == 1, "shuffle lost %d", i);
    CHECK(moved > 80, "shuffle moved only %d", moved);
    int firsts[4] = {0};
    for (int s = 0; s < 8000; s++) {
        int64_t y[4] = {0, 1, 2, 3};
        rng_shuffle(y, 4, 11, (uint64_t)s);
        firsts[y[0]]++;
    }
    for (int i = 0; i < 4; i++)
        CHECK(abs(firsts[i] - 2000) < 200, "shuffle is biased: %d first %d", i, firsts[i]);
}

// ---------------------------------------------------------------------------------------------------------
// shard.h

static void bad_token(const char *path, int32_t token) {
    ShardWriter w;
    shard_writer_open(&w, path, 100);
    shard_writer_add(&w, &token, 1);
    shard_writer_commit(&w);
}

static void test_shards(void) {
    for (int wide = 0; wide < 2; wide++) {
        const char *path = in_root(wide ? "wide.bin" : "narrow.bin");
        int64_t first = wide ? 65000 : 0, n = 1234;
        make_shard(path, first, n, wide ? 70000 : 65536);
        char raw[SHARD_HEADER_BYTES];
        int32_t header[3];
        struct stat st;
        read_file(path, raw, sizeof(raw));
        memcpy(header, raw, sizeof(header));
        stat(path, &st);
        CHECK(header[0] == (wide ? 20240801 : 20240520) && header[1] == (wide ? 7 : 1) && header[2] == n,
              "header %d %d %d", header[0], header[1], header[2]);
        CHECK(st.st_size == 1024 + n * (wide ? 4 : 2), "size %lld", (long long)st.st_size);
        Shard s;
        uint32_t out[1234];
        shard_open(&s, path);
        CHECK(s.count == n && s.token_bytes == (wide ? 4 : 2), "count, width");
        shard_read(&s, 0, n, out);
        int good = 1;
        for (int64_t i = 0; i < n; i++) good &= out[i] == (uint32_t)(first + i);
        CHECK(good, "tokens of the whole shard");
        shard_read(&s, 1000, 7, out);
        CHECK(out[0] == (uint32_t)first + 1000 && out[6] == (uint32_t)first + 1006, "tokens in the middle");
        DIES("has become shorter", shard_read(&s, 1230, 5, out));
        shard_close(&s);
    }
    // a shard in the format of llm.c's Python script
    uint16_t hand[512 + 3] = {0};
    int32_t header[3] = {20240520, 1, 3};
    memcpy(hand, header, sizeof(header));
    hand[512] = 50256;
    hand[513] = 65535;
    hand[514] = 7;
    write_file(in_root("hand.bin"), hand, sizeof(hand));
    Shard s;
    uint32_t out[3];
    shard_open(&s, in_root("hand.bin"));
    shard_read(&s, 0, 3, out);
    CHECK(out[0] == 50256 && out[1] == 65535 && out[2] == 7, "hand-made shard");
    shard_close(&s);

    make_shard(in_root("kept.bin"), 0, 10, 100);
    DIES("token 100 is outside the vocabulary of 100", bad_token(in_root("kept.bin"), 100));
    DIES("token -1 is outside", bad_token(in_root("kept.bin"), -1));
    shard_open(&s, in_root("kept.bin"));
    CHECK(s.count == 10 && !exists(in_root("kept.bin.tmp")), "a failing writer touched its target");
    shard_close(&s);
}

// Loads the answers of a shard of `tokens` tokens, which is not opened. Returns what answers_load returns.
static int load_answers(Answers *a, const char *path, int64_t tokens) {
    static Shard s;
    snprintf(s.path, sizeof(s.path), "%s", path);
    s.count = tokens;
    return answers_load(a, &s);
}

static const int64_t BIG_SHARD = ((int64_t)1 << 40) + 2; // tokens

// Checks that the answer file {header, answers} of 3 answers with one word changed is refused.
static void check_bad_answers(const char *text, int word, int64_t value) {
    const char *path = in_root("some.answers");
    int64_t raw[10] = {ANSWERS_MAGIC,          ANSWERS_VERSION, 3, 64, 3, 1, 9, 5,
                       ((int64_t)1 << 40) + 1, (int64_t)1 << 33};
    Answers a;
    raw[word] = value;
    write_file(path, raw, sizeof(raw));
    DIES(text, load_answers(&a, in_root("some.bin"), BIG_SHARD));
}

static void test_answers(void) {
    Answer list[3] = {{3, 1}, {9, 5}, {((int64_t)1 << 40) + 1, (int64_t)1 << 33}};
    Answers a = {3, 64, list}, b;
    char raw[80], path[PATH_BYTES];
    answers_path(path, "x/y_000000.bin");
    CHECK(strcmp(path, "x/y_000000.answers") == 0, "%s", path);
    CHECK(load_answers(&b, in_root("none.bin"), BIG_SHARD) == 1, "answers that are not there");
    answers_save(&a, in_root("some.bin"));
    CHECK(load_answers(&b, in_root("some.bin"), BIG_SHARD) == 0 && b.count == 3 && b.seq_len == 64 &&
              memcmp(b.answers, list, sizeof(list)) == 0,
          "answers come back otherwise");
    answers_free(&b);
    CHECK(read_file(in_root("some.answers"), raw, sizeof(raw)) == 80, "size");
    write_file(in_root("some.answers"), raw, 79);
    DIES("has the wrong size", load_answers(&b, in_root("some.bin"), BIG_SHARD));
    write_file(in_root("some.answers"), raw, 20);
    DIES("is truncated", load_answers(&b, in_root("some.bin"), BIG_SHARD));
    raw[0]++;
    write_file(in_root("some.answers"), raw, 80);
    DIES("is not an answer file", load_answers(&b, in_root("some.bin"), BIG_SHARD));

    // counts that no shard has; the message must not overflow
    check_bad_answers("is invalid: -1 answers", 2, -1);
    check_bad_answers("is invalid: 9223372036854775807 answers", 2, INT64_MAX);
    check_bad_answers("4 answers need 96 bytes, 80 found", 2, 4);
    check_bad_answers("documents of 0 + 1 tokens", 3, 0);
    check_bad_answers("documents of 9223372036854775807 + 1 tokens", 3, INT64_MAX);
    check_bad_answers("documents of 1099511627778 + 1 tokens", 3, BIG_SHARD);
    // indices: ascending, in the shard, and not its first token, which nothing predicts
    check_bad_answers("answer 0 has index -9223372036854775808", 4, INT64_MIN);
    check_bad_answers("answer 0 has index 0", 4, 0);
    check_bad_answers("answer 1 has index 3", 6, 3);
    check_bad_answers("answer 1 has index 2", 6, 2);
    check_bad_answers("answer 2 has index 1099511627778", 8, BIG_SHARD);
    check_bad_answers("answer 2 has index 9223372036854775807", 8, INT64_MAX);
    // distances: backwards, within the shard
    check_bad_answers("distance 0", 7, 0);
    check_bad_answers("distance -9223372036854775808", 7, INT64_MIN);
    check_bad_answers("distance 10", 7, 10);
}

// ---------------------------------------------------------------------------------------------------------
// input.h

// Loads a file of each kind from `path`, which is not a regular file.
static void load_kind(int kind, const char *path) {
    Shard s;
    Answers a;
    Tokenizer t;
    alarm(5); // it must not block
    if (kind == 0) shard_open(&s, path);
    if (kind == 1) load_answers(&a, path, 100);
    if (kind == 2) tokenizer_load(&t, path);
}

static void test_file_types(void) {
    static const char *const names[] = {"shard.bin", "shard.answers", "tokenizer.bin"};
    static const char *const types[] = {"a folder", "a FIFO", "a device", "a socket"};
    struct sockaddr_un address;
    make_dirs(in_root("types"));
    for (int type = 0; type < 4; type++) {
        for (int kind = 0; kind < 3; kind++) {
            const char *path = in_root(line_of("types/%s", names[kind]));
            if (type == 0) make_dirs(path);
            if (type == 1 && mkfifo(path, 0600) != 0) die("the test cannot make a FIFO");
            if (type == 2 && symlink("/dev/zero", path) != 0) die("the test cannot make a link");
            if (type == 3) {
                int s = socket(AF_UNIX, SOCK_STREAM, 0);
                memset(&address, 0, sizeof(address));
                address.sun_family = AF_UNIX;
                snprintf(address.sun_path, sizeof(address.sun_path), "%.100s", path);
                if (bind(s, (struct sockaddr *)&address, sizeof(address)) != 0)
                    die("the test cannot make a socket");
                close(s);
            }
            DIES(line_of("it is not a file but %s", types[type]),
                 load_kind(kind, in_root(line_of("types/%s", names[kind == 1 ? 0 : kind]))));
            remove(path);
        }
    }
    write_file(in_root("real.bin"), "x", 1);
    CHECK(symlink(in_root("real.bin"), in_root("types/link")) == 0, "link");
    struct stat st;
    int fd = input_open("", in_root("types/link"), &st);
    CHECK(fd >= 0 && st.st_size == 1, "a link to a file is a file");
    close(fd);
    CHECK(input_open("", in_root("types/none"), &st) == -1 && errno == ENOENT, "a file that is not there");
    // a tokenizer of 1 TiB, without blocks on disk, is not read
    int32_t header[256] = {TOKENIZER_MAGIC, 1, 1000, -1, 1};
    Tokenizer t;
    write_file(in_root("types/huge.bin"), header, sizeof(header));
    if (truncate(in_root("types/huge.bin"), (off_t)1 << 40) == 0)
        DIES("is too long: 1099511627776 bytes", tokenizer_load(&t, in_root("types/huge.bin")));
    unlink(in_root("types/huge.bin"));
}

// ---------------------------------------------------------------------------------------------------------
// dataloader.h

enum { SEQ = 8, VOCAB = 1 << 20 };

static void open_plain(const char *pattern, int64_t seq_len) {
    DataLoader l;
    loader_open(&l, pattern, 1, seq_len, VOCAB, 0, 1, 0, 1);
    loader_close(&l);
}

static void seek_to(const char *pattern, int64_t epoch, int64_t position) {
    DataLoader l;
    loader_open(&l, pattern, 1, SEQ, VOCAB, 0, 1, 0, 1);
    loader_seek(&l, epoch, position);
}

static void read_all(const char *pattern, int64_t vocab_size) {
    DataLoader l;
    int32_t x[SEQ], y[SEQ];
    loader_open(&l, pattern, 1, SEQ, vocab_size, 0, 1, 0, 1);
    for (int64_t i = 0; i < l.samples; i++) loader_next(&l, x, y);
    loader_close(&l);
}

static void truncate_open_shard(const char *path) {
    DataLoader l;
    int32_t x[SEQ], y[SEQ];
    loader_open(&l, path, 1, SEQ, VOCAB, 0, 1, 0, 1);
    loader_next(&l, x, y);
    if (truncate(path, 1024 + 4 * SEQ) != 0) die("the test cannot truncate %s", path);
    loader_next(&l, x, y);
}

static void change_unread_shard(const char *path) {
    DataLoader l;
    int32_t x[SEQ], y[SEQ];
    loader_open(&l, path, 1, SEQ, VOCAB, 0, 1, 0, 1);
    make_shard(path, 0, 50, VOCAB);
    loader_next(&l, x, y);
}

static void test_loader_errors(void) {
    int code;
    make_dirs(in_root("bad"));
    DIES("no shard matches", open_plain(in_root("bad/none_*.bin"), SEQ));
    raw_shard(in_root("bad/magic.bin"), 12345, 1, 100, 200);
    DIES("magic 12345 found, 20240520", open_plain(in_root("bad/magic.bin"), SEQ));
    raw_shard(in_root("bad/version.bin"), 20240520, 7, 100, 200);
    DIES("has version 7, but version 1", open_plain(in_root("bad/version.bin"), SEQ));
    raw_shard(in_root("bad/version.bin"), 20240801, 1, 100, 400);
    DIES("has version 1, but version 7", open_plain(in_root("bad/version.bin"), SEQ));
    raw_shard(in_root("bad/width.bin"), 20240520, 1, 100, 400);
    DIES("wrong token width: 1424 bytes found", open_plain(in_root("bad/width.bin"), SEQ));
    raw_shard(in_root("bad/width.bin"), 20240801, 7, 100, 200);
    DIES("wrong token width: 1224 bytes found", open_plain(in_root("bad/width.bin"), SEQ));
    raw_shard(in_root("bad/short.bin"), 20240520, 1, 100, 199);
    DIES("truncated: 1223 bytes found, 1224 expected", open_plain(in_root("bad/short.bin"), SEQ));
    raw_shard(in_root("bad/long.bin"), 20240520, 1, 100, 201);
    DIES("too long: 1225 bytes found, 1224 expected", open_plain(in_root("bad/long.bin"), SEQ));
    write_file(in_root("bad/header.bin"), "abc", 3);
    DIES("truncated: 3 bytes found", open_plain(in_root("bad/header.bin"), SEQ));
    raw_shard(in_root("bad/zero.bin"), 20240520, 1, 0, 0);
    DIES("holds 0 tokens", open_plain(in_root("bad/zero.bin"), SEQ));
    raw_shard(in_root("bad/negative.bin"), 20240520, 1, -5, 0);
    DIES("holds -5 tokens", open_plain(in_root("bad/negative.bin"), SEQ));
    make_dirs(in_root("bad/folder.bin"));
    DIES("it is not a file", open_plain(in_root("bad/folder.bin"), SEQ));

    make_dirs(in_root("small"));
    make_shard(in_root("small/a.bin"), 0, SEQ, VOCAB);
    DIES("too short: a sample needs 9 tokens, the longest shard has 8",
         open_plain(in_root("small/*.bin"), SEQ));
    make_shard(in_root("small/b.bin"), 100, SEQ + 1, VOCAB);
    IN_CHILD(code, open_plain(in_root("small/*.bin"), SEQ));
    CHECK(code == 0 && strncmp(child_err, "warning: ", 9) == 0 &&
              strstr(child_err, "a.bin is skipped: it has 8 tokens"),
          "code %d, '%s'", code, child_err);
    IN_CHILD(code, read_all(in_root("small/*.bin"), VOCAB));
    CHECK(code == 0, "the other shard is read: '%s'", child_err);

    DIES("b.bin: token 8 is 108, outside the vocabulary of 108", read_all(in_root("small/b.bin"), 108));
    IN_CHILD(code, read_all(in_root("small/b.bin"), 109));
    CHECK(code == 0, "the last token of the vocabulary: '%s'", child_err);
    DIES("no sample 1 in epoch 0: 1 samples found", seek_to(in_root("small/b.bin"), 0, 1));
    DIES("no sample -1", seek_to(in_root("small/b.bin"), 0, -1));
    DIES("in epoch -1", seek_to(in_root("small/b.bin"), -1, 0));
    // a 32-bit token above INT32_MAX
    uint32_t huge[256 + SEQ + 1] = {20240801, 7, SEQ + 1};
    huge[256 + 4] = 3000000000u;
    write_file(in_root("bad/huge.bin"), huge, sizeof(huge));
    DIES("token 4 is 3000000000, outside", read_all(in_root("bad/huge.bin"), VOCAB));
    make_shard(in_root("small/c.bin"), 0, 40, VOCAB);
    DIES("has become shorter while in use", truncate_open_shard(in_root("small/c.bin")));
    make_shard(in_root("small/c.bin"), 0, 40, VOCAB);
    DIES("has changed while in use: 40 tokens before, 50 now", change_unread_shard(in_root("small/c.bin")));
}

// Three shards of 7, 5 and 11 samples and a few more tokens. Token i of shard s is 1000 * s + i.
enum { SAMPLES = 23, SHARDS = 3, DRAWN = 240 };
static const int shard_samples[SHARDS] = {7, 5, 11};

// Loads the first DRAWN samples with `ranks` ranks of `batch` samples; writes each sample's first token to
// out [DRAWN].
static void draw(int64_t *out, int shuffle, uint64_t seed, int ranks, int64_t batch) {
    int32_t *x = (int32_t *)xmalloc((size_t)(batch * SEQ) * 4),
            *y = (int32_t *)xmalloc((size_t)(batch * SEQ) * 4);
    for (int rank = 0; rank < ranks; rank++) {
        DataLoader l;
        loader_open(&l, in_root("three/s_*.bin"), batch, SEQ, VOCAB, shuffle, seed, rank, ranks);
        CHECK(l.samples == SAMPLES && l.shard_count == SHARDS, "%lld samples", (long long)l.samples);
        for (int64_t step = 0; step * ranks * batch < DRAWN; step++) {
            loader_next(&l, x, y);
            for (int64_t row = 0; row < batch; row++) {
                int64_t at = (step * ranks + rank) * batch + row;
                int good = 1;
                for (int t = 0; t < SEQ; t++) {
                    good &= x[row * SEQ + t] == x[row * SEQ] + t && y[row * SEQ + t] == x[row * SEQ] + t + 1;
                }
                CHECK(good, "sample %lld is no run of tokens", (long long)at);
                if (at < DRAWN) out[at] = x[row * SEQ];
            }
            int64_t taken = (step + 1) * ranks * batch;
            CHECK(l.epoch == taken / SAMPLES && l.position == taken % SAMPLES, "position");
        }
        loader_close(&l);
    }
    free(x);
    free(y);
}

static void test_loader_order(void) {
    static int64_t order[DRAWN], other[DRAWN];
    make_dirs(in_root("three"));
    for (int s = 0; s < SHARDS; s++) {
        // the middle shard has 16-bit tokens, the others 32-bit tokens
        make_shard(in_root(line_of("three/s_%d.bin", s)), 1000 * s, shard_samples[s] * (SEQ + 1) + 3 * s,
                   s == 1 ? 65536 : VOCAB);
    }
    draw(order, 0, 1, 1, 1);
    for (int i = 0; i < DRAWN; i++) {
        int k = i % SAMPLES, s = 0;
        while (k >= shard_samples[s]) k -= shard_samples[s++];
        CHECK(order[i] == 1000 * s + k * (SEQ + 1), "file order at %d: %d", i, (int)order[i]);
    }

    draw(order, 1, 7, 1, 1);
    for (int epoch = 0; epoch < DRAWN / SAMPLES; epoch++) {
        int seen[SHARDS][16] = {{0}}, changes = 0;
        for (int k = 0; k < SAMPLES; k++) {
            int64_t token = order[epoch * SAMPLES + k];
            if (k > 0 && token / 1000 != order[epoch * SAMPLES + k - 1] / 1000) changes++;
            if (token % 1000 % (SEQ + 1) == 0) seen[token / 1000][token % 1000 / (SEQ + 1)]++;
        }
        for (int s = 0; s < SHARDS; s++) {
            for (int k = 0; k < shard_samples[s]; k++)
                CHECK(seen[s][k] == 1, "epoch %d: shard %d, %d", epoch, s, k);
        }
        CHECK(changes == SHARDS - 1, "epoch %d goes from shard to shard %d times", epoch, changes);
    }
    CHECK(memcmp(order, order + SAMPLES, SAMPLES * 8) != 0, "two epochs have one order");
    int first_shards = 0;
    for (int e = 0; e < DRAWN / SAMPLES; e++) first_shards |= 1 << (order[e * SAMPLES] / 1000);
    CHECK((first_shards & (first_shards - 1)) != 0, "shards are never shuffled");
    draw(other, 1, 8, 1, 1);
    CHECK(memcmp(order, other, SAMPLES * 8) != 0, "two seeds have one order");

    static const int ranks[] = {1, 2, 3, 4, 8};
    static const int64_t batches[] = {1, 2, 5, 60}; // 60: several epochs per batch
    for (int r = 0; r < 5; r++) {
        for (int b = 0; b < 4; b++) {
            draw(other, 1, 7, ranks[r], batches[b]);
            CHECK(memcmp(order, other, sizeof(order)) == 0, "%d ranks of %d see another order", ranks[r],
                  (int)batches[b]);
        }
    }
}

// Two shards of equal size are shuffled in different orders.
static void test_loader_shards_differ(void) {
    DataLoader l;
    int32_t x[SEQ], y[SEQ], order[2][16];
    make_dirs(in_root("twins"));
    make_shard(in_root("twins/a.bin"), 0, 16 * (SEQ + 1), VOCAB);
    make_shard(in_root("twins/b.bin"), 0, 16 * (SEQ + 1), VOCAB);
    loader_open(&l, in_root("twins/*.bin"), 1, SEQ, VOCAB, 1, 3, 0, 1);
    for (int i = 0; i < 32; i++) {
        loader_next(&l, x, y);
        order[i / 16][i % 16] = x[0];
    }
    loader_close(&l);
    CHECK(memcmp(order[0], order[1], sizeof(order[0])) != 0, "two shards have one order");
}

static void test_loader_resume(void) {
    DataLoader a, b;
    int32_t x[3 * SEQ], y[3 * SEQ], u[3 * SEQ], v[3 * SEQ];
    loader_open(&a, in_root("three/s_*.bin"), 3, SEQ, VOCAB, 1, 5, 1, 2);
    loader_open(&b, in_root("three/s_*.bin"), 3, SEQ, VOCAB, 1, 5, 1, 2);
    for (int step = 0; step < 30; step++) {
        int64_t epoch = a.epoch, position = a.position;
        loader_next(&a, x, y);
        DataLoader fresh;
        loader_open(&fresh, in_root("three/s_*.bin"), 3, SEQ, VOCAB, 1, 5, 1, 2);
        loader_seek(&fresh, epoch, position);
        loader_next(&fresh, u, v);
        CHECK(memcmp(x, u, sizeof(x)) == 0 && memcmp(y, v, sizeof(y)) == 0, "resumed at step %d", step);
        CHECK(fresh.epoch == a.epoch && fresh.position == a.position, "position after step %d", step);
        loader_close(&fresh);
        loader_seek(&b, 40 - step, 3); // seek to another position, then back
        loader_next(&b, u, v);
        loader_seek(&b, epoch, position);
        loader_next(&b, u, v);
        CHECK(memcmp(x, u, sizeof(x)) == 0 && memcmp(y, v, sizeof(y)) == 0, "sought back at step %d", step);
    }
    loader_close(&a);
    loader_close(&b);
}

static void check_doc_boundaries(const int32_t *tokens, int eot, int mask, int64_t expected,
                                 const int64_t *starts) {
    int64_t cu[13];
    memset(cu, 0xff, sizeof(cu));
    int64_t n = doc_boundaries(tokens, 3, 4, eot, mask, cu);
    CHECK(n == expected && memcmp(cu, starts, (size_t)(expected + 1) * 8) == 0,
          "eot %d, mask %d: %lld sequences", eot, mask, (long long)n);
}

static void test_doc_boundaries(void) {
    const int32_t tokens[12] = {5, 9, 1, 2, 9, 1, 2, 3, 1, 2, 9, 9};
    const int64_t rows[] = {0, 4, 8, 12}, docs[] = {0, 1, 4, 8, 10, 11, 12};
    const int64_t all[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    const int32_t ends[12] = {9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9};
    check_doc_boundaries(tokens, 9, 1, 6, docs);
    check_doc_boundaries(tokens, 9, 0, 3, rows);
    check_doc_boundaries(tokens, -1, 1, 3, rows);
    check_doc_boundaries(tokens, 77, 1, 3, rows);
    check_doc_boundaries(ends, 9, 1, 12, all);
}

// ---------------------------------------------------------------------------------------------------------
// tokenizer.h

static int64_t encode(const Tokenizer *t, const char *text, int32_t *out) {
    return tokenizer_encode(t, text, (int64_t)strlen(text), 0, out, 64);
}

static void check_tokens(const Tokenizer *t, const char *text, const char *expected) {
    int32_t out[64];
    char got[1024] = "";
    int64_t n = encode(t, text, out);
    for (int64_t i = 0; i < n; i++) {
        int length;
        const char *piece = tokenizer_piece(t, out[i], &length);
        snprintf(got + strlen(got), sizeof(got) - strlen(got), "[%.*s]", length, piece);
    }
    CHECK(strcmp(got, expected) == 0, "'%s' became %s, not %s", text, got, expected);
}

static const char *printed(const Tokenizer *t, const int32_t *tokens, int64_t n) {
    static char text[256];
    FILE *f = fopen(in_root("printed"), "wb");
    tokenizer_print(t, f, tokens, n, 1);
    fclose(f);
    int64_t length = read_file(in_root("printed"), text, sizeof(text) - 1);
    text[length > 0 ? length : 0] = 0;
    return text;
}

static void load_tokenizer(const char *path) {
    Tokenizer t;
    tokenizer_load(&t, path);
}

static void encode_or_die(const Tokenizer *t, const char *text) {
    int32_t out[64];
    encode(t, text, out);
}

static void test_multiword_tokens(void) {
    const char *pieces[10] = {"new york :", "new",      "new york", "city", "york city hall",
                              "san jose :", "new york", ":",        "old",  "new york city park"};
    const int32_t ids[] = {2, 3, 1};
    int lengths[10];
    int32_t out[64];
    Tokenizer t;
    for (int i = 0; i < 10; i++) lengths[i] = (int)strlen(pieces[i]);
    tokenizer_write(in_root("several.bin"), TOKENIZER_WORDS, 10, 0, pieces, lengths, NULL);
    CHECK(tokenizer_load(&t, in_root("several.bin")) == 0, "load");
    check_tokens(&t, "new", "[new]");
    check_tokens(&t, "new york", "[new york]");
    check_tokens(&t, "new new york city new", "[new][new york][city][new]");
    check_tokens(&t, "new york city park city", "[new york city park][city]");
    check_tokens(&t, "city york city hall :", "[city][york city hall][:]");
    check_tokens(&t, " \n new \t\r\n york\n\ncity\v\f", "[new york][city]");
    check_tokens(&t, "san  jose\t:", "[san jose :]");
    check_tokens(&t, "new york :", "[new york][:]"); // text never encodes to the end-of-text token
    CHECK(encode(&t, "new york", out) == 1 && out[0] == 2, "of tokens with the same text the first one wins");
    out[1] = -7;
    CHECK(tokenizer_encode(&t, "new york city", 13, 0, out, 1) == 2 && out[0] == 2 && out[1] == -7,
          "more tokens than room");
    CHECK(tokenizer_encode(&t, "new york city", 8, 0, out, 64) == 1 && out[0] == 2, "text that ends early");
    CHECK(strcmp(printed(&t, ids, 3), "new york city new") == 0, "'%s'", printed(&t, ids, 3));
    DIES("no word 'san' (did you mean 'san jose :'?)\n", encode_or_die(&t, "new san"));
    DIES("no word 'san' (did you mean 'san jose :'?)\n", encode_or_die(&t, "san jose city"));
    DIES("no word 'york' (did you mean 'york city hall'?)\n", encode_or_die(&t, "old\nyork\ncity"));
    DIES("no word 'ne'; separate", encode_or_die(&t, "ne york"));
    DIES("no word 'jose'; separate", encode_or_die(&t, "jose :"));
    DIES("no word 'newyork'; separate", encode_or_die(&t, "newyork"));
    tokenizer_free(&t);
}

static void test_word_tokenizer(void) {
    const char *pieces[5] = {"<|end|>", "the", "cat", ".", "sat"};
    const int lengths[5] = {7, 3, 3, 1, 3};
    const int32_t ids[] = {1, 2, 4, 99, -3, 3};
    int32_t out[64];
    Tokenizer t;
    char path[PATH_BYTES];
    snprintf(path, sizeof(path), "%s", in_root("words.bin"));
    CHECK(tokenizer_load(&t, in_root("none.bin")) == 1, "a tokenizer that is not there");
    tokenizer_write(path, TOKENIZER_WORDS, 5, 0, pieces, lengths, NULL);
    CHECK(tokenizer_load(&t, path) == 0 && t.kind == TOKENIZER_WORDS && t.vocab_size == 5 && t.eot == 0,
          "load");
    CHECK(encode(&t, "  the cat\n sat\t. ", out) == 4 && out[0] == 1 && out[1] == 2 && out[2] == 4 &&
              out[3] == 3,
          "encode");
    CHECK(encode(&t, "", out) == 0 && encode(&t, " \n", out) == 0, "nothing to encode");
    CHECK(strcmp(printed(&t, ids, 6), "the cat sat .") == 0, "'%s'", printed(&t, ids, 6));
    out[2] = -7;
    CHECK(tokenizer_encode(&t, "the cat sat", 11, 0, out, 2) == 3 && out[2] == -7, "more tokens than room");
    DIES("no word 'dog'", encode_or_die(&t, "the dog sat"));
    DIES("no word 'cat.'", encode_or_die(&t, "the cat."));
    DIES("no word '<|end|>'", encode_or_die(&t, "<|end|>"));
    DIES("no word 'sa'; separate words and punctuation by spaces", encode_or_die(&t, "sa"));
    tokenizer_free(&t);
    test_multiword_tokens();

    static char raw[4096];
    int64_t size = read_file(path, raw, sizeof(raw));
    for (int64_t cut = 0; cut < size; cut += cut < 1020 ? 340 : 1) {
        int code;
        write_file(in_root("cut.bin"), raw, cut);
        IN_CHILD(code, load_tokenizer(in_root("cut.bin")));
        CHECK(code == 1 && strncmp(child_err, "error: tokenizer ", 17) == 0, "cut at %d: %s", (int)cut,
              child_err);
    }
    write_file(in_root("cut.bin"), raw, size + 1);
    DIES("too long", load_tokenizer(in_root("cut.bin")));
    for (int field = 0; field < 7; field++) { // an invalid value in each field of the header
        static const char *const expected[] = {
            "is not a tokenizer", "has version 77",  "vocabulary of 77 tokens", "end-of-text 77", "kind 77",
            "pretokenizer 77",    "ignore_merges 77"};
        char bad[4096];
        int32_t value = 77;
        memcpy(bad, raw, (size_t)size);
        memcpy(bad + 4 * field, &value, 4);
        write_file(in_root("cut.bin"), bad, size);
        DIES(expected[field], load_tokenizer(in_root("cut.bin")));
    }
    DIES("it is not a file", load_tokenizer(root));
}

// A small BPE: the 256 bytes, merges whose ranks are not in the order of ids, and a special token.
static void test_bpe_tokenizer(void) {
    enum { MERGES = 17, N = 256 + MERGES };
    static const char *const merged[MERGES] = {"he",       "ll",   "hell",   "hello", " w",     "or",
                                               "ld",       " wor", " world", "lo",    "llo",    "12",
                                               "\xc3\xa9", "xy",   "yz",     "xyzz",  "<|end|>"};
    static const int32_t rank[MERGES] = {0, 9, 10, 11, 1, 2, 3, 4, 5, 6, 7, 8, 12, 14, 13, 15, -1};
    static const char *const whole[] = {"hello", " world", "12", "\xc3\xa9", "llo", "or"};
    const char *pieces[N];
    char bytes[256];
    int lengths[N];
    int32_t ranks[N], out[64];
    for (int i = 0; i < 256; i++) {
        bytes[i] = (char)(255 - i); // not in order, like GPT-2's
        pieces[i] = &bytes[i];
        lengths[i] = 1;
        ranks[i] = -1;
    }
    for (int i = 0; i < MERGES; i++) {
        pieces[256 + i] = merged[i];
        lengths[256 + i] = (int)strlen(merged[i]);
        ranks[256 + i] = rank[i];
    }
    Tokenizer t;
    tokenizer_write(in_root("bpe.bin"), TOKENIZER_BPE, N, N - 1, pieces, lengths, ranks);
    CHECK(tokenizer_load(&t, in_root("bpe.bin")) == 0 && t.kind == TOKENIZER_BPE && t.vocab_size == N &&
              t.eot == N - 1 && t.rank[256 + 3] == 11 && t.rank[0] == -1,
          "load");
    check_tokens(&t, "hello", "[hello]"); // he, lo, llo, then he + llo
    check_tokens(&t, "xyz", "[x][yz]");   // the lowest rank first, not the leftmost
    check_tokens(&t, "xyxyz", "[xy][x][yz]");
    check_tokens(&t, "hell", "[hell]");
    check_tokens(&t, " world", "[ world]");
    check_tokens(&t, "world", "[w][or][ld]");
    check_tokens(&t, "  world", "[ ][ world]");
    check_tokens(&t, "x 12 123", "[x][ ][12][ ][12][3]");
    check_tokens(&t, "12ld", "[12][ld]"); // digits and letters do not merge
    check_tokens(&t, "<|end|>", "[<][|][e][n][d][|][>]");
    check_tokens(&t, "caf\xc3\xa9", "[c][a][f][\xc3\xa9]");
    check_tokens(&t, "", "");
    for (size_t i = 0; i < sizeof(whole) / sizeof(whole[0]); i++) {
        int64_t n = encode(&t, whole[i], out);
        CHECK(strcmp(printed(&t, out, n), whole[i]) == 0, "'%s' does not come back", whole[i]);
    }
    check_tokens(&t, "xyzz", "[x][yz][z]"); // no merges lead to xyzz
    t.ignore_merges = 1;
    check_tokens(&t, "xyzz", "[xyzz]");
    check_tokens(&t, "xyzz? xyzzx", "[xyzz][?][ ][x][yz][z][x]");
    t.ignore_merges = 0;
    const char *text = "hello world 12's  \n\n hello\tllo!?";
    int64_t n = encode(&t, text, out);
    CHECK(n > 0 && n < 64 && strcmp(printed(&t, out, n), text) == 0, "'%s'", printed(&t, out, n));
    tokenizer_free(&t);
}

// The checksum of a tokenizer: the CRC-32 of the ids and bytes of its text tokens, whatever else it has.
static void test_tokenizer_checksum(void) {
    enum { N = 300 };
    Tokenizer t;
    uint32_t sums[5];
    for (int i = 0; i < 5; i++) { // as it is; with added tokens and another end-of-text; padded; two changed
        TestToken tokens[N];
        for (int k = 0; k < N; k++) tokens[k] = (TestToken){"", -1, 0};
        tokens[0] = (TestToken){"a", -1, TOKEN_VOCAB};
        tokens[258] = (TestToken){i == 3 ? "hf" : "he", 3, TOKEN_VOCAB};
        tokens[1] = (TestToken){"never", -1, TOKEN_VOCAB}; // no merge makes it
        tokens[259] = (TestToken){i == 1 ? "<new>" : "<old>", -1, TOKEN_ADDED | TOKEN_VOCAB};
        if (i == 4) tokens[2] = tokens[0], tokens[0].flags = 0;
        const int32_t fields[16] = {i == 1 ? 299 : 259, TOKENIZER_BPE, 0, 0, i == 1 ? -1 : 259, -1};
        write_tokenizer_bin(in_root("sum.bin"), tokens, i == 2 ? 280 : N, NULL, 0, fields);
        tokenizer_load(&t, in_root("sum.bin"));
        sums[i] = tokenizer_checksum(&t);
        tokenizer_free(&t);
    }
    CHECK(sums[0] == 0xa6120a7eu, "checksum %08x", sums[0]);
    CHECK(sums[1] == sums[0] && sums[2] == sums[0], "added and unused tokens: %08x %08x", sums[1], sums[2]);
    CHECK(sums[3] != sums[0] && sums[4] != sums[0], "other tokens: %08x %08x", sums[3], sums[4]);
}

static void encode_zero(const Tokenizer *t) {
    int32_t out[4];
    tokenizer_encode(t, "h\0", 2, 0, out, 4);
}

static void check_ids(const Tokenizer *t, const char *text, int special, const char *expected) {
    int32_t out[64];
    char got[1024] = "";
    int64_t n = tokenizer_encode(t, text, (int64_t)strlen(text), special, out, 64);
    for (int64_t i = 0; i < n && i < 64; i++)
        snprintf(got + strlen(got), sizeof(got) - strlen(got), "%s%d", i > 0 ? " " : "", out[i]);
    CHECK(strcmp(got, expected) == 0, "'%s' became %s, not %s", text, got, expected);
}

// Version 2: merges of pairs, byte tokens, prefixes, added tokens, BOS and end-of-sequence tokens.
static void test_sentencepiece_tokenizer(void) {
    enum { LONG = 1 << 20 };
    Tokenizer t;
    char path[PATH_BYTES], wanted[256];
    snprintf(path, sizeof(path), "%s", in_root("sp.bin"));
    write_sentencepiece(path, PREFIX_ALWAYS, 0, -1);
    CHECK(tokenizer_load(&t, path) == 0 && t.kind == TOKENIZER_SENTENCEPIECE && t.bos == SP_BOS &&
              t.eot == SP_EOS && t.num_eos == 2 && tokenizer_is_eos(&t, SP_USER) &&
              !tokenizer_is_eos(&t, SP_H),
          "load");
#define EXPECT(text, special, ...)                                                                           \
    do {                                                                                                     \
        const int ids_[] = {__VA_ARGS__};                                                                    \
        wanted[0] = 0;                                                                                       \
        for (size_t i_ = 0; i_ < sizeof(ids_) / sizeof(ids_[0]); i_++)                                       \
            snprintf(wanted + strlen(wanted), sizeof(wanted) - strlen(wanted), "%s%d", i_ ? " " : "",        \
                     ids_[i_]);                                                                              \
        check_ids(&t, text, special, wanted);                                                                \
    } while (0)
#define BYTE(b) (SP_BYTES - 1 + (b))
    check_ids(&t, "", 1, "");
    EXPECT("hello", 0, SP__HELLO);
    EXPECT("hello hello", 0, SP__HELLO, SP__HELLO);
    EXPECT(" hello", 0, SP_SPACES2, SP_HELLO); // two spaces merge first
    EXPECT("    o", 0, SP_SPACES4, SP_SPACE, SP_O);
    EXPECT("h\xe2\x96\x81h", 0, SP_SPACE, SP_H, SP_SPACE, SP_H); // U+2581 is a space
    EXPECT("\xe6\xbc\xa2\n", 0, SP_SPACE, SP_CJK, BYTE('\n'));
    EXPECT("\xc3\xa9", 0, SP_SPACE, BYTE(0xc3), BYTE(0xa9));
    EXPECT("h\xff\xe6o", 0, SP_SPACE, SP_H, BYTE(0xff), BYTE(0xe6), SP_O); // not UTF-8
    EXPECT("h<|a|>h", 1, SP_SPACE, SP_H, SP_USER, SP_SPACE, SP_H);         // each part gets the prefix
    EXPECT("<|a|>bh", 1, SP_USER_LONG, SP_SPACE, SP_H);                    // the longest one
    EXPECT("<|a|>", 0, SP_SPACE, BYTE('<'), BYTE('|'), BYTE('a'), BYTE('|'), BYTE('>'));
    EXPECT("h \n<|strip|>\xe3\x80\x80 o", 1, SP_SPACE, SP_H, SP_STRIP, SP_SPACE, SP_O);
    EXPECT("h<|a|> <|strip|>", 1, SP_SPACE, SP_H, SP_USER, SP_STRIP); // takes no space of another token
    EXPECT("\xe2\x96\x81<P>h", 1, SP_META, SP_SPACE, SP_H);
    EXPECT(" <P>", 1, SP_SPACES2, BYTE('<'), BYTE('P'), BYTE('>'));
    EXPECT("h\n\no", 0, SP_SPACE, SP_H, SP_WIDE, SP_SPACE, SP_O); // not special: also in training text
    EXPECT("<n>h <n>", 0, SP_NORMAL, SP_H, SP_NORMAL);            // its normalized form begins with a space
    int32_t ids[] = {SP__HELLO, SP__HELLO, BYTE(0xc3), BYTE(0xa9), SP_META};
    CHECK(strcmp(printed(&t, ids, 5), "hello hello\xc3\xa9 <P>") == 0, "'%s'", printed(&t, ids, 5));
    DIES("no token for byte 0x00", encode_zero(&t));
    tokenizer_free(&t);

    write_sentencepiece(path, PREFIX_FIRST, 1, SP_UNKNOWN);
    tokenizer_load(&t, path);
    EXPECT("hello<|a|>hello", 1, SP__HELLO, SP_USER, SP_HELLO); // only the first part
    EXPECT(" hello", 0, SP__HELLO);
    EXPECT("    o", 0, SP_SPACE, SP_SPACE, SP_SPACE, SP_SPACE, SP_O); // each space begins a pre-token
    int32_t out[4];
    CHECK(tokenizer_encode(&t, "\0\0h", 3, 0, out, 4) == 3 && out[0] == SP_SPACE && out[1] == SP_UNKNOWN &&
              out[2] == SP_H,
          "unknown tokens in a row become one");
    tokenizer_free(&t);

    write_sentencepiece(path, PREFIX_UNLESS_SPACE, 0, SP_UNKNOWN);
    tokenizer_load(&t, path);
    EXPECT("hello<|a|>hello", 1, SP__HELLO, SP_USER, SP__HELLO);
    EXPECT(" hello", 0, SP__HELLO);
    char *text = (char *)xmalloc(LONG); // one pre-token, in much less than quadratic time
    int32_t *tokens = (int32_t *)xmalloc(LONG * sizeof(int32_t));
    for (int i = 0; i < LONG; i++) text[i] = "hello"[i % 5];
    double begin = now_seconds();
    int64_t n = tokenizer_encode(&t, text, LONG, 0, tokens, LONG);
    CHECK(n == LONG / 5 + 1 && tokens[n - 2] == SP_HELLO && tokens[n - 1] == SP_H, "%lld tokens",
          (long long)n);
    CHECK(now_seconds() - begin < 10, "1 MiB takes %.1f s", now_seconds() - begin);
    free(text), free(tokens);
    tokenizer_free(&t);

    static char raw[8192];
    int64_t size = read_file(path, raw, sizeof(raw));
    for (int field = 7; field < 15; field++) { // an invalid value in each field of version 2
        static const char *const expected[] = {
            "BOS 7777",    "unknown 7777",      "fuse_unknown 7777",    "7777 merges",
            "prefix 7777", "split_spaces 7777", "7777 end-of-sequence", "end-of-sequence 7777"};
        int32_t value = 7777;
        char bad[8192];
        memcpy(bad, raw, (size_t)size);
        memcpy(bad + 4 * field, &value, 4);
        write_file(in_root("cut.bin"), bad, size);
        DIES(expected[field - 7], load_tokenizer(in_root("cut.bin")));
    }
    write_file(in_root("cut.bin"), raw, size - 1);
    DIES("is too short", load_tokenizer(in_root("cut.bin")));
    memset(raw + size - 4, 0x7f, 4);
    write_file(in_root("cut.bin"), raw, size);
    DIES("merge 6 has token 2139062143", load_tokenizer(in_root("cut.bin")));
#undef EXPECT
#undef BYTE
}

// Pre-tokenizers. test_bpe.py compares whole encodings with the tokenizer libraries.
static void test_pretokens(void) {
    static const struct {
        int split;
        const char *expected; // the text, with a bar between pre-tokens
    } cases[] = {
        {PRETOKENIZER_GPT2, "Hello| world"},
        {PRETOKENIZER_GPT2, " a|1|b"},
        {PRETOKENIZER_GPT2, "don|'t| we|'ll| '|x"},
        {PRETOKENIZER_GPT2, "DON|'|T"},
        {PRETOKENIZER_GPT2, "a| | b"},
        {PRETOKENIZER_GPT2, "a| \n| b"},
        {PRETOKENIZER_GPT2, "x|   "},
        {PRETOKENIZER_GPT2, "?!| ..|a"},
        {PRETOKENIZER_GPT2, " \xe2\x82\xac"}, // a currency sign is not a letter
        {PRETOKENIZER_GPT2, "a|\xe2\x82\xac|b"},
        {PRETOKENIZER_GPT2, "caf\xc3\xa9| \xe6\xbc\xa2\xe5\xad\x97|1"},
        {PRETOKENIZER_GPT2, "1\xd9\xa3\xc2\xbd"}, // numbers of other scripts, fractions
        {PRETOKENIZER_GPT2, "a|\xc2\xa0| b"},     // a no-break space is white space
        {PRETOKENIZER_GPT2, "a| |\xe3\x80\x80|b"},
        {PRETOKENIZER_GPT2, "a|\xff|b|\xc3| c"}, // not UTF-8
        {PRETOKENIZER_GPT2, "a|  |\xff| |\xe2|\x82|x"},
        {PRETOKENIZER_GPT2, "\xc0|\x80|\xed|\xa0|\x80|\xf4|\x90|\x80|\x80"},
        {PRETOKENIZER_LLAMA3, "DON|'T| we|'Ll|'\xc5\xbf"},
        {PRETOKENIZER_LLAMA3, "x|(a| \xe2\x80\x9c|so"},
        {PRETOKENIZER_LLAMA3, "\tx| |123|456|7"},
        {PRETOKENIZER_LLAMA3, "a|;\n\n|b|\n|c"},
        {PRETOKENIZER_LLAMA3, "a| \r\n| | b|  \n|  "},
        {PRETOKENIZER_LLAMA3, "x|   "},
        {PRETOKENIZER_QWEN, "a| |1|2|3|a"},
        {PRETOKENIZER_CL100K, "a| \n|b|  \n  "},
        {PRETOKENIZER_CL100K, "123|4"},
        {PRETOKENIZER_SMOLLM, "a| |1|2| x|  |3|'s|'|S"},
        {PRETOKENIZER_SMOLLM, "a| |\xd9\xa3|\xc2\xbd| \n |4| !|5|   "},
        {PRETOKENIZER_SMOLLM, "DON|'|T| |\xe3\x80\x80|b| |\xff|1"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char text[64], got[128] = "";
        int64_t length = 0, n;
        for (const char *c = cases[i].expected; *c; c++) {
            if (*c != '|') text[length++] = *c;
        }
        for (int64_t at = 0; at < length; at += n) {
            n = tokenizer_pretoken_length(cases[i].split, text + at, length - at);
            if (n < 1 || n > length - at) break;
            snprintf(got + strlen(got), sizeof(got) - strlen(got), "%s%.*s", at > 0 ? "|" : "", (int)n,
                     text + at);
        }
        CHECK(strcmp(got, cases[i].expected) == 0, "pre-tokenizer %d: '%s', expected '%s'", cases[i].split,
              got, cases[i].expected);
    }
}

// llm.c's tokenizer.bin, versions 1 and 2.
static void test_llmc_tokenizer(void) {
    for (uint32_t version = 1; version <= 2; version++) {
        int n = version == 1 ? 50257 : 259;
        uint32_t header[256] = {20240328, version, (uint32_t)n, version == 1 ? 0 : 258};
        FILE *f = fopen(in_root("gpt2.bin"), "wb");
        fwrite(header, sizeof(header), 1, f);
        for (int i = 0; i < n; i++) {
            char piece[16];
            int length = 1;
            piece[0] = (char)i;
            if (i >= 256) length = snprintf(piece, 16, i == 256 ? "th" : i == 257 ? "the" : "x%d", i);
            if (i == n - 1) length = snprintf(piece, 16, "<|endoftext|>");
            fputc(length, f);
            fwrite(piece, 1, (size_t)length, f);
        }
        fclose(f);
        Tokenizer t;
        int32_t out[64];
        CHECK(tokenizer_load(&t, in_root("gpt2.bin")) == 0 && t.kind == TOKENIZER_BPE && t.vocab_size == n &&
                  t.eot == n - 1,
              "version %u: %d tokens, end-of-text %d", version, t.vocab_size, t.eot);
        CHECK(encode(&t, "the thx", out) == 4 && out[0] == 257 && out[1] == ' ' && out[2] == 256 &&
                  out[3] == 'x',
              "version %u", version);
        tokenizer_free(&t);
    }
    uint32_t header[256] = {20240328, 3, 1, 0};
    write_file(in_root("gpt2.bin"), header, sizeof(header));
    DIES("version 3, 1 or 2 expected", load_tokenizer(in_root("gpt2.bin")));
}

// ---------------------------------------------------------------------------------------------------------
// sampler.h and schedule.h

static void test_sampler(void) {
    int32_t order[8];
    float probs[8];
    const float logits[6] = {0.0f, 3.0f, 1.0f, 3.0f, -INFINITY, 2.0f};
    CHECK(sample_token(logits, 6, 0, 1, 0.99, order, probs) == 1, "temperature 0 takes the first of equals");
    const float one[1] = {-5.0f};
    CHECK(sample_token(one, 1, 1, 0.5, 0.7, order, probs) == 0, "a vocabulary of one");

    // probabilities 0.1 0.4 0.2 0.3 at temperature 1
    float p[4] = {logf(0.1f), logf(0.4f), logf(0.2f), logf(0.3f)};
    static const struct {
        double top_p, coin;
        int token;
    } cases[] = {{1, 0, 1},       {1, 0.39, 1},    {1, 0.41, 3},     {1, 0.69, 3},    {1, 0.71, 2},
                 {1, 0.89, 2},    {1, 0.91, 0},    {1, 0.999999, 0}, {0.4, 0.99, 1},  {0.35, 0.99, 1},
                 {0.65, 0.56, 1}, {0.65, 0.58, 3}, {0.65, 0.99, 3},  {0.85, 0.99, 2}, {1e-9, 0.5, 1}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int token = sample_token(p, 4, 1, cases[i].top_p, cases[i].coin, order, probs);
        CHECK(token == cases[i].token, "top_p %g, coin %g: %d, not %d", cases[i].top_p, cases[i].coin, token,
              cases[i].token);
    }
    int counts[6] = {0}, n = 100000;
    Rng r;
    rng_seed(&r, 1, 2);
    double total = 0, weight[6];
    for (int i = 0; i < 6; i++) total += weight[i] = exp(logits[i] / 2.0);
    for (int i = 0; i < n; i++) counts[sample_token(logits, 6, 2, 1, rng_uniform(&r), order, probs)]++;
    for (int i = 0; i < 6; i++) {
        CHECK(fabs(counts[i] / (double)n - weight[i] / total) < 0.006,
              "temperature 2: token %d drawn %d times", i, counts[i]);
    }
    CHECK(sample_token(logits, 6, 1e-30, 1, 0.2, order, probs) == 1, "a tiny temperature");
    const float nan[2] = {0.0f, NAN}, inf[2] = {INFINITY, 0.0f};
    DIES("logit of token 1 is", sample_token(nan, 2, 1, 1, 0, order, probs));
    DIES("logit of token 1 is", sample_token(nan, 2, 0, 1, 0, order, probs));
    DIES("logit of token 0 is inf", sample_token(inf, 2, 1, 1, 0, order, probs));

    // a large vocabulary: the sampled token's cumulative probability contains the coin
    enum { BIG = 5000 };
    static float many[BIG], many_probs[BIG];
    static int32_t many_order[BIG];
    for (int i = 0; i < BIG; i++) many[i] = (float)rng_normal_at(3, 3, i);
    for (int k = 0; k < 20; k++) {
        double coin = k / 20.0, before = 0, sum = 0;
        int token = sample_token(many, BIG, 1, 1, coin, many_order, many_probs);
        for (int i = 0; i < BIG; i++) {
            sum += exp(many[i]);
            if (many[i] > many[token]) before += exp(many[i]);
        }
        CHECK(before / sum <= coin + 1e-5 && (before + exp(many[token])) / sum >= coin - 1e-5, "coin %g",
              coin);
    }
}

static void test_schedule(void) {
    CHECK(learning_rate(0, 2e-3, 10, 100, 0.1) == 2e-4, "first step");
    CHECK(fabs(learning_rate(4, 2e-3, 10, 100, 0.1) - 1e-3) < 1e-18, "half of the warm-up");
    CHECK(learning_rate(9, 2e-3, 10, 100, 0.1) == 2e-3, "end of the warm-up");
    CHECK(learning_rate(10, 2e-3, 10, 100, 0.1) == 2e-3, "start of the cosine");
    CHECK(fabs(learning_rate(55, 2e-3, 10, 100, 0.1) - 1.1e-3) < 1e-15, "middle of the cosine");
    CHECK(fabs(learning_rate(40, 2e-3, 10, 100, 0.0) - 1.5e-3) < 1e-15, "a third of the cosine");
    CHECK(learning_rate(100, 2e-3, 10, 100, 0.1) == 2e-4 && learning_rate(900, 2e-3, 10, 100, 0.1) == 2e-4,
          "end");
    CHECK(learning_rate(0, 1, 0, 10, 0) == 1 && learning_rate(10, 1, 0, 10, 0) == 0, "no warm-up");
    CHECK(learning_rate(3, 1, 5, 5, 0.5) == 0.8 && learning_rate(5, 1, 5, 5, 0.5) == 0.5,
          "warm-up to the end");
    for (int i = 10; i < 100; i++) {
        CHECK(learning_rate(i + 1, 1, 10, 100, 0.1) < learning_rate(i, 1, 10, 100, 0.1), "falls at %d", i);
    }
}

// ---------------------------------------------------------------------------------------------------------
// data/recall.c

typedef struct {
    int64_t statements, recalls, filler_sentences;
    int64_t delayed;          // recalls of delayed names
    int64_t replaced;         // Remember statements that replace a thing
    int64_t buckets[BUCKETS]; // answers by distance
} RecallStats;

// Checks the grammar and the answers of a recall shard from its tokens, compares them with its answer file,
// and fills *stats.
static void check_recall_shard(const char *path, int64_t seq_len, int names, int things, int fillers,
                               RecallStats *stats) {
    Shard s;
    Answers a;
    uint32_t *doc = (uint32_t *)xmalloc((size_t)(seq_len + 1) * 4);
    int64_t *thing_pos = (int64_t *)xmalloc((size_t)names * 8),
            *thing = (int64_t *)xmalloc((size_t)names * 8);
    int64_t answer = 0, wrong = 0, misplaced = 0, grammar = 0;
    memset(stats, 0, sizeof(*stats));
    shard_open(&s, path);
    CHECK(answers_load(&a, &s) == 0 && a.seq_len == seq_len, "answers of %s", path);
    CHECK(s.count % (seq_len + 1) == 0, "%lld tokens are not whole documents", (long long)s.count);
    uint32_t name0 = 4, thing0 = 4 + (uint32_t)names, filler0 = thing0 + (uint32_t)things;
    for (int64_t first = 0; first < s.count; first += seq_len + 1) {
        int64_t delayed = 0, quarter = (seq_len + 1) / 4;
        shard_read(&s, first, seq_len + 1, doc);
        for (int i = 0; i < names; i++) thing_pos[i] = thing[i] = -1;
        grammar += doc[0] != 0;
        for (int64_t t = 1; t <= seq_len;) {
            uint32_t verb = doc[t];
            if (verb == 1 || verb == 2) {
                if (t + 3 > seq_len) break; // the document ends within the sentence
                uint32_t name = doc[t + 1] - name0, new_thing = doc[t + 2] - thing0;
                if (name >= (uint32_t)names || new_thing >= (uint32_t)things || doc[t + 3] != 3) {
                    grammar++;
                    break;
                }
                stats->statements++;
                if (verb == 2) {
                    stats->recalls++;
                    wrong += thing[name] != (int64_t)new_thing; // the answer is the newest thing
                    int64_t distance = t + 2 - thing_pos[name];
                    if (answer >= a.count || a.answers[answer].index != first + t + 2 ||
                        a.answers[answer].distance != distance || thing_pos[name] < 0) {
                        misplaced++;
                    }
                    answer++;
                    stats->buckets[bucket_of(distance)]++;
                    delayed += thing_pos[name] < quarter && t >= seq_len + 1 - quarter;
                }
                if (verb == 1) stats->replaced += thing[name] >= 0 && thing[name] != (int64_t)new_thing;
                thing[name] = new_thing;
                thing_pos[name] = t + 2;
                t += 4;
            } else {
                int64_t words = 0;
                while (t + words <= seq_len && doc[t + words] >= filler0) {
                    grammar += doc[t + words] >= filler0 + (uint32_t)fillers;
                    words++;
                }
                if (t + words > seq_len) break; // the document ends within the sentence
                grammar += doc[t + words] != 3 || words != 3;
                stats->filler_sentences++;
                t += words + 1;
            }
        }
        // an answer in the document's last token, without the period of its sentence
        if (answer < a.count && a.answers[answer].index == first + seq_len) {
            uint32_t name = doc[seq_len - 1] - name0;
            wrong += thing[name] != (int64_t)(doc[seq_len] - thing0);
            misplaced += a.answers[answer].distance != seq_len - thing_pos[name];
            stats->buckets[bucket_of(a.answers[answer].distance)]++;
            delayed += thing_pos[name] < quarter;
            answer++;
        }
        stats->delayed += delayed;
    }
    CHECK(grammar == 0, "%lld sentences violate the grammar", (long long)grammar);
    CHECK(wrong == 0, "%lld of %lld answers are not the newest thing", (long long)wrong, (long long)answer);
    CHECK(misplaced == 0 && answer == a.count,
          "%lld answers with a wrong index or distance, %lld of %lld found", (long long)misplaced,
          (long long)answer, (long long)a.count);
    shard_close(&s);
    answers_free(&a);
    free(doc);
    free(thing_pos);
    free(thing);
}

static void test_recall(void) {
    RecallStats c;
    char before[64], after[64];
    CHECK(run_program(recall_main, line_of("-o %s/rec -n 500", root)) == 0, "recall fails: %s", child_err);
    Tokenizer t;
    int32_t tokens[8];
    CHECK(tokenizer_load(&t, in_root("rec/tokenizer.bin")) == 0 && t.kind == TOKENIZER_WORDS &&
              t.vocab_size == 68 && t.eot == 0,
          "tokenizer");
    CHECK(encode(&t, "Remember Mara : lamp . Recall soon", tokens) == 6 && tokens[0] == 1 && tokens[1] == 4 &&
              tokens[2] == 20 && tokens[3] == 3 && tokens[4] == 2 && tokens[5] >= 36,
          "the words of the task");
    CHECK(strcmp(printed(&t, tokens, 5), "Remember Mara : lamp . Recall") == 0, "'%s'",
          printed(&t, tokens, 5));
    DIES("no word 'Mara' (did you mean 'Mara :'?)", encode_or_die(&t, "Recall Mara"));
    DIES("no word ':'; separate", encode_or_die(&t, "Recall : Mara"));
    for (int i = 0; i < 68; i++) { // every token encodes to itself
        int length;
        const char *piece = tokenizer_piece(&t, i, &length);
        CHECK(i == 0 || (tokenizer_encode(&t, piece, length, 0, tokens, 8) == 1 && tokens[0] == i),
              "token %d", i);
    }
    tokenizer_free(&t);

    check_recall_shard(in_root("rec/recall_val_000000.bin"), 256, 16, 16, 32, &c);
    for (int k = 5; k < 8; k++)
        CHECK(c.buckets[k] >= 400, "val bucket %d has %lld", 1 << k, (long long)c.buckets[k]);
    check_recall_shard(in_root("rec/recall_train_000000.bin"), 256, 16, 16, 32, &c);
    double recalls = (double)c.recalls / (double)c.statements;
    double fillers = (double)c.filler_sentences / (double)(c.filler_sentences + c.statements);
    CHECK(recalls > 0.74 && recalls < 0.84, "%.3f of the statements are recalls", recalls);
    CHECK(fillers > 0.085 && fillers < 0.115, "%.3f of the sentences are fillers", fillers);
    CHECK(c.delayed >= 4 * 500, "%lld delayed names recalled in 500 documents", (long long)c.delayed);
    CHECK(c.replaced > 50, "things replaced only %lld times", (long long)c.replaced);

    // with the same parameters nothing is done; with other parameters or a missing file the data is made
    // again
    struct stat st, again;
    stat(in_root("rec/recall_train_000000.bin"), &st);
    CHECK(run_program(recall_main, line_of("-o %s/rec -n 500", root)) == 0 &&
              strstr(child_out, "nothing to do"),
          "%s", child_out);
    stat(in_root("rec/recall_train_000000.bin"), &again);
    CHECK(st.st_ino == again.st_ino && st.st_mtime == again.st_mtime, "files were made again");
    unlink(in_root("rec/recall_val_000000.answers"));
    CHECK(run_program(recall_main, line_of("-o %s/rec -n 500", root)) == 0 &&
              !strstr(child_out, "nothing to do") && exists(in_root("rec/recall_val_000000.answers")),
          "a lost file was not made again");
    write_file(in_root("rec/recall_val_000001.bin"), "old", 3);
    write_file(in_root("rec/recall_val_000001.answers"), "old", 3);
    CHECK(run_program(
              recall_main,
              line_of("-o %s/rec -n 300 -m 20 -seed 2 -t 1000 -names 40 -things 7 -fillers 3", root)) == 0,
          "%s", child_err);
    CHECK(!exists(in_root("rec/recall_val_000001.bin")) && !exists(in_root("rec/recall_val_000001.answers")),
          "a shard of an earlier run is left");
    CHECK(tokenizer_load(&t, in_root("rec/tokenizer.bin")) == 0 && t.vocab_size == 4 + 40 + 7 + 3 &&
              encode(&t, "Mara2 : Hugo3 : lamp", tokens) == 3 && tokens[0] == 4 + 16 && tokens[1] == 4 + 39 &&
              tokens[2] == 4 + 40,
          "names beyond the built-in ones");
    tokenizer_free(&t);
    check_recall_shard(in_root("rec/recall_train_000000.bin"), 1000, 40, 7, 3, &c);
    CHECK(c.delayed >= 10 * 300 && c.buckets[9] > 0 && c.buckets[8] > 0, "held %lld", (long long)c.delayed);
    Shard s;
    shard_open(&s, in_root("rec/recall_val_000000.bin"));
    CHECK(s.count == 20 * 1001, "%lld tokens", (long long)s.count);
    shard_close(&s);

    // the same seed gives the same documents, whatever their number; training and validation documents differ
    CHECK(run_program(
              recall_main,
              line_of("-o %s/rec2 -n 5 -m 20 -seed 2 -t 1000 -names 40 -things 7 -fillers 3", root)) == 0,
          "%s", child_err);
    static uint32_t x[5005], y[5005];
    Shard s2;
    shard_open(&s, in_root("rec/recall_train_000000.bin"));
    shard_open(&s2, in_root("rec2/recall_train_000000.bin"));
    shard_read(&s, 0, 5005, x);
    shard_read(&s2, 0, 5005, y);
    CHECK(memcmp(x, y, sizeof(x)) == 0, "the same seed gives other documents");
    shard_close(&s2);
    shard_open(&s2, in_root("rec2/recall_val_000000.bin"));
    shard_read(&s2, 0, 5005, y);
    CHECK(memcmp(x, y, 1001 * 4) != 0, "training and validation documents are the same");
    shard_close(&s);
    shard_close(&s2);

    // extreme contexts and sizes
    static const struct {
        int64_t seq_len;
        int names, things, fillers;
    } edges[] = {{32, 16, 16, 32},   {33, 1, 2, 1},       {64, 2, 2, 1},   {100, 3, 5, 2},
                 {127, 4, 16, 32},   {126, 7, 4, 2},      {128, 5, 3, 3},  {257, 64, 9, 9},
                 {4096, 16, 16, 32}, {65536, 16, 16, 32}, {300, 300, 2, 1}};
    for (size_t i = 0; i < sizeof(edges) / sizeof(edges[0]); i++) {
        CHECK(run_program(recall_main, line_of("-o %s/edge -t %d -n 3 -m 2 -names %d -things %d -fillers %d",
                                               root, (int)edges[i].seq_len, edges[i].names, edges[i].things,
                                               edges[i].fillers)) == 0,
              "%s", child_err);
        check_recall_shard(in_root("edge/recall_train_000000.bin"), edges[i].seq_len, edges[i].names,
                           edges[i].things, edges[i].fillers, &c);
        if (edges[i].seq_len == 65536) {
            for (int k = 2; k < 16; k++) CHECK(c.buckets[k] > 0, "no distance from %d at 65536", 1 << k);
        }
    }

    // errors: one line, no file changed
    int64_t n = read_file(in_root("rec2/recall.txt"), before, sizeof(before));
    CHECK(run_program(recall_main, line_of("-o %s/rec2 -t 31", root)) == 1 &&
              strstr(child_err, "-t 31: must be a whole number from 32 to 65536"),
          "%s", child_err);
    CHECK(run_program(recall_main, line_of("-o %s/rec2 -x 31", root)) == 1 && strstr(child_err, "'-x'"), "%s",
          child_err);
    CHECK(run_program(recall_main, line_of("-o %s/rec2 -things", root)) == 1 &&
              strstr(child_err, "-things (no value)"),
          "%s", child_err);
    CHECK(run_program(recall_main, "-t 64") == 1 && strstr(child_err, "-o DIR is missing"), "%s", child_err);
    CHECK(read_file(in_root("rec2/recall.txt"), after, sizeof(after)) == n &&
              memcmp(before, after, (size_t)n) == 0,
          "an error touched the data");
    write_file(in_root("plain_file"), "x", 1);
    CHECK(run_program(recall_main, line_of("-o %s/plain_file/sub", root)) == 1 &&
              strstr(child_err, "a file has that name"),
          "%s", child_err);
    const char *bytes[1] = {"b"};
    const int one[1] = {1};
    make_dirs(in_root("taken"));
    tokenizer_write(in_root("taken/tokenizer.bin"), TOKENIZER_BYTES, 1, -1, bytes, one, NULL);
    CHECK(run_program(recall_main, line_of("-o %s/taken", root)) == 1 &&
              strstr(child_err, "belongs to other data") && count_files("taken/*") == 1,
          "%s", child_err);
}

// ---------------------------------------------------------------------------------------------------------
// data/text.c

static void test_text(void) {
    make_dirs(in_root("in/sub"));
    static unsigned char a[5000], b[2000];
    for (int i = 0; i < 5000; i++) a[i] = (unsigned char)(rng_u64_at(1, (uint64_t)i));
    for (int i = 0; i < 2000; i++) b[i] = (unsigned char)('a' + i % 26);
    write_file(in_root("in/z.txt"), b, 2000);
    write_file(in_root("in/sub/a.txt"), a, 5000);
    write_file(in_root("in/empty.txt"), "", 0);
    write_file(in_root("in/.hidden"), "hidden", 6);
    CHECK(run_program(text_main, line_of("-o %s/out -name my -shard 1024 %s/in", root, root)) == 0, "%s",
          child_err);
    CHECK(count_files("out/my_train_*.bin") == 7 && count_files("out/my_val_*.bin") == 1 &&
              count_files("out/*.tmp") == 0,
          "%d and %d shards", count_files("out/my_train_*.bin"), count_files("out/my_val_*.bin"));

    // sub/a.txt comes before z.txt; the last tenth of each file is for validation, the rest for training;
    // each part begins with end-of-text
    static uint32_t train[6302], val[702], expected[6302];
    int64_t at = 0, n = 0;
    for (int i = 0; i < 7; i++) {
        Shard s;
        shard_open(&s, in_root(line_of("out/my_train_%06d.bin", i)));
        CHECK(s.count == (i < 6 ? 1024 : 6302 - 6 * 1024) && s.token_bytes == 2, "shard %d: %d", i,
              (int)s.count);
        if (at + s.count <= 6302) shard_read(&s, 0, s.count, train + at);
        at += s.count;
        shard_close(&s);
    }
    expected[n++] = 256;
    for (int i = 0; i < 4500; i++) expected[n++] = a[i];
    expected[n++] = 256;
    for (int i = 0; i < 1800; i++) expected[n++] = b[i];
    CHECK(at == n && memcmp(train, expected, (size_t)n * 4) == 0, "training tokens");
    Shard s;
    shard_open(&s, in_root("out/my_val_000000.bin"));
    CHECK(s.count == 702, "%d", (int)s.count);
    if (s.count == 702) shard_read(&s, 0, 702, val);
    shard_close(&s);
    n = 0;
    expected[n++] = 256;
    for (int i = 4500; i < 5000; i++) expected[n++] = a[i];
    expected[n++] = 256;
    for (int i = 1800; i < 2000; i++) expected[n++] = b[i];
    CHECK(memcmp(val, expected, (size_t)n * 4) == 0, "validation tokens");

    Tokenizer t;
    int32_t tokens[64];
    CHECK(tokenizer_load(&t, in_root("out/tokenizer.bin")) == 0 && t.kind == TOKENIZER_BYTES &&
              t.vocab_size == 257 && t.eot == 256,
          "tokenizer");
    const char *words = "caf\xc3\xa9\n <|endoftext|>";
    int64_t length = encode(&t, words, tokens);
    CHECK(length == (int64_t)strlen(words) && tokens[3] == 0xc3 &&
              strcmp(printed(&t, tokens, length), words) == 0,
          "bytes there and back");
    tokens[0] = 27;
    tokens[1] = 'x';
    tokens[2] = 300;
    tokens[3] = 256;
    CHECK(strcmp(printed(&t, tokens, 4), "x<|endoftext|>") == 0, "'%s'", printed(&t, tokens, 4));
    tokenizer_free(&t);

    // fewer shards than before: the remaining old shards are removed
    CHECK(run_program(text_main, line_of("-o %s/out -name my -val 0 -shard 5000 %s/in", root, root)) == 0,
          "%s", child_err);
    CHECK(count_files("out/my_train_*.bin") == 2 && count_files("out/my_val_*.bin") == 0,
          "old shards are left");

    // errors change no file
    static const struct {
        const char *arguments, *message;
    } bad[] = {{"-o %s/out -name my %s/nowhere.txt", "No such file"},
               {"-o %s/out -name my %s/in/empty.txt", "is empty"},
               {"-o %s/out -name my", "nothing to tokenize"},
               {"-o %s/out -name my %s/in/sub -val 0.95", "-val 0.95: must be a number from 0 to"},
               {"-o %s/out -name my %s/in -shard 3", "-shard 3: must be a whole number from 1024"},
               {"-o %s/out -name a/b %s/in", "-name a/b"},
               {"-o %s/out -name my %s/in -what 3", "'-what'"},
               {"-o %s/plain_file/x %s/in", "a file has that name"},
               {"-o %s/rec %s/in", "belongs to other data"}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        int code = run_program(text_main, line_of(bad[i].arguments, root, root));
        CHECK(code == 1 && strncmp(child_err, "error: ", 7) == 0 && strstr(child_err, bad[i].message) != NULL,
              "%s: %d, '%s'", bad[i].arguments, code, child_err);
    }
    make_dirs(in_root("nothing/here"));
    CHECK(run_program(text_main, line_of("-o %s/out -name my %s/nothing", root, root)) == 1 &&
              strstr(child_err, "nothing to tokenize"),
          "%s", child_err);
    CHECK(run_program(text_main, line_of("%s/in", root)) == 1 && strstr(child_err, "-o DIR is missing"), "%s",
          child_err);
    CHECK(count_files("out/*") == 3 && count_files("out/*.tmp") == 0, "%d files", count_files("out/*"));

    // the disk becomes full: no new shard is left, the old shards stay
    struct stat before, after;
    int code;
    stat(in_root("out/my_train_000000.bin"), &before);
    pid_t pid = child_begin();
    if (pid == 0) {
        struct rlimit limit = {6000, 6000};
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
        char folder[PATH_BYTES], input[PATH_BYTES];
        snprintf(folder, sizeof(folder), "%s/out", root);
        snprintf(input, sizeof(input), "%s/in", root);
        char *argv[] = {(char *)"text", (char *)"-o", folder, (char *)"-name", (char *)"my", input, NULL};
        exit(text_main(6, argv));
    }
    code = child_end(pid);
    stat(in_root("out/my_train_000000.bin"), &after);
    CHECK(code == 1 && strstr(child_err, "File too large"), "%d: %s", code, child_err);
    CHECK(before.st_ino == after.st_ino && count_files("out/*.tmp") == 0 && count_files("out/*") == 3,
          "a full disk left something behind");
}

// ---------------------------------------------------------------------------------------------------------
// Both programs of data/: kills, locks, stdout

// Copies in_root(from)/PATTERN to in_root(to), which is emptied first.
static void copy_files(const char *from, const char *to, const char *pattern) {
    char command[4 * PATH_BYTES];
    snprintf(command, sizeof(command), "rm -rf '%s/%s' && mkdir '%s/%s' && cp '%s/%s'/%s '%s/%s'", root, to,
             root, to, root, from, pattern, root, to);
    if (system(command) != 0) die("the test cannot copy %s to %s", from, to);
}

// Returns whether each file of in_root(folder)/PATTERN has the content of the file of the same name in
// in_root(whole).
static int all_equal(const char *folder, const char *whole, const char *pattern) {
    static char a[1 << 20], b[1 << 20];
    glob_t found;
    int equal = 1;
    if (glob(in_root(line_of("%s/%s", folder, pattern)), 0, NULL, &found) != 0) return 1;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        int64_t n = read_file(found.gl_pathv[i], a, sizeof(a));
        const char *name = strrchr(found.gl_pathv[i], '/') + 1;
        equal &= read_file(in_root(line_of("%s/%s", whole, name)), b, sizeof(b)) == n &&
                 memcmp(a, b, (size_t)n) == 0;
    }
    globfree(&found);
    return equal;
}

// Kills a program before each of its changes of names: over the old data only old or only new shards may
// remain, and a second run must give the new data.
static void check_kills(int (*program_main)(int, char **), const char *old_arguments,
                        const char *new_arguments, const char *pattern) {
    static char old_line[3 * PATH_BYTES], new_line[3 * PATH_BYTES], again_line[3 * PATH_BYTES];
    snprintf(old_line, sizeof(old_line), "-o %s/kill_old %s", root, old_arguments);
    snprintf(new_line, sizeof(new_line), "-o %s/kill_new %s", root, new_arguments);
    snprintf(again_line, sizeof(again_line), "-o %s/kill %s", root, new_arguments);
    CHECK(run_program(program_main, old_line) == 0 && run_program(program_main, new_line) == 0, "%s",
          child_err);
    int killed = 1, kills = 0, mixed = 0, wrong = 0;
    for (int n = 0; killed && n < 1000; n++) {
        copy_files("kill_old", "kill", "*");
        changes_left = n;
        killed = run_program(program_main, again_line) == -1;
        changes_left = -1;
        mixed += !all_equal("kill", "kill_old", pattern) && !all_equal("kill", "kill_new", pattern);
        wrong += run_program(program_main, again_line) != 0 || !all_equal("kill", "kill_new", "*") ||
                 !all_equal("kill_new", "kill", "*") || count_files("kill/*.tmp") > 0;
        kills += killed;
    }
    CHECK(kills > 5 && kills < 999, "%d kills", kills);
    CHECK(mixed == 0, "%d of %d kills left old and new shards", mixed, kills);
    CHECK(wrong == 0, "the run after %d of %d kills gives other data", wrong, kills);
    if (system(line_of("rm -rf %s/kill %s/kill_old %s/kill_new", root, root, root)) != 0)
        die("the test cannot remove a folder");
}

static void test_kills(void) {
    char old_arguments[2 * PATH_BYTES], new_arguments[2 * PATH_BYTES];
    make_dirs(in_root("kill_a"));
    make_dirs(in_root("kill_b"));
    for (int i = 0; i < 4; i++) {
        static char text[5000];
        memset(text, 'a' + i, sizeof(text));
        write_file(in_root(line_of("kill_%c/text", i < 2 ? 'a' : 'b')), text, i < 2 ? 5000 : 3500);
    }
    snprintf(old_arguments, sizeof(old_arguments), "-shard 1024 %s/kill_a", root);
    snprintf(new_arguments, sizeof(new_arguments), "-shard 1024 -val 0.3 %s/kill_b", root);
    check_kills(text_main, old_arguments, new_arguments, "*_*.bin");
    check_kills(text_main, new_arguments, old_arguments, "*_*.bin");
    check_kills(recall_main, "-t 64 -n 20 -m 5", "-t 64 -n 20 -m 5 -seed 2", "recall_*[ns]");
}

static void test_lock(void) {
    char host[256] = "", wanted[512];
    int pipes[2];
    static const struct {
        int (*program_main)(int, char **);
        const char *arguments;
    } programs[] = {{text_main, "-o %s/locked %s/in"}, {recall_main, "-o %s/locked -n 3 -m 3"}};
    gethostname(host, sizeof(host) - 1);
    for (int i = 0; i < 2; i++) {
        make_dirs(in_root("locked"));
        if (pipe(pipes) != 0) die("the test cannot make a pipe");
        pid_t owner = fork();
        if (owner == 0) {
            folder_lock("-o", in_root("locked"));
            if (write(pipes[1], "x", 1) != 1) _exit(1);
            pause();
            _exit(0);
        }
        char ready;
        CHECK(read(pipes[0], &ready, 1) == 1, "the owner has no lock");
        snprintf(wanted, sizeof(wanted), "process %d on host %s writes to this folder", (int)owner, host);
        int code = run_program(programs[i].program_main, line_of(programs[i].arguments, root, root));
        CHECK(code == 1 && strstr(child_err, wanted) && strchr(child_err, '\n')[1] == 0,
              "%d, '%s' has no '%s'", code, child_err, wanted);
        CHECK(count_files("locked/*") == 0, "a run without the lock wrote files");
        kill(owner, SIGKILL); // the lock ends with its owner
        waitpid(owner, NULL, 0);
        code = run_program(programs[i].program_main, line_of(programs[i].arguments, root, root));
        CHECK(code == 0, "%s", child_err);
        close(pipes[0]), close(pipes[1]);
        if (system(line_of("rm -rf %s/locked", root)) != 0) die("the test cannot remove a folder");
    }
    make_dirs(in_root("locked"));
    CHECK(symlink(in_root("lock_target"), in_root("locked/.lock")) == 0, "link");
    CHECK(run_program(text_main, line_of("-o %s/locked %s/in", root, root)) == 1 &&
              !exists(in_root("lock_target")),
          "a lock follows a link: %s", child_err);
}

// Runs a program of data/ with file descriptor `fd` closed (to == NULL), or connected to the file `to`, or to
// a pipe that nobody reads ("|").
static int run_with_stream(int (*program_main)(int, char **), const char *line, int fd, const char *to) {
    char copy[PATH_BYTES * 2], *argv[64];
    int argc = 0, pipes[2];
    snprintf(copy, sizeof(copy), "program %s", line);
    for (char *word = strtok(copy, " "); word != NULL; word = strtok(NULL, " ")) argv[argc++] = word;
    argv[argc] = NULL;
    pid_t pid = child_begin();
    if (pid == 0) {
        if (to == NULL) {
            close(fd);
        } else if (strcmp(to, "|") == 0) {
            if (pipe(pipes) != 0) _exit(99);
            dup2(pipes[1], fd);
            close(pipes[0]), close(pipes[1]);
        } else {
            dup2(open(to, O_WRONLY), fd);
        }
        exit(program_main(argc, argv));
    }
    return child_end(pid);
}

static void test_standard_streams(void) {
    static char lines[4][PATH_BYTES];
    snprintf(lines[0], sizeof(lines[0]), "-o %s/streams %s/in", root, root);
    snprintf(lines[1], sizeof(lines[1]), "-h");
    snprintf(lines[2], sizeof(lines[2]), "-o %s/streams_r -n 3 -m 3", root);
    snprintf(lines[3], sizeof(lines[3]), "-o %s/streams_r -n 3 -m 3", root); // nothing to do
    for (int i = 0; i < 5; i++) {
        int (*program_main)(int, char **) = i < 2 ? text_main : recall_main;
        const char *line = lines[i == 4 ? 1 : i];
        int code = run_with_stream(program_main, line, 1, "/dev/full");
        CHECK(code == 1 && strstr(child_err, "cannot write to stdout: No space left"), "full: %d, '%s'", code,
              child_err);
        code = run_with_stream(program_main, line, 1, "|");
        CHECK(code == 1 && strstr(child_err, "cannot write to stdout: Broken pipe"), "pipe: %d, '%s'", code,
              child_err);
        code = run_with_stream(program_main, line, 1, NULL);
        CHECK(code == 1 && strstr(child_err, "cannot write to stdout: Bad file"), "closed: %d, '%s'", code,
              child_err);
    }
    // with stderr closed, no message may end up in a shard
    CHECK(run_with_stream(text_main, line_of("-o %s/streams2 %s/in", root, root), 2, NULL) == 0 &&
              all_equal("streams2", "streams", "*.bin"),
          "stderr closed");
}

int main(int argc, char **argv) {
    char made[] = "/tmp/test_data_XXXXXX";
    if (argc > 1)
        make_dirs(argv[1]);
    else if (mkdtemp(made) == NULL)
        die("cannot make a folder below /tmp: %s", strerror(errno));
    snprintf(root, sizeof(root), "%s", argc > 1 ? argv[1] : made);
    test_files();
    test_random();
    test_shards();
    test_answers();
    test_file_types();
    test_loader_errors();
    test_loader_order();
    test_loader_shards_differ();
    test_loader_resume();
    test_doc_boundaries();
    test_word_tokenizer();
    test_bpe_tokenizer();
    test_tokenizer_checksum();
    test_sentencepiece_tokenizer();
    test_pretokens();
    test_llmc_tokenizer();
    test_sampler();
    test_schedule();
    test_recall();
    test_text();
    test_kills();
    test_lock();
    test_standard_streams();
    if (argc < 2 && fork() == 0) execlp("rm", "rm", "-rf", made, (char *)NULL);
    wait(NULL);
    return test_end("data");
}
