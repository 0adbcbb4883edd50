// comm.c: implements comm.h. Rank 0 listens; every other rank connects to it, so that the connections form a
// star. Each rank's monitor thread reads them all: messages of the collectives (without MPI), heartbeats,
// failures, and the end of a run.
#include "comm.h"
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
#define OMPI_SKIP_MPICXX // leaves out MPI's deprecated C++ bindings
#define MPICH_SKIP_MPICXX
#include <mpi.h>
#endif

// Timeouts in seconds; tests define shorter ones.
#ifndef COMM_RENDEZVOUS_SECONDS
#define COMM_RENDEZVOUS_SECONDS 50 // from a rank's start until all ranks are connected
#define COMM_TIMEOUT_SECONDS 30    // without data from a rank, before it counts as gone
#define COMM_HEARTBEAT_SECONDS 2   // between two heartbeats
#endif
#define COMM_PORT 29500     // default of MASTER_PORT, as torchrun's
#define COMM_MAX_PENDING 64 // accepted connections that have not yet sent their rank
#define COMM_MAGIC 0x4F434D4Du

typedef enum { COMM_HELLO, COMM_WELCOME, COMM_DATA, COMM_HEARTBEAT, COMM_FAIL, COMM_BYE } CommMessageType;
typedef struct {
    uint32_t magic, type;
    uint64_t bytes; // of the payload, which follows the header
} CommHeader;
typedef struct {
    int32_t rank, ranks;
} CommHello;

typedef struct {
    int fd;                    // socket, -1: not connected
    int finished;              // COMM_BYE has arrived
    double last_received;      // now_seconds() of the last received bytes
    char *buffer;              // [capacity], received bytes that are not yet handled
    size_t received, capacity; // bytes of `buffer` in use, and allocated
    char *data;                // [data_bytes], payload of a COMM_DATA message, until comm_wait_data takes it
    size_t data_bytes;
    int data_ready; // 1: `data` holds a message
} CommPeer;

typedef struct CommState {
    CommPeer *peers;      // rank 0: [ranks], then COMM_MAX_PENDING pending peers; else peers[0] is rank 0
    int num_peers;        // during rendezvous rank 0: ranks + COMM_MAX_PENDING; then rank 0: ranks; else 1
    int listener;         // listening socket of rank 0 during rendezvous; else -1
    int use_mpi;          // 1: MPI runs the collectives
    pthread_t thread;     // runs comm_monitor
    pthread_mutex_t lock; // guards peers[].data*, check_error and error_arg
    pthread_mutex_t send_lock; // held while a message is sent
    pthread_cond_t data_arrived;
    int finalizing;                              // 1: the thread ends once every peer has sent COMM_BYE
    int failing;                                 // 1: the thread ends now
    const char *(*check_error)(void *error_arg); // called every heartbeat; returns NULL, or NCCL's error
    void *error_arg;
    char failure_text[COMM_TEXT_BYTES]; // set when another rank's failure ends this rank
    char master[COMM_TEXT_BYTES];       // rank 0's address, for messages
} CommState;

// The Comm through which die() reports a failure.
static Comm *comm_global = NULL;

// ----------------------------------------------------------------------------
// Launchers

const CommLauncher *comm_find_launcher(void) {
    static const CommLauncher launchers[] = {
        // innermost first: srun or mpirun can start torchrun
        {"RANK", "WORLD_SIZE", "torchrun"},
        {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "mpirun"},
        {"PMI_RANK", "PMI_SIZE", "mpirun"},
        {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "srun"}, // only a job step has both, not a batch script
    };
    for (size_t i = 0; i < sizeof launchers / sizeof launchers[0]; i++) {
        const CommLauncher *l = &launchers[i];
        if (getenv(l->rank) && getenv(l->ranks))
            return parse_int(l->ranks, getenv(l->ranks), 1, 1 << 20) > 1 ? l : NULL;
    }
    return NULL;
}

// Writes an id [64] that is the same for all processes of a host, in any container, and differs between
// hosts.
static void comm_host_id(char id[64]) {
    memset(id, 0, 64);
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (!f || fscanf(f, "%63s", id) != 1) gethostname(id, 63);
    if (f) fclose(f);
}

// Writes the first host of a Slurm node list: "node[07-09,12],login1" -> "node07".
static void comm_slurm_first_host(const char *list, char *host, size_t size) {
    size_t length = 0;
    for (const char *p = list; *p && *p != ',' && length + 1 < size; p++) {
        if (*p == '[') {
            for (p++; *p && *p != ',' && *p != '-' && *p != ']' && length + 1 < size; p++)
                host[length++] = *p;
            while (*p && *p != ']') p++; // the text behind the bracket belongs to the name
            if (!*p) break;
            continue;
        }
        host[length++] = *p;
    }
    host[length] = 0;
}

