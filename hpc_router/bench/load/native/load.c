/* A load generator for OpenAI's interface: thousands of connections, one thread.
 *
 *   load --requests FILE --records FILE (--tcp PORT [--host ADDRESS] | --unix PATH) --connections N
 *        [--seconds S] [--count M] [--arrivals FILE] [--order FILE] [--think FILE] [--ramp S] [--measure S]
 *        [--others FILE] [--leave-after-events K | --leave-after-ms T] [--events FILE] [--label HEADER[,HEADER...]]
 *        [--timeout S] [--drain S]
 *
 * --requests  whole HTTP requests, each after its length as 32 bits; they are sent as they are, in --order (32-bit
 *             numbers) or as they come, again from the first when all were sent
 * closed loop: each connection has one request at a time; the next one follows at once, or after a time of --think
 *             (doubles, seconds, taken in turn). --ramp spreads the first ones. New ones begin for --seconds, or until
 *             --count have begun
 * open loop:  requests are due at --arrivals (doubles, seconds from the start); one that finds all connections taken
 *             waits, and its record says so
 * measuring:  with --measure, requests that begin (open loop: are due) from then until --seconds, or --count of them, are
 *             the measured ones; load goes on until the last of them has ended, and what still runs then is stopped.
 *             --order is theirs, --others that of all the rest
 * leaving:    the connection is closed after K events, or T milliseconds after the request began
 * --records   one `struct record` per request; --events one `struct event` per event with content
 *
 * Says `begun NANOSECONDS` (CLOCK_MONOTONIC, as every time here), and at the end a summary in JSON. SIGTERM ends it
 * early: requests under way are recorded as such. Nothing that goes wrong is left out: it is an `error` of a record.
 */
#define _GNU_SOURCE
#include "loop.h"
#include <arpa/inet.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

enum { LONGEST_HEAD = 65536, LONGEST_LINE = 1 << 22, MOST_LABELS = 250, LABEL = 64 };

/* In this order in hpc_router/bench/load/native/records.py. */
enum error {
    NONE, CONNECT, DISCONNECTED, BAD_HTTP, HTTP_STATUS, CUT, UNFINISHED, STREAM_ERROR, TIMEOUT, LEFT, STOPPED
};
enum { REUSED = 1, RETRIED = 2, STREAM = 4, MEASURED = 8, FILLING = 16 };
enum { HEADERS = 3 };
#define UNKNOWN UINT32_MAX

struct record {
    uint64_t sequence;
    int64_t due, begin, first_byte, first_event, end;
    uint64_t bytes;
    uint32_t prompt, connection, events;
    uint16_t status, label[HEADERS];
    uint8_t error, flags, padding[2];
    uint32_t prompt_tokens, tokens; /* the engine's own counts */
};

struct event {
    uint64_t sequence;
    int64_t at, hop; /* -1: the event carries no stamp */
};

enum part { HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, TO_CLOSE };

struct user {
    struct timer timer; /* first: a timer is its user. Idle: the next request. Active: the moment to leave */
    uint32_t number;
    int fd;
    bool connected, active, writing, heard_any, closes;
    size_t sent;
    int64_t heard_at;
    struct record record;
    enum part part;
    struct buffer head, line;
    uint64_t left;
    int status;
    bool has_content, is_error, is_done, done, failed; /* the event at hand; the stream */
    int64_t stamp;
};

struct request {
    const char *data;
    uint32_t length;
};

static struct {
    const char *requests, *records, *events, *unix_path, *host, *label;
    const char *arrivals, *order, *others, *think;
    double port, connections, seconds, count, ramp, measure, leave_events, leave_ms, timeout, drain;
} given = {
    .host = "127.0.0.1", .connections = 1, .seconds = -1, .count = -1, .measure = -1, .timeout = 60, .drain = 30
};

static struct request *requests;
static size_t request_count, order_count, others_count, think_count, arrival_count;
static uint32_t *order, *others;
static double *think, *arrivals;

