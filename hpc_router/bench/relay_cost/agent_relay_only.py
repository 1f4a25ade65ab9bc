"""Runs only the request path of an agent, for an engine that already runs, to measure what this path costs.

    python -m hpc_router.bench.relay_cost.agent_relay_only --run DIR --replica math-0.g1 --socket PATH

HTTP API, server, upstream connections and lease are those of the agent; no engine is started or supervised.
"""

import argparse
import asyncio
import signal
import socket
import sys
from pathlib import Path

import uvloop

from hpc_router.config.schema import Deployment
from hpc_router.errors import HpcRouterError
from hpc_router.expert.agent.agent import bind
from hpc_router.expert.agent.engine_relay import ENGINE_LIMITS
from hpc_router.expert.agent.http_api import AgentHttpApi
from hpc_router.net.addresses import LOOPBACK
from hpc_router.net.auth import new_token, replica_key
from hpc_router.relay.downstream.server import listening
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.state.io_thread import file_thread
from hpc_router.state.lease import Lease
from hpc_router.state.registry import Record, RecordKind, State, http_url, split_replica
from hpc_router.state.run_directory import RunDir, open_run

CAPACITY = 100_000


async def serve(run: RunDir, replica: str, engine: Path) -> None:
    """Serves requests as the agent of `replica` until SIGTERM or SIGINT. `engine`: path of the engine's unix socket."""
    expert, _, generation = split_replica(replica)
    settings, nonce, stop = Deployment(), new_token(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with UpstreamClient(ENGINE_LIMITS, socket_path=str(engine)) as client:
        http_api = AgentHttpApi(
            replica=replica,
            key=replica_key(run.secret(), nonce),
            capacity=CAPACITY,
            client=client,
            names=(expert,),
            lists_models=True,
            on_drain=lambda why, until_at: stop.set(),
            state=State.READY,
            models=(expert,),
        )
        with bind(LOOPBACK) as sock, file_thread(f"files of {replica}", log=run.logs / f"{replica}.log") as files:
            host, port = sock.getsockname()[:2]
            record = Record(
                kind=RecordKind.EXPERT,
                replica=replica,
                url=http_url(host, port),
                state=State.READY,
                serves={expert: expert},
                generation=generation,
                nonce=nonce,
                node=socket.gethostname(),
                beat_s=settings.cluster.beat_s,
                capacity=CAPACITY,
            )
            max_body = int((settings.router.max_body_mb + 1) * 2**20)
            async with (
                listening(http_api.handle, sock, max_body=max_body),
                Lease(run.registry, record, files, on_gone=stop.set),
            ):
                await stop.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hpc_router.bench.relay_cost.agent_relay_only", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--replica", required=True, help="replica name, such as math-0.g1")
    parser.add_argument("--socket", type=Path, required=True, help="the engine's socket")
    arguments = parser.parse_args()
    try:
        uvloop.run(serve(open_run(arguments.run), arguments.replica, arguments.socket))
    except HpcRouterError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
