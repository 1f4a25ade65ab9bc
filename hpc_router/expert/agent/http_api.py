"""The agent's HTTP surface: the only way to the engine.

`/health` is open and answers the challenge; everything else wants the replica's key. API paths are relayed while the
replica is ready; otherwise the answer says whether it is starting or draining. It runs no engine and knows no files.
The router keeps replicas to their capacity; the gate refuses beyond `HEADROOM` times that, for callers that don't.
"""

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from hpc_router.background_tasks import TaskFailures
from hpc_router.errors import BadRequestError, BodyTooLargeError, UpstreamConnectError, UpstreamError
from hpc_router.expert.agent.engine_relay import Passing, pass_through
from hpc_router.net import protocol
from hpc_router.net.auth import bearer, challenge_answer, same
from hpc_router.relay.downstream.interface import (
    PendingResponse,
    Request,
    Response,
    error_response,
    json_response,
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
    """`state` and `models` are set by the agent; `on_drain` is called for `POST /drain`. `progress` counts the pieces
    of answers that the engine sent, `cut` the answers that it did not give or not finish. Where it has more ranks,
    `on_rank` is called for their reports, with `rank_token`; it raises ValueError. `engine_lost` is set when the engine
    refuses a connection or drops a request; while it is set, a ready replica counts as starting. The supervisor clears
    it once the engine answers."""

    replica: str
    key: str
    capacity: int
    client: Upstream
    names: tuple[str, ...]
    lists_models: bool
    on_drain: Callable[[str], None]
    state: State = State.STARTING
    models: tuple[str, ...] | None = None
    in_flight: InFlight = field(default_factory=InFlight)
    progress: int = 0
    cut: int = 0
    engine_lost: asyncio.Event = field(default_factory=asyncio.Event)
    on_rank: Callable[[protocol.RankReport], protocol.RankOrder] | None = None
    rank_token: str | None = None
    failures: TaskFailures = field(default_factory=TaskFailures)
    _relayed: set[Request] = field(init=False, default_factory=set)
    """Requests whose answers the engine has not given in full."""
    _routes: Mapping[tuple[str, str], Callable[[Request], Awaitable[Response | None]]] = field(init=False)

    def __post_init__(self) -> None:
        self._routes = {
            ("POST", protocol.DRAIN): self._drain,
            ("POST", protocol.RANK): self._rank,
            ("GET", protocol.MODELS): self._pass if self.lists_models else self._own_models,
            ("GET", protocol.METRICS): self._pass,
            **{("POST", path): self._generate for path in protocol.GENERATE_PATHS},
        }

    def handle(self, request: Request) -> PendingResponse | Coroutine[Any, Any, Response | None]:
        """Serve a request, without a task if only the engine has to be awaited."""
        return self._start(request) or self._respond(request)

    async def _respond(self, request: Request, started: PendingRequest | None = None) -> Response | None:
        """Never raises but for cancellation. `started`: the request to the engine, if it was sent already."""
        try:
            if started is not None:
                return await self._pass(request, started=started)
            if request.path == protocol.HEALTH:
                return self._health(request)
            wanted = self.rank_token or self.key if request.path == protocol.RANK else self.key
            if not _holds(request, wanted):
                return error_response(
                    401,
                    kind="authentication_error",
                    code="unauthorized",
                    message="this replica wants its own key",
                    path=request.path,
                )
            handler = self._routes.get((request.method, request.path))
            if handler is None:
                return error_response(
                    404, kind="invalid_request_error", code="unknown_path", message="this path is not served here"
                )
            return await handler(request)
        except BodyTooLargeError as error:
            return error_response(
                413, kind="invalid_request_error", code="body_too_large", message=str(error), path=request.path
            )
        except BadRequestError as error:
            return error_response(
                400, kind="invalid_request_error", code="bad_request", message=str(error), path=request.path
            )
        except Exception:
            logger.exception("%s %s failed", request.method, request.path[:200])
            return error_response(
                500,
                kind="internal_error",
                code="internal",
                message="the agent failed; its log says why",
                path=request.path,
            )

    def _start(self, request: Request) -> PendingResponse | None:
        """None: something else than the engine has to be awaited."""
        body = request.complete_body()
        if body is None or not self._takes_fast_path(request) or self.state is not State.READY or self._full:
            return None
        passing = Passing(request, self.in_flight, self._relayed, self._heard, self._respond)
        return passing if passing.begin(self.client, body) else None

    def break_off(self) -> None:
        """Abort the connection of every request that the engine still answers, and take none until the agent says that
        it is ready again. Called before the engine is stopped: one that ends running answers in good form, as vLLM
        does, would make them look complete."""
        if self.state is State.READY:
            self.state = State.STARTING
        if self._relayed:
            logger.warning("%d requests are broken off: the engine is stopped", len(self._relayed))
        for request in tuple(self._relayed):
            request.abort()

    def _takes_fast_path(self, request: Request) -> bool:
        """By its head, which is asked once where it comes again and again."""
        cached = request.headers.cached
        known: bool | None = cached.get(self.key)
        if known is None:
            generates = request.method == "POST" and request.path in protocol.GENERATE_PATHS
            known = cached[self.key] = generates and _holds(request, self.key)
        return known

    @property
    def _shown_state(self) -> State:
        return State.STARTING if self.state is State.READY and self.engine_lost.is_set() else self.state

    @property
    def _full(self) -> bool:
        return self.in_flight.count >= math.ceil(self.capacity * HEADROOM)

    def _health(self, request: Request) -> Response:
        challenge = protocol.challenge_in(request.query)[:MAX_CHALLENGE_DIGITS]
        answer = challenge_answer(self.key, challenge) if challenge else None
        count, failures = self.in_flight.count, self.failures.seen
        health = protocol.ProbeResponse(self.replica, self._shown_state.value, count, self.models, answer, failures)
        return json_response(asdict(health))

    async def _drain(self, request: Request) -> Response:
        self.on_drain("a drain call")
        return json_response({"state": State.DRAINING.value, "in_flight": self.in_flight.count}, status=202)

    async def _rank(self, request: Request) -> Response:
        try:
            if self.on_rank is None:
                raise ValueError("this engine has one rank")
            order = self.on_rank(protocol.RankReport.from_json(json.loads(await request.read())))
        except ValueError as error:
            return error_response(400, kind="invalid_request_error", code="bad_report", message=str(error))
        return json_response(asdict(order))

    async def _own_models(self, request: Request) -> Response:
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "hpc-router"} for name in self.names]
        return json_response({"object": "list", "data": cards})

    async def _pass(self, request: Request, *, started: PendingRequest | None = None) -> Response | None:
        """To the engine, whatever the state: metrics of a draining engine are of interest.

        Without a connection nothing was begun, so the answer is the same 503 as while the engine starts. A request that
        was sent and lost is a 502, and says too that the engine has to be waited for.
        """
        self._relayed.add(request)
        try:
            return await pass_through(request, self.client, heard=self._heard, started=started)
        except UpstreamError as error:
            self.engine_lost.set()
            if isinstance(error, UpstreamConnectError) and not error.sent:
                return self._refuse(request, State.STARTING)
            self.cut += request.path in protocol.GENERATE_PATHS
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
            self._relayed.discard(request)

    def _heard(self) -> None:
        self.progress += 1

    def _refuse(self, request: Request, state: State) -> Response:
        """A replica in this state takes no request."""
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
        if (state := self._shown_state) is not State.READY:
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
            return await self._pass(request)


def _holds(request: Request, key: str) -> bool:
    return same(bearer(request.headers.text("authorization")) or "", key)
