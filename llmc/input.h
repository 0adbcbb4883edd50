// input.h: opens input files. Only regular files are opened: opening a FIFO blocks until another program
// writes to it, and opening a device can have side effects.
#ifndef LLMC_INPUT_H
#define LLMC_INPUT_H

#include "utils.h"

// Returns what a file of this type is called in messages.
static inline const char *file_type_name(mode_t mode) {
    return S_ISDIR(mode)    ? "a folder"
           : S_ISFIFO(mode) ? "a FIFO"
           : S_ISSOCK(mode) ? "a socket"
           : S_ISCHR(mode)  ? "a device"
           : S_ISBLK(mode)  ? "a block device"
                            : "something else";
}

// Opens a regular file, or a link to one, for reading and fills *st. Returns the file descriptor, or -1 with
// errno set; errno is 0 if the path names anything but a regular file, whose type is then in st->st_mode.
static inline int input_try_open(const char *path, struct stat *st) {
    if (stat(path, st) != 0) return -1;
    int fd = -1, reason = 0;
    if (S_ISREG(st->st_mode)) {
        // O_NONBLOCK: does not block if a FIFO has replaced the file since stat
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
        if (fd < 0) return -1;
        if (fstat(fd, st) != 0) reason = errno;
        if (reason == 0 && S_ISREG(st->st_mode)) return fd;
        close(fd);
    }
    errno = reason;
    return -1;
}

// input_try_open that dies if the path names anything but a regular file. kind: word before the path in the
// message, such as "shard " or "".
static inline int input_open(const char *kind, const char *path, struct stat *st) {
    int fd = input_try_open(path, st);
    if (fd < 0 && errno == 0)
        die("cannot read %s%s: it is not a file but %s; check the path", kind, path,
            file_type_name(st->st_mode));
    return fd;
}

// input_open as a stream. Returns NULL where input_open returns -1.
static inline FILE *input_fopen(const char *kind, const char *path, struct stat *st) {
    int fd = input_open(kind, path, st);
    if (fd < 0) return NULL;
    FILE *f = fdopen(fd, "rb");
    if (f == NULL) die("cannot read %s%s: %s; free host memory", kind, path, strerror(errno));
    return f;
}

#endif
