// checkpoint.h: reads and writes checkpoints, one file DIR/ckpt_00001234.bin each. Both trainers use the same
// format, little-endian:
//   header, 4096 bytes: magic, version, counts, all model fields, all of TrainState, and in the last 8 bytes
//     a checksum of the bytes before
//   params, then AdamW's m, then v: n fp32 each, in the order of param_table (config.h); in version 1 each
//     layer's wgate was right before its wo
//   3 tables of 64-bit checksums, for params, m and v: one for each 1 MiB chunk of the array (the last chunk
//     may be shorter)
// No chunk spans two arrays. So several processes can write chunks in any order, and a reader of the weights
// verifies only their chunks. The checksums detect every flipped byte, and the counts every truncation.
#ifndef LLMC_CHECKPOINT_H
#define LLMC_CHECKPOINT_H
#include "utils.h"
#include "config.h"
#include "input.h"
#include <dirent.h>

#define CHECKPOINT_MAGIC 0x54504B4341534E0All // "\nNSACKPT"
#define CHECKPOINT_VERSION 2                  // version 1 can be read, too
#define CHECKPOINT_HEADER_BYTES 4096
#define CHECKPOINT_CHUNK_BYTES 1048576 // bytes per checksum
#define CHECKPOINT_CHUNK_FLOATS (CHECKPOINT_CHUNK_BYTES / 4)
#define CHECKPOINT_MSG_BYTES (PATH_BYTES + 512) // size of an error message's buffer

// Identifies the training data, so that a resumed run notices other data. Names are without folders.
typedef struct {
    int64_t shards;           // number of training shards; 0: unknown, a checkpoint of an older program
    int64_t tokens;           // in all shards
    uint64_t names;           // checksum of the names and token counts of the shards
    uint64_t contents;        // checksum of samples of every shard
    uint64_t tokenizer;       // checksum of tokenizer.bin; 0: none
    char first[64], last[64]; // names of the first and the last shard, perhaps cut
} DataIdentity;

#define OUTLIER_WINDOW 128
// The last values of a quantity, for its z-score (schedule.h). Value number i is at values[i %
// OUTLIER_WINDOW].
typedef struct {
    int64_t count; // of all values so far
    float values[OUTLIER_WINDOW];
} OutlierWindow;

// The state of a run. A resumed run takes all other flags from its command line.
typedef struct {
    int64_t step;          // finished steps
    int64_t tokens;        // tokens trained on
    int64_t epoch;         // of the data loader
    int64_t position;      // samples of this epoch that all processes have consumed
    int64_t epoch_samples; // samples per epoch; another number shows that the shards or -t changed
    int64_t seed;
    int64_t seq_len;     // tokens per training sequence
    int64_t total_batch; // tokens per step
    int64_t draws;       // random numbers that text sampling has consumed
    // the rest is zero in checkpoints of older programs
    DataIdentity data;
    double lr;                   // maximum learning rate; 0: unknown
    int64_t warmup;              // steps
    OutlierWindow losses, norms; // of -sl and -sg
} TrainState;
#define TRAIN_STATE_FIELDS ((int)(offsetof(TrainState, data) / sizeof(int64_t)))
#define TRAIN_STATE_REST_BYTES (sizeof(TrainState) - offsetof(TrainState, data))
#define CHECKPOINT_REST_WORD 64 // of the header; the rest of TrainState begins there

// Returns a 64-bit checksum of n bytes, which depends on the seed. Each step is a bijection of its 64-bit
// word, so a change of a single word always changes the checksum.
static inline uint64_t checksum(const void *data, size_t n, uint64_t seed) {
    const unsigned char *p = (const unsigned char *)data;
    uint64_t lane[4], word;
    for (int k = 0; k < 4; k++) lane[k] = rng_mix(seed + (uint64_t)k + 1);
    size_t left = n;
    for (; left >= 32; left -= 32) {
        for (int k = 0; k < 4; k++, p += 8) {
            memcpy(&word, p, 8);
            uint64_t x = (lane[k] ^ word) * 0x9E3779B97F4A7C15ull;
            lane[k] = x << 29 | x >> 35;
        }
    }
    uint64_t h = rng_mix(seed ^ n);
    for (int k = 0; k < 4; k++) h = rng_mix(h ^ lane[k]) + 0x9E3779B97F4A7C15ull;
    while (left > 0) {
        size_t tail_bytes = left < 8 ? left : 8;
        word = 0;
        memcpy(&word, p, tail_bytes);
        h = rng_mix(h ^ word) + 0x9E3779B97F4A7C15ull;
        p += tail_bytes, left -= tail_bytes;
    }
    return h;
}

