// shard.h: reads and writes shards, which are files of tokens in llm.c's two formats. Also reads and writes
// the answer files of the recall task, one beside each of its shards.
//
// A shard has a header of 256 int32, {magic, version, count, 0, ...}, and then `count` tokens. Magic
// 20240520, version 1: tokens of 16 bits. Magic 20240801, version 7: tokens of 32 bits. All files are
// little-endian.
#ifndef LLMC_SHARD_H
#define LLMC_SHARD_H

#include "input.h"

#define SHARD_MAGIC16 20240520
#define SHARD_VERSION16 1
#define SHARD_MAGIC32 20240801
#define SHARD_VERSION32 7
#define SHARD_HEADER_BYTES 1024
#define ANSWERS_MAGIC 20260802
#define ANSWERS_VERSION 1

typedef struct {
    char path[PATH_BYTES];
    int fd;          // -1 when closed
    int token_bytes; // 2 or 4
    int64_t count;   // tokens
} Shard;

// Opens a shard and checks its header and size; dies if they are wrong.
static inline void shard_open(Shard *s, const char *path) {
    int32_t header[256];
    struct stat st;
    if (strlen(path) >= sizeof(s->path)) {
        die("the file name has %zu characters: choose one of at most %d", strlen(path), PATH_BYTES - 1);
    }
    memmove(s->path, path, strlen(path) + 1); // `path` may be s->path
    s->fd = input_open("shard ", path, &st);
    if (s->fd < 0) die("cannot read shard %s: %s; check the path", path, strerror(errno));
    long long size = st.st_size;
    if (size < SHARD_HEADER_BYTES) {
        die("shard %s is truncated: %lld bytes found, its header alone has %d; download or make it again",
            path, size, SHARD_HEADER_BYTES);
    }
    if (pread(s->fd, header, sizeof(header), 0) != (ssize_t)sizeof(header)) {
        die("cannot read the header of shard %s: check its disk", path);
    }
    if (header[0] != SHARD_MAGIC16 && header[0] != SHARD_MAGIC32) {
        die("%s is not a shard: magic %d found, %d (16-bit tokens) or %d (32-bit tokens) expected; make "
            "shards "
            "with build/text, build/recall, data/bpe or llm.c's tools",
            path, header[0], SHARD_MAGIC16, SHARD_MAGIC32);
    }
    s->token_bytes = header[0] == SHARD_MAGIC16 ? 2 : 4;
    s->count = header[2];
    int version = s->token_bytes == 2 ? SHARD_VERSION16 : SHARD_VERSION32;
    if (header[1] != version) {
        die("shard %s has version %d, but version %d is expected with magic %d (%d-bit tokens); make it "
            "again",
            path, header[1], version, header[0], 8 * s->token_bytes);
    }
    if (s->count <= 0) die("shard %s holds %lld tokens: remove it", path, (long long)s->count);
    long long expected = SHARD_HEADER_BYTES + (long long)s->count * s->token_bytes;
    if (size == SHARD_HEADER_BYTES + (long long)s->count * (6 - s->token_bytes)) {
        die("shard %s has the wrong token width: %lld bytes found, which are %lld tokens of %d bits, but its "
            "magic %d means %d bits (%lld bytes expected); make it again",
            path, size, (long long)s->count, 8 * (6 - s->token_bytes), header[0], 8 * s->token_bytes,
            expected);
    }
    if (size != expected) {
        die("shard %s is %s: %lld bytes found, %lld expected for %lld tokens of %d bits; download or make it "
            "again",
            path, size < expected ? "truncated" : "too long", size, expected, (long long)s->count,
            8 * s->token_bytes);
    }
}

static inline void shard_close(Shard *s) {
    if (s->fd >= 0) close(s->fd);
    s->fd = -1;
}

