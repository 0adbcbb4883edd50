// comm.h: several processes as one program, a process a GPU: who they are, how they find each other, and what
// happens when one of them dies. Small messages alone travel here; NCCL moves the rest (nccl.cuh).
//
// Rank and number of ranks come from MPI, torchrun, Slurm or the user (comm_launched). Every rank has one TCP
// connection to rank 0. A thread on each rank listens on it: a rank that fails tells why, one that is gone is
// noticed by its closed connection or by its silence, and then all ranks end with one line that names it.
#ifndef LLMC_COMM_H
#define LLMC_COMM_H
#include "utils.h"
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#ifdef USE_MPI
#define OMPI_SKIP_MPICXX // the C++ bindings of old
#define MPICH_SKIP_MPICXX
#include <mpi.h>
#endif

// Seconds; tests set shorter ones. To start: from a rank's start until all are connected.
#ifndef COMM_START_SECONDS
#define COMM_START_SECONDS 50
#define COMM_SILENCE_SECONDS 30 // without a sign of life, after which a rank counts as gone
#define COMM_BEAT_SECONDS 2     // between signs of life
#endif
#define COMM_PORT 29500   // torchrun's, where MASTER_PORT does not say
#define COMM_TEXT 1024    // bytes of a message's text, at most
#define COMM_STRANGERS 64 // connections at once that have not yet said who they are
#define COMM_MAGIC 0x4F434D4Du

typedef enum { COMM_HELLO, COMM_WELCOME, COMM_DATA, COMM_BEAT, COMM_FAIL, COMM_BYE } CommKind;
typedef struct {
    uint32_t magic, type;
    uint64_t bytes; // that follow
} CommHead;
typedef struct {
    int32_t rank, ranks;
    char host[64]; // the same for all processes of a host
} CommHello;

typedef struct {
    int fd;            // -1: none
    int ended;         // it said goodbye
    double heard;      // when it was last heard of, by now_seconds
    char *bytes;       // received, but not yet a whole message
    size_t have, room; // of `bytes`
    char *data;        // the COMM_DATA that waits to be taken
    size_t data_bytes;
    int data_waits;
} CommPeer;

typedef struct {
    int rank, ranks, local_rank; // local_rank counts within the host
    CommPeer *peers;             // [ranks] on rank 0, then its strangers; elsewhere only peers[0], rank 0
    int num_peers;               // ranks, or 1; rank 0 has COMM_STRANGERS more during the start
    int listener;                // rank 0's during the start; else -1
    pthread_t thread;
    pthread_mutex_t lock, sending;
    pthread_cond_t change;
    int listening, leaving, ending;     // the thread runs; until all have taken leave; until now
    const char *(*trouble)(void *nccl); // asked now and then: NULL, or why NCCL cannot go on
    void *nccl;                         // its argument
    char cause[COMM_TEXT];              // why this rank ends, where another one is the reason
    char where[COMM_TEXT];              // rank 0's address, for messages
} Comm;

// The Comm that die() tells of a failure; weak, so that all translation units share it.
__attribute__((weak)) Comm *comm_of_process = NULL;

// ----------------------------------------------------------------------------
// Who

typedef struct {
    const char *rank, *ranks; // names of variables
    const char *launcher;
} CommLauncher;

// The launcher of this process, the innermost first: torchrun may itself be started by srun or mpirun. NULL:
// it was started alone, or as the only one.
static inline const CommLauncher *comm_launched(void) {
    static const CommLauncher launchers[] = {
        {"RANK", "WORLD_SIZE", "torchrun"},
        {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "mpirun"},
        {"PMI_RANK", "PMI_SIZE", "mpirun"},
        {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "srun"}, // a step's: a batch script itself has none
    };
    for (size_t i = 0; i < sizeof launchers / sizeof launchers[0]; i++) {
        const CommLauncher *l = &launchers[i];
        if (getenv(l->rank) && getenv(l->ranks))
            return parse_int(l->ranks, getenv(l->ranks), 1, 1 << 20) > 1 ? l : NULL;
    }
    return NULL;
}