// Returns the checksum seed of a chunk, so that swapped chunks are detected. array: 0 params, 1 m, 2 v.
static inline uint64_t checkpoint_chunk_seed(int array, int64_t chunk) {
    return (uint64_t)array << 56 | (uint64_t)chunk;
}

// Returns the number of chunks of an array of n fp32.
static inline int64_t checkpoint_num_chunks(int64_t n) {
    return (4 * n + CHECKPOINT_CHUNK_BYTES - 1) / CHECKPOINT_CHUNK_BYTES;
}

// Returns the file size in bytes of a checkpoint with n parameters.
static inline int64_t checkpoint_bytes(int64_t n) {
    return CHECKPOINT_HEADER_BYTES + 12 * n + 24 * checkpoint_num_chunks(n);
}

// Writes the path of the checkpoint after `step` steps.
static inline void checkpoint_path(char *path, size_t size, const char *dir, int64_t step) {
    if (snprintf(path, size, "%s/ckpt_%08lld.bin", dir, (long long)step) >= (int)size)
        die("-o %s: the name is too long; choose a shorter path", dir);
}

// ----------------------------------------------------------------------------
// The folder

// Returns the step in a checkpoint's file name, or -1 for another name. tmp 1: for names of unfinished files.
static inline int64_t checkpoint_parse_name(const char *name, int tmp) {
    if (strncmp(name, "ckpt_", 5) != 0) return -1;
    size_t digits = strspn(name + 5, "0123456789");
    if (digits < 8 || digits > 18 || strcmp(name + 5 + digits, tmp ? ".bin.tmp" : ".bin") != 0) return -1;
    return strtoll(name + 5, NULL, 10);
}

static inline int checkpoint_compare_descending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

// Lists the steps of the checkpoints in dir, newest first, in *steps, which the caller frees. Returns their
// number; 0 if the folder does not exist.
static inline int64_t checkpoint_list(const char *dir, int64_t **steps) {
    int64_t count = 0, capacity = 16;
    *steps = (int64_t *)xmalloc((size_t)capacity * sizeof **steps);
    DIR *folder = opendir(dir);
    if (!folder && errno != ENOENT)
        die("-o %s: cannot open the folder: %s; choose another folder", dir, strerror(errno));
    struct dirent *entry;
    while (folder && (entry = readdir(folder)) != NULL) {
        int64_t step = checkpoint_parse_name(entry->d_name, 0);
        if (step < 0) continue;
        if (count == capacity) {
            capacity *= 2;
            int64_t *grown = (int64_t *)xmalloc((size_t)capacity * sizeof *grown);
            memcpy(grown, *steps, (size_t)count * sizeof *grown);
            free(*steps);
            *steps = grown;
        }
        (*steps)[count++] = step;
    }
    if (folder) closedir(folder);
    qsort(*steps, (size_t)count, sizeof **steps, checkpoint_compare_descending);
    return count;
}

// Prepares the output folder of a run: creates it and removes the unfinished checkpoints of a killed run.
// Dies if the folder is not writable, or if it holds checkpoints and resume is 0.
static inline void checkpoint_dir_check(const char *dir, int resume) {
    make_dirs(dir);
    int64_t *steps, count = checkpoint_list(dir, &steps);
    if (count > 0 && !resume)
        die("-o %s: holds checkpoints up to step %lld; resume with -y 1, or choose another folder", dir,
            (long long)steps[0]);
    free(steps);
    DIR *folder = opendir(dir);
    if (!folder) die("-o %s: cannot open the folder: %s; choose another folder", dir, strerror(errno));
    struct dirent *entry;
    char path[PATH_BYTES];
    while ((entry = readdir(folder)) != NULL) {
        if (checkpoint_parse_name(entry->d_name, 1) < 0) continue;
        if (snprintf(path, sizeof path, "%s/%s", dir, entry->d_name) < (int)sizeof path) unlink(path);
    }
    closedir(folder);
    if (snprintf(path, sizeof path, "%s/.writable-XXXXXX", dir) >= (int)sizeof path)
        die("-o %s: the name is too long; choose a shorter path", dir);
    int fd = mkstemp(path);
    if (fd < 0) die("-o %s: cannot write to the folder: %s; choose another folder", dir, strerror(errno));
    close(fd);
    unlink(path);
}

