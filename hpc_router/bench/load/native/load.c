/* A load generator for OpenAI's API: thousands of connections in one thread.
 *
 *   load --requests FILE --records FILE (--tcp PORT [--host ADDRESS] | --unix PATH) --connections N
 *        [--seconds S] [--count M] [--arrivals FILE] [--order FILE] [--think FILE] [--ramp S] [--measure S]
 *        [--others FILE] [--leave-after-events K | --leave-after-ms T] [--events FILE] [--label HEADER[,HEADER...]]
 *        [--timeout S] [--drain S] [--chains FILE] [--most-in-flight N]
 *
 * --requests   Complete HTTP requests, each preceded by its length (32 bits). They are sent unchanged, in --order
 *              (32-bit indices) or in file order, and again from the start after the last one.
 * Closed loop: Each connection sends its next request when the previous response has ended, after a pause from --think
 *              (doubles, seconds, used in turn) if given. --ramp spreads the first requests. New requests begin until
 *              --seconds have passed or --count requests have begun.
 * Open loop:   Requests are due at --arrivals (doubles, seconds from the start). If no connection is free, a request
 *              waits; its record has both the time when it was due and the time when it began.
 * --measure    Requests that begin (open loop: are due) from this time until --seconds, or the first --count of them,
 *              are measured. The load continues until the last measured request has ended, and requests that are
 *              still running then are stopped. Measured requests are sent in --order, all others in the order of
 *              --others.
 * --chains     Conversations: a list of `struct step`. A connection sends the steps of a chain one after the other, each
 *              a pause after the previous response, and may disconnect after some events of a step. Closed loop: a
 *              connection begins with the next chain when its chain has ended. Open loop: a chain begins at each
 *              arrival, and a later step is due when its pause has passed. Needs --measure; replaces --order, --others,
 *              --think and --leave-after-events. In a request, the byte 1 and four digits stand for the content of the
 *              response to that step of the chain (from 0000); content-length is adjusted.
 * --most-in-flight  Open loop: ends the load as soon as more requests than this run or wait for a connection.
 * --leave-...  The client closes the connection after K events, or T milliseconds after the request began.
 * --label      Up to three response headers whose values are recorded.
 * --records    One `struct record` per request; --events: one `struct event` per event with content.
 * --timeout    A request without any data for this long fails. --drain: time for running requests after the end.
 *
 * Prints `begun NANOSECONDS` (CLOCK_MONOTONIC, like all times here), and at the end a summary as JSON. SIGTERM ends the
 * load early; running requests are recorded as stopped. Every failure of a request is the `error` of its record.
 */
#define _GNU_SOURCE
#include "loop.h"
#include <arpa/inet.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

enum { MAX_HEAD = 65536, MAX_LINE = 1 << 22, MAX_LABELS = 250, LABEL = 64 };

/* hpc_router/bench/load/native/records.py has the same values in the same order. */
enum error {
    NONE, CONNECT, DISCONNECTED, BAD_HTTP, HTTP_STATUS, CUT, UNFINISHED, STREAM_ERROR, TIMEOUT, LEFT, STOPPED
};
enum { REUSED = 1, RETRIED = 2, STREAM = 4, MEASURED = 8, FILLING = 16 };
enum { HEADERS = 3 };
enum { ANSWER = 1, ANSWER_DIGITS = 4 };
#define UNKNOWN UINT32_MAX

struct record {
    uint64_t sequence;
    int64_t due, begin, first_byte, first_event, end;
    uint64_t bytes;
    uint32_t prompt, connection, events;
    uint16_t status, label[HEADERS];
    uint8_t error, flags, padding[2];
    uint32_t prompt_tokens, tokens, cached_tokens, reserved; /* as reported by the engine */
};

/* A request of a chain. `last`: the chain ends with it. `leave_events`: disconnect after so many events; 0: never. */
struct step {
    uint32_t request, leave_events;
    double pause;
    uint32_t last, reserved;
};

struct event {
    uint64_t sequence;
    int64_t at, hop; /* hop: receive time minus the event's own timestamp; -1 without one */
};

enum part { HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, TO_CLOSE };

