"""Whether what answers at a router's address is that router: asked before the owner's token goes there.

A record outlives a router that was killed, and any user of its node may bind its port then. The router alone answers a
challenge rightly: with a key made of the deployment's secret and the nonce in its record (`auth`). A proof tells of one
moment, so it holds for `PROOF_S` and until the first doubt. This knows no token, no run and no HTTP library.
"""

import json
import math
import socket
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final
from urllib.parse import urlsplit

from hpc_router.net.auth import challenge_answer, new_token, replica_key, same
from hpc_router.net.protocol import HEALTH, ProbeResponse
from hpc_router.state.registry import Record

PROOF_S: Final = 10.0
PATIENCE_S: Final = 2.0
MAX_RESPONSE_BYTES: Final = 2**16


class IdentityCheck(StrEnum):
    """Who is at the address, in words that follow "router-0.g1 at http://...: "."""

    PROVEN = "it is the router"
    NOBODY = "no process answers there"
    STRANGER = "something else answers there, and was not given the token"
    OLDER = "it was started by an older version and has no nonce to prove itself with; restart it"


def proves(answer: object, *, record: Record, secret: str, challenge: str) -> bool:
    """Whether this JSON from `/health` is that of the record's owner. Pure."""
    health = ProbeResponse.from_json(answer) if isinstance(answer, dict) else None
    if health is None or health.replica != record.replica or not record.nonce:
        return False
    return same(health.answer or "", challenge_answer(replica_key(secret, record.nonce), challenge))


def examine(record: Record, secret: str, *, patience_s: float = PATIENCE_S) -> IdentityCheck:
    """Ask whoever is there. `patience_s` bounds all of it, however slowly a stranger drips."""
    if not record.nonce:
        return IdentityCheck.OLDER
    challenge = new_token()
    try:
        answer = _get(record.url, f"{HEALTH}?challenge={challenge}", deadline=time.monotonic() + patience_s)
        proven = proves(json.loads(answer), record=record, secret=secret, challenge=challenge)
    except OSError:
        return IdentityCheck.NOBODY
    except (ValueError, RecursionError):
        return IdentityCheck.STRANGER
    return IdentityCheck.PROVEN if proven else IdentityCheck.STRANGER


def _get(url: str, target: str, *, deadline: float) -> bytes:
    """The body, by HTTP/1.0, where it ends with the connection. By hand: no library bounds the whole of it."""
    at = urlsplit(url)
    if at.scheme != "http" or not at.hostname:
        raise ValueError(f"{url!r} is not the address of a router")
    with socket.create_connection((at.hostname, at.port or 80), timeout=_left_s(deadline)) as sock:
        sock.sendall(f"GET {target} HTTP/1.0\r\nHost: {at.netloc}\r\n\r\n".encode("ascii"))
        raw = b""
        while len(raw) <= MAX_RESPONSE_BYTES:
            sock.settimeout(_left_s(deadline))
            piece = sock.recv(MAX_RESPONSE_BYTES)
            if not piece and not raw:
                raise ConnectionError("no answer")
            if not piece:
                return raw.partition(b"\r\n\r\n")[2]
            raw += piece
    raise ValueError("an endless answer")


def _left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("no answer in time")
    return left_s


@dataclass(frozen=True, slots=True)
class _Asked:
    owner: tuple[Any, ...]
    finding: IdentityCheck
    begun_at: float
    ended_at: float


class Proof:
    """What one client found out last, for all its requests. Pure: times are given, on one monotonic clock."""

    def __init__(self) -> None:
        self._last: _Asked | None = None
        self._doubted_at = -math.inf

    def doubt(self, now: float) -> None:
        """Something went wrong there: what was asked before tells nothing any more."""
        self._doubted_at = max(self._doubted_at, now)

    def learn(self, router: Record, finding: IdentityCheck, *, begun_at: float, ended_at: float) -> None:
        if self._last is None or self._last.begun_at <= begun_at:
            self._last = _Asked(_owner(router), finding, begun_at, ended_at)

    def of(self, router: Record, *, since: float, now: float) -> IdentityCheck | None:
        """For a request that wants to know `since` then; None: ask. A failure serves those who waited for it."""
        last = self._last
        if last is None or last.owner != _owner(router) or last.begun_at <= self._doubted_at:
            return None
        holds = now - last.begun_at <= PROOF_S if last.finding is IdentityCheck.PROVEN else last.ended_at >= since
        return last.finding if holds else None


def _owner(router: Record) -> tuple[Any, ...]:
    return router.url, router.nonce, router.replica
