"""The upstream side against servers that send exactly what a script says: the client that serves, and its reference."""

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpc_router.errors import UpstreamConnectError, UpstreamError, UpstreamTimeoutError
from hpc_router.net import protocol
from hpc_router.relay.headers import lines
from hpc_router.relay.upstream import client as upstream_module
from hpc_router.relay.upstream.client import UpstreamClient, request_head
from hpc_router.relay.upstream.interface import Address, Upstream, UpstreamTimeouts, address_of
from tests.relay.malformed import ENDLESS, MALFORMED, TRUNCATED
from tests.relay.scripted import CHUNKED, Answer, End, chunked, head, scripted, sized
from tests.support.relays import MakeClient
from tests.support.waiting import GUARD_S, eventually

PATIENT = UpstreamTimeouts(connect_s=GUARD_S, first_byte_s=GUARD_S, idle_s=GUARD_S)
HASTY = UpstreamTimeouts(connect_s=GUARD_S, first_byte_s=0.1, idle_s=0.1)


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose sockets have short paths."""
    return tmp_path_factory.mktemp("s")


async def fetch(
    client: Upstream, address: Address, method: str = "GET", target: str = "/", **options: Any
) -> tuple[int, bytes]:
    async with client.request(method, address, target, **options) as answer:
        return answer.status, await answer.read(2**30)


async def collect(client: Upstream, address: Address, into: list[bytes]) -> None:
    """What came stays in `into`, whatever comes after it."""
    async with client.request("GET", address, "/") as answer:
        async for chunk in answer.chunks():
            into.append(chunk)


WELL_FORMED = {
    "length": ("GET", sized(b"abc"), b"abc", True),
    "no body": ("GET", sized(b""), b"", True),
    "chunks": ("GET", head(CHUNKED) + chunked(b"a", b"bc"), b"abc", True),
    "an empty chunked body": ("GET", head(CHUNKED) + chunked(), b"", True),
    "trailers": ("GET", head(CHUNKED) + chunked(b"abc", trailers=b"x: y\r\n", extension=b";a=b"), b"abc", True),
    "after interim answers": ("GET", head(status=b"100 x") + head(status=b"103 x") + sized(b"abc"), b"abc", True),
    "204": ("GET", head(status=b"204 No Content"), b"", True),
    "304 with a length": ("GET", head(b"content-length: 5", status=b"304 Not Modified"), b"", True),
    "HEAD": ("HEAD", head(b"content-length: 5"), b"", None),
    "connection: close": ("GET", sized(b"abc", b"connection: close"), b"abc", False),
    "HTTP/1.0": ("GET", head(b"content-length: 3", version=b"1.0") + b"abc", b"abc", False),
}


@pytest.mark.parametrize(("method", "data", "body", "kept"), WELL_FORMED.values(), ids=WELL_FORMED)
async def test_well_formed_answers(
    make_client: MakeClient, method: str, data: bytes, body: bytes, kept: bool | None
) -> None:
    """Their end is known without the connection's, which then carries the next request where it may."""
    async with scripted([data]) as server, make_client(PATIENT) as client:
        for _ in range(2):
            assert (await fetch(client, server.address, method))[1] == body
        assert kept is None or server.connections == (1 if kept else 2)


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_without_a_length_the_connections_end_is_the_bodys(make_client: MakeClient, version: bytes) -> None:
    async with scripted([head(version=version), b"ab", b"c", End.CLOSE]) as server, make_client(PATIENT) as client:
        assert await fetch(client, server.address) == (200, b"abc")


async def test_status_headers_and_content_type(make_client: MakeClient) -> None:
    fields = [b"content-type: Text/Event-Stream; charset=utf-8", b"set-cookie: a=1", b"Set-Cookie: b=2", b"x-empty:"]
    async with (
        scripted([sized(b"", *fields, status=b"429 Slow Down")]) as server,
        make_client(PATIENT) as client,
        client.request("GET", server.address, "/") as answer,
    ):
        assert (answer.status, answer.content_type) == (429, b"text/event-stream")
        assert answer.headers.all(b"set-cookie") == [b"a=1", b"b=2"]
        assert answer.headers.get(b"x-empty") == b""


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_answers_are_refused_at_once(data: bytes) -> None:
    """The reference is more lenient, and waits for the rest of a chunked body that cannot come any more."""
    async with scripted([data, End.HANG]) as server, UpstreamClient(PATIENT) as client:
        with pytest.raises(UpstreamError, match=r"malformed|headers"):
            await fetch(client, server.address)
        await eventually(lambda: server.left == 1)