struct user {
    struct timer timer; /* must be first: a timer is cast to its user. Set to the next request or to a disconnect */
    uint32_t number;
    int fd;
    bool connected, active, writing, closes;
    const struct step *step, *first_step; /* the current and the first step of its chain; NULL between chains */
    const char *data;                     /* the request as it is sent */
    size_t length;
    struct buffer *answers, assembled; /* the content of the response to each step so far, as in its JSON */
    uint32_t answer_room;
    uint32_t leave_events;
    int64_t due_at; /* open loop: when the next step of its chain is due; 0 for the first one */
    size_t sent;
    int64_t activity_at;
    struct record record;
    enum part part;
    struct buffer head, line;
    uint64_t left;
    int status;
    bool has_content, is_error, is_done, done, failed; /* three of the event, two of the stream */
    int64_t stamp;
};

struct request {
    const char *data;
    uint32_t length, body, answers; /* body: its length; answers: number of responses that it names */
};

static struct {
    const char *requests, *records, *events, *unix_path, *host, *label;
    const char *arrivals, *order, *others, *think, *chains;
    double most_in_flight;
    double port, connections, seconds, count, ramp, measure, leave_events, leave_ms, timeout, drain;
} options = {
    .host = "127.0.0.1", .connections = 1, .seconds = -1, .count = -1, .measure = -1, .timeout = 60, .drain = 30
};

static struct request *requests;
static size_t request_count, order_count, others_count, think_count, arrival_count;
static uint32_t *order, *others;
static double *think, *arrivals;

static const struct step *steps;
static const struct step **chains; /* the first step of each */
static size_t chain_count;
static uint64_t chains_begun;
static bool exceeded; /* --most-in-flight */

static struct user *users;
static uint32_t user_count;
static uint32_t *idle; /* open loop: stack of the connections without a request */
static uint32_t idle_count, active_count, finished_users;
static uint64_t issued, max_requests, arrived, waiting;
static bool measuring, all_measured_begun; /* all_measured_begun: requests that begin from now on are not measured */
static uint64_t measured_begun, measured_active, others_begun;
static int64_t begun_at, stop_at, measure_at;
static struct timer arrival, sweep;
static int epoll;
static FILE *records, *events;
static uint64_t idle_closed, unsolicited, finished, connects;
static char labels[MAX_LABELS][LABEL];
static uint16_t label_count;
static char headers[HEADERS][LABEL];
static int header_count;
static volatile sig_atomic_t stopping;
static char *output_buffers[2];

static void schedule_next(struct user *one);

static void stop(int number)
{
    (void)number;
    stopping = 1;
}

static void poll_writable(struct user *one, bool writing)
{
    if (one->writing == writing)
        return;
    one->writing = writing;
    struct epoll_event event = {.events = EPOLLIN | (writing ? EPOLLOUT : 0), .data.ptr = one};
    epoll_ctl(epoll, EPOLL_CTL_MOD, one->fd, &event);
}

static void disconnect(struct user *one)
{
    if (one->fd >= 0)
        close(one->fd);
    one->fd = -1;
    one->connected = one->writing = false;
}

static void finish(struct user *one, enum error error)
{
    timer_clear(&one->timer);
    one->record.end = now_ns(); /* before closing, so that a disconnect is not dated too late */
    one->record.error = error;
    if (error || one->closes)
        disconnect(one);
    if (fwrite(&one->record, sizeof one->record, 1, records) != 1)
        fail(options.records);
    one->active = false;
    active_count--;
    measured_active -= (one->record.flags & MEASURED) != 0;
    finished++;
    schedule_next(one);
}

/* ---- responses ---- */

