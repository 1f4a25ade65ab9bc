"""The router's HTTP API: paths, authentication, and errors in the format of each API.

There is one handler, one table of routes and one table of status codes. `/health` signs a challenge, so that a client
does not send its token to another process on this port. `Gateway` chooses the experts of a request; `dispatcher` serves
it.
"""

import asyncio
import logging
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, cast

from hpc_router.config.schema import Deployment
from hpc_router.errors import (
    AnswerTimeoutError,
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
from hpc_router.net import protocol
from hpc_router.net.auth import bearer, challenge_answer, same
from hpc_router.relay.api_formats import api_format_of
from hpc_router.relay.downstream.interface import (
    DownstreamGoneError,
    PendingResponse,
    Request,
    Response,
    error_response,
    json_response,
)
from hpc_router.relay.headers import MAX_RETRY_AFTER_S, Headers
from hpc_router.relay.in_flight import InFlight
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.admission import bounds_of, should_spill
from hpc_router.router.replicas.sessions import PARAM, session_id
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.router.worker.control_client import ControlClient
from hpc_router.router.worker.dispatcher import RETRY_AFTER_S, Dispatcher, RoutedRequest
from hpc_router.router.worker.fast_path import FastPathRequest
from hpc_router.router.worker.request_body import ApiCall, decode
from hpc_router.routing.policy import Decision, Policy, RouteReason
from hpc_router.routing.prompt_text import RequestError, prompt_text

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
    AnswerTimeoutError: (504, "timeout_error"),
}
LONG_BODY_BYTES: Final = 2**18
"""Bytes; a longer body is decoded in a thread."""
_OPEN_PATHS: Final = frozenset({protocol.HEALTH, "/ready"})
_WHILE_DRAINING: Final = _OPEN_PATHS | {"/status", protocol.METRICS}
_FAST_PATHS: Final = frozenset(protocol.GENERATE_PATHS) - {protocol.RESPONSES}
_NAMED: Final = RouteReason.NAMED
_OPTIONAL_BOOL: Final = frozenset({bool, type(None)})
_CHALLENGE: Final = re.compile(r"[0-9a-f]{1,256}")
_REQUEST_ID: Final = re.compile(rb"[\w.:-]{1,128}")
_METRICS_HEAD: Final = b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n"

Handler = Callable[[Request, str], Awaitable[Response | None]]


class DrainingError(UnavailableError):
    """This router accepts no new requests; its successor does."""


