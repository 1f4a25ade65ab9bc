"""A conversation keeps its replica, seen by its client."""

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web

from hpc_router.net import protocol
from tests.router.fakes import FakeReplica, a_deployment, a_router, a_run, event, fake_replica
from tests.router.support import CHAT, post, ready, session
from tests.support.waiting import eventually


def turns(opening: str, count: int) -> list[dict[str, str]]:
    later = [{"role": role, "content": f"{role} {n}"} for n in range(count - 1) for role in ("assistant", "user")]
    return [{"role": "system", "content": "s"}, {"role": "user", "content": 20 * f"{opening} "}, *later]


async def test_a_conversation_stays_on_its_replica(tmp_path: Path) -> None:
    """By a session header, whatever is said, else by the beginning of the prompt; and not all on the same one."""
    run = a_run(tmp_path)

    async def answered_by(said: list[dict[str, str]], **headers: str) -> str:
        body: dict[str, Any] = {"model": "math", "messages": said}
        status, _, answered = await post(router, body, **headers)
        assert status == 200
        return str(answered["x-replica"])

    async with (
        fake_replica(run, "math-0.g1"),
        fake_replica(run, "math-1.g1"),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router, 2)
        by_opening = [{await answered_by(turns(f"topic {n}", count)) for count in (1, 2, 3)} for n in range(8)]
        names = ("x-session-id", *protocol.AGENT_SESSION_HEADERS)
        headers = [{name: f"session-{n}"} for n in range(8) for name in names]
        by_session = [{await answered_by(turns(f"topic {n}", 1), **header) for n in range(3)} for header in headers]
    for homes in (by_opening, by_session):
        assert {len(home) for home in homes} == {1}
        assert set.union(*homes) == {"math-0.g1", "math-1.g1"}


async def test_a_prompt_waits_until_the_first_event_of_its_stream(tmp_path: Path) -> None:
    """The head of the response may come earlier: engines send it before they have computed the prompt."""
    run = a_run(tmp_path)
    begin, end = asyncio.Event(), asyncio.Event()

    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await begin.wait()
        await response.write(event("a"))
        await end.wait()
        await response.write_eof(b"data: [DONE]\n\n")
        return response

    body = {"model": "math", "messages": turns("topic", 1), "stream": True}
    async with (
        fake_replica(run, "math-0.g1") as one,
        fake_replica(run, "math-1.g1") as other,
        a_router(run, a_deployment("math", fallback="math")) as router,
        session() as s,
    ):
        await ready(router, 2)
        replicas = list(router.gateway.table.all())
        for fake in (one, other):
            fake.acts.clear()
            fake.acts.append(act)
        asked = asyncio.create_task(s.post(router.url + CHAT, json=body, headers=router.headers))
        await eventually(lambda: sum(r.in_flight for r in replicas) == 1)
        busy = next(r for r in replicas if r.in_flight)
        waiting = busy.prefill_bytes
        assert waiting >= len("topic ") * 20
        begin.set()
        response = await asked
        await response.content.readuntil(b"\n\n")
        assert (busy.prefill_bytes, busy.in_flight) == (0, 1)
        end.set()
        await response.read()
        explained = (await post(router, body, path="/route"))[1]["replicas"]
    chosen = next(one for one in explained if one["chosen"])
    assert (chosen["replica"], chosen["cached_bytes"] > 0) == (busy.name, True)
    assert chosen["saved_s"] > 0
    assert [one["cached_bytes"] for one in explained if not one["chosen"]] == [0]