// ----------------------------------------------------------------------------
// Messages

// Sends `bytes` bytes over a blocking socket. Returns 0, or -1 with errno when the peer is gone or accepts
// nothing.
static int comm_send_all(int fd, const void *data, size_t bytes) {
    const char *p = (const char *)data;
    while (bytes > 0) {
        ssize_t n = send(fd, p, bytes, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        p += n, bytes -= (size_t)n;
    }
    return 0;
}

// Sends one message. Returns 0, or nonzero with errno as comm_send_all.
static int comm_send(CommState *s, CommPeer *peer, CommMessageType type, const void *data, size_t bytes) {
    CommHeader header = {COMM_MAGIC, (uint32_t)type, bytes};
    pthread_mutex_lock(&s->send_lock);
    int error = comm_send_all(peer->fd, &header, sizeof header) || comm_send_all(peer->fd, data, bytes);
    pthread_mutex_unlock(&s->send_lock);
    return error;
}

// Appends the bytes that have arrived to p->buffer, without waiting. Returns 0, or -1 when the connection is
// closed.
static int comm_receive(CommPeer *p) {
    if (p->capacity - p->received < 65536) {
        p->capacity = p->received + 65536;
        char *more = (char *)realloc(p->buffer, p->capacity);
        if (!more) die("out of memory: %zu bytes for a message; free host memory", p->capacity);
        p->buffer = more;
    }
    ssize_t n = recv(p->fd, p->buffer + p->received, p->capacity - p->received, MSG_DONTWAIT);
    if (n < 0 && (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK)) return 0;
    if (n <= 0) return -1;
    p->received += (size_t)n;
    p->last_received = now_seconds();
    return 0;
}

// Returns the first message of p->buffer, or NULL while it is incomplete. *invalid: 1 when the bytes are not
// a message of this program.
static const CommHeader *comm_next_message(const CommPeer *p, int *invalid) {
    const CommHeader *header = (const CommHeader *)p->buffer;
    *invalid = 0;
    if (p->received < sizeof *header) return NULL;
    *invalid = header->magic != COMM_MAGIC || header->bytes > ((uint64_t)1 << 40);
    return !*invalid && p->received - sizeof *header >= header->bytes ? header : NULL;
}

// Removes the first message from p->buffer.
static void comm_pop_message(CommPeer *p) {
    size_t size = sizeof(CommHeader) + (size_t)((const CommHeader *)p->buffer)->bytes;
    memmove(p->buffer, p->buffer + size, p->received - size);
    p->received -= size;
}

// Closes the connection and frees the peer's memory.
static void comm_peer_close(CommPeer *p) {
    if (p->fd >= 0) close(p->fd);
    free(p->buffer), free(p->data);
    memset(p, 0, sizeof *p);
    p->fd = -1;
}

// ----------------------------------------------------------------------------
// Failures

// die() calls this last. Sends the failure to all peers, waits up to 3 s until they have read it, and ends
// the process by _exit: the handlers of exit() would wait for kernels that wait for other GPUs.
static void comm_broadcast_failure(const char *message) {
    Comm *c = comm_global;
    char text[COMM_TEXT_BYTES];
    struct timespec deadline;
    double drain_end = now_seconds() + 3;
    if (!c) return;
    CommState *s = c->state;
    if (s->failure_text[0])
        snprintf(text, sizeof text, "%s", s->failure_text);
    else
        snprintf(text, sizeof text, "rank %d failed: %.*s", c->rank, COMM_TEXT_BYTES - 64, message);
    s->failing = 1;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += 2;
    pthread_mutex_timedlock(&s->send_lock, &deadline); // the holder may be stuck in send
    for (int i = c->ranks; i < s->num_peers; i++) {    // during rendezvous: peers that have just connected
        if (s->peers[i].fd < 0) s->peers[i].fd = accept4(s->listener, NULL, NULL, SOCK_CLOEXEC);
    }
    for (int i = 0; i < s->num_peers; i++) {
        CommPeer *p = &s->peers[i];
        CommHeader header = {COMM_MAGIC, COMM_FAIL, strlen(text)};
        if (p->fd < 0) continue;
        if (comm_send_all(p->fd, &header, sizeof header) == 0) comm_send_all(p->fd, text, strlen(text));
        shutdown(p->fd, SHUT_WR);
    }
    for (int i = 0; i < s->num_peers; i++) { // closing a socket with unread bytes would discard the text
        char discarded[4096];
        struct pollfd wait = {s->peers[i].fd, POLLIN, 0};
        while (wait.fd >= 0 && now_seconds() < drain_end &&
               poll(&wait, 1, (int)(1e3 * (drain_end - now_seconds())) + 1) > 0 &&
               recv(wait.fd, discarded, sizeof discarded, 0) > 0) {
        }
    }
    _exit(1);
}

void comm_die(Comm *c, const char *format, ...) {
    char text[COMM_TEXT_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (c->state) memcpy(c->state->failure_text, text, sizeof text); // comm_broadcast_failure forwards it
    die("%s", text);
}

// Dies because rank r accepted no message; errno is that of send.
LLMC_NORETURN static void comm_die_unreachable(Comm *c, int r) {
    comm_die(c, "rank %d is gone: %s; see its logs", r,
             errno == EAGAIN || errno == EWOULDBLOCK ? "it accepts no messages"
                                                     : "its process ended without a message");
}

// Dies because rank r takes part in a collective with another number of bytes.
LLMC_NORETURN static void comm_die_out_of_step(Comm *c, int r, size_t sent, size_t expected) {
    comm_die(c, "rank %d is out of step: it sent %zu bytes, not %zu; start all ranks from the same build", r,
             sent, expected);
}

// ----------------------------------------------------------------------------
// The monitor thread

// Handles the complete messages of p->buffer, which come from `rank`. Only the monitor thread calls it.
static void comm_handle_messages(Comm *c, CommPeer *p, int rank) {
    CommState *s = c->state;
    const CommHeader *header;
    int invalid;
    while ((header = comm_next_message(p, &invalid)) != NULL) {
        const char *text = p->buffer + sizeof *header;
        if (header->type == COMM_FAIL) comm_die(c, "%.*s", (int)header->bytes, text);
        if (header->type == COMM_BYE) p->finished = 1;
        if (header->type == COMM_DATA) {
            pthread_mutex_lock(&s->lock);
            p->data = (char *)xmalloc(header->bytes);
            memcpy(p->data, text, header->bytes);
            p->data_bytes = header->bytes;
            p->data_ready = 1;
            pthread_cond_broadcast(&s->data_arrived);
            pthread_mutex_unlock(&s->lock);
        }
        comm_pop_message(p);
    }
    if (invalid) comm_die(c, "rank %d sent an invalid message; start all ranks from the same build", rank);
}

// The monitor thread of a Comm: receives messages, sends heartbeats, detects peers that are gone.
static void *comm_monitor(void *comm) {
    Comm *c = (Comm *)comm;
    CommState *s = c->state;
    struct pollfd *fds = (struct pollfd *)xcalloc((size_t)s->num_peers, sizeof *fds);
    double last_heartbeat = now_seconds();
    while (!__atomic_load_n(&s->failing, __ATOMIC_SEQ_CST)) {
        int finalizing = __atomic_load_n(&s->finalizing, __ATOMIC_SEQ_CST), num_finished = 0;
        for (int i = 0; i < s->num_peers; i++) {
            num_finished += s->peers[i].fd < 0 || s->peers[i].finished;
            fds[i].fd = s->peers[i].finished ? -1 : s->peers[i].fd;
            fds[i].events = POLLIN;
        }
        if (finalizing && num_finished == s->num_peers) break;
        poll(fds, (nfds_t)s->num_peers, 200);
        double now = now_seconds();
        int heartbeat_due = now - last_heartbeat >= COMM_HEARTBEAT_SECONDS;
        for (int i = 0; i < s->num_peers && !s->failing; i++) {
            CommPeer *p = &s->peers[i];
            if (fds[i].fd < 0) continue;
            int closed = fds[i].revents ? comm_receive(p) : 0;
            comm_handle_messages(c, p, i);
            if (finalizing && closed) p->finished = 1;
            if (p->finished) continue;
            if (closed) comm_die(c, "rank %d is gone: its process ended without a message; see its logs", i);
            if (now - p->last_received > COMM_TIMEOUT_SECONDS)
                comm_die(c, "rank %d is gone: no heartbeat for %g seconds; check its process and network", i,
                         now - p->last_received);
            if (heartbeat_due && !finalizing && comm_send(s, p, COMM_HEARTBEAT, NULL, 0) && comm_receive(p))
                comm_die(c, "rank %d is gone: its process ended without a message; see its logs", i);
        }
        if (heartbeat_due) last_heartbeat = now;
        const char *msg = NULL;
        pthread_mutex_lock(&s->lock);
        if (heartbeat_due && !finalizing && s->check_error) msg = s->check_error(s->error_arg);
        pthread_mutex_unlock(&s->lock);
        if (msg) die("%s", msg);
    }
    free(fds);
    return NULL;
}

void comm_set_error_check(Comm *c, const char *(*check_error)(void *error_arg), void *error_arg) {
    CommState *s = c->state;
    if (!s) return;
    pthread_mutex_lock(&s->lock);
    s->check_error = check_error, s->error_arg = error_arg;
    pthread_mutex_unlock(&s->lock);
}

// ----------------------------------------------------------------------------
// Addresses and sockets

// The address that rank 0 listens on.
typedef struct {
    char host[64];   // comm_host_id of rank 0, or empty: unknown
    char names[768]; // host names or IP addresses of rank 0, separated by spaces
    int port;
} CommAddress;

// Opens a listening socket on `port` (0: any free port) of all interfaces, IPv6 and IPv4. `variable` is the
// environment variable that sets the port, for the error message.
static int comm_listen(int port, const char *variable) {
    struct sockaddr_in6 address6;
    struct sockaddr_in address4;
    int on = 1, off = 0, fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), bound = -1;
    memset(&address6, 0, sizeof address6), memset(&address4, 0, sizeof address4);
    address6.sin6_family = AF_INET6, address6.sin6_addr = in6addr_any,
    address6.sin6_port = htons((uint16_t)port);
    address4.sin_family = AF_INET, address4.sin_addr.s_addr = htonl(INADDR_ANY),
    address4.sin_port = htons((uint16_t)port);
    if (fd >= 0) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
        bound = bind(fd, (struct sockaddr *)&address6, sizeof address6);
    }
    if (bound != 0 && errno != EADDRINUSE && errno != EACCES) { // the host has no IPv6
        if (fd >= 0) close(fd);
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0) die("cannot open a socket: %s; check ulimit -n and the host's network", strerror(errno));
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        bound = bind(fd, (struct sockaddr *)&address4, sizeof address4);
    }
    if (bound != 0 || listen(fd, 1024) != 0)
        die("cannot listen on port %d: %s; choose a free port with %s", port, strerror(errno), variable);
    return fd;
}