static struct user *users;
static uint32_t user_count;
static uint32_t *idle; /* open loop: connections without a request, the last used first */
static uint32_t idle_count, active_count, retired;
static uint64_t issued, most, arrived, waiting;
static bool measuring, measured_all; /* measured_all: what begins from now on is not measured */
static uint64_t measured_begun, measured_active, others_begun;
static int64_t begun_at, stop_at, measure_at;
static struct timer arrival, sweep;
static int epoll;
static FILE *records, *events;
static uint64_t idle_closed, unsolicited, finished, connects;
static char labels[MOST_LABELS][LABEL];
static uint16_t label_count;
static char headers[HEADERS][LABEL];
static int header_count;
static volatile sig_atomic_t told_to_stop;
static char *output_buffers[2];

static void next_of(struct user *one);

static void stop(int number)
{
    (void)number;
    told_to_stop = 1;
}

static void watch(struct user *one, bool writing)
{
    if (one->writing == writing)
        return;
    one->writing = writing;
    struct epoll_event event = {.events = EPOLLIN | (writing ? EPOLLOUT : 0), .data.ptr = one};
    epoll_ctl(epoll, EPOLL_CTL_MOD, one->fd, &event);
}

static void hang_up(struct user *one)
{
    if (one->fd >= 0)
        close(one->fd);
    one->fd = -1;
    one->connected = one->writing = false;
}

static void finish(struct user *one, enum error error)
{
    timer_clear(&one->timer);
    one->record.end = now_ns(); /* before closing: who leaves has left by then at the latest */
    one->record.error = error;
    if (error || one->closes)
        hang_up(one);
    if (fwrite(&one->record, sizeof one->record, 1, records) != 1)
        fail(given.records);
    one->active = false;
    active_count--;
    measured_active -= (one->record.flags & MEASURED) != 0;
    finished++;
    next_of(one);
}

/* ---- the answer ---- */

static uint16_t label_of(const char *value, size_t length)
{
    char text[LABEL] = "";
    size_t at = 0;
    for (; at < length && at < LABEL - 1; at++)
        text[at] = value[at] < ' ' || value[at] > '~' || value[at] == '"' || value[at] == '\\' ? '?' : value[at];
    for (uint16_t i = 0; i < label_count; i++)
        if (!strcmp(labels[i], text))
            return i + 1;
    if (label_count == MOST_LABELS)
        return MOST_LABELS + 1;
    strcpy(labels[label_count], text);
    return ++label_count;
}

static void read_head(struct user *one, size_t length)
{
    const char *head = one->head.data, *value;
    size_t found;
    one->head.data[length - 1] = 0;
    if (sscanf(head, "HTTP/1.%*1[01] %3d", &one->status) != 1) {
        finish(one, BAD_HTTP);
        return;
    }
    one->record.status = (uint16_t)one->status;
    value = header_value(head, length, "connection", &found);
    one->closes = value ? has_word(value, found, "close") : head[7] == '0';
    if ((value = header_value(head, length, "content-type", &found)) && found >= 17 &&
        !strncasecmp(value, "text/event-stream", 17))
        one->record.flags |= STREAM;
    for (int i = 0; i < header_count; i++)
        if ((value = header_value(head, length, headers[i], &found)))
            one->record.label[i] = label_of(value, found);
    if ((value = header_value(head, length, "transfer-encoding", &found)) && has_word(value, found, "chunked"))
        one->part = CHUNK_SIZE;
    else if ((value = header_value(head, length, "content-length", &found))) {
        char *end;
        one->left = strtoull(value, &end, 10);
        one->part = LENGTH;
        if (!found || end != value + found)
            finish(one, BAD_HTTP);
    } else if (one->status == 204 || one->status == 304) {
        one->left = 0;
        one->part = LENGTH;
    } else {
        one->part = TO_CLOSE;
        one->closes = true;
    }
}

static void read_line(struct user *one, const char *line, size_t length);

/* The body has ended as it should. A last event that lacks its blank line is one all the same if it ends the stream. */
static void over(struct user *one)
{
    enum error error = NONE;
    if (one->line.used)
        read_line(one, one->line.data, one->line.used);
    if (one->is_done)
        read_line(one, "", 0);
    if (one->status != 200)
        error = HTTP_STATUS;
    else if (one->failed)
        error = STREAM_ERROR;
    else if ((one->record.flags & STREAM) && !one->done)
        error = UNFINISHED;
    finish(one, error);
}

