"""Stores which replica keeps the responses of a session, so that `previous_response_id` finds them.

Only the engine that made a response has it. So a `/v1/responses` request that names an earlier response goes to exactly
the replica that made that response. If this replica is gone, the client gets an error and must send the whole
conversation, which any replica accepts. The header `x-session-id` identifies the session.

The sessions are kept in memory, up to a limit: the least recently used one is dropped first, and a restarted router
knows none. A worker keeps the turns that it served; the control process keeps the turns of all workers.
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
"""Engines that keep no responses. They accept `previous_response_id` and ignore it, so their response would lack the
earlier turns."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The replica that answered a session's last turn. `url` and `nonce` identify the server process, because a later
    replica may have the same name. `reason`: why the session's first turn was routed to this expert. `at`: time of the
    turn (`time.monotonic`)."""

    expert: str
    replica: str
    url: str
    nonce: str | None
    reason: RouteReason
    at: float = field(default=0.0, compare=False)  # seconds of the monotonic clock, which all processes of a host share

    def is_at(self, replica: Replica) -> bool:
        """Returns whether `replica` is the server process that answered the turn, and still serves the expert."""
        record = replica.record
        return (self.url, self.nonce) == (record.url, record.nonce) and self.expert in record.serves


@dataclass(slots=True)
class Sessions:
    """The last turn of each session, by session id, for the `most` sessions used last. `on_turn(session, turn)` is
    called for each turn that this process itself has served."""

    most: int = MAX_SESSIONS
    on_turn: Callable[[str, Turn], None] | None = None
    _turns: OrderedDict[str, Turn] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._turns)

    def __iter__(self) -> Iterator[tuple[str, Turn]]:
        """Returns pairs of session id and turn in order of last use, the most recent one last."""
        return iter(self._turns.items())

    def learn(self, session: str, turn: Turn) -> None:
        """Stores a turn that another process served, unless a later turn of the session is known."""
        known = self._turns.get(session)
        if known is None or known.at <= turn.at:
            self.note(session, turn)

    def note(self, session: str, turn: Turn) -> None:
        """Stores the session's last turn. Above the limit, drops the session whose last use is longest ago."""
        self._turns[session] = turn
        self._turns.move_to_end(session)
        if len(self._turns) > self.most:
            self._turns.popitem(last=False)

    def find(self, session: str) -> Turn | None:
        """Returns the session's last turn; None if the session is unknown. Counts as a use of the session."""
        turn = self._turns.get(session)
        if turn is not None:
            self._turns.move_to_end(session)
        return turn

    def answered(self, session: str, replica: Replica, expert: str, reason: RouteReason) -> None:
        """Stores that this replica has answered the session's last turn, and calls `on_turn`."""
        record = replica.record
        turn = Turn(expert, replica.name, record.url, record.nonce, reason, at=time.monotonic())
        self.note(session, turn)
        if self.on_turn is not None:
            self.on_turn(session, turn)

    def continued(
        self, session: str | None, fields: Mapping[str, Any], table: ReplicaTable, *, model: str
    ) -> tuple[Turn, Replica] | None:
        """Returns the turn that a request continues, and the replica that answered it; None if its body, `fields`, has
        no `previous_response_id`. `model`: the model that it names. Raises BadRequestError for an invalid request, and
        PreviousResponseNotFoundError if the client must send the whole conversation."""
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
    """Returns the session id in a request's headers, or else the one that a coding agent sends in a header of its own;
    None if there is none. Raises BadRequestError for an invalid id in `x-session-id`."""
    if protocol.SESSION_HEADER.encode() not in headers:
        others = (headers.text(name) for name in protocol.AGENT_SESSION_HEADERS if name.encode() in headers)
        return next(filter(_SESSION.fullmatch, others), None)
    header = headers.text(protocol.SESSION_HEADER)
    if not _SESSION.fullmatch(header):
        raise BadRequestError(
            f"{protocol.SESSION_HEADER} has 1 to 128 letters, digits and characters of _ . : @ / + = ~ -",
            param=protocol.SESSION_HEADER,
        )
    return header


def not_found(why: str) -> PreviousResponseNotFoundError:
    """Returns the error for a request whose `previous_response_id` cannot be served. `why` becomes part of its
    message."""
    message = f"the response that '{PARAM}' names cannot be reached: {why}; send the whole conversation as 'input'"
    return PreviousResponseNotFoundError(message, param=PARAM)
