"""The agent's HTTP API, through which every request reaches the engine.

`/health` needs no token and answers the challenge; every other path needs the replica's key. Requests on API paths are
relayed while the replica is ready; otherwise the response says whether it is starting or draining. The router limits
the requests in flight to the replica's capacity. Other clients do not, so the API refuses requests beyond `HEADROOM`
times the capacity. This module does not run the engine and does not access files.
"""

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from hpc_router.background_tasks import TaskFailures
from hpc_router.errors import (
    BadRequestError,
    BodyTooLargeError,
    UpstreamConnectError,
    UpstreamError,
)
from hpc_router.expert.agent.engine_relay import FastRelay, relay_request
from hpc_router.net import protocol
from hpc_router.net.auth import bearer_token, challenge_answer, equal_secrets
from hpc_router.relay.downstream.interface import (
    PendingResponse,
    Request,
    Response,
    error_response,
    json_response,
    unreadable_response,
)
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.upstream.interface import PendingRequest, Upstream
from hpc_router.state.registry import State

logger = logging.getLogger(__name__)

HEADROOM: Final = 2
MAX_CHALLENGE_DIGITS: Final = 256
RETRY_AFTER_S: Final[Mapping[State, int]] = {State.STARTING: 5, State.DRAINING: 1}
_STATE_HEADERS: Final = {State.STARTING: protocol.STARTING_HEADER, State.DRAINING: protocol.DRAINING_HEADER}


