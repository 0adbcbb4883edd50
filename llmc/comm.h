// comm.h: runs several processes as one job, one process per GPU: ranks, small collectives on the host, and
// failure detection. NCCL moves all large data (nccl.cuh).
//
// torchrun, Slurm, mpirun or the user set the rank and the world size (comm_find_launcher). MPI, where it is
// built in (-DUSE_MPI) and mpirun started the process, gives ranks and local ranks and runs the collectives.
// Without MPI, TCP connections do.
//
// Rank 0 listens on the interface of MASTER_ADDR; on loopback, if all ranks run on its host. Jobs of several
// hosts have a secret, without which no process joins the job.
//
// Every rank has one TCP connection to rank 0 and a thread that monitors it, with and without MPI: a process
// that dies must not leave the others waiting in a collective or in a kernel of NCCL. A failing rank sends
// its error message to rank 0, which forwards it. A closed connection or a missing heartbeat reveals a rank
// that died without a message. In each case all ranks exit with one line that names the failed rank.
#ifndef LLMC_COMM_H
#define LLMC_COMM_H
#include "utils.h"
#ifdef __cplusplus
extern "C" {
#endif

#define COMM_TEXT_BYTES 1024 // limit of an error message's text

// This process among all. Only the comm_ functions change it. It must not move in memory after comm_start.
typedef struct {
    int rank, ranks;         // alone: 0 of 1
    int local_rank;          // index among the ranks of this host
    struct CommState *state; // connections and monitor thread (comm.c); NULL: this process runs alone
} Comm;

typedef struct {
    const char *rank, *ranks; // names of the environment variables with the rank and the world size
    const char *local_ranks;  // name of the one with the number of ranks on this host
    const char *launcher;     // "torchrun or gpus_host.sh", "mpirun" or "srun"
} CommLauncher;

// Returns the launcher of this process, or NULL when the process runs alone or the world size is 1. RANK and
// WORLD_SIZE (torchrun, or set by hand) precede the variables of mpirun, and those precede Slurm's. Dies if
// the world size is not a number.
const CommLauncher *comm_find_launcher(void);

// Fills *c and connects all ranks. Returns after all have called it; a process that runs alone returns at
// once. Starts the monitor thread; from then on, die() on any rank ends all ranks. The main thread calls it,
// once.
//
// Rank 0 listens on TCP. The others get its address from MPI if mpirun started them and neither MASTER_DIR
// nor MASTER_ADDR is set; else from a file in the folder MASTER_DIR; else from MASTER_ADDR and MASTER_PORT.
// MASTER_ADDR defaults to the first host of the Slurm job, else to 127.0.0.1; MASTER_PORT to a port made
// from the Slurm job id, else to 29500. If the launcher's variables say that all ranks run on this host,
// MASTER_ADDR counts as 127.0.0.1.
//
// The secret comes with the address from MPI or MASTER_DIR, else from MASTER_SECRET. MASTER_DIR's file is
// readable by this user only. Without a secret all connections must be loopback.
//
// Rank 0 drops a connection that does not prove in time that it knows the secret, and one that claims a taken
// rank or another world size. It prints a line that names the peer, and waits on for the right one.
//
// Dies if a variable is invalid, if a rank does not connect within 50 seconds or fails meanwhile, or if rank
// 0 dropped this process.
void comm_start(Comm *c);

// Gathers every rank's send [bytes] into recv [ranks * bytes], in rank order. All ranks call it with the same
// number of bytes, from the thread that called comm_start; no call returns before all ranks have called. Dies
// if the numbers of bytes differ or a rank is gone. The same holds for the two functions below.
void comm_allgather(Comm *c, const void *send, size_t bytes, void *recv);

// Copies rank 0's data [bytes] to the other ranks' `data`.
void comm_broadcast(Comm *c, void *data, size_t bytes);

// Waits for all ranks.
void comm_barrier(Comm *c);

// From now on the monitor thread calls check_error(error_arg) every two seconds. check_error returns NULL, or
// an error message with which the thread dies. check_error NULL: no more calls. Does nothing in a process
// that runs alone.
void comm_set_error_check(Comm *c, const char *(*check_error)(void *error_arg), void *error_arg);

// Ends all ranks because of another rank, which the message (in printf's format) names. Unlike die(), it does
// not tell the others that this rank failed: they print the same message. Any thread may call it.
LLMC_NORETURN __attribute__((format(printf, 2, 3))) void comm_die(Comm *c, const char *format, ...);

// Waits for all ranks, disconnects, ends MPI, and frees *c. After it, the exit of a rank is no failure. All
// ranks call it. Does nothing in a process that runs alone.
void comm_end(Comm *c);

#ifdef __cplusplus
}
#endif
#endif
