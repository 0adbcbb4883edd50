// checkpoint.h: reads and writes checkpoints, one file DIR/ckpt_00001234.bin each. Both trainers use the same
// format, little-endian:
//   header, 4096 bytes: magic, version, counts, all model fields, all of TrainState, and in the last 8 bytes
//     a checksum of the bytes before
//   params, then AdamW's m, then v: n fp32 each, in the order of param_table (config.h)
//   a table of 64-bit checksums for each array: one for each 1 MiB chunk of it (the last chunk may be
//   shorter)
// A file of weights alone has no m and v, and one table. A run can start from it, but not resume. Version 3
// had no field full-every. Version 2 also always had three arrays, and no bgate; in version 1 each layer's
// wgate was also right before its wo. No chunk spans two arrays. So several processes can write chunks in any
// order, and a reader of the weights verifies only their chunks. The checksums detect every flipped byte, and
// the counts every truncation.
#ifndef LLMC_CHECKPOINT_H
#define LLMC_CHECKPOINT_H
#include "utils.h"
#include "config.h"
#include "input.h"
#include <dirent.h>

#define CHECKPOINT_MAGIC 0x54504B4341534E0All // "\nNSACKPT"
#define CHECKPOINT_VERSION 4                  // versions 1 to 3 can be read, too
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
    int64_t due;                 // bits: 1 the validation, 2 the text sample of `step` has yet to run
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

// Returns the offset in bytes of element `index` of an array of n fp32.
static inline int64_t checkpoint_offset(int64_t n, int array, int64_t index) {
    return CHECKPOINT_HEADER_BYTES + 4 * (n * array + index);
}

// Returns the offset in bytes of the checksum of a chunk, in a file of `arrays` arrays of n fp32. The first
// chunk behind the last array gives the size of the file.
static inline int64_t checkpoint_checksum_offset(int64_t n, int arrays, int array, int64_t chunk) {
    return checkpoint_offset(n, arrays, 0) + 8 * (checkpoint_num_chunks(n) * array + chunk);
}

