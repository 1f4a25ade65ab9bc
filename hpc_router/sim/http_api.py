"""The HTTP API: vLLM's paths, and `/sim/*` to set faults and to read recent requests.

One middleware turns every error into the API's error body, records `/v1/*` requests, and injects the faults of paths
that generate no text, such as `/v1/models`. The paths that generate text are in `handlers`, which injects their faults.
"""

from collections.abc import Awaitable, Callable

from aiohttp import web

from hpc_router import __version__
from hpc_router.errors import ConfigError
from hpc_router.sim import response_formats
from hpc_router.sim.admission import EngineStopped
from hpc_router.sim.api_error import ApiError
from hpc_router.sim.context import EngineContext
from hpc_router.sim.fault_injection import ConnectionBroken, inject
from hpc_router.sim.faults import ResponseForm
from hpc_router.sim.handlers import InferenceHandlers
from hpc_router.sim.metrics import EngineMetrics
from hpc_router.sim.streaming import json_answer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SCORE_PATHS = ("/v1/score", "/score")
_RERANK_PATHS = ("/v1/rerank", "/rerank", "/v2/rerank")
_INFERENCE_PATHS = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"),
        *(*_SCORE_PATHS, *_RERANK_PATHS),
    }
)


def make_app(context: EngineContext) -> web.Application:
    api, inference = EngineHttpApi(context), InferenceHandlers(context)
    # client_max_size=0 means no limit, as in vLLM.
    app = web.Application(middlewares=[api.boundary], client_max_size=0)
    app.on_response_prepare.append(_label)
    app.add_routes(
        [
            web.post("/v1/chat/completions", inference.chat),
            web.post("/v1/completions", inference.completions),
            web.post("/v1/embeddings", inference.embeddings),
            web.post("/v1/responses", inference.responses),
            web.post("/v1/messages", inference.messages),
            web.post("/v1/messages/count_tokens", inference.count_tokens),
            *(web.post(path, inference.score) for path in _SCORE_PATHS),
            *(web.post(path, inference.rerank) for path in _RERANK_PATHS),
            web.post("/tokenize", inference.tokenize),
            web.post("/detokenize", inference.detokenize),
            web.get("/v1/responses/{response_id}", inference.stored_response),
            web.post("/v1/responses/{response_id}/cancel", inference.cancel_response),
            web.get("/v1/models", api.models),
            web.get("/health", api.health),
            web.get("/version", api.version),
            web.get("/metrics", api.metrics),
            web.get("/sim/last", api.last),
            web.get("/sim/faults", api.show_faults),
            web.post("/sim/faults", api.set_faults),
        ]
    )
    return app


class EngineHttpApi:
    """The middleware that turns errors into responses, and the handlers of paths that generate no text."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context
        batch = context.batch
        self._metrics = EngineMetrics(
            context.admission.counts,
            model=context.config.model,
            pool=context.pool,
            steps=None if batch is None else lambda: (batch.step_s, batch.lost_s),
        )
        self._created = int(context.clock.unix_s())

        @web.middleware
        async def boundary(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._answer(request, handler)

        self.boundary = boundary

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            await self._prepare(request)
            return await handler(request)
        except ApiError as exc:
            return json_answer(exc.body(request.path), status=exc.status, headers=exc.headers)
        except web.HTTPException as exc:
            headers = {"Allow": exc.headers["Allow"]} if "Allow" in exc.headers else {}
            body = ApiError(exc.reason, status=exc.status).body(request.path)
            return json_answer(body, status=exc.status, headers=headers)
        except EngineStopped:  # an embedding has no form for an aborted response
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        except (ConnectionBroken, ConnectionError):
            # The connection is closed; aiohttp needs a response object, which it drops.
            return web.Response()

    async def _prepare(self, request: web.Request) -> None:
        context, path = self._context, request.path
        if path.startswith("/sim/"):
            return
        if path.startswith("/v1/"):
            await self._record(request)
        if path not in _INFERENCE_PATHS:
            _, fault = context.faults.select(path, model=None, answer=ResponseForm.OTHER)
            if fault is not None:
                context.admission.counts.faults[fault.kind] += 1
                await inject(fault, request, crash=context.crash, clock=context.clock)
        if not context.loaded:
            raise ApiError("The simulated model is still loading.", status=503)

    async def _record(self, request: web.Request) -> None:
        self._context.requests.add(
            method=request.method,
            path=request.raw_path,
            http_version=f"{request.version.major}.{request.version.minor}",
            headers=request.raw_headers,
            body=await request.read(),
        )

    async def models(self, _: web.Request) -> web.Response:
        config = self._context.config
        return json_answer(
            response_formats.models_body(config.names, created=self._created, max_model_len=config.max_model_len)
        )

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def version(self, _: web.Request) -> web.Response:
        return json_answer(response_formats.encode({"version": f"{__version__}+sim", "simulated": True}))

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def last(self, request: web.Request) -> web.Response:
        count = request.query.get("n", "1")
        if not count.isdecimal():
            raise ApiError(f"'n' is {count!r}; a whole number from 0 is needed", param="n")
        received = [entry.to_json() for entry in self._context.requests.last(int(count))]
        return json_answer(response_formats.encode({"simulated": True, "requests": received}))

    async def show_faults(self, _: web.Request) -> web.Response:
        return json_answer(response_formats.encode({"simulated": True, "faults": self._context.faults.describe()}))

    async def set_faults(self, request: web.Request) -> web.Response:
        try:
            self._context.faults.load(await request.read())
        except ConfigError as exc:
            raise ApiError(str(exc)) from exc
        return await self.show_faults(request)


async def _label(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["x-simulated"] = "true"