@pytest.mark.parametrize(("beginning", "more"), ENDLESS.values(), ids=ENDLESS)
async def test_what_has_no_end_is_refused(beginning: bytes, more: bytes) -> None:
    async with scripted([beginning, *[more * 2000] * 1000]) as server, UpstreamClient(PATIENT) as client:
        with pytest.raises(UpstreamError, match="headers"):
            await fetch(client, server.address)


async def test_what_came_before_the_garbage_is_passed_on(make_client: MakeClient) -> None:
    garbage = b"!garbage!\r\n"
    answer: Answer = [head(CHUNKED), b"3\r\nabc\r\n", garbage, End.HANG]
    async with scripted(answer) as server, make_client(HASTY) as client:
        got: list[bytes] = []
        with pytest.raises(UpstreamError):
            await collect(client, server.address, got)
        assert b"".join(got) == b"abc"


@pytest.mark.parametrize("end", [End.CLOSE, End.RESET])
@pytest.mark.parametrize("data", TRUNCATED.values(), ids=TRUNCATED)
async def test_truncated_answers_fail(make_client: MakeClient, data: bytes, end: End) -> None:
    async with scripted([data, end]) as server, make_client(PATIENT) as client:
        with pytest.raises(UpstreamError):
            await fetch(client, server.address, "POST", body=b"x")
        assert server.connections == 1, "a fresh connection's failure is the replica's own"


async def test_a_refused_connection(make_client: MakeClient, tmp_path: Path) -> None:
    async with scripted([b""]) as server:
        gone = server.address
    async with make_client(PATIENT) as client, make_client(PATIENT, socket_path=str(tmp_path / "none")) as local:
        with pytest.raises(UpstreamConnectError):
            await fetch(client, gone)
        with pytest.raises(UpstreamConnectError):
            await fetch(local, address_of("http://engine"))
        with pytest.raises(UpstreamConnectError):
            await fetch(client, address_of("http://no-such-host.invalid:1"))


@pytest.mark.parametrize("answer", [[End.HANG], [b"HTTP/1.1 200", End.HANG], [head(status=b"100 x"), End.HANG]])
async def test_silence_before_the_answer(make_client: MakeClient, answer: Answer) -> None:
    async with scripted(answer) as server, make_client(HASTY) as client:
        with pytest.raises(UpstreamTimeoutError):
            await fetch(client, server.address)
        await eventually(lambda: server.left == 1)


async def test_silence_inside_the_answer(make_client: MakeClient) -> None:
    async with scripted([head(CHUNKED) + b"3\r\nabc\r\n", End.HANG]) as server, make_client(HASTY) as client:
        got: list[bytes] = []
        with pytest.raises(UpstreamTimeoutError):
            await collect(client, server.address, got)
        assert b"".join(got) == b"abc"
        await eventually(lambda: server.left == 1)


async def test_a_lost_replica_is_not_waited_for_as_long(make_client: MakeClient) -> None:
    async with scripted([End.HANG]) as server, make_client(PATIENT) as client:
        with pytest.raises(UpstreamTimeoutError):
            await fetch(client, server.address, watch=lambda idle_timer: idle_timer.tighten(0.05))


