// test_comm.c: tests llmc/comm.c with several processes on this host: every launcher, and every way to fail.
// With USE_MPI it also starts itself by mpirun.
#define COMM_RENDEZVOUS_SECONDS 3
#define COMM_TIMEOUT_SECONDS 2
#define COMM_HEARTBEAT_SECONDS 0.3
#include "../../llmc/comm.c"
#include "test.h"
#include <signal.h>
#include <sys/wait.h>

enum { MAX_PROCESSES = 48, RANKS = 8 }; // processes that run at once, and the most ranks of one job

// The actions of a process once all ranks are connected.
typedef enum {
    WORK,
    DIE_IN_STEP,
    KILLED,
    STOPPED,
    SIZE_MISMATCH,
    NCCL_ERROR,
    NOT_STARTED,
    KILLED_AT_STARTUP
} Action;
typedef struct {
    int code;        // exit code, -1: killed by a signal
    char text[4096]; // stderr
    double seconds;  // until the process ended
} Result;

static const char *nccl_error(void *message) {
    return (const char *)message;
}

// The program of one process: starts, checks the collectives, acts, and ends.
static void child(Action action, int rank) {
    Comm c;
    if (action == KILLED_AT_STARTUP) signal(SIGALRM, SIG_DFL), ualarm(700000, 0);
    comm_start(&c);
    if (c.rank != rank) die("is rank %d", c.rank);
    if (c.local_rank != rank) die("is local rank %d", c.local_rank); // all ranks run on one host
    for (int i = 0; i < 30; i++) {
        int64_t send[3] = {rank, i, 7 * rank + i}, recv[RANKS][3], value = rank == 0 ? 1000 + i : -1;
        comm_allgather(&c, send, sizeof send, recv);
        for (int r = 0; r < c.ranks; r++)
            if (recv[r][0] != r || recv[r][1] != i || recv[r][2] != 7 * r + i)
                die("allgather brought %ld", (long)recv[r][2]);
        comm_broadcast(&c, &value, sizeof value);
        if (value != 1000 + i) die("broadcast brought %ld", (long)value);
    }
    size_t large = 1 << 20; // more than a socket's buffers hold
    unsigned char *send = (unsigned char *)xmalloc(large),
                  *recv = (unsigned char *)xmalloc(large * (size_t)c.ranks);
    memset(send, rank + 1, large);
    comm_allgather(&c, send, large, recv);
    for (size_t i = 0; i < large * (size_t)c.ranks; i++)
        if (recv[i] != i / large + 1) die("byte %zu of a large allgather is %d", i, recv[i]);
    free(send), free(recv);
    if (action == DIE_IN_STEP) die("token %d is wrong", 17);
    if (action == KILLED) raise(SIGKILL);
    if (action == STOPPED) raise(SIGSTOP);
    if (action == SIZE_MISMATCH) comm_allgather(&c, "12345", 5, xmalloc(64));
    if (action == NCCL_ERROR) {
        comm_set_error_check(&c, nccl_error, (void *)"NCCL: the cable is cut");
        sleep(5);
    }
    comm_barrier(&c);
    comm_end(&c);
    exit(0);
}

// Returns a port that no process listens on, a different one each time.
static int unused_port(void) {
    static char given[65536];
    for (;;) {
        CommAddress a;
        int fd = comm_listen(0, "none");
        comm_local_address(&a, fd);
        close(fd);
        if (!given[a.port]++) return a.port;
    }
}

// Forks a process that sets `variables` and runs as `rank`. Its stderr arrives in the pipe *stderr_pipe.
static pid_t start(int *stderr_pipe, char *const *variables, Action action, int rank) {
    int pipe_ends[2];
    if (pipe(pipe_ends)) die("pipe: %s", strerror(errno));
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(pipe_ends[1], 2);
        close(pipe_ends[0]), close(pipe_ends[1]);
        for (int i = 0; variables[i]; i++) putenv(variables[i]);
        child(action, rank);
    }
    close(pipe_ends[1]);
    *stderr_pipe = pipe_ends[0];
    return pid;
}

