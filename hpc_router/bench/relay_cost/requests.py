"""The HTTP requests of the benchmark. They are built in advance; only address and token differ between relays."""

import json
from collections.abc import Sequence
from typing import Final

from hpc_router.bench.prompts import built_in
from hpc_router.bench.workload import http_request
from hpc_router.net.protocol import CHAT

SIZES: Final = {"200 B": 200, "2 KB": 2_000, "200 KB": 200_000}
"""Lengths of the prompts in characters, by name."""
VARIETY: Final = {"200 B": 64, "2 KB": 64, "200 KB": 4}
"""Number of different prompts of each size."""
MODEL: Final = "math"


def prompts(size: str) -> list[str]:
    """Returns different prompts of the length `size`, made from the built-in prompts. All have different beginnings."""
    texts = [prompt.text for prompt in built_in()]
    made = []
    for start in range(VARIETY[size]):
        step = 1 + start // len(texts)
        turned = [texts[(start + step * i) % len(texts)] for i in range(len(texts))]
        joined = " ".join(turned)
        made.append((joined * (1 + SIZES[size] // len(joined)))[: SIZES[size]])
    return made


def request(port: int, *, token: str, prompt: str, model: str = MODEL, **fields: object) -> bytes:
    return http_request(chat_body(prompt, model, **fields), host=f"127.0.0.1:{port}", path=CHAT, token=token)


def chat_body(prompt: str, model: str, **fields: object) -> bytes:
    body = {"model": model, **fields, "messages": [{"role": "user", "content": prompt}]}
    return json.dumps(body, separators=(",", ":")).encode()


def short(port: int, *, token: str, size: str, model: str = MODEL) -> list[bytes]:
    return [request(port, token=token, prompt=text, model=model, stream=False) for text in prompts(size)]


def streaming(port: int, *, token: str, events: int) -> list[bytes]:
    return [request(port, token=token, prompt=text, stream=True, max_tokens=events) for text in prompts("200 B")]


def disconnecting(port: int, *, token: str, names: Sequence[str], delay_ms: int = 0) -> list[bytes]:
    """Returns requests for endless streams, one per name in `names`. When the client disconnects, the mock engine
    records the time under the request's name. The engine sends the first event of a stream after `delay_ms`."""
    (text, *_) = prompts("200 B")
    return [
        request(port, token=token, prompt=f"[[mock {name} {delay_ms}]] {text}", stream=True, max_tokens=1_000_000)
        for name in names
    ]