// Reads tokens [first, first + n) into out [n]; dies if the file has become shorter.
static inline void shard_read(const Shard *s, int64_t first, int64_t n, uint32_t *out) {
    // read 16-bit tokens into the second half of `out` and widen them from its start, so that no write
    // reaches a token before it is read
    int64_t bytes = n * s->token_bytes, done = 0;
    char *raw = (char *)out + n * 4 - bytes;
    while (done < bytes) {
        off_t offset = (off_t)(SHARD_HEADER_BYTES + first * s->token_bytes + done);
        ssize_t got = pread(s->fd, raw + done, (size_t)(bytes - done), offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) die("cannot read shard %s: %s; check its disk", s->path, strerror(errno));
        if (got == 0) {
            die("shard %s has become shorter while in use: token %lld of %lld is missing; make it again",
                s->path, (long long)(first + done / s->token_bytes), (long long)s->count);
        }
        done += got;
    }
    if (s->token_bytes == 2) {
        for (int64_t i = 0; i < n; i++) {
            uint16_t token;
            memcpy(&token, raw + 2 * i, 2);
            out[i] = token;
        }
    }
}

// A shard that is being written. The struct must not move in memory, like its AtomicFile.
typedef struct {
    AtomicFile file;
    int token_bytes;
    int64_t count, vocab_size;
} ShardWriter;

// Opens a shard for writing. Tokens have 16 bits if vocab_size <= 65536, else 32 bits.
static inline void shard_writer_open(ShardWriter *w, const char *path, int64_t vocab_size) {
    char header[SHARD_HEADER_BYTES];
    memset(header, 0, sizeof(header));
    w->token_bytes = vocab_size <= 65536 ? 2 : 4;
    w->count = 0;
    w->vocab_size = vocab_size;
    atomic_open(&w->file, path);
    atomic_write(&w->file, header, sizeof(header)); // zeros, which shard_writer_sync replaces
}

// Appends tokens [n]; dies on a token outside the vocabulary and if the shard would exceed 2^31 - 1 tokens.
static inline void shard_writer_add(ShardWriter *w, const int32_t *tokens, int64_t n) {
    if (n > INT32_MAX - w->count) {
        die("shard %s would exceed %d tokens: make smaller shards", w->file.path, INT32_MAX);
    }
    for (int64_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= w->vocab_size) {
            die("cannot write %s: token %d is outside the vocabulary of %lld; check the tokenizer",
                w->file.path, tokens[i], (long long)w->vocab_size);
        }
        uint16_t narrow = (uint16_t)tokens[i];
        atomic_write(&w->file, w->token_bytes == 2 ? (const void *)&narrow : (const void *)&tokens[i],
                     (size_t)w->token_bytes);
    }
    w->count += n;
}

// Writes the header and syncs the file to disk. The file keeps its temporary name.
static inline void shard_writer_sync(ShardWriter *w) {
    int32_t header[3];
    header[0] = w->token_bytes == 2 ? SHARD_MAGIC16 : SHARD_MAGIC32;
    header[1] = w->token_bytes == 2 ? SHARD_VERSION16 : SHARD_VERSION32;
    header[2] = (int32_t)w->count;
    if (fseeko(w->file.f, 0, SEEK_SET) != 0)
        die("cannot write %s: %s; check the free disk space and ulimit -f", w->file.tmp, strerror(errno));
    atomic_write(&w->file, header, sizeof(header));
    atomic_sync(&w->file);
}

// Completes the shard and renames it to its final name.
static inline void shard_writer_commit(ShardWriter *w) {
    if (w->file.f != NULL) shard_writer_sync(w);
    atomic_commit(&w->file);
}

// The answer file SHARD.answers of a recall shard SHARD.bin lists the tokens that answer a question. It holds
// int64 {magic 20260802, version 1, count, seq_len} and then `count` pairs {index, distance}, ascending by
// index.
typedef struct {
    int64_t index;    // of the answer token in the shard
    int64_t distance; // in tokens, from the thing in the last earlier statement about the same name
} Answer;

typedef struct {
    int64_t count;
    int64_t seq_len; // a document has seq_len + 1 tokens
    Answer *answers; // [count]
} Answers;

