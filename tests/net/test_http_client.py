"""HTTP requests with a limit on time and size."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from hpc_router.net.http_client import MAX_RESPONSE_BYTES, Unreachable, call, session


@asynccontextmanager
async def serving(body: bytes) -> AsyncIterator[str]:
    async def handle(_: web.BaseRequest) -> web.Response:
        return web.Response(body=body)

    server = await asyncio.get_running_loop().create_server(web.Server(handle), "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}"


async def test_an_answer_is_json_or_text() -> None:
    async with session() as client:
        async with serving(b'{"a": 1}') as url:
            assert (await call(client, "GET", url)).body == {"a": 1}
        async with serving(b"[" * 100_000) as url:
            assert (await call(client, "GET", url)).body == "[" * 100_000


async def test_an_answer_has_a_limit() -> None:
    async with session() as client:
        async with serving(b" " * MAX_RESPONSE_BYTES) as url:
            assert (await call(client, "GET", url)).status == 200
        async with serving(b" " * (MAX_RESPONSE_BYTES + 1)) as url:
            with pytest.raises(Unreachable, match="longer than"):
                await call(client, "GET", url)