/* Whether `"name":` is followed by a text that is not empty. */
static bool has_text(const char *data, size_t length, const char *name, size_t wanted)
{
    const char *end = data + length, *at = data;
    while ((at = memmem(at, (size_t)(end - at), name, wanted))) {
        at += wanted;
        while (at < end && *at == ' ')
            at++;
        if (at + 1 < end && at[0] == '"' && at[1] != '"')
            return true;
    }
    return false;
}

/* Whether the array after `name`, which ends in a colon, has an element. */
static bool has_element(const char *data, size_t length, const char *name, size_t wanted)
{
    const char *at = memmem(data, length, name, wanted), *end = data + length;
    if (!at)
        return false;
    for (at += wanted; at < end && *at == ' ';)
        at++;
    if (at == end || *at++ != '[')
        return false;
    while (at < end && *at == ' ')
        at++;
    return at < end && *at != ']';
}

static int64_t stamp_of(const char *data, size_t length)
{
    const char *at = memmem(data, length, "\"t\":", 4), *end = data + length;
    int64_t value = 0;
    if (!at)
        return -1;
    for (at += 4; at < end && *at >= '0' && *at <= '9'; at++)
        value = value * 10 + (*at - '0');
    return value > 0 ? value : -1;
}

/* The number after `name`, which ends in a colon; `otherwise` where there is none. */
static uint32_t number_after(const char *data, size_t length, const char *name, size_t wanted, uint32_t otherwise)
{
    const char *at = memmem(data, length, name, wanted), *end = data + length;
    uint32_t value = 0;
    if (!at)
        return otherwise;
    for (at += wanted; at < end && *at == ' ';)
        at++;
    if (at == end || *at < '0' || *at > '9')
        return otherwise;
    for (; at < end && *at >= '0' && *at <= '9'; at++)
        value = value * 10 + (uint32_t)(*at - '0');
    return value;
}

static void read_usage(struct user *one, const char *line, size_t length)
{
    if (!memmem(line, length, "_tokens\"", 8))
        return;
    struct record *record = &one->record;
    record->tokens = number_after(line, length, "\"completion_tokens\":", 20, record->tokens);
    record->prompt_tokens = number_after(line, length, "\"prompt_tokens\":", 16, record->prompt_tokens);
}

static void read_line(struct user *one, const char *line, size_t length)
{
    if (length && line[length - 1] == '\r')
        length--;
    if (length == 0) { /* the end of an event */
        if (one->is_done)
            one->done = true;
        if (one->is_error)
            one->failed = true;
        if (one->has_content) {
            struct event made = {one->record.sequence, one->heard_at, one->stamp < 0 ? -1 : one->heard_at - one->stamp};
            one->record.events++;
            if (!one->record.first_event)
                one->record.first_event = one->heard_at;
            if (events && fwrite(&made, sizeof made, 1, events) != 1)
                fail(given.events);
        }
        one->is_done = one->is_error = one->has_content = false;
        one->stamp = -1;
        return;
    }
    if (length < 5 || memcmp(line, "data:", 5))
        return;
    line += 5, length -= 5;
    while (length && *line == ' ')
        line++, length--;
    if (length == 6 && !memcmp(line, "[DONE]", 6)) {
        one->is_done = true;
        return;
    }
    /* text, reasoning under both of its names, and calls of tools are output of the model alike */
    one->has_content |= has_text(line, length, "\"content\":", 10) || has_text(line, length, "\"text\":", 7) ||
                        has_text(line, length, "\"reasoning_content\":", 20) ||
                        has_text(line, length, "\"reasoning\":", 12) || has_element(line, length, "\"tool_calls\":", 13);
    one->stamp = stamp_of(line, length);
    if (has_text(line, length, "\"finish_reason\":", 16)) {
        one->is_done = true; /* vLLM ends what it cuts when it is stopped in this form as well */
        one->is_error |= memmem(line, length, "\"finish_reason\":\"abort\"", 23) != NULL;
        one->is_error |= memmem(line, length, "\"finish_reason\": \"abort\"", 24) != NULL;
    }
    read_usage(one, line, length);
    if (length && *line == '{') {
        do
            line++, length--;
        while (length && *line == ' ');
        one->is_error |= length > 7 && !memcmp(line, "\"error\"", 7);
    }
}

