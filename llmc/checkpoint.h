// checkpoint.h: one file a checkpoint, DIR/ckpt_00001234.bin, the same from both trainers. Little-endian:
//   4096 bytes of header: magic, version, counts, every model field, every number of TrainState, and in
//     the last 8 bytes a checksum of the rest
//   params, then AdamW's m, then v: n fp32 each
//   3 tables of 64-bit checksums, for params, m and v: one for each MiB of the array (the last may be short)
// No chunk spans two arrays, so chunks can be written in any order, and a reader of weights alone checks
// these alone. Any flipped byte and any cut is found.
#ifndef LLMC_CHECKPOINT_H
#define LLMC_CHECKPOINT_H
#include "utils.h"
#include "config.h"
#include <dirent.h>

#define CHECKPOINT_MAGIC 0x54504B4341534E0All // "\nNSACKPT"
#define CHECKPOINT_VERSION 1
#define CHECKPOINT_HEADER 4096
#define CHECKPOINT_CHUNK 1048576 // bytes that a checksum covers
#define CHECKPOINT_NUMBERS (CHECKPOINT_CHUNK / 4)
#define CHECKPOINT_WHY (PATH_BYTES + 512) // bytes that a reason takes, at most

// Where a run stands. The learning rate and the other flags come from the command line again.
typedef struct {
    int64_t step;          // steps finished
    int64_t tokens;        // tokens trained on
    int64_t epoch;         // of the data loader
    int64_t position;      // samples of this epoch consumed, by all processes
    int64_t epoch_samples; // samples of an epoch, to notice that the shards or -t changed
    int64_t seed;
    int64_t seq_len;     // tokens of a training sequence
    int64_t total_batch; // tokens of a step
    int64_t draws;       // random numbers that sampling has used
} TrainState;
#define TRAIN_STATE_FIELDS ((int)(sizeof(TrainState) / sizeof(int64_t)))

// 64 bits over n bytes; different for different seeds. Each step is a bijection of the word it takes
// in, so that no single changed word goes unnoticed.
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
        size_t take = left < 8 ? left : 8;
        word = 0;
        memcpy(&word, p, take);
        h = rng_mix(h ^ word) + 0x9E3779B97F4A7C15ull;
        p += take, left -= take;
    }
    return h;
}

static inline uint64_t checkpoint_chunk_seed(int array, int64_t chunk) {
    return (uint64_t)array << 56 | (uint64_t)chunk;
}

// Chunks of an array of n fp32.
static inline int64_t checkpoint_chunks(int64_t n) {
    return (4 * n + CHECKPOINT_CHUNK - 1) / CHECKPOINT_CHUNK;
}

// Bytes of the file of a model with n parameters.
static inline int64_t checkpoint_bytes(int64_t n) {
    return CHECKPOINT_HEADER + 12 * n + 24 * checkpoint_chunks(n);
}

static inline void checkpoint_path(char *path, size_t size, const char *dir, int64_t step) {
    if (snprintf(path, size, "%s/ckpt_%08lld.bin", dir, (long long)step) >= (int)size)
        die("-o %s: the name is too long", dir);
}

// ----------------------------------------------------------------------------
// The folder

// The step that a file name stands for, or -1. With `tmp`, names of unfinished files.
static inline int64_t checkpoint_step_of(const char *name, int tmp) {
    if (strncmp(name, "ckpt_", 5) != 0) return -1;
    size_t digits = strspn(name + 5, "0123456789");
    if (digits < 8 || digits > 18 || strcmp(name + 5 + digits, tmp ? ".bin.tmp" : ".bin") != 0) return -1;
    return strtoll(name + 5, NULL, 10);
}

static inline int checkpoint_descending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

