// ranks.h: a test's own processes, a GPU each.
#ifndef RANKS_H
#define RANKS_H
#include "../../llmc/comm.h"
#include <sys/wait.h>
#ifdef EMULATOR_H
#include <omp.h>
#endif

// GPUs that there are, without CUDA, which must not be used before a fork.
static inline int test_gpus(void) {
    int gpus = 4; // of the emulator
#ifndef EMULATOR_H
    FILE *f = popen("nvidia-smi -L 2>/dev/null | wc -l", "r");
    if (!f || fscanf(f, "%d", &gpus) != 1) gpus = 0;
    if (f) pclose(f);
#endif
    return gpus;
}

// Runs f(where), which returns an exit code, as `ranks` processes that comm_start brings together. Returns
// how many of them failed.
static inline int test_ranks(int ranks, int (*f)(void *), void *where) {
    CommAddress a;
    int listener = comm_listen(0, "none"), failed = 0, status;
    comm_local_address(&a, listener);
    close(listener);
    fflush(stdout);
    for (int r = 0; r < ranks; r++) {
        if (fork() > 0) continue;
        char text[4][32];
        snprintf(text[0], 32, "RANK=%d", r), snprintf(text[1], 32, "WORLD_SIZE=%d", ranks);
        snprintf(text[2], 32, "MASTER_ADDR=127.0.0.1"), snprintf(text[3], 32, "MASTER_PORT=%d", a.port);
        for (int i = 0; i < 4; i++) putenv(text[i]);
#ifdef EMULATOR_H
        omp_set_num_threads(1); // the cores are shared by the processes
#endif
        int code = f(where);
        fflush(stdout);
        _exit(code);
    }
    for (int r = 0; r < ranks; r++) failed += wait(&status) < 0 || status != 0;
    return failed;
}
#endif
