"""The router's HTTP API: paths, authentication, and errors in the format of each API.

There is one handler and one table of routes. `/health` signs a challenge, so that a client does not send its token to
another process on this port. `Gateway` authenticates a request and finds its handler; `route_request` chooses the
experts of an API request, and `dispatcher` serves it.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qs

from hpc_router.config.schema import Deployment
from hpc_router.errors import (
    BadRequestError,
    MethodNotAllowedError,
    OriginNotAllowedError,
    OverloadedError,
    OwnerOnlyError,
    ShedError,
    UnauthorizedError,
    UnknownPathError,
)
from hpc_router.net import protocol
from hpc_router.net.auth import bearer_token, challenge_answer, equal_secrets, user_key
from hpc_router.relay.downstream.cross_origin import CrossOrigin
from hpc_router.relay.downstream.interface import (
    DownstreamGoneError,
    PendingResponse,
    Request,
    Response,
    json_response,
)
from hpc_router.relay.headers import Headers
from hpc_router.relay.in_flight import InFlight
from hpc_router.router.access.user_access import UserAccess, UserTokens
from hpc_router.router.ipc.messages import GetExposition, GetHandover, GetOverview, GetStatus
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.admission import queue_limits
from hpc_router.router.replicas.fair_order import LOWEST
from hpc_router.router.replicas.prefixes import prompt_prefix
from hpc_router.router.replicas.sessions import PARAM, session_id
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.router.worker import dashboard
from hpc_router.router.worker.batch_api import BatchApi, BatchHandler
from hpc_router.router.worker.control_client import ControlClient
from hpc_router.router.worker.dispatcher import Dispatcher
from hpc_router.router.worker.error_responses import RETRY_AFTER_S, DrainingError, error_code
from hpc_router.router.worker.request_body import ApiCall, decode
from hpc_router.router.worker.route_request import RequestRouting, endpoint_of
from hpc_router.router.worker.routed_request import ApiEndpoint, session_key
from hpc_router.routing.policy import Explanation, Policy
from hpc_router.routing.prompt_text import PROMPT_FIELDS
from hpc_router.state.request_records import REQUEST_ID

logger = logging.getLogger(__name__)

LONG_BODY_BYTES: Final = 2**18
"""Length in bytes above which a body is decoded, and its prompt extracted, in a thread."""
_OPEN_PATHS: Final = frozenset({protocol.HEALTH, "/ready", protocol.HANDOVER, "/dashboard"})
"""Paths that need no owner's token. The handover path checks the replica key instead, and the page has no data."""
_WHILE_DRAINING: Final = _OPEN_PATHS | {"/status", "/overview", protocol.METRICS}
"""Paths that are served while the router drains."""
_OWNER_PATHS: Final = frozenset({"/status", "/overview", protocol.METRICS})
"""Paths that only the owner's token opens."""
_FAST_PATHS: Final = frozenset(protocol.POST_PATHS) - {protocol.RESPONSES}
"""Paths whose requests can be served without a task."""
MAX_SCORE: Final = 1000
"""Limit of the absolute value of a score that a client gives to a request."""
_CHALLENGE: Final = re.compile(r"[0-9a-f]{1,256}")
_REQUEST_ID: Final = re.compile(REQUEST_ID.pattern.encode())
_METRICS_HEAD: Final = b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n"

_NO_TOKEN: Final = "this router wants a token as `Authorization: Bearer ...` or `x-api-key: ...`"
_UNKNOWN_TOKEN: Final = (
    f"{_NO_TOKEN}: that of this run's owner, or one that `hpc-router token create` has made and that is not revoked"
)

Handler = Callable[[Request, str], Awaitable[Response | None]]
_KnownHead = tuple[ApiEndpoint, UserAccess | None]
"""What is cached with the head of a request that needs no task to be routed: its endpoint, and what its token allows;
None for the owner's token."""