// Writes the IPv4 addresses of this host, loopback excepted, and the port that fd listens on.
static void comm_local_address(CommAddress *a, int fd) {
    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    memset(a, 0, sizeof *a);
    comm_host_id(a->host);
    getsockname(fd, (struct sockaddr *)&bound, &size);
    a->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                : ((struct sockaddr_in *)&bound)->sin_port);
    struct ifaddrs *all = NULL;
    if (getifaddrs(&all) != 0)
        die("cannot list this host's addresses: %s; start with MASTER_ADDR instead", strerror(errno));
    for (struct ifaddrs *i = all; i; i = i->ifa_next) {
        char name[64];
        size_t length = strlen(a->names);
        if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET || (i->ifa_flags & IFF_LOOPBACK)) continue;
        inet_ntop(AF_INET, &((struct sockaddr_in *)i->ifa_addr)->sin_addr, name, sizeof name);
        if (length + strlen(name) + 2 < sizeof a->names)
            snprintf(a->names + length, sizeof a->names - length, "%s ", name);
    }
    freeifaddrs(all);
}

// Tries to connect to one host name or IP address within `seconds`. Returns the socket, or -1 with the reason
// in msg [256].
static int comm_connect(const char *name, int port, double seconds, char *msg) {
    char service[16];
    struct addrinfo hints, *found = NULL;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    snprintf(service, sizeof service, "%d", port);
    int error = getaddrinfo(name, service, &hints, &found), fd = -1;
    if (error) {
        snprintf(msg, 256, "%s", gai_strerror(error));
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
            snprintf(msg, 256, "%s", strerror(failed));
            close(fd), fd = -1;
        }
    }
    freeaddrinfo(found);
    return fd;
}