// ----------------------------------------------------------------------------
// Writing

// Writes 64-bit word number `word` of a header.
static inline void checkpoint_put_word(unsigned char *header, int word, int64_t value) {
    memcpy(header + 8 * word, &value, 8);
}

// Returns 64-bit word number `word` of a header.
static inline int64_t checkpoint_get_word(const unsigned char *header, int word) {
    int64_t value;
    memcpy(&value, header + 8 * word, 8);
    return value;
}

// Fills a header [CHECKPOINT_HEADER_BYTES]. Words: 0 magic, 1 version, 2 number of parameters n, 3 number of
// model fields, 4 number of TrainState fields; from word 8 the model fields as doubles, then the fields of
// TrainState before `data`; from word 64 the rest of TrainState; word 511 checksum.
static inline void checkpoint_header(unsigned char *header, const ModelConfig *c, const TrainState *state,
                                     int64_t n) {
    int count;
    const ModelField *f = model_fields(&count);
    memset(header, 0, CHECKPOINT_HEADER_BYTES);
    checkpoint_put_word(header, 0, CHECKPOINT_MAGIC);
    checkpoint_put_word(header, 1, CHECKPOINT_VERSION);
    checkpoint_put_word(header, 2, n);
    checkpoint_put_word(header, 3, count);
    checkpoint_put_word(header, 4, TRAIN_STATE_FIELDS);
    for (int i = 0; i < count; i++) {
        double value = model_field_get(c, &f[i]);
        memcpy(header + 8 * (8 + i), &value, 8);
    }
    memcpy(header + 8 * (8 + count), state, 8 * TRAIN_STATE_FIELDS);
    memcpy(header + 8 * CHECKPOINT_REST_WORD, &state->data, TRAIN_STATE_REST_BYTES);
    checkpoint_put_word(header, 511, (int64_t)checksum(header, CHECKPOINT_HEADER_BYTES - 8, 0));
}

// Opens DIR/ckpt_<state->step>.bin.tmp and writes the header. One process calls it; then all processes write
// their parts with checkpoint_write_part; then the first process calls atomic_commit.
static inline void checkpoint_begin(AtomicFile *file, const char *dir, const ModelConfig *c,
                                    const TrainState *state, int64_t n) {
    unsigned char header[CHECKPOINT_HEADER_BYTES];
    char path[PATH_BYTES];
    checkpoint_header(header, c, state, n);
    checkpoint_path(path, sizeof path, dir, state->step);
    atomic_open(file, path);
    atomic_write(file, header, sizeof header);
    if (fflush(file->f) != 0)
        die("cannot write %s: %s; check the free disk space", file->tmp, strerror(errno));
}