// Runs `count` processes, process i as rank[i] with variables[i] and action[i], until all have ended.
static void run(int count, char *variables[MAX_PROCESSES][8], const Action *action, const int *rank,
                Result *result) {
    memset(result, 0, MAX_PROCESSES * sizeof *result);
    pid_t pid[MAX_PROCESSES];
    int stderr_pipe[MAX_PROCESSES];
    double begin = now_seconds();
    for (int i = 0; i < count; i++)
        if (action[i] != NOT_STARTED) pid[i] = start(&stderr_pipe[i], variables[i], action[i], rank[i]);
    for (int running = 1; running;) {
        running = 0;
        for (int i = 0; i < count; i++) { // the stopped processes are killed after the others have ended
            int status;
            if (action[i] == NOT_STARTED || pid[i] == 0 || action[i] == STOPPED) continue;
            if (waitpid(pid[i], &status, WNOHANG) == 0) {
                running = 1;
                if (now_seconds() - begin > 30) kill(pid[i], SIGKILL); // it hangs
                continue;
            }
            result[i].seconds = now_seconds() - begin;
            result[i].code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
            pid[i] = 0;
            ssize_t n = read(stderr_pipe[i], result[i].text, sizeof result[i].text - 1);
            result[i].text[n > 0 ? n : 0] = 0;
            close(stderr_pipe[i]);
        }
        comm_pause();
    }
    for (int i = 0; i < count; i++) {
        if (action[i] != STOPPED) continue;
        kill(pid[i], SIGKILL);
        waitpid(pid[i], NULL, 0);
        close(stderr_pipe[i]);
    }
}

typedef enum { TORCHRUN, AGENT, MPI_VARIABLES, SLURM, FOLDER } Launcher;
static const char *const launcher_names[] = {"torchrun", "torchrun's agent", "mpirun's variables", "srun",
                                             "a folder"};

// Writes the environment variables that a launcher sets for one of `ranks` processes.
static void launch(Launcher launcher, char *variables[8], const char *folder, int port, int rank, int ranks) {
    static char text[4096][128];
    static int used;
    const char *names[] = {"RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"};
    const char *sizes[] = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"};
    int set = launcher == MPI_VARIABLES ? 1 : launcher == SLURM ? 2 : 0, n = 0;
#define SET(...) snprintf(text[used], sizeof text[used], __VA_ARGS__), variables[n++] = text[used++ % 4096]
    SET("%s=%d", names[set], rank);
    SET("%s=%d", sizes[set], ranks);
    if (launcher == FOLDER) SET("MASTER_DIR=%s", folder);
    if (launcher == TORCHRUN || launcher == AGENT || launcher == MPI_VARIABLES) SET("MASTER_ADDR=localhost");
    if (launcher == SLURM) SET("SLURM_STEP_NODELIST=localhost,nowhere[1-3]");
    if (launcher == SLURM) SET("SLURM_JOB_ID=%d", port - 20000); // comm.c derives `port` from the job id
    if (launcher == AGENT) SET("TORCHELASTIC_USE_AGENT_STORE=True");
    if (launcher != FOLDER && launcher != SLURM) SET("MASTER_PORT=%d", launcher == AGENT ? port - 1 : port);
#undef SET
    variables[n] = NULL;
}

static const char *folder;

// Returns whether the text is one line that contains all three parts.
static int one_line(const char *text, const char *first, const char *second, const char *third) {
    const char *newline = strchr(text, '\n');
    return newline && newline[1] == 0 && strstr(text, first) && strstr(text, second) && strstr(text, third);
}

// Appends a job of `ranks` processes to the *count processes that are to run.
static void add(Launcher launcher, int ranks, const Action *actions, int *count,
                char *variables[MAX_PROCESSES][8], Action *action, int *rank) {
    int port = unused_port();
    if (launcher == SLURM)
        port = 20000 + (int)((getpid() + 7 * port) % 10000); // comm.c derives the port from the job id
    for (int i = 0; i < ranks; i++, *count += 1) {
        launch(launcher, variables[*count], folder, port, i, ranks);
        action[*count] = actions[i], rank[*count] = i;
    }
}

static void test_start(void) {
    static const Action work[RANKS] = {WORK};
    char *variables[MAX_PROCESSES][8];
    Action action[MAX_PROCESSES];
    Result result[MAX_PROCESSES];
    int rank[MAX_PROCESSES], count = 0;
    for (int launcher = TORCHRUN; launcher <= FOLDER; launcher++)
        add((Launcher)launcher, launcher == TORCHRUN ? RANKS : 3, work, &count, variables, action, rank);
    run(count, variables, action, rank, result);
    for (int i = 0; i < count; i++)
        CHECK(result[i].code == 0 && !result[i].text[0], "%s, rank %d: code %d, %s",
              launcher_names[i < RANKS ? 0 : 1 + (i - RANKS) / 3], rank[i], result[i].code, result[i].text);
}

