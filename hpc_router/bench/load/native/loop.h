/* Shared by load.c and engine.c: clock, growing buffers, timers, waiting for sockets, HTTP header fields.
 *
 * Timers form a binary heap of pointers; each timer is a member of the structure that owns it, and its `place` in the
 * heap is 0 while it is not set.
 */
#ifndef LOOP_H
#define LOOP_H

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define MILLISECOND 1000000LL

static inline int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

static inline void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static inline void refuse(const char *what, const char *value)
{
    fprintf(stderr, "%s: %s\n", what, value);
    exit(2);
}

static inline void *resize(void *memory, size_t bytes)
{
    void *made = realloc(memory, bytes);
    if (!made)
        fail("memory");
    return made;
}

struct buffer {
    char *data;
    size_t used, room;
};

static inline void buffer_add(struct buffer *to, const char *data, size_t length)
{
    if (to->used + length > to->room) {
        to->room = (to->used + length) * 2;
        to->data = resize(to->data, to->room);
    }
    memcpy(to->data + to->used, data, length);
    to->used += length;
}

static inline void buffer_drop(struct buffer *from, size_t length)
{
    memmove(from->data, from->data + length, from->used - length);
    from->used -= length;
}

static inline void buffer_free(struct buffer *one)
{
    free(one->data);
    memset(one, 0, sizeof *one);
}

struct timer {
    int64_t at;
    size_t place;
};

static struct timer **timers;
static size_t timer_count, timer_room;

static inline void timer_put(size_t place, struct timer *one)
{
    timers[place - 1] = one;
    one->place = place;
}

static inline void timer_sift(struct timer *one)
{
    size_t place = one->place;
    while (place > 1 && timers[place / 2 - 1]->at > one->at) {
        timer_put(place, timers[place / 2 - 1]);
        place /= 2;
    }
    for (size_t child; (child = place * 2) <= timer_count; place = child) {
        if (child < timer_count && timers[child]->at < timers[child - 1]->at)
            child++;
        if (timers[child - 1]->at >= one->at)
            break;
        timer_put(place, timers[child - 1]);
    }
    timer_put(place, one);
}

static inline void timer_set(struct timer *one, int64_t at)
{
    one->at = at;
    if (!one->place) {
        if (timer_count == timer_room) {
            timer_room = timer_room ? timer_room * 2 : 256;
            timers = resize(timers, timer_room * sizeof *timers);
        }
        timer_put(++timer_count, one);
    }
    timer_sift(one);
}

static inline void timer_clear(struct timer *one)
{
    if (!one->place)
        return;
    struct timer *last = timers[--timer_count];
    size_t place = one->place;
    one->place = 0;
    if (last != one) {
        timer_put(place, last);
        timer_sift(last);
    }
}

static inline struct timer *timer_first(void)
{
    return timer_count ? timers[0] : NULL;
}

/* Waits for socket events until `deadline`; returns their number, or -1 if a signal interrupted the wait. */
static inline int wait_until(int epoll, struct epoll_event *events, int room, int64_t deadline)
{
    int64_t left = deadline - now_ns();
    if (left < 0)
        left = 0;
#ifdef SYS_epoll_pwait2
    static bool missing;
    if (!missing) {
        struct timespec span = {left / SECOND, left % SECOND};
        long found = syscall(SYS_epoll_pwait2, epoll, events, room, &span, NULL, 0);
        if (found >= 0 || errno == EINTR)
            return (int)found;
        missing = true;
    }
#endif
    int found = epoll_wait(epoll, events, room, (int)((left + MILLISECOND - 1) / MILLISECOND));
    if (found < 0 && errno != EINTR)
        fail("epoll");
    return found;
}

/* The value of a header field in `head` (which includes the start line), without surrounding spaces; NULL if absent. */
static inline const char *header_value(const char *head, size_t length, const char *name, size_t *found)
{
    size_t wanted = strlen(name);
    const char *end = head + length, *line = memchr(head, '\n', length);
    while (line && ++line < end) {
        const char *next = memchr(line, '\n', (size_t)(end - line));
        const char *stop = next ? next : end;
        if ((size_t)(stop - line) > wanted && line[wanted] == ':' && !strncasecmp(line, name, wanted)) {
            const char *value = line + wanted + 1;
            while (value < stop && (*value == ' ' || *value == '\t'))
                value++;
            while (stop > value && (stop[-1] == '\r' || stop[-1] == ' ' || stop[-1] == '\t'))
                stop--;
            *found = (size_t)(stop - value);
            return value;
        }
        line = next;
    }
    return NULL;
}

/* Whether a comma-separated header value contains this token. */
static inline bool has_token(const char *value, size_t length, const char *token)
{
    size_t wanted = strlen(token);
    for (size_t at = 0; at + wanted <= length; at++) {
        bool begins = at == 0 || strchr(", \t", value[at - 1]);
        bool ends = at + wanted == length || strchr(", \t;", value[at + wanted]);
        if (begins && ends && !strncasecmp(value + at, token, wanted))
            return true;
    }
    return false;
}

static inline struct sockaddr_un unix_address(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        refuse("the path of the unix socket is too long", path);
    strcpy(address.sun_path, path);
    return address;
}

static inline double number_of(const char *name, const char *text)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || value < 0)
        refuse(name, text);
    return value;
}

#endif