// Writes data [bytes] at `offset` of an open file; dies if it cannot. `path` is for the message.
static inline void checkpoint_write_at(int fd, const char *path, const void *data, size_t bytes,
                                       int64_t offset) {
    const char *p = (const char *)data;
    while (bytes > 0) {
        ssize_t n = pwrite(fd, p, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            die("cannot write %s: %s; check the free disk space", path, strerror(n < 0 ? errno : ENOSPC));
        p += n, offset += n, bytes -= (size_t)n;
    }
}

// Writes elements [begin, begin + count) of an array (0 params, 1 m, 2 v) of n fp32, and their checksums.
// begin is a multiple of CHECKPOINT_CHUNK_FLOATS; so is count, except at the array's end.
static inline void checkpoint_write_part(int fd, const char *path, int array, int64_t n, int64_t begin,
                                         int64_t count, const float *data) {
    int64_t first_chunk = begin / CHECKPOINT_CHUNK_FLOATS, total_chunks = checkpoint_num_chunks(n);
    int64_t num_chunks = (count + CHECKPOINT_CHUNK_FLOATS - 1) / CHECKPOINT_CHUNK_FLOATS;
    uint64_t *checksums = (uint64_t *)xmalloc((size_t)num_chunks * sizeof *checksums);
    for (int64_t i = 0; i < num_chunks; i++) {
        int64_t offset = i * CHECKPOINT_CHUNK_FLOATS, left = count - offset;
        checksums[i] = checksum(data + offset,
                                4 * (size_t)(left < CHECKPOINT_CHUNK_FLOATS ? left : CHECKPOINT_CHUNK_FLOATS),
                                checkpoint_chunk_seed(array, first_chunk + i));
    }
    checkpoint_write_at(fd, path, data, 4 * (size_t)count, CHECKPOINT_HEADER_BYTES + 4 * (n * array + begin));
    checkpoint_write_at(fd, path, checksums, (size_t)num_chunks * sizeof *checksums,
                        CHECKPOINT_HEADER_BYTES + 12 * n + 8 * (total_chunks * array + first_chunk));
    free(checksums);
}

// Writes DIR/ckpt_<state->step>.bin atomically, from params, m and v [n]; dies if it cannot.
static inline void checkpoint_save(const char *dir, const ModelConfig *c, const TrainState *state,
                                   const float *params, const float *m, const float *v, int64_t n) {
    AtomicFile file;
    const float *arrays[3] = {params, m, v};
    checkpoint_begin(&file, dir, c, state, n);
    for (int a = 0; a < 3; a++) checkpoint_write_part(fileno(file.f), file.tmp, a, n, 0, n, arrays[a]);
    atomic_commit(&file);
}

// ----------------------------------------------------------------------------
// Reading

// Opens a checkpoint for reading. Returns NULL with one line in msg [CHECKPOINT_MSG_BYTES] if it cannot.
static inline FILE *checkpoint_fopen(const char *path, char *msg) {
    struct stat st;
    int fd = input_try_open(path, &st);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "rb");
    if (!f)
        snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: cannot open the checkpoint: %s%s", path,
                 errno ? strerror(errno) : "it is not a file but ", errno ? "" : file_type_name(st.st_mode));
    return f;
}

// Reads and checks the header and the file's size. Returns 0, or -1 with one line in msg
// [CHECKPOINT_MSG_BYTES] that names the file.
static inline int checkpoint_read_header(const char *path, ModelConfig *c, TrainState *state, char *msg) {
    unsigned char header[CHECKPOINT_HEADER_BYTES];
    FILE *f = checkpoint_fopen(path, msg);
    if (!f) return -1;
    size_t bytes_read = fread(header, 1, sizeof header, f);
    struct stat st;
    int failed = ferror(f) || fstat(fileno(f), &st) != 0;
    int reason = errno;
    fclose(f);
    if (failed) {
        snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: cannot read the checkpoint: %s", path, strerror(reason));
        return -1;
    }
    if (bytes_read < 16 || checkpoint_get_word(header, 0) != CHECKPOINT_MAGIC) {
        snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: not a checkpoint", path);
        return -1;
    }
    if (bytes_read < sizeof header) {
        snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: truncated: %lld bytes, less than its header", path,
                 (long long)st.st_size);
        return -1;
    }
    int64_t version = checkpoint_get_word(header, 1);
    int count, intact = (uint64_t)checkpoint_get_word(header, 511) ==
                        checksum(header, CHECKPOINT_HEADER_BYTES - 8, 0);
    const ModelField *fields = model_fields(&count);
    if (intact && (version < 1 || version > CHECKPOINT_VERSION || checkpoint_get_word(header, 3) != count ||
                   checkpoint_get_word(header, 4) != TRAIN_STATE_FIELDS)) {
        snprintf(msg, CHECKPOINT_MSG_BYTES,
                 "%s: checkpoint version %lld, this program reads versions 1 to %d", path, (long long)version,
                 CHECKPOINT_VERSION);
        return -1;
    }
    if (!intact) {
        snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: damaged: its header has a wrong checksum", path);
        return -1;
    }
    memset(c, 0, sizeof *c);
    for (int i = 0; i < count; i++) {
        double value;
        memcpy(&value, header + 8 * (8 + i), 8);
        model_field_set(c, &fields[i], value);
    }
    memcpy(state, header + 8 * (8 + count), 8 * TRAIN_STATE_FIELDS);
    memcpy(&state->data, header + 8 * CHECKPOINT_REST_WORD, TRAIN_STATE_REST_BYTES);
    int64_t total, num_params = checkpoint_get_word(header, 2);
    char config_msg[256];
    if (config_check(c, config_msg, sizeof config_msg) != 0) {
        snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: invalid model: %s", path, config_msg);
        return -1;
    }
    param_table(c, NULL, &total);
    if (num_params != total) {
        snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: %lld parameters found, its model has %lld", path,
                 (long long)num_params, (long long)total);
        return -1;
    }
    if (st.st_size != checkpoint_bytes(num_params)) {
        snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: %s: %lld bytes found, %lld expected", path,
                 st.st_size < checkpoint_bytes(num_params) ? "truncated" : "too long", (long long)st.st_size,
                 (long long)checkpoint_bytes(num_params));
        return -1;
    }
    return 0;
}

