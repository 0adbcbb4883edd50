// utils.h: fatal errors, memory, time, number parsing, folders, and files that are written atomically.
// Include it before any system header, because it defines _GNU_SOURCE.
#ifndef LLMC_UTILS_H
#define LLMC_UTILS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifdef __cplusplus
#define LLMC_NORETURN [[noreturn]]
#else
#define LLMC_NORETURN _Noreturn
#endif

#define PATH_BYTES 4096 // limit of a path's length, terminating 0 included

// A file that is written as path.tmp and then renamed to path. The struct must not move in memory between
// atomic_open and atomic_commit, because the list below points to it.
typedef struct AtomicFile {
    FILE *f;
    struct AtomicFile *next;
    dev_t device; // of the file path.tmp
    ino_t inode;
    char path[PATH_BYTES], tmp[PATH_BYTES + 4];
} AtomicFile;

// The files that are open and not yet committed, which die() removes. Weak, so that all translation units
// share one list.
__attribute__((weak)) AtomicFile *atomic_unfinished = NULL;

// comm.c sets both for a job of several processes: the prefix of this process's error messages ("rank 3: "),
// and a function that die() calls with the message before it exits.
__attribute__((weak)) char die_prefix[32] = "";
__attribute__((weak)) void (*die_hook)(const char *message) = NULL;

// 1: a thread is in die(). Weak, so that it holds for the threads of all translation units.
__attribute__((weak)) int die_called = 0;

// Prints "error: ", the message in printf's format and a newline to stderr, removes the files that are not
// yet committed, calls die_hook, and exits with code 1. If several threads call it, only the first call acts.
LLMC_NORETURN __attribute__((format(printf, 1, 2))) static inline void die(const char *fmt, ...) {
    char message[2 * PATH_BYTES];
    va_list args;
    while (__atomic_exchange_n(&die_called, 1, __ATOMIC_SEQ_CST)) pause();
    va_start(args, fmt);
    vsnprintf(message, sizeof message, fmt, args);
    va_end(args);
    if (ftrylockfile(stdout) == 0) fflush(stdout), funlockfile(stdout); // a thread may wait in a write to it
    fprintf(stderr, "error: %s%s\n", die_prefix, message);
    for (AtomicFile *a = atomic_unfinished; a != NULL; a = a->next) unlink(a->tmp);
    if (die_hook) die_hook(message);
    exit(1);
}

// Opens /dev/null for each of stdin, stdout and stderr that is closed, so that no other file gets its
// descriptor. Writes to a stdout that was closed fail. Call it before any file is opened. A write beyond the
// limit of a file's size (ulimit -f) fails, too, instead of killing the process.
static inline void open_standard_files(void) {
    signal(SIGXFSZ, SIG_IGN);
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 2 ? O_WRONLY : O_RDONLY) < 0) exit(1);
}

// Writes all of stdout; dies if any output to it was lost.
static inline void finish_stdout(void) {
    errno = 0;
    if (fflush(stdout) != 0 || ferror(stdout))
        die("cannot write to stdout: %s; check its disk, or what reads it",
            errno ? strerror(errno) : "an earlier write failed");
}

// malloc; dies if no memory is left.
static inline void *xmalloc(size_t bytes) {
    void *p = malloc(bytes > 0 ? bytes : 1);
    if (p == NULL)
        die("out of memory: %zu bytes (%.1f MiB) needed; free host memory or use smaller sizes", bytes,
            (double)bytes / 1048576.0);
    return p;
}

// calloc of n items of `size` bytes; dies if no memory is left.
static inline void *xcalloc(size_t n, size_t size) {
    void *p = calloc(n > 0 ? n : 1, size > 0 ? size : 1);
    if (p == NULL) {
        die("out of memory: %zu items of %zu bytes (%.1f MiB) needed; free host memory or use smaller sizes",
            n, size, (double)n * size / 1048576.0);
    }
    return p;
}

// Returns the seconds of a monotonic clock.
static inline double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Parses the value of a flag or environment variable as a whole number in [min, max]; dies if it is not. text
// NULL: the value is missing.
static inline int64_t parse_int(const char *flag, const char *text, int64_t min, int64_t max) {
    char *end = NULL;
    errno = 0;
    long long v = text == NULL ? 0 : strtoll(text, &end, 10);
    if (text == NULL || *text == 0 || *end != 0 || errno != 0 || v < min || v > max) {
        die("%s %s: must be a whole number from %lld to %lld", flag, text == NULL ? "(no value)" : text,
            (long long)min, (long long)max);
    }
    return v;
}

// Parses a finite number in [min, max]; dies if it is not.
static inline double parse_double(const char *flag, const char *text, double min, double max) {
    char *end = NULL;
    double v = text == NULL ? 0 : strtod(text, &end);
    if (text == NULL || *text == 0 || *end != 0 || !(v >= min && v <= max)) {
        die("%s %s: must be a number from %g to %g", flag, text == NULL ? "(no value)" : text, min, max);
    }
    return v;
}

// Returns the name of a file, the part of its path after the last slash.
static inline const char *file_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// Creates the folder and its parents, as mkdir -p; dies if it cannot.
static inline void make_dirs(const char *path) {
    char part[PATH_BYTES];
    size_t n = strlen(path);
    if (n == 0 || n >= sizeof(part))
        die("the folder name has %zu characters: choose one of 1 to %d", n, PATH_BYTES - 1);
    for (size_t i = 1; i <= n; i++) {
        if (path[i] != '/' && path[i] != 0) continue;
        memcpy(part, path, i);
        part[i] = 0;
        if (mkdir(part, 0777) == 0) continue;
        int reason = errno;
        struct stat st;
        if (stat(part, &st) != 0)
            die("cannot create folder %s: %s; choose another folder", part, strerror(reason));
        if (!S_ISDIR(st.st_mode))
            die("cannot create folder %s: a file has that name; choose another folder", part);
    }
}

