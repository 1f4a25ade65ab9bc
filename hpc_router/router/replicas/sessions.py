"""Where the responses of a session are kept, so that `previous_response_id` finds them.

An engine keeps the responses it gave, and no other engine has them. So the turn of `/v1/responses` that names an
earlier one goes to exactly the replica that answered before, or nowhere: the client is told to send the whole
conversation, which goes anywhere. `x-session-id` says which turns belong together. Memory only, and bounded: the
session unused for longest is forgotten first, and a router that starts anew knows none. Each worker keeps the turns it
served, the control process those of all.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, Final, Self

from hpc_router.errors import BadRequestError, PreviousResponseNotFoundError
from hpc_router.net import protocol
from hpc_router.relay.headers import Headers
from hpc_router.router.replicas.replica import Replica, RoutingState
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.routing.policy import RouteReason

MAX_SESSIONS: Final = 100_000
PARAM: Final = "previous_response_id"
_SESSION: Final = re.compile(r"[\w.:@/+=~-]{1,128}", re.ASCII)
_FORGETFUL: Final = frozenset({"transformers"})
"""Engines that take `previous_response_id` and ignore it: their answer would have forgotten what was said."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a session's last turn was answered. `reason`: why its first one went there.

    A name may come to stand for another server: `url` and `nonce` tell them apart.
    """

    expert: str
    replica: str
    url: str
    nonce: str | None
    reason: RouteReason
    at: float = field(default=0.0, compare=False)  # on the clock that all processes of a host share

    def to_json(self) -> list[Any]:
        return list(astuple(self))

    @classmethod
    def from_json(cls, value: list[Any]) -> Self:
        expert, replica, url, nonce, reason, at = value
        return cls(expert, replica, url, nonce, RouteReason(reason), at)

    def is_at(self, replica: Replica) -> bool:
        record = replica.record
        return (self.url, self.nonce) == (record.url, record.nonce) and self.expert in record.serves


@dataclass(slots=True)
class Sessions:
    """Session id -> its last turn, for the `most` sessions used last. `on_turn` is told of each new one."""

    most: int = MAX_SESSIONS
    on_turn: Callable[[str, Turn], None] | None = None
    _turns: OrderedDict[str, Turn] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._turns)

    def __iter__(self) -> Iterator[tuple[str, Turn]]:
        """The one used last comes last."""
        return iter(self._turns.items())

    def learn(self, session: str, turn: Turn) -> None:
        """What another process noted; the later turn counts."""
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
        """The turn that began at this replica continues there."""
        record = replica.record
        turn = Turn(expert, replica.name, record.url, record.nonce, reason, at=time.monotonic())
        self.note(session, turn)
        if self.on_turn is not None:
            self.on_turn(session, turn)

    def continued(
        self, session: str | None, fields: Mapping[str, Any], table: ReplicaTable, *, model: str
    ) -> tuple[Turn, Replica] | None:
        """The turn that a body continues, and the replica that has it; None for a body that continues nothing.

        Raises BadRequestError, and PreviousResponseNotFoundError where only the whole conversation would help.
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
        if replica.standing is not RoutingState.READY:
            raise not_found(f"{turn.replica}, which answered the last turn, is {replica.standing.value}")
        if replica.record.engine.kind in _FORGETFUL:
            raise not_found(f"{turn.replica} runs {replica.record.engine.kind}, which keeps no responses")
        return turn, replica


def session_id(headers: Headers) -> str | None:
    """The session of a request. Raises BadRequestError for an id that is none."""
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
