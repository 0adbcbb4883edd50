// standard_streams.h: checks stdout of the programs in data/, whose results a script may read.
#ifndef LLMC_STANDARD_STREAMS_H
#define LLMC_STANDARD_STREAMS_H

#include "utils.h"
#include <signal.h>

// Call it first in main. Dies if stdout is closed. If stdin or stderr is closed, opens /dev/null in its
// place, because a file that is opened later would take its number and receive the messages. A write to a
// closed pipe becomes an error, which streams_end reports, instead of a signal.
static inline void streams_begin(void) {
    int stdout_closed = fcntl(STDOUT_FILENO, F_GETFD) < 0;
    for (int fd = 0; fd <= 2; fd++) {
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd) _exit(1);
    }
    if (stdout_closed) die("stdout is closed; redirect it to a file or to /dev/null");
    signal(SIGPIPE, SIG_IGN);
}

// Call it last in main. Dies if not all output reached stdout.
static inline void streams_end(void) {
    errno = 0;
    if (ferror(stdout) || fflush(stdout) != 0) {
        die("cannot write to stdout: %s; check the free disk space, or what reads it",
            errno != 0 ? strerror(errno) : "a write failed");
    }
}

#endif
