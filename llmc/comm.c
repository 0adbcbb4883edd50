// comm.c: implements comm.h. Rank 0 listens; every other rank connects to it, so that the connections form a
// star. Each rank's monitor thread reads them all: messages of the collectives (without MPI), heartbeats,
// failures, and the end of a run.
//
// A connection counts as a rank once both ends have proved that they know the job's secret:
//   rank 0 -> rank   COMM_CHALLENGE  nonce of rank 0
//   rank -> rank 0   COMM_HELLO      rank, world size, nonce of the rank, proof of the rank
//   rank 0 -> rank   COMM_ACCEPT     proof of rank 0
// A proof is the HMAC of both nonces, the rank and the world size. Before that, neither end obeys the other:
// rank 0 reads one COMM_HELLO and closes the connection if it is wrong. The rank closes it and tries again.
#include "comm.h"
#include "hmac.h"
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/random.h>
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
#define COMM_IDENTIFY_SECONDS 10   // from a connection's start until it has sent a correct COMM_HELLO
#endif
#ifndef COMM_MPI_BYTES
#define COMM_MPI_BYTES (1 << 30) // most bytes of one call of MPI, which counts with int
#endif
#define COMM_PORT 29500          // default of MASTER_PORT, as torchrun's
#define COMM_MAX_PENDING 256     // accepted connections that have not yet identified themselves
#define COMM_PENDING_SECONDS 0.1 // a pending peer keeps its place at least so long when all places are taken
#define COMM_MAX_NOTES 8         // lines that rank 0 prints about dropped connections
#define COMM_MAGIC 0x32434D4Du
#define COMM_NONCE_BYTES 16
#define COMM_SECRET_BYTES 256             // limit of the secret's text, terminating 0 included
#define COMM_MIN_SECRET 16                // least number of characters of MASTER_SECRET
#define COMM_MAX_DATA ((uint64_t)1 << 40) // limit of a COMM_DATA message, in bytes

typedef enum {
    COMM_CHALLENGE,
    COMM_HELLO,
    COMM_ACCEPT,
    COMM_WELCOME, // all ranks are connected
    COMM_DATA,
    COMM_HEARTBEAT,
    COMM_FAIL, // the text of a failure
    COMM_BYE
} CommMessageType;
typedef struct {
    uint32_t magic, type;
    uint64_t bytes; // of the payload, which follows the header
} CommHeader;
typedef struct {
    int32_t rank, ranks;
    unsigned char nonce[COMM_NONCE_BYTES], proof[SHA256_BYTES];
} CommHello;
#define COMM_HELLO_BYTES (sizeof(CommHeader) + sizeof(CommHello))

typedef struct {
    int fd;                                // socket, -1: not connected
    double opened;                         // now_seconds() when rank 0 accepted the connection
    unsigned char nonce[COMM_NONCE_BYTES]; // that rank 0 sent in COMM_CHALLENGE
    int finished;                          // COMM_BYE has arrived
    double last_received;                  // now_seconds() of the last received bytes
    char *buffer;                          // [capacity], received bytes that are not yet handled
    size_t received, capacity;             // bytes of `buffer` in use, and allocated
    char *data; // [data_bytes], payload of a COMM_DATA message, until comm_wait_data takes it
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
    char secret[COMM_SECRET_BYTES];     // of this job; "": none, then all connections stay on this host
    int num_dropped;                    // rank 0: connections that were dropped as wrong
    int num_notes;                      // rank 0: lines printed about them
    char last_note[352];                // rank 0: the last one's host and the reason
    char last_drop[COMM_TEXT_BYTES];    // rank 0: the last one's address and the reason
} CommState;

// The Comm through which die() reports a failure.
static Comm *comm_global = NULL;

// ----------------------------------------------------------------------------
// Launchers

