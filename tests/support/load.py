"""A steady load of streams and short requests for the duration of a block, and its failures."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import openai

SLOW_S = 10.0
MESSAGES: Any = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Failure:
    """A failed request or broken stream. `began_s`: since the load began; `at`: when it failed (monotonic)."""

    kind: str
    began_s: float
    at: float
    replica: str | None
    error: str


@dataclass
class Load:
    """`failures`: each failed request or broken stream, and `slow`: each that took more than SLOW_S, with its start.
    `answered_at`: of each short request (monotonic)."""

    client: openai.AsyncOpenAI
    models: tuple[str, ...]
    streams: int
    per_s: float
    stream_tokens: int
    done: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    answered_at: list[float] = field(default_factory=list)
    _began_at: float = field(default_factory=time.monotonic)
    _stopping: bool = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Runs the load during the block, then waits for the requests in flight."""
        tasks = [asyncio.create_task(self._stream_forever(n)) for n in range(self.streams)]
        tasks.append(asyncio.create_task(self._request_forever()))
        try:
            yield self
        finally:
            self._stopping = True
            await asyncio.gather(*tasks)

    async def _stream_forever(self, number: int) -> None:
        model = self.models[number % len(self.models)]
        while not self._stopping:
            await self._count("stream", model)

    async def _request_forever(self) -> None:
        async with asyncio.TaskGroup() as group:
            number = 0
            while not self._stopping:
                group.create_task(self._count("request", self.models[number % len(self.models)]))
                number += 1
                await asyncio.sleep(max(0.0, self._began_at + number / self.per_s - time.monotonic()))

    async def _count(self, kind: str, model: str) -> None:
        began_at, replicas = time.monotonic(), list[str]()
        began_s = round(began_at - self._began_at, 1)
        try:
            await (self._stream(model, replicas) if kind == "stream" else self._request(model))
        except Exception as error:  # noqa: BLE001 - any failure of a client is one of the service
            replica = replicas[0] if replicas else None
            text = f"{type(error).__name__}: {error} {error.__cause__!r}"
            self.failures.append(Failure(kind, began_s, time.monotonic(), replica, text))
        else:
            self.done[kind] += 1
            if kind == "request":
                self.answered_at.append(time.monotonic())
        if (took_s := time.monotonic() - began_at) > SLOW_S:
            self.slow.append(f"{began_s} s: {kind} to {model}: {took_s:.1f} s")

    async def _request(self, model: str) -> None:
        await self.client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=2)

    async def _stream(self, model: str, replicas: list[str]) -> None:
        """Appends the name of the replica that streams. A stream that was held while a replica started names none."""
        raw = await self.client.chat.completions.with_raw_response.create(
            model=model, messages=MESSAGES, max_tokens=self.stream_tokens, stream=True, extra_body={"ignore_eos": True}
        )
        if (replica := raw.headers.get("x-replica")) is not None:
            replicas.append(replica)
        reason = None
        async for event in raw.parse():
            reason = event.choices[0].finish_reason or reason
        if reason != "length":
            raise AssertionError(f"the stream ended with {reason}")
