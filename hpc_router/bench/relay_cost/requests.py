"""The requests that are sent: complete HTTP, prepared once, the same for every relay but for its address and token."""

import json
from collections.abc import Sequence
from typing import Final

from hpc_router.bench.prompts import built_in
from hpc_router.net.protocol import CHAT

SIZES: Final = {"200 B": 200, "2 KB": 2_000, "200 KB": 200_000}
"""Prompts by name, in characters."""
VARIETY: Final = {"200 B": 64, "2 KB": 64, "200 KB": 4}
MODEL: Final = "math"


def prompts(size: str) -> list[str]:
    """Different ones of the same length, of the built-in prompts' words: no two begin alike."""
    texts = [prompt.text for prompt in built_in()]
    made = []
    for start in range(VARIETY[size]):
        step = 1 + start // len(texts)
        turned = [texts[(start + step * i) % len(texts)] for i in range(len(texts))]
        joined = " ".join(turned)
        made.append((joined * (1 + SIZES[size] // len(joined)))[: SIZES[size]])
    return made


def request(port: int, *, token: str, prompt: str, model: str = MODEL, **fields: object) -> bytes:
    body = json.dumps(
        {"model": model, **fields, "messages": [{"role": "user", "content": prompt}]}, separators=(",", ":")
    ).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {token}\r\n"
        "content-type: application/json\r\naccept: */*\r\nuser-agent: hpc-router-bench\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def short(port: int, *, token: str, size: str, model: str = MODEL) -> list[bytes]:
    return [request(port, token=token, prompt=text, model=model, stream=False) for text in prompts(size)]


def streaming(port: int, *, token: str, events: int) -> list[bytes]:
    return [request(port, token=token, prompt=text, stream=True, max_tokens=events) for text in prompts("200 B")]


def leaving(port: int, *, token: str, names: Sequence[str], delay_ms: int = 0) -> list[bytes]:
    """Endless streams, each with a name by which the engine notes its end; the first event after `delay_ms`."""
    (text, *_) = prompts("200 B")
    return [
        request(port, token=token, prompt=f"[[mock {name} {delay_ms}]] {text}", stream=True, max_tokens=1_000_000)
        for name in names
    ]
