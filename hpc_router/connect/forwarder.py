"""Forwards the requests of plain clients to the router that leads, bytes unchanged.

`client.following` has the rules: which router gets a request, and when it is sent again. While no router takes it, a
request is held for `hold_s` seconds; then the client gets status 503. At most MAX_HELD requests are held. A request
whose response has begun is never repeated; if the response breaks off, the client's connection is aborted. One thread
reads the registry for all requests, at most every `VIEW_S` seconds, so that a stalled file system delays few requests,
each by at most `REGISTRY_TIMEOUT_S`.
"""

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from hpc_router.client.following import SOCKET_OPTIONS, RequestNotTakenError, ResponseLostError, RouterFollower
from hpc_router.client.leader import REGISTRY_TIMEOUT_S, NoRouterError
from hpc_router.client.router_source import EndpointFolder
from hpc_router.errors import (
    BadRequestError,
    BodyTooLargeError,
    RequestTimeoutError,
    UnauthorizedError,
    UpstreamConnectError,
    UpstreamError,
)
from hpc_router.net.protocol import DRAINING_HEADER
from hpc_router.net.tls import client_context
from hpc_router.relay.downstream.interface import (
    DownstreamGoneError,
    Request,
    Response,
    error_response,
    unreadable_response,
)
from hpc_router.relay.headers import HOP_BY_HOP, Headers, crossing
from hpc_router.relay.unchanged_response import relay_unchanged
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.relay.upstream.interface import UpstreamResponse, UpstreamTimeouts, address_of
from hpc_router.state.io_thread import FileThread
from hpc_router.state.registry import Record

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_DAY_S: Final = 86_400.0
ROUTER_LIMITS: Final = UpstreamTimeouts(connect_s=5.0, first_byte_s=_DAY_S, idle_s=_DAY_S)
"""Only connecting has a short timeout: the router limits how long a response may take, and a client that gives up
closes its connection."""
BODY_S: Final = 300.0
"""Time limit in seconds for receiving the body of a request."""
VIEW_S: Final = 1.0
"""Seconds for which the last result of reading the registry is used, unless a request fails."""
MAX_HELD: Final = 1024
"""Maximum number of requests that wait for a router. Further requests get 503 at once."""
RETRY_AFTER_S: Final = 5
_TO_ROUTER: Final = HOP_BY_HOP | {b"content-length", b"expect", b"host"}
_FROM_A_BROWSER: Final = (b"origin", b"sec-fetch-site")
_LOOPBACK: Final = re.compile(rb"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)


class HoldFullError(NoRouterError):
    """No router leads, and MAX_HELD requests already wait for one."""


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """A request on its way to the router. `head`: its header lines. `without_token`: whether the client sent no token,
    so that the owner's token is added. `exchange`: context manager whose end also ends the exchange with the router."""

    request: Request
    body: bytes
    head: bytes
    without_token: bool
    exchange: AsyncExitStack


@dataclass(frozen=True, slots=True)
class ForwardedResponse:
    """The router's response, with the fields of `RouterResponse`."""

    status_code: int
    headers: Mapping[str, Any]
    upstream: UpstreamResponse
    exchange: AsyncExitStack


class Forwarder(RouterFollower[ForwardedRequest, ForwardedResponse]):
    """Forwards the requests that a server receives. `adds_tokens`: whether a request without credentials gets the
    owner's token, or with a share folder this user's (see `needs_token`). `held`: number of requests that wait for a
    router. `files`: the thread that reads the registry."""

    def __init__(self, folder: EndpointFolder, *, hold_s: float, adds_tokens: bool) -> None:
        super().__init__(folder, follow_s=hold_s, check_lock=asyncio.Lock())
        self._client = UpstreamClient(ROUTER_LIMITS, resend=False, socket_options=SOCKET_OPTIONS)
        self._adds_tokens = adds_tokens
        self._token = self._source.token()
        self.files = FileThread("registry")
        self._calls = FileThread("identity checks")  # a separate thread, because `files` may hang
        self._look: asyncio.Task[Record | None] | None = None
        self._look_began_at = self._looked_at = -math.inf
        self.held = 0

    def close(self) -> None:
        """Closes the connections to the router and ends the threads. Does not wait for a thread that hangs with the
        file system."""
        self._client.close()
        for thread in (self.files, self._calls):
            thread.close(timeout_s=0)

    async def handle(self, request: Request) -> Response | None:
        """Forwards a request. Returns the response that the server must send; None if the response was streamed already
        or the client's connection has ended or was aborted. Raises nothing but CancelledError."""
        try:
            body = request.complete_body()
            if body is None:
                body = await request.read(limit_s=BODY_S)
            async with AsyncExitStack() as exchange:
                return await self._forward(request, body, exchange)
        except (BodyTooLargeError, BadRequestError, RequestTimeoutError) as error:
            return unreadable_response(error, path=request.path)
        except NoRouterError as error:
            return _unavailable(error, path=request.path)
        except UnauthorizedError as error:
            return error_response(
                401, kind="authentication_error", code="unauthorized", message=str(error), path=request.path
            )
        except ResponseLostError as error:
            return _lost(error, path=request.path)
        except UpstreamError as error:
            self.invalidate()
            logger.warning("a response of the router broke off: %s", error)
            if not request.response_started:
                return _lost(error, path=request.path)
            request.abort()
        except DownstreamGoneError:
            pass
        except Exception:
            logger.exception("%s %r failed", request.method, request.path[:200])
            if not request.response_started:
                return error_response(
                    500, kind="internal_error", code="internal", message="connect failed; its log shows the cause"
                )
            request.abort()
        return None

    async def _forward(self, request: Request, body: bytes, exchange: AsyncExitStack) -> Response | None:
        head = crossing(request.headers, drop=_TO_ROUTER)
        if request.request_id:
            head += b"x-request-id: %b\r\n" % request.request_id
        without_token = self._adds_tokens and needs_token(request.headers)
        call = ForwardedRequest(request, body, head, without_token, exchange)
        response = await self.follow(call, replayable=True)
        return await relay_unchanged(request, response.upstream, on_progress=_ignore)

    async def report_leader(self) -> None:
        """Finds the router that leads and logs its name, or logs that no router leads."""
        if await self.find(recheck=True) is None:
            logger.info("no router leads; requests wait for one")

    # The methods that `RouterFollower` requires.

    async def send(self, call: ForwardedRequest, router: Record, token: str) -> ForwardedResponse:
        request = call.request
        head = b"%bauthorization: Bearer %b\r\n" % (call.head, token.encode()) if call.without_token else call.head
        if router.certificate is not None:
            self._client.tls = client_context(router.certificate)
        try:
            upstream = await call.exchange.enter_async_context(
                self._client.request(
                    request.method, address_of(router.url), request.target, head=head, body=call.body or None
                )
            )
        except UpstreamError as error:
            self.invalidate()
            unsent = isinstance(error, UpstreamConnectError) and not error.sent
            raise (RequestNotTakenError if unsent else ResponseLostError) from error
        draining = {DRAINING_HEADER: "1"} if DRAINING_HEADER.encode() in upstream.headers else {}
        return ForwardedResponse(upstream.status, draining, upstream, call.exchange)

    async def discard(self, response: ForwardedResponse) -> None:
        await response.exchange.aclose()

    def adds_token(self, call: ForwardedRequest) -> bool:
        return call.without_token

    async def call(self, function: Callable[[], _T]) -> _T:
        return await self._calls.run(function)

    async def pause(self, length_s: float) -> None:
        if self.held >= MAX_HELD:
            raise HoldFullError(f"{self._source.no_router_error()}; {self.held} requests wait for one")
        self.held += 1
        try:
            await _sleep(length_s)
        finally:
            self.held -= 1

    async def find(self, *, recheck: bool) -> Record | None:
        """Returns the record of the router that leads; None if no router serves. All requests share one read of the
        registry; without `recheck`, its result may be up to `VIEW_S` seconds old. A read that takes longer than
        REGISTRY_TIMEOUT_S continues in the background; until it ends, the last result is used."""
        now = time.monotonic()
        if not recheck and now - self._looked_at < VIEW_S:
            return self._source.last
        if self._look is None:
            self._look, self._look_began_at = asyncio.create_task(self._look_up(recheck=recheck)), now
        left_s = max(0.0, self._look_began_at + REGISTRY_TIMEOUT_S - now)
        done, _ = await asyncio.wait({self._look}, timeout=left_s)
        return done.pop().result() if done else self._source.last

    async def _look_up(self, *, recheck: bool) -> Record | None:
        before = self._source.last
        try:
            found = await self.files.run(lambda: self._source.find(recheck=recheck))
        finally:
            self._look = None
        self._looked_at = time.monotonic()
        if found is not None and (before is None or before.url != found.url):
            logger.info("requests go to %s at %s", found.replica, found.url)
        elif found is None and before is not None:
            logger.info("no router leads; requests wait for one")
        return found


def needs_token(headers: Headers) -> bool:
    """Returns whether a request over the unix socket gets the owner's token: whether it has no credentials and comes
    from no browser. With `ssh -L` on a laptop, every web page in the laptop's browser can send requests to the socket.
    A browser's request is recognised by its `Origin` header, which every POST has, or by a `Host` header that does not
    name the loopback (DNS rebinding: a page makes its own name point to the loopback)."""
    if b"authorization" in headers or b"x-api-key" in headers or any(name in headers for name in _FROM_A_BROWSER):
        return False
    return _LOOPBACK.fullmatch(headers.get(b"host", b"localhost")) is not None


def _unavailable(error: NoRouterError, *, path: str) -> Response:
    """Returns a response with status 503 that asks the client to try again after RETRY_AFTER_S seconds."""
    response = error_response(503, kind="service_unavailable", code="no_router", message=str(error), path=path)
    response.add("retry-after", str(RETRY_AFTER_S))
    return response


def _lost(error: Exception, *, path: str) -> Response:
    """Returns a response with status 502 that tells the official clients not to repeat the request, because the router
    may have processed it."""
    response = error_response(502, kind="upstream_error", code="response_lost", message=str(error), path=path)
    response.add("x-should-retry", "false")
    return response


def _ignore() -> None:
    pass


_sleep = asyncio.sleep
