"""The report on classifiers, from invented results."""

import json
from pathlib import Path
from typing import Any

import pytest

from analysis import classifier_figures as figures
from analysis.classifier_report import write
from analysis.classifiers import STEPS, Experiment, read
from hpc_router.routing import exemplars
from tests.routing.samples import EXEMPLARS
from tests.routing.training.samples import write_jsonl

ROWS: list[dict[str, str]] = [
    {"prompt": prompt, "domain": domain} for domain, prompts in EXEMPLARS.items() for prompt in prompts
]
SHARES = [0.1, 0.5, 0.9]
CURVE = [
    {"cost": s, "accuracy": 0.7 + s / 8, "random": 0.7 + s / 10, "oracle": 0.8, "low": 0.0, "high": 0.02}
    for s in SHARES
]
QUALITY: dict[str, Any] = {
    "dear": "big", "cheap": "small", "single": {"big": 0.8, "small": 0.7}, "oracle": 0.85, "curve": CURVE,
    "above_random_mixing": {"mean": 0.019, "low": 0.013, "high": 0.025},
}  # fmt: skip


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    for name in ("domains_train", "domains_test", "mmlu_train", "mmlu_test"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
    work = tmp_path / "work"
    work.mkdir()
    exemplars.train(EXEMPLARS).write(work / "discovered-distilled")
    return Experiment(tmp_path, work, "/models/encoder", "python")


def trained(accuracy: float) -> dict[str, Any]:
    latency = {name: {"p50_us": 30.0, "p99_us": 60.0} for name in ("sum(range(1000))", "200 B", "2000 B")}
    return {
        "training": {
            "command": "c", "wall_s": 60.0, "bytes": 5_000_000, "version": "v",
            "training": {"scores": {}, "data": {}, "packages": {"numpy": "2"}},
        },
        "test": {
            "accuracy": accuracy, "accuracy_interval": [0.9, 1.0], "nmi": 0.9, "balance_efficiency": 0.8,
            "latency": latency, "confusion": {"a": {"a": 3, "b": 1}, "b": {"b": 4}}, "cost_quality": QUALITY,
        },
        "predict": {"accuracy": accuracy}, "transfer": {"accuracy": 0.7},
    }  # fmt: skip


def test_the_report_says_which_targets_are_met(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = {
        "shares": {"a": 0.5},
        "shares_before": {"a": 0.6},
        "largest_over_capacity": 1.2,
        "loss": 0.01,
        "moves": [],
    }
    steps: dict[str, Any] = {name: packed if name.startswith("packed") else trained(0.975) for name in STEPS}
    steps["latency"] = {"runs": [trained(0.9)["test"]["latency"]]}
    drawing = figures.confusion(steps["measured"]["test"]["confusion"])
    monkeypatch.setattr(figures, "cluster_map", lambda *_: drawing)  # t-SNE needs more prompts than these
    write(experiment, steps, out=tmp_path / "out")
    report = (tmp_path / "out" / "classifiers.md").read_text()
    assert "| domains_test, discovered, 16 clusters | >= 0.98 | 0.9750 | NOT MET |" in report
    assert "| domains_test, 20 exemplars per domain | >= 0.97 | 0.9750 | met |" in report
    assert json.loads((tmp_path / "out" / "classifiers.json").read_text())["steps"].keys() == STEPS.keys()
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".svg", ".png"}


def test_files_are_derived_from_the_data(experiment: Experiment) -> None:
    priced = read(experiment.file("priced-train"))
    assert [row["prompt"] for row in priced] == [row["prompt"] for row in ROWS]
    assert {row["domain"] for row in read(experiment.file("transfer"))} == {"math", "medicine"}


def test_commands_are_displayed_without_folders_of_this_machine(experiment: Experiment) -> None:
    displayed = experiment._displayed(
        ["python", "-m", "x", f"data={experiment.data}/a.jsonl", f"output={experiment.work}/o", experiment.encoder]
    )
    assert displayed == "python -m x data=DATA/a.jsonl output=WORK/o ENCODER"