static bool leaves_now(const struct user *one)
{
    return given.leave_events > 0 && one->record.events >= (uint32_t)given.leave_events;
}

/* The body's bytes; false when the request ended with them. */
static bool take_body(struct user *one, const char *data, size_t length)
{
    one->record.bytes += length;
    if (!(one->record.flags & STREAM))
        return true;
    while (length) {
        const char *end = memchr(data, '\n', length);
        size_t taken = end ? (size_t)(end - data) : length;
        if (one->line.used || !end) {
            buffer_add(&one->line, data, taken);
            if (one->line.used > LONGEST_LINE) {
                finish(one, BAD_HTTP);
                return false;
            }
            if (end) {
                read_line(one, one->line.data, one->line.used);
                one->line.used = 0;
            }
        } else
            read_line(one, data, taken);
        if (leaves_now(one)) {
            finish(one, LEFT);
            return false;
        }
        taken += end != NULL;
        data += taken, length -= taken;
    }
    return true;
}

/* One line of the framing, gathered in `head`; NULL while it is not complete. What follows it is left in place. */
static char *framing_line(struct user *one, const char **data, size_t *length)
{
    const char *end = memchr(*data, '\n', *length);
    size_t taken = end ? (size_t)(end - *data) + 1 : *length;
    buffer_add(&one->head, *data, taken);
    *data += taken, *length -= taken;
    if (!end)
        return NULL;
    one->head.data[one->head.used - 1] = 0;
    if (one->head.used > 1 && one->head.data[one->head.used - 2] == '\r')
        one->head.data[one->head.used - 2] = 0;
    one->head.used = 0;
    return one->head.data;
}

static void take_head(struct user *one, const char **data, size_t *length)
{
    size_t before = one->head.used;
    buffer_add(&one->head, *data, *length);
    size_t from = before > 3 ? before - 3 : 0;
    const char *blank = memmem(one->head.data + from, one->head.used - from, "\r\n\r\n", 4);
    if (!blank) {
        *length = 0;
        if (one->head.used > LONGEST_HEAD)
            finish(one, BAD_HTTP);
        return;
    }
    size_t whole = (size_t)(blank - one->head.data) + 4;
    *data += whole - before, *length -= whole - before;
    one->head.used = 0;
    if (one->head.data[0] == 'H' && whole > 12 && !memcmp(one->head.data + 8, " 1", 2))
        return; /* 100 Continue and the like: the answer is yet to come */
    read_head(one, whole);
}

static void take_chunk_size(struct user *one, const char **data, size_t *length)
{
    char *line = framing_line(one, data, length), *end;
    if (!line) {
        if (one->head.used > LONGEST_HEAD)
            finish(one, BAD_HTTP);
        return;
    }
    one->left = strtoull(line, &end, 16);
    if (end == line || (*end && *end != ';' && *end != ' '))
        finish(one, BAD_HTTP);
    else
        one->part = one->left ? CHUNK_DATA : TRAILER;
}

static void take_piece(struct user *one, const char **data, size_t *length)
{
    size_t taken = one->part == TO_CLOSE || *length < one->left ? *length : (size_t)one->left;
    const char *piece = *data;
    *data += taken, *length -= taken, one->left -= one->part == TO_CLOSE ? 0 : taken;
    if (!take_body(one, piece, taken) || one->left || one->part == TO_CLOSE)
        return;
    if (one->part == CHUNK_DATA)
        one->part = CHUNK_END;
    else
        over(one);
}

static void take(struct user *one, const char *data, size_t length)
{
    char *line;
    if (!one->record.first_byte)
        one->record.first_byte = one->heard_at;
    uint64_t sequence = one->record.sequence;
    while (length && one->active && one->record.sequence == sequence && one->fd >= 0) {
        switch (one->part) {
        case HEAD:
            take_head(one, &data, &length);
            if (one->active && one->part == LENGTH && !one->left)
                over(one); /* an empty body */
            break;
        case CHUNK_SIZE:
            take_chunk_size(one, &data, &length);
            break;
        case LENGTH:
        case CHUNK_DATA:
        case TO_CLOSE:
            take_piece(one, &data, &length);
            break;
        case CHUNK_END:
            if ((line = framing_line(one, &data, &length))) {
                if (*line)
                    finish(one, BAD_HTTP);
                else
                    one->part = CHUNK_SIZE;
            }
            break;
        case TRAILER:
            if ((line = framing_line(one, &data, &length)) && !*line)
                over(one);
            break;
        }
    }
    if (length && one->fd >= 0 && !one->closes) {
        unsolicited++; /* more than was asked for: nothing after it could be trusted */
        hang_up(one);
    }
}

