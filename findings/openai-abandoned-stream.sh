#!/usr/bin/env bash
# openai 3.54.0 (Python), seen 2026-11-29: `break` does not end a stream.
#
# A program leaves the loop over a stream, and keeps no reference to it. The connection stays open, and the server generates
# on, until Python's cyclic garbage collector happens to run: the stream and the generator that reads it refer to each other,
# so the `finally` that closes the response ("even if the consumer doesn't read all data") does not run before. In a `with`
# statement the stream is closed at its end.
#
# Seen (whether the server loses its client within a second of each event):
#   break            open
#   gc.collect()     closed
#   end of with      closed
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'openai==3.54.0' || exit 2

"$folder/venv/bin/python" - <<'PYTHON' || {
import gc
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai

CHUNK = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
CHUNK["choices"] = [{"index": 0, "delta": {"role": "assistant", "content": "word "}, "finish_reason": None}]
left: list[threading.Event] = []


class Endless(BaseHTTPRequestHandler):
    """Streams words until its client is gone."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        gone = threading.Event()
        left.append(gone)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            while True:
                self.wfile.write(f"data: {json.dumps(CHUNK)}\n\n".encode())
                time.sleep(0.01)
        except OSError:
            gone.set()

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
options: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
seen = []


def note(event: str) -> None:
    seen.append("closed" if left[-1].wait(1) else "open")
    print(f"{event:<16} {seen[-1]}")


for _ in client.chat.completions.create(**options):
    break
note("break")
gc.collect()
note("gc.collect()")
with client.chat.completions.create(**options) as stream:
    for _ in stream:
        break
note("end of with")
sys.exit(seen != ["open", "closed", "closed"])
PYTHON
  echo "changed: this is no longer what openai 3.54.0 did" >&2
  exit 1
}
