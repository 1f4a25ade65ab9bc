/* A mock engine with OpenAI's API that uses very little CPU time.
 *
 *   engine [--unix PATH] [--rate EVENTS_PER_S] [--leaves FILE]
 *
 * It listens at a free port of 127.0.0.1, or at the unix socket PATH, and prints `listening PORT` (0: unix socket).
 * A POST whose body contains "stream":true gets "max_tokens" server-sent events (default 16) at the given rate, and
 * [DONE]; any other POST gets a short completion. Every event contains "t", the time at which it was sent, in
 * CLOCK_MONOTONIC nanoseconds. GET /lateness returns a histogram of how late events were sent, by powers of two of a
 * microsecond.
 *
 * A message can contain a marker `[[mock NAME MILLISECONDS]]`, which relays pass on unchanged. It delays the first
 * event by that time; and if the peer closes the connection during the response, a line with NAME and the time is
 * appended to FILE.
 */
#define _GNU_SOURCE
#include "loop.h"
#include <signal.h>
#include <sys/prctl.h>

enum { MAX_HEAD = 65536, NAME = 64, BUCKETS = 32 };

struct connection {
    struct timer timer; /* must be first: a timer pointer is cast to its connection */
    int fd;
    bool responding, writing, closed, discarding; /* discarding: ignores all further data, which cannot be parsed */
    struct buffer in, out;
    size_t out_done;
    uint64_t left;
    bool begun;
    char name[NAME];
    struct connection *next_closed;
};

static int epoll, disconnect_log = -1;
static int64_t gap_ns = SECOND / 40;
static uint64_t requests, events_sent, late[BUCKETS];
static struct connection *closed_connections;

static const char RESPONSE[] =
    "{\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"mock\",\"choices\":"
    "[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"The answer of the mock engine is always this "
    "one, whatever the question was.\"},\"finish_reason\":\"stop\"}],"
    "\"usage\":{\"prompt_tokens\":20,\"completion_tokens\":12,\"total_tokens\":32}}";
static const char STREAM_HEAD[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                                  "cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n";
static const char EVENT[] =
    "data: {\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"mock\","
    "\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"}}],\"t\":";
static const char STREAM_END[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
static const char MODELS[] =
    "{\"object\":\"list\",\"data\":["
    "{\"id\":\"code\",\"object\":\"model\",\"owned_by\":\"mock\"},{\"id\":\"math\",\"object\":\"model\",\"owned_by\":"
    "\"mock\"},{\"id\":\"medicine\",\"object\":\"model\",\"owned_by\":\"mock\"},{\"id\":\"law\",\"object\":\"model\","
    "\"owned_by\":\"mock\"},{\"id\":\"generalist\",\"object\":\"model\",\"owned_by\":\"mock\"}]}";
static const char SERVER[] =
    "{\"model_path\":\"math\",\"served_model_name\":\"math\",\"tokenizer_path\":\"\",\"is_generation\":true,"
    "\"tp_size\":1,\"dp_size\":1,\"version\":\"mock\",\"max_total_num_tokens\":1000000}";

static void poll_writable(struct connection *one, bool writing)
{
    if (one->writing == writing)
        return;
    one->writing = writing;
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | (writing ? EPOLLOUT : 0), .data.ptr = one};
    epoll_ctl(epoll, EPOLL_CTL_MOD, one->fd, &event);
}

static void log_disconnect(struct connection *one)
{
    char line[NAME + 32];
    int length = snprintf(line, sizeof line, "%s %lld\n", one->name, (long long)now_ns());
    if (disconnect_log >= 0 && write(disconnect_log, line, (size_t)length) != length)
        fail("the file of --leaves");
}

/* The connection is freed after all current events are handled, since one of them may refer to it. */
static void close_connection(struct connection *one)
{
    if (one->closed)
        return;
    if (one->responding)
        log_disconnect(one);
    one->closed = true;
    timer_clear(&one->timer);
    close(one->fd);
    one->next_closed = closed_connections;
    closed_connections = one;
}

static void flush(struct connection *one)
{
    while (one->out_done < one->out.used) {
        ssize_t sent = send(one->fd, one->out.data + one->out_done, one->out.used - one->out_done, MSG_NOSIGNAL);
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            poll_writable(one, true);
            return;
        }
        if (sent < 0) {
            close_connection(one);
            return;
        }
        one->out_done += (size_t)sent;
    }
    one->out.used = one->out_done = 0;
    poll_writable(one, false);
}

static void buffer_out(struct connection *one, const char *data, size_t length)
{
    buffer_add(&one->out, data, length);
}

static void respond(struct connection *one, const char *status, const char *type, const char *body)
{
    char head[256];
    int length = snprintf(head, sizeof head, "HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %zu\r\n\r\n", status,
                          type, strlen(body));
    buffer_out(one, head, (size_t)length);
    buffer_out(one, body, strlen(body));
    flush(one);
}

