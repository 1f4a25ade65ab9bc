"""Reads the load generator's output as arrays with one row per request or event. `load.c` defines the layout."""

from enum import IntEnum
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray


class Error(IntEnum):
    """The outcome of a request, in the order of `enum error` in load.c."""

    NONE = 0
    CONNECT = 1  # the connection was refused
    DISCONNECTED = 2  # the connection was closed before the response
    BAD_HTTP = 3
    HTTP_STATUS = 4  # the status was not 200
    CUT = 5  # the connection was closed during the response
    UNFINISHED = 6  # the stream ended without [DONE]
    STREAM_ERROR = 7  # an event with an `error` key
    TIMEOUT = 8
    LEFT = 9  # the client disconnected, as specified
    STOPPED = 10  # the client stopped the request at the end of the load


REUSED: Final = 1
RETRIED: Final = 2
STREAM: Final = 4
MEASURED: Final = 8
FILLING: Final = 16
"""Bits of `flags`. REUSED: sent on a kept-alive connection. RETRIED: sent again because that connection was closed.
STREAM: the response was an event stream. MEASURED, FILLING: the part of the load; both are unset in the warm-up."""
UNKNOWN: Final = 2**32 - 1
"""The value for a number of tokens that the engine did not report."""

REQUEST: Final = np.dtype(
    [
        ("sequence", "u8"),
        ("due", "i8"),  # all times: CLOCK_MONOTONIC in nanoseconds; 0 if it did not happen
        ("begin", "i8"),
        ("first_byte", "i8"),
        ("first_event", "i8"),
        ("end", "i8"),
        ("bytes", "u8"),  # of the body
        ("prompt", "u4"),
        ("connection", "u4"),
        ("events", "u4"),  # with content
        ("status", "u2"),
        ("label", "u2"),  # first recorded header: 0 if absent, else its position, from 1, in the summary's labels
        ("second", "u2"),  # second and third recorded header
        ("third", "u2"),
        ("error", "u1"),
        ("flags", "u1"),
        ("padding", "V2"),
        ("prompt_tokens", "u4"),
        ("tokens", "u4"),
        ("cached_tokens", "u4"),
        ("reserved", "V4"),
    ]
)
STEP: Final = np.dtype(
    [("request", "u4"), ("leave_events", "u4"), ("pause_s", "f8"), ("last", "u4"), ("reserved", "u4")]
)
"""A request of a chain: `leave_events` 0 for no early disconnect, `last` 1 at the end of the chain."""
EVENT: Final = np.dtype([("sequence", "u8"), ("at", "i8"), ("hop", "i8")])

Table = NDArray[np.void]


def read_requests(path: Path) -> Table:
    """Reads the request records, in the order in which the requests ended."""
    return np.fromfile(path, dtype=REQUEST)


def read_events(path: Path) -> Table:
    return np.fromfile(path, dtype=EVENT)


def errors(requests: Table) -> dict[str, int]:
    """Returns the number of failed requests per kind of error. Each HTTP status is a separate kind."""
    counted: dict[str, int] = {}
    for kind in Error:
        rows = requests[requests["error"] == kind]
        if kind is Error.HTTP_STATUS:
            for status, count in zip(*np.unique(rows["status"], return_counts=True), strict=True):
                counted[f"http_{status}"] = int(count)
        elif kind is not Error.NONE and len(rows):
            counted[kind.name.lower()] = len(rows)
    return counted