// Makes the socket blocking and sends small messages at once. A send fails after COMM_TIMEOUT_SECONDS.
static void comm_configure_socket(int fd) {
    int on = 1;
    struct timeval limit = {(time_t)COMM_TIMEOUT_SECONDS, 0};
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

// Sleeps 0.1 s between two tries.
static void comm_pause(void) {
    struct timespec t = {0, 100000000};
    nanosleep(&t, NULL);
}

static void comm_address_path(char *path, const char *folder) {
    if (snprintf(path, PATH_BYTES, "%s/rank0.address", folder) >= PATH_BYTES)
        die("MASTER_DIR %s: the name is too long; choose a folder with a shorter path", folder);
}

// Rank 0 writes its address to a file in the folder.
static void comm_write_address(const char *folder, const CommAddress *a) {
    char path[PATH_BYTES], line[1024];
    AtomicFile file;
    make_dirs(folder);
    comm_address_path(path, folder);
    atomic_open(&file, path);
    int n = snprintf(line, sizeof line, "%s %d %s\n", a->host, a->port, a->names);
    atomic_write(&file, line, (size_t)n);
    atomic_commit(&file);
}

// The other ranks read that file. Returns 1, or 0 while it does not exist.
static int comm_read_address(const char *folder, CommAddress *a) {
    char path[PATH_BYTES];
    comm_address_path(path, folder);
    memset(a, 0, sizeof *a);
    FILE *f = fopen(path, "r");
    if (!f) return 0;
    int fields = fscanf(f, "%63s %d %767[^\n]", a->host, &a->port, a->names);
    fclose(f);
    return fields == 3;
}

// Writes rank 0's address from MASTER_ADDR and MASTER_PORT. The defaults come from Slurm's node list and job
// id, else they are 127.0.0.1 and COMM_PORT.
static void comm_master_address(CommAddress *a, const CommLauncher *l) {
    const char *name = getenv("MASTER_ADDR"), *port = getenv("MASTER_PORT"), *job = getenv("SLURM_JOB_ID");
    const char *list = getenv("SLURM_STEP_NODELIST"), *agent = getenv("TORCHELASTIC_USE_AGENT_STORE");
    int slurm = strcmp(l->launcher, "srun") == 0;
    memset(a, 0, sizeof *a);
    if (name)
        snprintf(a->names, sizeof a->names, "%s", name);
    else if (slurm && list)
        comm_slurm_first_host(list, a->names, sizeof a->names);
    else
        snprintf(a->names, sizeof a->names, "127.0.0.1");
    a->port = port           ? (int)parse_int("MASTER_PORT", port, 1, 65535)
              : slurm && job ? 20000 + (int)(strtoll(job, NULL, 10) % 10000)
                             : COMM_PORT;
    // torchrun itself listens on MASTER_PORT
    if (agent && strcmp(agent, "True") == 0) a->port = a->port < 65535 ? a->port + 1 : 1024;
    if (!a->names[0]) die("MASTER_ADDR is empty: set it to the host of rank 0");
}

// ----------------------------------------------------------------------------
// Rendezvous

// Dies because some ranks did not connect in time.
LLMC_NORETURN static void comm_die_missing(Comm *c) {
    char missing[256] = "";
    int num_missing = 0;
    for (int r = 1; r < c->ranks; r++) {
        size_t length = strlen(missing);
        if (c->state->peers[r].fd < 0 && ++num_missing <= 8)
            snprintf(missing + length, sizeof missing - length, "%s%d", length ? ", " : "", r);
    }
    comm_die(c,
             "rank %s%s of %d did not connect within %g seconds: check that all ranks "
             "were started and can reach %s",
             missing, num_missing > 8 ? ", ..." : "", c->ranks, (double)COMM_RENDEZVOUS_SECONDS,
             c->state->master);
}

// Reads from the pending peer p, whose poll returned revents. Moves it to peers[rank] and returns 1 once it
// has sent its rank. Drops a connection that is not a rank: it is closed, invalid, or silent for too long.
static int comm_admit_pending(Comm *c, CommPeer *p, int revents) {
    CommState *s = c->state;
    CommHello h;
    int invalid = 0, closed = revents ? comm_receive(p) : 0;
    const CommHeader *header = comm_next_message(p, &invalid);
    if (closed || invalid || (!header && now_seconds() - p->last_received > COMM_RENDEZVOUS_SECONDS / 5.0) ||
        (header && (header->type != COMM_HELLO || header->bytes != sizeof h))) {
        comm_peer_close(p);
        return 0;
    }
    if (!header) return 0;
    memcpy(&h, p->buffer + sizeof *header, sizeof h);
    comm_pop_message(p);
    if (h.ranks != c->ranks)
        comm_die(c, "rank %d was started with world size %d, rank 0 with %d: set the same world size", h.rank,
                 h.ranks, c->ranks);
    if (h.rank < 1 || h.rank >= c->ranks || s->peers[h.rank].fd >= 0)
        comm_die(c, "two processes were started as rank %d of %d: give each a rank of its own", h.rank,
                 c->ranks);
    s->peers[h.rank] = *p;
    memset(p, 0, sizeof *p);
    p->fd = -1;
    return 1;
}

// Dies if a connected rank has failed. It sends nothing else before COMM_WELCOME.
static void comm_check_connected(Comm *c) {
    for (int r = 1; r < c->ranks; r++) {
        CommPeer *p = &c->state->peers[r];
        int invalid;
        if (p->fd < 0) continue;
        int closed = comm_receive(p);
        const CommHeader *header = comm_next_message(p, &invalid);
        if (header && header->type == COMM_FAIL)
            comm_die(c, "%.*s", (int)header->bytes, p->buffer + sizeof *header);
        if (closed) comm_die(c, "rank %d is gone: its process ended during startup; see its output", r);
    }
}

// Rendezvous of rank 0: accepts connections until every rank has sent its rank, then answers each.
static void comm_accept_ranks(Comm *c) {
    CommState *s = c->state;
    CommPeer *pending = s->peers + c->ranks;
    double end = now_seconds() + COMM_RENDEZVOUS_SECONDS;
    int num_connected = 1;
    while (num_connected < c->ranks) {
        struct pollfd fds[1 + COMM_MAX_PENDING];
        int free_slot = -1;
        if (now_seconds() > end) comm_die_missing(c);
        for (int i = 0; i < COMM_MAX_PENDING; i++) {
            fds[1 + i].fd = pending[i].fd, fds[1 + i].events = POLLIN;
            if (pending[i].fd < 0) free_slot = i;
        }
        fds[0].fd = free_slot >= 0 ? s->listener : -1, fds[0].events = POLLIN;
        poll(fds, 1 + COMM_MAX_PENDING, 200);
        for (int i = 0; i < COMM_MAX_PENDING; i++)
            if (pending[i].fd >= 0) num_connected += comm_admit_pending(c, &pending[i], fds[1 + i].revents);
        comm_check_connected(c);
        int fd = fds[0].revents ? accept4(s->listener, NULL, NULL, SOCK_CLOEXEC) : -1;
        if (fd >= 0) {
            comm_configure_socket(fd);
            pending[free_slot].fd = fd;
            pending[free_slot].last_received = now_seconds();
        }
    }
    for (int i = 0; i < COMM_MAX_PENDING; i++) comm_peer_close(&pending[i]);
    s->num_peers = c->ranks;
    for (int r = 1; r < c->ranks; r++) {
        if (comm_send(s, &s->peers[r], COMM_WELCOME, NULL, 0))
            comm_die(c, "rank %d is gone: its process ended during startup; see its output", r);
        s->peers[r].last_received = now_seconds();
    }
    close(s->listener);
    s->listener = -1;
}

// Connects to rank 0 at `a`, or at the address in `folder`, unless NULL.
static void comm_connect_rank0(Comm *c, CommAddress *a, const char *folder) {
    CommPeer *p = &c->state->peers[0];
    char host[64], msg[256] = "rank 0 has not written its address";
    double end = now_seconds() + COMM_RENDEZVOUS_SECONDS;
    comm_host_id(host);
    while (p->fd < 0) {
        if (now_seconds() > end)
            die("no connection to rank 0 at %s within %g seconds: %s; check that rank 0 was started there",
                c->state->master, (double)COMM_RENDEZVOUS_SECONDS, msg);
        if (!folder || comm_read_address(folder, a)) {
            char names[sizeof a->names], *next = NULL;
            int same_host = strncmp(a->host, host, sizeof a->host) == 0;
            snprintf(names, sizeof names, "%s", same_host ? "127.0.0.1" : a->names);
            for (char *name = strtok_r(names, " ", &next); name && p->fd < 0;
                 name = strtok_r(NULL, " ", &next))
                p->fd = comm_connect(name, a->port, 5, msg);
        }
        if (p->fd < 0) comm_pause();
    }
    comm_configure_socket(p->fd);
    p->last_received = now_seconds();
}

// Sends this rank to rank 0, and waits until rank 0 answers: then all ranks are connected.
static void comm_await_welcome(Comm *c) {
    CommState *s = c->state;
    CommPeer *p = &s->peers[0];
    CommHello hello = {c->rank, c->ranks};
    // rank 0 may start later than this rank, and then waits COMM_RENDEZVOUS_SECONDS for the other ranks
    double end = now_seconds() + COMM_RENDEZVOUS_SECONDS + COMM_RENDEZVOUS_SECONDS / 10.0;
    int failed = comm_send(s, p, COMM_HELLO, &hello, sizeof hello);
    for (;;) {
        struct pollfd wait = {p->fd, POLLIN, 0};
        const CommHeader *header;
        int invalid = 0;
        failed |= poll(&wait, 1, 200) > 0 && comm_receive(p);
        while ((header = comm_next_message(p, &invalid)) != NULL && header->type != COMM_WELCOME) {
            if (header->type == COMM_FAIL)
                comm_die(c, "%.*s", (int)header->bytes, p->buffer + sizeof *header);
            comm_pop_message(p);
        }
        if (header) break;
        if (invalid)
            die("the process that listens at %s is not rank 0: choose another MASTER_PORT", s->master);
        if (failed)
            comm_die(c, "rank 0 at %s is gone: its process ended during startup; see its output", s->master);
        if (now_seconds() > end)
            comm_die(c, "rank 0 at %s does not answer: check its process, or choose another MASTER_PORT",
                     s->master);
    }
    comm_pop_message(p);
}

// ----------------------------------------------------------------------------
// MPI

#ifdef USE_MPI
// Dies with MPI's error text unless `call` succeeds. A call also fails if another process ended. The macro
// sleeps three seconds first, so that the monitor thread can report that process.
#define mpi_check(call)                                                                                      \
    do {                                                                                                     \
        int error_ = (call);                                                                                 \
        if (error_ != MPI_SUCCESS) {                                                                         \
            char text_[MPI_MAX_ERROR_STRING] = "";                                                           \
            int length_;                                                                                     \
            MPI_Error_string(error_, text_, &length_);                                                       \
            sleep(3);                                                                                        \
            die("%.60s...: %s; start all ranks from the same build and check the network", #call, text_);    \
        }                                                                                                    \
    } while (0)

// Starts MPI, which sets c->rank. Rank 0 opens its listener; all ranks get its address.
static void comm_start_mpi(Comm *c, const char *ranks_variable, CommAddress *a) {
    CommState *s = c->state;
    int provided, ranks;
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS)
        die("MPI_Init failed: check the MPI installation, or start with MASTER_ADDR set");
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    mpi_check(MPI_Comm_size(MPI_COMM_WORLD, &ranks));
    if (ranks != c->ranks)
        die("%s %d: MPI reports %d ranks; build this program with the MPI that mpirun belongs to",
            ranks_variable, c->ranks, ranks);
    mpi_check(MPI_Comm_rank(MPI_COMM_WORLD, &c->rank));
    if (c->rank == 0) {
        s->listener = comm_listen(0, "MASTER_PORT");
        comm_local_address(a, s->listener);
    }
    mpi_check(MPI_Bcast(a, sizeof *a, MPI_BYTE, 0, MPI_COMM_WORLD));
    s->use_mpi = 1;
}

// Sets c->local_rank.
static void comm_mpi_local_rank(Comm *c) {
    MPI_Comm host;
    mpi_check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, c->rank, MPI_INFO_NULL, &host));
    mpi_check(MPI_Comm_rank(host, &c->local_rank));
    mpi_check(MPI_Comm_free(&host));
}

