"""Cuts the network off while three clients wait for a response. Runs in a network namespace of its own.

Prints one line per client once its request has ended. From the cut on, the peer's kernel is silent, like that of a node
that was switched off.
"""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Awaitable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiohttp import web

from hpc_router.client import async_openai_client, following, openai_client, transport
from hpc_router.connect import forwarder as forwarder_module
from hpc_router.connect.forwarder import Forwarder
from hpc_router.connect.listener import _listen_unix
from hpc_router.net.protocol import CHAT
from hpc_router.relay.downstream.server import listening
from hpc_router.state.run_directory import make_run
from tests.client.fakes import FakeRouter, enter, fake_router, record_of
from tests.support.waiting import eventually

QUICK: Final = {socket.TCP_KEEPIDLE: 1, socket.TCP_KEEPINTVL: 1, socket.TCP_USER_TIMEOUT: 1000}


async def never(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
    await asyncio.Event().wait()
    return web.Response()


async def main(folder: Path) -> None:
    options = tuple((level, name, QUICK.get(name, value)) for level, name, value in following.SOCKET_OPTIONS)
    transport.SOCKET_OPTIONS = forwarder_module.SOCKET_OPTIONS = options  # type: ignore[attr-defined]
    run = make_run(folder / "run")
    async with fake_router(run, never) as router:
        enter(run, record_of(router.url))
        sync, asynchronous = openai_client(run.path, follow_s=0), async_openai_client(run.path, follow_s=0)
        messages: Any = [{"role": "user", "content": "?"}]
        with closing(Forwarder(run, hold_s=0, adds_tokens=True)) as forwarder:
            async with (
                listening(forwarder.handle, _listen_unix(folder / "s"), max_body=2**16),
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(folder / "s"))) as session,
            ):
                waiting = [
                    _ends("connect", _status(session)),
                    _ends("sync", asyncio.to_thread(sync.chat.completions.create, model="m", messages=messages)),
                    _ends("async", asynchronous.chat.completions.create(model="m", messages=messages)),
                ]
                all_end = asyncio.gather(*waiting)
                await eventually(lambda: len(router.offered) == 3)
                await asyncio.to_thread(subprocess.run, ["ip", "link", "set", "lo", "down"], check=True)
                await all_end
        sync.close()
        await asynchronous.close()


async def _status(session: aiohttp.ClientSession) -> int:
    async with session.post(f"http://localhost{CHAT}", json={}) as response:
        return response.status


async def _ends(name: str, call: Awaitable[object]) -> None:
    try:
        result = await call
    except Exception as error:  # noqa: BLE001 - printed
        result = type(error).__name__
    print(name, result, flush=True)


if __name__ == "__main__":
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    asyncio.run(main(Path(sys.argv[1])))
