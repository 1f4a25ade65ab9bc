#!/usr/bin/env bash
# vllm-router 0.1.17, seen 2026-11-29: a 429 is retried at once, without regard to Retry-After.
#
# A worker that answers 429 with `Retry-After: 30` gets the same request five times within half a second (round_robin, one
# worker, default options), so an overloaded worker gets five times the requests. The client then gets the 429 with the
# worker's Retry-After.
#
# Seen:
#   client: 429, Retry-After: 30
#   worker: 5 requests within 0.44 s, all answered with Retry-After: 30
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'vllm-router==0.1.17' || exit 2

cat >"$folder/ask.py" <<'PYTHON'
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Worker(BaseHTTPRequestHandler):
    """Is healthy, and answers each request with 429 and Retry-After: 30."""

    attempts: list[float] = []

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "m", "object": "model"}], "object": "list"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.attempts.append(time.monotonic())
        self.answer(429, {"error": {"message": "busy", "type": "rate_limit", "code": 429}})

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        if status == 429:
            self.send_header("retry-after", "30")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


worker = ThreadingHTTPServer(("127.0.0.1", 0), Worker)
threading.Thread(target=worker.serve_forever, daemon=True).start()
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
port, metrics_port = free_port(), free_port()
argv = [sys.argv[1], "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
argv += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
argv += ["--worker-urls", f"http://127.0.0.1:{worker.server_port}"]
router = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}).encode()
    url, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"content-type": "application/json"}
    deadline = time.monotonic() + 60
    while not Worker.attempts and time.monotonic() < deadline:  # until the router serves
        try:
            opener.open(urllib.request.Request(url, body, headers))
        except urllib.error.HTTPError as error:
            answer = f"client: {error.code}, Retry-After: {error.headers['retry-after']}"
        except urllib.error.URLError:
            time.sleep(0.1)
finally:
    router.terminate()
    router.wait()
took_s, count = Worker.attempts[-1] - Worker.attempts[0], len(Worker.attempts)
print(answer)
print(f"worker: {count} requests within {took_s:.2f} s, all answered with Retry-After: 30")
sys.exit(answer != "client: 429, Retry-After: 30" or count != 5 or took_s > 5)
PYTHON
"$folder/venv/bin/python" "$folder/ask.py" "$folder/venv/bin/vllm-router" || {
  echo "changed: this is no longer what vllm-router 0.1.17 did" >&2
  exit 1
}
