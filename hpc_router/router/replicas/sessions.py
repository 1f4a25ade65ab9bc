"""Which replica keeps the responses of a session, so that `previous_response_id` finds them.

Only the engine that gave a response has it. So a `/v1/responses` request that names an earlier response goes to exactly
the replica that answered before; if that is gone, the client gets an error and must send the whole conversation, which
any replica takes. `x-session-id` identifies the session. Kept in memory and bounded: the least recently used session is
dropped first, and a restarted router knows none. A worker keeps the turns it served, the control process those of all.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from hpc_router.errors import BadRequestError, PreviousResponseNotFoundError
from hpc_router.net import protocol
from hpc_router.relay.headers import Headers
from hpc_router.router.replicas.replica import Replica, RoutingState
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.routing.policy import RouteReason

MAX_SESSIONS: Final = 100_000
PARAM: Final = "previous_response_id"
_SESSION: Final = re.compile(r"[\w.:@/+=~-]{1,128}", re.ASCII)
STATELESS_ENGINES: Final = frozenset({"transformers"})
"""Engines that keep no responses. They accept `previous_response_id` and ignore it: their answer would lack the earlier
turns."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a session's last turn was answered. `reason`: why its first turn went there.

    `url` and `nonce` identify the server process, because a replica's name may be used again.
    """

    expert: str
    replica: str
    url: str
    nonce: str | None
    reason: RouteReason
    at: float = field(default=0.0, compare=False)  # seconds of the monotonic clock, which all processes of a host share

    def is_at(self, replica: Replica) -> bool:
        record = replica.record
        return (self.url, self.nonce) == (record.url, record.nonce) and self.expert in record.serves


@dataclass(slots=True)
class Sessions:
    """Session id -> its last turn, for the `most` sessions used last. `on_turn` is called with each new turn."""

    most: int = MAX_SESSIONS
    on_turn: Callable[[str, Turn], None] | None = None
    _turns: OrderedDict[str, Turn] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._turns)

    def __iter__(self) -> Iterator[tuple[str, Turn]]:
        """In order of last use, the latest last."""
        return iter(self._turns.items())

    def learn(self, session: str, turn: Turn) -> None:
        """Store a turn of another process, unless a later one is known."""
        known = self._turns.get(session)
        if known is None or known.at <= turn.at:
            self.note(session, turn)

    def note(self, session: str, turn: Turn) -> None:
        self._turns[session] = turn
        self._turns.move_to_end(session)
        if len(self._turns) > self.most:
            self._turns.popitem(last=False)

    def find(self, session: str) -> Turn | None:
        turn = self._turns.get(session)
        if turn is not None:
            self._turns.move_to_end(session)
        return turn

    def answered(self, session: str, replica: Replica, expert: str, reason: RouteReason) -> None:
        """Store that this replica answered the session's turn."""
        record = replica.record
        turn = Turn(expert, replica.name, record.url, record.nonce, reason, at=time.monotonic())
        self.note(session, turn)
        if self.on_turn is not None:
            self.on_turn(session, turn)

    def continued(
        self, session: str | None, fields: Mapping[str, Any], table: ReplicaTable, *, model: str
    ) -> tuple[Turn, Replica] | None:
        """The turn that a body continues, and the replica that has it; None without `previous_response_id`.

        Raises BadRequestError, and PreviousResponseNotFoundError if the client must send the whole conversation.
        """
        previous = fields.get(PARAM)
        if previous is None:
            return None
        if not isinstance(previous, str):
            raise BadRequestError(f"'{PARAM}' must be a string", param=PARAM)
        if session is None:
            raise BadRequestError(
                f"'{PARAM}' needs the header {protocol.SESSION_HEADER}, the same in every turn, because the response "
                "is kept where it was made; or send the whole conversation as 'input'",
                param=PARAM,
            )
        turn = self.find(session)
        if turn is None:
            raise not_found("this session has no earlier turn here")
        if model not in ("auto", turn.expert):
            raise BadRequestError(
                f"the responses of this session are kept by {turn.expert!r} (valid: auto, {turn.expert})", param="model"
            )
        replica = table.get(turn.replica)
        if replica is None or not turn.is_at(replica):
            raise not_found(f"{turn.replica}, which answered the last turn, is gone")
        if replica.state is not RoutingState.READY:
            raise not_found(f"{turn.replica}, which answered the last turn, is {replica.state.value}")
        if replica.record.engine.kind in STATELESS_ENGINES:
            raise not_found(f"{turn.replica} runs {replica.record.engine.kind}, which keeps no responses")
        return turn, replica


def session_id(headers: Headers) -> str | None:
    """The session of a request, if it has one. Raises BadRequestError for an invalid id."""
    if protocol.SESSION_HEADER.encode() not in headers:
        return None
    header = headers.text(protocol.SESSION_HEADER)
    if not _SESSION.fullmatch(header):
        raise BadRequestError(
            f"{protocol.SESSION_HEADER} has 1 to 128 letters, digits and characters of _ . : @ / + = ~ -",
            param=protocol.SESSION_HEADER,
        )
    return header


def not_found(why: str) -> PreviousResponseNotFoundError:
    message = f"the response that '{PARAM}' names cannot be reached: {why}; send the whole conversation as 'input'"
    return PreviousResponseNotFoundError(message, param=PARAM)
