"""The HTTP protocol between router and agent, and between the agents of an engine on several nodes.

`GET /health?challenge=HEX` needs no token; the response is a `ProbeResponse` as JSON. With `&token=ID`, a router
answers with the key of the user whose token has this ID. `POST /drain` and the API paths need `Authorization: Bearer
<replica key>`. A draining agent answers new requests with 503 and `DRAINING_HEADER`. `POST /rank` takes a `RankReport`,
which contains a token of its own; the response is a `RankOrder`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Self
from urllib.parse import parse_qs, urlsplit

API_ROOT: Final = "/v1"
HEALTH: Final = "/health"
DRAIN: Final = "/drain"
RANK: Final = "/rank"
HANDOVER: Final = "/handover"
"""Path at which a router's successor fetches its session turns, with the router's replica key."""
METRICS: Final = "/metrics"
FEEDBACK: Final = "/feedback"
"""Path at which a client gives a score to an earlier request."""
FILES: Final = "/v1/files"
BATCHES: Final = "/v1/batches"
MODELS: Final = "/v1/models"
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
EMBEDDINGS: Final = "/v1/embeddings"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
COUNT_TOKENS: Final = "/v1/messages/count_tokens"
GENERATE_PATHS: Final = (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES)
INCOMPARABLE_PATHS: Final = (
    *(EMBEDDINGS, "/tokenize", "/detokenize"),
    *("/v1/score", "/score", "/v1/rerank", "/rerank", "/v2/rerank"),
)
"""API paths whose results cannot be compared between experts (vectors, tokens, scores), so a request must name its
expert."""
POST_PATHS: Final = (*GENERATE_PATHS, COUNT_TOKENS, *INCOMPARABLE_PATHS[1:])
"""API paths whose requests are relayed to the expert that `model` in the body names. All are POST; some engines lack
some of them."""
STORED_RESPONSE: Final = re.compile(rf"{RESPONSES}/([A-Za-z0-9][\w.:=-]{{0,255}})(|/cancel|/input_items)", re.ASCII)
"""The path of a stored response, with its id, or of an operation on it."""
STORED_METHODS: Final[Mapping[str, tuple[str, ...]]] = {
    "": ("GET", "DELETE"),
    "/cancel": ("POST",),
    "/input_items": ("GET",),
}
"""The methods of a stored response, by the part of its path after the id."""

DRAINING_HEADER: Final = "x-hpc-router-draining"
STARTING_HEADER: Final = "x-hpc-router-starting"
"""Header of an agent's error responses. With status 503: the engine is starting or restarting and did not get the
request. With status 502: the engine got the request and ended before the first byte of its response."""
REQUEST_ID_HEADER: Final = "x-request-id"
SESSION_HEADER: Final = "x-session-id"
AGENT_SESSION_HEADERS: Final = (
    *("x-claude-code-session-id", "session-id", "session_id"),
    *("x-session-affinity", "x-opencode-session"),
)
"""Headers in which coding agents name their session (docs/balance.md lists the agents and sources)."""
ON_BEHALF_HEADER: Final = "x-hpc-router-on-behalf"
"""Header of a request with the owner's token that is to be treated as one of the user's token with this ID."""
PRIORITY_HEADER: Final = "x-priority"
"""Header of a request with its class: interactive or batch."""
WAIT_HEADER: Final = "x-wait"
"""Request header that replaces `router.cold_start` for one request."""


def path_at(base: str, target: str) -> str:
    """Returns the path of `target` on a server with the base path `base`. In API paths, `base` replaces `/v1`.

    With the base `/api/v1`, `/v1/models` becomes `/api/v1/models`, and `/health` becomes `/api/health`. An empty base
    means `/v1`.
    """
    if target.startswith(API_ROOT + "/"):
        return (base or API_ROOT) + target.removeprefix(API_ROOT)
    return base.removesuffix(API_ROOT) + target


def url_at(url: str, target: str) -> str:
    """Returns the URL of `target` at the server with base URL `url`; see `path_at`."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{path_at(parts.path.rstrip('/'), target)}"


def challenge_in(query: str) -> str:
    """Returns the value of `challenge` in a query string; empty if there is none."""
    return parse_qs(query).get("challenge", [""])[-1]


def challenge_target(challenge: str, *, token_id: str | None = None) -> str:
    """Returns path and query of a health call with a challenge. `token_id`: ID of a user's token, if the router must
    prove that it knows this token; None: it must prove that it has the deployment's secret."""
    return f"{HEALTH}?challenge={challenge}" + ("" if token_id is None else f"&token={token_id}")