// Reads elements [begin, begin + count) of an array (0 params, 1 m, 2 v) of n fp32, in the file's order of
// tensors, into dest, and verifies the checksums of their chunks. dest NULL: only verifies. Returns 0, or -1
// with one line in msg [CHECKPOINT_MSG_BYTES].
static inline int checkpoint_read_stored(FILE *f, const char *path, int array, int64_t n, int64_t begin,
                                         int64_t count, float *dest, char *msg) {
    static const char *const names[3] = {"parameters", "AdamW m", "AdamW v"};
    const int64_t first_chunk = begin / CHECKPOINT_CHUNK_FLOATS;
    const int64_t num_chunks =
        count > 0 ? (begin + count + CHECKPOINT_CHUNK_FLOATS - 1) / CHECKPOINT_CHUNK_FLOATS - first_chunk : 0;
    size_t table_bytes = (size_t)num_chunks * sizeof(uint64_t);
    uint64_t *expected = (uint64_t *)xmalloc(table_bytes);
    float *buffer = (float *)xmalloc(CHECKPOINT_CHUNK_BYTES);
    int ok =
        fseeko(
            f,
            (off_t)(CHECKPOINT_HEADER_BYTES + 12 * n + 8 * (checkpoint_num_chunks(n) * array + first_chunk)),
            SEEK_SET) == 0 &&
        fread(expected, 1, table_bytes, f) == table_bytes &&
        fseeko(f, (off_t)(CHECKPOINT_HEADER_BYTES + 4 * n * array + first_chunk * CHECKPOINT_CHUNK_BYTES),
               SEEK_SET) == 0;
    if (!ok)
        snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: cannot read the checkpoint: %s", path,
                 ferror(f) ? strerror(errno) : "it is truncated");
    for (int64_t i = first_chunk; ok && i < first_chunk + num_chunks; i++) {
        const int64_t chunk_begin = i * CHECKPOINT_CHUNK_FLOATS, left = n - chunk_begin;
        const size_t floats = (size_t)(left < CHECKPOINT_CHUNK_FLOATS ? left : CHECKPOINT_CHUNK_FLOATS);
        const int entire = chunk_begin >= begin && chunk_begin + (int64_t)floats <= begin + count;
        float *data = dest && entire ? dest + (chunk_begin - begin) : buffer;
        if (fread(data, 4, floats, f) != floats) {
            ok = 0;
            snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: cannot read the checkpoint: %s", path,
                     ferror(f) ? strerror(errno) : "it is truncated");
        } else if (checksum(data, 4 * floats, checkpoint_chunk_seed(array, i)) != expected[i - first_chunk]) {
            ok = 0;
            snprintf(msg, CHECKPOINT_MSG_BYTES,
                     "%s: damaged: wrong checksum of the %s in the 1 MiB chunk at byte %lld", path,
                     names[array],
                     (long long)(CHECKPOINT_HEADER_BYTES + 4 * n * array + i * CHECKPOINT_CHUNK_BYTES));
        } else if (dest && !entire) {
            int64_t copy_begin = chunk_begin > begin ? chunk_begin : begin,
                    copy_end = chunk_begin + (int64_t)floats;
            if (copy_end > begin + count) copy_end = begin + count;
            memcpy(dest + (copy_begin - begin), data + (copy_begin - chunk_begin),
                   4 * (size_t)(copy_end - copy_begin));
        }
    }
    free(expected);
    free(buffer);
    return ok ? 0 : -1;
}