/* ---- the request ---- */

static void connect_to(struct user *one)
{
    int on = 1, wrong;
    one->fd = socket(given.unix_path ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (one->fd < 0)
        fail("socket");
    connects++;
    if (given.unix_path) {
        struct sockaddr_un at = unix_address(given.unix_path);
        wrong = connect(one->fd, (struct sockaddr *)&at, sizeof at);
    } else {
        struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)given.port)};
        inet_pton(AF_INET, given.host, &at.sin_addr);
        setsockopt(one->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        wrong = connect(one->fd, (struct sockaddr *)&at, sizeof at);
    }
    if (wrong && errno != EINPROGRESS) {
        finish(one, CONNECT);
        return;
    }
    one->connected = !wrong;
    one->writing = true;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = one};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, one->fd, &event))
        fail("epoll");
}

/* A kept connection that its server closed as the request came is no failure, once. */
static void broken(struct user *one, enum error error)
{
    if ((one->record.flags & REUSED) && !(one->record.flags & RETRIED) && !one->record.first_byte) {
        one->record.flags |= RETRIED;
        one->sent = 0;
        hang_up(one);
        connect_to(one);
        return;
    }
    finish(one, error);
}

static void send_on(struct user *one)
{
    const struct request *request = &requests[one->record.prompt];
    while (one->sent < request->length) {
        ssize_t sent = send(one->fd, request->data + one->sent, request->length - one->sent, MSG_NOSIGNAL);
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            watch(one, true);
            return;
        }
        if (sent < 0) {
            if (one->record.first_byte || one->part != HEAD)
                break; /* it answers before it has read all: hear what it says */
            broken(one, DISCONNECTED);
            return;
        }
        one->sent += (size_t)sent;
    }
    watch(one, false);
}

/* Whether requests that begin now are measured no more. */
static bool closed(int64_t now)
{
    if (stop_at >= 0 && now >= stop_at)
        measured_all = true;
    return measured_all;
}

/* What a request that begins, or is due, at that time counts for. */
static uint8_t part_at(int64_t at)
{
    if (!measuring || at < measure_at)
        return 0;
    if (arrivals ? at >= stop_at : closed(at))
        return FILLING;
    return MEASURED;
}

static uint32_t prompt_of(uint64_t sequence, uint8_t part)
{
    if (!measuring)
        return order_count ? order[sequence % order_count] : (uint32_t)(sequence % request_count);
    uint64_t turn = part == MEASURED ? measured_begun++ : others_begun++;
    if (part == MEASURED)
        return order_count ? order[turn % order_count] : (uint32_t)(turn % request_count);
    return others_count ? others[turn % others_count] : (uint32_t)(turn % request_count);
}

static void begin(struct user *one)
{
    uint64_t sequence = issued++;
    active_count++;
    memset(&one->record, 0, sizeof one->record);
    one->record.sequence = sequence;
    one->record.connection = one->number;
    one->record.begin = one->heard_at = now_ns();
    one->record.due = arrivals ? begun_at + (int64_t)(arrivals[sequence] * SECOND) : one->record.begin;
    one->record.flags = part_at(one->record.due);
    one->record.prompt = prompt_of(sequence, one->record.flags);
    one->record.prompt_tokens = one->record.tokens = UNKNOWN;
    if (one->record.flags == MEASURED && !arrivals) {
        measured_active++;
        measured_all |= measured_begun == most;
    }
    one->active = true;
    one->sent = 0;
    one->part = HEAD;
    one->head.used = one->line.used = 0;
    one->status = 0;
    one->closes = one->has_content = one->is_error = one->is_done = one->done = one->failed = false;
    one->stamp = -1;
    if (given.leave_ms > 0)
        timer_set(&one->timer, one->record.begin + (int64_t)(given.leave_ms * MILLISECOND));
    if (one->fd >= 0) {
        one->record.flags |= REUSED;
        send_on(one);
    } else
        connect_to(one);
}