// Steps of the checkpoints in dir, newest first, in memory that the caller frees. Returns how many; 0
// where there is no such folder.
static inline int64_t checkpoint_list(const char *dir, int64_t **steps) {
    int64_t count = 0, room = 16;
    *steps = (int64_t *)xmalloc((size_t)room * sizeof **steps);
    DIR *d = opendir(dir);
    if (!d && errno != ENOENT) die("-o %s: %s", dir, strerror(errno));
    struct dirent *entry;
    while (d && (entry = readdir(d)) != NULL) {
        int64_t step = checkpoint_step_of(entry->d_name, 0);
        if (step < 0) continue;
        if (count == room) {
            room *= 2;
            int64_t *more = (int64_t *)xmalloc((size_t)room * sizeof *more);
            memcpy(more, *steps, (size_t)count * sizeof *more);
            free(*steps);
            *steps = more;
        }
        (*steps)[count++] = step;
    }
    if (d) closedir(d);
    qsort(*steps, (size_t)count, sizeof **steps, checkpoint_descending);
    return count;
}

// Before a run: makes the folder, dies where nothing can be written there or where a new run
// (resume 0) would mix with the checkpoints of another, and removes what a killed run left unfinished.
static inline void checkpoint_dir_check(const char *dir, int resume) {
    make_dirs(dir);
    int64_t *steps, count = checkpoint_list(dir, &steps);
    if (count > 0 && !resume)
        die("-o %s: holds checkpoints up to step %lld; go on from them with -y 1, or choose another folder",
            dir, (long long)steps[0]);
    free(steps);
    DIR *d = opendir(dir);
    if (!d) die("-o %s: %s", dir, strerror(errno));
    struct dirent *entry;
    char path[PATH_BYTES];
    while ((entry = readdir(d)) != NULL) {
        if (checkpoint_step_of(entry->d_name, 1) < 0) continue;
        if (snprintf(path, sizeof path, "%s/%s", dir, entry->d_name) < (int)sizeof path) unlink(path);
    }
    closedir(d);
    if (snprintf(path, sizeof path, "%s/.writable-XXXXXX", dir) >= (int)sizeof path)
        die("-o %s: the name is too long", dir);
    int fd = mkstemp(path);
    if (fd < 0) die("-o %s: nothing can be written there: %s", dir, strerror(errno));
    close(fd);
    unlink(path);
}

// Removes checkpoints but the last `keep` up to `step`, the one just written. Later ones, left from
// before a resume, neither count nor go.
static inline void checkpoint_prune(const char *dir, int64_t keep, int64_t step) {
    int64_t *steps, count = checkpoint_list(dir, &steps), kept = 0;
    char path[PATH_BYTES];
    for (int64_t i = 0; i < count; i++) {
        if (steps[i] > step || ++kept <= keep) continue;
        checkpoint_path(path, sizeof path, dir, steps[i]);
        if (unlink(path) != 0) fprintf(stderr, "warning: cannot remove %s: %s\n", path, strerror(errno));
    }
    free(steps);
}

// ----------------------------------------------------------------------------
// Writing

static inline void checkpoint_put(unsigned char *header, int word, int64_t value) {
    memcpy(header + 8 * word, &value, 8);
}

static inline int64_t checkpoint_get(const unsigned char *header, int word) {
    int64_t value;
    memcpy(&value, header + 8 * word, 8);
    return value;
}

// Words of the header: 0 magic, 1 version, 2 n, 3 model fields, 4 TrainState fields; from 8 on the
// model's fields as doubles, then TrainState; word 511 the checksum.
static inline void checkpoint_header(unsigned char *header, const ModelConfig *c, const TrainState *state,
                                     int64_t n) {
    int count;
    const ModelField *f = model_fields(&count);
    memset(header, 0, CHECKPOINT_HEADER);
    checkpoint_put(header, 0, CHECKPOINT_MAGIC);
    checkpoint_put(header, 1, CHECKPOINT_VERSION);
    checkpoint_put(header, 2, n);
    checkpoint_put(header, 3, count);
    checkpoint_put(header, 4, TRAIN_STATE_FIELDS);
    for (int i = 0; i < count; i++) {
        double value = model_field_get(c, &f[i]);
        memcpy(header + 8 * (8 + i), &value, 8);
    }
    memcpy(header + 8 * (8 + count), state, sizeof *state);
    checkpoint_put(header, 511, (int64_t)checksum(header, CHECKPOINT_HEADER - 8, 0));
}

