// ranks.h: starts the processes of a multi-GPU test, one per GPU.
#ifndef RANKS_H
#define RANKS_H
#include "../../llmc/comm.h"
#include <sys/wait.h>
#ifdef EMULATOR_H
#include <omp.h>
#endif

// Returns the number of GPUs. Does not call CUDA, which must not be initialized before a fork.
static inline int test_gpus(void) {
    int gpus = 4; // the emulator's
#ifndef EMULATOR_H
    FILE *f = popen("nvidia-smi -L 2>/dev/null | wc -l", "r");
    if (!f || fscanf(f, "%d", &gpus) != 1) gpus = 0;
    if (f) pclose(f);
#endif
    return gpus;
}

// Runs run_rank(argument), which returns an exit code, in `ranks` processes, which comm_start connects by
// environment variables. Returns the number of failed processes.
static inline int test_ranks(int ranks, int (*run_rank)(void *), void *argument) {
    CommAddress address;
    int listener = comm_listen(0, "none"), failed = 0, status;
    comm_local_address(&address, listener);
    close(listener);
    fflush(stdout);
    for (int r = 0; r < ranks; r++) {
        if (fork() > 0) continue;
        char variables[4][32];
        snprintf(variables[0], 32, "RANK=%d", r), snprintf(variables[1], 32, "WORLD_SIZE=%d", ranks);
        snprintf(variables[2], 32, "MASTER_ADDR=127.0.0.1"),
            snprintf(variables[3], 32, "MASTER_PORT=%d", address.port);
        for (int i = 0; i < 4; i++) putenv(variables[i]);
#ifdef EMULATOR_H
        omp_set_num_threads(1); // the processes share the cores
#endif
        int code = run_rank(argument);
        fflush(stdout);
        _exit(code);
    }
    for (int r = 0; r < ranks; r++) failed += wait(&status) < 0 || status != 0;
    return failed;
}
#endif
