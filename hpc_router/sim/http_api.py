"""The HTTP surface: vLLM's paths, plus `/sim/*` to script faults and to see what arrived.

Errors of any kind leave as the API's error bodies through one boundary, which also records `/v1/*` requests and strikes
the faults of the paths that compute nothing. What computes is in `inference`.
"""

from collections.abc import Awaitable, Callable

from aiohttp import web

from hpc_router import __version__
from hpc_router.errors import ConfigError
from hpc_router.sim import response_formats
from hpc_router.sim.admission import Stopped
from hpc_router.sim.api_error import ApiError
from hpc_router.sim.context import Core
from hpc_router.sim.fault_injection import Severed, strike
from hpc_router.sim.faults import ResponseForm
from hpc_router.sim.handlers import Inference
from hpc_router.sim.metrics import EngineMetrics

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_COMPUTING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"})


def make_app(core: Core) -> web.Application:
    surface, inference = Surface(core), Inference(core)
    # client_max_size=0: no limit, as vLLM has none.
    app = web.Application(middlewares=[surface.boundary], client_max_size=0)
    app.on_response_prepare.append(_label)
    app.add_routes(
        [
            web.post("/v1/chat/completions", inference.chat),
            web.post("/v1/completions", inference.completions),
            web.post("/v1/embeddings", inference.embeddings),
            web.post("/v1/responses", inference.responses),
            web.post("/v1/messages", inference.messages),
            web.get("/v1/models", surface.models),
            web.get("/health", surface.health),
            web.get("/version", surface.version),
            web.get("/metrics", surface.metrics),
            web.get("/sim/last", surface.last),
            web.get("/sim/faults", surface.show_faults),
            web.post("/sim/faults", surface.set_faults),
        ]
    )
    return app


class Surface:
    """The boundary, and the handlers that compute nothing."""

    def __init__(self, core: Core) -> None:
        self._core = core
        batching = core.batching
        self._metrics = EngineMetrics(
            core.scheduler.counts,
            model=core.config.model,
            capacity=core.config.capacity,
            steps=None if batching is None else lambda: (batching.step_s, batching.lost_s),
        )
        self._created = int(core.clock.unix_s())

        @web.middleware
        async def boundary(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._bounded(request, handler)

        self.boundary = boundary

    async def _bounded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            await self._before(request)
            return await handler(request)
        except ApiError as exc:
            return _json(exc.body(request.path), status=exc.status, headers=exc.headers)
        except web.HTTPException as exc:
            headers = {"Allow": exc.headers["Allow"]} if "Allow" in exc.headers else {}
            body = ApiError(exc.reason, status=exc.status).body(request.path)
            return _json(body, status=exc.status, headers=headers)
        except Stopped:  # an embedding has no form for it
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        except (Severed, ConnectionError):
            # The connection is gone; aiohttp wants a response all the same and drops it.
            return web.Response()

    async def _before(self, request: web.Request) -> None:
        core, path = self._core, request.path
        if path.startswith("/sim/"):
            return
        if path.startswith("/v1/"):
            await self._record(request)
        if path not in _COMPUTING:
            _, fault = core.script.select(path, model=None, answer=ResponseForm.OTHER)
            if fault is not None:
                core.scheduler.counts.faults[fault.kind] += 1
                await strike(fault, request, crash=core.crash, clock=core.clock)
        if not core.loaded:
            raise ApiError("The simulated model is still loading.", status=503)

    async def _record(self, request: web.Request) -> None:
        self._core.recent.add(
            method=request.method,
            path=request.raw_path,
            http_version=f"{request.version.major}.{request.version.minor}",
            headers=request.raw_headers,
            body=await request.read(),
        )

    async def models(self, _: web.Request) -> web.Response:
        config = self._core.config
        return _json(
            response_formats.models_body(config.names, created=self._created, max_model_len=config.max_model_len)
        )

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def version(self, _: web.Request) -> web.Response:
        return _json(response_formats.encode({"version": f"{__version__}+sim", "simulated": True}))

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def last(self, request: web.Request) -> web.Response:
        count = request.query.get("n", "1")
        if not count.isdecimal():
            raise ApiError(f"'n' is {count!r}; a whole number from 0 is needed", param="n")
        received = [entry.to_json() for entry in self._core.recent.last(int(count))]
        return _json(response_formats.encode({"simulated": True, "requests": received}))

    async def show_faults(self, _: web.Request) -> web.Response:
        return _json(response_formats.encode({"simulated": True, "faults": self._core.script.describe()}))

    async def set_faults(self, request: web.Request) -> web.Response:
        try:
            self._core.script.load(await request.read())
        except ConfigError as exc:
            raise ApiError(str(exc)) from exc
        return await self.show_faults(request)


def _json(body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


async def _label(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["x-simulated"] = "true"