// A checkpoint that one or several processes write: one of them begins and commits it, all write parts of it
// between. It appears whole or not at all.
static inline void checkpoint_begin(AtomicFile *file, const char *dir, const ModelConfig *c,
                                    const TrainState *state, int64_t n) {
    unsigned char header[CHECKPOINT_HEADER];
    char path[PATH_BYTES];
    checkpoint_header(header, c, state, n);
    checkpoint_path(path, sizeof path, dir, state->step);
    atomic_open(file, path);
    atomic_write(file, header, sizeof header);
    if (fflush(file->f) != 0) die("cannot write %s: %s (is the disk full?)", file->tmp, strerror(errno));
}

// Writes `bytes` at `offset` of the open file; its name is for the message.
static inline void checkpoint_write_at(int fd, const char *path, const void *data, size_t bytes,
                                       int64_t offset) {
    const char *p = (const char *)data;
    while (bytes > 0) {
        ssize_t n = pwrite(fd, p, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) die("cannot write %s: %s (is the disk full?)", path, strerror(n < 0 ? errno : ENOSPC));
        p += n, offset += n, bytes -= (size_t)n;
    }
}

// Writes numbers [begin, begin + count) of array a (0 params, 1 m, 2 v) of n each, and their checksums. begin
// is a multiple of CHECKPOINT_NUMBERS, and so is count, but at the array's end.
static inline void checkpoint_write_part(int fd, const char *path, int a, int64_t n, int64_t begin,
                                         int64_t count, const float *data) {
    int64_t first = begin / CHECKPOINT_NUMBERS, chunks = checkpoint_chunks(n);
    int64_t mine = (count + CHECKPOINT_NUMBERS - 1) / CHECKPOINT_NUMBERS;
    uint64_t *sums = (uint64_t *)xmalloc((size_t)mine * sizeof *sums);
    for (int64_t i = 0; i < mine; i++) {
        int64_t at = i * CHECKPOINT_NUMBERS, left = count - at;
        sums[i] = checksum(data + at, 4 * (size_t)(left < CHECKPOINT_NUMBERS ? left : CHECKPOINT_NUMBERS),
                           checkpoint_chunk_seed(a, first + i));
    }
    checkpoint_write_at(fd, path, data, 4 * (size_t)count, CHECKPOINT_HEADER + 4 * (n * a + begin));
    checkpoint_write_at(fd, path, sums, (size_t)mine * sizeof *sums,
                        CHECKPOINT_HEADER + 12 * n + 8 * (chunks * a + first));
    free(sums);
}

// Writes DIR/ckpt_<state->step>.bin; params, m and v [n]. It appears whole or not at all; dies where it
// cannot be written.
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