/* ---- who asks when ---- */

static bool may_begin(void)
{
    return !told_to_stop && (measuring || (issued < most && (stop_at < 0 || now_ns() < stop_at)));
}

static void next_of(struct user *one)
{
    if (measuring && measured_all && !measured_active)
        told_to_stop = 1;
    if (arrivals) {
        if (waiting && !told_to_stop) {
            waiting--;
            timer_set(&one->timer, 0); /* at once, but not from within its last request */
        } else
            idle[idle_count++] = one->number;
        return;
    }
    if (!may_begin()) {
        retired++;
        return;
    }
    int64_t pause = think_count ? (int64_t)(think[one->record.sequence % think_count] * SECOND) : 0;
    if (one->record.error == CONNECT || one->record.error == HTTP_STATUS || one->record.error == DISCONNECTED)
        pause += SECOND / 10; /* what refuses everything must not become a busy loop */
    timer_set(&one->timer, pause ? now_ns() + pause : 0);
}

static void due_now(struct timer *one, int64_t now)
{
    if (one == &arrival) {
        timer_clear(one);
        measured_active += part_at(begun_at + (int64_t)(arrivals[arrived] * SECOND)) == MEASURED;
        arrived++;
        if (idle_count)
            begin(&users[idle[--idle_count]]);
        else
            waiting++;
        if (arrived < arrival_count)
            timer_set(one, begun_at + (int64_t)(arrivals[arrived] * SECOND));
        return;
    }
    if (one == &sweep) {
        timer_set(one, now + SECOND / 4);
        for (uint32_t i = 0; i < user_count; i++)
            if (users[i].active && now - users[i].heard_at > (int64_t)(given.timeout * SECOND))
                finish(&users[i], TIMEOUT);
        return;
    }
    struct user *user = (struct user *)one;
    timer_clear(one);
    if (user->active)
        finish(user, LEFT);
    else if (arrivals || may_begin())
        begin(user);
    else
        retired++;
}

static void happened(struct user *one, uint32_t what)
{
    static char piece[262144];
    if (one->fd < 0)
        return;
    if (!one->connected && (what & (EPOLLOUT | EPOLLERR | EPOLLHUP))) {
        int error = 0;
        socklen_t length = sizeof error;
        getsockopt(one->fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error) {
            finish(one, CONNECT);
            return;
        }
        one->connected = true;
    }
    if (what & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        ssize_t got = recv(one->fd, piece, sizeof piece, 0);
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            got = -2;
        if (got > 0 && one->active) {
            one->heard_at = now_ns();
            take(one, piece, (size_t)got);
        } else if (got > 0) {
            unsolicited++;
            hang_up(one);
        } else if (got != -2 && !one->active) {
            idle_closed++;
            hang_up(one);
        } else if (got != -2) {
            if (got == 0 && one->part == TO_CLOSE)
                over(one);
            else if (one->record.first_byte)
                finish(one, one->part == HEAD ? DISCONNECTED : CUT);
            else
                broken(one, DISCONNECTED);
        }
    }
    if (one->fd >= 0 && one->active && one->connected && (what & EPOLLOUT))
        send_on(one);
}

static bool finished_all(void)
{
    if (arrivals)
        return (told_to_stop || arrived == arrival_count) && !active_count && !waiting && idle_count == user_count;
    return retired == user_count;
}

/* Whoever only waits for a time to begin need not. */
static void dismiss(void)
{
    for (uint32_t i = 0; i < user_count; i++)
        if (!users[i].active && users[i].timer.place) {
            timer_clear(&users[i].timer);
            if (arrivals)
                idle[idle_count++] = i;
            else
                retired++;
        }
}

