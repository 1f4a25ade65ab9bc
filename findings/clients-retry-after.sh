#!/usr/bin/env bash
# openai 3.54.0 and anthropic 2.12.0 (Python), seen 2026-11-29: the clients wait as long as Retry-After says.
#
# After a 429 (also 408, 409, 5xx) both clients sleep for the seconds of `Retry-After`, then try again; they log that at
# level INFO only. The client's `timeout` does not limit the wait. openai waits up to 120 s per retry and does not retry
# above; anthropic waits up to 4,294,967 s (49 days). A server that answers with a long Retry-After, meaning "not now",
# makes a program with `timeout=5` stand still.
#
# Seen (the seconds that each client wants to sleep before its one retry; `time.sleep` is recorded, not performed):
#   Retry-After: 61    openai sleeps 61 s         anthropic sleeps 61 s
#   Retry-After: 120   openai sleeps 120 s        anthropic sleeps 120 s
#   Retry-After: 121   openai does not retry      anthropic sleeps 121 s
#   Retry-After: 86400 openai does not retry      anthropic sleeps 86400 s
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'openai==3.54.0' 'anthropic==2.12.0' || exit 2

"$folder/venv/bin/python" - <<'PYTHON' || {
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anthropic
import openai


class Busy(BaseHTTPRequestHandler):
    """Answers every request with 429 and the wanted Retry-After."""

    retry_after = ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(429)
        self.send_header("retry-after", self.retry_after)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}"
turns = [{"role": "user", "content": "Hello"}]
options = {"api_key": "none", "timeout": 5.0, "max_retries": 1}
ask_openai = openai.OpenAI(base_url=f"{address}/v1", **options).chat.completions.create
ask_anthropic = anthropic.Anthropic(base_url=address, **options).messages.create


def slept(ask: Callable[..., object]) -> str:
    pauses: list[float] = []
    time.sleep, really = pauses.append, time.sleep
    try:
        ask(model="m", messages=turns, max_tokens=8)
    except (openai.RateLimitError, anthropic.RateLimitError):
        pass
    finally:
        time.sleep = really
    return f"sleeps {pauses[0]:.0f} s" if pauses else "does not retry"


seen = []
for seconds in ("61", "120", "121", "86400"):
    Busy.retry_after = seconds
    seen.append((slept(ask_openai), slept(ask_anthropic)))
    print(f"Retry-After: {seconds:<5} openai {seen[-1][0]:<19} anthropic {seen[-1][1]}")
expected = [
    ("sleeps 61 s", "sleeps 61 s"),
    ("sleeps 120 s", "sleeps 120 s"),
    ("does not retry", "sleeps 121 s"),
    ("does not retry", "sleeps 86400 s"),
]
sys.exit(seen != expected)
PYTHON
  echo "changed: this is no longer what openai 3.54.0 and anthropic 2.12.0 did" >&2
  exit 1
}