// Writes the name of a shard's answer file to out [PATH_BYTES].
static inline void answers_path(char *out, const char *shard_path) {
    size_t n = strlen(shard_path);
    if (n > 4 && strcmp(shard_path + n - 4, ".bin") == 0) n -= 4;
    if (n + sizeof(".answers") > PATH_BYTES)
        die("the file name has %zu characters: choose one of at most %d", n, PATH_BYTES - 9);
    memcpy(out, shard_path, n);
    memcpy(out + n, ".answers", sizeof(".answers"));
}

static inline void answers_free(Answers *a) {
    free(a->answers);
    memset(a, 0, sizeof(*a));
}

// Reads the answer file of a shard, which may be closed. Returns 0, or 1 if the shard has none; dies if the
// file is invalid. Every index is in [1, tokens of the shard), and every distance in [1, index].
static inline int answers_load(Answers *a, const Shard *shard) {
    char path[PATH_BYTES];
    int64_t header[4];
    struct stat st;
    memset(a, 0, sizeof(*a));
    answers_path(path, shard->path);
    FILE *f = input_fopen("", path, &st);
    if (f == NULL && errno == ENOENT) return 1;
    if (f == NULL) die("cannot read %s: %s; check its permissions", path, strerror(errno));
    if (fread(header, sizeof(header), 1, f) != 1) {
        die("%s is truncated: %lld bytes found, its header alone has %zu; make the data again", path,
            (long long)st.st_size, sizeof(header));
    }
    if (header[0] != ANSWERS_MAGIC || header[1] != ANSWERS_VERSION) {
        die("%s is not an answer file: magic %lld, version %lld found, %d and %d expected; make the data "
            "again",
            path, (long long)header[0], (long long)header[1], ANSWERS_MAGIC, ANSWERS_VERSION);
    }
    int64_t size = (int64_t)st.st_size - (int64_t)sizeof(header);
    if (header[2] < 0 || header[2] >= shard->count || header[3] < 1 || header[3] >= shard->count) {
        die("%s is invalid: %lld answers, documents of %lld + 1 tokens, but its shard has %lld tokens; make "
            "the data again",
            path, (long long)header[2], (long long)header[3], (long long)shard->count);
    }
    if (header[2] != size / 16 || size % 16 != 0) {
        die("%s has the wrong size: %lld answers need %lld bytes, %lld found; make the data again", path,
            (long long)header[2], (long long)(32 + 16 * header[2]), (long long)st.st_size);
    }
    a->count = header[2];
    a->seq_len = header[3];
    a->answers = (Answer *)xmalloc((size_t)a->count * sizeof(Answer));
    if (fread(a->answers, sizeof(Answer), (size_t)a->count, f) != (size_t)a->count) {
        die("cannot read %s: check its disk, or make the data again", path);
    }
    fclose(f);
    for (int64_t i = 0, last = 0; i < a->count; i++) {
        int64_t index = a->answers[i].index, distance = a->answers[i].distance;
        if (index <= last || index >= shard->count || distance < 1 || distance > index) {
            die("%s is invalid: answer %lld has index %lld and distance %lld; %lld < index < %lld and 1 <= "
                "distance <= index expected; make the data again",
                path, (long long)i, (long long)index, (long long)distance, (long long)last,
                (long long)shard->count);
        }
        last = index;
    }
    return 0;
}

// Writes the answer file of a shard.
static inline void answers_save(const Answers *a, const char *shard_path) {
    char path[PATH_BYTES];
    AtomicFile file;
    int64_t header[4] = {ANSWERS_MAGIC, ANSWERS_VERSION, 0, 0};
    header[2] = a->count;
    header[3] = a->seq_len;
    answers_path(path, shard_path);
    atomic_open(&file, path);
    atomic_write(&file, header, sizeof(header));
    atomic_write(&file, a->answers, (size_t)a->count * sizeof(Answer));
    atomic_commit(&file);
}

#endif
