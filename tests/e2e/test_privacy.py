"""What clients send stays out of everything that the deployment writes and shows: pages, metrics, records and logs."""

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.deployment import Deployed, deployed, kill
from tests.e2e.support import FAST, until_known
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e

WORD = "quokkabilabong"
"""A word that only prompts contain."""
OWN_FILES = {"token", "secret"}
"""The files whose content is a secret."""


def written(run: Path) -> Iterator[tuple[Path, bytes]]:
    for path in run.rglob("*"):
        if path.is_file() and path.name not in OWN_FILES:
            yield path.relative_to(run), path.read_bytes()


def get(url: str, token: str) -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        return bytes(response.read())


def requests_of_all_kinds(one: Deployed, token: str) -> list[str]:
    """Sends requests that are answered, classified, streamed, refused, abandoned, and broken by the death of an engine.
    Returns the id of one."""
    client = openai.OpenAI(base_url=f"{one.url}/v1", api_key=token, max_retries=0, timeout=60)
    ids = []
    for model in ("math", "auto"):
        turns = [{"role": "user", "content": f"{WORD} solve the equation"}]
        raw = client.chat.completions.with_raw_response.create(model=model, messages=turns, user=WORD, max_tokens=3)  # type: ignore[arg-type]
        ids.append(raw.headers["x-request-id"])
        list(client.chat.completions.create(model=model, messages=turns, max_tokens=3, stream=True))  # type: ignore[arg-type]
    client.completions.create(model="auto", prompt=WORD, max_tokens=3)
    client.embeddings.create(model="math", input=[WORD])
    with contextlib.suppress(openai.APIStatusError):
        client.chat.completions.create(model="auto", messages=[{"role": WORD, "content": WORD}], temperature=99)  # type: ignore[misc,list-item]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nothing", messages=[{"role": "user", "content": WORD}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key=f"{token}x").models.list()
    long = client.chat.completions.create(
        model="law", messages=[{"role": "user", "content": WORD}], max_tokens=2000, stream=True
    )
    next(iter(long))
    long.close()
    broken = client.chat.completions.create(
        model="code", messages=[{"role": "user", "content": WORD}], max_tokens=100_000, stream=True
    )
    next(iter(broken))
    kill(one.progress("code-0.g1")["engine_pid"])
    with pytest.raises(openai.APIError):
        list(broken)
    return ids


def test_no_prompt_and_no_token_is_written_or_shown(tmp_path: Path) -> None:
    with deployed(tmp_path, "topology=sim", FAST) as one:
        secret, token = (one.run / "secret").read_text().strip(), one.token
        user_token = one.verb("token", "create", "--user", "alice").stdout.strip()
        until_known(one.url, user_token)
        ids = [*requests_of_all_kinds(one, token), *requests_of_all_kinds(one, user_token)]
        for each in ids:
            eventually_sync(lambda each=each: one.verb("trace", each, check=False).returncode == 0)  # type: ignore[misc]
        one.verb("feedback", ids[0], "--score", "1")
        shown = {
            "/metrics": get(f"{one.url}/metrics", token),
            "/overview": get(f"{one.url}/overview", token),
            "/status": get(f"{one.url}/status", token),
            "/dashboard": get(f"{one.url}/dashboard", token),
        }
        for words in (
            ["trace", ids[0]],
            ["top", "--once"],
            ["status"],
            ["usage"],
            ["usage", "--json"],
            ["why"],
            ["logs", "-n", "10000"],
        ):
            done = one.verb(*words, check=False)
            shown[" ".join(words)] = (done.stdout + done.stderr).encode()
    files = dict(written(one.run))
    kinds = {path.parts[0] for path in files}
    assert {"records", "logs", "events.jsonl", "config.yaml"} <= kinds
    lines = [
        json.loads(line) for path, data in files.items() if path.parts[0] == "records" for line in data.splitlines()
    ]
    assert {"answered", "refused", "cancelled", "broken"} <= {line.get("outcome") for line in lines}
    assert {line["user"] for line in lines} == {None, "alice"}
    for where, data in (*shown.items(), *files.items()):
        for what in (WORD, token, user_token, user_token.rpartition("-")[2], secret):
            assert what.encode() not in data, f"{what[:6]}... is in {where}"
