"""A router alone in front of endpoints that run elsewhere: they are registered, serve, fail and are removed."""

import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.e2e.deployment import cli
from tests.e2e.support import engine, router
from tests.support.needs import ROOT
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e


def expert_of(client: openai.OpenAI, model: str) -> str:
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=2
    )
    assert raw.parse().choices[0].message.content
    return raw.headers["x-expert"]


def listed(client: openai.OpenAI) -> set[str]:
    return {m.id for m in client.models.list()}


def states(run: Path) -> list[str]:
    experts = json.loads(cli("status", "--run", str(run), "--json").stdout)["experts"]
    return [replica["state"] for expert in experts.values() for replica in expert["replicas"]]


def test_a_router_serves_registered_endpoints_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with engine("theirs") as one, engine("a", "b") as two:
        cli("register", "--run", str(run), "--expert", "math", "--url", f"{one}/v1")
        several = cli("register", "--run", str(run), "--expert", "code", "--url", two, check=False)
        assert several.returncode == 2
        assert "--model" in several.stderr
        cli("register", "--run", str(run), "--expert", "code", "--url", two, "--model", "b")
        with router(run, "policy=round_robin") as client:
            eventually_sync(lambda: listed(client) == {"auto", "code", "math"})
            eventually_sync(lambda: states(run) == ["ready", "ready"])
            assert expert_of(client, "math") == "math"
            eventually_sync(lambda: {expert_of(client, "auto") for _ in range(4)} == {"code", "math"})
            cli("unregister", "--run", str(run), "--expert", "math")
            eventually_sync(lambda: listed(client) == {"auto", "code"})
            assert expert_of(client, "auto") == "code"


def test_model_field_without_a_fallback_answers_auto_with_404(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with engine("theirs") as one:
        cli("register", "--run", str(run), "--expert", "math", "--url", one)
        with router(run) as client:
            eventually_sync(lambda: "math" in listed(client))
            with pytest.raises(openai.NotFoundError):
                expert_of(client, "auto")
            assert expert_of(client, "math") == "math"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["router.workers=0"], "router.workers"),
        (["router.port=99999"], "router.port"),
        (["policy=classifier"], "policy.artefact"),
        (["policy=classifier", "policy.artefact=/nowhere"], "/nowhere"),
        (["router.prt=1"], "did you mean 'port'"),
        (["policy=nope"], "valid: classifier"),
    ],
)
def test_a_value_to_edit_is_named_and_nothing_starts(tmp_path: Path, overrides: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.router", f"run={tmp_path / 'run'}", *overrides],
        capture_output=True, text=True, cwd=ROOT, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
