// test_comm.c: several processes on this machine through every way to start and to fail (llmc/comm.h), within
// seconds. With USE_MPI it starts itself by mpirun, too.
#define COMM_START_SECONDS 3
#define COMM_SILENCE_SECONDS 2
#define COMM_BEAT_SECONDS 0.3
#include "../../llmc/comm.h"
#include "test.h"
#include <signal.h>
#include <sys/wait.h>

enum { MOST = 48, RANKS = 8 }; // processes at once, and ranks of one start

// What a child does once all are connected.
typedef enum { WORK, DIE_IN_STEP, KILLED, STOPPED, UNEVEN, NCCL_TROUBLE, NOT_STARTED, KILLED_IN_START } Deed;
typedef struct {
    int code, signal; // how it ended
    char text[4096];  // its stderr
    double seconds;
} End;

static const char *trouble(void *what) {
    return (const char *)what;
}

static void child(Deed deed, int rank) {
    Comm c;
    if (deed == KILLED_IN_START) signal(SIGALRM, SIG_DFL), ualarm(700000, 0);
    comm_start(&c);
    if (c.rank != rank) die("is rank %d", c.rank);
    // all on one host
    if (c.local_rank != rank) die("is number %d of its host", c.local_rank);
    for (int i = 0; i < 30; i++) {
        int64_t mine[3] = {rank, i, 7 * rank + i}, all[RANKS][3], same = rank == 0 ? 1000 + i : -1;
        comm_allgather(&c, mine, sizeof mine, all);
        for (int r = 0; r < c.ranks; r++)
            if (all[r][0] != r || all[r][1] != i || all[r][2] != 7 * r + i)
                die("allgather brought %ld", (long)all[r][2]);
        comm_broadcast(&c, &same, sizeof same);
        if (same != 1000 + i) die("broadcast brought %ld", (long)same);
    }
    size_t big = 1 << 20; // more than a socket holds
    unsigned char *mine = (unsigned char *)xmalloc(big),
                  *all = (unsigned char *)xmalloc(big * (size_t)c.ranks);
    memset(mine, rank + 1, big);
    comm_allgather(&c, mine, big, all);
    for (size_t i = 0; i < big * (size_t)c.ranks; i++)
        if (all[i] != i / big + 1) die("byte %zu of a large allgather is %d", i, all[i]);
    free(mine), free(all);
    if (deed == DIE_IN_STEP) die("token %d is wrong", 17);
    if (deed == KILLED) raise(SIGKILL);
    if (deed == STOPPED) raise(SIGSTOP);
    if (deed == UNEVEN) comm_allgather(&c, "12345", 5, xmalloc(64));
    if (deed == NCCL_TROUBLE) {
        comm_watch(&c, trouble, (void *)"NCCL: the cable is cut");
        sleep(5);
    }
    comm_barrier(&c);
    comm_end(&c);
    exit(0);
}

// A port that nobody listens on; another one each time.
static int free_port(void) {
    static char given[65536];
    for (;;) {
        CommAddress a;
        int fd = comm_listen(0, "none");
        comm_own_address(&a, fd);
        close(fd);
        if (!given[a.port]++) return a.port;
    }
}

// Forks a process that closes all else and runs `rank`'s part; its stderr comes through the pipe *from.
static pid_t start(int *from, char *const *variables, Deed deed, int rank) {
    int ends[2];
    if (pipe(ends)) die("pipe: %s", strerror(errno));
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], 2);
        close(ends[0]), close(ends[1]);
        for (int i = 0; variables[i]; i++) putenv(variables[i]);
        child(deed, rank);
    }
    close(ends[1]);
    *from = ends[0];
    return pid;
}

// Runs `count` processes, the i-th with variables[i] and deed[i], as rank[i].
static void run(int count, char *variables[MOST][8], const Deed *deed, const int *rank, End *end) {
    memset(end, 0, MOST * sizeof *end);
    pid_t pid[MOST];
    int from[MOST];
    double begin = now_seconds();
    for (int i = 0; i < count; i++)
        if (deed[i] != NOT_STARTED) pid[i] = start(&from[i], variables[i], deed[i], rank[i]);
    for (int left = 1; left;) {
        left = 0;
        for (int i = 0; i < count; i++) { // stopped ones go when the others have
            int status;
            if (deed[i] == NOT_STARTED || pid[i] == 0 || deed[i] == STOPPED) continue;
            if (waitpid(pid[i], &status, WNOHANG) == 0) {
                left = 1;
                if (now_seconds() - begin > 30) kill(pid[i], SIGKILL); // a hang
                continue;
            }
            end[i].seconds = now_seconds() - begin;
            end[i].code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
            end[i].signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
            pid[i] = 0;
            ssize_t n = read(from[i], end[i].text, sizeof end[i].text - 1);
            end[i].text[n > 0 ? n : 0] = 0;
            close(from[i]);
        }
        comm_pause();
    }
    for (int i = 0; i < count; i++) {
        if (deed[i] != STOPPED) continue;
        kill(pid[i], SIGKILL);
        waitpid(pid[i], NULL, 0);
        close(from[i]);
    }
}