// Every rank but the failing one prints one line that names the failing rank. All cases run at once, because
// most of them wait for a timeout.
static void test_failures(void) {
    static const struct {
        Action action;
        const char *message;
        double seconds; // limit
    } cases[] = {
        {DIE_IN_STEP, "failed: token 17 is wrong", 8},
        {KILLED, "is gone: its process ended without a message", 8},
        {STOPPED, "is gone: no heartbeat for", 15},
        {SIZE_MISMATCH, "is out of step: it sent", 8},
        {NCCL_ERROR, "failed: NCCL: the cable is cut", 8},
        {KILLED_AT_STARTUP, "is gone", 10},
        {NOT_STARTED, "did not connect within 3 seconds", 15},
    };
    enum { CASES = sizeof cases / sizeof cases[0] };
    char *variables[MAX_PROCESSES][8];
    Action action[MAX_PROCESSES];
    Result result[MAX_PROCESSES];
    int rank[MAX_PROCESSES], count = 0;
    for (int c = 0; c < 2 * CASES; c++) {
        Action actions[3] = {WORK, WORK, WORK};
        actions[c % 2 * 2] = cases[c / 2].action;
        if (cases[c / 2].action == KILLED_AT_STARTUP)
            actions[1] = NOT_STARTED; // so that the rendezvous is not over before the kill
        add(TORCHRUN, 3, actions, &count, variables, action, rank);
    }
    run(count, variables, action, rank, result);
    for (int i = 0; i < count; i++) {
        int c = i / 6, failing_rank = i / 3 % 2 * 2;
        const char *message = cases[c].message;
        char prefix[32], named[32];
        if (rank[i] == failing_rank || action[i] == NOT_STARTED) continue;
        snprintf(prefix, sizeof prefix, "error: rank %d: ", rank[i]);
        snprintf(named, sizeof named, "rank %d", failing_rank);
        if (cases[c].action == SIZE_MISMATCH && failing_rank == 0)
            strcpy(named, "rank"); // rank 0 names the rank that it reads first
        if (cases[c].action == NOT_STARTED && failing_rank == 0)
            message = "no connection to rank 0 at localhost";
        CHECK(result[i].code == 1 && one_line(result[i].text, prefix, named, message),
              "case %d, failing rank %d, rank %d: code %d, %s", c, failing_rank, rank[i], result[i].code,
              result[i].text);
        CHECK(result[i].seconds < cases[c].seconds, "case %d, failing rank %d, rank %d: %.1f s", c,
              failing_rank, rank[i], result[i].seconds);
    }
}

// Rank 0 exits at once when a rank is wrong, and tells all connected ranks. A rank that connects at that
// moment or later finds no rank 0. Returns the message that is to be in the result.
static const char *expected_error(const Result *e, int may_be_late, const char *why) {
    if (may_be_late && strstr(e->text, "no connection")) return "no connection to rank 0";
    if (may_be_late && strstr(e->text, "is gone")) return "is gone: its process ended during startup";
    return why;
}