// What the processes of a host, and they alone, have in common; containers share it.
static inline void comm_host_id(char id[64]) {
    memset(id, 0, 64);
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (!f || fscanf(f, "%63s", id) != 1) gethostname(id, 63);
    if (f) fclose(f);
}

// The first host of Slurm's list: "node[07-09,12],login1" -> "node07".
static inline void comm_first_host(const char *list, char *host, size_t size) {
    size_t at = 0;
    for (const char *p = list; *p && *p != ',' && at + 1 < size; p++) {
        if (*p == '[') {
            for (p++; *p && *p != ',' && *p != '-' && *p != ']' && at + 1 < size; p++) host[at++] = *p;
            while (*p && *p != ']') p++; // what follows the bracket belongs to the name
            if (!*p) break;
            continue;
        }
        host[at++] = *p;
    }
    host[at] = 0;
}

// ----------------------------------------------------------------------------
// Messages

// Returns 0, or -1 where the other side does not take it.
static inline int comm_write(int fd, const void *data, size_t bytes) {
    const char *p = (const char *)data;
    while (bytes > 0) {
        ssize_t n = send(fd, p, bytes, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        p += n, bytes -= (size_t)n;
    }
    return 0;
}

static inline int comm_send(Comm *c, CommPeer *to, CommKind type, const void *data, size_t bytes) {
    CommHead head = {COMM_MAGIC, (uint32_t)type, bytes};
    pthread_mutex_lock(&c->sending);
    int error = comm_write(to->fd, &head, sizeof head) || comm_write(to->fd, data, bytes);
    pthread_mutex_unlock(&c->sending);
    return error;
}

// Takes what has arrived. Returns -1 where the connection is closed.
static inline int comm_receive(CommPeer *p) {
    if (p->room - p->have < 65536) {
        p->room = p->have + 65536;
        char *more = (char *)realloc(p->bytes, p->room);
        if (!more) die("out of memory: a message of %zu bytes", p->room);
        p->bytes = more;
    }
    ssize_t n = recv(p->fd, p->bytes + p->have, p->room - p->have, MSG_DONTWAIT);
    if (n < 0 && (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK)) return 0;
    if (n <= 0) return -1;
    p->have += (size_t)n;
    p->heard = now_seconds();
    return 0;
}

// The first message of p->bytes, or NULL while it is not whole. *bad: this is no message of ours.
static inline const CommHead *comm_message(const CommPeer *p, int *bad) {
    const CommHead *head = (const CommHead *)p->bytes;
    *bad = 0;
    if (p->have < sizeof *head) return NULL;
    *bad = head->magic != COMM_MAGIC || head->bytes > ((uint64_t)1 << 40);
    return !*bad && p->have - sizeof *head >= head->bytes ? head : NULL;
}

// Drops the first message.
static inline void comm_message_done(CommPeer *p) {
    size_t size = sizeof(CommHead) + (size_t)((const CommHead *)p->bytes)->bytes;
    memmove(p->bytes, p->bytes + size, p->have - size);
    p->have -= size;
}

static inline void comm_peer_close(CommPeer *p) {
    if (p->fd >= 0) close(p->fd);
    free(p->bytes), free(p->data);
    memset(p, 0, sizeof *p);
    p->fd = -1;
}

// ----------------------------------------------------------------------------
// Failures

// die() calls this last: tells the others why, waits until they have heard it, and ends the process without
// the clean-up of exit(), which would wait for kernels that wait for other GPUs.
static inline void comm_tell_failure(const char *message) {
    Comm *c = comm_of_process;
    char text[COMM_TEXT];
    struct timespec until;
    double end = now_seconds() + 3;
    if (!c) return;
    if (c->cause[0])
        snprintf(text, sizeof text, "%s", c->cause);
    else
        snprintf(text, sizeof text, "rank %d failed: %.*s", c->rank, COMM_TEXT - 64, message);
    c->ending = 1;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 2;
    pthread_mutex_timedlock(&c->sending, &until);   // its holder may be stuck
    for (int i = c->ranks; i < c->num_peers; i++) { // during the start: who has just come
        if (c->peers[i].fd < 0) c->peers[i].fd = accept4(c->listener, NULL, NULL, SOCK_CLOEXEC);
    }
    for (int i = 0; i < c->num_peers; i++) {
        CommPeer *p = &c->peers[i];
        CommHead head = {COMM_MAGIC, COMM_FAIL, strlen(text)};
        if (p->fd < 0) continue;
        if (comm_write(p->fd, &head, sizeof head) == 0) comm_write(p->fd, text, strlen(text));
        shutdown(p->fd, SHUT_WR);
    }
    for (int i = 0; i < c->num_peers; i++) { // closing with unread bytes would take the text back
        char rest[4096];
        struct pollfd wait = {c->peers[i].fd, POLLIN, 0};
        while (wait.fd >= 0 && now_seconds() < end &&
               poll(&wait, 1, (int)(1e3 * (end - now_seconds())) + 1) > 0 &&
               recv(wait.fd, rest, sizeof rest, 0) > 0) {
        }
    }
    _exit(1);
}

// Ends this rank, and through comm_tell_failure all others, because of another one.
LLMC_NORETURN __attribute__((format(printf, 2, 3))) static inline void comm_die(Comm *c, const char *format,
                                                                                ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(c->cause, sizeof c->cause, format, args);
    va_end(args);
    die("%s", c->cause);
}

// Handles p's messages. Only the thread calls it.
static inline void comm_take_messages(Comm *c, CommPeer *p, int rank) {
    const CommHead *head;
    int bad;
    while ((head = comm_message(p, &bad)) != NULL) {
        const char *text = p->bytes + sizeof *head;
        if (head->type == COMM_FAIL) comm_die(c, "%.*s", (int)head->bytes, text);
        if (head->type == COMM_BYE) p->ended = 1;
        if (head->type == COMM_DATA) {
            pthread_mutex_lock(&c->lock);
            p->data = (char *)xmalloc(head->bytes);
            memcpy(p->data, text, head->bytes);
            p->data_bytes = head->bytes;
            p->data_waits = 1;
            pthread_cond_broadcast(&c->change);
            pthread_mutex_unlock(&c->lock);
        }
        comm_message_done(p);
    }
    if (bad) comm_die(c, "rank %d sent what is no message", rank);
}

static inline void *comm_listen_thread(void *where) {
    Comm *c = (Comm *)where;
    struct pollfd *fds = (struct pollfd *)xcalloc((size_t)c->num_peers, sizeof *fds);
    double beat = now_seconds();
    while (!__atomic_load_n(&c->ending, __ATOMIC_SEQ_CST)) {
        int leaving = __atomic_load_n(&c->leaving, __ATOMIC_SEQ_CST), left = 0;
        for (int i = 0; i < c->num_peers; i++) {
            left += c->peers[i].fd < 0 || c->peers[i].ended;
            fds[i].fd = c->peers[i].ended ? -1 : c->peers[i].fd;
            fds[i].events = POLLIN;
        }
        if (leaving && left == c->num_peers) break;
        poll(fds, (nfds_t)c->num_peers, 200);
        double now = now_seconds();
        int due = now - beat >= COMM_BEAT_SECONDS;
        for (int i = 0; i < c->num_peers && !c->ending; i++) {
            CommPeer *p = &c->peers[i];
            if (fds[i].fd < 0) continue;
            int closed = fds[i].revents ? comm_receive(p) : 0;
            comm_take_messages(c, p, i);
            if (leaving && closed) p->ended = 1;
            if (p->ended) continue;
            if (closed) comm_die(c, "rank %d is gone: its process has ended without a word", i);
            if (now - p->heard > COMM_SILENCE_SECONDS)
                comm_die(c, "rank %d is gone: no sign of life for %g seconds", i, now - p->heard);
            if (due && !leaving && comm_send(c, p, COMM_BEAT, NULL, 0) && comm_receive(p))
                comm_die(c, "rank %d is gone: its process has ended without a word", i);
        }
        if (due) beat = now;
        const char *why = NULL;
        pthread_mutex_lock(&c->lock);
        if (due && !leaving && c->trouble) why = c->trouble(c->nccl);
        pthread_mutex_unlock(&c->lock);
        if (why) die("%s", why);
    }
    free(fds);
    return NULL;
}

// ----------------------------------------------------------------------------
// Finding each other

// Where rank 0 listens.
typedef struct {
    char host[64];   // comm_host_id of rank 0, or empty: not known
    char names[768]; // its addresses, separated by spaces
    int port;
} CommAddress;

static inline int comm_listen(int port, const char *variable) {
    struct sockaddr_in6 six;
    struct sockaddr_in four;
    int on = 1, off = 0, fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), bound = -1;
    memset(&six, 0, sizeof six), memset(&four, 0, sizeof four);
    six.sin6_family = AF_INET6, six.sin6_addr = in6addr_any, six.sin6_port = htons((uint16_t)port);
    four.sin_family = AF_INET, four.sin_addr.s_addr = htonl(INADDR_ANY),
    four.sin_port = htons((uint16_t)port);
    if (fd >= 0) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
        bound = bind(fd, (struct sockaddr *)&six, sizeof six);
    }
    if (bound != 0 && errno != EADDRINUSE && errno != EACCES) { // a host without IPv6
        if (fd >= 0) close(fd);
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0) die("cannot open a socket: %s", strerror(errno));
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        bound = bind(fd, (struct sockaddr *)&four, sizeof four);
    }
    if (bound != 0 || listen(fd, 1024) != 0)
        die("cannot listen on port %d: %s; choose a free one with %s", port, strerror(errno), variable);
    return fd;
}

