"""The agent's HTTP surface: the only way to the engine.

`/health` is open and answers the challenge; everything else wants the replica's key. API paths are relayed while the
replica is ready; otherwise the answer says whether it is starting or draining. It runs no engine and knows no files.
The router keeps replicas to their capacity; the gate refuses beyond `HEADROOM` times that, for callers that don't.
"""

import asyncio
import json
import logging
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from aiohttp import web

from hpc_router import wire
from hpc_router.auth import bearer, challenge_answer, same
from hpc_router.errors import UpstreamError
from hpc_router.expert.passthrough import pass_through
from hpc_router.registry import State
from hpc_router.relay.upstream import UpstreamClient

logger = logging.getLogger(__name__)

HEADROOM: Final = 2
BACKLOG: Final = 4096
LONGEST_CHALLENGE: Final = 256
RETRY_AFTER_S: Final[Mapping[State, int]] = {State.STARTING: 5, State.DRAINING: 1}
_STATE_HEADERS: Final = {State.STARTING: wire.STARTING_HEADER, State.DRAINING: wire.DRAINING_HEADER}

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Gate:
    """`state` and `models` are set by the agent; `on_drain` is called for `POST /drain`."""

    replica: str
    key: str
    capacity: int
    client: UpstreamClient
    names: tuple[str, ...]
    lists_models: bool
    on_drain: Callable[[str], None]
    state: State = State.STARTING
    models: tuple[str, ...] | None = None
    in_flight: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _routes: Mapping[tuple[str, str], Handler] = field(init=False)

    def __post_init__(self) -> None:
        self._routes = {
            ("POST", wire.DRAIN): self._drain,
            ("GET", wire.MODELS): self._pass if self.lists_models else self._own_models,
            ("GET", wire.METRICS): self._pass,
            **{("POST", path): self._generate for path in wire.GENERATE_PATHS},
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The handler of aiohttp's low-level server; never raises but for cancellation."""
        try:
            if request.path == wire.HEALTH:
                return self._health(request)
            if not same(bearer(request.headers.get("authorization")) or "", self.key):
                return refuse(401, "authentication_error", "unauthorized", "this replica wants its own key")
            handler = self._routes.get((request.method, request.path))
            if handler is None:
                return refuse(404, "invalid_request_error", "unknown_path", "this path is not served here")
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return refuse(413, "invalid_request_error", "body_too_large", "the body is too large")
        except Exception:
            logger.exception("%s %s failed", request.method, request.path[:200])
            return refuse(500, "internal_error", "internal", "the agent failed; its log says why")

    async def idle(self) -> None:
        """Until no request is in flight."""
        while self.in_flight:
            self._idle.clear()
            await self._idle.wait()

    def _health(self, request: web.BaseRequest) -> web.Response:
        challenge = request.query.get("challenge", "")[:LONGEST_CHALLENGE]
        answer = challenge_answer(self.key, challenge) if challenge else None
        health = wire.Health(self.replica, self.state.value, self.in_flight, self.models, answer)
        return json_response(asdict(health))

    async def _drain(self, request: web.BaseRequest) -> web.Response:
        self.on_drain("a drain call")
        return json_response({"state": State.DRAINING.value, "in_flight": self.in_flight}, status=202)

    async def _own_models(self, request: web.BaseRequest) -> web.Response:
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "hpc-router"} for name in self.names]
        return json_response({"object": "list", "data": cards})

    async def _pass(self, request: web.BaseRequest) -> web.StreamResponse:
        """To the engine, whatever the state: metrics of a draining engine are of interest."""
        try:
            return await pass_through(request, self.client)
        except UpstreamError as error:
            return refuse(502, "upstream_error", "engine_unavailable", f"no answer from the engine: {error}")

    async def _generate(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.state is not State.READY:
            response = refuse(503, "service_unavailable", self.state.value, f"{self.replica} is {self.state.value}")
            response.headers[_STATE_HEADERS[self.state]] = "1"
            response.headers["retry-after"] = str(RETRY_AFTER_S[self.state])
            return response
        if self.in_flight >= math.ceil(self.capacity * HEADROOM):
            response = refuse(429, "rate_limit_error", "overloaded", f"{self.in_flight} requests are in flight here")
            response.headers["retry-after"] = "1"
            return response
        with self._counted():
            return await self._pass(request)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()


@asynccontextmanager
async def listening(gate: Gate, sock: socket.socket, *, max_body: int) -> AsyncIterator[None]:
    """Serve `gate` on a bound socket. At the end connections are closed, handlers still running cancelled."""
    loop = asyncio.get_running_loop()

    def make_request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=max_body)

    # A caller that leaves cancels its handler, and with it the engine's work; aiohttp's runners leave that off.
    server = web.Server(gate.handle, request_factory=make_request, handler_cancellation=True, access_log=None)
    listener = await loop.create_server(server, sock=sock, backlog=BACKLOG)
    try:
        yield
    finally:
        listener.close()
        server.pre_shutdown()
        await server.shutdown(timeout=1.0)
        await listener.wait_closed()


def refuse(status: int, kind: str, code: str, message: str) -> web.Response:
    """An error as OpenAI's clients read it."""
    response = json_response({"error": {"message": message, "type": kind, "param": None, "code": code}}, status=status)
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def json_response(value: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=json.dumps(value).encode(), status=status, content_type="application/json")
