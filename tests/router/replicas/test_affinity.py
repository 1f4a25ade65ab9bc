"""A conversation keeps its replica, seen by its client."""

from pathlib import Path
from typing import Any

from tests.router.fakes import a_deployment, a_router, a_run, fake_replica
from tests.router.support import post, ready


def turns(opening: str, count: int) -> list[dict[str, str]]:
    later = [{"role": role, "content": f"{role} {n}"} for n in range(count - 1) for role in ("assistant", "user")]
    return [{"role": "system", "content": "s"}, {"role": "user", "content": opening}, *later]


async def test_a_conversation_stays_on_its_replica(tmp_path: Path) -> None:
    """By `x-session-id`, whatever is said, else by what the user said first; and not all of them on the same one."""
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
        headers = [{"x-session-id": f"session-{n}"} for n in range(8)]
        by_session = [{await answered_by(turns(f"topic {n}", 1), **header) for n in range(3)} for header in headers]
    for homes in (by_opening, by_session):
        assert [len(home) for home in homes] == [1] * 8
        assert set.union(*homes) == {"math-0.g1", "math-1.g1"}