// Returns the file size in bytes of a checkpoint with `arrays` arrays of n fp32.
static inline int64_t checkpoint_bytes(int64_t n, int arrays) {
    return checkpoint_checksum_offset(n, arrays, arrays, 0);
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

// Returns the number of model fields in a checkpoint of a version. Fields that it has not are 0.
static inline int checkpoint_num_fields(int64_t version) {
    int count;
    model_fields(&count);
    return version < 4 ? count - 1 : count;
}

// Returns 64-bit word number `word` of a header.
static inline int64_t checkpoint_get_word(const unsigned char *header, int word) {
    int64_t value;
    memcpy(&value, header + 8 * word, 8);
    return value;
}

// Fills a header [CHECKPOINT_HEADER_BYTES]. Words: 0 magic, 1 version, 2 number of parameters n, 3 number of
// model fields, 4 number of TrainState fields, 5 number of arrays; from word 8 the model fields as doubles,
// then the fields of TrainState before `data`; from word 64 the rest of TrainState; word 511 checksum.
static inline void checkpoint_header(unsigned char *header, const ModelConfig *c, const TrainState *state,
                                     int64_t n, int arrays) {
    int count;
    const ModelField *f = model_fields(&count);
    memset(header, 0, CHECKPOINT_HEADER_BYTES);
    checkpoint_put_word(header, 0, CHECKPOINT_MAGIC);
    checkpoint_put_word(header, 1, CHECKPOINT_VERSION);
    checkpoint_put_word(header, 2, n);
    checkpoint_put_word(header, 3, count);
    checkpoint_put_word(header, 4, TRAIN_STATE_FIELDS);
    checkpoint_put_word(header, 5, arrays);
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
                                    const TrainState *state, int64_t n, int arrays) {
    unsigned char header[CHECKPOINT_HEADER_BYTES];
    char path[PATH_BYTES];
    checkpoint_header(header, c, state, n, arrays);
    checkpoint_path(path, sizeof path, dir, state->step);
    atomic_open(file, path);
    atomic_write(file, header, sizeof header);
    if (fflush(file->f) != 0)
        die("cannot write %s: %s; check the free disk space and ulimit -f", file->tmp, strerror(errno));
}

// Writes data [bytes] at `offset` of an open file; dies if it cannot. `path` is for the message.
static inline void checkpoint_write_at(int fd, const char *path, const void *data, size_t bytes,
                                       int64_t offset) {
    const char *p = (const char *)data;
    while (bytes > 0) {
        ssize_t n = pwrite(fd, p, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            die("cannot write %s: %s; check the free disk space and ulimit -f", path,
                strerror(n < 0 ? errno : ENOSPC));
        p += n, offset += n, bytes -= (size_t)n;
    }
}

// Writes elements [begin, begin + count) of one of `arrays` arrays (0 params, 1 m, 2 v) of n fp32, and their
// checksums. begin is a multiple of CHECKPOINT_CHUNK_FLOATS; so is count, except at the array's end.
static inline void checkpoint_write_part(int fd, const char *path, int arrays, int array, int64_t n,
                                         int64_t begin, int64_t count, const float *data) {
    int64_t first_chunk = begin / CHECKPOINT_CHUNK_FLOATS;
    int64_t num_chunks = (count + CHECKPOINT_CHUNK_FLOATS - 1) / CHECKPOINT_CHUNK_FLOATS;
    uint64_t *checksums = (uint64_t *)xmalloc((size_t)num_chunks * sizeof *checksums);
    for (int64_t i = 0; i < num_chunks; i++) {
        int64_t offset = i * CHECKPOINT_CHUNK_FLOATS, left = count - offset;
        checksums[i] = checksum(data + offset,
                                4 * (size_t)(left < CHECKPOINT_CHUNK_FLOATS ? left : CHECKPOINT_CHUNK_FLOATS),
                                checkpoint_chunk_seed(array, first_chunk + i));
    }
    checkpoint_write_at(fd, path, data, 4 * (size_t)count, checkpoint_offset(n, array, begin));
    checkpoint_write_at(fd, path, checksums, (size_t)num_chunks * sizeof *checksums,
                        checkpoint_checksum_offset(n, arrays, array, first_chunk));
    free(checksums);
}

// Writes DIR/ckpt_<state->step>.bin atomically, from params, m and v [n]; m and v NULL: the weights alone.
// Dies if it cannot.
static inline void checkpoint_save(const char *dir, const ModelConfig *c, const TrainState *state,
                                   const float *params, const float *m, const float *v, int64_t n) {
    AtomicFile file;
    const float *data[3] = {params, m, v};
    const int arrays = m ? 3 : 1;
    checkpoint_begin(&file, dir, c, state, n, arrays);
    for (int a = 0; a < arrays; a++)
        checkpoint_write_part(fileno(file.f), file.tmp, arrays, a, n, 0, n, data[a]);
    atomic_commit(&file);
}

// ----------------------------------------------------------------------------
// Reading

// An open checkpoint.
typedef struct {
    FILE *file;
    const char *path; // the caller's
    ModelConfig config;
    TrainState state;
    int version, arrays; // arrays: 1 weights alone, 3 also AdamW's m and v
    int64_t n;           // stored elements of each array
} Checkpoint;

static inline void checkpoint_close(Checkpoint *k) {
    if (k->file) fclose(k->file);
    k->file = NULL;
}

// Closes the checkpoint, writes one line about it to msg [CHECKPOINT_MSG_BYTES], and returns -1.
__attribute__((format(printf, 3, 4))) static inline int checkpoint_refuse(Checkpoint *k, char *msg,
                                                                          const char *format, ...) {
    va_list args;
    int used = snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: ", k->path);
    va_start(args, format);
    if (used < CHECKPOINT_MSG_BYTES)
        vsnprintf(msg + used, (size_t)(CHECKPOINT_MSG_BYTES - used), format, args);
    va_end(args);
    checkpoint_close(k);
    return -1;
}

// Fills the offset in the file's arrays of each tensor of `table` [count], which is of any model; -1: the
// file has no such tensor of this size. Returns the elements of each of the file's arrays. The version of the
// file tells which tensors it has, and in which order.
static inline int64_t checkpoint_tensor_offsets(const Checkpoint *k, const ParamTensor *table, int64_t count,
                                                int64_t *offsets) {
    int64_t n, stored_count = param_table(&k->config, NULL, &n), end = 0, gate = -1;
    ParamTensor *stored = (ParamTensor *)xcalloc((size_t)stored_count, sizeof *stored);
    param_table(&k->config, stored, &n);
    for (int64_t i = 0; i < stored_count; i++) {
        ParamTensor *t = &stored[i];
        t->offset = -1;
        if (k->version < 3 && param_is(t, "bgate")) continue;
        if (k->version == 1 && param_is(t, "wgate")) {
            gate = i;
            continue;
        }
        if (gate >= 0 && param_is(t, "wo")) stored[gate].offset = end, end += stored[gate].size, gate = -1;
        t->offset = end, end += t->size;
    }
    // the tensors of both models that have the same name are in the same order
    for (int64_t i = 0, next = 0; i < count; i++) {
        int64_t j = next;
        while (j < stored_count && strcmp(stored[j].name, table[i].name) != 0) j++;
        const int found = j < stored_count && stored[j].size == table[i].size;
        offsets[i] = found ? stored[j].offset : -1;
        if (j < stored_count) next = j + 1;
    }
    free(stored);
    return end;
}

// Opens a checkpoint, and reads and checks its header and its size. Returns 0, or -1 with one line in msg
// [CHECKPOINT_MSG_BYTES] that names the file. The caller ends with checkpoint_close, and keeps `path` until
// then.
static inline int checkpoint_open(Checkpoint *k, const char *path, char *msg) {
    unsigned char header[CHECKPOINT_HEADER_BYTES];
    struct stat st;
    memset(k, 0, sizeof *k);
    k->path = path;
    int fd = input_try_open(path, &st);
    if (fd < 0)
        return checkpoint_refuse(k, msg, "cannot open the checkpoint: %s%s",
                                 errno ? strerror(errno) : "it is not a file but ",
                                 errno ? "" : file_type_name(st.st_mode));
    k->file = fdopen(fd, "rb");
    if (!k->file) die("%s: cannot open the checkpoint: %s; free host memory", path, strerror(errno));
    size_t bytes_read = fread(header, 1, sizeof header, k->file);
    if (ferror(k->file)) return checkpoint_refuse(k, msg, "cannot read the checkpoint: %s", strerror(errno));
    if (bytes_read < 16 || checkpoint_get_word(header, 0) != CHECKPOINT_MAGIC)
        return checkpoint_refuse(k, msg, "not a checkpoint");
    if (bytes_read < sizeof header)
        return checkpoint_refuse(k, msg, "truncated: %lld bytes, less than its header",
                                 (long long)st.st_size);
    const int64_t version = checkpoint_get_word(header, 1);
    const int intact =
        (uint64_t)checkpoint_get_word(header, 511) == checksum(header, CHECKPOINT_HEADER_BYTES - 8, 0);
    int count = checkpoint_num_fields(version), all_fields;
    const ModelField *fields = model_fields(&all_fields);
    const int64_t arrays = version < 3 ? 3 : checkpoint_get_word(header, 5);
    if (intact && (version < 1 || version > CHECKPOINT_VERSION || checkpoint_get_word(header, 3) != count ||
                   checkpoint_get_word(header, 4) != TRAIN_STATE_FIELDS || (arrays != 1 && arrays != 3)))
        return checkpoint_refuse(k, msg, "checkpoint version %lld, this program reads versions 1 to %d",
                                 (long long)version, CHECKPOINT_VERSION);
    if (!intact) return checkpoint_refuse(k, msg, "damaged: its header has a wrong checksum");
    k->version = (int)version;
    k->arrays = (int)arrays;
    for (int i = 0; i < count; i++) {
        double value;
        memcpy(&value, header + 8 * (8 + i), 8);
        model_field_set(&k->config, &fields[i], value);
    }
    memcpy(&k->state, header + 8 * (8 + count), 8 * TRAIN_STATE_FIELDS);
    memcpy(&k->state.data, header + 8 * CHECKPOINT_REST_WORD, TRAIN_STATE_REST_BYTES);
    TrainState *s = &k->state;
    s->data.first[sizeof s->data.first - 1] = s->data.last[sizeof s->data.last - 1] = 0;
    const int64_t counts[] = {s->step,        s->tokens, s->epoch,        s->position,   s->epoch_samples,
                              s->total_batch, s->warmup, s->losses.count, s->norms.count};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        if (counts[i] < 0 || counts[i] > (int64_t)1 << 53)
            return checkpoint_refuse(k, msg, "damaged: its state is invalid");
    if (s->seq_len < 1 || s->seq_len > 1 << 30)
        return checkpoint_refuse(k, msg, "invalid context of %lld tokens", (long long)s->seq_len);
    char config_msg[256];
    if (config_check(&k->config, config_msg, sizeof config_msg) != 0)
        return checkpoint_refuse(k, msg, "invalid model: %s", config_msg);
    k->n = checkpoint_get_word(header, 2);
    const int64_t n = checkpoint_tensor_offsets(k, NULL, 0, NULL);
    if (k->n != n)
        return checkpoint_refuse(k, msg, "%lld parameters found, its model has %lld", (long long)k->n,
                                 (long long)n);
    const int64_t bytes = checkpoint_bytes(k->n, k->arrays);
    if (st.st_size != bytes)
        return checkpoint_refuse(k, msg, "%s: %lld bytes found, %lld expected",
                                 st.st_size < bytes ? "truncated" : "too long", (long long)st.st_size,
                                 (long long)bytes);
    return 0;
}

// Reads elements [begin, begin + count) of an array (0 params, 1 m, 2 v), in the file's order of tensors,
// into dest, and verifies the checksums of their chunks. dest NULL: only verifies. Returns 0, or -1 with one
// line in msg [CHECKPOINT_MSG_BYTES].
static inline int checkpoint_read_stored(const Checkpoint *k, int array, int64_t begin, int64_t count,
                                         float *dest, char *msg) {
    static const char *const names[3] = {"parameters", "AdamW m", "AdamW v"};
    const int64_t n = k->n, first_chunk = begin / CHECKPOINT_CHUNK_FLOATS;
    const int64_t num_chunks =
        count > 0 ? (begin + count + CHECKPOINT_CHUNK_FLOATS - 1) / CHECKPOINT_CHUNK_FLOATS - first_chunk : 0;
    size_t table_bytes = (size_t)num_chunks * sizeof(uint64_t);
    uint64_t *expected = (uint64_t *)xmalloc(table_bytes);
    float *buffer = (float *)xmalloc(CHECKPOINT_CHUNK_BYTES);
    FILE *f = k->file;
    int ok =
        fseeko(f, (off_t)checkpoint_checksum_offset(n, k->arrays, array, first_chunk), SEEK_SET) == 0 &&
        fread(expected, 1, table_bytes, f) == table_bytes &&
        fseeko(f, (off_t)checkpoint_offset(n, array, first_chunk * CHECKPOINT_CHUNK_FLOATS), SEEK_SET) == 0;
    if (!ok)
        snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: cannot read the checkpoint: %s", k->path,
                 ferror(f) ? strerror(errno) : "it is truncated");
    for (int64_t i = first_chunk; ok && i < first_chunk + num_chunks; i++) {
        const int64_t chunk_begin = i * CHECKPOINT_CHUNK_FLOATS, left = n - chunk_begin;
        const size_t floats = (size_t)(left < CHECKPOINT_CHUNK_FLOATS ? left : CHECKPOINT_CHUNK_FLOATS);
        const int entire = chunk_begin >= begin && chunk_begin + (int64_t)floats <= begin + count;
        float *data = dest && entire ? dest + (chunk_begin - begin) : buffer;
        if (fread(data, 4, floats, f) != floats) {
            ok = 0;
            snprintf(msg, CHECKPOINT_MSG_BYTES, "%s: cannot read the checkpoint: %s", k->path,
                     ferror(f) ? strerror(errno) : "it is truncated");
        } else if (checksum(data, 4 * floats, checkpoint_chunk_seed(array, i)) != expected[i - first_chunk]) {
            ok = 0;
            snprintf(msg, CHECKPOINT_MSG_BYTES,
                     "%s: damaged: wrong checksum of the %s in the 1 MiB chunk at byte %lld", k->path,
                     names[array], (long long)checkpoint_offset(n, array, chunk_begin));
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

// Reads elements [begin, begin + count) of an array (0 params, 1 m, 2 v) of model `c`, in the order of
// param_table, into dest. The file's model may have another attention: elements of tensors that the file has
// not stay as they are. Returns 0, or -1 with one line in msg [CHECKPOINT_MSG_BYTES].
static inline int checkpoint_read_part(const Checkpoint *k, const ModelConfig *c, int array, int64_t begin,
                                       int64_t count, float *dest, char *msg) {
    int64_t n, num_tensors = param_table(c, NULL, &n);
    ParamTensor *table = (ParamTensor *)xcalloc((size_t)num_tensors, sizeof *table);
    int64_t *offsets = (int64_t *)xcalloc((size_t)num_tensors, sizeof *offsets);
    int error = 0;
    param_table(c, table, &n);
    checkpoint_tensor_offsets(k, table, num_tensors, offsets);
    for (int64_t i = 0; i < num_tensors && error == 0;) {
        // consecutive tensors that are consecutive in the file, too, are one part
        int64_t size = table[i].size, next = i + 1;
        while (next < num_tensors && offsets[i] >= 0 && offsets[next] == offsets[i] + size)
            size += table[next++].size;
        const int64_t offset = table[i].offset, first = begin > offset ? begin : offset;
        const int64_t last = offset + size < begin + count ? offset + size : begin + count;
        if (offsets[i] >= 0 && first < last)
            error = checkpoint_read_stored(k, array, offsets[i] + first - offset, last - first,
                                           dest + (first - begin), msg);
        i = next;
    }
    free(table), free(offsets);
    return error;
}

// Writes to values [end - begin] the initial values of elements [begin, end) of the parameter array of `c`
// that the checkpoint k has not, if there are any. A gate of an older version had no bias, that is 0.
static inline void checkpoint_init_missing(const Checkpoint *k, const ModelConfig *c, int64_t begin,
                                           int64_t end, float *values, const ParamInit *init) {
    if (k->config.attn == c->attn && k->version >= 3) return;
    if (k->config.attn == c->attn)
        memset(values, 0, (size_t)(end - begin) * sizeof *values);
    else
        params_init_part(c, values, begin, end, init);
}

// Dies if the checkpoint's model is not `c`. RoPE's frequencies may differ, and with another attention mode
// the fields of the attention.
static inline void checkpoint_check_model(const Checkpoint *k, const ModelConfig *c) {
    char stored_text[64], own_text[64];
    int count;
    const ModelField *f = model_fields(&count);
    for (int i = 0; i < count; i++) {
        double stored_value = model_field_get(&k->config, &f[i]), own_value = model_field_get(c, &f[i]);
        if (stored_value == own_value || model_field_is_rope(&f[i])) continue;
        if (k->config.attn != c->attn && model_field_is_attention(&f[i])) continue;
        model_field_print(&f[i], stored_value, stored_text, sizeof stored_text);
        model_field_print(&f[i], own_value, own_text, sizeof own_text);
        die("%s: a checkpoint of another model: its %s is %s, not %s; use one of the same model", k->path,
            f[i].name, stored_text, own_text);
    }
}

// Reads params, m and v [n] of model `c`; m and v may be NULL to read only the weights. Tensors that the file
// has not get initial values. Dies if the file is damaged or of another model.
static inline void checkpoint_load(const char *path, const ModelConfig *c, const ParamInit *init,
                                   TrainState *state, float *params, float *m, float *v, int64_t n) {
    char msg[CHECKPOINT_MSG_BYTES];
    Checkpoint k;
    if (checkpoint_open(&k, path, msg) != 0) die("%s; choose another checkpoint", msg);
    checkpoint_check_model(&k, c);
    *state = k.state;
    float *data[3] = {params, m, v};
    checkpoint_init_missing(&k, c, 0, n, params, init);
    for (int a = 0; a < 3; a++)
        if (data[a] && checkpoint_read_part(&k, c, a, 0, n, data[a], msg) != 0)
            die("%s; choose another checkpoint", msg);
    checkpoint_close(&k);
}

// Reads a whole checkpoint and verifies all checksums. Returns 0, or -1 with one line in msg
// [CHECKPOINT_MSG_BYTES].
static inline int checkpoint_verify(const char *path, char *msg) {
    Checkpoint k;
    if (checkpoint_open(&k, path, msg) != 0) return -1;
    int error = 0;
    for (int a = 0; a < k.arrays && error == 0; a++) error = checkpoint_read_stored(&k, a, 0, k.n, NULL, msg);
    checkpoint_close(&k);
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
// resume from an older checkpoint. alone 1: this process alone wrote the newest one, which needs no reading.
static inline void checkpoint_prune(const char *dir, int64_t keep, int64_t step, int alone) {
    int64_t *steps, count = checkpoint_list(dir, &steps), kept = 0, candidates = 0;
    char path[PATH_BYTES];
    for (int64_t i = 0; i < count; i++) candidates += steps[i] <= step;
    for (int64_t i = 0; i < count && candidates > keep; i++) { // else none is read
        if (steps[i] > step) continue;
        checkpoint_path(path, sizeof path, dir, steps[i]);
        if (kept < keep)
            kept += checkpoint_is_good(path, alone && steps[i] == step);
        else if (unlink(path) != 0)
            fprintf(stderr, "warning: cannot remove %s: %s; remove it yourself\n", path, strerror(errno));
    }
    free(steps);
}
#endif