// Waits for all ranks, and dies if their numbers of bytes differ: MPI would hang or corrupt data.
static void comm_mpi_barrier(Comm *c, size_t bytes) {
    size_t *all = (size_t *)xcalloc((size_t)c->ranks, sizeof *all);
    mpi_check(MPI_Allgather(&bytes, sizeof bytes, MPI_BYTE, all, sizeof bytes, MPI_BYTE, MPI_COMM_WORLD));
    for (int r = 1; r < c->ranks; r++)
        if (all[r] != all[0]) comm_die_out_of_step(c, r, all[r], all[0]);
    free(all);
}
#endif

// ----------------------------------------------------------------------------
// Collectives

// Waits for a COMM_DATA message of p. Returns its payload, which the caller frees, and its size in *bytes.
static char *comm_wait_data(CommState *s, CommPeer *p, size_t *bytes) {
    pthread_mutex_lock(&s->lock);
    while (!p->data_ready) pthread_cond_wait(&s->data_arrived, &s->lock);
    char *data = p->data;
    *bytes = p->data_bytes;
    p->data = NULL, p->data_ready = 0;
    pthread_mutex_unlock(&s->lock);
    return data;
}

// comm_allgather over TCP: rank 0 receives every rank's data and sends all of it to each.
static void comm_allgather_tcp(Comm *c, const void *send, size_t bytes, void *recv) {
    CommState *s = c->state;
    size_t received;
    if (c->rank > 0) {
        if (comm_send(s, &s->peers[0], COMM_DATA, send, bytes)) comm_die_unreachable(c, 0);
        char *data = comm_wait_data(s, &s->peers[0], &received);
        if (received != bytes * (size_t)c->ranks)
            comm_die_out_of_step(c, 0, received, bytes * (size_t)c->ranks);
        memcpy(recv, data, received);
        free(data);
        return;
    }
    memcpy(recv, send, bytes);
    for (int r = 1; r < c->ranks; r++) {
        char *data = comm_wait_data(s, &s->peers[r], &received);
        if (received != bytes) comm_die_out_of_step(c, r, received, bytes);
        memcpy((char *)recv + (size_t)r * bytes, data, bytes);
        free(data);
    }
    for (int r = 1; r < c->ranks; r++)
        if (comm_send(s, &s->peers[r], COMM_DATA, recv, bytes * (size_t)c->ranks)) comm_die_unreachable(c, r);
}

