"""One request against a real server that says what real ones say, and what they should not."""

import asyncio
import itertools

import pytest

from hpc_router.bench.ask import Answer, Target, ask, request_body, session
from hpc_router.bench.config import BenchConfig
from hpc_router.bench.prompts import Prompt
from tests.bench.fakes import (
    DONE,
    HEADERS,
    ROLE,
    TOKEN,
    WHOLE,
    Act,
    breaks_off,
    event,
    fake_router,
    piece,
    says,
    usage,
    waits_after,
)  # fmt: skip

BODY = request_body(BenchConfig(), Prompt("Is 91 a prime?"))


async def answered(target: Target, *, timeout_s: float = 30.0) -> Answer:
    ticks, answer = itertools.count(), Answer()
    async with session(target, timeout_s=timeout_s) as client:
        await ask(client, BODY, answer, clock=lambda: float(next(ticks)))
    return answer


async def test_an_answer_is_timed_by_its_content() -> None:
    """The role, empty content and the end carry no token; the router's headers tell who answered."""
    async with fake_router(says(*WHOLE)) as fake:
        answer = await answered(fake.target)
    assert answer.error is None
    assert len(answer.content_at) == 3
    assert (answer.expert, answer.replica, answer.reason) == tuple(HEADERS.values())
    assert fake.tokens == {f"Bearer {TOKEN}": 1}
    assert fake.bodies == [BODY]


async def test_empty_first_chunks_are_no_first_token() -> None:
    """Content is held back until the clock was read for all that came before it."""
    read = asyncio.Event()
    times: list[float] = []

    def clock() -> float:
        read.set()
        times.append(float(len(times)))
        return times[-1]

    before = b"".join((b": comment\n\n", ROLE, piece(""), piece(None)))
    async with (
        fake_router(waits_after(before, until=read, then=(piece("a"), DONE))) as fake,
        session(fake.target, timeout_s=30.0) as client,
    ):
        answer = Answer()
        await ask(client, BODY, answer, clock=clock)
    assert answer.error is None
    assert answer.content_at == [1.0]


async def test_events_are_put_together_across_chunks() -> None:
    text = b"".join(WHOLE).replace(b"\n", b"\r\n")
    async with fake_router(says(*(text[i : i + 7] for i in range(0, len(text), 7)))) as fake:
        answer = await answered(fake.target)
    assert answer.error is None
    assert len(answer.content_at) == 3


async def test_the_engine_counts_tokens_where_it_does() -> None:
    async with fake_router(says(piece("a b"), piece(" c d", finish="length"), usage(4), DONE)) as fake:
        answer = await answered(fake.target)
    assert (answer.error, answer.tokens, len(answer.content_at)) == (None, 4, 2)


@pytest.mark.parametrize(
    ("act", "kind", "pieces"),
    [
        (says(piece("a"), event({"error": {"message": "the replica died"}})), "stream_error", 1),
        (breaks_off(piece("a"), piece("b")), "disconnected", 2),
        (breaks_off(), "disconnected", 0),
        (says(piece("a"), piece("b")), "unfinished", 2),
        (says(ROLE, piece(None, finish="stop"), DONE), "no_content", 0),
        (says(piece("a"), b"data: {half\n\n", DONE), "bad_event", 1),
        (says(b"data: 7\n\n"), "bad_event", 0),
        (says(b'{"choices": []}', content_type="application/json"), "not_a_stream", 0),
        (says(b"{}", content_type="application/json", status=429), "http_429", 0),
        (says(b"{}", content_type="application/json", status=503), "http_503", 0),
    ],
)
async def test_an_answer_that_is_not_whole_is_an_error(act: Act, kind: str, pieces: int) -> None:
    async with fake_router(act) as fake:
        answer = await answered(fake.target)
    assert (answer.error, len(answer.content_at)) == (kind, pieces)


async def test_silence_is_an_error() -> None:
    for_ever = asyncio.Event()
    async with fake_router(waits_after(piece("a"), until=for_ever)) as fake:
        answer = await answered(fake.target, timeout_s=0.05)
        for_ever.set()
    assert answer.error == "timeout"


async def test_nobody_there_is_an_error() -> None:
    async with fake_router(says()) as fake:
        target = fake.target
    assert (await answered(target)).error == "connect"


async def test_proxies_and_cookies_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with fake_router(says(*WHOLE)) as fake, session(fake.target, timeout_s=30.0) as client:
        for _ in range(2):
            answer = Answer()
            await ask(client, BODY, answer, clock=lambda: 0.0)
            assert answer.error is None
    assert fake.cookies == []


def test_a_token_is_not_shown() -> None:
    assert TOKEN not in repr(Target("http://127.0.0.1:1", TOKEN))