const CommLauncher *comm_find_launcher(void) {
    static const CommLauncher launchers[] = {
        // innermost first: srun or mpirun can start torchrun
        {"RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "torchrun or gpus_host.sh"},
        {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "mpirun"},
        {"PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", "mpirun"},
        // only a job step has both, not a batch script
        {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "srun"},
    };
    for (size_t i = 0; i < sizeof launchers / sizeof launchers[0]; i++) {
        const CommLauncher *l = &launchers[i];
        if (getenv(l->rank) && getenv(l->ranks))
            return parse_int(l->ranks, getenv(l->ranks), 1, 1 << 20) > 1 ? l : NULL;
    }
    return NULL;
}

// Returns whether the launcher says that all ranks run on this host. Slurm's "4(x2)" says 4 on each of 2
// hosts.
static int comm_on_one_host(const CommLauncher *l, int ranks) {
    const char *local_ranks = getenv(l->local_ranks);
    return local_ranks && strtol(local_ranks, NULL, 10) == ranks;
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

// Sends one message without s->send_lock. Returns as comm_send_all.
static int comm_send_message(int fd, CommMessageType type, const void *data, size_t bytes) {
    CommHeader header = {COMM_MAGIC, (uint32_t)type, bytes};
    return comm_send_all(fd, &header, sizeof header) || comm_send_all(fd, data, bytes) ? -1 : 0;
}

// Sends one message. Returns as comm_send_all.
static int comm_send(CommState *s, CommPeer *peer, CommMessageType type, const void *data, size_t bytes) {
    pthread_mutex_lock(&s->send_lock);
    int error = comm_send_message(peer->fd, type, data, bytes);
    pthread_mutex_unlock(&s->send_lock);
    return error;
}

// Appends the bytes that have arrived to p->buffer, without waiting, up to `limit` bytes in all. Returns 0,
// or -1 when the connection is closed.
static int comm_receive(CommPeer *p, size_t limit) {
    if (p->capacity - p->received < 65536 && p->capacity < limit) {
        size_t capacity = p->received + 65536 < limit ? p->received + 65536 : limit;
        char *more = (char *)realloc(p->buffer, capacity);
        if (!more) die("out of memory: %zu bytes for a message; free host memory", capacity);
        p->buffer = more, p->capacity = capacity;
    }
    if (p->received >= p->capacity) return 0;
    ssize_t n = recv(p->fd, p->buffer + p->received, p->capacity - p->received, MSG_DONTWAIT);
    if (n < 0 && (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK)) return 0;
    if (n <= 0) return -1;
    p->received += (size_t)n;
    p->last_received = now_seconds();
    return 0;
}

// Returns whether a message of this program can begin with the header.
static int comm_is_valid(const CommHeader *h) {
    if (h->magic != COMM_MAGIC) return 0;
    switch (h->type) {
    case COMM_CHALLENGE:
        return h->bytes == COMM_NONCE_BYTES;
    case COMM_HELLO:
        return h->bytes == sizeof(CommHello);
    case COMM_ACCEPT:
        return h->bytes == SHA256_BYTES;
    case COMM_DATA:
        return h->bytes <= COMM_MAX_DATA;
    case COMM_FAIL:
        return h->bytes < COMM_TEXT_BYTES;
    case COMM_WELCOME:
    case COMM_HEARTBEAT:
    case COMM_BYE:
        return h->bytes == 0;
    default:
        return 0;
    }
}

// Returns the first message of p->buffer, or NULL while it is incomplete. *invalid: 1 when the bytes are not
// a message of this program.
static const CommHeader *comm_next_message(const CommPeer *p, int *invalid) {
    const CommHeader *header = (const CommHeader *)p->buffer;
    *invalid = 0;
    if (p->received < sizeof *header) return NULL;
    *invalid = !comm_is_valid(header);
    return !*invalid && p->received - sizeof *header >= header->bytes ? header : NULL;
}

// Copies a peer's text [bytes] to `out`. A byte that is not printable ASCII becomes \xNN, because it could
// control a terminal or forge a line of a log.
static const char *comm_escape(char out[COMM_TEXT_BYTES], const char *text, uint64_t bytes) {
    size_t n = 0;
    for (uint64_t i = 0; i < bytes && n + 5 < COMM_TEXT_BYTES; i++) {
        unsigned char byte = (unsigned char)text[i];
        if (byte >= 0x20 && byte < 0x7f)
            out[n++] = (char)byte;
        else
            n += (size_t)snprintf(out + n, 5, "\\x%02x", byte);
    }
    out[n] = 0;
    return out;
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

static int comm_poll_pending(Comm *c, const char *failure, int timeout_ms);

// die() calls this last. Sends the failure to all peers, waits up to 3 s until they have read it, and ends
// the process by _exit: the handlers of exit() would wait for kernels that wait for other GPUs. During the
// rendezvous, rank 0 also tells the ranks that identify themselves in the next second.
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
    __atomic_store_n(&s->failing, 1, __ATOMIC_SEQ_CST);
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += 2;
    pthread_mutex_timedlock(&s->send_lock, &deadline); // the holder may be stuck in send
    int num_ranks = c->rank == 0 ? c->ranks : 1;
    for (int i = 0; i < num_ranks; i++) {
        if (s->peers[i].fd < 0) continue;
        comm_send_message(s->peers[i].fd, COMM_FAIL, text, strlen(text));
        shutdown(s->peers[i].fd, SHUT_WR);
    }
    while (s->listener >= 0 && now_seconds() < drain_end - 2) comm_poll_pending(c, text, 50);
    for (int i = 0; i < num_ranks; i++) { // closing a socket with unread bytes would discard the text
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
        char escaped[COMM_TEXT_BYTES];
        invalid = header->type < COMM_DATA || (header->type == COMM_DATA && p->data_ready);
        if (invalid) break;
        if (header->type == COMM_FAIL) comm_die(c, "%s", comm_escape(escaped, text, header->bytes));
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
        for (int i = 0; i < s->num_peers && !__atomic_load_n(&s->failing, __ATOMIC_SEQ_CST); i++) {
            CommPeer *p = &s->peers[i];
            if (fds[i].fd < 0) continue;
            int closed = fds[i].revents ? comm_receive(p, SIZE_MAX) : 0;
            comm_handle_messages(c, p, i);
            if (finalizing && closed) p->finished = 1;
            if (p->finished) continue;
            if (closed) comm_die(c, "rank %d is gone: its process ended without a message; see its logs", i);
            if (now - p->last_received > COMM_TIMEOUT_SECONDS)
                comm_die(c, "rank %d is gone: no heartbeat for %g seconds; check its process and network", i,
                         now - p->last_received);
            if (heartbeat_due && !finalizing && comm_send(s, p, COMM_HEARTBEAT, NULL, 0) &&
                comm_receive(p, SIZE_MAX))
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

// The address that rank 0 listens on, and the job's secret.
typedef struct {
    char host[64];   // comm_host_id of rank 0, or empty: unknown
    char names[768]; // host names or IP addresses of rank 0, separated by spaces
    char secret[COMM_SECRET_BYTES];
    int port;
} CommAddress;

static int comm_is_loopback(const struct sockaddr *a) {
    const struct in6_addr *address6 = &((const struct sockaddr_in6 *)a)->sin6_addr;
    if (a->sa_family == AF_INET) return ntohl(((const struct sockaddr_in *)a)->sin_addr.s_addr) >> 24 == 127;
    return a->sa_family == AF_INET6 && (IN6_IS_ADDR_LOOPBACK(address6) ||
                                        (IN6_IS_ADDR_V4MAPPED(address6) && address6->s6_addr[12] == 127));
}

// Writes an address and its port.
static void comm_name_address(char name[80], const struct sockaddr *a, socklen_t size) {
    char host[64] = "?", port[8] = "?";
    getnameinfo(a, size, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV);
    snprintf(name, 80, "%s port %s", host, port);
}

// Dies if a job without a secret would leave this host by the address.
static void comm_check_secret(const CommState *s, const struct sockaddr *a, socklen_t size) {
    char name[80];
    if (s->secret[0] || comm_is_loopback(a)) return;
    comm_name_address(name, a, size);
    die("rank 0 at %s: several hosts need a secret: set MASTER_SECRET to the same random text for all "
        "processes, or MASTER_DIR to a folder that all see; on one host set MASTER_ADDR=127.0.0.1",
        name);
}

// Opens a listening socket. Returns -1 with errno when the address is taken, or is not one of this host.
static int comm_listen_address(const struct sockaddr *a, socklen_t size) {
    int on = 1, off = 0, fd = socket(a->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (a->sa_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, a, size) == 0 && listen(fd, 1024) == 0) return fd;
    int reason = errno;
    close(fd);
    errno = reason;
    return -1;
}

// Opens rank 0's listening socket on `port` (0: any free port) of the interface that has the address `name`,
// IPv4 before IPv6. Listens on all interfaces if `name` is NULL, or is no address of an interface: the host
// is behind NAT, its own name means 127.0.1.1 on it, or has no address yet. That needs a secret.
static int comm_listen(const CommState *s, const char *name, int port) {
    struct addrinfo hints, *found = NULL;
    struct sockaddr_in6 any6;
    struct sockaddr_in any4;
    int fd = -1, reason = EADDRNOTAVAIL;
    int loopback_name =
        name && (strcmp(name, "localhost") == 0 || strcmp(name, "::1") == 0 || strncmp(name, "127.", 4) == 0);
    memset(&hints, 0, sizeof hints), memset(&any6, 0, sizeof any6), memset(&any4, 0, sizeof any4);
    hints.ai_socktype = SOCK_STREAM;
    int error = name ? getaddrinfo(name, NULL, &hints, &found) : 0;
    if (error && !s->secret[0])
        die("MASTER_ADDR %s: %s; set it to the host of rank 0", name, gai_strerror(error));
    for (int i = 0; i < 2; i++) {
        for (struct addrinfo *a = found; a && fd < 0; a = a->ai_next) {
            if (a->ai_family != (i == 0 ? AF_INET : AF_INET6)) continue;
            if (s->secret[0] && comm_is_loopback(a->ai_addr) && !loopback_name) continue;
            if (i == 0)
                ((struct sockaddr_in *)a->ai_addr)->sin_port = htons((uint16_t)port);
            else
                ((struct sockaddr_in6 *)a->ai_addr)->sin6_port = htons((uint16_t)port);
            comm_check_secret(s, a->ai_addr, a->ai_addrlen);
            fd = comm_listen_address(a->ai_addr, a->ai_addrlen);
            if (fd < 0) reason = errno;
        }
    }
    if (found) freeaddrinfo(found);
    if (fd < 0 && reason == EADDRNOTAVAIL && s->secret[0]) {
        any6.sin6_family = AF_INET6, any6.sin6_addr = in6addr_any, any6.sin6_port = htons((uint16_t)port);
        any4.sin_family = AF_INET, any4.sin_addr.s_addr = htonl(INADDR_ANY), any4.sin_port = any6.sin6_port;
        fd = comm_listen_address((struct sockaddr *)&any6, sizeof any6);
        if (fd < 0 && errno != EADDRINUSE && errno != EACCES) // the host has no IPv6
            fd = comm_listen_address((struct sockaddr *)&any4, sizeof any4);
        reason = errno;
    }
    if (fd < 0)
        die("cannot listen on %s%sport %d: %s; choose a free port with MASTER_PORT, "
            "or an address of this host with MASTER_ADDR",
            name ? name : "", name ? " " : "", port, strerror(reason));
    return fd;
}

// Writes the IPv4 address that fd listens on, or all of this host, loopback excepted; and the port.
static void comm_local_address(CommAddress *a, int fd) {
    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    memset(a, 0, sizeof *a);
    comm_host_id(a->host);
    getsockname(fd, (struct sockaddr *)&bound, &size);
    a->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                : ((struct sockaddr_in *)&bound)->sin_port);
    const struct in6_addr *bound6 = &((struct sockaddr_in6 *)&bound)->sin6_addr;
    if (bound.ss_family == AF_INET6 ? !IN6_IS_ADDR_UNSPECIFIED(bound6)
                                    : ((struct sockaddr_in *)&bound)->sin_addr.s_addr != htonl(INADDR_ANY)) {
        getnameinfo((struct sockaddr *)&bound, size, a->names, sizeof a->names, NULL, 0, NI_NUMERICHOST);
        return;
    }
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
// in msg [256]. Dies if the address needs a secret and the job has none.
static int comm_connect(const CommState *s, const char *name, int port, double seconds, char *msg) {
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
        comm_check_secret(s, a->ai_addr, a->ai_addrlen);
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

// Rank 0 writes its address and, unless MASTER_SECRET is set, the job's secret to a file in the folder, which
// only this user can read. It never opens a file that another user has put there.
static void comm_write_address(const char *folder, const CommAddress *a) {
    char path[PATH_BYTES], tmp[PATH_BYTES + 4], line[2048];
    make_dirs(folder);
    comm_address_path(path, folder);
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    int n = snprintf(line, sizeof line, "%s %d %s %s\n", a->host, a->port,
                     getenv("MASTER_SECRET") ? "-" : a->secret, a->names);
    unlink(tmp); // of an earlier job
    int fd = open(tmp, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, line, (size_t)n) != n || fsync(fd) != 0 || close(fd) != 0 ||
        rename(tmp, path) != 0) {
        int reason = errno;
        if (fd >= 0) unlink(tmp);
        die("MASTER_DIR %s: cannot write rank0.address: %s; choose a folder of this user", folder,
            strerror(reason));
    }
}

// The other ranks read that file. Returns 1, or 0 while it does not exist. Dies if another user may have
// written the file, or may have read the secret.
static int comm_read_address(const char *folder, CommAddress *a) {
    char path[PATH_BYTES], line[2048];
    struct stat st;
    comm_address_path(path, folder);
    memset(a, 0, sizeof *a);
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 && errno != ELOOP && errno != EACCES) return 0;
    if (fd < 0 || fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) ||
        (!getenv("MASTER_SECRET") && (st.st_uid != geteuid() || (st.st_mode & 077))))
        die("MASTER_DIR %s: rank0.address is not a file that this user alone can read and write; "
            "choose another folder, or set MASTER_SECRET",
            folder);
    ssize_t n = read(fd, line, sizeof line - 1);
    close(fd);
    line[n > 0 ? n : 0] = 0;
    int fields = sscanf(line, "%63s %d %255s %767[^\n]", a->host, &a->port, a->secret, a->names);
    return fields == 4 && a->port > 0 && a->port < 65536;
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
    char missing[256] = "", dropped[COMM_TEXT_BYTES] = "";
    int num_missing = 0, num_dropped = c->state->num_dropped;
    for (int r = 1; r < c->ranks; r++) {
        size_t length = strlen(missing);
        if (c->state->peers[r].fd < 0 && ++num_missing <= 8)
            snprintf(missing + length, sizeof missing - length, "%s%d", length ? ", " : "", r);
    }
    if (num_dropped > 0)
        snprintf(dropped, sizeof dropped, "; %d connection%s dropped, the last one from %.800s", num_dropped,
                 num_dropped > 1 ? "s were" : " was", c->state->last_drop);
    comm_die(c,
             "rank %s%s of %d did not connect within %g seconds: check that all ranks "
             "were started and can reach %.400s%s",
             missing, num_missing > 8 ? ", ..." : "", c->ranks, (double)COMM_RENDEZVOUS_SECONDS,
             c->state->master, dropped);
}

// Writes the proof that `prover` ("rank" or "rank 0") knows the secret. nonce: that of COMM_CHALLENGE.
static void comm_prove(const CommState *s, const char *prover, const unsigned char *nonce, const CommHello *h,
                       unsigned char proof[SHA256_BYTES]) {
    unsigned char text[8 + 2 * COMM_NONCE_BYTES + 8] = {0};
    memcpy(text, prover, strlen(prover));
    memcpy(text + 8, nonce, COMM_NONCE_BYTES);
    memcpy(text + 8 + COMM_NONCE_BYTES, h->nonce, COMM_NONCE_BYTES);
    memcpy(text + 8 + 2 * COMM_NONCE_BYTES, &h->rank, 4);
    memcpy(text + 12 + 2 * COMM_NONCE_BYTES, &h->ranks, 4);
    hmac_sha256(s->secret, strlen(s->secret), text, sizeof text, proof);
}

// Compares two proofs in a time that does not depend on them.
static int comm_same_proof(const unsigned char *a, const unsigned char *b) {
    int difference = 0;
    for (int i = 0; i < SHA256_BYTES; i++) difference |= a[i] ^ b[i];
    return difference == 0;
}

static void comm_random(void *data, size_t bytes) {
    if (getrandom(data, bytes, 0) != (ssize_t)bytes) die("getrandom: %s; check the kernel", strerror(errno));
}

// Writes a secret of 128 random bits.
static void comm_make_secret(char *secret) {
    unsigned char bytes[16];
    comm_random(bytes, sizeof bytes);
    for (int i = 0; i < 16; i++) snprintf(secret + 2 * i, 3, "%02x", bytes[i]);
}

// Rank 0 drops a wrong peer: names it and the reason, in printf's format, on stderr and closes the
// connection.
__attribute__((format(printf, 3, 4))) static void comm_drop(CommState *s, CommPeer *p, const char *format,
                                                            ...) {
    char name[80] = "?", reason[256], note[sizeof s->last_note];
    struct sockaddr_storage address;
    socklen_t size = sizeof address;
    va_list args;
    va_start(args, format);
    vsnprintf(reason, sizeof reason, format, args);
    va_end(args);
    if (getpeername(p->fd, (struct sockaddr *)&address, &size) == 0)
        comm_name_address(name, (struct sockaddr *)&address, size);
    s->num_dropped++;
    snprintf(s->last_drop, sizeof s->last_drop, "%s: %s", name, reason);
    // a process that tries again and again from the same host gets one line
    snprintf(note, sizeof note, "%.*s: %s", (int)strcspn(name, " "), name, reason);
    if (strcmp(note, s->last_note) != 0 && s->num_notes < COMM_MAX_NOTES && !s->failing)
        fprintf(stderr, "note: %sdropped the connection from %s%s\n", die_prefix, s->last_drop,
                ++s->num_notes == COMM_MAX_NOTES ? "; further ones are not shown" : "");
    memcpy(s->last_note, note, sizeof note);
    comm_peer_close(p);
}

// Reads from the pending peer p; ready: bytes have arrived. Returns 1 once it has identified itself, and
// moves it to peers[rank]. Drops it if it is wrong or slow. failure: NULL, or the text that the rank gets
// instead.
static int comm_identify_pending(Comm *c, CommPeer *p, int ready, const char *failure) {
    CommState *s = c->state;
    CommHello h;
    unsigned char proof[SHA256_BYTES];
    char text[COMM_TEXT_BYTES] = "";
    int invalid = 0, closed = ready ? comm_receive(p, COMM_HELLO_BYTES) : 0;
    const CommHeader *header = comm_next_message(p, &invalid);
    if (p->received >= sizeof *header) invalid |= ((const CommHeader *)p->buffer)->type != COMM_HELLO;
    if (invalid) {
        comm_drop(s, p, "it is no rank of this program");
        return 0;
    }
    if (!header) {
        if (closed)
            comm_peer_close(p);
        else if (now_seconds() - p->opened > COMM_IDENTIFY_SECONDS)
            comm_drop(s, p, "it did not identify itself within %g seconds", (double)COMM_IDENTIFY_SECONDS);
        return 0;
    }
    memcpy(&h, p->buffer + sizeof *header, sizeof h);
    comm_pop_message(p);
    comm_prove(s, "rank", p->nonce, &h, proof);
    if (!comm_same_proof(proof, h.proof)) {
        comm_drop(s, p, "it claims rank %d with another secret; set the same MASTER_SECRET", h.rank);
        return 0;
    }
    comm_prove(s, "rank 0", p->nonce, &h, proof);
    comm_send_message(p->fd, COMM_ACCEPT, proof, sizeof proof);
    if (failure)
        snprintf(text, sizeof text, "%s", failure);
    else if (h.ranks != c->ranks)
        snprintf(text, sizeof text,
                 "rank %d was started with world size %d, rank 0 with %d: set the same world size", h.rank,
                 h.ranks, c->ranks);
    else if (h.rank < 1 || h.rank >= c->ranks || s->peers[h.rank].fd >= 0)
        snprintf(text, sizeof text,
                 "two processes were started as rank %d of %d: give each a rank of its own", h.rank,
                 c->ranks);
    if (text[0]) {
        comm_send_message(p->fd, COMM_FAIL, text, strlen(text));
        if (failure)
            comm_peer_close(p);
        else
            comm_drop(s, p, "%s", text);
        return 0;
    }
    s->peers[h.rank] = *p;
    memset(p, 0, sizeof *p);
    p->fd = -1;
    return 1;
}

// Accepts a connection as the pending peer p, and sends COMM_CHALLENGE. Returns whether there was one. Never
// dies, because comm_broadcast_failure calls it.
static int comm_accept_pending(CommState *s, CommPeer *p) {
    int fd = accept4(s->listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) return 0;
    comm_configure_socket(fd);
    p->fd = fd, p->opened = p->last_received = now_seconds();
    p->buffer = (char *)malloc(COMM_HELLO_BYTES); // comm_receive allocates no more
    p->capacity = COMM_HELLO_BYTES;
    if (!p->buffer || getrandom(p->nonce, sizeof p->nonce, 0) != (ssize_t)sizeof p->nonce ||
        comm_send_message(fd, COMM_CHALLENGE, p->nonce, sizeof p->nonce))
        comm_peer_close(p);
    return 1;
}

// One round of rank 0's rendezvous: waits for connections and for bytes of pending peers, and handles them.
// Returns how many ranks have identified themselves. failure: as in comm_identify_pending.
static int comm_poll_pending(Comm *c, const char *failure, int timeout_ms) {
    CommState *s = c->state;
    CommPeer *pending = s->peers + c->ranks;
    struct pollfd fds[1 + COMM_MAX_PENDING];
    int num_identified = 0, num_free = 0, oldest = -1;
    for (int i = 0; i < COMM_MAX_PENDING; i++) {
        fds[1 + i].fd = pending[i].fd, fds[1 + i].events = POLLIN;
        num_free += pending[i].fd < 0;
        if (pending[i].fd >= 0 && (oldest < 0 || pending[i].opened < pending[oldest].opened)) oldest = i;
    }
    // when all places are taken, a new connection gets the oldest peer's
    int may_accept = num_free > 0 || now_seconds() - pending[oldest].opened > COMM_PENDING_SECONDS;
    fds[0].fd = may_accept ? s->listener : -1, fds[0].events = POLLIN;
    if (poll(fds, 1 + COMM_MAX_PENDING, may_accept ? timeout_ms : 10) < 0) return 0;
    for (int i = 0; i < COMM_MAX_PENDING; i++)
        if (pending[i].fd >= 0)
            num_identified += comm_identify_pending(c, &pending[i], fds[1 + i].revents, failure);
    if (!may_accept || !fds[0].revents) return num_identified;
    if (num_free == 0 && pending[oldest].fd >= 0)
        comm_drop(s, &pending[oldest], "it did not identify itself, and others wait");
    for (int i = 0; i < COMM_MAX_PENDING; i++)
        if (pending[i].fd < 0 && !comm_accept_pending(s, &pending[i])) {
            int out_of_sockets = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
            if (out_of_sockets && oldest >= 0 && pending[oldest].fd >= 0)
                comm_drop(s, &pending[oldest],
                          "it did not identify itself, and this process has no more sockets");
            else if (out_of_sockets)
                comm_pause();
            break;
        }
    return num_identified;
}

// Dies if a connected rank has failed. It sends nothing else before COMM_WELCOME.
static void comm_check_connected(Comm *c) {
    for (int r = 1; r < c->ranks; r++) {
        CommPeer *p = &c->state->peers[r];
        char text[COMM_TEXT_BYTES];
        int invalid;
        if (p->fd < 0) continue;
        int closed = comm_receive(p, sizeof(CommHeader) + COMM_TEXT_BYTES);
        const CommHeader *header = comm_next_message(p, &invalid);
        if (header && header->type == COMM_FAIL)
            comm_die(c, "%s", comm_escape(text, p->buffer + sizeof *header, header->bytes));
        if (header || invalid)
            comm_die(c, "rank %d sent an invalid message; start all ranks from the same build", r);
        if (closed) comm_die(c, "rank %d is gone: its process ended during startup; see its output", r);
    }
}

// Rendezvous of rank 0: accepts connections until every rank has identified itself, then answers each.
static void comm_accept_ranks(Comm *c) {
    CommState *s = c->state;
    double end = now_seconds() + COMM_RENDEZVOUS_SECONDS;
    int num_connected = 1;
    while (num_connected < c->ranks) {
        if (now_seconds() > end) comm_die_missing(c);
        num_connected += comm_poll_pending(c, NULL, 200);
        comm_check_connected(c);
    }
    for (int i = c->ranks; i < s->num_peers; i++) comm_peer_close(&s->peers[i]);
    s->num_peers = c->ranks;
    for (int r = 1; r < c->ranks; r++) {
        if (comm_send(s, &s->peers[r], COMM_WELCOME, NULL, 0))
            comm_die(c, "rank %d is gone: its process ended during startup; see its output", r);
        s->peers[r].last_received = now_seconds();
    }
    close(s->listener);
    s->listener = -1;
}

// Reads one message of a known type and size before now_seconds() is `end`. Returns NULL, or what is wrong.
static const char *comm_read_message(int fd, CommMessageType type, void *data, size_t bytes, double end) {
    CommHeader header;
    for (size_t n = 0; n < sizeof header + bytes;) {
        struct pollfd wait = {fd, POLLIN, 0};
        int ms = (int)(1e3 * (end - now_seconds()));
        if (ms <= 0 || poll(&wait, 1, ms) == 0)
            return "it does not answer; check its process, or choose another MASTER_PORT";
        ssize_t received = n < sizeof header ? recv(fd, (char *)&header + n, sizeof header - n, MSG_DONTWAIT)
                                             : recv(fd, (char *)data + n - sizeof header,
                                                    sizeof header + bytes - n, MSG_DONTWAIT);
        if (received < 0 && (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK)) continue;
        if (received <= 0 && type == COMM_ACCEPT)
            return "it closed the connection; set the same MASTER_SECRET for all processes";
        if (received <= 0) return "it closed the connection; check its output";
        n += (size_t)received;
        if (n == sizeof header &&
            (header.magic != COMM_MAGIC || header.type != type || header.bytes != bytes))
            return "it is not rank 0 of this program; choose another MASTER_PORT";
    }
    return NULL;
}

// Proves to rank 0 that this process knows the secret, and checks that rank 0 does. Returns NULL, or what is
// wrong with the process at the other end.
static const char *comm_identify(Comm *c, int fd, double end) {
    unsigned char nonce[COMM_NONCE_BYTES], proof[SHA256_BYTES], expected[SHA256_BYTES];
    CommHello hello = {.rank = c->rank, .ranks = c->ranks};
    const char *wrong = comm_read_message(fd, COMM_CHALLENGE, nonce, sizeof nonce, end);
    if (wrong) return wrong;
    comm_random(hello.nonce, sizeof hello.nonce);
    comm_prove(c->state, "rank", nonce, &hello, hello.proof);
    comm_send_message(fd, COMM_HELLO, &hello, sizeof hello); // if it fails, so does the next line
    wrong = comm_read_message(fd, COMM_ACCEPT, proof, sizeof proof, end);
    comm_prove(c->state, "rank 0", nonce, &hello, expected);
    if (wrong || comm_same_proof(proof, expected)) return wrong;
    return "it has another secret; set the same MASTER_SECRET for all processes";
}

// Connects to rank 0 at `a`, or at the address in `folder`, unless NULL. Tries again after a connection to
// another process: the address in the folder may be that of an earlier job.
static void comm_connect_rank0(Comm *c, CommAddress *a, const char *folder) {
    CommState *s = c->state;
    CommPeer *p = &s->peers[0];
    char host[64], msg[256] = "rank 0 has not written its address";
    double end = now_seconds() + COMM_RENDEZVOUS_SECONDS;
    int noted = 0;
    comm_host_id(host);
    while (p->fd < 0) {
        if (now_seconds() > end)
            die("no connection to rank 0 at %s within %g seconds: %s; check that rank 0 was started there",
                s->master, (double)COMM_RENDEZVOUS_SECONDS, msg);
        if (!folder || comm_read_address(folder, a)) {
            char names[sizeof a->names + 16], *next = NULL;
            int same_host = strncmp(a->host, host, sizeof a->host) == 0;
            if (folder && !getenv("MASTER_SECRET")) memcpy(s->secret, a->secret, sizeof s->secret);
            snprintf(names, sizeof names, "%s%s", same_host ? "127.0.0.1 " : "", a->names);
            for (char *name = strtok_r(names, " ", &next); name && p->fd < 0;
                 name = strtok_r(NULL, " ", &next)) {
                double begin = now_seconds();
                int fd = comm_connect(s, name, a->port, 5, msg);
                if (fd < 0) continue;
                comm_configure_socket(fd);
                const char *wrong = comm_identify(c, fd, begin + COMM_RENDEZVOUS_SECONDS / 2.0);
                if (!wrong) {
                    p->fd = fd;
                    break;
                }
                close(fd);
                snprintf(msg, sizeof msg, "%s", wrong);
                if (!noted++)
                    fprintf(stderr, "note: %sno connection yet to rank 0 at %s port %d: %s\n", die_prefix,
                            name, a->port, wrong);
                comm_pause();
            }
        }
        if (p->fd < 0) comm_pause();
    }
    p->last_received = now_seconds();
}

// Waits until all ranks are connected.
static void comm_await_welcome(Comm *c) {
    CommState *s = c->state;
    CommPeer *p = &s->peers[0];
    char text[COMM_TEXT_BYTES];
    // rank 0 may start later than this rank, and then waits COMM_RENDEZVOUS_SECONDS for the other ranks
    double end = now_seconds() + COMM_RENDEZVOUS_SECONDS + COMM_RENDEZVOUS_SECONDS / 10.0;
    for (;;) {
        struct pollfd wait = {p->fd, POLLIN, 0};
        int invalid = 0, closed = poll(&wait, 1, 200) > 0 && comm_receive(p, SIZE_MAX);
        const CommHeader *header = comm_next_message(p, &invalid);
        if (header && header->type == COMM_WELCOME) break;
        if (header && header->type == COMM_FAIL)
            comm_die(c, "%s", comm_escape(text, p->buffer + sizeof *header, header->bytes));
        if (header || invalid)
            comm_die(c, "rank 0 sent an invalid message; start all ranks from the same build");
        if (closed)
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

// Starts MPI, which sets c->rank and c->local_rank. Rank 0 opens its listener; all ranks get its address and
// a secret.
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
    MPI_Comm host;
    int local_ranks;
    mpi_check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, c->rank, MPI_INFO_NULL, &host));
    mpi_check(MPI_Comm_rank(host, &c->local_rank));
    mpi_check(MPI_Comm_size(host, &local_ranks));
    mpi_check(MPI_Comm_free(&host));
    if (c->rank == 0) {
        if (!s->secret[0]) comm_make_secret(s->secret);
        s->listener = comm_listen(s, local_ranks == ranks ? "127.0.0.1" : NULL, 0);
        comm_local_address(a, s->listener);
        memcpy(a->secret, s->secret, sizeof a->secret);
    }
    mpi_check(MPI_Bcast(a, sizeof *a, MPI_BYTE, 0, MPI_COMM_WORLD));
    memcpy(s->secret, a->secret, sizeof s->secret);
    s->use_mpi = 1;
}

// Broadcasts data [bytes] of the rank `root` in parts, because MPI counts with int.
static void comm_mpi_broadcast(void *data, size_t bytes, int root) {
    for (size_t begin = 0; begin < bytes; begin += COMM_MPI_BYTES) {
        size_t part = bytes - begin < COMM_MPI_BYTES ? bytes - begin : COMM_MPI_BYTES;
        mpi_check(MPI_Bcast((char *)data + begin, (int)part, MPI_BYTE, root, MPI_COMM_WORLD));
    }
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
        if (bytes * (size_t)c->ranks <= COMM_MPI_BYTES) {
            mpi_check(MPI_Allgather(send, (int)bytes, MPI_BYTE, recv, (int)bytes, MPI_BYTE, MPI_COMM_WORLD));
            return;
        }
        memcpy((char *)recv + (size_t)c->rank * bytes, send, bytes);
        for (int r = 0; r < c->ranks; r++) comm_mpi_broadcast((char *)recv + (size_t)r * bytes, bytes, r);
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
        comm_mpi_broadcast(data, bytes, 0);
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

// Sets c->local_rank: the number of lower ranks on this host. MPI has set it already.
static void comm_find_local_rank(Comm *c) {
    if (c->state->use_mpi) return;
    typedef char HostId[64];
    HostId host, *hosts = (HostId *)xcalloc((size_t)c->ranks, sizeof *hosts);
    comm_host_id(host);
    comm_allgather(c, host, sizeof host, hosts);
    for (int r = 0; r < c->rank; r++) c->local_rank += memcmp(hosts[r], host, sizeof host) == 0;
    free(hosts);
}

// Copies MASTER_SECRET, if it is set, to s->secret.
static void comm_read_secret(CommState *s) {
    const char *secret = getenv("MASTER_SECRET");
    if (!secret) return;
    size_t length = strlen(secret);
    if (length < COMM_MIN_SECRET || length >= COMM_SECRET_BYTES)
        die("MASTER_SECRET has %zu characters: set it to %d to %d random ones, for example from openssl rand "
            "-hex 16",
            length, COMM_MIN_SECRET, COMM_SECRET_BYTES - 1);
    memcpy(s->secret, secret, length + 1);
}

// Finds rank 0's address: writes it to *a, or returns the folder from which a rank above 0 reads it, else
// NULL. Sets c->rank, s->secret and s->master; rank 0 opens its listener.
static const char *comm_find_rank0(Comm *c, const CommLauncher *l, CommAddress *a) {
    CommState *s = c->state;
    const char *folder = getenv("MASTER_DIR");
    int mpi = 0, one_host = comm_on_one_host(l, c->ranks);
    comm_read_secret(s);
#ifdef USE_MPI
    mpi = strcmp(l->launcher, "mpirun") == 0 && !folder && !getenv("MASTER_ADDR");
    if (mpi) comm_start_mpi(c, l->ranks, a);
#endif
    if (!mpi && !folder) comm_master_address(a, l);
    snprintf(die_prefix, sizeof die_prefix, "rank %d: ", c->rank);
    if (one_host && !mpi && !folder) snprintf(a->names, sizeof a->names, "127.0.0.1");
    if (c->rank == 0 && !mpi && !folder) s->listener = comm_listen(s, a->names, a->port);
    if (c->rank == 0 && folder) {
        if (!s->secret[0]) comm_make_secret(s->secret);
        s->listener = comm_listen(s, one_host ? "127.0.0.1" : getenv("MASTER_ADDR"), 0);
        comm_local_address(a, s->listener);
        memcpy(a->secret, s->secret, sizeof a->secret);
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