void comm_allgather(Comm *c, const void *send, size_t bytes, void *recv) {
    if (c->ranks == 1) {
        memcpy(recv, send, bytes);
        return;
    }
#ifdef USE_MPI
    if (c->state->use_mpi) {
        comm_mpi_barrier(c, bytes);
        mpi_check(MPI_Allgather(send, (int)bytes, MPI_BYTE, recv, (int)bytes, MPI_BYTE, MPI_COMM_WORLD));
        return;
    }
#endif
    comm_allgather_tcp(c, send, bytes, recv);
}

void comm_broadcast(Comm *c, void *data, size_t bytes) {
    if (c->ranks == 1) return;
#ifdef USE_MPI
    if (c->state->use_mpi) {
        comm_mpi_barrier(c, bytes);
        mpi_check(MPI_Bcast(data, (int)bytes, MPI_BYTE, 0, MPI_COMM_WORLD));
        return;
    }
#endif
    char *all = (char *)xmalloc((size_t)c->ranks * bytes);
    comm_allgather_tcp(c, data, bytes, all);
    memcpy(data, all, bytes);
    free(all);
}

void comm_barrier(Comm *c) {
    if (c->ranks == 1) return;
#ifdef USE_MPI
    if (c->state->use_mpi) {
        comm_mpi_barrier(c, 1);
        return;
    }
#endif
    char *all = (char *)xmalloc((size_t)c->ranks);
    comm_allgather_tcp(c, "", 1, all);
    free(all);
}

