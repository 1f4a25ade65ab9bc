"""Transports that carry the openai client's requests to whichever router leads now.

Rules: what provably reached nobody (no connection, a router that drains) is tried again until a router takes it or
`follow_s` is over; a request whose connection ended before any answer is sent once more, never twice more; whatever the
router answered goes to the caller. The token is added here, once the address is known, so that it cannot go elsewhere.
Only `hpc_router.client` imports this, when it makes a client: it loads openai.
"""

import importlib
import random
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread
import openai

from hpc_router.leader import Leader, NoRouterError
from hpc_router.registry import Record
from hpc_router.rundir import RunDir
from hpc_router.wire import DRAINING_HEADER, HEALTH

if TYPE_CHECKING:
    import httpx2 as http
else:  # whichever HTTP library the installed openai is made with
    http = importlib.import_module(openai.DefaultHttpxClient.__base__.__module__.partition(".")[0])

NOWHERE: Final = "hpc-router.invalid"
"""The host that clients believe they talk to; it resolves nowhere."""
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0
PATIENCE_S: Final = 2.0
"""For a file system, whose last view stands afterwards, and for a router that should say that it is there."""
_LIMITS: Final = {"max_connections": 1000, "max_keepalive_connections": 100}


class NoRouterConnectionError(NoRouterError, openai.APIConnectionError):
    """`NoRouterError` as the openai client knows it, so that it is told at once instead of retried."""

    def __init__(self, message: str, *, request: "http.Request") -> None:
        openai.APIConnectionError.__init__(self, message=message, request=request)


class Errand:
    """What one request has been through: whether it may be tried again, and when. Pure."""

    def __init__(self, *, follow_s: float, now: float, replayable: bool) -> None:
        self._deadline = now + follow_s
        self._replayable = replayable
        self._tried: set[str] = set()
        self._pauses = 0
        self._resent = False
        self._renewed = False
        self.doubt = False
        self.unsure = False
        """Whether the router must answer something harmless first: a dying one may accept connections for a moment."""

    def may_try(self, router: Record) -> bool:
        """A router that took nothing is tried again only after a pause; another one at once."""
        return router.url not in self._tried

    def took_nothing(self, router: Record) -> None:
        self.doubt = True
        self._tried.add(router.url)

    def may_resend(self) -> bool:
        """After a connection that ended without an answer: once."""
        may, self._resent, self.doubt = self._replayable and not self._resent, True, True
        self.unsure = may
        return may

    def may_renew(self) -> bool:
        """After a 401: once, if the token has changed."""
        may, self._renewed = self._replayable and not self._renewed, True
        return may

    def drains(self, status: int, headers: Mapping[str, str]) -> bool:
        return self._replayable and status == 503 and DRAINING_HEADER in headers

    def pause_s(self, now: float, chance: float) -> float | None:
        """Before the next look; None: time is up. `chance` (0 to 1) spreads many clients that wait for one router."""
        left_s = self._deadline - now
        if left_s <= 0:
            return None
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._pauses, 10)) * (0.5 + chance / 2)
        self._pauses += 1
        self._tried.clear()
        self.doubt = True
        return min(pause_s, left_s)


class _Follower:
    """What both transports share: everything but waiting."""

    def __init__(self, run: RunDir, *, follow_s: float) -> None:
        self._run = run
        self._leader = Leader(run)
        self._follow_s = follow_s
        self._token: str | None = None

    def _begin(self, request: "http.Request") -> Errand:
        if request.url.host != NOWHERE:
            raise http.UnsupportedProtocol(f"this client talks to its own router only, not to {request.url.host}")
        return Errand(follow_s=self._follow_s, now=time.monotonic(), replayable=_replayable(request))

    def _known_token(self) -> str:
        if self._token is None:
            self._token = self._run.token()
        return self._token

    def _renewed(self, token: str) -> bool:
        """Whether another one than this, which was refused, stands in the file now."""
        self._token = self._run.token()
        return self._token != token

    def _addressed(self, request: "http.Request", router: Record, token: str) -> "http.Request":
        """The same bytes to the router's address."""
        at = http.URL(router.url)
        url = request.url.copy_with(scheme=at.scheme, host=at.host, port=at.port)
        headers = request.headers.copy()
        headers["host"] = url.netloc.decode("ascii")
        headers["authorization"] = f"Bearer {token}"
        return http.Request(
            request.method, url, headers=headers, stream=request.stream, extensions=dict(request.extensions)
        )

    def _given_up(self, request: "http.Request", last: Record | None) -> NoRouterConnectionError:
        message = str(self._leader.missing())
        if last is not None:
            message = f"{last.replica} at {last.url} took no request within {self._follow_s:g} s; {message}"
        return NoRouterConnectionError(message, request=request)


