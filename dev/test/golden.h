// golden.h: reads a file of golden values, and generates the inputs that the file does not store. golden.py
// defines the file format and the generator.
#ifndef GOLDEN_H
#define GOLDEN_H
#include "test.h"
#include <stdint.h>

#ifndef GOLDEN_DIR
#define GOLDEN_DIR "dev/test/golden"
#endif

// Returns element `index` of the random tensor with this seed, a multiple of 2^-19 in [-1, 1).
static inline double golden_uniform(uint64_t seed, int64_t index) {
    uint64_t z = seed + ((uint64_t)index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (double)(z >> 44) / 524288.0 - 1.0;
}

// Returns the seed of a tensor: FNV-1a of "file.tensor", or of "file" if tensor is NULL.
static inline uint64_t golden_seed(const char *file, const char *tensor) {
    uint64_t h = 0xCBF29CE484222325u;
    for (const char *p = file; *p; p++) h = (h ^ (unsigned char)*p) * 0x100000001B3u;
    if (!tensor) return h;
    h = (h ^ '.') * 0x100000001B3u;
    for (const char *p = tensor; *p; p++) h = (h ^ (unsigned char)*p) * 0x100000001B3u;
    return h;
}

typedef struct {
    char name[64];
    int64_t size; // elements
    int64_t *i;   // [size] values of type i, else NULL
    double *f;    // [size] values of type f, else NULL
} GoldenTensor;

typedef struct {
    const char *name; // of the file, without folder and suffix
    int count;
    GoldenTensor tensors[128];
} Golden;

// Prints an error about the file and ends the test.
static inline void golden_fail(const Golden *g, const char *problem) {
    printf("error: %s/%s.txt: %s\n", GOLDEN_DIR, g->name, problem);
    exit(1);
}

// Reads GOLDEN_DIR/name.txt. A missing or broken file ends the test. golden_free frees the tensors.
static inline void golden_load(Golden *g, const char *name) {
    char path[512], dim[64];
    g->name = name, g->count = 0;
    snprintf(path, sizeof path, "%s/%s.txt", GOLDEN_DIR, name);
    FILE *file = fopen(path, "r");
    if (!file) golden_fail(g, "cannot be read; run the test in the repository's root");
    int c;
    while ((c = fgetc(file)) != EOF) {
        if (c == '#') {
            while (c != '\n' && c != EOF) c = fgetc(file);
            continue;
        }
        ungetc(c, file);
        if (g->count == (int)(sizeof g->tensors / sizeof g->tensors[0]))
            golden_fail(g, "too many tensors; enlarge Golden.tensors");
        GoldenTensor *t = &g->tensors[g->count++];
        char type;
        if (fscanf(file, "%63s %c", t->name, &type) != 2 || (type != 'i' && type != 'f'))
            golden_fail(g, "a line has no name and type; run golden.py again");
        t->size = 1;
        while (fscanf(file, "%63s", dim) == 1 && strcmp(dim, "=") != 0) t->size *= atoll(dim);
        t->i = type == 'i' ? (int64_t *)malloc((size_t)t->size * sizeof(int64_t)) : NULL;
        t->f = type == 'f' ? (double *)malloc((size_t)t->size * sizeof(double)) : NULL;
        for (int64_t n = 0; n < t->size; n++) {
            long long value;
            unsigned long long bits;
            if (t->i ? fscanf(file, "%lld", &value) != 1 : fscanf(file, "%16llx", &bits) != 1)
                golden_fail(g, "a line has too few values; run golden.py again");
            if (t->i)
                t->i[n] = value;
            else
                memcpy(&t->f[n], &bits, sizeof bits);
        }
        if (fgetc(file) != '\n') golden_fail(g, "a line has too many values; run golden.py again");
    }
    fclose(file);
}

static inline void golden_free(Golden *g) {
    for (int n = 0; n < g->count; n++) free(g->tensors[n].i), free(g->tensors[n].f);
    g->count = 0;
}

// Returns the tensor named prefix + name, or NULL.
static inline const GoldenTensor *golden_find(const Golden *g, const char *prefix, const char *name) {
    size_t length = strlen(prefix);
    for (int n = 0; n < g->count; n++) {
        const GoldenTensor *t = &g->tensors[n];
        if (strncmp(t->name, prefix, length) == 0 && strcmp(t->name + length, name) == 0) return t;
    }
    return NULL;
}

// Returns the tensor named prefix + name, of type 'i' or 'f'. The test ends if there is none.
static inline const GoldenTensor *golden_get(const Golden *g, char type, const char *prefix,
                                             const char *name) {
    const GoldenTensor *t = golden_find(g, prefix, name);
    if (!t || (type == 'i' ? !t->i : !t->f)) {
        printf("error: %s/%s.txt has no tensor %s%s of type %c\n", GOLDEN_DIR, g->name, prefix, name, type);
        exit(1);
    }
    return t;
}
static inline const int64_t *golden_ints(const Golden *g, const char *name) {
    return golden_get(g, 'i', "", name)->i;
}

// Generates an input tensor out [size]: offset + amplitude * golden_uniform. The file stores offset and
// amplitude.
static inline void golden_fill(const Golden *g, const char *name, double *out, int64_t size) {
    const double *fill = golden_get(g, 'f', "fill.", name)->f;
    uint64_t seed = golden_seed(g->name, name);
    for (int64_t i = 0; i < size; i++) out[i] = fill[0] + fill[1] * golden_uniform(seed, i);
}

// Folds values [size] to the file's tensor and checks that the largest difference, relative to the largest
// golden value, is below the tolerance. Infinities must be at the same indices.
static inline void golden_check(const Golden *g, const char *prefix, const char *name, const double *values,
                                int64_t size, double tolerance) {
    const GoldenTensor *t = golden_get(g, 'f', prefix, name);
    int64_t row = t->size ? size / t->size : 0;
    CHECK(row >= 1 && row * t->size == size, "%s: %s%s: %lld values, the file has %lld", g->name, prefix,
          name, (long long)size, (long long)t->size);
    if (row < 1 || row * t->size != size) return;
    uint64_t seed = golden_seed("fold", NULL);
    double max_difference = 0, max_value = 0;
    int64_t max_index = 0;
    for (int64_t n = 0; n < t->size; n++) {
        double x = row == 1 ? values[n] : 0;
        for (int64_t j = 0; row > 1 && j < row; j++) x += values[n * row + j] * golden_uniform(seed, j);
        double difference = x == t->f[n] ? 0 : fabs(x - t->f[n]);
        if (isnan(difference)) difference = INFINITY;
        if (isfinite(t->f[n])) max_value = fmax(max_value, fabs(t->f[n]));
        if (difference > max_difference) max_difference = difference, max_index = n;
    }
    double error = max_difference == 0 ? 0 : max_difference / (max_value > 0 ? max_value : 1);
    CHECK(error < tolerance, "%s: %s%s: error %.2e at element %lld of %lld in the file", g->name, prefix,
          name, error, (long long)max_index, (long long)t->size);
}

// Checks that integers are equal.
static inline void golden_check_ints(const Golden *g, const char *name, const int32_t *values, int64_t size) {
    const GoldenTensor *t = golden_get(g, 'i', "", name);
    int64_t same = 0;
    while (same < size && same < t->size && values[same] == t->i[same]) same++;
    CHECK(size == t->size && same == size, "%s: %s: %lld values, the file has %lld; first difference at %lld",
          g->name, name, (long long)size, (long long)t->size, (long long)same);
}
#endif