typedef enum { TORCHRUN, AGENT, MPI_VARIABLES, SLURM, FOLDER } Way;
static const char *const way_names[] = {"torchrun", "torchrun's agent", "mpirun's variables", "srun",
                                        "a folder"};

// The variables that a launcher sets for one of `ranks` processes.
static void launch(Way way, char *variables[8], const char *folder, int port, int rank, int ranks) {
    static char text[4096][128];
    static int used;
    const char *names[] = {"RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"};
    const char *sizes[] = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"};
    int which = way == MPI_VARIABLES ? 1 : way == SLURM ? 2 : 0, n = 0;
#define SET(...) snprintf(text[used], sizeof text[used], __VA_ARGS__), variables[n++] = text[used++ % 4096]
    SET("%s=%d", names[which], rank);
    SET("%s=%d", sizes[which], ranks);
    if (way == FOLDER) SET("MASTER_DIR=%s", folder);
    if (way == TORCHRUN || way == AGENT || way == MPI_VARIABLES) SET("MASTER_ADDR=localhost");
    if (way == SLURM) SET("SLURM_STEP_NODELIST=localhost,nowhere[1-3]");
    if (way == SLURM) SET("SLURM_JOB_ID=%d", port - 20000); // such that the port comes out
    if (way == AGENT) SET("TORCHELASTIC_USE_AGENT_STORE=True");
    if (way != FOLDER && way != SLURM) SET("MASTER_PORT=%d", way == AGENT ? port - 1 : port);
#undef SET
    variables[n] = NULL;
}

static const char *folder;

// Whether the text is one line that has all three parts.
static int one_line(const char *text, const char *a, const char *b, const char *c) {
    const char *newline = strchr(text, '\n');
    return newline && newline[1] == 0 && strstr(text, a) && strstr(text, b) && strstr(text, c);
}

// Adds a start of `ranks` processes to the *count that are to run.
static void add(Way way, int ranks, const Deed *deeds, int *count, char *variables[MOST][8], Deed *deed,
                int *rank) {
    int port = free_port();
    if (way == SLURM)
        port = 20000 + (int)((getpid() + 7 * port) % 10000); // it makes the port of the job's number
    for (int i = 0; i < ranks; i++, *count += 1) {
        launch(way, variables[*count], folder, port, i, ranks);
        deed[*count] = deeds[i], rank[*count] = i;
    }
}

static void test_start(void) {
    static const Deed work[RANKS] = {WORK};
    char *variables[MOST][8];
    Deed deed[MOST];
    End end[MOST];
    int rank[MOST], count = 0;
    for (int way = TORCHRUN; way <= FOLDER; way++)
        add((Way)way, way == TORCHRUN ? RANKS : 3, work, &count, variables, deed, rank);
    run(count, variables, deed, rank, end);
    for (int i = 0; i < count; i++)
        CHECK(end[i].code == 0 && !end[i].text[0], "%s, rank %d: code %d, %s",
              way_names[i < RANKS ? 0 : 1 + (i - RANKS) / 3], rank[i], end[i].code, end[i].text);
}

// What every rank but the guilty one says: one line that names it. All cases at once, since most wait.
static void test_failures(void) {
    static const struct {
        Deed deed;
        const char *says;
        double seconds; // at most
    } cases[] = {
        {DIE_IN_STEP, "failed: token 17 is wrong", 8},       {KILLED, "is gone: its process has ended", 8},
        {STOPPED, "is gone: no sign of life", 15},           {UNEVEN, "works on something else", 8},
        {NCCL_TROUBLE, "failed: NCCL: the cable is cut", 8}, {KILLED_IN_START, "is gone", 10},
        {NOT_STARTED, "did not come within 3 seconds", 15},
    };
    enum { CASES = sizeof cases / sizeof cases[0] };
    char *variables[MOST][8];
    Deed deed[MOST];
    End end[MOST];
    int rank[MOST], count = 0;
    for (int k = 0; k < 2 * CASES; k++) {
        Deed deeds[3] = {WORK, WORK, WORK};
        deeds[k % 2 * 2] = cases[k / 2].deed;
        if (cases[k / 2].deed == KILLED_IN_START)
            deeds[1] = NOT_STARTED; // so that the start takes long enough
        add(TORCHRUN, 3, deeds, &count, variables, deed, rank);
    }
    run(count, variables, deed, rank, end);
    for (int i = 0; i < count; i++) {
        int k = i / 6, guilty = i / 3 % 2 * 2;
        const char *says = cases[k].says;
        char me[32], name[32];
        if (rank[i] == guilty || deed[i] == NOT_STARTED) continue;
        snprintf(me, sizeof me, "error: rank %d: ", rank[i]);
        snprintf(name, sizeof name, "rank %d", guilty);
        if (cases[k].deed == UNEVEN && guilty == 0) strcpy(name, "rank"); // it accuses whom it hears first
        if (cases[k].deed == NOT_STARTED && guilty == 0) says = "no connection to rank 0 at localhost";
        CHECK(end[i].code == 1 && one_line(end[i].text, me, name, says),
              "case %d, guilty %d, rank %d: code %d, %s", k, guilty, rank[i], end[i].code, end[i].text);
        CHECK(end[i].seconds < cases[k].seconds, "case %d, guilty %d, rank %d: %.1f s", k, guilty, rank[i],
              end[i].seconds);
    }
}