// Sets offsets [count] to where version 1 had the tensors of `table` [count]: wgate was right before wo.
static inline void checkpoint_offsets_v1(const ParamTensor *table, int64_t count, int64_t *offsets) {
    int64_t end = 0, gate = -1;
    for (int64_t i = 0; i < count; i++) {
        if (param_is(&table[i], "wgate")) {
            gate = i;
            continue;
        }
        if (param_is(&table[i], "wo") && gate >= 0) offsets[gate] = end, end += table[gate].size, gate = -1;
        offsets[i] = end, end += table[i].size;
    }
}

// Reads elements [begin, begin + count) of an array (0 params, 1 m, 2 v) of model `c`, in the order of
// param_table, from a checkpoint of any version whose header is intact. Otherwise as checkpoint_read_stored.
static inline int checkpoint_read_part(FILE *f, const char *path, const ModelConfig *c, int array,
                                       int64_t begin, int64_t count, float *dest, char *msg) {
    int64_t words[2], n, num_tensors = param_table(c, NULL, &n);
    if (fseeko(f, 0, SEEK_SET) != 0 || fread(words, sizeof words, 1, f) != 1) {
        snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: cannot read the checkpoint: %s", path,
                 ferror(f) ? strerror(errno) : "it is truncated");
        return -1;
    }
    if (words[1] == CHECKPOINT_VERSION)
        return checkpoint_read_stored(f, path, array, n, begin, count, dest, msg);
    ParamTensor *table = (ParamTensor *)xcalloc((size_t)num_tensors, sizeof *table);
    int64_t *offsets = (int64_t *)xcalloc((size_t)num_tensors, sizeof *offsets);
    int error = 0;
    param_table(c, table, &n);
    checkpoint_offsets_v1(table, num_tensors, offsets);
    for (int64_t i = 0; i < num_tensors && error == 0; i++) {
        const ParamTensor *t = &table[i];
        int64_t first = begin > t->offset ? begin : t->offset, last = t->offset + t->size;
        if (last > begin + count) last = begin + count;
        if (first < last)
            error = checkpoint_read_stored(f, path, array, n, offsets[i] + first - t->offset, last - first,
                                           dest + (first - begin), msg);
    }
    free(table), free(offsets);
    return error;
}

// Opens a checkpoint of model `c` and fills *state. Dies if the header is damaged or the model differs,
// except in RoPE's frequencies.
static inline FILE *checkpoint_open(const char *path, const ModelConfig *c, TrainState *state) {
    ModelConfig stored;
    char msg[CHECKPOINT_MSG_BYTES], stored_text[64], own_text[64];
    int count;
    const ModelField *f = model_fields(&count);
    if (checkpoint_read_header(path, &stored, state, msg) != 0) die("%s; choose another checkpoint", msg);
    for (int i = 0; i < count; i++) {
        double stored_value = model_field_get(&stored, &f[i]), own_value = model_field_get(c, &f[i]);
        if (stored_value == own_value || model_field_is_rope(&f[i])) continue;
        model_field_print(&f[i], stored_value, stored_text, sizeof stored_text);
        model_field_print(&f[i], own_value, own_text, sizeof own_text);
        die("%s: a checkpoint of another model: its %s is %s, not %s; use one of the same model", path,
            f[i].name, stored_text, own_text);
    }
    FILE *file = checkpoint_fopen(path, msg);
    if (!file) die("%s; check the path", msg);
    return file;
}