// All addresses of this host, and the port that fd listens on.
static inline void comm_own_address(CommAddress *a, int fd) {
    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    memset(a, 0, sizeof *a);
    comm_host_id(a->host);
    getsockname(fd, (struct sockaddr *)&bound, &size);
    a->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                : ((struct sockaddr_in *)&bound)->sin_port);
    struct ifaddrs *all = NULL;
    if (getifaddrs(&all) != 0) die("cannot list this host's addresses: %s", strerror(errno));
    for (struct ifaddrs *i = all; i; i = i->ifa_next) {
        char name[64];
        size_t at = strlen(a->names);
        if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET || (i->ifa_flags & IFF_LOOPBACK)) continue;
        inet_ntop(AF_INET, &((struct sockaddr_in *)i->ifa_addr)->sin_addr, name, sizeof name);
        if (at + strlen(name) + 2 < sizeof a->names)
            snprintf(a->names + at, sizeof a->names - at, "%s ", name);
    }
    freeifaddrs(all);
}

// Tries to connect to one address within `seconds`. Returns the socket, or -1 with why [256].
static inline int comm_connect(const char *name, int port, double seconds, char *why) {
    char service[16];
    struct addrinfo hints, *found = NULL;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    snprintf(service, sizeof service, "%d", port);
    int error = getaddrinfo(name, service, &hints, &found), fd = -1;
    if (error) {
        snprintf(why, 256, "%s", gai_strerror(error));
        return -1;
    }
    for (struct addrinfo *a = found; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0) continue;
        int failed = connect(fd, a->ai_addr, a->ai_addrlen) == 0 ? 0 : errno;
        struct pollfd wait = {fd, POLLOUT, 0};
        socklen_t size = sizeof failed;
        if (failed == EINPROGRESS) {
            if (poll(&wait, 1, (int)(1e3 * seconds) + 1) == 1)
                getsockopt(fd, SOL_SOCKET, SO_ERROR, &failed, &size);
            else
                failed = ETIMEDOUT;
        }
        if (failed) {
            snprintf(why, 256, "%s", strerror(failed));
            close(fd), fd = -1;
        }
    }
    freeaddrinfo(found);
    return fd;
}

