// folder_lock.h: locks an output folder for the life of the process, so that two programs never write to it
// at the same time.
//
// The lock is flock(2) on the file DIR/.lock, which holds its owner, "process PID on host HOST". The kernel
// releases the lock when the owner ends, also if it is killed; the file stays. data/shards.py uses the same
// lock. On NFS flock works between hosts if the server supports locks (Linux 2.6.12 and newer). On a file
// system without locks a warning is printed.
#ifndef LLMC_FOLDER_LOCK_H
#define LLMC_FOLDER_LOCK_H

#include "utils.h"
#include <sys/file.h>

// Locks an existing folder until the process ends. Dies if another process holds the lock, with that
// process's pid and host, and if the folder is not writable. flag: the flag that named the folder.
static inline void lock_output_folder(const char *flag, const char *dir) {
    char path[PATH_BYTES], owner[320], host[256];
    struct stat st;
    if (snprintf(path, sizeof(path), "%s/.lock", dir) >= PATH_BYTES)
        die("%s: folder name of %zu characters is too long; use a shorter one", flag, strlen(dir));
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, 0666);
    if (fd < 0 || fstat(fd, &st) != 0)
        die("%s %s: cannot write %s: %s; choose another folder", flag, dir, path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s %s: %s is not a file; remove it", flag, dir, path);
    int error = flock(fd, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
    if (error == EWOULDBLOCK) {
        int pid = 0;
        usleep(50000); // the owner may have the lock, but not yet have written its pid
        ssize_t n = pread(fd, owner, sizeof(owner) - 1, 0);
        owner[n > 0 ? n : 0] = 0;
        if (sscanf(owner, "process %d on host %255[A-Za-z0-9._-]", &pid, host) == 2)
            die("%s %s: process %d on host %s writes to this folder; wait until it ends, or choose another "
                "folder",
                flag, dir, pid, host);
        die("%s %s: another process writes to this folder; wait until it ends, or choose another folder",
            flag, dir);
    }
    if (error != 0)
        fprintf(stderr, "warning: cannot lock %s: %s; make sure that no other program writes to %s\n", path,
                strerror(error), dir);
    if (gethostname(host, sizeof(host)) != 0) snprintf(host, sizeof(host), "unknown");
    host[sizeof(host) - 1] = 0;
    int n = snprintf(owner, sizeof(owner), "process %d on host %s\n", (int)getpid(), host);
    // for the message of the other process only, so a full disk is no error
    if (ftruncate(fd, 0) != 0 || pwrite(fd, owner, (size_t)n, 0) != n) return;
    // the file stays open: closing it would release the lock
}

#endif
