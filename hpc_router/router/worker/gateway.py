"""The router's HTTP surface: paths, tokens, errors in the shape that each API's clients read.

One handler, one table of routes, one table of status codes. `/health` answers a challenge, so that nobody sends his
token to another process on this port. What a request means is decided in `Gateway`'s methods, how it is served in
`dispatch`.
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
from hpc_router.net.auth import bearer_token, challenge_answer, equal_secrets
from hpc_router.relay.api_formats import dialect_of
from hpc_router.relay.downstream.interface import (
    DownstreamGoneError,
    Request,
    Response,
    Work,
    error_response,
    json_response,
)
from hpc_router.relay.headers import MAX_RETRY_AFTER_S, Headers
from hpc_router.relay.in_flight import InFlight
from hpc_router.router.ipc.messages import GetExposition, GetStatus
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.admission import queue_limits, should_spill
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
LONG_BODY: Final = 2**18
"""From this size on, in bytes, a body is decoded beside the event loop."""
_OPEN_PATHS: Final = frozenset({protocol.HEALTH, "/ready"})
_WHILE_DRAINING: Final = _OPEN_PATHS | {"/status", protocol.METRICS}
_EXPRESS_PATHS: Final = frozenset(protocol.GENERATE_PATHS) - {protocol.RESPONSES}
_NAMED: Final = RouteReason.NAMED
_YES_NO: Final = frozenset({bool, type(None)})
_CHALLENGE: Final = re.compile(r"[0-9a-f]{1,256}")
_REQUEST_ID: Final = re.compile(rb"[\w.:-]{1,128}")
_METRICS_HEAD: Final = b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n"

Handler = Callable[[Request, str], Awaitable[Response | None]]


class DrainingError(UnavailableError):
    """This router takes nothing new; its successor does."""


@dataclass(slots=True, eq=False)
class Gateway:
    """Answers every request of the router. `token` None: open to everybody. `key` proves who answers."""

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
        """From the next request on."""
        config = deployment.router
        self.deployment, self.policy = deployment, policy
        self.table.pin_bound, self.table.bounds = config.pin_bound, queue_limits(deployment)
        self.link.ejects_at_once = config.eject_connect_errors == 1
        self.dispatcher.configure(config)

    async def handle(self, request: Request) -> Response | None:
        """Raises nothing but DownstreamGoneError, where nobody is left to answer."""
        begun, request.begun_work = cast(RoutedRequest | None, request.begun_work), None
        request_id = self._request_id(request) if begun is None else begun.request_id
        if self.draining:
            request.keep_alive = False
        try:
            if begun is not None:
                response = await self._go_on(begun)
            else:
                response = await self._find(request)(request, request_id)
        except DownstreamGoneError:
            raise
        except HpcRouterError as error:
            response = self._refuse(request, error, request_id)
        except Exception:
            logger.exception("%s: %s %r failed", request_id, request.method, request.path[:200])
            failure = RoutingError("the router failed; its log says why")
            response = _error_response(500, "internal_error", failure, request_id, path=request.path)
        return response

    def _request_id(self, request: Request) -> str:
        if request.request_id and _REQUEST_ID.fullmatch(request.request_id):
            return request.request_id.decode()
        return f"{random.getrandbits(128):032x}"

    def _find(self, request: Request) -> Handler:
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
        if token in headers.notes:
            return
        offered = bearer_token(headers.text("authorization")) or headers.text("x-api-key")
        if not equal_secrets(offered, token):
            raise UnauthorizedError(
                "this router wants its owner's token as `Authorization: Bearer ...` or `x-api-key: ...`"
            )
        headers.notes[token] = True

    def _refuse(self, request: Request, error: HpcRouterError, request_id: str) -> Response:
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
        return json_response(await self.link.call(GetStatus()))

    async def _metrics(self, request: Request, request_id: str) -> Response:
        return Response(200, _METRICS_HEAD, (await self.link.call(GetExposition())).encode())

    async def _models(self, request: Request, request_id: str) -> Response:
        return json_response({"object": "list", "data": [self._model_card(name) for name in self._model_names()]})

    async def _model(self, request: Request, request_id: str) -> Response:
        name = request.path.removeprefix(protocol.MODELS + "/")
        if name not in self._model_names():
            raise self._unknown(name)
        return json_response(self._model_card(name))

    async def _route(self, request: Request, request_id: str) -> Response:
        """Explain where `auto` would send this prompt."""
        call = await self._read(request)
        explanation = self.policy.explain(self._prompt(call), ready=self.table.ready())
        return json_response(explanation.to_dict(id=request_id))

    async def _generate(self, request: Request, request_id: str) -> Response | None:
        self._admit()
        with self.in_flight:
            body = request.ready()
            call = decode(body) if body is not None and len(body) <= LONG_BODY else await self._read(request)
            if request.path.rstrip("/") == protocol.RESPONSES and call.fields.get(PARAM) is not None:
                session = session_id(request.headers)
                if session is not None:
                    await self.link.recall(session)
            return await self._serve(self._errand(request, request_id, call))

    async def _go_on(self, errand: RoutedRequest) -> Response | None:
        """From where `express` has come."""
        work, errand.work = errand.work, None  # they know each other
        if work is not None:
            work.leave()
        else:
            self._admit()  # others have come since it was looked at
        with self.in_flight:
            return await self._serve(errand)

    def _admit(self) -> None:
        if self.in_flight.total >= self.deployment.router.max_in_flight:
            raise OverloadedError(
                f"{self.deployment.router.max_in_flight} requests are in flight, as many as are admitted",
                retry_after_s=self.table.longest_wait_s(),
            )

    async def _serve(self, errand: RoutedRequest) -> Response | None:
        answered = await self.dispatcher.run(errand)
        self.metrics.requests.add(answered.expert, str(answered.reason), answered.status)
        return answered.response

    def express(self, request: Request) -> Work | None:
        """See `express`: the same as `handle`, as far as that goes without waiting. What it refuses, `handle` tells."""
        body = request.ready()
        if body is None or len(body) > LONG_BODY or self.in_flight.closing:
            return None
        if self.in_flight.total >= self.deployment.router.max_in_flight:
            return None
        try:
            if not self._goes_express(request):
                return None
            errand = self._errand(request, self._request_id(request), decode(body))
            work = FastPathRequest(self.dispatcher, errand, self.in_flight)
            begun = work.begin()
        except Exception:  # noqa: BLE001  # `handle` meets it as well, and tells
            return None
        request.begun_work = errand
        return work if begun else None

    def _goes_express(self, request: Request) -> bool:
        """By its head, which is asked once where it comes again and again. Raises what the handler would."""
        notes = request.headers.notes
        known: bool | None = notes.get(self)
        if known is None:
            known = request.method == "POST" and request.path in _EXPRESS_PATHS
            if known and self.token is not None:
                self._check_token(request.headers, self.token)
            notes[self] = known
        return known

    async def _read(self, request: Request) -> ApiCall:
        body = await request.read(limit_s=self.deployment.router.idle_timeout_s)
        return await asyncio.to_thread(decode, body) if len(body) > LONG_BODY else decode(body)

    def _errand(self, request: Request, request_id: str, call: ApiCall) -> RoutedRequest:
        started = time.perf_counter()
        path, model = request.path.rstrip("/"), call.model
        if type(call.fields.get("stream")) not in _YES_NO:
            raise BadRequestError("'stream' must be true or false", param="stream")
        target = f"{path}?{request.query}" if request.query else path
        dialect = dialect_of(path)
        session = None
        if path == protocol.RESPONSES:
            session = session_id(request.headers)
            continued = self.link.sessions.continued(session, call.fields, self.table, model=model)
            if continued is not None:
                turn, replica = continued
                reason = turn.reason if model == "auto" else RouteReason.NAMED
                return RoutedRequest(
                    request, target, dialect, request_id, call, (turn.expert,), reason, started, only=replica
                )
        if model != "auto":
            if model not in self.deployment.experts and not self.table.of(model):
                raise self._unknown(model)
            experts: tuple[str, ...] = (model,)
            reason = _NAMED
        else:
            experts, reason = self._chosen(path, call, first=dialect.conversation)
        on_answer = None if session is None else partial(self.link.sessions.answered, session)
        return RoutedRequest(request, target, dialect, request_id, call, experts, reason, started, on_answer=on_answer)

    def _chosen(self, path: str, call: ApiCall, *, first: str) -> tuple[tuple[str, ...], RouteReason]:
        """By the policy: the experts to try in turn, and why the first of them."""
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
        """Whether its expert is busy, the runner-up is not, and waiting costs more than the score it loses."""
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
            if shadow is not None:  # it only counts
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
        return card if name == "auto" else card | {"ready_replicas": sum(r.state == "ready" for r in replicas)}

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