static void send_lateness(struct connection *one)
{
    char body[1024];
    int at = snprintf(body, sizeof body, "{\"requests\":%llu,\"events\":%llu,\"late\":[", (unsigned long long)requests,
                      (unsigned long long)events_sent);
    for (int i = 0; i < BUCKETS; i++)
        at += snprintf(body + at, sizeof body - (size_t)at, "%s%llu", i ? "," : "", (unsigned long long)late[i]);
    snprintf(body + at, sizeof body - (size_t)at, "]}");
    respond(one, "200 OK", "application/json", body);
}

static void handle_get(struct connection *one, const char *path, size_t length)
{
    const char *query = memchr(path, '?', length);
    if (query)
        length = (size_t)(query - path);
#define IS(text) (length == sizeof(text) - 1 && !memcmp(path, text, length))
    if (IS("/lateness"))
        send_lateness(one);
    else if (IS("/v1/models"))
        respond(one, "200 OK", "application/json", MODELS);
    else if (IS("/health") || IS("/health_generate") || IS("/ping") || IS("/liveness") || IS("/readiness"))
        respond(one, "200 OK", "application/json", "{}");
    else if (IS("/metrics"))
        respond(one, "200 OK", "text/plain; version=0.0.4", "# TYPE mock_up gauge\nmock_up 1\n");
    else if (IS("/get_server_info") || IS("/server_info") || IS("/get_model_info") || IS("/model_info") ||
             IS("/version"))
        respond(one, "200 OK", "application/json", SERVER);
    else
        respond(one, "404 Not Found", "application/json", "{\"error\":{\"message\":\"no such path\"}}");
#undef IS
}

/* The text after `"name":` in the body, or NULL. A name inside a JSON string has escaped quotes and does not match. */
static const char *field(const char *body, size_t length, const char *name)
{
    char quoted[32];
    int wanted = snprintf(quoted, sizeof quoted, "\"%s\"", name);
    const char *end_of = body + length, *at = body;
    while ((at = memmem(at, (size_t)(end_of - at), quoted, (size_t)wanted))) {
        at += wanted;
        while (at < end_of && (*at == ' ' || *at == '\n'))
            at++;
        if (at == end_of || *at != ':')
            continue;
        do
            at++;
        while (at < end_of && (*at == ' ' || *at == '\n'));
        return at < end_of ? at : NULL;
    }
    return NULL;
}

static uint64_t number_at(const char *at, const char *end_of, uint64_t fallback)
{
    if (!at || *at < '0' || *at > '9')
        return fallback;
    uint64_t value = 0;
    for (; at < end_of && *at >= '0' && *at <= '9'; at++)
        value = value * 10 + (uint64_t)(*at - '0');
    return value;
}

/* Reads the marker `[[mock NAME MILLISECONDS]]`; returns the delay. */
static uint64_t read_marker(struct connection *one, const char *body, size_t length)
{
    const char *end_of = body + length, *at = memmem(body, length, "[[mock ", 7);
    size_t used = 0;
    if (at)
        for (at += 7; at < end_of && *at > ' ' && *at != ']' && *at != '"' && used < NAME - 1; at++)
            one->name[used++] = *at;
    one->name[used] = 0;
    return at && at < end_of && *at == ' ' ? number_at(at + 1, end_of, 0) : 0;
}

static void handle_post(struct connection *one, const char *body, size_t length)
{
    const char *end_of = body + length, *stream = field(body, length, "stream");
    requests++;
    if (!stream || *stream != 't') {
        respond(one, "200 OK", "application/json", RESPONSE);
        return;
    }
    one->left = number_at(field(body, length, "max_tokens"), end_of, 0);
    if (!one->left) /* the newer name; some relays convert to it */
        one->left = number_at(field(body, length, "max_completion_tokens"), end_of, 16);
    uint64_t delay_ms = read_marker(one, body, length);
    one->responding = true;
    one->begun = false;
    timer_set(&one->timer, now_ns() + (int64_t)delay_ms * MILLISECOND);
}

static void next_event(struct connection *one, int64_t now)
{
    char event[sizeof EVENT + 64], size[16];
    int64_t late_us = (now - one->timer.at) / 1000;
    int bucket = 0;
    while (late_us > 1 && bucket < BUCKETS - 1) {
        late_us /= 2;
        bucket++;
    }
    late[bucket]++;
    if (!one->begun)
        buffer_out(one, STREAM_HEAD, sizeof STREAM_HEAD - 1);
    one->begun = true;
    if (one->left) {
        int length = snprintf(event, sizeof event, "%s%lld}\n\n", EVENT, (long long)now_ns());
        int digits = snprintf(size, sizeof size, "%x\r\n", length);
        buffer_out(one, size, (size_t)digits);
        buffer_out(one, event, (size_t)length);
        buffer_out(one, "\r\n", 2);
        events_sent++;
        one->left--;
    }
    if (one->left)
        timer_set(&one->timer, one->timer.at + gap_ns);
    else {
        buffer_out(one, STREAM_END, sizeof STREAM_END - 1);
        timer_clear(&one->timer);
        one->responding = false;
    }
    flush(one);
}