static void run(void)
{
    struct epoll_event found[512];
    int64_t give_up_at = INT64_MAX;
    while (!finished_all()) {
        int64_t now = now_ns();
        struct timer *first;
        for (int taken = 0; taken < 256 && (first = timer_first()) && first->at <= now; taken++)
            due_now(first, now);
        if (measuring && closed(now) && !measured_active)
            told_to_stop = 1;
        bool ending = measuring ? measured_all : told_to_stop || (stop_at >= 0 && now >= stop_at) || issued >= most ||
                      (arrivals && arrived == arrival_count && !waiting);
        if (ending && give_up_at == INT64_MAX) {
            give_up_at = now + (int64_t)(given.drain * SECOND);
            if (!arrivals && !measuring)
                dismiss();
        }
        if (told_to_stop || now >= give_up_at) {
            told_to_stop = 1;
            waiting = 0;
            timer_clear(&arrival);
            dismiss();
            for (uint32_t i = 0; i < user_count; i++)
                if (users[i].active)
                    finish(&users[i], STOPPED);
            continue;
        }
        first = timer_first();
        int count = wait_until(epoll, found, 512, first ? first->at : now + SECOND / 4);
        for (int i = 0; i < count; i++)
            happened(found[i].data.ptr, found[i].events);
    }
}

/* ---- what was given ---- */

static char *content_of(const char *path, size_t *length)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (fd < 0 || fstat(fd, &status))
        fail(path);
    *length = (size_t)status.st_size;
    char *data = *length ? mmap(NULL, *length, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0) : "";
    if (data == MAP_FAILED)
        fail(path);
    close(fd);
    return data;
}

static double *doubles_of(const char *path, size_t *count)
{
    size_t length;
    char *data = content_of(path, &length);
    if (!length || length % sizeof(double))
        refuse("no list of doubles", path);
    *count = length / sizeof(double);
    return (double *)(void *)data;
}

static void read_requests(void)
{
    size_t length, room = 0;
    const char *data = content_of(given.requests, &length);
    for (size_t at = 0; at < length;) {
        uint32_t one;
        if (length - at < sizeof one)
            refuse("the last request is cut", given.requests);
        memcpy(&one, data + at, sizeof one);
        at += sizeof one;
        if (!one || one > length - at)
            refuse("the last request is cut", given.requests);
        if (request_count == room)
            requests = grown(requests, (room = room ? room * 2 : 64) * sizeof *requests);
        requests[request_count++] = (struct request){data + at, one};
        at += one;
    }
    if (!request_count)
        refuse("no requests", given.requests);
}

static uint32_t *order_of(const char *path, size_t *count)
{
    size_t length;
    uint32_t *found = (uint32_t *)(void *)content_of(path, &length);
    *count = length / sizeof *found;
    for (size_t i = 0; i < *count; i++)
        if (found[i] >= request_count)
            refuse("a number beyond the last request", path);
    return found;
}

static void read_headers(void)
{
    for (const char *at = given.label; at; at = (at = strchr(at, ',')) ? at + 1 : NULL) {
        size_t length = strcspn(at, ",");
        if (header_count == HEADERS || !length || length >= LABEL)
            refuse("--label takes up to three names of headers", given.label);
        memcpy(headers[header_count++], at, length);
    }
}

static void read_words(int count, char **words)
{
    struct {
        const char *name, **text;
        double *number;
    } known[] = {
        {"--requests", &given.requests, NULL},    {"--records", &given.records, NULL},
        {"--events", &given.events, NULL},        {"--unix", &given.unix_path, NULL},
        {"--host", &given.host, NULL},            {"--label", &given.label, NULL},
        {"--arrivals", &given.arrivals, NULL},    {"--order", &given.order, NULL},
        {"--think", &given.think, NULL},          {"--tcp", NULL, &given.port},
        {"--others", &given.others, NULL},        {"--measure", NULL, &given.measure},
        {"--connections", NULL, &given.connections}, {"--seconds", NULL, &given.seconds},
        {"--count", NULL, &given.count},          {"--ramp", NULL, &given.ramp},
        {"--leave-after-events", NULL, &given.leave_events}, {"--leave-after-ms", NULL, &given.leave_ms},
        {"--timeout", NULL, &given.timeout},      {"--drain", NULL, &given.drain},
    };
    for (int i = 1; i < count; i += 2) {
        size_t at = 0;
        while (at < sizeof known / sizeof *known && strcmp(known[at].name, words[i]))
            at++;
        if (at == sizeof known / sizeof *known)
            refuse("unknown argument", words[i]);
        if (i + 1 == count)
            refuse("a value is missing", words[i]);
        if (known[at].text)
            *known[at].text = words[i + 1];
        else
            *known[at].number = number_of(words[i], words[i + 1]);
    }
    if (!given.requests || !given.records)
        refuse("needed", "--requests and --records");
    if (!given.unix_path && (given.port < 1 || given.port > 65535))
        refuse("needed", "--tcp PORT or --unix PATH");
    if (given.connections < 1 || given.connections > 100000)
        refuse("--connections", "between 1 and 100000");
    if (!given.arrivals && given.seconds < 0 && given.count < 0)
        refuse("needed", "--seconds, --count or --arrivals");
    if (given.measure >= 0 && given.arrivals && given.seconds < 0)
        refuse("needed", "--seconds, beside --measure and --arrivals");
}