// Rank 0 ends at once where a rank is wrong, and tells all who have come. Who comes just then, or later,
// finds nobody.
static const char *wrong_start(const End *e, int may_be_late, const char *why) {
    if (may_be_late && strstr(e->text, "no connection")) return "no connection to rank 0";
    if (may_be_late && strstr(e->text, "is gone")) return "is gone: it ended while others were starting";
    return why;
}

static void test_wrong_start(void) {
    char *variables[MOST][8];
    Deed deed[MOST] = {WORK};
    End end[MOST];
    int rank[MOST] = {0, 1, 2}, port = free_port();
    // one of another number
    for (int i = 0; i < 3; i++) launch(TORCHRUN, variables[i], NULL, port, i, i == 2 ? 4 : 3);
    run(3, variables, deed, rank, end);
    for (int i = 0; i < 3; i++)
        CHECK(end[i].code == 1 && one_line(end[i].text, "error: rank ", "",
                                           wrong_start(&end[i], i == 1,
                                                       "rank 2 was started as one of 4, rank 0 as one of 3")),
              "world size, rank %d: code %d, %s", i, end[i].code, end[i].text);
    // the same rank twice
    port = free_port();
    for (int i = 0; i < 4; i++)
        rank[i] = i < 3 ? i : 1, launch(TORCHRUN, variables[i], NULL, port, rank[i], 4);
    run(4, variables, deed, rank, end);
    for (int i = 0; i < 4; i++)
        CHECK(end[i].code == 1 &&
                  one_line(end[i].text, "error: rank ", "",
                           wrong_start(&end[i], i == 2, "two processes were started as rank 1 of 4")),
              "twice, process %d: code %d, %s", i, end[i].code, end[i].text);
    // the port is taken by something that never answers: rank 0 says so, the others don't hang
    int taken = comm_listen(0, "none");
    CommAddress a;
    comm_own_address(&a, taken);
    for (int i = 0; i < 2; i++) rank[i] = i, launch(TORCHRUN, variables[i], NULL, a.port, i, 2);
    run(2, variables, deed, rank, end);
    close(taken);
    CHECK(end[0].code == 1 &&
              one_line(end[0].text, "error: rank 0: cannot listen on port", "in use", "MASTER_PORT"),
          "%s", end[0].text);
    CHECK(end[1].code == 1 &&
              one_line(end[1].text, "error: rank 1: rank 0 at localhost port", "", "does not answer"),
          "%s", end[1].text);
    CHECK(end[1].seconds < 8, "%.1f s", end[1].seconds);
    // a host that does not exist
    static char *nowhere[2][8] = {
        {"RANK=1", "WORLD_SIZE=2", "MASTER_ADDR=no-such-host.invalid", "MASTER_PORT=29511", NULL}};
    memcpy(variables[0], nowhere[0], sizeof nowhere[0]);
    rank[0] = 1;
    run(1, variables, deed, rank, end);
    CHECK(end[0].code == 1 &&
              one_line(end[0].text,
                       "error: rank 1: no connection to rank 0 at no-such-host.invalid port 29511",
                       "within 3 seconds", ": "),
          "%s", end[0].text);
    // one process alone, and a size of 1, start nothing
    static char *alone[2][8] = {{"RANK=0", "WORLD_SIZE=1", NULL}, {NULL}};
    memcpy(variables, alone, sizeof alone);
    rank[0] = rank[1] = 0;
    run(2, variables, deed, rank, end);
    CHECK(end[0].code == 0 && end[1].code == 0, "%s%s", end[0].text, end[1].text);
    // numbers that are none
    static char *words[1][8] = {{"RANK=two", "WORLD_SIZE=2", NULL}};
    memcpy(variables, words, sizeof words);
    run(1, variables, deed, rank, end);
    CHECK(end[0].code == 1 && one_line(end[0].text, "error: ", "RANK", "two"), "%s", end[0].text);
}