// ----------------------------------------------------------------------------
// Start and end

// Sets c->local_rank: the number of lower ranks on this host.
static void comm_find_local_rank(Comm *c) {
#ifdef USE_MPI
    if (c->state->use_mpi) {
        comm_mpi_local_rank(c);
        return;
    }
#endif
    typedef char HostId[64];
    HostId host, *hosts = (HostId *)xcalloc((size_t)c->ranks, sizeof *hosts);
    comm_host_id(host);
    comm_allgather(c, host, sizeof host, hosts);
    for (int r = 0; r < c->rank; r++) c->local_rank += memcmp(hosts[r], host, sizeof host) == 0;
    free(hosts);
}

// Finds rank 0's address: writes it to *a, or returns the folder from which a rank above 0 reads it, else
// NULL. Sets c->rank and s->master; rank 0 opens its listener.
static const char *comm_find_rank0(Comm *c, const CommLauncher *l, CommAddress *a) {
    CommState *s = c->state;
    const char *folder = getenv("MASTER_DIR");
    int mpi = 0;
#ifdef USE_MPI
    mpi = strcmp(l->launcher, "mpirun") == 0 && !folder && !getenv("MASTER_ADDR");
    if (mpi) comm_start_mpi(c, l->ranks, a);
#endif
    if (!mpi && !folder) comm_master_address(a, l);
    snprintf(die_prefix, sizeof die_prefix, "rank %d: ", c->rank);
    if (c->rank == 0 && !mpi) s->listener = comm_listen(folder ? 0 : a->port, "MASTER_PORT");
    if (c->rank == 0 && folder) {
        comm_local_address(a, s->listener);
        comm_write_address(folder, a);
    }
    if (folder && c->rank > 0)
        snprintf(s->master, sizeof s->master, "the address in MASTER_DIR %.900s", folder);
    else
        snprintf(s->master, sizeof s->master, "%.*s port %d", (int)strcspn(a->names, " "), a->names, a->port);
    return folder;
}