@pytest.mark.parametrize("size", [0, 1, 2**16, 2**20, 5 * 2**20 + 1])
async def test_bodies_go_out_as_they_are(make_client: MakeClient, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with scripted([sized(b"ok")]) as server, make_client(PATIENT) as client:
        for _ in range(2):
            fields = lines({"content-type": "application/json", "x-mine": "1"})
            got = await fetch(client, server.address, "POST", "/v1?a=b+c", head=fields, body=body)
            assert got == (200, b"ok")
        assert server.bodies == [body, body]
        assert server.connections == 1
        sent = server.heads[0].lower().split(b"\r\n")
        assert sent[0] == b"post /v1?a=b+c http/1.1"
        assert b"x-mine: 1" in sent
        assert b"host: " + server.address.header in sent
        assert not any(line.startswith((b"accept", b"user-agent", b"transfer-encoding")) for line in sent)


async def test_an_answer_before_the_body_is_taken_ends_the_sending() -> None:
    """An engine may refuse a body that it does not read; who goes on sending never sees why."""
    answer: Answer = [sized(b"too large", status=b"413 x"), End.HANG]
    async with scripted(answer, reads_bodies=False) as server, UpstreamClient(PATIENT) as client:
        assert await fetch(client, server.address, "POST", body=b"x" * 2**26) == (413, b"too large")
        assert client.pooled == 0


async def test_a_unix_socket(make_client: MakeClient, short: Path) -> None:
    path = short / "e.sock"
    async with scripted([sized(b"abc")], path=path) as server, make_client(PATIENT, socket_path=str(path)) as client:
        assert await fetch(client, address_of("http://engine"), target="/x") == (200, b"abc")
        assert b"host: engine\r\n" in server.heads[0].lower()


@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "localhost"), ("::1", "[::1]")])
async def test_names_and_ipv6_addresses(make_client: MakeClient, host: str, name: str) -> None:
    async with scripted([sized(b"abc")], host=host) as server, make_client(PATIENT) as client:
        assert await fetch(client, address_of(f"http://{name}:{server.address.port}")) == (200, b"abc")


@pytest.mark.parametrize(
    "answer", [[End.HANG], [head(CHUNKED) + b"3\r\nabc\r\n", End.HANG]], ids=["waiting", "reading"]
)
async def test_who_is_cancelled_has_closed_the_connection(make_client: MakeClient, answer: Answer) -> None:
    async with scripted(answer) as server, make_client(PATIENT) as client:
        task = asyncio.create_task(fetch(client, server.address))
        await eventually(lambda: server.heads)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: server.left == 1)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
async def test_https_believes_only_certificates_it_knows(short: Path) -> None:
    key, certificate = short / "key", short / "certificate"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *name]
    await asyncio.to_thread(
        subprocess.run, [*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True
    )
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate, key)
    known = ssl.create_default_context(cafile=certificate)
    async with scripted([sized(b"abc")], tls=own) as server:
        port = server.address.port
        async with UpstreamClient(PATIENT, tls=known) as client:
            for _ in range(2):
                assert await fetch(client, address_of(f"https://localhost:{port}")) == (200, b"abc")
            assert server.connections == 1
            with pytest.raises(UpstreamConnectError):
                await fetch(client, address_of(f"https://127.0.0.1:{port}"))
        async with UpstreamClient(PATIENT) as stranger:
            with pytest.raises(UpstreamConnectError):
                await fetch(stranger, address_of(f"https://localhost:{port}"))


async def test_leaving_early_closes_the_connection(make_client: MakeClient) -> None:
    async with scripted([head(CHUNKED) + b"3\r\nabc\r\n", End.HANG]) as server, make_client(PATIENT) as client:
        async with client.request("GET", server.address, "/") as answer:
            assert answer.status == 200
            assert server.left == 0
        await eventually(lambda: server.left == 1)


@pytest.mark.parametrize("end", [End.CLOSE, End.RESET])
async def test_a_kept_connection_that_dies_without_a_word_costs_nothing(end: End) -> None:
    """As when the engine closes it in the moment in which it is used again. The reference retries no POST."""
    async with scripted([sized(b"a")], [end], [sized(b"b")]) as server, UpstreamClient(PATIENT) as client:
        assert await fetch(client, server.address, "POST", body=b"1") == (200, b"a")
        assert await fetch(client, server.address, "POST", body=b"2") == (200, b"b")
        assert server.bodies == [b"1", b"2", b"2"]
        assert server.connections == 2