@dataclass(slots=True)
class AgentHttpApi:
    """The HTTP API of one replica.

    The agent sets `state` and `models`. `on_drain` is called for `POST /drain`, with the reason and `until_at`.
    `progress` counts the chunks that the engine sent, `unfinished` the requests to which it sent no complete response.
    For an engine with several ranks, `on_rank` is called with the ranks' reports; it may raise ValueError. The reports
    carry `rank_token`. `engine_lost` is set when the engine refuses a connection or drops a request, and the supervisor
    clears it once the engine answers; while it is set, a ready replica counts as starting.
    """

    replica: str
    key: str
    capacity: int
    client: Upstream
    names: tuple[str, ...]
    lists_models: bool
    on_drain: Callable[[str, float | None], None]
    state: State = State.STARTING
    models: tuple[str, ...] | None = None
    in_flight: InFlight = field(default_factory=InFlight)
    progress: int = 0
    unfinished: int = 0
    engine_lost: asyncio.Event = field(default_factory=asyncio.Event)
    on_rank: Callable[[protocol.RankReport], protocol.RankOrder] | None = None
    rank_token: str | None = None
    failures: TaskFailures = field(default_factory=TaskFailures)
    _in_engine: set[Request] = field(init=False, default_factory=set)
    """Requests whose responses are not complete."""
    _routes: Mapping[tuple[str, str], Callable[[Request], Awaitable[Response | None]]] = field(init=False)

    def __post_init__(self) -> None:
        self._routes = {
            ("POST", protocol.DRAIN): self._drain,
            ("POST", protocol.RANK): self._rank,
            ("GET", protocol.MODELS): self._relay if self.lists_models else self._list_models,
            ("GET", protocol.METRICS): self._relay,
            **{("POST", path): self._generate for path in protocol.POST_PATHS},
        }

    def handle(self, request: Request) -> PendingResponse | Coroutine[Any, Any, Response | None]:
        """Serves a request. If that needs no task, sends it to the engine and returns it as a `PendingResponse`.
        Otherwise returns a coroutine for a task, whose result is the response, or None if the response was streamed to
        the client."""
        return self._start(request) or self._respond(request)

    async def _respond(self, request: Request, started: PendingRequest | None = None) -> Response | None:
        """Returns the response to the request, which may be an error; None if it was streamed. `started`: this request,
        if it was already sent to the engine."""
        try:
            if started is not None:
                return await self._relay(request, started=started)
            if request.path == protocol.HEALTH:
                return self._health(request)
            key = self.rank_token or self.key if request.path == protocol.RANK else self.key
            if not _has_token(request, key):
                return error_response(
                    401,
                    kind="authentication_error",
                    code="unauthorized",
                    message="this replica needs its own key",
                    path=request.path,
                )
            handler = self._routes.get((request.method, request.path)) or self._stored_response(request)
            if handler is None:
                return error_response(
                    404, kind="invalid_request_error", code="unknown_path", message="this path is not served here"
                )
            return await handler(request)
        except (BodyTooLargeError, BadRequestError) as error:
            return unreadable_response(error, path=request.path)
        except Exception:
            logger.exception("%s %s failed", request.method, request.path[:200])
            return error_response(
                500,
                kind="internal_error",
                code="internal",
                message="the agent failed; the cause is in its log",
                path=request.path,
            )

    def _stored_response(self, request: Request) -> Callable[[Request], Awaitable[Response | None]] | None:
        """Returns the handler of a request about a response that is stored in the engine; None for any other."""
        stored = protocol.STORED_RESPONSE.fullmatch(request.path)
        return self._generate if stored and request.method in protocol.STORED_METHODS[stored[2]] else None

    def _start(self, request: Request) -> PendingResponse | None:
        """Sends a request to the engine if it can be served without a task; returns None for any other request."""
        body = request.complete_body()
        if body is None or not self._is_fast_path(request) or self.state is not State.READY or self._full:
            return None
        relay = FastRelay(request, self.in_flight, self._in_engine, self._on_progress, self._respond)
        return relay if relay.begin(self.client, body) else None

    def break_off(self) -> None:
        """Closes the connections of all requests in the engine, and refuses requests until the agent is ready again.

        Called before the engine is stopped. Otherwise an engine that is stopped may end its running responses as if
        they were complete, as vLLM does.
        """
        if self.state is State.READY:
            self.state = State.STARTING
        if self._in_engine:
            logger.warning("%d requests are aborted: the engine is stopped", len(self._in_engine))
        for request in tuple(self._in_engine):
            request.abort()

    def _is_fast_path(self, request: Request) -> bool:
        """Returns whether a request with this method, path and token needs no task. The result is cached in the
        head."""
        cached = request.headers.cached
        known: bool | None = cached.get(self.key)
        if known is None:
            generates = request.method == "POST" and request.path in protocol.POST_PATHS
            known = cached[self.key] = generates and _has_token(request, self.key)
        return known

    @property
    def _effective_state(self) -> State:
        return State.STARTING if self.state is State.READY and self.engine_lost.is_set() else self.state

    @property
    def _full(self) -> bool:
        return self.in_flight.count >= math.ceil(self.capacity * HEADROOM)

    def _health(self, request: Request) -> Response:
        challenge = protocol.challenge_in(request.query)[:MAX_CHALLENGE_DIGITS]
        answer = challenge_answer(self.key, challenge) if challenge else None
        count, failures = self.in_flight.count, self.failures.seen
        health = protocol.ProbeResponse(self.replica, self._effective_state.value, count, self.models, answer, failures)
        return json_response(asdict(health))

    async def _drain(self, request: Request) -> Response:
        self.on_drain("a drain call", protocol.drain_until(request.query))
        return json_response({"state": State.DRAINING.value, "in_flight": self.in_flight.count}, status=202)

    async def _rank(self, request: Request) -> Response:
        try:
            if self.on_rank is None:
                raise ValueError("this engine has one rank")
            order = self.on_rank(protocol.RankReport.from_json(json.loads(await request.read())))
        except ValueError as error:
            return error_response(400, kind="invalid_request_error", code="bad_report", message=str(error))
        return json_response(asdict(order))

    async def _list_models(self, request: Request) -> Response:
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "hpc-router"} for name in self.names]
        return json_response({"object": "list", "data": cards})

    async def _relay(self, request: Request, *, started: PendingRequest | None = None) -> Response | None:
        """Relays a request to the engine whatever the state of the replica is, because metrics are always needed.

        The response is 503, as from a starting replica, if no connection to the engine could be made. It is 502, with
        the header of a starting replica, if the engine got the request but sent no response. Returns None if the
        response was streamed to the client, even if it was cut.
        """
        self._in_engine.add(request)
        try:
            return await relay_request(request, self.client, on_progress=self._on_progress, started=started)
        except UpstreamError as error:
            self.engine_lost.set()
            if isinstance(error, UpstreamConnectError) and not error.sent:
                return self._refuse(request, State.STARTING)
            self.unfinished += request.path in protocol.POST_PATHS
            if request.response_started:
                return None
            response = error_response(
                502,
                kind="upstream_error",
                code="engine_unavailable",
                message=f"no answer from the engine: {error}",
                path=request.path,
            )
            response.add(protocol.STARTING_HEADER, "1")
            return response
        finally:
            self._in_engine.discard(request)

    def _on_progress(self) -> None:
        self.progress += 1

    def _refuse(self, request: Request, state: State) -> Response:
        """Returns the 503 response with which a replica in this state refuses a request."""
        response = error_response(
            503,
            kind="service_unavailable",
            code=state.value,
            message=f"{self.replica} is {state.value}",
            path=request.path,
        )
        response.add(_STATE_HEADERS[state], "1")
        response.add("retry-after", str(RETRY_AFTER_S[state]))
        return response

    async def _generate(self, request: Request) -> Response | None:
        if (state := self._effective_state) is not State.READY:
            return self._refuse(request, state)
        if self._full:
            response = error_response(
                429,
                kind="rate_limit_error",
                code="overloaded",
                message=f"{self.in_flight.count} requests are in flight here",
                path=request.path,
            )
            response.add("retry-after", "1")
            return response
        with self.in_flight:
            return await self._relay(request)


def _has_token(request: Request, key: str) -> bool:
    return equal_secrets(bearer_token(request.headers.text("authorization")) or "", key)