static FILE *output(const char *path, int which)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    FILE *made = fd < 0 ? NULL : fdopen(fd, "w");
    if (!made)
        fail(path);
    output_buffers[which] = grown(NULL, 1 << 20);
    setvbuf(made, output_buffers[which], _IOFBF, 1 << 20);
    return made;
}

/* Seconds that this thread could have run and was not let. */
static double waited_s(void)
{
    unsigned long long ran, waited = 0;
    FILE *file = fopen("/proc/thread-self/schedstat", "r");
    if (file) {
        if (fscanf(file, "%llu %llu", &ran, &waited) != 2)
            waited = 0;
        fclose(file);
    }
    return (double)waited / 1e9;
}

static void tell(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_s = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                   (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("{\"begun\":%lld,\"ended\":%lld,\"cpu_s\":%.6f,\"waited_s\":%.6f,\"requests\":%llu,\"connects\":%llu,\"idle_closed\":%llu,"
           "\"unsolicited\":%llu,\"labels\":[",
           (long long)begun_at, (long long)now_ns(), cpu_s, waited_s(), (unsigned long long)finished,
           (unsigned long long)connects, (unsigned long long)idle_closed, (unsigned long long)unsolicited);
    for (uint16_t i = 0; i < label_count; i++)
        printf("%s\"%s\"", i ? "," : "", labels[i]);
    printf("]}\n");
}

int main(int count, char **words)
{
    _Static_assert(sizeof(struct record) == 88 && sizeof(struct event) == 24, "Python reads these");
    read_words(count, words);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    read_requests();
    if (given.order)
        order = order_of(given.order, &order_count);
    if (given.others)
        others = order_of(given.others, &others_count);
    read_headers();
    if (given.think)
        think = doubles_of(given.think, &think_count);
    if (given.arrivals)
        arrivals = doubles_of(given.arrivals, &arrival_count);
    records = output(given.records, 0);
    if (given.events)
        events = output(given.events, 1);
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    if ((epoll = epoll_create1(EPOLL_CLOEXEC)) < 0)
        fail("epoll");
    user_count = (uint32_t)given.connections;
    users = calloc(user_count, sizeof *users);
    idle = calloc(user_count, sizeof *idle);
    if (!users || !idle)
        fail("memory");
    begun_at = now_ns();
    most = arrivals ? arrival_count : given.count < 0 ? UINT64_MAX : (uint64_t)given.count;
    measuring = given.measure >= 0;
    measure_at = begun_at + (int64_t)(given.measure * SECOND);
    stop_at = given.seconds < 0 || (arrivals && !measuring) ? -1 : begun_at + (int64_t)(given.seconds * SECOND);
    for (uint32_t i = 0; i < user_count; i++) {
        users[i].number = i;
        users[i].fd = -1;
        if (arrivals)
            idle[idle_count++] = user_count - 1 - i;
        else
            timer_set(&users[i].timer, begun_at + (int64_t)(given.ramp * SECOND * i / user_count));
    }
    if (arrivals)
        timer_set(&arrival, begun_at + (int64_t)(arrivals[0] * SECOND));
    timer_set(&sweep, begun_at + SECOND / 4);
    printf("begun %lld\n", (long long)begun_at);
    fflush(stdout);
    run();
    if (fclose(records) || (events && fclose(events)))
        fail("the records");
    tell();
    return 0;
}