static uint16_t label_of(const char *value, size_t length)
{
    char text[LABEL] = "";
    size_t at = 0;
    for (; at < length && at < LABEL - 1; at++)
        text[at] = value[at] < ' ' || value[at] > '~' || value[at] == '"' || value[at] == '\\' ? '?' : value[at];
    for (uint16_t i = 0; i < label_count; i++)
        if (!strcmp(labels[i], text))
            return i + 1;
    if (label_count == MAX_LABELS)
        return MAX_LABELS + 1;
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
    one->closes = value ? has_token(value, found, "close") : head[7] == '0';
    if ((value = header_value(head, length, "content-type", &found)) && found >= 17 &&
        !strncasecmp(value, "text/event-stream", 17))
        one->record.flags |= STREAM;
    for (int i = 0; i < header_count; i++)
        if ((value = header_value(head, length, headers[i], &found)))
            one->record.label[i] = label_of(value, found);
    if ((value = header_value(head, length, "transfer-encoding", &found)) && has_token(value, found, "chunked"))
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

/* The body ended cleanly. A last event without its blank line counts if it ends the stream. */
static void end_of_response(struct user *one)
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

/* Whether `"name":` is followed by a non-empty string. */
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

/* The buffer for the content of the response to the current step. */
static struct buffer *answer_of(struct user *one)
{
    uint32_t number = (uint32_t)(one->step - one->first_step);
    if (number >= one->answer_room) {
        one->answers = resize(one->answers, (number + 1) * sizeof *one->answers);
        memset(one->answers + one->answer_room, 0, (number + 1 - one->answer_room) * sizeof *one->answers);
        one->answer_room = number + 1;
    }
    return &one->answers[number];
}

/* Keeps the string after `"content":`, still escaped, for later requests of the chain. */
static void keep_content(struct user *one, const char *line, size_t length)
{
    const char *at = memmem(line, length, "\"content\":", 10), *end = line + length, *from;
    if (!at)
        return;
    for (at += 10; at < end && *at == ' ';)
        at++;
    if (at == end || *at++ != '"')
        return;
    for (from = at; at < end && *at != '"'; at++)
        at += *at == '\\';
    if (at < end && at > from)
        buffer_add(answer_of(one), from, (size_t)(at - from));
}

/* Whether `"name":` is followed by an array with an element. */
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

static int64_t timestamp_of(const char *data, size_t length)
{
    const char *at = memmem(data, length, "\"t\":", 4), *end = data + length;
    int64_t value = 0;
    if (!at)
        return -1;
    for (at += 4; at < end && *at >= '0' && *at <= '9'; at++)
        value = value * 10 + (*at - '0');
    return value > 0 ? value : -1;
}

/* The number after `name`, which includes the colon; `fallback` if there is none. */
static uint32_t count_after(const char *data, size_t length, const char *name, size_t wanted, uint32_t fallback)
{
    const char *at = memmem(data, length, name, wanted), *end = data + length;
    uint32_t value = 0;
    if (!at)
        return fallback;
    for (at += wanted; at < end && *at == ' ';)
        at++;
    if (at == end || *at < '0' || *at > '9')
        return fallback;
    for (; at < end && *at >= '0' && *at <= '9'; at++)
        value = value * 10 + (uint32_t)(*at - '0');
    return value;
}

static void read_usage(struct user *one, const char *line, size_t length)
{
    if (!memmem(line, length, "_tokens\"", 8))
        return;
    struct record *record = &one->record;
    record->tokens = count_after(line, length, "\"completion_tokens\":", 20, record->tokens);
    record->prompt_tokens = count_after(line, length, "\"prompt_tokens\":", 16, record->prompt_tokens);
    record->cached_tokens = count_after(line, length, "\"cached_tokens\":", 16, record->cached_tokens);
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
            int64_t hop = one->stamp < 0 ? -1 : one->activity_at - one->stamp;
            struct event made = {one->record.sequence, one->activity_at, hop};
            one->record.events++;
            if (!one->record.first_event)
                one->record.first_event = one->activity_at;
            if (events && fwrite(&made, sizeof made, 1, events) != 1)
                fail(options.events);
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
    /* text, reasoning under both of its names, and tool calls are all output of the model */
    one->has_content |= has_text(line, length, "\"content\":", 10) || has_text(line, length, "\"text\":", 7) ||
                        has_text(line, length, "\"reasoning_content\":", 20) ||
                        has_text(line, length, "\"reasoning\":", 12) || has_element(line, length, "\"tool_calls\":", 13);
    if (one->step && !one->step->last)
        keep_content(one, line, length);
    one->stamp = timestamp_of(line, length);
    if (has_text(line, length, "\"finish_reason\":", 16)) {
        one->is_done = true; /* a vLLM that is stopped ends running responses in this form too */
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

static bool disconnects_now(const struct user *one)
{
    return one->leave_events > 0 && one->record.events >= one->leave_events;
}

/* Handles bytes of the body; false if the request ended. */
static bool receive_body(struct user *one, const char *data, size_t length)
{
    one->record.bytes += length;
    if (!(one->record.flags & STREAM))
        return true;
    while (length) {
        const char *end = memchr(data, '\n', length);
        size_t taken = end ? (size_t)(end - data) : length;
        if (one->line.used || !end) {
            buffer_add(&one->line, data, taken);
            if (one->line.used > MAX_LINE) {
                finish(one, BAD_HTTP);
                return false;
            }
            if (end) {
                read_line(one, one->line.data, one->line.used);
                one->line.used = 0;
            }
        } else
            read_line(one, data, taken);
        if (disconnects_now(one)) {
            finish(one, LEFT);
            return false;
        }
        taken += end != NULL;
        data += taken, length -= taken;
    }
    return true;
}

/* One line of the chunked framing, collected in `head`; NULL until it is complete. Later bytes are not consumed. */
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

static void receive_head(struct user *one, const char **data, size_t *length)
{
    size_t before = one->head.used;
    buffer_add(&one->head, *data, *length);
    size_t from = before > 3 ? before - 3 : 0;
    const char *blank = memmem(one->head.data + from, one->head.used - from, "\r\n\r\n", 4);
    if (!blank) {
        *length = 0;
        if (one->head.used > MAX_HEAD)
            finish(one, BAD_HTTP);
        return;
    }
    size_t whole = (size_t)(blank - one->head.data) + 4;
    *data += whole - before, *length -= whole - before;
    one->head.used = 0;
    if (one->head.data[0] == 'H' && whole > 12 && !memcmp(one->head.data + 8, " 1", 2))
        return; /* an interim response, such as 100 Continue */
    read_head(one, whole);
}

static void receive_chunk_size(struct user *one, const char **data, size_t *length)
{
    char *line = framing_line(one, data, length), *end;
    if (!line) {
        if (one->head.used > MAX_HEAD)
            finish(one, BAD_HTTP);
        return;
    }
    one->left = strtoull(line, &end, 16);
    if (end == line || (*end && *end != ';' && *end != ' '))
        finish(one, BAD_HTTP);
    else
        one->part = one->left ? CHUNK_DATA : TRAILER;
}

static void receive_data(struct user *one, const char **data, size_t *length)
{
    size_t taken = one->part == TO_CLOSE || *length < one->left ? *length : (size_t)one->left;
    const char *piece = *data;
    *data += taken, *length -= taken, one->left -= one->part == TO_CLOSE ? 0 : taken;
    if (!receive_body(one, piece, taken) || one->left || one->part == TO_CLOSE)
        return;
    if (one->part == CHUNK_DATA)
        one->part = CHUNK_END;
    else
        end_of_response(one);
}

static void receive(struct user *one, const char *data, size_t length)
{
    char *line;
    if (!one->record.first_byte)
        one->record.first_byte = one->activity_at;
    uint64_t sequence = one->record.sequence;
    while (length && one->active && one->record.sequence == sequence && one->fd >= 0) {
        switch (one->part) {
        case HEAD:
            receive_head(one, &data, &length);
            if (one->active && one->part == LENGTH && !one->left)
                end_of_response(one); /* an empty body */
            break;
        case CHUNK_SIZE:
            receive_chunk_size(one, &data, &length);
            break;
        case LENGTH:
        case CHUNK_DATA:
        case TO_CLOSE:
            receive_data(one, &data, &length);
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
                end_of_response(one);
            break;
        }
    }
    if (length && one->fd >= 0 && !one->closes) {
        unsolicited++; /* data beyond the response: the connection is out of step, so close it */
        disconnect(one);
    }
}

/* ---- requests ---- */

static void connect_user(struct user *one)
{
    int on = 1, wrong;
    one->fd = socket(options.unix_path ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (one->fd < 0)
        fail("socket");
    connects++;
    if (options.unix_path) {
        struct sockaddr_un at = unix_address(options.unix_path);
        wrong = connect(one->fd, (struct sockaddr *)&at, sizeof at);
    } else {
        struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port)};
        inet_pton(AF_INET, options.host, &at.sin_addr);
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

/* Ends a request whose connection broke. A keep-alive connection that the server closed as the request was sent is
 * replaced once, and the request is sent again. */
static void fail_or_retry(struct user *one, enum error error)
{
    if ((one->record.flags & REUSED) && !(one->record.flags & RETRIED) && !one->record.first_byte) {
        one->record.flags |= RETRIED;
        one->sent = 0;
        disconnect(one);
        connect_user(one);
        return;
    }
    finish(one, error);
}

static void send_request(struct user *one)
{
    while (one->sent < one->length) {
        ssize_t sent = send(one->fd, one->data + one->sent, one->length - one->sent, MSG_NOSIGNAL);
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            poll_writable(one, true);
            return;
        }
        if (sent < 0) {
            if (one->record.first_byte || one->part != HEAD)
                break; /* the server responds before it has read the whole request: read the response */
            fail_or_retry(one, DISCONNECTED);
            return;
        }
        one->sent += (size_t)sent;
    }
    poll_writable(one, false);
}

/* Whether requests that begin now are after the measured ones. */
static bool window_ended(int64_t now)
{
    if (stop_at >= 0 && now >= stop_at)
        all_measured_begun = true;
    return all_measured_begun;
}

/* Flag of a request that begins, or is due, at that time; 0 for the warm-up. */
static uint8_t flag_at(int64_t at)
{
    if (!measuring || at < measure_at)
        return 0;
    if (arrivals ? at >= stop_at : window_ended(at))
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

/* Copies a body with the responses that it names. */
static void add_with_answers(struct user *one, struct buffer *to, const char *data, size_t length)
{
    const char *end = data + length, *mark;
    while ((mark = memchr(data, ANSWER, (size_t)(end - data)))) {
        buffer_add(to, data, (size_t)(mark - data));
        uint32_t number = 0;
        for (int i = 1; i <= ANSWER_DIGITS; i++)
            number = number * 10 + (uint32_t)(mark[i] - '0');
        if (number < one->answer_room && one->answers[number].used)
            buffer_add(to, one->answers[number].data, one->answers[number].used);
        data = mark + 1 + ANSWER_DIGITS;
    }
    buffer_add(to, data, (size_t)(end - data));
}

/* Chooses the bytes that are sent: those of the request, or a copy with the responses that it names. */
static void assemble(struct user *one)
{
    const struct request *request = &requests[one->record.prompt];
    one->data = request->data;
    one->length = request->length;
    if (!request->answers)
        return;
    static struct buffer body;
    struct buffer *made = &one->assembled;
    char number[32];
    size_t head = request->length - request->body, found = 0;
    const char *value = header_value(request->data, head, "content-length", &found);
    body.used = made->used = 0;
    add_with_answers(one, &body, request->data + head, request->body);
    buffer_add(made, request->data, (size_t)(value - request->data));
    buffer_add(made, number, (size_t)snprintf(number, sizeof number, "%zu", body.used));
    buffer_add(made, value + found, head - (size_t)(value + found - request->data));
    buffer_add(made, body.data, body.used);
    one->data = made->data;
    one->length = made->used;
}

/* Chooses the step that begins now. Returns when it was due. */
static int64_t begin_step(struct user *one)
{
    int64_t due = arrivals ? one->due_at : one->record.begin;
    if (!one->step) {
        if (arrivals)
            due = begun_at + (int64_t)(arrivals[chains_begun] * SECOND);
        one->step = one->first_step = chains[chains_begun++ % chain_count];
        one->due_at = 0;
        for (uint32_t i = 0; i < one->answer_room; i++)
            one->answers[i].used = 0;
    }
    one->leave_events = one->step->leave_events;
    return due;
}

/* Ends the load if more requests are in flight than an engine that keeps up would have. */
static void check_in_flight(void)
{
    if (options.most_in_flight > 0 && (double)(active_count + waiting) > options.most_in_flight)
        stopping = exceeded = true;
}

static void begin(struct user *one)
{
    uint64_t sequence = issued++;
    bool counted = arrivals && !one->due_at; /* when it arrived */
    active_count++;
    memset(&one->record, 0, sizeof one->record);
    one->record.sequence = sequence;
    one->record.connection = one->number;
    one->record.begin = one->activity_at = now_ns();
    one->leave_events = (uint32_t)options.leave_events;
    if (chains)
        one->record.due = begin_step(one);
    else
        one->record.due = arrivals ? begun_at + (int64_t)(arrivals[sequence] * SECOND) : one->record.begin;
    one->record.flags = flag_at(one->record.due);
    if (chains) {
        one->record.prompt = one->step->request;
        measured_begun += one->record.flags == MEASURED;
    } else
        one->record.prompt = prompt_of(sequence, one->record.flags);
    assemble(one);
    one->record.prompt_tokens = one->record.tokens = one->record.cached_tokens = UNKNOWN;
    measured_active += one->record.flags == MEASURED && !counted;
    if (one->record.flags == MEASURED && !arrivals)
        all_measured_begun |= measured_begun == max_requests;
    one->active = true;
    one->sent = 0;
    one->part = HEAD;
    one->head.used = one->line.used = 0;
    one->status = 0;
    one->closes = one->has_content = one->is_error = one->is_done = one->done = one->failed = false;
    one->stamp = -1;
    if (options.leave_ms > 0)
        timer_set(&one->timer, one->record.begin + (int64_t)(options.leave_ms * MILLISECOND));
    if (one->fd >= 0) {
        one->record.flags |= REUSED;
        send_request(one);
    } else
        connect_user(one);
}

/* ---- schedule ---- */

static bool may_begin(void)
{
    return !stopping && (measuring || (issued < max_requests && (stop_at < 0 || now_ns() < stop_at)));
}

static void schedule_next(struct user *one)
{
    if (measuring && all_measured_begun && !measured_active)
        stopping = 1;
    int64_t rest = one->record.error == CONNECT || one->record.error == HTTP_STATUS || one->record.error == DISCONNECTED
                       ? SECOND / 10 /* no busy loop with a server that rejects every request */
                       : 0;
    if (one->step && !one->step->last && !stopping) {
        one->step++;
        one->due_at = now_ns() + (int64_t)(one->step->pause * SECOND) + rest;
        timer_set(&one->timer, one->due_at);
        return;
    }
    one->step = NULL;
    one->due_at = 0;
    if (arrivals) {
        if (waiting && !stopping) {
            waiting--;
            timer_set(&one->timer, 0); /* immediately, but not from within the code of its last request */
        } else
            idle[idle_count++] = one->number;
        return;
    }
    if (!may_begin()) {
        finished_users++;
        return;
    }
    int64_t pause = (think_count ? (int64_t)(think[one->record.sequence % think_count] * SECOND) : 0) + rest;
    timer_set(&one->timer, pause ? now_ns() + pause : 0);
}

static void on_timer(struct timer *one, int64_t now)
{
    if (one == &arrival) {
        timer_clear(one);
        measured_active += flag_at(begun_at + (int64_t)(arrivals[arrived] * SECOND)) == MEASURED;
        arrived++;
        if (idle_count)
            begin(&users[idle[--idle_count]]);
        else
            waiting++;
        check_in_flight();
        if (arrived < arrival_count)
            timer_set(one, begun_at + (int64_t)(arrivals[arrived] * SECOND));
        return;
    }
    if (one == &sweep) {
        timer_set(one, now + SECOND / 4);
        for (uint32_t i = 0; i < user_count; i++)
            if (users[i].active && now - users[i].activity_at > (int64_t)(options.timeout * SECOND))
                finish(&users[i], TIMEOUT);
        return;
    }
    struct user *user = (struct user *)one;
    timer_clear(one);
    if (user->active)
        finish(user, LEFT);
    else if (arrivals || may_begin()) {
        begin(user);
        check_in_flight();
    }
    else
        finished_users++;
}

static void on_socket(struct user *one, uint32_t what)
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
            one->activity_at = now_ns();
            receive(one, piece, (size_t)got);
        } else if (got > 0) {
            unsolicited++;
            disconnect(one);
        } else if (got != -2 && !one->active) {
            idle_closed++;
            disconnect(one);
        } else if (got != -2) {
            if (got == 0 && one->part == TO_CLOSE)
                end_of_response(one);
            else if (one->record.first_byte)
                finish(one, one->part == HEAD ? DISCONNECTED : CUT);
            else
                fail_or_retry(one, DISCONNECTED);
        }
    }
    if (one->fd >= 0 && one->active && one->connected && (what & EPOLLOUT))
        send_request(one);
}

static bool all_finished(void)
{
    if (arrivals)
        return (stopping || arrived == arrival_count) && !active_count && !waiting && idle_count == user_count;
    return finished_users == user_count;
}

/* Ends the users that wait for their next request. */
static void retire_idle(void)
{
    for (uint32_t i = 0; i < user_count; i++)
        if (!users[i].active && users[i].timer.place) {
            timer_clear(&users[i].timer);
            if (arrivals)
                idle[idle_count++] = i;
            else
                finished_users++;
        }
}

static void run(void)
{
    struct epoll_event found[512];
    int64_t give_up_at = INT64_MAX;
    while (!all_finished()) {
        int64_t now = now_ns();
        struct timer *first;
        for (int taken = 0; taken < 256 && (first = timer_first()) && first->at <= now; taken++)
            on_timer(first, now);
        if (measuring && window_ended(now) && !measured_active)
            stopping = 1;
        bool ending = measuring ? all_measured_begun
                                : stopping || (stop_at >= 0 && now >= stop_at) || issued >= max_requests ||
                                      (arrivals && arrived == arrival_count && !waiting);
        if (ending && give_up_at == INT64_MAX) {
            give_up_at = now + (int64_t)(options.drain * SECOND);
            if (!arrivals && !measuring)
                retire_idle();
        }
        if (stopping || now >= give_up_at) {
            stopping = 1;
            waiting = 0;
            timer_clear(&arrival);
            retire_idle();
            for (uint32_t i = 0; i < user_count; i++)
                if (users[i].active)
                    finish(&users[i], STOPPED);
            continue;
        }
        first = timer_first();
        int count = wait_until(epoll, found, 512, first ? first->at : now + SECOND / 4);
        for (int i = 0; i < count; i++)
            on_socket(found[i].data.ptr, found[i].events);
    }
}

/* ---- input and output ---- */

static char *map_file(const char *path, size_t *length)
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

static double *read_doubles(const char *path, size_t *count)
{
    size_t length;
    char *data = map_file(path, &length);
    if (!length || length % sizeof(double))
        refuse("not a list of doubles", path);
    *count = length / sizeof(double);
    return (double *)(void *)data;
}

/* Finds the responses that a request names. */
static void find_answers(struct request *request)
{
    size_t found;
    const char *end = request->data + request->length, *blank = memmem(request->data, request->length, "\r\n\r\n", 4);
    if (!blank || !header_value(request->data, (size_t)(blank + 4 - request->data), "content-length", &found))
        refuse("a request without content-length", options.requests);
    request->body = (uint32_t)(end - blank - 4);
    for (const char *at = blank + 4; (at = memchr(at, ANSWER, (size_t)(end - at))); at += 1 + ANSWER_DIGITS) {
        for (int i = 1; i <= ANSWER_DIGITS; i++)
            if (at + i >= end || at[i] < '0' || at[i] > '9')
                refuse("not the number of a step", options.requests);
        request->answers++;
    }
}

static void read_requests(void)
{
    size_t length, room = 0;
    const char *data = map_file(options.requests, &length);
    for (size_t at = 0; at < length;) {
        uint32_t one;
        if (length - at < sizeof one)
            refuse("the last request is cut off", options.requests);
        memcpy(&one, data + at, sizeof one);
        at += sizeof one;
        if (!one || one > length - at)
            refuse("the last request is cut off", options.requests);
        if (request_count == room)
            requests = resize(requests, (room = room ? room * 2 : 64) * sizeof *requests);
        requests[request_count] = (struct request){data + at, one, 0, 0};
        if (options.chains)
            find_answers(&requests[request_count]);
        request_count++;
        at += one;
    }
    if (!request_count)
        refuse("no requests", options.requests);
}

static uint32_t *read_order(const char *path, size_t *count)
{
    size_t length;
    uint32_t *found = (uint32_t *)(void *)map_file(path, &length);
    *count = length / sizeof *found;
    for (size_t i = 0; i < *count; i++)
        if (found[i] >= request_count)
            refuse("index beyond the last request", path);
    return found;
}

static void read_chains(void)
{
    size_t length;
    steps = (const struct step *)(void *)map_file(options.chains, &length);
    size_t count = length / sizeof *steps;
    if (!count || length % sizeof *steps || !steps[count - 1].last)
        refuse("not a list of chains", options.chains);
    chains = resize(NULL, count * sizeof *chains);
    for (size_t i = 0; i < count; i++) {
        if (steps[i].request >= request_count)
            refuse("index beyond the last request", options.chains);
        if (!i || steps[i - 1].last)
            chains[chain_count++] = &steps[i];
    }
}

static void read_headers(void)
{
    for (const char *at = options.label; at; at = (at = strchr(at, ',')) ? at + 1 : NULL) {
        size_t length = strcspn(at, ",");
        if (header_count == HEADERS || !length || length >= LABEL)
            refuse("--label: at most three header names", options.label);
        memcpy(headers[header_count++], at, length);
    }
}

static void read_arguments(int count, char **arguments)
{
    struct {
        const char *name, **text;
        double *number;
    } known[] = {
        {"--requests", &options.requests, NULL},    {"--records", &options.records, NULL},
        {"--events", &options.events, NULL},        {"--unix", &options.unix_path, NULL},
        {"--host", &options.host, NULL},            {"--label", &options.label, NULL},
        {"--arrivals", &options.arrivals, NULL},    {"--order", &options.order, NULL},
        {"--think", &options.think, NULL},          {"--tcp", NULL, &options.port},
        {"--others", &options.others, NULL},        {"--measure", NULL, &options.measure},
        {"--connections", NULL, &options.connections}, {"--seconds", NULL, &options.seconds},
        {"--count", NULL, &options.count},          {"--ramp", NULL, &options.ramp},
        {"--leave-after-events", NULL, &options.leave_events}, {"--leave-after-ms", NULL, &options.leave_ms},
        {"--chains", &options.chains, NULL},        {"--most-in-flight", NULL, &options.most_in_flight},
        {"--timeout", NULL, &options.timeout},      {"--drain", NULL, &options.drain},
    };
    for (int i = 1; i < count; i += 2) {
        size_t at = 0;
        while (at < sizeof known / sizeof *known && strcmp(known[at].name, arguments[i]))
            at++;
        if (at == sizeof known / sizeof *known)
            refuse("unknown argument", arguments[i]);
        if (i + 1 == count)
            refuse("missing value of", arguments[i]);
        if (known[at].text)
            *known[at].text = arguments[i + 1];
        else
            *known[at].number = number_of(arguments[i], arguments[i + 1]);
    }
    if (!options.requests || !options.records)
        refuse("missing argument", "--requests and --records");
    if (!options.unix_path && (options.port < 1 || options.port > 65535))
        refuse("missing argument", "--tcp PORT or --unix PATH");
    if (options.connections < 1 || options.connections > 100000)
        refuse("--connections", "between 1 and 100000");
    if (!options.arrivals && options.seconds < 0 && options.count < 0)
        refuse("missing argument", "--seconds, --count or --arrivals");
    if (options.chains && (options.measure < 0 || options.leave_events > 0))
        refuse("--chains", "with --measure, and without --leave-after-events");
    if (options.measure >= 0 && options.arrivals && options.seconds < 0)
        refuse("missing argument", "--seconds, beside --measure and --arrivals");
}

static FILE *output(const char *path, int which)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    FILE *made = fd < 0 ? NULL : fdopen(fd, "w");
    if (!made)
        fail(path);
    output_buffers[which] = resize(NULL, 1 << 20);
    setvbuf(made, output_buffers[which], _IOFBF, 1 << 20);
    return made;
}