@pytest.mark.parametrize("begun", [b"H", head(status=b"100 x"), head(CHUNKED)])
async def test_a_kept_connection_that_had_begun_to_answer_is_not_tried_again(begun: bytes) -> None:
    async with scripted([sized(b"a")], [begun, End.CLOSE], [sized(b"b")]) as server, UpstreamClient(PATIENT) as client:
        await fetch(client, server.address, "POST", body=b"1")
        with pytest.raises(UpstreamError):
            await fetch(client, server.address, "POST", body=b"2")
        assert server.bodies == [b"1", b"2"]


async def test_a_retry_is_made_once(make_client: MakeClient) -> None:
    async with scripted([sized(b"a")], [End.CLOSE]) as server, make_client(PATIENT) as client:
        await fetch(client, server.address, "POST", body=b"1")
        with pytest.raises(UpstreamError):
            await fetch(client, server.address, "POST", body=b"2")
        assert len(server.bodies) <= 3


async def test_silence_on_a_kept_connection_is_no_reason_to_ask_again() -> None:
    async with scripted([sized(b"a")], [End.HANG]) as server, UpstreamClient(HASTY) as client:
        await fetch(client, server.address)
        with pytest.raises(UpstreamTimeoutError):
            await fetch(client, server.address)
        assert len(server.heads) == 2


async def test_idle_connections_are_closed_before_the_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_module, "KEEP_ALIVE_S", 0.05)
    async with scripted([sized(b"a")]) as server, UpstreamClient(PATIENT) as client:
        await fetch(client, server.address)
        assert client.pooled == 1
        await eventually(lambda: server.left == 1)
        assert client.pooled == 0


async def test_what_comes_unasked_spoils_a_kept_connection() -> None:
    async with scripted([sized(b"a")]) as server, UpstreamClient(PATIENT) as client:
        await fetch(client, server.address)
        server.writers[0].write(sized(b"a second answer"))
        await eventually(lambda: client.pooled == 0)
        assert await fetch(client, server.address) == (200, b"a")


async def test_at_the_end_kept_connections_are_closed(make_client: MakeClient) -> None:
    async with scripted([sized(b"a")]) as server:
        async with make_client(PATIENT) as client:
            await fetch(client, server.address)
        await eventually(lambda: server.left == 1)


async def test_who_does_not_read_stops_the_upstream(make_client: MakeClient) -> None:
    """Memory stays bounded: the server is stuck long before it has written all, and goes on once it is read."""
    piece, count = b"x" * 2**16, 1024
    async with scripted([sized(piece * count)[:-1], b"y"]) as server, make_client(PATIENT) as client:
        server.answers[0] = [head(b"content-length: %d" % (len(piece) * count)), *[piece] * count]
        async with client.request("GET", server.address, "/") as answer:
            still, last = 0, -1
            while still < 500:
                await asyncio.sleep(0)
                still, last = (still + 1 if server.written == last else 0), server.written
            assert server.written < 2**25
            assert len(await answer.read(2**30)) == len(piece) * count


class Collector:
    """A sink that has room for `room` pieces at a time."""

    def __init__(self, room: int) -> None:
        self.room = self.left = room
        self.pieces: list[bytes] = []
        self.full = 0

    def write(self, data: bytes) -> bool:
        assert self.left > 0, "nothing may come before there is room"
        self.pieces.append(data)
        self.left -= 1
        return self.left > 0

    def chunk_writer(self) -> None:
        return None

    async def drain(self) -> None:
        self.full += 1
        for _ in range(3):
            await asyncio.sleep(0)
        self.left = self.room


@pytest.mark.parametrize("room", [1, 3, 10_000])
async def test_a_sink_gets_everything_in_order_and_never_too_much(make_client: MakeClient, room: int) -> None:
    pieces = [b"%d;" % i for i in range(300)]
    framed = [b"%x\r\n%b\r\n" % (len(p), p) for p in pieces]
    async with scripted([head(CHUNKED), *framed, b"0\r\n\r\n"]) as server, make_client(PATIENT) as client:
        for _ in range(2):
            sink = Collector(room)
            async with client.request("GET", server.address, "/") as answer:
                await answer.stream_to(sink)
            assert b"".join(sink.pieces) == b"".join(pieces)
        assert server.connections == 1
        assert (sink.full > 0) == (room < 300)


