"""What clients of a real vLLM see when it is told to stop: each answer is complete or fails visibly."""

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore
from typing import Any

import anthropic
import openai
import pytest

from hpc_router.cluster.commands.scale import scale
from hpc_router.state.run_directory import RunDir
from launch import tiny_model
from tests.e2e.deployment import Deployed, deployed
from tests.support.needs import ROOT, VLLM_ENV, engine_python
from tests.support.waiting import eventually_sync

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.long]

DRAIN_S = 1
TOKENS = 1900
OPTIONS = ["device=cpu", "dtype=bfloat16", "max_model_len=2048", "extra.enforce-eager=true"]
MESSAGES: Any = [{"role": "user", "content": "hi"}]
ENDLESS: Any = {"ignore_eos": True}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    models = tmp_path_factory.mktemp("models")
    subprocess.run([engine_python("transformers"), tiny_model.__file__, "math"], cwd=models, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAIR_MODELS", str(models))
        patch.setenv("PAIR_PYTHON", str(engine_python("vllm")))
        options = [f"experts.math.engine.options.{option}" for option in OPTIONS]
        chosen = ["--config-dir", str(ROOT / "tests/e2e/conf"), "topology=one", f"cluster.env={VLLM_ENV}"]
        clocks = [f"cluster.drain_s={DRAIN_S}", "cluster.reconcile_s=0.3"]
        with deployed(tmp_path_factory.mktemp("one"), *chosen, *clocks, *options) as made:
            yield made


def anthropic_client(one: Deployed) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=one.url, api_key=one.token, max_retries=0, timeout=60)


def test_an_engine_that_gets_sigterm_finishes_its_requests_and_accepts_no_new_ones(one: Deployed) -> None:
    """This happens where Slurm signals every process of a step. Later requests fail: vLLM answers with status 500, or
    with a valid but empty answer, which the router counts as a failure."""
    with one.client() as client, anthropic_client(one) as messages:
        running = client.chat.completions.create(
            model="math", messages=MESSAGES, max_tokens=600, stream=True, extra_body=ENDLESS
        )
        chunks = [next(running)]
        os.kill(int(one.progress("math-0.g1")["engine_pid"]), signal.SIGTERM)
        time.sleep(0.5)  # only the log shows that the signal arrived
        late: dict[str, Callable[[], Any]] = {
            "chat": lambda: client.chat.completions.create(model="math", messages=MESSAGES, max_tokens=5),
            "text": lambda: client.completions.create(model="math", prompt="once", max_tokens=5),
            "stream": lambda: list(
                client.chat.completions.create(model="math", messages=MESSAGES, max_tokens=5, stream=True)
            ),
            "response": lambda: client.responses.create(model="math", input="hi", max_output_tokens=5),
            "message": lambda: messages.messages.create(model="math", max_tokens=5, messages=MESSAGES),
        }
        for ask in late.values():
            with pytest.raises((openai.APIError, anthropic.APIError)):
                ask()
        chunks += list(running)
        assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
        eventually_sync(lambda: one.progress("math-0.g1")["restarts"] == 1, within_s=60)
        eventually_sync(lambda: one.ready("math"), within_s=240)


def test_an_answer_that_a_drain_cuts_off_fails_in_every_api(one: Deployed) -> None:
    """The replica is the last one, and its answers take more than 10 s, which is longer than the drain."""
    begun = Semaphore(0)

    def outcome(path: str, body: dict[str, Any]) -> str:
        headers = {"authorization": f"Bearer {one.token}", "content-type": "application/json"}
        data = json.dumps({"model": "math", **ENDLESS, **body}).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=120) as answer:
                first = answer.read(1)
                begun.release()
                return str((first + answer.read()).decode())
        except urllib.error.HTTPError as error:
            return f"status {error.code}"

    asked: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": TOKENS},
        "/v1/completions": {"prompt": "hi", "max_tokens": TOKENS},
        "/v1/messages": {"messages": MESSAGES, "max_tokens": TOKENS},
        "/v1/responses": {"input": "hi", "max_output_tokens": TOKENS},
    }
    url = one.url
    with ThreadPoolExecutor(2 * len(asked)) as pool:
        streams = {path: pool.submit(outcome, path, body | {"stream": True}) for path, body in asked.items()}
        wholes = {path: pool.submit(outcome, path, body) for path, body in asked.items()}
        assert all(begun.acquire(timeout=60) for _ in streams)
        scale(
            RunDir(one.run), {"math": 0}
        )  # not the verb, because the answers may end before its interpreter has started
        for path, stream in streams.items():
            last = stream.result().strip().rpartition("\n\n")[2]
            assert '"error"' in last, (path, last[-500:])
            assert "failed before it had finished" in last, (path, last[-500:])
        for path, whole in wholes.items():
            assert whole.result().startswith("status 50"), (path, whole.result()[-500:])