def token_id_in(query: str) -> str | None:
    """Returns the ID of a user's token in the query string of a health call; None if there is none."""
    return parse_qs(query).get("token", [None])[-1]


def skip_in(query: str) -> int:
    """Returns the number of session turns to leave out of the response to a handover call, because the successor
    already has them, from the call's query string; 0 if that states none."""
    text = parse_qs(query).get("skip", [""])[-1]
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0


def drain_target(until_at: float | None) -> str:
    """Returns path and query of a drain call. `until_at`: Unix time until which the drain may last if that is longer
    than `cluster.drain_s` allows; None: `cluster.drain_s` is the limit."""
    return DRAIN if until_at is None else f"{DRAIN}?until={until_at:.0f}"


def drain_until(query: str) -> float | None:
    """Returns the time limit in the query string of a drain call, in Unix seconds; None if there is none."""
    text = parse_qs(query).get("until", [""])[-1]
    return float(text) if re.fullmatch("[0-9]{1,12}", text) else None


@dataclass(frozen=True, slots=True)
class ProbeResponse:
    """The response to a health probe. `models`: names of the models that the engine serves; None if the engine is not
    ready. `answer`: the answer to the challenge. `task_failures`: by background task of the agent, the number of its
    failures and the last error."""

    replica: str
    state: str
    in_flight: int
    models: tuple[str, ...] | None
    answer: str | None
    task_failures: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Failures of the agent's background tasks, by task name: number of failures and last error."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self | None:
        """Parses a response. Returns None if `value` is not a response of an agent or a router."""
        models = value.get("models")
        if not isinstance(value.get("replica"), str) or not isinstance(models, list | None):
            return None
        return cls(
            replica=value["replica"],
            state=str(value.get("state")),
            in_flight=value["in_flight"] if isinstance(value.get("in_flight"), int) else 0,
            models=None if models is None else tuple(str(m) for m in models),
            answer=str(value.get("answer")),
            task_failures=_task_failures(value.get("task_failures")),
        )


def _task_failures(value: object) -> dict[str, tuple[int, str]]:
    """Parses `ProbeResponse.task_failures`. Leaves out invalid entries, which an agent of another version may send."""
    if not isinstance(value, dict):
        return {}
    return {
        str(task): (seen[0], str(seen[1]))
        for task, seen in value.items()
        if isinstance(seen, list) and len(seen) == 2 and type(seen[0]) is int
    }


class RankState(StrEnum):
    """Whether the engine process of a rank runs (docs/states.md)."""

    IDLE = "idle"  # has not started
    RUNNING = "running"  # runs, whether or not the engine answers
    ENDED = "ended"  # ended without an order to stop


class Action(StrEnum):
    """What rank 0 orders another rank to do."""

    WAIT = "wait"  # run no engine, and report again
    RUN = "run"  # run the engine of this attempt, once
    STOP = "stop"  # end the engine and the rank's agent


@dataclass(frozen=True, slots=True)
class RankReport:
    """Report of a rank's agent to rank 0. `attempt`: the attempt that its engine runs or ran last; 0 before the first.

    `instance` identifies the reporting process: a new instance means that the agent was restarted and its old engine
    ended. `challenge`: random text, for which the order must contain a `proof`. `leaving`: whether the rank was asked
    to stop. It then waits for an order, because the other ranks would fail if it stopped alone.
    """

    rank: int
    instance: str
    challenge: str
    node: str
    attempt: int
    state: RankState
    reason: str | None = None
    message: str | None = None
    leaving: bool = False

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parses a report. Raises ValueError if `value` is not a valid one."""
        try:
            report = cls(**{**value, "state": RankState(value["state"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a report of a rank: {error}") from error
        numbers = all(type(number) is int for number in (report.rank, report.attempt))
        texts = all(isinstance(text, str) for text in (report.instance, report.challenge, report.node))
        maybe = all(isinstance(text, str | None) for text in (report.reason, report.message))
        if not (numbers and texts and maybe and isinstance(report.leaving, bool)):
            raise ValueError("a report of a rank has a value of the wrong type")
        return report


@dataclass(frozen=True, slots=True)
class RankOrder:
    """Response of rank 0 to a report. `master_address`, `master_port`: where the engine processes of this attempt
    connect to each other."""

    action: Action
    attempt: int = 0
    master_address: str = ""
    master_port: int = 0
    proof: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parses an order. Raises ValueError if `value` is not a valid one."""
        try:
            return cls(
                Action(value["action"]),
                int(value["attempt"]),
                str(value["master_address"]),
                int(value["master_port"]),
                str(value["proof"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an order for a rank: {error}") from error
