// ranks.h: starts the processes of a multi-GPU test, one per GPU.
#ifndef RANKS_H
#define RANKS_H
#include "../../llmc/comm.h"
#include <sys/wait.h>
#ifdef EMULATOR_H
#include <omp.h>
#endif

// Returns the number of GPUs, from GPUS, which make test sets; 0 without it. Does not call CUDA, which must
// not be initialized before a fork.
static inline int test_gpus(void) {
#ifdef EMULATOR_H
    return 4;
#else
    const char *gpus = getenv("GPUS");
    return gpus ? atoi(gpus) : 0;
#endif
}

// Runs run_rank(argument), which returns an exit code, in `ranks` processes, which comm_start connects by
// environment variables. Returns the number of failed processes.
static inline int test_ranks(int ranks, int (*run_rank)(void *), void *argument) {
    char folder[] = "/tmp/ranks_XXXXXX";
    int failed = 0, status;
    if (!mkdtemp(folder)) die("mkdtemp: %s", strerror(errno));
    fflush(stdout);
    for (int r = 0; r < ranks; r++) {
        if (fork() > 0) continue;
        char variables[4][64];
        snprintf(variables[0], 64, "RANK=%d", r), snprintf(variables[1], 64, "WORLD_SIZE=%d", ranks);
        snprintf(variables[2], 64, "LOCAL_WORLD_SIZE=%d", ranks);
        snprintf(variables[3], 64, "MASTER_DIR=%s", folder);
        for (int i = 0; i < 4; i++) putenv(variables[i]);
#ifdef EMULATOR_H
        omp_set_num_threads(1); // the processes share the cores
#endif
        int code = run_rank(argument);
        fflush(stdout);
        _exit(code);
    }
    for (int r = 0; r < ranks; r++) failed += wait(&status) < 0 || status != 0;
    rmdir(folder);
    return failed;
}
#endif
