// test_comm.c: tests llmc/comm.c with several processes on this host: every launcher, every way to fail, and
// hostile peers, among them random byte streams. With USE_MPI it also starts itself by mpirun.
// Environment: SECONDS (how long random byte streams are sent; default: until 1,000 are), SEED (of the
// first).
#define COMM_RENDEZVOUS_SECONDS 3
#define COMM_TIMEOUT_SECONDS 2
#define COMM_HEARTBEAT_SECONDS 0.3
#define COMM_IDENTIFY_SECONDS 1.5
#define COMM_MPI_BYTES 100000 // so that a large collective takes several calls of MPI
#include "../../llmc/comm.c"
#include "test.h"
#include <signal.h>
#include <sys/resource.h>
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

static const CommState no_secret;

// Returns a port that no process listens on, a different one each time.
static int unused_port(void) {
    static char given[65536];
    for (;;) {
        CommAddress a;
        int fd = comm_listen(&no_secret, "127.0.0.1", 0);
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

static int count_lines(const char *text) {
    int lines = 0;
    for (; *text; text++) lines += *text == '\n';
    return lines;
}

static void test_wrong_start(void) {
    static const char *const world[] = {"rank 2 of 3 did not connect within 3 seconds",
                                        "rank 2 of 3 did not connect within 3 seconds",
                                        "rank 2 was started with world size 4, rank 0 with 3"};
    static char *nowhere[8] = {"RANK=1", "WORLD_SIZE=2", "MASTER_ADDR=no-such-host.invalid",
                               "MASTER_PORT=29511", NULL};
    char *variables[MAX_PROCESSES][8];
    Action action[MAX_PROCESSES] = {WORK};
    Result result[MAX_PROCESSES], *twice = result + 3, *taken = result + 7, *lost = result + 9;
    int rank[MAX_PROCESSES] = {0, 1, 2, 0, 1, 2, 1, 0, 1, 1};
    int ports[2] = {unused_port(), unused_port()}, listener = comm_listen(&no_secret, "127.0.0.1", 0);
    CommAddress a;
    comm_local_address(&a, listener);
    for (int i = 0; i < 9; i++) {
        if (i < 3) launch(TORCHRUN, variables[i], NULL, ports[0], rank[i], i == 2 ? 4 : 3);
        if (i >= 3 && i < 7) launch(TORCHRUN, variables[i], NULL, ports[1], rank[i], 4);
        if (i >= 7) launch(TORCHRUN, variables[i], NULL, a.port, rank[i], 2);
    }
    memcpy(variables[9], nowhere, sizeof nowhere);
    run(10, variables, action, rank, result);
    close(listener);
    // rank 2 has another world size: rank 0 drops it, and waits for the right one
    for (int i = 0; i < 3; i++)
        CHECK(result[i].code == 1 && count_lines(result[i].text) == (i == 0 ? 2 : 1) &&
                  strstr(result[i].text, world[i]) && strstr(result[i].text, world[2]),
              "world size, rank %d: code %d, %s", i, result[i].code, result[i].text);
    CHECK(strncmp(result[0].text, "note: rank 0: dropped the connection from 127.0.0.1 port ", 57) == 0, "%s",
          result[0].text);
    // the same rank twice, while rank 3 is missing
    for (int i = 0; i < 4; i++)
        CHECK(twice[i].code == 1 && strstr(twice[i].text, "two processes were started as rank 1 of 4"),
              "twice, process %d: code %d, %s", i, twice[i].code, twice[i].text);
    CHECK(strstr(twice[0].text, "rank 3 of 4 did not connect"), "%s", twice[0].text);
    CHECK(count_lines(twice[1].text) == 1 && count_lines(twice[3].text) == 1, "%s%s", twice[1].text,
          twice[3].text);
    // a process that never answers listens on the port: rank 0 reports it, rank 1 does not hang
    CHECK(taken[0].code == 1 && one_line(taken[0].text, "error: rank 0: cannot listen on localhost port",
                                         "in use", "MASTER_PORT"),
          "%s", taken[0].text);
    CHECK(taken[1].code == 1 &&
              strstr(taken[1].text, "error: rank 1: no connection to rank 0 at localhost") &&
              strstr(taken[1].text, "it does not answer"),
          "%s", taken[1].text);
    CHECK(taken[1].seconds < 8, "%.1f s", taken[1].seconds);
    // a host that does not exist
    CHECK(lost[0].code == 1 &&
              one_line(lost[0].text,
                       "error: rank 1: no connection to rank 0 at no-such-host.invalid port 29511",
                       "within 3 seconds", ": "),
          "%s", lost[0].text);
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

// ----------------------------------------------------------------------------
// Hostile peers

static const char secret[] = "correct horse battery staple", wrong_secret[] = "incorrect horse battery";

// Rank 0 of a job, to which the test connects itself.
typedef struct {
    char *variables[8][8];
    int port, ranks, stderr_pipe[8];
    pid_t pid[8];
} Job;

static void set(char **variables, char *text) {
    while (*variables) variables++;
    variables[0] = text, variables[1] = NULL;
}

// Starts rank 0. secret_variable: NULL, or "MASTER_SECRET=..." of all ranks.
static void start_job(Job *job, int ranks, char *secret_variable, Action action) {
    memset(job, 0, sizeof *job);
    job->port = unused_port(), job->ranks = ranks;
    for (int r = 0; r < ranks; r++) {
        launch(TORCHRUN, job->variables[r], NULL, job->port, r, ranks);
        if (secret_variable) set(job->variables[r], secret_variable);
    }
    job->pid[0] = start(&job->stderr_pipe[0], job->variables[0], action, 0);
}

// Starts the other ranks, and waits for all. Returns the number of ranks that have failed. Writes what rank 0
// has printed to text [4096].
static int finish_job(Job *job, char *text) {
    int failed = 0, status;
    for (int r = 1; r < job->ranks; r++)
        job->pid[r] = start(&job->stderr_pipe[r], job->variables[r], WORK, r);
    for (int r = 0; r < job->ranks; r++) {
        failed += waitpid(job->pid[r], &status, 0) < 0 || status != 0;
        ssize_t n = read(job->stderr_pipe[r], text + (r > 0) * 4096, 4095);
        text[(r > 0) * 4096 + (n > 0 ? n : 0)] = 0;
        close(job->stderr_pipe[r]);
    }
    return failed;
}

// Connects to rank 0, and reads its nonce.
static int connect_job(const Job *job, unsigned char nonce[COMM_NONCE_BYTES]) {
    char why[256] = "";
    int fd = -1;
    for (int i = 0; i < 100 && fd < 0; i++) {
        fd = comm_connect(&no_secret, "127.0.0.1", job->port, 1, why);
        if (fd < 0) comm_pause();
    }
    if (fd < 0) die("connect: %s", why);
    comm_configure_socket(fd);
    CHECK(!nonce || !comm_read_message(fd, COMM_CHALLENGE, nonce, COMM_NONCE_BYTES, now_seconds() + 2),
          "no challenge");
    return fd;
}

static int send_bytes(int fd, const void *data, size_t bytes) {
    return comm_send_all(fd, data, bytes);
}

// Claims a rank with a secret.
static void send_hello(int fd, const unsigned char *nonce, int rank, int ranks, const char *text) {
    CommState s = {0};
    CommHello hello = {.rank = rank, .ranks = ranks};
    snprintf(s.secret, sizeof s.secret, "%s", text);
    comm_prove(&s, "rank", nonce, &hello, hello.proof);
    comm_send_message(fd, COMM_HELLO, &hello, sizeof hello);
}

// Returns whether the other end closes the connection within `seconds`.
static int is_closed(int fd, double seconds) {
    char discarded[4096];
    double end = now_seconds() + seconds;
    while (now_seconds() < end) {
        struct pollfd wait = {fd, POLLIN, 0};
        if (poll(&wait, 1, 100) > 0 && recv(fd, discarded, sizeof discarded, 0) <= 0) return 1;
    }
    return 0;
}

static int count_text(const char *text, const char *part) {
    int count = 0;
    for (; (text = strstr(text, part)) != NULL; text++) count++;
    return count;
}

// Each wrong peer is dropped and named, and the job still starts.
static void test_hostile_peers(void) {
    static char variable[64], text[2 * 4096];
    unsigned char nonce[COMM_NONCE_BYTES], other[COMM_NONCE_BYTES];
    Job job;
    int fd[8];
    snprintf(variable, sizeof variable, "MASTER_SECRET=%s", secret);
    start_job(&job, 2, variable, WORK);
    fd[0] = connect_job(&job, nonce); // another secret
    send_hello(fd[0], nonce, 1, 2, wrong_secret);
    CHECK(is_closed(fd[0], 1), "another secret");
    fd[1] = connect_job(&job, nonce); // no secret
    send_hello(fd[1], nonce, 1, 2, "");
    CHECK(is_closed(fd[1], 1), "no secret");
    fd[2] = connect_job(&job, other); // the proof of another connection
    send_hello(fd[2], nonce, 1, 2, secret);
    CHECK(is_closed(fd[2], 1), "another nonce");
    fd[3] = connect_job(&job, nonce); // another protocol
    send_bytes(fd[3], "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 36);
    CHECK(is_closed(fd[3], 1), "HTTP");
    fd[4] = connect_job(&job, nonce); // ends the job, without a proof
    comm_send_message(fd[4], COMM_FAIL, "\033[2J", 4);
    CHECK(is_closed(fd[4], 1), "COMM_FAIL");
    fd[5] = connect_job(&job, nonce); // another world size, with the secret
    send_hello(fd[5], nonce, 1, 9, secret);
    CHECK(is_closed(fd[5], 1), "world size 9");
    fd[6] = connect_job(&job, nonce); // rank 0, with the secret
    send_hello(fd[6], nonce, 0, 2, secret);
    CHECK(is_closed(fd[6], 1), "rank 0");
    fd[7] = connect_job(&job, nonce); // sends nothing
    int failed = finish_job(&job, text);
    CHECK(failed == 0 && !text[4096], "%d ranks failed: %s%s", failed, text, text + 4096);
    // two lines for the five that fail for two reasons, one after the other
    CHECK(count_lines(text) == 4 &&
              count_text(text, "note: rank 0: dropped the connection from 127.0.0.1 port") == 4,
          "%s", text);
    CHECK(count_text(text, "it claims rank 1 with another secret") == 1, "%s", text);
    CHECK(count_text(text, "it is no rank of this program") == 1, "%s", text);
    CHECK(count_text(text, "rank 1 was started with world size 9, rank 0 with 2") == 1, "%s", text);
    CHECK(count_text(text, "two processes were started as rank 0 of 2") == 1 && !strchr(text, 033), "%s",
          text);
    for (int i = 0; i < 8; i++) close(fd[i]);
}

// Peers that differ each time: rank 0 prints a limited number of lines.
static void test_number_of_notes(void) {
    static char text[2 * 4096];
    unsigned char nonce[COMM_NONCE_BYTES];
    Job job;
    start_job(&job, 2, NULL, WORK);
    for (int i = 0; i < 3 * COMM_MAX_NOTES; i++) {
        int fd = connect_job(&job, nonce);
        send_hello(fd, nonce, 10 + i, 2, secret);
        CHECK(is_closed(fd, 1), "rank %d", 10 + i);
        close(fd);
    }
    int failed = finish_job(&job, text);
    CHECK(failed == 0, "%d ranks failed: %s", failed, text);
    CHECK(count_lines(text) == COMM_MAX_NOTES && count_text(text, "further ones are not shown") == 1, "%s",
          text);
}

// A second process claims a rank that is connected: it is dropped, and the first one stays.
static void test_rank_claimed_twice(void) {
    static char variable[64], text[2 * 4096];
    unsigned char nonce[COMM_NONCE_BYTES];
    Job job;
    snprintf(variable, sizeof variable, "MASTER_SECRET=%s", secret);
    start_job(&job, 3, variable, WORK);
    int first = connect_job(&job, nonce);
    send_hello(first, nonce, 1, 3, secret);
    CHECK(!is_closed(first, 0.3), "the first process as rank 1 was dropped");
    int second = connect_job(&job, nonce);
    send_hello(second, nonce, 1, 3, secret);
    CHECK(is_closed(second, 1), "the second process as rank 1 was not dropped");
    CHECK(!is_closed(first, 0.3), "the first process as rank 1 was dropped");
    close(first), close(second); // rank 0 has identified the first one as rank 1, which is gone now
    int failed = finish_job(&job, text);
    CHECK(failed == 3 && count_text(text, "two processes were started as rank 1 of 3") == 1 &&
              strstr(text, "error: rank 0: rank 1 is gone: its process ended during startup"),
          "%d failed, %s", failed, text);
}

// The length in a header is more than a message may have: nothing is stored, and the peer is dropped. An
// identified rank ends the job, in one line.
static void test_huge_lengths(void) {
    static const uint64_t lengths[] = {0,
                                       55,
                                       57,
                                       1 << 20,
                                       (uint64_t)1 << 31,
                                       (uint64_t)1 << 32,
                                       (uint64_t)1 << 40,
                                       INT64_MAX,
                                       UINT64_MAX,
                                       UINT64_MAX - 15};
    static const uint64_t fail_lengths[] = {COMM_TEXT_BYTES, (uint64_t)1 << 31, ((uint64_t)1 << 32) + 8,
                                            UINT64_MAX};
    static char text[2 * 4096], megabyte[1 << 20];
    enum { LENGTHS = sizeof lengths / sizeof lengths[0] };
    unsigned char nonce[COMM_NONCE_BYTES];
    Job job;
    start_job(&job, 2, NULL, WORK);
    for (int i = 0; i < LENGTHS; i++) {
        int fd = connect_job(&job, nonce);
        CommHeader header = {COMM_MAGIC, i % 2 ? COMM_DATA : COMM_HELLO, lengths[i]};
        send_bytes(fd, &header, sizeof header);
        for (int j = 0; j < 64 && send_bytes(fd, megabyte, sizeof megabyte) == 0; j++) {
        }
        CHECK(is_closed(fd, 1), "length %llx", (unsigned long long)lengths[i]);
        close(fd);
    }
    int failed = finish_job(&job, text);
    CHECK(failed == 0, "%d ranks failed: %s", failed, text);
    CHECK(count_lines(text) == 1 && strstr(text, "it is no rank of this program"), "%s", text);
    for (int i = 0; i < 4; i++) {
        CommHeader fail = {COMM_MAGIC, COMM_FAIL, fail_lengths[i]};
        int status;
        start_job(&job, 2, NULL, WORK);
        int fd = connect_job(&job, nonce);
        send_hello(fd, nonce, 1, 2, "");
        send_bytes(fd, &fail, sizeof fail);
        CHECK(is_closed(fd, 4), "length %llx", (unsigned long long)fail.bytes);
        close(fd);
        waitpid(job.pid[0], &status, 0);
        ssize_t n = read(job.stderr_pipe[0], text, 4095);
        text[n > 0 ? n : 0] = 0;
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1 &&
                  one_line(text, "error: rank 0: ", "rank 1 ", "invalid message"),
              "status %d, %s", status, text);
        close(job.stderr_pipe[0]);
    }
}

// Slow senders take all places: each gets a byte through from time to time. Real ranks still connect.
static void test_slow_peers(void) {
    enum { SLOW = COMM_MAX_PENDING + 60 };
    static char text[2 * 4096];
    static int fd[SLOW];
    Job job;
    start_job(&job, 3, NULL, WORK);
    fflush(stdout);
    close(connect_job(&job, NULL)); // rank 0 listens
    pid_t slow = fork();
    if (slow == 0) {
        CommHeader header = {COMM_MAGIC, COMM_HELLO, sizeof(CommHello)};
        for (int i = 0; i < SLOW; i++) fd[i] = connect_job(&job, NULL);
        for (int round = 0;; round++) {
            for (int i = 0; i < SLOW; i++) {
                if (send(fd[i], (char *)&header + round % 16, 1, MSG_NOSIGNAL) == 1) continue;
                close(fd[i]); // dropped: the next one
                fd[i] = comm_connect(&no_secret, "127.0.0.1", job.port, 1, text);
            }
            comm_pause();
        }
    }
    for (int i = 0; i < 5; i++) comm_pause();
    int failed = finish_job(&job, text);
    kill(slow, SIGKILL);
    waitpid(slow, NULL, 0);
    CHECK(failed == 0, "%d ranks failed: %s%s", failed, text, text + 4096);
    CHECK(strstr(text, "it did not identify itself") && count_lines(text) <= COMM_MAX_NOTES, "%s", text);
}

// Silent peers in all places: a new peer gets the oldest one's place at once. A silent peer loses its place
// after COMM_IDENTIFY_SECONDS.
static void test_silent_peers(void) {
    static char text[2 * 4096];
    static int fd[COMM_MAX_PENDING];
    unsigned char nonce[COMM_NONCE_BYTES], proof[SHA256_BYTES];
    Job job;
    start_job(&job, 3, NULL, WORK);
    int silent = connect_job(&job, NULL);
    CHECK(!is_closed(silent, 0.2), "closed too early");
    CHECK(is_closed(silent, COMM_IDENTIFY_SECONDS + 1), "not closed");
    close(silent);
    finish_job(&job, text);
    start_job(&job, 2, NULL, WORK);
    for (int i = 0; i < COMM_MAX_PENDING; i++) fd[i] = connect_job(&job, NULL);
    int rank = connect_job(&job, NULL);
    const char *wrong = comm_read_message(rank, COMM_CHALLENGE, nonce, sizeof nonce, now_seconds() + 0.8);
    send_hello(rank, nonce, 1, 2, "");
    if (!wrong) wrong = comm_read_message(rank, COMM_ACCEPT, proof, sizeof proof, now_seconds() + 0.8);
    CHECK(!wrong, "%s", wrong);
    for (int i = 0; i < COMM_MAX_PENDING; i++) close(fd[i]);
    close(rank);
    waitpid(job.pid[0], NULL, 0);
    close(job.stderr_pipe[0]);
}

// Other ranks' texts are printed escaped, on the rank that receives it and on those that it tells.
static void test_escaped_text(void) {
    static const char hostile[] = "\033[2J\033]0;title\007\nerror: rank 7: all is well \x9b\xc2\x9b\x7f";
    static const char escaped[] =
        "\\x1b[2J\\x1b]0;title\\x07\\x0aerror: rank 7: all is well \\x9b\\xc2\\x9b\\x7f\n";
    char text[4096], expected[256];
    unsigned char nonce[COMM_NONCE_BYTES];
    int status;
    Job job;
    start_job(&job, 3, NULL, WORK);
    int fd = connect_job(&job, nonce);
    job.pid[2] = start(&job.stderr_pipe[2], job.variables[2], WORK, 2);
    for (int i = 0; i < 3; i++) comm_pause(); // until rank 2 is connected
    send_hello(fd, nonce, 1, 3, "");
    comm_send_message(fd, COMM_FAIL, hostile, sizeof hostile - 1);
    CHECK(is_closed(fd, 3), "rank 0 does not end");
    close(fd);
    for (int r = 0; r < 3; r += 2) {
        waitpid(job.pid[r], &status, 0);
        ssize_t n = read(job.stderr_pipe[r], text, sizeof text - 1);
        text[n > 0 ? n : 0] = 0;
        close(job.stderr_pipe[r]);
        snprintf(expected, sizeof expected, "error: rank %d: %s", r, escaped);
        CHECK(strcmp(text, expected) == 0, "%s", text);
    }
    // as long as it may be, and only control characters
    char long_text[COMM_TEXT_BYTES], out[COMM_TEXT_BYTES];
    memset(long_text, 1, sizeof long_text);
    comm_escape(out, long_text, sizeof long_text);
    CHECK(strlen(out) == (COMM_TEXT_BYTES - 1) / 4 * 4 && strcmp(out + strlen(out) - 4, "\\x01") == 0, "%s",
          out);
}

// Rank 0 fails during the rendezvous: a rank that identifies itself in the next second gets the reason, a
// peer without the secret does not.
static void test_failure_reaches_late_ranks(void) {
    char text[COMM_TEXT_BYTES] = "";
    unsigned char nonce[COMM_NONCE_BYTES], proof[SHA256_BYTES];
    CommHeader header;
    int status;
    Job job;
    start_job(&job, 3, NULL, WORK);
    int failing = connect_job(&job, nonce);
    send_hello(failing, nonce, 1, 3, "");
    comm_send_message(failing, COMM_FAIL, "rank 1 failed: no GPU", 21);
    comm_pause();
    int late = connect_job(&job, nonce), silent = connect_job(&job, NULL);
    send_hello(late, nonce, 2, 3, "");
    CHECK(!comm_read_message(late, COMM_ACCEPT, proof, sizeof proof, now_seconds() + 2), "not accepted");
    ssize_t n = recv(late, &header, sizeof header, MSG_WAITALL);
    CHECK(n == sizeof header && header.type == COMM_FAIL && header.bytes == 21, "%zd bytes", n);
    n = recv(late, text, sizeof text - 1, 0);
    CHECK(n == 21 && strcmp(text, "rank 1 failed: no GPU") == 0, "%s", text);
    n = recv(silent, text, sizeof text, MSG_WAITALL);
    CHECK(n <= (ssize_t)(sizeof(CommHeader) + COMM_NONCE_BYTES), "%zd bytes", n);
    close(failing), close(late), close(silent);
    waitpid(job.pid[0], &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1, "status %d", status);
    close(job.stderr_pipe[0]);
}

// A process that is not rank 0 listens at its address. The rank neither obeys it nor tells it the secret.
static void test_false_rank0(void) {
    enum { PROTOCOL, NO_PROOF, CLOSES, CASES };
    static const char *const reasons[CASES] = {"it is not rank 0 of this program", "it has another secret",
                                               "it closed the connection"};
    static char variable[64], text[4096], sent[4096];
    struct pollfd listener[CASES];
    int stderr_pipe[CASES], status;
    pid_t pid[CASES];
    snprintf(variable, sizeof variable, "MASTER_SECRET=%s", secret);
    for (int i = 0; i < CASES; i++) {
        CommAddress a;
        char *variables[8];
        listener[i].fd = comm_listen(&no_secret, "127.0.0.1", 0), listener[i].events = POLLIN;
        comm_local_address(&a, listener[i].fd);
        launch(TORCHRUN, variables, NULL, a.port, 1, 2);
        set(variables, variable);
        pid[i] = start(&stderr_pipe[i], variables, WORK, 1);
    }
    for (double end = now_seconds() + COMM_RENDEZVOUS_SECONDS + 0.5; now_seconds() < end;) {
        poll(listener, CASES, 100);
        for (int i = 0; i < CASES; i++) {
            CommHeader bad = {COMM_MAGIC, COMM_FAIL, 4};
            unsigned char nonce[COMM_NONCE_BYTES] = {0}, proof[SHA256_BYTES] = {0};
            int fd = accept(listener[i].fd, NULL, NULL);
            if (fd < 0) continue;
            if (i == PROTOCOL) {
                send_bytes(fd, &bad, sizeof bad);
                send_bytes(fd, "\033[2J", 4);
            } else {
                comm_send_message(fd, COMM_CHALLENGE, nonce, sizeof nonce);
                ssize_t n = recv(fd, sent, COMM_HELLO_BYTES, MSG_WAITALL);
                CHECK(n == (ssize_t)COMM_HELLO_BYTES && !memmem(sent, (size_t)n, "horse", 5), "%zd bytes", n);
                if (i == NO_PROOF) {
                    comm_send_message(fd, COMM_ACCEPT, proof, sizeof proof);
                    comm_send_message(fd, COMM_FAIL, "\033[2J", 4);
                }
            }
            close(fd);
        }
    }
    for (int i = 0; i < CASES; i++) {
        close(listener[i].fd);
        waitpid(pid[i], &status, 0);
        ssize_t n = read(stderr_pipe[i], text, sizeof text - 1);
        text[n > 0 ? n : 0] = 0;
        close(stderr_pipe[i]);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1 && count_lines(text) == 2 &&
                  strstr(text, "note: rank 1: no connection yet to rank 0 at localhost") &&
                  strstr(text, reasons[i]) &&
                  strstr(text, "error: rank 1: no connection to rank 0 at localhost") && !strchr(text, 033),
              "status %d, %s", status, text);
    }
}

// ----------------------------------------------------------------------------
// Interfaces and the secret

// Returns the local address of the socket that listens on `port`, as "127.0.0.1 port N", or "" without one.
static const char *listening_address(const char *name, int port) {
    static char text[80];
    CommState s = {.secret = "a secret of sixteen"};
    struct sockaddr_storage address;
    socklen_t size = sizeof address;
    int fd = comm_listen(&s, name, port);
    getsockname(fd, (struct sockaddr *)&address, &size);
    comm_name_address(text, (struct sockaddr *)&address, size);
    *strchr(text, ' ') = 0;
    close(fd);
    return text;
}

static void test_interfaces(void) {
    char name[256] = "", *variables[MAX_PROCESSES][8], text[64];
    Action action[MAX_PROCESSES] = {WORK};
    Result result[MAX_PROCESSES];
    int rank[MAX_PROCESSES] = {0, 1};
    CHECK(strcmp(listening_address("127.0.0.1", 0), "127.0.0.1") == 0, "%s",
          listening_address("127.0.0.1", 0));
    CHECK(strcmp(listening_address("localhost", 0), "127.0.0.1") == 0, "%s",
          listening_address("localhost", 0));
    CHECK(strcmp(listening_address("127.0.0.3", 0), "127.0.0.3") == 0, "%s",
          listening_address("127.0.0.3", 0));
    CHECK(strcmp(listening_address(NULL, 0), "::") == 0 || strcmp(listening_address(NULL, 0), "0.0.0.0") == 0,
          "%s", listening_address(NULL, 0));
    // an address that is not of this host (documentation's): behind NAT
    CHECK(strcmp(listening_address("192.0.2.1", 0), listening_address(NULL, 0)) == 0, "%s",
          listening_address("192.0.2.1", 0));
    CommAddress a;
    CommState s = {.secret = "a secret of sixteen"};
    int fd = comm_listen(&s, NULL, 0);
    comm_local_address(&a, fd);
    close(fd);
    if (sscanf(a.names, "%255s", name) != 1) {
        SKIP("no interface but loopback");
        return;
    }
    CHECK(strcmp(listening_address(name, 0), name) == 0, "%s instead of %s", listening_address(name, 0),
          name);
    // MASTER_ADDR is no loopback address: without a secret no process starts, with it all do
    for (int with_secret = 0; with_secret < 3; with_secret++) {
        int port = unused_port();
        static char address[300];
        snprintf(address, sizeof address, "MASTER_ADDR=%s", name);
        for (int i = 0; i < 2; i++) {
            launch(TORCHRUN, variables[i], NULL, port, i, 2);
            set(variables[i], address);
            if (with_secret == 1) set(variables[i], "MASTER_SECRET=0123456789abcdef");
            if (with_secret == 2) set(variables[i], "MASTER_SECRET=short");
        }
        run(2, variables, action, rank, result);
        for (int i = 0; i < 2; i++) {
            snprintf(text, sizeof text, "error: rank %d: rank 0 at ", i);
            if (with_secret == 1)
                CHECK(result[i].code == 0 && !result[i].text[0], "%s", result[i].text);
            else if (with_secret == 0)
                CHECK(result[i].code == 1 &&
                          one_line(result[i].text, text, "several hosts need a secret", "MASTER_SECRET") &&
                          result[i].seconds < 2,
                      "rank %d: %.1f s, %s", i, result[i].seconds, result[i].text);
            else
                CHECK(result[i].code == 1 &&
                          one_line(result[i].text, "MASTER_SECRET has 5 characters", "", "16 to 255"),
                      "%s", result[i].text);
        }
    }
    // the launcher says that all ranks are on this host: they need neither a secret nor MASTER_ADDR
    for (int i = 0; i < 2; i++) {
        launch(TORCHRUN, variables[i], NULL, 29000 + getpid() % 500, i, 2);
        set(variables[i], "MASTER_ADDR=no-such-host.invalid"), set(variables[i], "LOCAL_WORLD_SIZE=2");
    }
    run(2, variables, action, rank, result);
    CHECK(result[0].code == 0 && result[1].code == 0, "%s%s", result[0].text, result[1].text);
    // one process has another secret
    int port = unused_port();
    for (int i = 0; i < 2; i++) {
        launch(TORCHRUN, variables[i], NULL, port, i, 2);
        set(variables[i], i ? "MASTER_SECRET=0123456789abcdeX" : "MASTER_SECRET=0123456789abcdef");
    }
    run(2, variables, action, rank, result);
    CHECK(result[0].code == 1 && strstr(result[0].text, "it claims rank 1 with another secret") &&
              strstr(result[0].text, "rank 1 of 2 did not connect"),
          "%s", result[0].text);
    CHECK(result[1].code == 1 && strstr(result[1].text, "set the same MASTER_SECRET"), "%s", result[1].text);
}

// Returns 1 if a process with the file `path` as rank0.address dies because it does not trust the file.
static int distrusts(char *variables[8], const char *path, mode_t mode, const char *target) {
    char text[4096] = "";
    int stderr_pipe, status;
    if (target) {
        if (symlink(target, path)) die("symlink: %s", strerror(errno));
    } else {
        FILE *f = fopen(path, "w");
        if (!f || fprintf(f, "host 1 00112233445566778899aabbccddeeff 127.0.0.1\n") < 0) die("%s", path);
        fclose(f);
        chmod(path, mode);
    }
    pid_t pid = start(&stderr_pipe, variables, WORK, 1);
    waitpid(pid, &status, 0);
    ssize_t n = read(stderr_pipe, text, sizeof text - 1);
    text[n > 0 ? n : 0] = 0;
    close(stderr_pipe);
    unlink(path);
    return WIFEXITED(status) && WEXITSTATUS(status) == 1 &&
           one_line(text, "error: rank 1: MASTER_DIR", "rank0.address", "this user alone");
}

// The file in MASTER_DIR holds the secret: only its owner can read it, and a link there is not followed.
static void test_folder(void) {
    char *variables[8], path[128], tmp[160], target[160], text[4096];
    int stderr_pipe, status;
    struct stat st;
    snprintf(path, sizeof path, "%s/rank0.address", folder), snprintf(tmp, sizeof tmp, "%s.tmp", path);
    snprintf(target, sizeof target, "%s/target", folder);
    launch(FOLDER, variables, folder, 0, 1, 2);
    CHECK(distrusts(variables, path, 0644, NULL), "a file that all can read");
    CHECK(distrusts(variables, path, 0660, NULL), "a file that the group can write");
    FILE *f = fopen(target, "w");
    if (!f || fclose(f) || chmod(target, 0600)) die("%s: %s", target, strerror(errno));
    CHECK(distrusts(variables, path, 0, target), "a link");
    if (symlink(target, tmp)) die("%s: %s", target, strerror(errno));
    launch(FOLDER, variables, folder, 0, 0, 2);
    umask(0);
    pid_t pid = start(&stderr_pipe, variables, WORK, 0);
    umask(022);
    for (int i = 0; i < 20 && stat(path, &st) != 0; i++) comm_pause();
    CHECK(lstat(path, &st) == 0 && S_ISREG(st.st_mode) && (st.st_mode & 0777) == 0600, "mode %o", st.st_mode);
    CHECK(stat(target, &st) == 0 && st.st_size == 0, "a link was followed");
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    close(stderr_pipe);
    // the address of a job that is gone: the rank waits for that of the next job
    variables[0] = NULL;
    launch(FOLDER, variables, folder, 0, 1, 2);
    pid = start(&stderr_pipe, variables, WORK, 1);
    for (int i = 0; i < 5; i++) comm_pause();
    char *rank0[8];
    int rank0_pipe;
    launch(FOLDER, rank0, folder, 0, 0, 2);
    pid_t rank0_pid = start(&rank0_pipe, rank0, WORK, 0);
    waitpid(rank0_pid, &status, 0);
    CHECK(status == 0, "rank 0: status %d", status);
    waitpid(pid, &status, 0);
    ssize_t n = read(stderr_pipe, text, sizeof text - 1);
    text[n > 0 ? n : 0] = 0;
    CHECK(status == 0, "rank 1: status %d, %s", status, text);
    close(stderr_pipe), close(rank0_pipe), unlink(target);
}

// ----------------------------------------------------------------------------
// Random byte streams

static uint64_t random_state;
static uint64_t random_number(uint64_t limit) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return (random_state >> 11) % limit;
}

// Writes a random stream: bytes, or messages with some wrong bytes, types, lengths and proofs.
static size_t random_stream(char *out, size_t size, const unsigned char *nonce) {
    size_t n = 0, bytes = random_number(8) == 0 ? size : 1 + random_number(200);
    if (random_number(3) == 0) {
        while (n < bytes) out[n++] = (char)random_number(256);
        return n;
    }
    while (n + sizeof(CommHeader) + sizeof(CommHello) < bytes) {
        CommHeader header = {COMM_MAGIC, (uint32_t)random_number(COMM_BYE + 2), 0};
        CommHello hello = {.rank = (int32_t)random_number(4) - 1, .ranks = 2 + (random_number(3) == 0)};
        CommState s = {.secret = "a secret that is wrong"};
        size_t payload = random_number(sizeof hello + 2);
        if (random_number(2)) payload = header.type == COMM_HELLO ? sizeof hello : 0;
        header.bytes = random_number(4) ? payload : (uint64_t)1 << random_number(64);
        if (random_number(16) == 0) header.bytes = UINT64_MAX - random_number(32);
        if (random_number(16) == 0) comm_prove(&s, "rank", nonce, &hello, hello.proof);
        memcpy(out + n, &header, sizeof header), n += sizeof header;
        memcpy(out + n, &hello, payload < sizeof hello ? payload : sizeof hello);
        n += payload < sizeof hello ? payload : sizeof hello;
    }
    for (uint64_t i = random_number(4); i > 0 && n > 0; i--)
        out[random_number(n)] ^= (char)(1 << random_number(8));
    return n ? n : 1;
}

// Sends a random stream as an identified rank to rank 0 of each of eight jobs. Each job ends with one line.
// Returns the number of jobs that do not.
static int test_identified_streams(uint64_t seed) {
    enum { JOBS = 8 };
    static char stream[2000], text[4096];
    Job job[JOBS];
    int fd[JOBS], status, wrong = 0;
    unsigned char nonce[COMM_NONCE_BYTES];
    double begin = now_seconds();
    random_state = seed * 0x9E3779B97F4A7C15u + 2;
    for (int i = 0; i < JOBS; i++)
        start_job(&job[i], i % 2 ? 2 : 3, NULL, WORK); // of 3: still in the rendezvous
    for (int i = 0; i < JOBS; i++) {
        fd[i] = connect_job(&job[i], nonce);
        send_hello(fd[i], nonce, 1, job[i].ranks, "");
        send(fd[i], stream, random_stream(stream, sizeof stream, nonce), MSG_NOSIGNAL);
    }
    for (int i = 0; i < JOBS; i++) {
        is_closed(fd[i], 0.05);
        close(fd[i]);
    }
    for (int i = 0; i < JOBS; i++) {
        waitpid(job[i].pid[0], &status, 0);
        ssize_t n = read(job[i].stderr_pipe[0], text, sizeof text - 1);
        text[n > 0 ? n : 0] = 0;
        close(job[i].stderr_pipe[0]);
        int good = WIFEXITED(status) && WEXITSTATUS(status) == 1 && now_seconds() - begin < 10 &&
                   one_line(text, "error: rank 0: ", "", "");
        CHECK(good, "SEED=%llu, job %d: status %d, %s", (unsigned long long)seed, i, status, text);
        wrong += !good;
    }
    return wrong;
}

// Sends random streams to rank 0 during its rendezvous, and then starts the other rank. seconds 0: until
// 1,000 streams are sent. Prints the figures.
static void test_random_streams(double seconds, uint64_t seed) {
    static char variable[64], text[2 * 4096], stream[20000];
    long streams = 0, jobs = 0, up = 0, crashes = 0, hangs = 0, identified = 0, wrong = 0;
    double begin = now_seconds(), slowest = 0;
    snprintf(variable, sizeof variable, "MASTER_SECRET=%s", secret);
    while (seconds > 0 ? now_seconds() - begin < seconds : streams < 1000) {
        Job job;
        random_state = (seed + (uint64_t)jobs) * 0x9E3779B97F4A7C15u + 1;
        start_job(&job, 2, variable, WORK);
        double job_begin = now_seconds();
        jobs++;
        int open[16], count = 0;
        for (int i = 0; i < 500 && now_seconds() - job_begin < 1.5; i++, streams++) {
            unsigned char nonce[COMM_NONCE_BYTES] = {0};
            int fd = connect_job(&job, random_number(8) ? NULL : nonce);
            size_t n = random_stream(stream, sizeof stream, nonce), sent = 0;
            while (sent < n) { // in parts
                size_t part = 1 + random_number(random_number(2) ? 1 + n / 8 : n);
                ssize_t m =
                    send(fd, stream + sent, part < n - sent ? part : n - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
                if (m <= 0) break;
                sent += (size_t)m;
            }
            if (random_number(4) == 0 && count < 16)
                open[count++] = fd; // until the end
            else
                close(fd);
        }
        int failed = finish_job(&job, text),
            sanitizer = strstr(text, "Sanitizer") || strstr(text, "runtime error");
        double took = now_seconds() - job_begin;
        if (took > slowest) slowest = took;
        up += failed == 0, crashes += sanitizer || (failed > 0 && !strstr(text, "error: ")),
            hangs += took > 8;
        CHECK(failed == 0 && !sanitizer && took <= 8, "SEED=%llu: %d ranks failed, %.1f s, %s%s",
              (unsigned long long)seed + (uint64_t)jobs - 1, failed, took, text, text + 4096);
        while (count > 0) close(open[--count]);
        if (jobs % 8 == 1) wrong += test_identified_streams(seed + (uint64_t)jobs), identified += 8;
    }
    printf("%ld random streams, %ld jobs, of which %ld came up; %ld crashes, %ld hangs; slowest job %.1f s\n",
           streams, jobs, up, crashes, hangs, slowest);
    printf("%ld streams of identified ranks, %ld of which did not end the job in one line; %.1f s in all\n",
           identified, wrong, now_seconds() - begin);
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
                 {"killed", 0, "rank 0 is gone: its process ended without a message"},
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

// ----------------------------------------------------------------------------
// Signals that the scripts forward

static volatile sig_atomic_t num_signals, last_signal;

static void count_signal(int number) {
    num_signals++, last_signal = number;
}

// A process that scripts/gpus_*.sh starts: creates a file ready_RANK in the folder once all ranks are
// connected, and fails unless exactly one signal arrives, which is `expected`.
static int signaled_child(const char *ready_folder, int expected) {
    static const int numbers[] = {SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
    char path[PATH_BYTES];
    Comm c;
    comm_start(&c);
    for (int i = 0; i < 5; i++) signal(numbers[i], count_signal);
    comm_barrier(&c);
    snprintf(path, sizeof path, "%s/ready_%d", ready_folder, c.rank);
    FILE *f = fopen(path, "w");
    if (!f || fclose(f)) die("%s: %s", path, strerror(errno));
    for (int i = 0; i < 100 && num_signals == 0; i++) comm_pause();
    for (int i = 0; i < 5; i++) comm_pause(); // a second signal would arrive now
    comm_barrier(&c);
    if (num_signals != 1 || last_signal != expected)
        die("%d signals, the last one %d instead of %d", (int)num_signals, (int)last_signal, expected);
    comm_end(&c);
    return 7; // the script must return it
}

// Starts two processes by a script, and sends each signal to the script. From gpus_mpi.sh all arrive as
// SIGUSR2.
static void test_script(const char *self, const char *script, int mpi) {
    static const int numbers[] = {SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
    char path[2][128], expected[16], output[128], text[2000];
    int status;
    snprintf(output, sizeof output, "%s/stderr", folder);
    if (access(script, R_OK) != 0) {
        SKIP("%s: not found", script);
        return;
    }
    for (int r = 0; r < 2; r++) snprintf(path[r], sizeof path[r], "%s/ready_%d", folder, r);
    for (int i = 0; i < 5; i++) {
        int number = mpi ? SIGUSR2 : numbers[i];
        snprintf(expected, sizeof expected, "%d", number);
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            setsid();
            signal(SIGINT, SIG_DFL);
            if (!freopen("/dev/null", "w", stdout) || !freopen(output, "w", stderr)) _exit(1);
            setenv("TRAINER", self, 1), setenv("GPUS", "2", 1);
            setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1), setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
            setenv("MPI_FLAGS", "--oversubscribe", 1);
            if (mpi)
                execlp("bash", "bash", script, "localhost", "signals", folder, expected, NULL);
            else
                execlp("bash", "bash", script, "signals", folder, expected, NULL);
            _exit(1);
        }
        for (int j = 0; j < 150 && (access(path[0], F_OK) != 0 || access(path[1], F_OK) != 0); j++)
            comm_pause();
        kill(pid, numbers[i]);
        waitpid(pid, &status, 0);
        FILE *f = fopen(output, "r"); // mpirun writes there whenever a process returns 7
        text[f ? fread(text, 1, sizeof text - 1, f) : 0] = '\0';
        if (f) fclose(f);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7, "%s, signal %d: status %d: %s", script,
              numbers[i], status, text);
        CHECK(unlink(path[0]) == 0 && unlink(path[1]) == 0, "%s, signal %d: not started", script, numbers[i]);
        unlink(output);
    }
}

int main(int argc, char **argv) {
    alarm(240);
    if (argc == 4 && strcmp(argv[1], "signals") == 0) return signaled_child(argv[2], atoi(argv[3]));
#ifdef USE_MPI
    if (argc == 4 && strcmp(argv[1], "mpi") == 0) mpi_child(argv[2], atoi(argv[3]));
#endif
    (void)argc, (void)argv;
    static const char *const ours[] = {"RANK",        "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                                       "MASTER_PORT", "MASTER_DIR", "MASTER_SECRET"};
    for (size_t i = 0; i < sizeof ours / sizeof ours[0]; i++) unsetenv(ours[i]);
    const char *seconds = getenv("SECONDS"), *seed = getenv("SEED");
    if (seconds) { // random streams alone
        alarm(0);
        test_random_streams(parse_double("SECONDS", seconds, 0, 1e9),
                            seed ? (uint64_t)parse_int("SEED", seed, 0, INT64_MAX) : (uint64_t)time(NULL));
        return test_end("test_comm");
    }
#ifdef USE_MPI
    test_mpi(argv[0]);
#endif
    char temporary[] = "/tmp/test_comm_XXXXXX";
    folder = mkdtemp(temporary);
    if (!folder) die("mkdtemp: %s", strerror(errno));
    test_hosts();
    test_start();
    test_wrong_start();
    test_failures();
    test_hostile_peers();
    test_number_of_notes();
    test_rank_claimed_twice();
    test_huge_lengths();
    test_slow_peers();
    test_silent_peers();
    test_escaped_text();
    test_failure_reaches_late_ranks();
    test_false_rank0();
    test_interfaces();
    test_folder();
    test_script(argv[0], "scripts/gpus_host.sh", 0);
#ifdef USE_MPI
    if (system("command -v mpirun >/dev/null") == 0) test_script(argv[0], "scripts/gpus_mpi.sh", 1);
#endif
    test_random_streams(0, 1);
    CHECK(rmdir(folder) == 0, "%s: %s", folder, strerror(errno)); // rank 0 has removed its address file
    return test_end("test_comm");
}
