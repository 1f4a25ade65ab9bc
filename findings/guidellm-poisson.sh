#!/usr/bin/env bash
# guidellm 0.8.1, seen 2026-11-30: the arrivals of `--profile kind=poisson` are not a Poisson process.
#
# Up to ten worker processes share the time of the next request, and each adds intervals to it that it draws from a
# generator of its own. All of these start from the same seed, so every process draws the same intervals, and each
# interval occurs up to ten times: requests come in trains of equal distance, and a short run has another rate than the
# one that was asked for. With GUIDELLM__MAX_WORKER_PROCESSES=1 all intervals differ. On a busy machine, processes can
# also read the shared time before it is set: requests are then due in 1970, so they are sent at once.
#
# Seen, 60 requests at 20 per second:
#   ten processes: an interval occurs up to 10 times
#   one process:   an interval occurs up to 2 times
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'guidellm==0.8.1' 'transformers==5.24.0' || exit 2

cat >"$folder/load.py" <<'PYTHON'
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

REQUESTS, RATE = 60, 20
folder = Path(sys.argv[1])


class Engine(BaseHTTPRequestHandler):
    """Is healthy, and answers each chat with one word."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer("application/json", b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        chunk = {"id": "1", "choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}]}
        self.answer("text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode())

    def answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def arrivals(url: str, *, processes: int) -> list[float]:
    """The times at which requests were due, in seconds, in order."""
    spec = {
        "backend": {"kind": "openai_http", "target": url, "model": "m"},
        "profile": {"kind": "poisson", "rate": RATE},
        "constraints": [{"kind": "max_requests", "count": REQUESTS}],
        "data": [{"kind": "json_file", "path": str(folder / "prompts.jsonl")}],
        "tokenizer": {"kind": "huggingface_auto", "model": str(folder / "tokenizer")},
    }
    scenario, report = folder / "scenario.json", folder / "report.json"
    scenario.write_text(json.dumps({"spec": spec}))
    guidellm = Path(sys.executable).with_name("guidellm")
    argv = [str(guidellm), "run", "--config", str(scenario), "--disable-console"]
    argv += ["--output", f"kind=json,path={report}"]
    own = {"HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": str(processes)}
    subprocess.run(argv, env=os.environ | own, cwd=folder, check=True, capture_output=True)
    (found,) = json.loads(report.read_text())["benchmarks"]
    return sorted(one["info"]["timings"]["targeted_start"] for one in found["requests"]["successful"])


words = Tokenizer(models.WordLevel({"word": 0, "?": 1}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder / "tokenizer")
(folder / "prompts.jsonl").write_text((json.dumps({"prompt": "word", "output_tokens_count": 1}) + "\n") * REQUESTS)
engine = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
threading.Thread(target=engine.serve_forever, daemon=True).start()
repeats = []
for label, processes in (("ten processes:", 10), ("one process:  ", 1)):
    at = arrivals(f"http://127.0.0.1:{engine.server_port}/v1", processes=processes)
    intervals = Counter(round(b - a, 4) for a, b in zip(at, at[1:]))
    repeats.append(max(intervals.values()))
    print(f"{label} an interval occurs up to {repeats[-1]} times")
sys.exit(not repeats[1] <= 3 < repeats[0])
PYTHON
"$folder/venv/bin/python" "$folder/load.py" "$folder" || {
  echo "changed: this is no longer what guidellm 0.8.1 did" >&2
  exit 1
}