void comm_start(Comm *c) {
    const CommLauncher *l = comm_find_launcher();
    CommAddress address;
    memset(c, 0, sizeof *c);
    c->ranks = 1;
    if (!l) return;
    c->ranks = (int)parse_int(l->ranks, getenv(l->ranks), 1, 1 << 20);
    c->rank = (int)parse_int(l->rank, getenv(l->rank), 0, c->ranks - 1);
    CommState *s = c->state = (CommState *)xcalloc(1, sizeof *s);
    s->listener = -1;
    const char *folder = comm_find_rank0(c, l, &address);

    pthread_mutex_init(&s->lock, NULL);
    pthread_mutex_init(&s->send_lock, NULL);
    pthread_cond_init(&s->data_arrived, NULL);
    s->num_peers = c->rank == 0 ? c->ranks + COMM_MAX_PENDING : 1;
    s->peers = (CommPeer *)xcalloc((size_t)s->num_peers, sizeof *s->peers);
    for (int i = 0; i < s->num_peers; i++) s->peers[i].fd = -1;
    comm_global = c;
    die_hook = comm_broadcast_failure;
    if (c->rank == 0) {
        comm_accept_ranks(c);
    } else {
        comm_connect_rank0(c, &address, folder);
        comm_await_welcome(c);
    }
    if (c->rank == 0 && folder) {
        char path[PATH_BYTES];
        comm_address_path(path, folder);
        unlink(path);
    }
    int error = pthread_create(&s->thread, NULL, comm_monitor, c);
    if (error) die("cannot start a thread: %s; check ulimit -u", strerror(error));
    comm_find_local_rank(c);
}

void comm_end(Comm *c) {
    CommState *s = c->state;
    if (!s) return;
    comm_barrier(c);
    for (int i = 0; i < s->num_peers; i++)
        if (s->peers[i].fd >= 0) comm_send(s, &s->peers[i], COMM_BYE, NULL, 0);
    __atomic_store_n(&s->finalizing, 1, __ATOMIC_SEQ_CST);
    pthread_join(s->thread, NULL);
    comm_global = NULL;
    die_hook = NULL;
#ifdef USE_MPI
    if (s->use_mpi) mpi_check(MPI_Finalize());
#endif
    for (int i = 0; i < s->num_peers; i++) comm_peer_close(&s->peers[i]);
    free(s->peers), free(s);
    memset(c, 0, sizeof *c);
}
