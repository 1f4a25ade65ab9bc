"""Keeps the last requests, byte for byte, so that tests can show that a router relays requests unchanged.

The number and total size are limited. If a body does not fit, only its length and hash are kept.
"""

import base64
import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

MAX_REQUESTS = 64
MAX_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One received request. `headers` keep their order, case and repetitions. `body` is None if it was too large to
    keep."""

    method: str
    path: str
    http_version: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes | None
    body_bytes: int
    body_sha256: str

    def header(self, name: str) -> str | None:
        """Returns the first header of that name, in any case."""
        lowered = name.lower().encode()
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == lowered), None)

    def to_json(self) -> dict[str, object]:
        return {
            "method": self.method,
            "path": self.path,
            "http_version": self.http_version,
            "headers": [[key.decode("latin-1"), value.decode("latin-1")] for key, value in self.headers],
            "body_base64": None if self.body is None else base64.b64encode(self.body).decode(),
            "body_bytes": self.body_bytes,
            "body_sha256": self.body_sha256,
        }


class RequestLog:
    """The log of one engine."""

    def __init__(self, *, max_requests: int = MAX_REQUESTS, max_bytes: int = MAX_BYTES) -> None:
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._requests: deque[Received] = deque()
        self._bytes = 0

    def add(
        self, *, method: str, path: str, http_version: str, headers: Iterable[tuple[bytes, bytes]], body: bytes
    ) -> None:
        fits = len(body) <= self._max_bytes
        received = Received(
            method=method,
            path=path,
            http_version=http_version,
            headers=tuple(headers),
            body=body if fits else None,
            body_bytes=len(body),
            body_sha256=hashlib.sha256(body).hexdigest(),
        )
        self._requests.append(received)
        self._bytes += len(received.body or b"")
        while len(self._requests) > self._max_requests or self._bytes > self._max_bytes:
            self._bytes -= len(self._requests.popleft().body or b"")

    def last(self, count: int = 1) -> list[Received]:
        """Returns the newest `count` requests, oldest first."""
        return list(self._requests)[-count:] if count > 0 else []

    def clear(self) -> None:
        self._requests.clear()
        self._bytes = 0