// Rank 0 tells a connection that has not yet said who it is why it ends.
static void test_waiting_is_told(void) {
    char *variables[MOST][8], why[256], text[512];
    int from, port = free_port(), status, silent = -1;
    launch(TORCHRUN, variables[0], NULL, port, 0, 2);
    pid_t zero = start(&from, variables[0], WORK, 0);
    for (int i = 0; i < 100 && silent < 0; i++) {
        silent = comm_connect("127.0.0.1", port, 1, why);
        if (silent < 0) comm_pause();
    }
    int wrong = comm_connect("127.0.0.1", port, 1, why);
    comm_socket_ready(silent), comm_socket_ready(wrong);
    CommHello hello = {1, 5, ""};
    CommHead head = {COMM_MAGIC, COMM_HELLO, sizeof hello};
    CHECK(silent >= 0 && wrong >= 0, "%s", why);
    CHECK(comm_write(wrong, &head, sizeof head) == 0 && comm_write(wrong, &hello, sizeof hello) == 0, "%s",
          strerror(errno));
    ssize_t n = recv(silent, &head, sizeof head, MSG_WAITALL);
    CHECK(n == sizeof head && head.type == COMM_FAIL && head.bytes < sizeof text, "%zd bytes", n);
    n = recv(silent, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    CHECK(strcmp(text, "rank 1 was started as one of 5, rank 0 as one of 2") == 0, "%s", text);
    close(silent), close(wrong);
    waitpid(zero, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1, "status %d", status);
    close(from);
}

// Connections that say nothing, or nonsense, do not disturb rank 0.
static void test_strangers(void) {
    char *variables[MOST][8];
    int from[2], port = free_port(), status;
    for (int i = 0; i < 2; i++) launch(TORCHRUN, variables[i], NULL, port, i, 2);
    pid_t zero = start(&from[0], variables[0], WORK, 0);
    char why[256];
    int silent = -1, loud = -1;
    for (int i = 0; i < 20 && silent < 0; i++) {
        silent = comm_connect("127.0.0.1", port, 1, why);
        if (silent < 0) comm_pause();
    }
    loud = comm_connect("127.0.0.1", port, 1, why);
    CHECK(silent >= 0 && loud >= 0, "%s", why);
    CHECK(comm_write(loud, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 36) == 0, "%s", strerror(errno));
    comm_pause();
    pid_t one = start(&from[1], variables[1], WORK, 1);
    waitpid(zero, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank 0 ended with %d", status);
    waitpid(one, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank 1 ended with %d", status);
    close(silent), close(loud), close(from[0]), close(from[1]);
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
        comm_first_host(lists[i][0], host, sizeof host);
        CHECK(strcmp(host, lists[i][1]) == 0, "%s: %s", lists[i][0], host);
    }
    char small[4];
    comm_first_host("abcdefgh", small, sizeof small);
    CHECK(strcmp(small, "abc") == 0, "%s", small);
}

#ifdef USE_MPI
// mpirun starts this program again, with a deed for rank 1.
static void test_mpi(const char *self) {
    static const char *const deeds[] = {"work", "die", "killed"};
    if (system("command -v mpirun >/dev/null") != 0) {
        SKIP("mpirun: not found");
        return;
    }
    for (int i = 0; i < 3; i++) {
        char command[512], text[8192];
        snprintf(command, sizeof command,
                 "timeout 60 mpirun --allow-run-as-root --oversubscribe -np 3 %s mpi %s 2>&1", self,
                 deeds[i]);
        fflush(stdout);
        double begin = now_seconds();
        FILE *f = popen(command, "r");
        if (!f) die("popen: %s", strerror(errno));
        size_t n = fread(text, 1, sizeof text - 1, f);
        text[n] = 0;
        int status = pclose(f);
        CHECK((status == 0) == (i == 0) && now_seconds() - begin < 30, "mpirun %s: code %d, %s", deeds[i],
              status, text);
        if (i == 1) CHECK(strstr(text, "error: rank 1: token 17 is wrong"), "%s", text);
    }
}
#endif

int main(int argc, char **argv) {
    alarm(240);
#ifdef USE_MPI
    if (argc == 3 && strcmp(argv[1], "mpi") == 0) {
        int rank = atoi(getenv("OMPI_COMM_WORLD_RANK") ? getenv("OMPI_COMM_WORLD_RANK") : getenv("PMI_RANK"));
        child(rank != 1                        ? WORK
              : strcmp(argv[2], "die") == 0    ? DIE_IN_STEP
              : strcmp(argv[2], "killed") == 0 ? KILLED
                                               : WORK,
              rank);
    }
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
    test_strangers();
    test_wrong_start();
    test_waiting_is_told();
    test_failures();
    CHECK(rmdir(folder) == 0, "%s: %s", folder, strerror(errno)); // rank 0's address is gone
    return test_end("test_comm");
}
