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


@dataclass
class Load:
    """A load. `failures`: each failed request or broken stream. `slow`: each that took more than SLOW_S, with its start
    time."""

    client: openai.AsyncOpenAI
    models: tuple[str, ...]
    streams: int
    per_s: float
    stream_tokens: int
    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
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
            await self._count("stream", self._stream(model))

    async def _request_forever(self) -> None:
        async with asyncio.TaskGroup() as group:
            number = 0
            while not self._stopping:
                group.create_task(self._count("request", self._request(self.models[number % len(self.models)])))
                number += 1
                await asyncio.sleep(max(0.0, self._began_at + number / self.per_s - time.monotonic()))

    async def _count(self, kind: str, call: Any) -> None:
        began_at = time.monotonic()
        began = f"{began_at - self._began_at:.1f} s: {kind}"
        try:
            await call
        except Exception as error:  # noqa: BLE001 - any failure of a client is one of the service
            self.failures.append(f"{began}: {type(error).__name__}: {error}")
        else:
            self.done[kind] += 1
        if time.monotonic() - began_at > SLOW_S:
            self.slow.append(f"{began}: {time.monotonic() - began_at:.1f} s")

    async def _request(self, model: str) -> None:
        await self.client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=2)

    async def _stream(self, model: str) -> None:
        stream = await self.client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=self.stream_tokens, stream=True, extra_body={"ignore_eos": True}
        )
        reason = None
        async for event in stream:
            reason = event.choices[0].finish_reason or reason
        if reason != "length":
            raise AssertionError(f"the stream ended with {reason}")