/* Seconds in which this thread was runnable but did not run. */
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

static void print_summary(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_s = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                   (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("{\"begun\":%lld,\"ended\":%lld,\"cpu_s\":%.6f,\"waited_s\":%.6f,\"requests\":%llu,\"connects\":%llu,\"idle_closed\":%llu,"
           "\"unsolicited\":%llu,\"exceeded\":%d,\"labels\":[",
           (long long)begun_at, (long long)now_ns(), cpu_s, waited_s(), (unsigned long long)finished,
           (unsigned long long)connects, (unsigned long long)idle_closed, (unsigned long long)unsolicited, exceeded);
    for (uint16_t i = 0; i < label_count; i++)
        printf("%s\"%s\"", i ? "," : "", labels[i]);
    printf("]}\n");
}

int main(int count, char **arguments)
{
    _Static_assert(sizeof(struct record) == 96 && sizeof(struct step) == 24 && sizeof(struct event) == 24, "records.py has the same layout");
    read_arguments(count, arguments);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    read_requests();
    if (options.order)
        order = read_order(options.order, &order_count);
    if (options.others)
        others = read_order(options.others, &others_count);
    if (options.chains)
        read_chains();
    read_headers();
    if (options.think)
        think = read_doubles(options.think, &think_count);
    if (options.arrivals)
        arrivals = read_doubles(options.arrivals, &arrival_count);
    records = output(options.records, 0);
    if (options.events)
        events = output(options.events, 1);
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    if ((epoll = epoll_create1(EPOLL_CLOEXEC)) < 0)
        fail("epoll");
    user_count = (uint32_t)options.connections;
    users = calloc(user_count, sizeof *users);
    idle = calloc(user_count, sizeof *idle);
    if (!users || !idle)
        fail("memory");
    begun_at = now_ns();
    max_requests = arrivals ? arrival_count : options.count < 0 ? UINT64_MAX : (uint64_t)options.count;
    measuring = options.measure >= 0;
    measure_at = begun_at + (int64_t)(options.measure * SECOND);
    stop_at = options.seconds < 0 || (arrivals && !measuring) ? -1 : begun_at + (int64_t)(options.seconds * SECOND);
    for (uint32_t i = 0; i < user_count; i++) {
        users[i].number = i;
        users[i].fd = -1;
        if (arrivals)
            idle[idle_count++] = user_count - 1 - i;
        else
            timer_set(&users[i].timer, begun_at + (int64_t)(options.ramp * SECOND * i / user_count));
    }
    if (arrivals)
        timer_set(&arrival, begun_at + (int64_t)(arrivals[0] * SECOND));
    timer_set(&sweep, begun_at + SECOND / 4);
    printf("begun %lld\n", (long long)begun_at);
    fflush(stdout);
    run();
    if (fclose(records) || (events && fclose(events)))
        fail("the records");
    print_summary();
    return 0;
}