// Blocking, without delay, and no send waits longer than a silent rank is waited for.
static inline void comm_socket_ready(int fd) {
    int on = 1;
    struct timeval limit = {(time_t)COMM_SILENCE_SECONDS, 0};
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

static inline void comm_pause(void) {
    struct timespec t = {0, 100000000};
    nanosleep(&t, NULL);
}

static inline void comm_address_path(char *path, const char *folder) {
    if (snprintf(path, PATH_BYTES, "%s/rank0.address", folder) >= PATH_BYTES)
        die("MASTER_DIR %s: the name is too long", folder);
}

// Rank 0 leaves its address in the folder.
static inline void comm_write_address(const char *folder, const CommAddress *a) {
    char path[PATH_BYTES], line[1024];
    AtomicFile file;
    make_dirs(folder);
    comm_address_path(path, folder);
    atomic_open(&file, path);
    int n = snprintf(line, sizeof line, "%s %d %s\n", a->host, a->port, a->names);
    atomic_write(&file, line, (size_t)n);
    atomic_commit(&file);
}

// The others read it. Returns 0 where it is not there yet.
static inline int comm_read_address(const char *folder, CommAddress *a) {
    char path[PATH_BYTES];
    comm_address_path(path, folder);
    memset(a, 0, sizeof *a);
    FILE *f = fopen(path, "r");
    if (!f) return 0;
    int got = fscanf(f, "%63s %d %767[^\n]", a->host, &a->port, a->names);
    fclose(f);
    return got == 3;
}

// Rank 0: takes connections until every rank has said who it is, then tells each its number on its host.
static inline void comm_gather_ranks(Comm *c) {
    CommPeer *strangers = c->peers + c->ranks;
    CommHello *hello = (CommHello *)xcalloc((size_t)c->ranks, sizeof *hello);
    double end = now_seconds() + COMM_START_SECONDS;
    int present = 1;
    comm_host_id(hello[0].host);
    while (present < c->ranks) {
        struct pollfd fds[1 + COMM_STRANGERS];
        int free_slot = -1;
        if (now_seconds() > end) {
            char missing[256] = "";
            int many = 0;
            for (int r = 1; r < c->ranks; r++) {
                size_t at = strlen(missing);
                if (c->peers[r].fd < 0 && ++many <= 8)
                    snprintf(missing + at, sizeof missing - at, "%s%d", at ? ", " : "", r);
            }
            comm_die(c,
                     "rank %s%s of %d did not come within %g seconds: not started, ended, or cannot reach %s",
                     missing, many > 8 ? ", ..." : "", c->ranks, (double)COMM_START_SECONDS, c->where);
        }
        for (int i = 0; i < COMM_STRANGERS; i++) {
            fds[1 + i].fd = strangers[i].fd, fds[1 + i].events = POLLIN;
            if (strangers[i].fd < 0) free_slot = i;
        }
        fds[0].fd = free_slot >= 0 ? c->listener : -1, fds[0].events = POLLIN;
        poll(fds, 1 + COMM_STRANGERS, 200);
        for (int i = 0; i < COMM_STRANGERS; i++) {
            CommPeer *p = &strangers[i];
            int bad = 0;
            if (p->fd < 0) continue;
            int closed = fds[1 + i].revents ? comm_receive(p) : 0;
            const CommHead *head = comm_message(p, &bad);
            // not ours, or as silent as no rank of ours is
            if (closed || bad || (!head && now_seconds() - p->heard > COMM_START_SECONDS / 5.0) ||
                (head && (head->type != COMM_HELLO || head->bytes != sizeof(CommHello)))) {
                comm_peer_close(p);
                continue;
            }
            if (!head) continue;
            CommHello h;
            memcpy(&h, p->bytes + sizeof *head, sizeof h);
            comm_message_done(p);
            if (h.ranks != c->ranks)
                comm_die(c, "rank %d was started as one of %d, rank 0 as one of %d", h.rank, h.ranks,
                         c->ranks);
            if (h.rank < 1 || h.rank >= c->ranks || c->peers[h.rank].fd >= 0)
                comm_die(c, "two processes were started as rank %d of %d", h.rank, c->ranks);
            c->peers[h.rank] = *p;
            hello[h.rank] = h;
            memset(p, 0, sizeof *p);
            p->fd = -1;
            present++;
        }
        for (int r = 1; r < c->ranks; r++) { // it has nothing to say yet, so this is its end
            CommPeer *p = &c->peers[r];
            int bad;
            if (p->fd < 0) continue;
            int closed = comm_receive(p);
            const CommHead *head = comm_message(p, &bad);
            if (head && head->type == COMM_FAIL)
                comm_die(c, "%.*s", (int)head->bytes, p->bytes + sizeof *head);
            if (closed) comm_die(c, "rank %d is gone: its process ended while others were starting", r);
        }
        if (fds[0].revents) {
            int fd = accept4(c->listener, NULL, NULL, SOCK_CLOEXEC);
            if (fd >= 0) {
                comm_socket_ready(fd);
                strangers[free_slot].fd = fd;
                strangers[free_slot].heard = now_seconds();
            }
        }
    }
    for (int i = 0; i < COMM_STRANGERS; i++) comm_peer_close(&strangers[i]);
    c->num_peers = c->ranks;
    for (int r = 1; r < c->ranks; r++) {
        int32_t local = 0;
        for (int i = 0; i < r; i++) local += memcmp(hello[i].host, hello[r].host, sizeof hello[r].host) == 0;
        if (comm_send(c, &c->peers[r], COMM_WELCOME, &local, sizeof local))
            comm_die(c, "rank %d is gone: its process ended while others were starting", r);
        c->peers[r].heard = now_seconds();
    }
    free(hello);
}

// The other ranks: connects to rank 0, says who this is, and waits until all are there.
static inline void comm_join(Comm *c, CommAddress *a, const char *folder) {
    CommHello hello;
    CommPeer *p = &c->peers[0];
    char why[256] = "it has not left its address there";
    double end = now_seconds() + COMM_START_SECONDS;
    memset(&hello, 0, sizeof hello);
    hello.rank = c->rank, hello.ranks = c->ranks;
    comm_host_id(hello.host);
    while (p->fd < 0) {
        if (now_seconds() > end)
            die("no connection to rank 0 at %s within %g seconds: %s", c->where, (double)COMM_START_SECONDS,
                why);
        if (!folder || comm_read_address(folder, a)) {
            char names[sizeof a->names], *next = NULL;
            int local = strncmp(a->host, hello.host, sizeof a->host) == 0;
            snprintf(names, sizeof names, "%s", local ? "127.0.0.1" : a->names);
            for (char *name = strtok_r(names, " ", &next); name && p->fd < 0;
                 name = strtok_r(NULL, " ", &next))
                p->fd = comm_connect(name, a->port, 5, why);
        }
        if (p->fd < 0) comm_pause();
    }
    comm_socket_ready(p->fd);
    p->heard = now_seconds();
    // rank 0 may have started later, and waits as long for others
    end = now_seconds() + COMM_START_SECONDS + COMM_START_SECONDS / 10.0;
    int failed = comm_send(c, p, COMM_HELLO, &hello, sizeof hello);
    for (;;) {
        struct pollfd wait = {p->fd, POLLIN, 0};
        const CommHead *head;
        int bad = 0;
        failed |= poll(&wait, 1, 200) > 0 && comm_receive(p);
        while ((head = comm_message(p, &bad)) != NULL && head->type != COMM_WELCOME) {
            if (head->type == COMM_FAIL) comm_die(c, "%.*s", (int)head->bytes, p->bytes + sizeof *head);
            comm_message_done(p);
        }
        if (head) break;
        if (bad) die("what listens at %s is not rank 0 of this program", c->where);
        if (failed) comm_die(c, "rank 0 at %s is gone: it ended while others were starting", c->where);
        if (now_seconds() > end) comm_die(c, "rank 0 at %s does not answer", c->where);
    }
    int32_t local;
    memcpy(&local, p->bytes + sizeof(CommHead), sizeof local);
    c->local_rank = local;
    comm_message_done(p);
}

// Where rank 0 listens, by MASTER_ADDR and MASTER_PORT, or as Slurm tells it.
static inline void comm_master_address(CommAddress *a, const CommLauncher *l) {
    const char *name = getenv("MASTER_ADDR"), *port = getenv("MASTER_PORT"), *job = getenv("SLURM_JOB_ID");
    const char *list = getenv("SLURM_STEP_NODELIST"), *agent = getenv("TORCHELASTIC_USE_AGENT_STORE");
    int slurm = strcmp(l->launcher, "srun") == 0;
    memset(a, 0, sizeof *a);
    if (name)
        snprintf(a->names, sizeof a->names, "%s", name);
    else if (slurm && list)
        comm_first_host(list, a->names, sizeof a->names);
    else
        snprintf(a->names, sizeof a->names, "127.0.0.1");
    a->port = port           ? (int)parse_int("MASTER_PORT", port, 1, 65535)
              : slurm && job ? 20000 + (int)(strtoll(job, NULL, 10) % 10000)
                             : COMM_PORT;
    // torchrun itself listens on the port that it names
    if (agent && strcmp(agent, "True") == 0) a->port = a->port < 65535 ? a->port + 1 : 1024;
    if (!a->names[0]) die("MASTER_ADDR is empty: it must name the host of rank 0");
}

#ifdef USE_MPI
// Rank, number of ranks, and rank 0's address and listener from MPI, which is done after that.
static inline void comm_from_mpi(Comm *c, CommAddress *a) {
    if (MPI_Init(NULL, NULL) != MPI_SUCCESS) die("MPI_Init failed");
    MPI_Comm_rank(MPI_COMM_WORLD, &c->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &c->ranks);
    if (c->rank == 0) {
        c->listener = comm_listen(0, "MASTER_PORT");
        comm_own_address(a, c->listener);
    }
    MPI_Bcast(a, sizeof *a, MPI_BYTE, 0, MPI_COMM_WORLD);
    MPI_Finalize();
}
#endif

// ----------------------------------------------------------------------------
// The life of a Comm

// Finds the other processes and connects all of them; dies where one is missing or wrong. Started alone, this
// process is rank 0 of 1. It makes a thread, and die() end all ranks from here on.
static inline void comm_start(Comm *c) {
    const CommLauncher *l = comm_launched();
    CommAddress address;
    const char *folder = getenv("MASTER_DIR");
    int found = 0;
    memset(c, 0, sizeof *c);
    c->ranks = 1, c->listener = -1;
    if (!l) return;
    c->ranks = (int)parse_int(l->ranks, getenv(l->ranks), 1, 1 << 20);
    c->rank = (int)parse_int(l->rank, getenv(l->rank), 0, c->ranks - 1);
#ifdef USE_MPI
    if (strcmp(l->launcher, "mpirun") == 0 && !folder && !getenv("MASTER_ADDR")) {
        int ranks = c->ranks;
        comm_from_mpi(c, &address);
        if (c->ranks != ranks)
            die("%s is %d, but MPI knows %d: this program is built with another MPI than mpirun's", l->ranks,
                ranks, c->ranks);
        folder = NULL, found = 1;
    }
#endif
    if (!found && !folder) comm_master_address(&address, l);
    snprintf(die_name, sizeof die_name, "rank %d: ", c->rank);
    if (c->rank == 0 && c->listener < 0) c->listener = comm_listen(folder ? 0 : address.port, "MASTER_PORT");
    if (c->rank == 0 && folder) {
        comm_own_address(&address, c->listener);
        comm_write_address(folder, &address);
    }
    if (folder && c->rank > 0)
        snprintf(c->where, sizeof c->where, "the address in MASTER_DIR %.900s", folder);
    else
        snprintf(c->where, sizeof c->where, "%.*s port %d", (int)strcspn(address.names, " "), address.names,
                 address.port);

    pthread_mutex_init(&c->lock, NULL);
    pthread_mutex_init(&c->sending, NULL);
    pthread_cond_init(&c->change, NULL);
    c->num_peers = c->rank == 0 ? c->ranks + COMM_STRANGERS : 1;
    c->peers = (CommPeer *)xcalloc((size_t)c->num_peers, sizeof *c->peers);
    for (int i = 0; i < c->num_peers; i++) c->peers[i].fd = -1;
    comm_of_process = c;
    die_tells = comm_tell_failure;
    if (c->rank == 0)
        comm_gather_ranks(c);
    else
        comm_join(c, &address, folder);
    if (c->rank == 0) close(c->listener);
    c->listener = -1;
    if (c->rank == 0 && folder) {
        char path[PATH_BYTES];
        comm_address_path(path, folder);
        unlink(path);
    }
    int error = pthread_create(&c->thread, NULL, comm_listen_thread, c);
    if (error) die("cannot start a thread: %s", strerror(error));
    c->listening = 1;
}

// From now on `trouble` is asked every few seconds; NULL: nothing is.
static inline void comm_watch(Comm *c, const char *(*trouble)(void *), void *nccl) {
    pthread_mutex_lock(&c->lock);
    c->trouble = trouble, c->nccl = nccl;
    pthread_mutex_unlock(&c->lock);
}

// Takes the message that p has sent or will send.
static inline char *comm_take(Comm *c, CommPeer *p, size_t *bytes) {
    pthread_mutex_lock(&c->lock);
    while (!p->data_waits) pthread_cond_wait(&c->change, &c->lock);
    char *data = p->data;
    *bytes = p->data_bytes;
    p->data = NULL, p->data_waits = 0;
    pthread_mutex_unlock(&c->lock);
    return data;
}

// Dies: rank r took no message, with errno as send left it.
LLMC_NORETURN static inline void comm_gone(Comm *c, int r) {
    comm_die(c, "rank %d is gone: %s", r,
             errno == EAGAIN || errno == EWOULDBLOCK ? "it takes no messages"
                                                     : "its process has ended without a word");
}

// all [ranks * bytes] = every rank's `mine`, in the order of ranks. All ranks call it, with the same number
// of bytes; none returns before all have called.
static inline void comm_allgather(Comm *c, const void *mine, size_t bytes, void *all) {
    size_t got;
    if (c->ranks == 1) {
        memcpy(all, mine, bytes);
        return;
    }
    if (c->rank > 0) {
        if (comm_send(c, &c->peers[0], COMM_DATA, mine, bytes)) comm_gone(c, 0);
        char *data = comm_take(c, &c->peers[0], &got);
        if (got != bytes * (size_t)c->ranks)
            die("rank 0 works on something else: %zu bytes from it and not %zu", got,
                bytes * (size_t)c->ranks);
        memcpy(all, data, got);
        free(data);
        return;
    }
    memcpy(all, mine, bytes);
    for (int r = 1; r < c->ranks; r++) {
        char *data = comm_take(c, &c->peers[r], &got);
        if (got != bytes)
            comm_die(c, "rank %d works on something else: %zu bytes from it and not %zu", r, got, bytes);
        memcpy((char *)all + (size_t)r * bytes, data, bytes);
        free(data);
    }
    for (int r = 1; r < c->ranks; r++)
        if (comm_send(c, &c->peers[r], COMM_DATA, all, bytes * (size_t)c->ranks)) comm_gone(c, r);
}

// Waits for all ranks.
static inline void comm_barrier(Comm *c) {
    char *all = (char *)xmalloc((size_t)c->ranks);
    comm_allgather(c, "", 1, all);
    free(all);
}

// Rank 0's bytes, on every rank.
static inline void comm_broadcast(Comm *c, void *data, size_t bytes) {
    char *all = (char *)xmalloc((size_t)c->ranks * bytes);
    comm_allgather(c, data, bytes, all);
    memcpy(data, all, bytes);
    free(all);
}

// Waits for all ranks and takes leave of them: the end of one is no failure any more.
static inline void comm_end(Comm *c) {
    if (!c->listening) return;
    comm_barrier(c);
    for (int i = 0; i < c->num_peers; i++)
        if (c->peers[i].fd >= 0) comm_send(c, &c->peers[i], COMM_BYE, NULL, 0);
    __atomic_store_n(&c->leaving, 1, __ATOMIC_SEQ_CST);
    pthread_join(c->thread, NULL);
    comm_of_process = NULL;
    die_tells = NULL;
    for (int i = 0; i < c->num_peers; i++) comm_peer_close(&c->peers[i]);
    free(c->peers);
    memset(c, 0, sizeof *c);
}
#endif