// Reads and checks the header, and the file's length. Returns 0, or -1 with one line in
// why [CHECKPOINT_WHY] that names the file.
static inline int checkpoint_read_header(const char *path, ModelConfig *c, TrainState *state, char *why) {
    unsigned char header[CHECKPOINT_HEADER];
    FILE *f = fopen(path, "rb");
    if (!f) {
        snprintf(why, CHECKPOINT_WHY, "%s: %s", path, strerror(errno));
        return -1;
    }
    size_t got = fread(header, 1, sizeof header, f);
    struct stat st;
    int failed = ferror(f) || fstat(fileno(f), &st) != 0;
    int reason = errno;
    fclose(f);
    if (failed) {
        snprintf(why, CHECKPOINT_WHY, "%s: cannot be read: %s", path, strerror(reason));
        return -1;
    }
    if (got < 16 || checkpoint_get(header, 0) != CHECKPOINT_MAGIC) {
        snprintf(why, CHECKPOINT_WHY, "%s: not a checkpoint", path);
        return -1;
    }
    if (got < sizeof header) {
        snprintf(why, CHECKPOINT_WHY, "%s: cut short within its header, at byte %lld", path,
                 (long long)st.st_size);
        return -1;
    }
    int64_t version = checkpoint_get(header, 1);
    int count, intact = (uint64_t)checkpoint_get(header, 511) == checksum(header, CHECKPOINT_HEADER - 8, 0);
    const ModelField *f0 = model_fields(&count);
    if (intact && (version != CHECKPOINT_VERSION || checkpoint_get(header, 3) != count ||
                   checkpoint_get(header, 4) != TRAIN_STATE_FIELDS)) {
        snprintf(why, CHECKPOINT_WHY, "%s: a checkpoint of version %lld, this program reads version %d", path,
                 (long long)version, CHECKPOINT_VERSION);
        return -1;
    }
    if (!intact) {
        snprintf(why, CHECKPOINT_WHY, "%s: damaged, its header has a wrong checksum", path);
        return -1;
    }
    memset(c, 0, sizeof *c);
    for (int i = 0; i < count; i++) {
        double value;
        memcpy(&value, header + 8 * (8 + i), 8);
        model_field_set(c, &f0[i], value);
    }
    memcpy(state, header + 8 * (8 + count), sizeof *state);
    int64_t total, n = checkpoint_get(header, 2);
    char msg[256];
    if (config_check(c, msg, sizeof msg) != 0) {
        snprintf(why, CHECKPOINT_WHY, "%s: its model cannot be: %s", path, msg);
        return -1;
    }
    param_table(c, NULL, &total);
    if (n != total) {
        snprintf(why, CHECKPOINT_WHY, "%s: holds %lld parameters, its model has %lld", path, (long long)n,
                 (long long)total);
        return -1;
    }
    if (st.st_size != checkpoint_bytes(n)) {
        snprintf(why, CHECKPOINT_WHY, "%s: %s, %lld bytes of %lld", path,
                 st.st_size < checkpoint_bytes(n) ? "cut short" : "too long", (long long)st.st_size,
                 (long long)checkpoint_bytes(n));
        return -1;
    }
    return 0;
}

// Reads numbers [begin, begin + count) of array a (0 params, 1 m, 2 v) of n fp32 into dest (NULL: only checks
// them). Returns 0, or -1 with one line in why.
static inline int checkpoint_read_part(FILE *f, const char *path, int a, int64_t n, int64_t begin,
                                       int64_t count, float *dest, char *why) {
    static const char *const names[3] = {"parameters", "AdamW m", "AdamW v"};
    const int64_t first = begin / CHECKPOINT_NUMBERS;
    const int64_t chunks =
        count > 0 ? (begin + count + CHECKPOINT_NUMBERS - 1) / CHECKPOINT_NUMBERS - first : 0;
    size_t table = (size_t)chunks * sizeof(uint64_t);
    uint64_t *sums = (uint64_t *)xmalloc(table);
    float *buffer = (float *)xmalloc(CHECKPOINT_CHUNK);
    int ok = fseeko(f, (off_t)(CHECKPOINT_HEADER + 12 * n + 8 * (checkpoint_chunks(n) * a + first)),
                    SEEK_SET) == 0 &&
             fread(sums, 1, table, f) == table &&
             fseeko(f, (off_t)(CHECKPOINT_HEADER + 4 * n * a + first * CHECKPOINT_CHUNK), SEEK_SET) == 0;
    if (!ok)
        snprintf(why, CHECKPOINT_WHY, "%s: cannot be read: %s", path,
                 ferror(f) ? strerror(errno) : "cut short");
    for (int64_t i = first; ok && i < first + chunks; i++) {
        const int64_t at = i * CHECKPOINT_NUMBERS, left = n - at;
        const size_t numbers = (size_t)(left < CHECKPOINT_NUMBERS ? left : CHECKPOINT_NUMBERS);
        const int whole = at >= begin && at + (int64_t)numbers <= begin + count;
        float *data = dest && whole ? dest + (at - begin) : buffer;
        if (fread(data, 4, numbers, f) != numbers) {
            ok = 0;
            snprintf(why, CHECKPOINT_WHY, "%s: cannot be read: %s", path,
                     ferror(f) ? strerror(errno) : "cut short");
        } else if (checksum(data, 4 * numbers, checkpoint_chunk_seed(a, i)) != sums[i - first]) {
            ok = 0;
            snprintf(why, CHECKPOINT_WHY,
                     "%s: damaged, wrong checksum of the %s in the MiB from byte %lld on", path, names[a],
                     (long long)(CHECKPOINT_HEADER + 4 * n * a + i * CHECKPOINT_CHUNK));
        } else if (dest && !whole) {
            int64_t from = at > begin ? at : begin, to = at + (int64_t)numbers;
            if (to > begin + count) to = begin + count;
            memcpy(dest + (from - begin), data + (from - at), 4 * (size_t)(to - from));
        }
    }
    free(sums);
    free(buffer);
    return ok ? 0 : -1;
}