@dataclass(slots=True, eq=False)
class Gateway:
    """The handler of all requests of a worker. `token`: the owner's token; None turns authentication off. `key`: signs
    the challenges of `/health`. `nonce`: that of the router's record. `link`: the connection to the control process.
    `users`: the tokens of other users. `batch_api`: the handlers of files and batches; None: these paths are not
    served."""

    deployment: Deployment
    table: ReplicaTable
    routing: RequestRouting
    dispatcher: Dispatcher
    metrics: Metrics
    link: ControlClient
    token: str | None
    replica: str
    key: str
    nonce: str
    users: UserTokens = field(default_factory=UserTokens)
    in_flight: InFlight = field(default_factory=InFlight)
    batch_api: BatchApi | None = None
    started_at: float = field(default_factory=time.time)
    cross_origin: CrossOrigin = field(default_factory=CrossOrigin)
    routes: Mapping[tuple[str, str], Handler] = field(init=False)

    @property
    def policy(self) -> Policy:
        return self.routing.policy

    @property
    def draining(self) -> bool:
        return self.in_flight.closing

    @draining.setter
    def draining(self, value: bool) -> None:
        self.in_flight.closing = value

    def __post_init__(self) -> None:
        self.cross_origin.allow(self.deployment.router.allowed_origins)
        self.table.excess = self._excess
        self.routes = {
            ("GET", protocol.HEALTH): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", protocol.HANDOVER): self._handover,
            ("GET", "/status"): self._status,
            ("GET", "/overview"): self._overview,
            ("GET", "/dashboard"): self._dashboard,
            ("GET", protocol.METRICS): self._metrics,
            ("GET", protocol.MODELS): self._models,
            ("POST", "/route"): self._route,
            ("POST", protocol.FEEDBACK): self._feedback,
            **{("POST", path): self._generate for path in protocol.POST_PATHS},
        }

    def reconfigure(self, deployment: Deployment, policy: Policy) -> None:
        """Applies the deployment's settings and the policy to later requests."""
        config = deployment.router
        self.deployment = self.routing.deployment = deployment
        self.routing.policy = policy
        self.table.pin_bound, self.table.bounds = config.pin_bound, queue_limits(deployment)
        self.link.ejects_at_once = config.eject_connect_errors == 1
        self.dispatcher.configure(config)
        self.dispatcher.records.configure(config, window=deployment.policy.window)
        self.cross_origin.allow(config.allowed_origins)

    def handle(self, request: Request) -> PendingResponse | Coroutine[Any, Any, Response | None]:
        """Starts to serve a request. Returns a `RoutedRequest` if the request only has to be routed and sent, which
        needs no task; for any other request, a coroutine that serves it in a task."""
        if request.request_id and _REQUEST_ID.fullmatch(request.request_id):
            request_id = request.request_id.decode()
        else:
            request_id = f"{random.getrandbits(128):032x}"
        body = request.complete_body()
        known: _KnownHead | None = request.headers.cached.get(self) or self._known_head(request)
        if self.in_flight.closing:
            request.keep_alive = False
            known = None
        if known is None or body is None or len(body) > LONG_BODY_BYTES:
            return self._respond(request, request_id)
        endpoint, access = known
        if access is not None and access.expires_at <= time.time():
            del request.headers.cached[self]
            return self._respond(request, request_id)
        try:
            self._admit(endpoint)
            routed = self.routing.route(request, request_id, decode(body), endpoint, access)
            if access is not None:
                self.routing.charge(routed, access)
            routed.start()
        except Exception as error:  # noqa: BLE001  # logged and reported to the client
            return _ready(self._refuse(error, request, request_id))
        return routed

    async def _respond(self, request: Request, request_id: str) -> Response | None:
        """Serves a request in a task and returns the response; None if it was streamed. Raises only
        DownstreamGoneError, after the client has disconnected."""
        try:
            return await self._find_route(request)(request, request_id)
        except DownstreamGoneError:
            raise
        except Exception as error:  # noqa: BLE001  # logged and reported to the client
            return self._refuse(error, request, request_id)

    def _refuse(self, error: Exception, request: Request, request_id: str) -> Response:
        """Returns the response to an error. An API request is recorded, unless its token is not valid: requests that
        anyone can send must not displace other records."""
        response = self.dispatcher.errors.response_to(error, request, request_id)
        path = request.path.rstrip("/")
        if path in protocol.POST_PATHS and not isinstance(error, UnauthorizedError):
            access = self._access(request)
            user = None if access is None else access.token.user
            self.dispatcher.records.refused(request_id, path, response.status, error_code(error), user=user)
        return response

    def _known_head(self, request: Request) -> _KnownHead | None:
        """Returns the API endpoint of a request whose head shows that it needs no task to be routed, and what its token
        allows; None for any other request. The result is cached for later requests with the same head."""
        if request.method != "POST" or request.path not in _FAST_PATHS:
            return None
        try:
            access = self._authorize(request.headers)
            known = request.headers.cached[self] = endpoint_of(request), access
        except (UnauthorizedError, BadRequestError):
            return None
        return known

    def _find_route(self, request: Request) -> Handler:
        """Returns the handler of the request. Raises an error with a 4xx or 503 status if the request is not
        authorized, its path or method is not served, or the router drains."""
        path = request.path.rstrip("/") or "/"
        if self.cross_origin.is_preflight(request.method, request.headers):
            return self._preflight
        if path not in _OPEN_PATHS and self._authorize(request.headers) is not None and path in _OWNER_PATHS:
            raise OwnerOnlyError(f"{path} needs the token of the deployment's owner")
        if self.draining and path not in _WHILE_DRAINING:
            raise DrainingError(f"{self.replica} is draining; ask its successor", retry_after_s=RETRY_AFTER_S)
        method = "GET" if request.method == "HEAD" else request.method
        handler = self.routes.get((method, path)) or (handlers := self._handlers_at(path)).get(method)
        if handler is None:
            what = f"{request.method} {request.path[:200]!r} is not served"
            if handlers:
                allowed = (*handlers, "HEAD") if "GET" in handlers else tuple(handlers)
                raise MethodNotAllowedError(f"{what} (valid methods: {', '.join(allowed)})", allowed=allowed)
            paths = sorted(f"{method} {path}" for method, path in self.routes)
            raise UnknownPathError(f"{what} (valid: {', '.join(paths)})")
        return handler

    def _handlers_at(self, path: str) -> dict[str, Handler]:
        """Returns the handlers of the path, by HTTP method; empty if the path is not served."""
        if path.startswith(protocol.MODELS + "/"):
            return {"GET": self._model}
        if stored := protocol.STORED_RESPONSE.fullmatch(path):
            return dict.fromkeys(protocol.STORED_METHODS[stored[2]], self._stored_response)
        if self.batch_api is not None and (methods := self.batch_api.methods(path)):
            return {method: partial(self._batch_call, handler) for method, handler in methods.items()}
        return {method: handler for (method, at), handler in self.routes.items() if at == path}

    def _authorize(self, headers: Headers) -> UserAccess | None:
        """Returns what the token in the headers allows; None for the owner's token, which allows everything. The
        token's entry is cached with the head, but each call checks again that the token has not expired or been
        revoked. Raises UnauthorizedError."""
        token, cached = self.token, headers.cached
        if token is None or token in cached:
            return None
        access: UserAccess | None = cached.get(self.users)
        if access is None or access.revoked:
            given = bearer_token(headers.text("authorization")) or headers.text("x-api-key")
            if equal_secrets(given, token):
                user_token_id = headers.text(protocol.ON_BEHALF_HEADER)
                if not user_token_id:
                    cached[token] = True
                    return None
                access = self.users.access_of(user_token_id)
            else:
                access = self.users.find(given)
            if access is None:
                raise UnauthorizedError(_NO_TOKEN if not given else _UNKNOWN_TOKEN)
            cached[self.users] = access
        if access.expires_at <= time.time():
            raise UnauthorizedError("this token has expired; the deployment's owner can create another one")
        return access

    def _access(self, request: Request) -> UserAccess | None:
        """Returns what the token of an authorized request allows; None for the owner's token, which has no limits."""
        return request.headers.cached.get(self.users)

    async def _preflight(self, request: Request, request_id: str) -> Response:
        """Responds to a CORS preflight, by which a browser asks whether a page of another origin may send a request. A
        preflight has no token."""
        lines = self.cross_origin.preflight_lines(request.headers)
        if lines is None:
            origin = request.headers.text("origin")[:200]
            raise OriginNotAllowedError(f"the origin {origin!r} is not in router.allowed_origins")
        return Response(204, lines)

    async def _health(self, request: Request, request_id: str) -> Response:
        challenge = protocol.challenge_in(request.query)
        if challenge and not _CHALLENGE.fullmatch(challenge):
            raise BadRequestError("a challenge has 1 to 256 digits of 0-9 and a-f", param="challenge")
        key = self._challenged_key(request.query)
        answer = challenge_answer(key, challenge) if challenge and key is not None else None
        return json_response({"status": "ok", "replica": self.replica, "answer": answer})

    def _challenged_key(self, query: str) -> str | None:
        """Returns the key with which the router proves itself to the sender of a challenge: for a user's token, which
        the query names by its ID, the key derived from the token; None if there is no such token."""
        name = protocol.token_id_in(query)
        if name is None:
            return self.key
        access = self.users.access_of(name)
        return None if access is None else user_key(access.token.digest, self.nonce)

    async def _ready(self, request: Request, request_id: str) -> Response:
        ready = [] if self.draining else sorted(self.table.ready())
        return json_response({"ready": ready}, status=200 if ready else 503)

    async def _handover(self, request: Request, request_id: str) -> Response:
        """Responds to a successor of this router with the session turns and counts that it takes over. The successor
        sends this router's replica key instead of the owner's token."""
        if not equal_secrets(bearer_token(request.headers.text("authorization")) or "", self.key):
            raise UnauthorizedError(f"{protocol.HANDOVER} is for routers of this run")
        skip = protocol.skip_in(request.query)
        return json_response(await self.link.call(GetHandover(skip)))

    async def _status(self, request: Request, request_id: str) -> Response:
        return json_response(await self.link.call(GetStatus()))

    async def _overview(self, request: Request, request_id: str) -> Response | None:
        """Responds with the overview. With `?follow=true`, streams one overview per line until the client leaves."""
        follows = parse_qs(request.query, keep_blank_values=True).get("follow", ["false"])[-1]
        if follows not in ("true", "false"):
            raise BadRequestError(f"follow is {follows[:20]!r}; valid: true, false", param="follow")
        if follows == "false" or request.method == "HEAD":
            return json_response(await self.link.call(GetOverview()))
        await dashboard.follow(request, lambda: self.link.call(GetOverview()), lambda: self.draining)
        return None

    async def _dashboard(self, request: Request, request_id: str) -> Response:
        return dashboard.page()

    async def _metrics(self, request: Request, request_id: str) -> Response:
        return Response(200, _METRICS_HEAD, (await self.link.call(GetExposition())).encode())

    async def _models(self, request: Request, request_id: str) -> Response:
        return json_response(
            {
                "object": "list",
                "data": [self._model_card(name) for name in self.routing.model_names(self._access(request))],
            }
        )

    async def _model(self, request: Request, request_id: str) -> Response:
        name, access = request.path.removeprefix(protocol.MODELS + "/"), self._access(request)
        if name not in self.routing.model_names():
            raise self.routing.unknown(name, access)
        if access is not None and name != "auto":
            access.check_expert(name)
        return json_response(self._model_card(name))

    async def _route(self, request: Request, request_id: str) -> Response:
        """Responds to `POST /route`: explains how the prompt in the body would be routed for model `auto`."""
        call = await self._read_call(request)
        if not any(name in call.fields for name in PROMPT_FIELDS):
            raise BadRequestError(f"the body has no prompt (valid fields: {', '.join(PROMPT_FIELDS)})", param="prompt")
        explanation = self.routing.explain(call, self._access(request))
        return json_response(
            {**explanation.to_dict(id=request_id), "replicas": self._estimates(request, call, explanation)}
        )

    def _estimates(self, request: Request, call: ApiCall, explanation: Explanation) -> list[dict[str, Any]]:
        """Returns what the choice of a replica of the decided expert would weigh for this prompt."""
        expert = explanation.decision.expert
        if expert is None:
            return []
        prefix = prompt_prefix(call.raw, call.fields, session_key(request.headers))
        return [one._asdict() for one in self.table.explain(expert, prefix)]

    async def _feedback(self, request: Request, request_id: str) -> Response:
        """Records the score in the body, which a client gives to an earlier request of the same user."""
        fields = (await self._read_call(request)).fields
        rated, score = fields.get("id"), fields.get("score")
        if not isinstance(rated, str) or not REQUEST_ID.fullmatch(rated):
            raise BadRequestError("'id' is the x-request-id of an earlier response", param="id")
        if not isinstance(score, int | float) or isinstance(score, bool) or not -MAX_SCORE <= score <= MAX_SCORE:
            raise BadRequestError(f"'score' is a number from -{MAX_SCORE} to {MAX_SCORE}", param="score")
        if not self.dispatcher.records.enabled:
            raise BadRequestError("this router keeps no records of requests (router.records_gb is 0)")
        access = self._access(request)
        self.dispatcher.records.feedback(rated, score, user=None if access is None else access.token.user)
        return json_response({"id": rated, "score": score})

    async def _generate(self, request: Request, request_id: str) -> Response | None:
        endpoint = endpoint_of(request)
        self._admit(endpoint)
        with self.in_flight:
            body = request.complete_body()
            call = decode(body) if body is not None and len(body) <= LONG_BODY_BYTES else await self._read_call(request)
            if request.path.rstrip("/") == protocol.RESPONSES and call.fields.get(PARAM) is not None:
                session = session_id(request.headers)
                if session is not None:
                    await self.link.recall(session)
            access = self._access(request)
            routed = self.routing.route(request, request_id, call, endpoint, access)
            if access is not None:
                self.routing.charge(routed, access)
            return await self.dispatcher.respond(routed)

    async def _stored_response(self, request: Request, request_id: str) -> Response | None:
        self._admit(endpoint_of(request))
        with self.in_flight:
            session = session_id(request.headers)
            if session is not None:
                await self.link.recall(session)
            access = self._access(request)
            routed = await self.routing.route_stored(request, request_id, session, access)
            if access is not None:
                self.routing.charge(routed, access)
            return await self.dispatcher.respond(routed)

    async def _batch_call(self, handler: BatchHandler, request: Request, request_id: str) -> Response | None:
        assert self.batch_api is not None
        with self.in_flight:
            return await self.batch_api.respond(handler, request, self._access(request))

    def _admit(self, endpoint: ApiEndpoint) -> None:
        """Raises ShedError or OverloadedError if the router has as many requests in flight as `router.max_in_flight`
        allows. Admits the request nevertheless if a waiting request of a lower class can be rejected instead."""
        if self.in_flight.total >= self.deployment.router.max_in_flight:
            text = f"{self.deployment.router.max_in_flight} requests are in flight, the limit of router.max_in_flight"
            retry_after_s = self.table.longest_wait_s()
            if endpoint.request_class is LOWEST:
                raise ShedError(text, limit="max_in_flight", retry_after_s=retry_after_s)
            if not self.table.shed_for_newcomer():
                raise OverloadedError(text, retry_after_s=retry_after_s)

    def _excess(self) -> int:
        """Returns the number of requests in flight beyond `router.max_in_flight`; negative below the limit."""
        return self.in_flight.total - self.deployment.router.max_in_flight

    async def _read_call(self, request: Request) -> ApiCall:
        """Waits for the complete body and returns it decoded."""
        body = await request.read(limit_s=self.deployment.router.idle_timeout_s)
        if len(body) <= LONG_BODY_BYTES:
            return decode(body)
        return await asyncio.to_thread(self.routing.read_long, body, request.path.rstrip("/"))

    def _model_card(self, name: str) -> dict[str, Any]:
        """Returns the entry of a model in `/v1/models`, with vLLM's keys: `root` is the model's path, `parent` the base
        model of an adapter, and `max_model_len` the context length, the smallest one of all ready replicas. Null means
        unknown."""
        replicas = self.table.all() if name == "auto" else self.table.of(name)
        ready = [replica for replica in replicas if replica.state == "ready"]
        engines = [replica.record.engine for replica in replicas]
        expert = self.deployment.experts.get(name)
        lengths = [length for replica in ready if (length := replica.max_model_len) is not None]
        root = next((engine.model for engine in engines if engine.model), None) if expert is None else expert.model
        card: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": int(self.started_at),
            "owned_by": "hpc_router",
            "root": "auto" if name == "auto" else root,
            "parent": None if expert is None else expert.adapter_of,
            "max_model_len": min(lengths, default=None),
        }
        if any(engine.kind == "sim" for engine in engines):
            card["simulated"] = True
        return card if name == "auto" else card | {"ready_replicas": len(ready)}


async def _ready(response: Response) -> Response:
    return response