@dataclass(slots=True, eq=False)
class Gateway:
    """Handles every request of the router. `token` None: no authentication. `key` signs the challenges of `/health`."""

    deployment: Deployment
    table: ReplicaTable
    policy: Policy
    dispatcher: Dispatcher
    metrics: Metrics
    link: ControlClient
    token: str | None
    replica: str
    key: str
    in_flight: InFlight = field(default_factory=InFlight)
    started_at: float = field(default_factory=time.time)
    routes: Mapping[tuple[str, str], Handler] = field(init=False)

    @property
    def draining(self) -> bool:
        return self.in_flight.closing

    @draining.setter
    def draining(self, value: bool) -> None:
        self.in_flight.closing = value

    def __post_init__(self) -> None:
        self.routes = {
            ("GET", protocol.HEALTH): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", "/status"): self._status,
            ("GET", protocol.METRICS): self._metrics,
            ("GET", protocol.MODELS): self._models,
            ("POST", "/route"): self._route,
            **{("POST", path): self._generate for path in protocol.GENERATE_PATHS},
        }

    def reconfigure(self, deployment: Deployment, policy: Policy) -> None:
        """Apply to later requests."""
        config = deployment.router
        self.deployment, self.policy = deployment, policy
        self.table.pin_bound, self.table.bounds = config.pin_bound, bounds_of(deployment)
        self.link.ejects_at_once = config.eject_connect_errors == 1
        self.dispatcher.configure(config)

    async def handle(self, request: Request) -> Response | None:
        """Serve a request. Raises only DownstreamGoneError: the client has disconnected."""
        begun, request.fast_path = cast(RoutedRequest | None, request.fast_path), None
        request_id = self._request_id(request) if begun is None else begun.request_id
        if self.draining:
            request.keep_alive = False
        try:
            if begun is not None:
                response = await self._resume(begun)
            else:
                response = await self._find_route(request)(request, request_id)
        except DownstreamGoneError:
            raise
        except HpcRouterError as error:
            response = self._error_result(request, error, request_id)
        except Exception:
            logger.exception("%s: %s %r failed", request_id, request.method, request.path[:200])
            failure = RoutingError("the router failed; its log says why")
            response = _error_response(500, "internal_error", failure, request_id, path=request.path)
        return response

    def _request_id(self, request: Request) -> str:
        if request.request_id and _REQUEST_ID.fullmatch(request.request_id):
            return request.request_id.decode()
        return f"{random.getrandbits(128):032x}"

    def _find_route(self, request: Request) -> Handler:
        path = request.path.rstrip("/") or "/"
        if path not in _OPEN_PATHS and self.token is not None:
            self._check_token(request.headers, self.token)
        if self.draining and path not in _WHILE_DRAINING:
            raise DrainingError(f"{self.replica} is draining; ask its successor", retry_after_s=RETRY_AFTER_S)
        handler = self.routes.get(("GET" if request.method == "HEAD" else request.method, path))
        if handler is None and request.method == "GET" and path.startswith(protocol.MODELS + "/"):
            return self._model
        if handler is None:
            paths = sorted(f"{method} {path}" for method, path in self.routes)
            raise UnknownPathError(f"{request.method} {request.path[:200]!r} is not served (valid: {', '.join(paths)})")
        return handler

    def _check_token(self, headers: Headers, token: str) -> None:
        if token in headers.cached:
            return
        offered = bearer(headers.text("authorization")) or headers.text("x-api-key")
        if not same(offered, token):
            raise UnauthorizedError(
                "this router wants its owner's token as `Authorization: Bearer ...` or `x-api-key: ...`"
            )
        headers.cached[token] = True

    def _error_result(self, request: Request, error: HpcRouterError, request_id: str) -> Response:
        status, kind = next(((s, k) for e, (s, k) in STATUS.items() if isinstance(error, e)), (500, "internal_error"))
        logger.info("%s: %s %r refused with %d: %s", request_id, request.method, request.path[:200], status, error)
        self.metrics.requests.add("", "", status)
        response = _error_response(status, kind, error, request_id, path=request.path)
        if isinstance(error, DrainingError):
            response.add(protocol.DRAINING_HEADER, "1")
        return response

    async def _health(self, request: Request, request_id: str) -> Response:
        challenge = protocol.challenge_in(request.query)
        if challenge and not _CHALLENGE.fullmatch(challenge):
            raise BadRequestError("a challenge has 1 to 256 digits of 0-9 and a-f", param="challenge")
        answer = challenge_answer(self.key, challenge) if challenge else None
        return json_response({"status": "ok", "replica": self.replica, "answer": answer})

    async def _ready(self, request: Request, request_id: str) -> Response:
        ready = [] if self.draining else sorted(self.table.ready())
        return json_response({"ready": ready}, status=200 if ready else 503)

    async def _status(self, request: Request, request_id: str) -> Response:
        return json_response(await self.link.call("status"))

    async def _metrics(self, request: Request, request_id: str) -> Response:
        return Response(200, _METRICS_HEAD, (await self.link.call("metrics of all")).encode())

    async def _models(self, request: Request, request_id: str) -> Response:
        return json_response({"object": "list", "data": [self._model_card(name) for name in self._model_names()]})

    async def _model(self, request: Request, request_id: str) -> Response:
        name = request.path.removeprefix(protocol.MODELS + "/")
        if name not in self._model_names():
            raise self._unknown(name)
        return json_response(self._model_card(name))

    async def _route(self, request: Request, request_id: str) -> Response:
        """Explain the routing of this prompt for model `auto`."""
        call = await self._read_call(request)
        explanation = self.policy.explain(self._prompt(call), ready=self.table.ready())
        return json_response(explanation.to_dict(id=request_id))

    async def _generate(self, request: Request, request_id: str) -> Response | None:
        self._admit()
        with self.in_flight:
            body = request.complete_body()
            call = decode(body) if body is not None and len(body) <= LONG_BODY_BYTES else await self._read_call(request)
            if request.path.rstrip("/") == protocol.RESPONSES and call.fields.get(PARAM) is not None:
                session = session_id(request.headers)
                if session is not None:
                    await self.link.recall(session)
            return await self._serve(self._route_request(request, request_id, call))

    async def _resume(self, routed: RoutedRequest) -> Response | None:
        """Continue a request that was started on the fast path."""
        work, routed.in_flight_entry = routed.in_flight_entry, None  # breaks a reference cycle
        if work is not None:
            work.leave()
        else:
            self._admit()  # other requests may have been admitted since
        with self.in_flight:
            return await self._serve(routed)

    def _admit(self) -> None:
        if self.in_flight.total >= self.deployment.router.max_in_flight:
            raise OverloadedError(
                f"{self.deployment.router.max_in_flight} requests are in flight, as many as are admitted",
                retry_after_s=self.table.longest_wait_s(),
            )

    async def _serve(self, routed: RoutedRequest) -> Response | None:
        result = await self.dispatcher.run(routed)
        self.metrics.requests.add(result.expert, str(result.reason), result.status)
        return result.response

    def start_fast_path(self, request: Request) -> PendingResponse | None:
        """Start a request without a task. None: `handle` serves it, and reports the error if there is one."""
        body = request.complete_body()
        if body is None or len(body) > LONG_BODY_BYTES or self.in_flight.closing:
            return None
        if self.in_flight.total >= self.deployment.router.max_in_flight:
            return None
        try:
            if not self._takes_fast_path(request):
                return None
            routed = self._route_request(request, self._request_id(request), decode(body))
            work = FastPathRequest(self.dispatcher, routed, self.in_flight)
            begun = work.begin()
        except Exception:  # noqa: BLE001  # raised again and reported in `handle`
            return None
        request.fast_path = routed
        return work if begun else None

    def _takes_fast_path(self, request: Request) -> bool:
        """Whether the head allows the fast path; cached with the head. Raises UnauthorizedError."""
        cached = request.headers.cached
        known: bool | None = cached.get(self)
        if known is None:
            known = request.method == "POST" and request.path in _FAST_PATHS
            if known and self.token is not None:
                self._check_token(request.headers, self.token)
            cached[self] = known
        return known

    async def _read_call(self, request: Request) -> ApiCall:
        body = await request.read(limit_s=self.deployment.router.idle_timeout_s)
        return await asyncio.to_thread(decode, body) if len(body) > LONG_BODY_BYTES else decode(body)

    def _route_request(self, request: Request, request_id: str, call: ApiCall) -> RoutedRequest:
        started = time.perf_counter()
        path, model = request.path.rstrip("/"), call.model
        if type(call.fields.get("stream")) not in _OPTIONAL_BOOL:
            raise BadRequestError("'stream' must be true or false", param="stream")
        target = f"{path}?{request.query}" if request.query else path
        api_format = api_format_of(path)
        session = None
        if path == protocol.RESPONSES:
            session = session_id(request.headers)
            continued = self.link.sessions.continued(session, call.fields, self.table, model=model)
            if continued is not None:
                turn, replica = continued
                reason = turn.reason if model == "auto" else RouteReason.NAMED
                return RoutedRequest(
                    request, target, api_format, request_id, call, (turn.expert,), reason, started, only=replica
                )
        if model != "auto":
            if model not in self.deployment.experts and not self.table.of(model):
                raise self._unknown(model)
            experts: tuple[str, ...] = (model,)
            reason = _NAMED
        else:
            experts, reason = self._choose_experts(path, call, first=api_format.prompt_field)
        on_success = None if session is None else partial(self.link.sessions.answered, session)
        return RoutedRequest(
            request, target, api_format, request_id, call, experts, reason, started, on_success=on_success
        )

    def _choose_experts(self, path: str, call: ApiCall, *, first: str) -> tuple[tuple[str, ...], RouteReason]:
        """The experts to try in order, by the policy, and the reason for the first one."""
        if path == protocol.EMBEDDINGS:
            raise BadRequestError(
                "'auto' cannot embed: the vector spaces of experts differ, so name one", param="model"
            )
        decision = self._decide(self._prompt(call, first=first))
        experts = self.policy.order(decision)
        if not experts:
            raise UnknownModelError(
                "no expert is available for model 'auto', and policy.fallback is not set"
                + suggest("", self._experts()),
                param="model",
            )
        if self.deployment.policy.spill_per_s is not None and self._spills(decision):
            assert decision.runner_up is not None
            return tuple(dict.fromkeys((decision.runner_up, *experts))), RouteReason.SPILLED
        return experts, decision.reason

    def _spills(self, decision: Decision) -> bool:
        """Whether the expert is busy, the runner-up is free, and the wait weighs more than the lower score."""
        expert, other, per_s = decision.expert, decision.runner_up, self.deployment.policy.spill_per_s
        if decision.reason is not RouteReason.CLASSIFIED or expert is None or other is None or per_s is None:
            return False
        if self.table.pick((expert,)) is not None or self.table.pick((other,)) is None:
            return False
        return should_spill(margin=decision.margin or 0.0, wait_s=self.table.wait_s(expert), per_s=per_s)

    def _prompt(self, call: ApiCall, *, first: str = "messages") -> str:
        return prompt_text(call.fields, window=self.deployment.policy.window, first=first)

    def _decide(self, text: str) -> Decision:
        started = time.perf_counter()
        decision = self.policy.select(text, ready=self.table.ready() if self.policy.weighs_load else {})
        self.metrics.decision.add(time.perf_counter() - started)
        version = self.policy.version
        if version is not None:
            self.metrics.decided.add(version, decision.cluster or "", decision.reason)
            shadow = self.policy.shadow
            if shadow is not None:  # only counted
                agreed = shadow.select(text, ready={}).expert == decision.expert
                self.metrics.shadowed.add(version, shadow.version, "yes" if agreed else "no")
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


def _error_response(status: int, kind: str, error: HpcRouterError, request_id: str, *, path: str) -> Response:
    param, retry_after_s = getattr(error, "param", None), getattr(error, "retry_after_s", None)
    response = error_response(status, kind=kind, code=_code(error), message=str(error), param=param, path=path)
    response.add(protocol.REQUEST_ID_HEADER, request_id)
    if retry_after_s is not None:
        response.add("retry-after", str(min(max(1, math.ceil(retry_after_s)), MAX_RETRY_AFTER_S)))
    if isinstance(error, AnswerTimeoutError):
        response.add("x-should-retry", "false")  # obeyed by the openai and anthropic clients
    return response


def _code(error: HpcRouterError) -> str:
    """`UnknownModelError` -> `unknown_model`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
