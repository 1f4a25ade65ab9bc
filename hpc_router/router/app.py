"""The router's HTTP surface: paths, tokens, errors in the shape that each API's clients read.

It sits on aiohttp's low-level server: one handler, one table of routes, one table of status codes. `/health` answers a
challenge, so that nobody sends his token to another process on this port. What a request means is decided in
`Gateway`'s methods, how it is served in `dispatch`.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from aiohttp import web

from hpc_router import wire
from hpc_router.auth import bearer, challenge_answer, same
from hpc_router.config import Deployment
from hpc_router.errors import (
    BadRequestError,
    BodyTooLargeError,
    HpcRouterError,
    OverloadedError,
    RequestTimeoutError,
    RoutingError,
    UnauthorizedError,
    UnavailableError,
    UnknownModelError,
    UnknownPathError,
    UpstreamError,
    suggest,
)
from hpc_router.relay.dialects import dialect_of
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.server import error_response, json_response, read_body
from hpc_router.router.dispatch import RETRY_AFTER_S, Dispatcher, Errand
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas import ReplicaTable
from hpc_router.router.request import ApiCall, decode
from hpc_router.router.sessions import Sessions, session_id
from hpc_router.router.status import status
from hpc_router.routing.conversation import RequestError, prompt_text
from hpc_router.routing.policy import Decision, Policy, Reason

logger = logging.getLogger(__name__)

STATUS: Final[Mapping[type[HpcRouterError], tuple[int, str]]] = {
    BadRequestError: (400, "invalid_request_error"),
    RequestError: (400, "invalid_request_error"),
    UnauthorizedError: (401, "authentication_error"),
    UnknownModelError: (404, "invalid_request_error"),
    UnknownPathError: (404, "invalid_request_error"),
    RequestTimeoutError: (408, "invalid_request_error"),
    BodyTooLargeError: (413, "invalid_request_error"),
    OverloadedError: (429, "rate_limit_error"),
    UpstreamError: (502, "upstream_error"),
    UnavailableError: (503, "service_unavailable"),
}
LONG_BODY: Final = 2**18
"""From this size on, in bytes, a body is decoded beside the event loop."""
_OPEN_PATHS: Final = frozenset({wire.HEALTH, "/ready"})
_WHILE_DRAINING: Final = _OPEN_PATHS | {"/status", wire.METRICS}
_CHALLENGE: Final = re.compile(r"[0-9a-f]{1,256}")
_REQUEST_ID: Final = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_HEADERS_NOT_JSON: Final = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}

Handler = Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse]]


class DrainingError(UnavailableError):
    """This router takes nothing new; its successor does."""


@dataclass(slots=True)
class Gateway:
    """Answers every request of the router. `token` None: open to everybody. `key` proves who answers."""

    deployment: Deployment
    table: ReplicaTable
    policy: Policy
    dispatcher: Dispatcher
    metrics: Metrics
    token: str | None
    replica: str
    key: str
    draining: bool = False
    in_flight: InFlight = field(default_factory=InFlight)
    sessions: Sessions = field(default_factory=Sessions)
    started_at: float = field(default_factory=time.time)
    routes: Mapping[tuple[str, str], Handler] = field(init=False)

    def __post_init__(self) -> None:
        self.routes = {
            ("GET", wire.HEALTH): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", "/status"): self._status,
            ("GET", wire.METRICS): self._metrics,
            ("GET", wire.MODELS): self._models,
            ("POST", "/route"): self._route,
            **{("POST", path): self._generate for path in wire.GENERATE_PATHS},
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The handler of aiohttp's low-level server; never raises but for cancellation."""
        given = request.headers.get(wire.REQUEST_ID_HEADER, "")
        request_id = given if given and _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        try:
            response = await self._find(request)(request, request_id)
        except HpcRouterError as error:
            response = self._refuse(request, error, request_id)
        except Exception:
            logger.exception("%s: %s %r failed", request_id, request.method, request.path[:200])
            failure = RoutingError("the router failed; its log says why")
            response = _error_response(500, "internal_error", failure, request_id, path=request.path)
        if self.draining and not response.prepared:
            response.force_close()
        return response

    def _find(self, request: web.BaseRequest) -> Handler:
        path = request.path.rstrip("/") or "/"
        if path not in _OPEN_PATHS and self.token is not None:
            offered = (bearer(request.headers.get("authorization")), request.headers.get("x-api-key"))
            if not any(token is not None and same(token, self.token) for token in offered):
                raise UnauthorizedError(
                    "this router wants its owner's token as `Authorization: Bearer ...` or `x-api-key: ...`"
                )
        if self.draining and path not in _WHILE_DRAINING:
            raise DrainingError(f"{self.replica} is draining; ask its successor", retry_after_s=RETRY_AFTER_S)
        handler = self.routes.get(("GET" if request.method == "HEAD" else request.method, path))
        if handler is None and request.method == "GET" and path.startswith(wire.MODELS + "/"):
            return self._model
        if handler is None:
            paths = sorted(f"{method} {path}" for method, path in self.routes)
            raise UnknownPathError(f"{request.method} {request.path[:200]!r} is not served (valid: {', '.join(paths)})")
        return handler

    def _refuse(self, request: web.BaseRequest, error: HpcRouterError, request_id: str) -> web.Response:
        status, kind = next(((s, k) for e, (s, k) in STATUS.items() if isinstance(error, e)), (500, "internal_error"))
        logger.info("%s: %s %r refused with %d: %s", request_id, request.method, request.path[:200], status, error)
        self.metrics.requests.labels("", "", str(status)).inc()
        response = _error_response(status, kind, error, request_id, path=request.path)
        if isinstance(error, DrainingError):
            response.headers[wire.DRAINING_HEADER] = "1"
        return response

    async def _health(self, request: web.BaseRequest, request_id: str) -> web.Response:
        challenge = request.query.get("challenge", "")
        if challenge and not _CHALLENGE.fullmatch(challenge):
            raise BadRequestError("a challenge has 1 to 256 digits of 0-9 and a-f", param="challenge")
        answer = challenge_answer(self.key, challenge) if challenge else None
        return json_response({"status": "ok", "replica": self.replica, "answer": answer})

    async def _ready(self, request: web.BaseRequest, request_id: str) -> web.Response:
        ready = [] if self.draining else sorted(self.table.ready())
        return json_response({"ready": ready}, status=200 if ready else 503)

    async def _status(self, request: web.BaseRequest, request_id: str) -> web.Response:
        policy = self.deployment.policy
        return json_response(
            status(
                self.table,
                self.dispatcher.discovery,
                experts=sorted(self._experts()),
                policy={"kind": policy.kind, "fallback": policy.fallback, "artefact": self.policy.version},
                replica=self.replica,
                uptime_s=round(time.time() - self.started_at, 3),
                in_flight=self.in_flight.count,
                open=self.token is None,
            )
        )

    async def _metrics(self, request: web.BaseRequest, request_id: str) -> web.Response:
        return web.Response(body=self.metrics.exposition(), headers=_HEADERS_NOT_JSON)

    async def _models(self, request: web.BaseRequest, request_id: str) -> web.Response:
        return json_response({"object": "list", "data": [self._model_card(name) for name in self._model_names()]})

    async def _model(self, request: web.BaseRequest, request_id: str) -> web.Response:
        name = request.path.removeprefix(wire.MODELS + "/")
        if name not in self._model_names():
            raise self._unknown(name)
        return json_response(self._model_card(name))

    async def _route(self, request: web.BaseRequest, request_id: str) -> web.Response:
        """Explain where `auto` would send this prompt."""
        call = await self._read(request)
        explanation = self.policy.explain(self._prompt(call), ready=self.table.ready())
        return json_response(explanation.to_dict(id=request_id))

    async def _generate(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        if self.in_flight.count >= self.deployment.router.max_in_flight:
            raise OverloadedError(
                f"{self.in_flight.count} requests are in flight, as many as router.max_in_flight admits",
                retry_after_s=RETRY_AFTER_S,
            )
        with self.in_flight:
            call = await self._read(request)
            errand = self._errand(request, request_id, call)
            response = await self.dispatcher.run(errand)
        expert, reason = response.headers.get("x-expert", ""), response.headers.get("x-route-reason", "")
        self.metrics.requests.labels(expert, reason, str(response.status)).inc()
        return response

    async def _read(self, request: web.BaseRequest) -> ApiCall:
        body = await read_body(request, limit_s=self.deployment.router.idle_timeout_s)
        return await asyncio.to_thread(decode, body) if len(body) > LONG_BODY else decode(body)

    def _errand(self, request: web.BaseRequest, request_id: str, call: ApiCall) -> Errand:
        path = request.path.rstrip("/")
        text = self._prompt(call, first=dialect_of(path).conversation)
        if not isinstance(call.fields.get("stream", False), bool | None):
            raise BadRequestError("'stream' must be true or false", param="stream")
        path_and_query = path + (f"?{request.rel_url.raw_query_string}" if request.query_string else "")
        session = None
        if path == wire.RESPONSES:
            session = session_id(request.headers.get(wire.SESSION_HEADER))
            continued = self.sessions.continued(session, call.fields, self.table, model=call.model)
            if continued is not None:
                turn, replica = continued
                reason = turn.reason if call.model == "auto" else Reason.NAMED
                return Errand(request, path_and_query, request_id, call, (turn.expert,), reason, only=replica)
        if call.model != "auto":
            if call.model not in self._experts():
                raise self._unknown(call.model)
            experts: tuple[str, ...] = (call.model,)
            reason = Reason.NAMED
        else:
            if path == wire.EMBEDDINGS:
                raise BadRequestError(
                    "'auto' cannot embed: the vector spaces of experts differ, so name one", param="model"
                )
            decision = self._decide(text)
            experts, reason = self.policy.order(decision), decision.reason
            if not experts:
                raise UnknownModelError(
                    "'auto' leads nowhere: no expert is ready to be chosen and policy.fallback names none"
                    + suggest("", self._experts()),
                    param="model",
                )
        on_answer = None if session is None else partial(self.sessions.answered, session)
        return Errand(request, path_and_query, request_id, call, experts, reason, on_answer=on_answer)

    def _prompt(self, call: ApiCall, *, first: str = "messages") -> str:
        return prompt_text(call.fields, window=self.deployment.policy.window, first=first)

    def _decide(self, text: str) -> Decision:
        started = time.perf_counter()
        decision = self.policy.select(text, ready=self.table.ready())
        self.metrics.decision.observe(time.perf_counter() - started)
        return decision

    def _experts(self) -> set[str]:
        return self.table.experts() | set(self.deployment.experts)

    def _model_names(self) -> list[str]:
        return ["auto", *sorted(self._experts())]

    def _model_card(self, name: str) -> dict[str, Any]:
        replicas = self.table.of(name)
        card: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": int(self.started_at),
            "owned_by": "hpc_router",
        }
        if any(r.record.engine.kind == "sim" for r in (replicas if name != "auto" else self.table.all())):
            card["simulated"] = True
        return card if name == "auto" else card | {"ready_replicas": sum(r.standing == "ready" for r in replicas)}

    def _unknown(self, name: str) -> UnknownModelError:
        return UnknownModelError(f"no model is named {name[:100]!r}{suggest(name, self._model_names())}", param="model")


def _error_response(status: int, kind: str, error: HpcRouterError, request_id: str, *, path: str) -> web.Response:
    param, retry_after_s = getattr(error, "param", None), getattr(error, "retry_after_s", None)
    response = error_response(status, kind=kind, code=_code(error), message=str(error), param=param, path=path)
    response.headers[wire.REQUEST_ID_HEADER] = request_id
    if retry_after_s is not None:
        response.headers["retry-after"] = str(max(1, round(retry_after_s)))
    return response


def _code(error: HpcRouterError) -> str:
    """`UnknownModelError` -> `unknown_model`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
