"""Checks that the process at a router's address is that router, before it gets a token.

A killed router leaves its record behind, and any user of that node may then bind its port. Only the router can answer a
challenge, because it has the deployment's secret, the digests of the users' tokens and the nonce of its record
(`net.auth`). The owner's clients check the answer with the secret, those of other users with the digest of their own
token. A positive result is valid for `PROOF_S` seconds, or until a request fails. This module knows no runs and no HTTP
library: the in-cluster client loads an HTTP library only when it is used.
"""

import contextlib
import json
import math
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final
from urllib.parse import urlsplit

from hpc_router.net.auth import challenge_answer, equal_secrets, new_token, replica_key, token_digest, user_key
from hpc_router.net.protocol import ProbeResponse, challenge_target
from hpc_router.net.tls import client_context
from hpc_router.state.registry import Record
from hpc_router.state.user_tokens import token_id

PROOF_S: Final = 10.0
CHECK_TIMEOUT_S: Final = 2.0
MAX_RESPONSE_BYTES: Final = 2**16


class IdentityCheck(StrEnum):
    """The result of an identity check. Its text ends an error message that begins with a router's name and address."""

    PROVEN = "it is the router"
    UNREACHABLE = "no process answers there"
    TOKEN_UNKNOWN = "it does not know this token, which was not sent: it was revoked, or belongs to another run"
    OTHER_PROCESS = "something else answers there, and was not given the token"
    NO_NONCE = "an older version started it, so its record has no nonce to check it with; restart it"


def proves(answer: object, *, record: Record, key: str, challenge: str) -> bool:
    """Returns whether `answer`, the JSON from `/health`, solves `challenge` as only the owner of `record` can. `key`:
    the key that the client shares with that router. Pure."""
    health = ProbeResponse.from_json(answer) if isinstance(answer, dict) else None
    if health is None or health.replica != record.replica or not record.nonce:
        return False
    return equal_secrets(health.answer or "", challenge_answer(key, challenge))


def check_identity(record: Record, secret: str, *, timeout_s: float = CHECK_TIMEOUT_S) -> IdentityCheck:
    """Sends a challenge to the address in `record` and checks that the router of that record has answered. Blocks for
    at most `timeout_s` seconds, even if the response arrives slowly."""
    if not record.nonce:
        return IdentityCheck.NO_NONCE
    return _check(record, replica_key(secret, record.nonce), token=None, timeout_s=timeout_s)


def check_identity_to_user(record: Record, token: str, *, timeout_s: float = CHECK_TIMEOUT_S) -> IdentityCheck:
    """Like `check_identity`, but for a user who has a token and not the secret: the router must know the token. Sends
    the token's ID and not the token."""
    if not record.nonce:
        return IdentityCheck.NO_NONCE
    return _check(record, user_key(token_digest(token), record.nonce), token=token_id(token), timeout_s=timeout_s)


def _check(record: Record, key: str, *, token: str | None, timeout_s: float) -> IdentityCheck:
    """Sends a challenge that the router must answer with `key`. `token`: ID of the user's token; None: the owner's."""
    challenge = new_token()
    target = challenge_target(challenge, token_id=token)
    try:
        answer = json.loads(_get(record, target, deadline=time.monotonic() + timeout_s))
        proven = proves(answer, record=record, key=key, challenge=challenge)
    except ssl.SSLError:
        return IdentityCheck.OTHER_PROCESS
    except OSError:
        return IdentityCheck.UNREACHABLE
    except (ValueError, RecursionError):
        return IdentityCheck.OTHER_PROCESS
    if not proven and token is not None and _knows_no_token(answer, record):
        return IdentityCheck.TOKEN_UNKNOWN
    return IdentityCheck.PROVEN if proven else IdentityCheck.OTHER_PROCESS


def _knows_no_token(answer: object, record: Record) -> bool:
    """Returns whether the process claims to be the router of `record` and not to know the token. This claim cannot be
    proven to the client, but it only ends the request."""
    return isinstance(answer, dict) and answer.get("replica") == record.replica and answer.get("answer", "") is None


def _get(record: Record, target: str, *, deadline: float) -> bytes:
    """Sends `GET target` as HTTP/1.0 to the address in `record` and returns the response's body. Uses a plain socket,
    because no HTTP library limits the time of a whole response. `deadline`: monotonic seconds. Raises OSError, and
    ValueError for a bad address or for more than `MAX_RESPONSE_BYTES`."""
    at = urlsplit(record.url)
    if at.scheme != ("http" if record.certificate is None else "https") or not at.hostname or not at.port:
        raise ValueError(f"{record.url!r} is not the address of a router")
    with _connected(at.hostname, at.port, record.certificate, deadline=deadline) as sock:
        sock.sendall(f"GET {target} HTTP/1.0\r\nHost: {at.netloc}\r\n\r\n".encode("ascii"))
        raw = b""
        while len(raw) <= MAX_RESPONSE_BYTES:
            sock.settimeout(_left_s(deadline))
            chunk = sock.recv(MAX_RESPONSE_BYTES)
            if not chunk and not raw:
                raise ConnectionError("no response")
            if not chunk:
                return raw.partition(b"\r\n\r\n")[2]
            raw += chunk
    raise ValueError(f"the response is longer than {MAX_RESPONSE_BYTES} bytes")


@contextlib.contextmanager
def _connected(host: str, port: int, certificate: str | None, *, deadline: float) -> Iterator[socket.socket]:
    """Yields a socket that is connected to a router, and closes it after the block. `certificate`: the router's, in
    PEM; None: no TLS. `deadline`: monotonic seconds. Raises OSError."""
    with socket.create_connection((host, port), timeout=_left_s(deadline)) as sock:
        if certificate is None:
            yield sock
            return
        sock.settimeout(_left_s(deadline))
        with client_context(certificate).wrap_socket(sock) as secured:
            yield secured


def _left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("no response within the time limit")
    return left_s


@dataclass(frozen=True, slots=True)
class _CheckedRouter:
    owner: tuple[Any, ...]
    result: IdentityCheck
    begun_at: float
    ended_at: float


class IdentityCache:
    """Stores the last identity check of one client for all its requests. Pure: times are arguments, in seconds of one
    monotonic clock."""

    def __init__(self) -> None:
        self._last: _CheckedRouter | None = None
        self._invalid_before = -math.inf

    def invalidate(self, now: float) -> None:
        """Discards results of checks that began before `now`. Called after a failed request."""
        self._invalid_before = max(self._invalid_before, now)

    def store(self, router: Record, result: IdentityCheck, *, begun_at: float, ended_at: float) -> None:
        """Stores `result`, unless the result of a check that began later is stored."""
        if self._last is None or self._last.begun_at <= begun_at:
            self._last = _CheckedRouter(_owner(router), result, begun_at, ended_at)

    def lookup(self, router: Record, *, since: float, now: float) -> IdentityCheck | None:
        """Returns the stored result for a request that began at `since`; None if the router must be checked now. A
        positive result is valid for `PROOF_S` seconds. A negative one is valid only for requests that began before its
        check ended."""
        last = self._last
        if last is None or last.owner != _owner(router) or last.begun_at <= self._invalid_before:
            return None
        holds = now - last.begun_at <= PROOF_S if last.result is IdentityCheck.PROVEN else last.ended_at >= since
        return last.result if holds else None


def _owner(router: Record) -> tuple[Any, ...]:
    return router.url, router.nonce, router.replica, router.certificate
