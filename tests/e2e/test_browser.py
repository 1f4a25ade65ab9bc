"""A web page uses the router in a real browser: the page's origin is allowed, and another page's is not."""

import json
import queue
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.e2e.deployment import cli
from tests.e2e.support import engine, router, until_listed
from tests.support.needs import need

pytestmark = [pytest.mark.e2e, pytest.mark.browser]
LIMIT_S = 60
CHAT = {"model": "math", "messages": [{"role": "user", "content": "2+2?"}], "max_tokens": 20, "ignore_eos": True}
PAGE = """<!doctype html><meta charset="utf-8"><title>a page</title><script>
const {url, token, chat} = SETTINGS, found = {};
const authorization = `Bearer ${token}`;
const json = {authorization, "content-type": "application/json", "x-stainless-lang": "js"};
async function ask(name, path, options, read = (response) => response.json()) {
  try {
    const response = await fetch(url + path, options);
    found[name] = {status: response.status, body: await read(response), headers: Object.fromEntries(response.headers)};
  } catch (error) {
    found[name] = {error: String(error)};
  }
}
async function pieces(response) {
  const reader = response.body.getReader(), texts = [];
  for (let part = await reader.read(); !part.done; part = await reader.read())
    texts.push(new TextDecoder().decode(part.value));
  return texts;
}
async function run() {
  const post = (body) => ({method: "POST", headers: json, body: JSON.stringify(body)});
  await ask("models", "/v1/models", {headers: {authorization}});
  await ask("chat", "/v1/chat/completions", post(chat));
  await ask("stream", "/v1/chat/completions", post({...chat, stream: true}), pieces);
  await ask("no token", "/v1/models", {});
  await ask("bad token", "/v1/models", {headers: {authorization: "Bearer x"}});
  await ask("no such path", "/v1/nowhere", {headers: {authorization}});
  await ask("no such model", "/v1/chat/completions", post({...chat, model: "nobody"}));
  await ask("bad body", "/v1/chat/completions", {method: "POST", headers: json, body: "{"});
  await ask("too large", "/v1/chat/completions", post({...chat, extra: "x".repeat(20000)}));
  await ask("delete", "/v1/responses/resp_none", {method: "DELETE", headers: {authorization}});
  await ask("with cookies", "/v1/models", {headers: {authorization}, credentials: "include"});
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
}
run();
</script>"""


@dataclass
class Page:
    """A server with its own origin, whose page reports the results of its requests."""

    settings: dict[str, Any] = field(default_factory=dict)
    found: "queue.Queue[dict[str, Any]]" = field(default_factory=queue.Queue)
    origin: str = ""


@contextmanager
def page() -> Iterator[Page]:
    served = Page()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = PAGE.replace("SETTINGS", json.dumps(served.settings)).encode() if self.path == "/" else b""
            self.answer(200 if body else 404, body)

        def do_POST(self) -> None:
            served.found.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.answer(204, b"")

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.origin = f"http://127.0.0.1:{server.server_address[1]}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield served
        server.shutdown()


def opened(served: Page, folder: Path) -> dict[str, Any]:
    """Opens the page in a browser and returns what it reports."""
    chromium = shutil.which("chromium")
    need(chromium is not None, "chromium")
    assert chromium is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}"]
    with (folder.with_suffix(".log")).open("wb") as log:
        browser = subprocess.Popen([chromium, *options, served.origin], stdout=log, stderr=log)
        try:
            return served.found.get(timeout=LIMIT_S)
        finally:
            browser.terminate()
            browser.wait(timeout=20)


def test_a_page_of_an_allowed_origin_uses_the_router(tmp_path: Path) -> None:
    need(shutil.which("chromium") is not None, "chromium")
    run = str(tmp_path / "run")
    with engine("m") as at, page() as own, page() as other:
        limits = ["router.max_body_mb=0.01", f"router.allowed_origins=['{own.origin}']", "policy=model_field"]
        cli("register", "--run", run, "--expert", "math", "--url", at)
        with router(Path(run), *limits) as client:
            until_listed(client, "math")
            url = str(client.base_url).removesuffix("/v1/")
            own.settings = other.settings = {"url": url, "token": client.api_key, "chat": CHAT}
            found, refused = opened(own, tmp_path / "own"), opened(other, tmp_path / "other")
    statuses = {name: one.get("status", one.get("error")) for name, one in found.items()}
    assert statuses == {
        **dict.fromkeys(("models", "chat", "stream"), 200),
        **dict.fromkeys(("no token", "bad token"), 401),
        **dict.fromkeys(("no such path", "no such model", "delete"), 404),
        "bad body": 400,
        "too large": 413,
        "with cookies": "TypeError: Failed to fetch",
    }
    assert [card["id"] for card in found["models"]["body"]["data"]] == ["auto", "math"]
    assert (
        found["chat"]["headers"].items()
        >= {"x-expert": "math", "x-replica": "math-x0.g1", "x-route-reason": "named"}.items()
    )
    assert found["chat"]["headers"]["x-request-id"]
    assert found["no such model"]["body"]["error"]["code"] == "unknown_model"
    pieces = found["stream"]["body"]
    assert len(pieces) > 1, "the events come one by one"
    assert "".join(pieces).endswith("data: [DONE]\n\n")
    assert {one.get("error") for one in refused.values()} == {"TypeError: Failed to fetch"}