// Reads params, m and v [n]; m and v may be NULL to read only the weights. Dies as checkpoint_open does, and
// if the file is damaged.
static inline void checkpoint_load(const char *path, const ModelConfig *c, TrainState *state, float *params,
                                   float *m, float *v, int64_t n) {
    char msg[CHECKPOINT_MSG_BYTES];
    int64_t total;
    FILE *file = checkpoint_open(path, c, state);
    param_table(c, NULL, &total);
    if (n != total)
        die("%s: has %lld parameters, not %lld; use a checkpoint of the same model", path, (long long)total,
            (long long)n);
    float *arrays[3] = {params, m, v};
    for (int a = 0; a < 3; a++)
        if (arrays[a] && checkpoint_read_part(file, path, c, a, 0, n, arrays[a], msg) != 0)
            die("%s; choose another checkpoint", msg);
    fclose(file);
}

// Reads a whole checkpoint and verifies all checksums. Returns 0, or -1 with one line in msg
// [CHECKPOINT_MSG_BYTES].
static inline int checkpoint_verify(const char *path, char *msg) {
    ModelConfig c;
    TrainState state;
    int64_t n;
    if (checkpoint_read_header(path, &c, &state, msg) != 0) return -1;
    param_table(&c, NULL, &n);
    FILE *f = checkpoint_fopen(path, msg);
    if (!f) return -1;
    int error = 0;
    for (int a = 0; a < 3 && error == 0; a++) error = checkpoint_read_stored(f, path, a, n, 0, n, NULL, msg);
    fclose(f);
    return error;
}

// Finds the newest intact checkpoint in dir. Returns 1 and its path [PATH_BYTES], or 0 if dir holds no
// checkpoint. Skips a damaged checkpoint with a warning; dies if all are damaged.
static inline int checkpoint_newest(const char *dir, char *path) {
    int64_t *steps, count = checkpoint_list(dir, &steps);
    char msg[CHECKPOINT_MSG_BYTES];
    int found = 0;
    for (int64_t i = 0; i < count && !found; i++) {
        checkpoint_path(path, PATH_BYTES, dir, steps[i]);
        found = checkpoint_verify(path, msg) == 0;
        if (!found) fprintf(stderr, "warning: skipped: %s\n", msg);
    }
    free(steps);
    if (count > 0 && !found)
        die("-o %s: none of its %lld checkpoints is intact; choose another folder, or remove them", dir,
            (long long)count);
    return found;
}

// ----------------------------------------------------------------------------
// Removing old checkpoints

// Returns whether the checkpoint is intact. Reads a file once: it remembers the last 64 intact ones. fresh 1:
// this process has just written the file, which needs no reading.
static inline int checkpoint_is_good(const char *path, int fresh) {
    static struct stat known[64];
    static int next;
    char msg[CHECKPOINT_MSG_BYTES];
    struct stat st;
    if (stat(path, &st) != 0) return 0;
    for (int i = 0; i < 64; i++)
        if (known[i].st_ino == st.st_ino && known[i].st_dev == st.st_dev && known[i].st_size == st.st_size &&
            known[i].st_mtim.tv_sec == st.st_mtim.tv_sec && known[i].st_mtim.tv_nsec == st.st_mtim.tv_nsec)
            return 1;
    if (!fresh && checkpoint_verify(path, msg) != 0) return 0;
    known[next++ % 64] = st;
    return 1;
}

// Keeps the newest `keep` intact checkpoints up to `step`, the one just written, and removes older ones.
// Damaged ones between them stay and do not count; nor do checkpoints of later steps, which remain after a
// resume from an older checkpoint.
static inline void checkpoint_prune(const char *dir, int64_t keep, int64_t step) {
    int64_t *steps, count = checkpoint_list(dir, &steps), kept = 0;
    char path[PATH_BYTES];
    for (int64_t i = 0; i < count; i++) {
        if (steps[i] > step) continue;
        checkpoint_path(path, sizeof path, dir, steps[i]);
        if (kept < keep)
            kept += checkpoint_is_good(path, steps[i] == step);
        else if (unlink(path) != 0)
            fprintf(stderr, "warning: cannot remove %s: %s; remove it yourself\n", path, strerror(errno));
    }
    free(steps);
}
#endif