static void test_wrong_start(void) {
    char *variables[MAX_PROCESSES][8];
    Action action[MAX_PROCESSES] = {WORK};
    Result result[MAX_PROCESSES];
    int rank[MAX_PROCESSES] = {0, 1, 2}, port = unused_port();
    // rank 2 has another world size
    for (int i = 0; i < 3; i++) launch(TORCHRUN, variables[i], NULL, port, i, i == 2 ? 4 : 3);
    run(3, variables, action, rank, result);
    for (int i = 0; i < 3; i++)
        CHECK(result[i].code == 1 &&
                  one_line(result[i].text, "error: rank ", "",
                           expected_error(&result[i], i == 1,
                                          "rank 2 was started with world size 4, rank 0 with 3")),
              "world size, rank %d: code %d, %s", i, result[i].code, result[i].text);
    // the same rank twice
    port = unused_port();
    for (int i = 0; i < 4; i++)
        rank[i] = i < 3 ? i : 1, launch(TORCHRUN, variables[i], NULL, port, rank[i], 4);
    run(4, variables, action, rank, result);
    for (int i = 0; i < 4; i++)
        CHECK(result[i].code == 1 &&
                  one_line(result[i].text, "error: rank ", "",
                           expected_error(&result[i], i == 2, "two processes were started as rank 1 of 4")),
              "twice, process %d: code %d, %s", i, result[i].code, result[i].text);
    // a process that never answers listens on the port: rank 0 reports it, rank 1 does not hang
    int taken = comm_listen(0, "none");
    CommAddress a;
    comm_local_address(&a, taken);
    for (int i = 0; i < 2; i++) rank[i] = i, launch(TORCHRUN, variables[i], NULL, a.port, i, 2);
    run(2, variables, action, rank, result);
    close(taken);
    CHECK(result[0].code == 1 &&
              one_line(result[0].text, "error: rank 0: cannot listen on port", "in use", "MASTER_PORT"),
          "%s", result[0].text);
    CHECK(result[1].code == 1 &&
              one_line(result[1].text, "error: rank 1: rank 0 at localhost port", "", "does not answer"),
          "%s", result[1].text);
    CHECK(result[1].seconds < 8, "%.1f s", result[1].seconds);
    // a host that does not exist
    static char *nowhere[2][8] = {
        {"RANK=1", "WORLD_SIZE=2", "MASTER_ADDR=no-such-host.invalid", "MASTER_PORT=29511", NULL}};
    memcpy(variables[0], nowhere[0], sizeof nowhere[0]);
    rank[0] = 1;
    run(1, variables, action, rank, result);
    CHECK(result[0].code == 1 &&
              one_line(result[0].text,
                       "error: rank 1: no connection to rank 0 at no-such-host.invalid port 29511",
                       "within 3 seconds", ": "),
          "%s", result[0].text);
    // world size 1, and no world size: the process runs alone
    static char *alone[2][8] = {{"RANK=0", "WORLD_SIZE=1", NULL}, {NULL}};
    memcpy(variables, alone, sizeof alone);
    rank[0] = rank[1] = 0;
    run(2, variables, action, rank, result);
    CHECK(result[0].code == 0 && result[1].code == 0, "%s%s", result[0].text, result[1].text);
    // a rank that is not a number
    static char *words[1][8] = {{"RANK=two", "WORLD_SIZE=2", NULL}};
    memcpy(variables, words, sizeof words);
    run(1, variables, action, rank, result);
    CHECK(result[0].code == 1 && one_line(result[0].text, "error: ", "RANK", "two"), "%s", result[0].text);
}

