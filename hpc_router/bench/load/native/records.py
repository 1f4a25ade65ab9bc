"""What the load generator wrote, as arrays: one row per request, one per event. The layout is `load.c`'s."""

from enum import IntEnum
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray


class Error(IntEnum):
    """How a request ended; in the order of `enum error` in load.c."""

    NONE = 0
    CONNECT = 1  # nobody listens
    DISCONNECTED = 2  # the connection broke before the answer
    BAD_HTTP = 3
    HTTP_STATUS = 4  # another than 200
    CUT = 5  # the connection broke in the midst of the answer
    UNFINISHED = 6  # the stream ended without [DONE]
    STREAM_ERROR = 7  # an event with an `error` key
    TIMEOUT = 8
    LEFT = 9  # by us, as asked
    STOPPED = 10  # by us: it was still under way at the end


REUSED: Final = 1
RETRIED: Final = 2
STREAM: Final = 4
MEASURED: Final = 8
FILLING: Final = 16
"""Bits of `flags`: over a kept connection; sent again as that was closed meanwhile; answered by an event stream; with
`measure_s`, what it counts for, neither bit meaning the warm-up."""
UNKNOWN: Final = 2**32 - 1
"""A number of tokens that the engine did not tell."""

REQUEST: Final = np.dtype(
    [
        ("sequence", "u8"),
        ("due", "i8"),  # this and the others: CLOCK_MONOTONIC in nanoseconds, 0 for never
        ("begin", "i8"),
        ("first_byte", "i8"),
        ("first_event", "i8"),
        ("end", "i8"),
        ("bytes", "u8"),  # of the body
        ("prompt", "u4"),
        ("connection", "u4"),
        ("events", "u4"),  # with content
        ("status", "u2"),
        ("label", "u2"),  # of the first header asked for; 0: none, else a position, from one, in the summary's labels
        ("second", "u2"),  # of the next ones
        ("third", "u2"),
        ("error", "u1"),
        ("flags", "u1"),
        ("padding", "V2"),
        ("prompt_tokens", "u4"),
        ("tokens", "u4"),
    ]
)
EVENT: Final = np.dtype([("sequence", "u8"), ("at", "i8"), ("hop", "i8")])

Table = NDArray[np.void]


def read_requests(path: Path) -> Table:
    """In the order in which they ended."""
    return np.fromfile(path, dtype=REQUEST)


def read_events(path: Path) -> Table:
    return np.fromfile(path, dtype=EVENT)


def errors(requests: Table) -> dict[str, int]:
    """How many requests failed, by kind; the statuses of answers count as kinds of their own."""
    counted: dict[str, int] = {}
    for kind in Error:
        rows = requests[requests["error"] == kind]
        if kind is Error.HTTP_STATUS:
            for status, count in zip(*np.unique(rows["status"], return_counts=True), strict=True):
                counted[f"http_{status}"] = int(count)
        elif kind is not Error.NONE and len(rows):
            counted[kind.name.lower()] = len(rows)
    return counted