/* Handles one request from the input buffer; false if it holds no complete request. */
static bool take_request(struct connection *one)
{
    const char *head = one->in.data;
    const char *blank = one->in.used ? memmem(head, one->in.used, "\r\n\r\n", 4) : NULL;
    if (!blank) {
        if (one->in.used > MAX_HEAD)
            close_connection(one);
        return false;
    }
    size_t head_length = (size_t)(blank - head) + 4, found, length = 0;
    const char *value = header_value(head, head_length, "content-length", &found);
    if (value)
        length = (size_t)number_at(value, value + found, 0);
    if ((value = header_value(head, head_length, "transfer-encoding", &found))) {
        respond(one, "411 Length Required", "application/json", "{\"error\":{\"message\":\"length required\"}}");
        one->discarding = true;
        return false;
    }
    if (one->in.used < head_length + length)
        return false;
    const char *path = memchr(head, ' ', head_length);
    const char *path_end = path ? memchr(path + 1, ' ', head_length - (size_t)(path + 1 - head)) : NULL;
    if (!path_end)
        close_connection(one);
    else if (!strncmp(head, "GET ", 4))
        handle_get(one, path + 1, (size_t)(path_end - path - 1));
    else if (!strncmp(head, "POST ", 5))
        handle_post(one, head + head_length, length);
    else
        respond(one, "405 Method Not Allowed", "application/json", "{}");
    if (one->closed)
        return false;
    buffer_drop(&one->in, head_length + length);
    return true;
}

static void on_readable(struct connection *one)
{
    static char piece[262144];
    ssize_t got = recv(one->fd, piece, sizeof piece, 0);
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return;
    if (got <= 0) {
        close_connection(one);
        return;
    }
    if (one->discarding)
        return;
    buffer_add(&one->in, piece, (size_t)got);
    while (!one->responding && !one->closed && take_request(one))
        ;
}

static void accept_all(int listener)
{
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct connection *one = calloc(1, sizeof *one);
        if (!one)
            fail("memory");
        one->fd = fd;
        struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = one};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
            fail("epoll");
    }
    if (errno != EAGAIN && errno != EWOULDBLOCK && errno != ECONNABORTED && errno != EINTR)
        fail("accept");
}

static int listen_at(const char *path, int *port)
{
    int fd = socket(path ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int wrong;
    if (path) {
        struct sockaddr_un at = unix_address(path);
        wrong = bind(fd, (struct sockaddr *)&at, sizeof at);
    } else
        wrong = bind(fd, (struct sockaddr *)&address, length);
    if (wrong || listen(fd, 4096))
        fail("listen");
    if (!path && getsockname(fd, (struct sockaddr *)&address, &length))
        fail("listen");
    *port = path ? 0 : ntohs(address.sin_port);
    return fd;
}

int main(int count, char **arguments)
{
    const char *path = NULL;
    for (int i = 1; i < count; i += 2) {
        if (i + 1 == count)
            refuse("missing value of", arguments[i]);
        if (!strcmp(arguments[i], "--unix"))
            path = arguments[i + 1];
        else if (!strcmp(arguments[i], "--rate"))
            gap_ns = (int64_t)(SECOND / number_of("--rate", arguments[i + 1]));
        else if (!strcmp(arguments[i], "--leaves"))
            disconnect_log = open(arguments[i + 1], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        else
            refuse("unknown argument", arguments[i]);
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int port, listener = listen_at(path, &port);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[512];
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event))
        fail("epoll");
    printf("listening %d\n", port);
    fflush(stdout);
    for (;;) {
        struct timer *first = timer_first();
        int found = wait_until(epoll, events, 512, first ? first->at : now_ns() + SECOND);
        for (int i = 0; i < found; i++) {
            struct connection *one = events[i].data.ptr;
            if (!one)
                accept_all(listener);
            else if (!one->closed) {
                /* A client that closes during a response does not want the rest of it. */
                if ((events[i].events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) && one->responding)
                    close_connection(one);
                else if (events[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
                    on_readable(one);
                if (!one->closed && (events[i].events & EPOLLOUT))
                    flush(one);
            }
        }
        int64_t now = now_ns();
        while ((first = timer_first()) && first->at <= now) {
            struct connection *one = (struct connection *)first;
            next_event(one, now);
            while (!one->responding && !one->closed && take_request(one)) /* requests that came meanwhile */
                ;
        }
        while (closed_connections) {
            struct connection *one = closed_connections;
            closed_connections = one->next_closed;
            buffer_free(&one->in);
            buffer_free(&one->out);
            free(one);
        }
    }
}