// Opens a checkpoint of model `c` and tells where its run stood. Another model (but for RoPE's frequencies)
// or a damaged header dies with one line.
static inline FILE *checkpoint_open(const char *path, const ModelConfig *c, TrainState *state) {
    ModelConfig theirs;
    char why[CHECKPOINT_WHY], a[64], b[64];
    int count;
    const ModelField *f = model_fields(&count);
    if (checkpoint_read_header(path, &theirs, state, why) != 0) die("%s", why);
    for (int i = 0; i < count; i++) {
        double x = model_field_get(&theirs, &f[i]), y = model_field_get(c, &f[i]);
        if (x == y || model_field_is_rope(&f[i])) continue;
        model_field_print(&f[i], x, a, sizeof a);
        model_field_print(&f[i], y, b, sizeof b);
        die("%s: a checkpoint of another model, its %s is %s and not %s", path, f[i].name, a, b);
    }
    FILE *file = fopen(path, "rb");
    if (!file) die("%s: %s", path, strerror(errno));
    return file;
}

// Reads params [n], and m and v unless they are NULL (weights alone); dies as checkpoint_open does, and where
// the file is damaged.
static inline void checkpoint_load(const char *path, const ModelConfig *c, TrainState *state, float *params,
                                   float *m, float *v, int64_t n) {
    char why[CHECKPOINT_WHY];
    int64_t total;
    FILE *file = checkpoint_open(path, c, state);
    param_table(c, NULL, &total);
    if (n != total) die("%s: holds %lld parameters and not %lld", path, (long long)total, (long long)n);
    float *arrays[3] = {params, m, v};
    for (int k = 0; k < 3; k++)
        if (arrays[k] && checkpoint_read_part(file, path, k, n, 0, n, arrays[k], why) != 0) die("%s", why);
    fclose(file);
}

// Checks every byte. Returns 0, or -1 with one line in why.
static inline int checkpoint_verify(const char *path, char *why) {
    ModelConfig c;
    TrainState state;
    int64_t n;
    if (checkpoint_read_header(path, &c, &state, why) != 0) return -1;
    param_table(&c, NULL, &n);
    FILE *f = fopen(path, "rb");
    if (!f) {
        snprintf(why, CHECKPOINT_WHY, "%s: %s", path, strerror(errno));
        return -1;
    }
    int result = 0;
    for (int a = 0; a < 3 && result == 0; a++) result = checkpoint_read_part(f, path, a, n, 0, n, NULL, why);
    fclose(f);
    return result;
}

// Finds the newest good checkpoint of dir: returns 1 and its path [PATH_BYTES], or 0 where dir holds
// none. A bad one is named in a warning and skipped; if all are bad it dies.
static inline int checkpoint_newest(const char *dir, char *path) {
    int64_t *steps, count = checkpoint_list(dir, &steps);
    char why[CHECKPOINT_WHY];
    int found = 0;
    for (int64_t i = 0; i < count && !found; i++) {
        checkpoint_path(path, PATH_BYTES, dir, steps[i]);
        found = checkpoint_verify(path, why) == 0;
        if (!found) fprintf(stderr, "warning: skipped a checkpoint: %s\n", why);
    }
    free(steps);
    if (count > 0 && !found)
        die("-o %s: none of its %lld checkpoints is good; choose another folder, or move them away", dir,
            (long long)count);
    return found;
}
#endif