// Rank 0 sends its error message to pending peers, too.
static void test_pending_peer_gets_error(void) {
    char *variables[MAX_PROCESSES][8], why[256], text[512];
    int stderr_pipe, port = unused_port(), status, silent_peer = -1;
    launch(TORCHRUN, variables[0], NULL, port, 0, 2);
    pid_t rank0 = start(&stderr_pipe, variables[0], WORK, 0);
    for (int i = 0; i < 100 && silent_peer < 0; i++) {
        silent_peer = comm_connect("127.0.0.1", port, 1, why);
        if (silent_peer < 0) comm_pause();
    }
    int invalid_peer = comm_connect("127.0.0.1", port, 1, why);
    comm_configure_socket(silent_peer), comm_configure_socket(invalid_peer);
    CommHello hello = {1, 5};
    CommHeader head = {COMM_MAGIC, COMM_HELLO, sizeof hello};
    CHECK(silent_peer >= 0 && invalid_peer >= 0, "%s", why);
    CHECK(comm_send_all(invalid_peer, &head, sizeof head) == 0 &&
              comm_send_all(invalid_peer, &hello, sizeof hello) == 0,
          "%s", strerror(errno));
    ssize_t n = recv(silent_peer, &head, sizeof head, MSG_WAITALL);
    CHECK(n == sizeof head && head.type == COMM_FAIL && head.bytes < sizeof text, "%zd bytes", n);
    n = recv(silent_peer, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    CHECK(strcmp(text, "rank 1 was started with world size 5, rank 0 with 2: set the same world size") == 0,
          "%s", text);
    close(silent_peer), close(invalid_peer);
    waitpid(rank0, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1, "status %d", status);
    close(stderr_pipe);
}

// Connections that send nothing, or another protocol, do not disturb the rendezvous.
static void test_pending_peers(void) {
    char *variables[MAX_PROCESSES][8];
    int stderr_pipe[2], port = unused_port(), status;
    for (int i = 0; i < 2; i++) launch(TORCHRUN, variables[i], NULL, port, i, 2);
    pid_t rank0 = start(&stderr_pipe[0], variables[0], WORK, 0);
    char why[256];
    int silent_peer = -1, invalid_peer = -1;
    for (int i = 0; i < 20 && silent_peer < 0; i++) {
        silent_peer = comm_connect("127.0.0.1", port, 1, why);
        if (silent_peer < 0) comm_pause();
    }
    invalid_peer = comm_connect("127.0.0.1", port, 1, why);
    CHECK(silent_peer >= 0 && invalid_peer >= 0, "%s", why);
    CHECK(comm_send_all(invalid_peer, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 36) == 0, "%s",
          strerror(errno));
    comm_pause();
    pid_t rank1 = start(&stderr_pipe[1], variables[1], WORK, 1);
    waitpid(rank0, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank 0 ended with %d", status);
    waitpid(rank1, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank 1 ended with %d", status);
    close(silent_peer), close(invalid_peer), close(stderr_pipe[0]), close(stderr_pipe[1]);
}

static void test_hosts(void) {
    static const char *const lists[][2] = {{"node[07-09,12],login1", "node07"},
                                           {"a,b", "a"},
                                           {"one", "one"},
                                           {"n[3]-ib,n4", "n3-ib"},
                                           {"r[1-2]n[5-9]", "r1n5"},
                                           {"", ""}};
    for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++) {
        char host[64];
        comm_slurm_first_host(lists[i][0], host, sizeof host);
        CHECK(strcmp(host, lists[i][1]) == 0, "%s: %s", lists[i][0], host);
    }
    char small[4];
    comm_slurm_first_host("abcdefgh", small, sizeof small);
    CHECK(strcmp(small, "abc") == 0, "%s", small);
}

#ifdef USE_MPI
// mpirun starts this program again with an action, which one rank performs.
static void test_mpi(const char *self) {
    static const struct {
        const char *action;
        int rank; // that performs it
        const char *message;
    } cases[] = {{"work", 0, NULL},
                 {"die", 1, "error: rank 1: token 17 is wrong"},
                 {"die", 0, "error: rank 2: rank 0 failed: token 17 is wrong"},
                 {"killed", 1, "error: rank 0: rank 1 is gone: its process ended without a message"},
                 {"killed", 1, "error: rank 2: rank 1 is gone: its process ended without a message"},
                 {"killed", 0, "error: rank 2: rank 0 is gone: its process ended without a message"},
                 {"stopped", 1, "error: rank 2: rank 1 is gone: no heartbeat for"},
                 {"mismatch", 1, "error: rank 2: rank 1 is out of step: it sent 5 bytes, not 1"}};
    if (system("command -v mpirun >/dev/null") != 0) {
        SKIP("mpirun: not found");
        return;
    }
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char command[512], text[8192];
        snprintf(command, sizeof command,
                 "timeout 60 mpirun --allow-run-as-root --oversubscribe -np 3 %s mpi %s %d 2>&1", self,
                 cases[i].action, cases[i].rank);
        fflush(stdout);
        double begin = now_seconds();
        FILE *f = popen(command, "r");
        if (!f) die("popen: %s", strerror(errno));
        size_t n = fread(text, 1, sizeof text - 1, f);
        text[n] = 0;
        int status = pclose(f);
        CHECK((status == 0) == (i == 0) && now_seconds() - begin < 30, "mpirun %s: code %d, %s",
              cases[i].action, status, text);
        CHECK(!cases[i].message || strstr(text, cases[i].message), "mpirun %s %d: %s", cases[i].action,
              cases[i].rank, text);
    }
}

// Runs as the rank that mpirun has set.
static void mpi_child(const char *name, int acting_rank) {
    static const char *const names[] = {"work", "die", "killed", "stopped", "mismatch"};
    static const Action actions[] = {WORK, DIE_IN_STEP, KILLED, STOPPED, SIZE_MISMATCH};
    const char *rank = getenv("OMPI_COMM_WORLD_RANK") ? getenv("OMPI_COMM_WORLD_RANK") : getenv("PMI_RANK");
    for (int i = 0; i < 5; i++)
        if (strcmp(name, names[i]) == 0) child(atoi(rank) == acting_rank ? actions[i] : WORK, atoi(rank));
}
#endif

int main(int argc, char **argv) {
    alarm(240);
#ifdef USE_MPI
    if (argc == 4 && strcmp(argv[1], "mpi") == 0) mpi_child(argv[2], atoi(argv[3]));
    static const char *const ours[] = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MASTER_DIR"};
    for (size_t i = 0; i < sizeof ours / sizeof ours[0]; i++) unsetenv(ours[i]);
    test_mpi(argv[0]);
#endif
    (void)argc, (void)argv;
    char temporary[] = "/tmp/test_comm_XXXXXX";
    folder = mkdtemp(temporary);
    if (!folder) die("mkdtemp: %s", strerror(errno));
    test_hosts();
    test_start();
    test_pending_peers();
    test_wrong_start();
    test_pending_peer_gets_error();
    test_failures();
    CHECK(rmdir(folder) == 0, "%s: %s", folder, strerror(errno)); // rank 0 has removed its address file
    return test_end("test_comm");
}