// Opens `path`.tmp for writing; atomic_commit renames it to `path`. Dies if it cannot. The file is always a
// new one: an older file or link of that name is removed, so that a symbolic link is never followed.
static inline void atomic_open(AtomicFile *a, const char *path) {
    struct stat st;
    size_t n = strlen(path);
    if (n >= sizeof(a->path))
        die("the file name has %zu characters: choose one of at most %d", n, PATH_BYTES - 1);
    memcpy(a->path, path, n + 1);
    memcpy(a->tmp, path, n);
    memcpy(a->tmp + n, ".tmp", sizeof(".tmp"));
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode))
        die("cannot write %s: it is a folder; choose another name", path);
    unlink(a->tmp);
    int fd = open(a->tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    a->f = fd < 0 ? NULL : fdopen(fd, "wb");
    if (a->f == NULL || fstat(fd, &st) != 0)
        die("cannot write %s: %s; choose another folder", a->tmp, strerror(errno));
    a->device = st.st_dev;
    a->inode = st.st_ino;
    a->next = atomic_unfinished;
    atomic_unfinished = a;
}

// Appends `bytes` bytes; dies if it cannot.
static inline void atomic_write(AtomicFile *a, const void *data, size_t bytes) {
    if (bytes > 0 && fwrite(data, 1, bytes, a->f) != bytes) {
        die("cannot write %s: %s; check the free disk space and ulimit -f", a->tmp, strerror(errno));
    }
}

// Writes all bytes to disk and closes the file, which keeps its temporary name.
static inline void atomic_sync(AtomicFile *a) {
    if (fflush(a->f) != 0 || fsync(fileno(a->f)) != 0) {
        die("cannot write %s: %s; check the free disk space and ulimit -f", a->tmp, strerror(errno));
    }
    FILE *f = a->f;
    a->f = NULL;
    if (fclose(f) != 0)
        die("cannot write %s: %s; check the free disk space and ulimit -f", a->tmp, strerror(errno));
}

// Writes the file to disk and renames it to its final name, atomically replacing an older file. Dies if
// another process has replaced path.tmp.
static inline void atomic_commit(AtomicFile *a) {
    struct stat st;
    if (a->f != NULL) atomic_sync(a);
    if (lstat(a->tmp, &st) == 0 && (st.st_dev != a->device || st.st_ino != a->inode)) {
        a->tmp[0] = 0; // die() must not remove the other process's file
        die("cannot write %s: another process writes it, too; stop one of them", a->path);
    }
    if (rename(a->tmp, a->path) != 0)
        die("cannot rename %s to %s: %s; check the folder", a->tmp, a->path, strerror(errno));
    AtomicFile **link = &atomic_unfinished;
    while (*link != a) link = &(*link)->next;
    *link = a->next;

    // sync the folder too, since it holds the new name
    char folder[PATH_BYTES];
    const char *slash = strrchr(a->path, '/');
    int length = slash == NULL ? 1 : slash == a->path ? 1 : (int)(slash - a->path);
    snprintf(folder, sizeof(folder), "%.*s", length, slash == NULL ? "." : a->path);
    int fd = open(folder, O_RDONLY | O_DIRECTORY);
    if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL)) { // EINVAL: this file system cannot sync folders
        die("cannot sync folder %s: %s; check its disk", folder, strerror(errno));
    }
    close(fd);
}

// Locks a folder until this process ends: only one run may write to it. flag: the folder's flag, for
// messages. Returns the descriptor of the lock file DIR/.lock, which stays open; dies with the other
// process's id and host if the folder is locked.
//
// flock guards local file systems, and NFS mounted without `nolock` (the server keeps the lock and frees it
// when the client's lease ends). On a file system without locks, such as Lustre without `-o flock`, it warns
// and returns -1.
static inline int folder_lock(const char *flag, const char *dir) {
    char path[PATH_BYTES], owner[320] = "", host[256] = "";
    if (snprintf(path, sizeof path, "%s/.lock", dir) >= (int)sizeof path)
        die("%s %s: the name is too long; choose a shorter path", flag, dir);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
    if (fd < 0)
        die("%s %s: cannot write to the folder: %s; choose another folder", flag, dir, strerror(errno));
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        int reason = errno;
        if (reason != EWOULDBLOCK) {
            fprintf(stderr, "warning: %s %s: cannot lock the folder: %s; start no second run on it\n", flag,
                    dir, strerror(reason));
            close(fd);
            return -1;
        }
        for (int i = 0; i < 20 && !owner[0]; i++) { // the owner may not have written its name yet
            if (i > 0) usleep(10000);
            ssize_t n = pread(fd, owner, sizeof owner - 1, 0);
            owner[n > 0 ? n : 0] = 0;
            owner[strcspn(owner, "\n")] = 0;
        }
        die("%s %s: %s writes to this folder; wait until it ends, or choose another folder", flag, dir,
            owner[0] ? owner : "another process");
    }
    gethostname(host, sizeof host - 1);
    snprintf(owner, sizeof owner, "process %lld on host %s\n", (long long)getpid(), host);
    if (ftruncate(fd, 0) != 0 || pwrite(fd, owner, strlen(owner), 0) < 0)
        die("cannot write %s: %s; check the free disk space and ulimit -f", path, strerror(errno));
    return fd;
}

#endif