class FollowingTransport(_Follower, http.BaseTransport):
    def __init__(self, run: RunDir, *, follow_s: float) -> None:
        super().__init__(run, follow_s=follow_s)
        self._inner = http.HTTPTransport(trust_env=False, limits=http.Limits(**_LIMITS))

    def handle_request(self, request: "http.Request") -> "http.Response":
        errand = self._begin(request)
        router: Record | None = None
        while True:
            router = self._find(request, errand, last=router)
            if errand.unsure and not self._answers(router):
                errand.took_nothing(router)
                continue
            errand.unsure = False
            token = self._known_token()
            try:
                response = self._inner.handle_request(self._addressed(request, router, token))
            except (http.ConnectError, http.ConnectTimeout):
                errand.took_nothing(router)
                continue
            except (http.NetworkError, http.RemoteProtocolError) as error:
                if errand.may_resend():
                    continue
                raise _lost(request, router) from error
            if errand.drains(response.status_code, response.headers):
                errand.took_nothing(router)
            elif response.status_code != 401 or not errand.may_renew() or not self._renewed(token):
                return response
            response.close()

    def close(self) -> None:
        self._inner.close()

    def _answers(self, router: Record) -> bool:
        try:
            self._inner.handle_request(_health_of(router)).close()
        except http.TransportError:
            return False
        return True

    def _find(self, request: "http.Request", errand: Errand, *, last: Record | None) -> Record:
        while True:
            router = self._leader.look(doubt=errand.doubt)
            if router is not None and errand.may_try(router):
                return router
            pause_s = errand.pause_s(time.monotonic(), random.random())
            if pause_s is None:
                raise self._given_up(request, router and last)
            _sleep(pause_s)


class AsyncFollowingTransport(_Follower, http.AsyncBaseTransport):
    """The same for event loops, of asyncio or trio: files are read beside the loop."""

    def __init__(self, run: RunDir, *, follow_s: float) -> None:
        super().__init__(run, follow_s=follow_s)
        self._inner = http.AsyncHTTPTransport(trust_env=False, limits=http.Limits(**_LIMITS))

    async def handle_async_request(self, request: "http.Request") -> "http.Response":
        errand = self._begin(request)
        router: Record | None = None
        while True:
            router = await self._find(request, errand, last=router)
            if errand.unsure and not await self._answers(router):
                errand.took_nothing(router)
                continue
            errand.unsure = False
            token = await anyio.to_thread.run_sync(self._known_token) if self._token is None else self._token
            try:
                response = await self._inner.handle_async_request(self._addressed(request, router, token))
            except (http.ConnectError, http.ConnectTimeout):
                errand.took_nothing(router)
                continue
            except (http.NetworkError, http.RemoteProtocolError) as error:
                if errand.may_resend():
                    continue
                raise _lost(request, router) from error
            if errand.drains(response.status_code, response.headers):
                errand.took_nothing(router)
            elif (
                response.status_code != 401
                or not errand.may_renew()
                or not await anyio.to_thread.run_sync(self._renewed, token)
            ):
                return response
            await response.aclose()

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _answers(self, router: Record) -> bool:
        try:
            await (await self._inner.handle_async_request(_health_of(router))).aclose()
        except http.TransportError:
            return False
        return True

    async def _find(self, request: "http.Request", errand: Errand, *, last: Record | None) -> Record:
        while True:
            router = await self._look(doubt=errand.doubt)
            if router is not None and errand.may_try(router):
                return router
            pause_s = errand.pause_s(time.monotonic(), random.random())
            if pause_s is None:
                raise self._given_up(request, router and last)
            await _async_sleep(pause_s)

    async def _look(self, *, doubt: bool) -> Record | None:
        with anyio.move_on_after(PATIENCE_S):
            return await anyio.to_thread.run_sync(lambda: self._leader.look(doubt=doubt), abandon_on_cancel=True)
        return self._leader.view


def _replayable(request: "http.Request") -> bool:
    try:
        request.content  # noqa: B018 - raises for a body that is made while it is sent
    except http.RequestNotRead:
        return False
    return True


def _health_of(router: Record) -> "http.Request":
    """Needs no token."""
    timeouts = dict.fromkeys(("connect", "read", "write", "pool"), PATIENCE_S)
    return http.Request("GET", router.url + HEALTH, extensions={"timeout": timeouts})


def _lost(request: "http.Request", router: Record) -> openai.APIConnectionError:
    message = f"the connection to {router.replica} at {router.url} ended without an answer; it may have done the work"
    return openai.APIConnectionError(message=message, request=request)


_sleep = time.sleep
_async_sleep = anyio.sleep
