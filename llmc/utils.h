// utils.h: dying with one clear line, memory, time, folders, and files that appear whole or not at all.
// Include it before any system header: it asks for the POSIX functions.
#ifndef LLMC_UTILS_H
#define LLMC_UTILS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifdef __cplusplus
#define LLMC_NORETURN [[noreturn]]
#else
#define LLMC_NORETURN _Noreturn
#endif

#define PATH_BYTES 4096 // longest path taken, its closing 0 included

// A file written under a temporary name beside its place. It must stay where it is in memory between
// atomic_open and atomic_commit: die() finds it through the list below.
typedef struct AtomicFile {
    FILE *f;
    struct AtomicFile *next;
    char path[PATH_BYTES], tmp[PATH_BYTES + 4];
} AtomicFile;

// The unfinished files of the whole program; weak, so that all its translation units share one list.
__attribute__((weak)) AtomicFile *atomic_unfinished = NULL;

// With several processes: which one this is, in front of its messages ("rank 3: "), and what die() tells the
// message before it ends this process. comm.h sets both.
__attribute__((weak)) char die_name[32] = "";
__attribute__((weak)) void (*die_tells)(const char *message) = NULL;

// Prints "error: ", the message in printf's form and a newline on stderr, removes the temporary files
// that are not yet committed, and exits with code 1. Of several threads that die the first one does.
LLMC_NORETURN __attribute__((format(printf, 1, 2))) static inline void die(const char *fmt, ...) {
    static int dying;
    char message[2 * PATH_BYTES];
    va_list args;
    while (__atomic_exchange_n(&dying, 1, __ATOMIC_SEQ_CST)) pause();
    va_start(args, fmt);
    vsnprintf(message, sizeof message, fmt, args);
    va_end(args);
    fflush(stdout);
    fprintf(stderr, "error: %s%s\n", die_name, message);
    for (AtomicFile *a = atomic_unfinished; a != NULL; a = a->next) unlink(a->tmp);
    if (die_tells) die_tells(message);
    exit(1);
}

// Memory, or death saying how many bytes were wanted.
static inline void *xmalloc(size_t bytes) {
    void *p = malloc(bytes > 0 ? bytes : 1);
    if (p == NULL) die("out of memory: %zu bytes (%.1f MiB) wanted", bytes, (double)bytes / 1048576.0);
    return p;
}

// The same, zeroed: n items of `size` bytes.
static inline void *xcalloc(size_t n, size_t size) {
    void *p = calloc(n > 0 ? n : 1, size > 0 ? size : 1);
    if (p == NULL) {
        die("out of memory: %zu items of %zu bytes (%.1f MiB) wanted", n, size, (double)n * size / 1048576.0);
    }
    return p;
}

// Seconds on a clock that never goes back.
static inline double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// The value of a command line flag as a whole number in [min, max]; dies naming flag, value and range.
static inline int64_t parse_int(const char *flag, const char *text, int64_t min, int64_t max) {
    char *end = NULL;
    errno = 0;
    long long v = text == NULL ? 0 : strtoll(text, &end, 10);
    if (text == NULL || *text == 0 || *end != 0 || errno != 0 || v < min || v > max) {
        die("%s takes a whole number from %lld to %lld, not '%s'", flag, (long long)min, (long long)max,
            text == NULL ? "nothing" : text);
    }
    return v;
}

// The same for a number, which must be finite.
static inline double parse_double(const char *flag, const char *text, double min, double max) {
    char *end = NULL;
    double v = text == NULL ? 0 : strtod(text, &end);
    if (text == NULL || *text == 0 || *end != 0 || !(v >= min && v <= max)) {
        die("%s takes a number from %g to %g, not '%s'", flag, min, max, text == NULL ? "nothing" : text);
    }
    return v;
}

// Makes the folder and its parents, as mkdir -p; dies with the reason.
static inline void make_dirs(const char *path) {
    char part[PATH_BYTES];
    size_t n = strlen(path);
    if (n == 0 || n >= sizeof(part)) die("folder name of %zu characters: 1 to %d wanted", n, PATH_BYTES - 1);
    for (size_t i = 1; i <= n; i++) {
        if (path[i] != '/' && path[i] != 0) continue;
        memcpy(part, path, i);
        part[i] = 0;
        if (mkdir(part, 0777) == 0) continue;
        int reason = errno;
        struct stat st;
        if (stat(part, &st) != 0) die("cannot make folder %s: %s", part, strerror(reason));
        if (!S_ISDIR(st.st_mode)) die("cannot make folder %s: a file of that name is in the way", part);
    }
}

// Starts a file that will stand at `path` once committed; until then it is `path`.tmp.
static inline void atomic_open(AtomicFile *a, const char *path) {
    struct stat st;
    size_t n = strlen(path);
    if (n >= sizeof(a->path)) die("file name of %zu characters: at most %d", n, PATH_BYTES - 1);
    memcpy(a->path, path, n + 1);
    memcpy(a->tmp, path, n);
    memcpy(a->tmp + n, ".tmp", sizeof(".tmp"));
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode)) die("cannot write %s: it is a folder", path);
    a->f = fopen(a->tmp, "wb");
    if (a->f == NULL) die("cannot write %s: %s", a->tmp, strerror(errno));
    a->next = atomic_unfinished;
    atomic_unfinished = a;
}

static inline void atomic_write(AtomicFile *a, const void *data, size_t bytes) {
    if (bytes > 0 && fwrite(data, 1, bytes, a->f) != bytes) {
        die("cannot write %s: %s (is the disk full?)", a->tmp, strerror(errno));
    }
}

// Brings the bytes to the disk and closes the file, still under its temporary name.
static inline void atomic_sync(AtomicFile *a) {
    if (fflush(a->f) != 0 || fsync(fileno(a->f)) != 0) {
        die("cannot write %s: %s (is the disk full?)", a->tmp, strerror(errno));
    }
    FILE *f = a->f;
    a->f = NULL;
    if (fclose(f) != 0) die("cannot write %s: %s", a->tmp, strerror(errno));
}

// Brings the file to the disk and to its name; what stood there before is replaced in one step.
static inline void atomic_commit(AtomicFile *a) {
    if (a->f != NULL) atomic_sync(a);
    if (rename(a->tmp, a->path) != 0) die("cannot rename %s to %s: %s", a->tmp, a->path, strerror(errno));
    AtomicFile **link = &atomic_unfinished;
    while (*link != a) link = &(*link)->next;
    *link = a->next;

    // the new name is on the disk only when the folder is
    char folder[PATH_BYTES];
    const char *slash = strrchr(a->path, '/');
    int length = slash == NULL ? 1 : slash == a->path ? 1 : (int)(slash - a->path);
    snprintf(folder, sizeof(folder), "%.*s", length, slash == NULL ? "." : a->path);
    int fd = open(folder, O_RDONLY | O_DIRECTORY);
    if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL)) { // EINVAL: this file system has no such thing
        die("cannot sync folder %s: %s", folder, strerror(errno));
    }
    close(fd);
}

#endif