async def test_a_sink_without_room_stops_the_upstream(make_client: MakeClient) -> None:
    """And does not make it look silent."""

    class Stuck(Collector):
        def __init__(self) -> None:
            super().__init__(1)
            self.stuck, self.go_on = asyncio.Event(), asyncio.Event()

        async def drain(self) -> None:
            self.stuck.set()
            await self.go_on.wait()
            self.left = 10_000

    piece, count = b"x" * 2**16, 1024
    answer = [head(b"content-length: %d" % (len(piece) * count)), *[piece] * count]
    limits = UpstreamTimeouts(connect_s=GUARD_S, first_byte_s=GUARD_S, idle_s=1.0)
    async with scripted(answer) as server, scripted([End.HANG]) as silent, make_client(limits) as client:
        sink = Stuck()

        async def run() -> None:
            async with client.request("GET", server.address, "/") as response:
                await response.stream_to(sink)

        task = asyncio.create_task(run())
        await sink.stuck.wait()
        longer = UpstreamTimeouts(connect_s=GUARD_S, first_byte_s=2.0, idle_s=GUARD_S)
        async with make_client(longer) as other:
            with pytest.raises(UpstreamTimeoutError):
                await fetch(other, silent.address)
        assert server.written < 2**25
        assert not task.done()
        sink.go_on.set()
        await task
        assert sum(map(len, sink.pieces)) == len(piece) * count


@pytest.mark.parametrize("at", [1, 3])
async def test_what_a_sink_raises_ends_the_exchange(make_client: MakeClient, at: int) -> None:
    class Picky(Collector):
        def write(self, data: bytes) -> bool:
            super().write(data)
            if len(self.pieces) >= at:
                raise LookupError("enough")
            return True

    steps: Answer = [head(CHUNKED), *[b"1\r\nx\r\n"] * 100_000, End.HANG]
    async with scripted(steps) as server, make_client(PATIENT) as client:
        with pytest.raises(LookupError):
            async with client.request("GET", server.address, "/") as answer:
                await answer.stream_to(Picky(10_000))
        await eventually(lambda: server.left == 1)


@pytest.mark.parametrize("prefix", ["", "/v2"])
def test_a_base_path_comes_before_every_path(prefix: str) -> None:
    address = address_of(f"http://engine:81{prefix}/")
    sent = request_head("POST", address, "/x?y", b"a: b\r\n", b"abc")
    assert sent == b"POST %b/x?y HTTP/1.1\r\nhost: engine:81\r\na: b\r\ncontent-length: 3\r\n\r\n" % prefix.encode()


@pytest.mark.parametrize(
    ("base", "target", "sent"),
    [
        ("", "/v1/chat/completions?a=/v1/", "/v1/chat/completions?a=/v1/"),
        ("/", "/v1/models", "/v1/models"),
        ("/v1", "/v1/models", "/v1/models"),
        ("/v1/", "/health", "/health"),
        ("/v1beta/openai", "/v1/chat/completions", "/v1beta/openai/chat/completions"),
        ("/api/paas/v4/", "/v1/models", "/api/paas/v4/models"),
        ("/proxy/v1", "/v1/models", "/proxy/v1/models"),
        ("/proxy/v1", "/health", "/proxy/health"),
        ("/proxy", "/v1x", "/proxy/v1x"),
        ("/v1/v1", "/v1/v1", "/v1/v1/v1"),
    ],
)
def test_a_base_path_replaces_v1(base: str, target: str, sent: str) -> None:
    head = request_head("GET", address_of(f"https://h{base}"), target, b"", None)
    assert head.startswith(b"GET %b HTTP/1.1\r\n" % sent.encode())
    assert protocol.url_at(f"https://h{base}", target) == f"https://h{sent}"


@pytest.mark.parametrize(
    "target", ["/x\r\nx: y", "/x y", "/x\n", "/x\0", "/x\ty", "/x\x7f", "/x\x85y", "/\udce4", "/ä"]
)
def test_a_request_cannot_be_split_in_two(target: str) -> None:
    with pytest.raises(ValueError):
        request_head("GET", address_of("http://h"), target, b"", None)
