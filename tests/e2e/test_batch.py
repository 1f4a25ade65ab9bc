"""Batches on a real router with two workers, with the official client and the verb, while its processes are killed."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from hpc_router.state.run_directory import open_run
from hpc_router.state.user_tokens import create_token
from tests.e2e.batch_storm import TOPOLOGY, RouterProcesses, engine_of, submit, write_lines
from tests.e2e.deployment import Deployed, deployed
from tests.e2e.support import until_known
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e

LINES = 1500
ENDED = ("completed", "failed", "expired", "cancelled")


def config(folder: Path) -> tuple[str, ...]:
    topology = folder / "conf" / "topology"
    topology.mkdir(parents=True)
    (topology / "storm.yaml").write_text(TOPOLOGY)
    return (f"--config-dir={folder / 'conf'}", "topology=storm", "router.workers=2", "experts.math.replicas=1")


def ids_of(content: str) -> list[str]:
    return [json.loads(line)["custom_id"] for line in content.splitlines()]


def progressed(one: Deployed, batch: str) -> bool:
    """Whether results were stored since the last call for this batch."""
    sizes = sum(path.stat().st_size for path in (one.run / "batches" / batch).glob("journal-*"))
    grown = sizes > _SEEN.get(batch, 0)
    _SEEN[batch] = sizes
    return grown


_SEEN: dict[str, int] = {}


def test_a_batch_outlives_the_processes_that_run_it(tmp_path: Path) -> None:
    """SIGKILL to the process that runs batches, the control process, a worker and an engine, each after the batch has
    made progress since the last."""
    write_lines(tmp_path / "lines.jsonl", LINES)
    with deployed(tmp_path, *config(tmp_path), "router.batch.in_flight=4") as one:
        processes = RouterProcesses(one)
        with one.client() as client:
            batch = submit(client, tmp_path / "lines.jsonl")
            for role in ("batches", "control", "worker"):
                eventually_sync(lambda: progressed(one, batch))
                eventually_sync(partial(_with_role, processes, role)).kill()
            eventually_sync(lambda: progressed(one, batch))
            eventually_sync(lambda: engine_of(one, "math")).kill()
            patient = client.with_options(max_retries=5)

            def ended() -> Any:
                shown = patient.batches.retrieve(batch)
                return shown if shown.status in ENDED else None

            shown = eventually_sync(ended, within_s=300, every_s=0.2)
            assert (shown.status, shown.request_counts.failed) == ("completed", 0)
            assert ids_of(patient.files.content(shown.output_file_id).text) == [f"line-{n}" for n in range(LINES)]
        eventually_sync(lambda: "batches" not in processes.by_role(), within_s=60)


def _with_role(processes: RouterProcesses, role: str) -> Any:
    return next((process for name, process in processes.by_role().items() if name.startswith(role)), None)


def test_the_verb_and_a_user(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines.jsonl", 40)
    (tmp_path / "wrong.jsonl").write_text("{}\n")
    with deployed(tmp_path, *config(tmp_path)) as one:
        done = one.verb("batch", "submit", str(tmp_path / "lines.jsonl"), "--wait")
        batch = done.stdout.strip()
        assert "completed, 40 of 40 requests done, 0 failed" in done.stderr
        assert ids_of(one.verb("batch", "results", batch).stdout) == [f"line-{n}" for n in range(40)]
        output = tmp_path / "output.jsonl"
        one.verb("batch", "results", batch, "--output", str(output), "--errors", str(tmp_path / "errors.jsonl"))
        assert len(ids_of(output.read_text())) == 40
        assert not output.stat().st_mode & 0o077
        assert not (tmp_path / "errors.jsonl").exists()
        assert "completed" in one.verb("batch", "status").stdout
        assert json.loads(one.verb("batch", "status", batch, "--json").stdout)["request_counts"]["completed"] == 40

        wrong = one.verb("batch", "submit", str(tmp_path / "wrong.jsonl"), "--wait", "--json", check=False)
        events = [json.loads(line) for line in wrong.stdout.splitlines()]
        assert wrong.returncode == 1
        assert {event["event"] for event in events} == {"batch"}
        assert events[-1]["batch"]["status"] == "failed"
        assert "line 1: missing_required_parameter" in one.verb("batch", "status", events[-1]["batch"]["id"]).stdout

        _, token = create_token(open_run(one.run), "alice")
        with openai.OpenAI(base_url=f"{one.url}/v1", api_key=token, max_retries=5) as alice:
            until_known(one.url, token)
            assert not list(alice.batches.list())
            with pytest.raises(openai.NotFoundError):
                alice.batches.retrieve(batch)
            hers = submit(alice, tmp_path / "lines.jsonl")
            eventually_sync(lambda: alice.batches.retrieve(hers).status == "completed", every_s=0.2)
        assert hers not in one.verb("batch", "status").stdout
        refused = one.verb("batch", "cancel", hers, check=False)
        assert (refused.returncode, "there is no batch" in refused.stderr) == (1, True)
