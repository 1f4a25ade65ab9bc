"""What a relayed request and a streamed event cost the router's process, beside other ways to relay. Loopback only.

    python analysis/relay_cost.py --streams 300 --seconds 6 --tree before=/path/to/an/older/checkout

The engine, the load and each router are processes of their own; what is measured is the router's CPU time alone
(/proc/PID/task/*/schedstat), so the others only have to keep up; the median hop shows whether they do. Events are
counted while all streams are open. `floor` copies bytes blindly between two connections: the least that Python can do.
`aiohttp` is this tree over the reference client. Every answer and every stream is checked to be complete.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve()
MESSAGES = [{"role": "user", "content": "What is the sum of the first hundred odd numbers? " * 4}]
ANSWER = json.dumps({"id": "c", "object": "chat.completion", "choices": [{"message": {"content": "x" * 200}}]}).encode()
CARD = b'{"object":"list","data":[{"id":"math","object":"model"}]}'
EVENT = (
    b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" token"}}],"t":%d}\n\n'
)
PATH = "/v1/chat/completions"


def plain(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class Engine(asyncio.Protocol):
    """Answers at once, or streams `max_tokens` events at `rate` a second."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.got = transport, b""

    def data_received(self, data: bytes) -> None:
        self.got += data
        head, end, body = self.got.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET"):
            self.got = b""
            self.transport.write(plain(CARD))
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) < length:
            return
        self.got = b""
        call = json.loads(body)
        if not call["stream"]:
            self.transport.write(plain(ANSWER))
            return
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        self.left, self.gap = call["max_tokens"], 1 / call["rate"]
        self.loop = asyncio.get_running_loop()
        self.at = self.loop.time()
        self.tick()

    def tick(self) -> None:
        if self.transport.is_closing():
            return
        if not self.left:
            self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            return
        self.left -= 1
        event = EVENT % time.monotonic_ns()
        self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        self.at += self.gap
        self.loop.call_at(self.at, self.tick)


class Floor(asyncio.Protocol):
    """A pipe: what comes from one side goes to the other."""

    def __init__(self, port: int) -> None:
        self.port, self.other, self.early = port, None, []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if self.port:
            self.task = asyncio.create_task(self.connect())

    async def connect(self) -> None:
        _, upstream = await asyncio.get_running_loop().create_connection(lambda: Floor(0), "127.0.0.1", self.port)
        upstream.other, self.other = self.transport, upstream.transport
        for data in self.early:
            self.other.write(data)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early.append(data)
        else:
            self.other.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None:
            self.other.close()


class Client(asyncio.Protocol):
    """One connection of the load."""

    def __init__(self, request: bytes, over: Callable[["Client", bytes], bool]) -> None:
        self.request, self.over, self.done = request, over, asyncio.get_running_loop().create_future()
        self.events, self.hops, self.tail = 0, [], b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.over(self, data):
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.done.set_result(None)


