"""What the programs share: the endpoint, the questions, and a report of what each case returned or raised.

A program uses one client as its users do, and prints one JSON object: name of a case -> its value, or the class and the
status of the exception it raised. It runs in the client's own environment, so this module imports the standard library
and pydantic only.
"""

import asyncio
import inspect
import json
import os
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, Field

URL = os.environ["CLIENTS_URL"]
"""The router's address, without `/v1`."""
BASE_URL = f"{URL}/v1"
TOKEN = os.environ["CLIENTS_TOKEN"]
QUESTION = f"What is 6 x 7? ({os.environ['CLIENTS_NAME']})"
"""Contains the program's name, by which the test counts a program's requests at an engine."""
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
_WITHIN_S = 20

Case = Callable[[], object] | Callable[[], Awaitable[object]]


class City(BaseModel):
    name: str
    founded: int = Field(ge=1000, le=2026)
    tags: list[str] = Field(min_length=2)


def run(cases: Mapping[str, Case]) -> None:
    """Runs the cases one after the other in one event loop."""

    async def outcomes() -> dict[str, object]:
        return {name: await _outcome(case) for name, case in cases.items()}

    print(json.dumps(asyncio.run(outcomes())))


async def _outcome(case: Case) -> object:
    try:
        value = case()
        return await value if inspect.isawaitable(value) else value
    except Exception as error:  # noqa: BLE001  # its class is the result
        return class_and_status(error)


def class_and_status(error: BaseException) -> str:
    status = getattr(error, "status_code", None)
    return f"{type(error).__name__} {status}" if isinstance(status, int) else type(error).__name__


def waits(call: Callable[[], object]) -> tuple[object, bool]:
    """The result of `call`, and whether it took at least the second that `Retry-After` of `recovering` says."""
    started = time.monotonic()
    return call(), time.monotonic() - started >= 1


def cut(pieces: Iterator[str]) -> list[object]:
    """How many words of a stream came before its error, and the error."""
    words: list[str] = []
    try:
        for piece in pieces:
            words += piece.split()
    except Exception as error:  # noqa: BLE001  # its class is the result
        return [len(words), class_and_status(error), str(error)]
    return [len(words)]


def left(expert: str) -> bool:
    """Whether the expert soon has no request in flight, well before the one that was given up would have ended."""
    request = urllib.request.Request(f"{URL}/status", headers={"authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + _WITHIN_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(request) as answer:
            replicas = json.load(answer)["experts"][expert]["replicas"]
        if not any(replica["in_flight"] for replica in replicas):
            return True
        time.sleep(0.05)
    return False