def request(token: str, **fields: object) -> bytes:
    body = json.dumps({"model": "math", "messages": MESSAGES, **fields}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n"
    return head.encode() + b"accept: */*\r\nuser-agent: load\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


async def short_requests(port: int, token: str, *, connections: int, seconds: float) -> dict[str, float]:
    """Closed loop over kept connections."""
    stop, ask, done = time.monotonic() + seconds, request(token, stream=False), 0

    def over(client: Client, data: bytes) -> bool:
        nonlocal done
        client.tail += data
        if not client.tail.endswith(ANSWER):
            return False
        assert client.tail.startswith(b"HTTP/1.1 200"), client.tail
        done, client.tail = done + 1, b""
        if time.monotonic() > stop:
            return True
        client.transport.write(ask)
        return False

    await every(port, ask, over, connections)
    return {"count": done}


async def streams(port: int, token: str, *, count: int, rate: float, seconds: float) -> dict[str, float]:
    """`count` streams at once, begun over one second."""
    events = int(rate * seconds)
    ask, end = request(token, stream=True, max_tokens=events, rate=rate), b"data: [DONE]\n\n\r\n0\r\n\r\n"

    def over(client: Client, data: bytes) -> bool:
        client.events += data.count(b'"t":')
        at = data.find(b'"t":')
        if at >= 0 and not client.events % 8 and data[at:].find(b"}") > 0:
            client.hops.append(time.monotonic_ns() - int(data[at + 4 :].split(b"}", 1)[0]))
        client.tail = (client.tail + data)[-len(end) :]
        return client.tail.endswith(b"0\r\n\r\n")

    clients = await every(port, ask, over, count, spread_s=1.0)
    broken = [c for c in clients if c.events != events]
    assert not broken, f"{len(broken)} of {count} streams are incomplete, one has {broken[0].events} of {events}"
    hops = sorted(hop for client in clients for hop in client.hops)
    return {"count": count * events, "p50_ms": hops[len(hops) // 2] / 1e6, "p99_ms": hops[len(hops) * 99 // 100] / 1e6}


async def every(
    port: int, ask: bytes, over: Callable[[Client, bytes], bool], count: int, *, spread_s: float = 0.0
) -> list[Client]:
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(count):
        clients.append((await loop.create_connection(lambda: Client(ask, over), "127.0.0.1", port))[1])
        await asyncio.sleep(spread_s / count)
    if spread_s:
        print("begun", flush=True)
    await asyncio.gather(*(client.done for client in clients))
    return clients


async def serve(factory: Callable[[], asyncio.Protocol]) -> None:
    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def route(engine: int, *, reference: bool) -> None:
    from hpc_router import registry
    from hpc_router.config import Deployment, EngineConfig, ExpertConfig, RouterConfig
    from hpc_router.filethread import FileThread
    from hpc_router.router.service import serving
    from hpc_router.rundir import make_run

    options = {}
    if reference:
        from hpc_router.relay.upstream_aiohttp import AiohttpClient

        options["make_client"] = AiohttpClient
    run = make_run(Path(tempfile.mkdtemp()) / "run")
    record = registry.Record(
        kind=registry.Kind.EXTERNAL, replica="math-0.g1", url=f"http://127.0.0.1:{engine}", state=registry.State.READY,
        serves={"math": "math"}, capacity=100_000,
    )  # fmt: skip
    registry.publish(run.registry, record)
    deployment = Deployment(
        experts={"math": ExpertConfig(model="m", engine=EngineConfig(kind="sim"))},
        router=RouterConfig(discovery_s=1.0, max_in_flight=100_000),
    )
    deployment.policy.kind, deployment.policy.fallback = "model_field", "math"
    sock = socket.create_server(("127.0.0.1", 0))
    parts = serving(run, deployment, replica="router-0.g1", nonce="n", sock=sock, files=FileThread("f"), **options)
    async with parts as gateway:
        while not gateway.table.ready():
            await asyncio.sleep(0.05)
        print(sock.getsockname()[1], run.token(), flush=True)
        await asyncio.Event().wait()


@contextmanager
def process(role: str, *args: object, tree: Path | None = None) -> Iterator[tuple[int, Callable[[], list[str]]]]:
    """A role in a process of its own: its id, and what reads the next line that it says."""
    environment = os.environ | {"PYTHONPATH": str(tree or HERE.parents[1])}
    started = subprocess.Popen(
        [sys.executable, str(HERE), role, *map(str, args)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    lines = started.stdout
    try:
        yield started.pid, lambda: lines.readline().split()
    finally:
        started.kill()
        started.wait()


def cpu_s(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def private_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def measure(name: str, pid: int, said: list[str], args: argparse.Namespace) -> None:
    port, token = said[0], said[1] if len(said) > 1 else "none"
    before = cpu_s(pid)
    with process("short", port, token, args.connections, args.seconds) as (_, listen):
        count = json.loads(" ".join(listen()))["count"]
    short_us = (cpu_s(pid) - before) / count * 1e6
    with process("stream", port, token, args.streams, args.rate, args.seconds + 3) as (_, listen):
        assert listen() == ["begun"]
        time.sleep(1)
        before, begun_at = cpu_s(pid), time.monotonic()
        time.sleep(args.seconds)  # the streams' own clock makes the events
        event_us = (cpu_s(pid) - before) / (time.monotonic() - begun_at) / args.streams / args.rate * 1e6
        memory_mb = private_mb(pid)
        hops = json.loads(" ".join(listen()))
    print(
        f"{name:10} short {short_us:6.1f} us   event {event_us:6.1f} us   private {memory_mb:.0f} MB"
        f"   hop p50 {hops['p50_ms']:.2f} p99 {hops['p99_ms']:.2f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--rate", type=float, default=40.0)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=DIR", help="another checkout to measure")
    parser.add_argument("--only", default="", help="names, comma-separated")
    args = parser.parse_args()
    trees = {name: Path(folder) for name, folder in (pair.split("=", 1) for pair in args.tree)}
    with process("engine") as (_, listen):
        port = listen()[0]
        variants = {
            "floor": ("floor", port),
            **{name: ("route", port, folder) for name, folder in trees.items()},
            "aiohttp": ("reference", port),
            "relay": ("route", port),
        }
        for _ in range(args.rounds):
            for name, (role, engine, *tree) in variants.items():
                if not args.only or name in args.only.split(","):
                    with process(role, engine, tree=tree[0] if tree else None) as (pid, listen):
                        measure(name, pid, listen(), args)


def play(role: str, *given: str) -> None:
    import uvloop

    match role:
        case "engine":
            uvloop.run(serve(Engine))
        case "floor":
            uvloop.run(serve(lambda: Floor(int(given[0]))))
        case "route" | "reference":
            uvloop.run(route(int(given[0]), reference=role == "reference"))
        case "short":
            load = short_requests(int(given[0]), given[1], connections=int(given[2]), seconds=float(given[3]))
            print(json.dumps(uvloop.run(load)))
        case "stream":
            load = streams(int(given[0]), given[1], count=int(given[2]), rate=float(given[3]), seconds=float(given[4]))
            print(json.dumps(uvloop.run(load)))


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        play(*sys.argv[1:])
    else:
        main()
