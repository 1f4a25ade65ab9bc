"""The analysis of public tables, with small tables in the published formats that the tests write."""

import csv
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from analysis import routers
from analysis.router_tables import READERS, ResultTable, half_of, read_table
from hpc_router.errors import ConfigError

TOPICS = {
    "sums": ("integral equation theorem polynomial matrix derivative prime fraction", "clever"),
    "cells": ("protein patient fever enzyme tissue blood membrane vaccine", "medical"),
}
MODELS = ("clever", "medical", "plain")


def prompts(seed: int, number: int = 40) -> list[tuple[str, str, dict[str, float]]]:
    """Data set, prompt and results: each topic has one model that is always right; `plain` is right in half of all."""
    rng = random.Random(seed)
    rows = []
    for dataset, (words, expert) in TOPICS.items():
        for n in range(number):
            text = f"Question {seed}-{n}: " + " ".join(rng.choices(words.split(), k=8)) + "?"
            rows.append((dataset, text, {m: float(m == expert or (m == "plain" and n % 2)) for m in MODELS}))
    return rows


def write_routerdc(folder: Path) -> None:
    for split, seed in (("train", 1), ("test", 2)):
        for dataset in TOPICS:
            rows = [
                {"question": q, "scores": {m: 0.3 * r for m, r in s.items()}}
                for d, q, s in prompts(seed)
                if d == dataset
            ]
            (folder / f"{dataset}_{split}.json").write_text(json.dumps(rows))
    attempts = [{"question": q, "scores": {m: 0.3 * r for m, r in s.items()}} for _, q, s in prompts(3)]
    (folder / "mbpp.json").write_text(json.dumps([*attempts, {"question": "x", "scores": dict.fromkeys(MODELS, 0)}]))
    (folder / "arc_easy_test.json").write_text(json.dumps(attempts))


def write_mmlu_pro(folder: Path) -> None:
    for n, model in enumerate(MODELS):
        rows = [
            {"question_id": i, "question": q, "options": ["one", "two"], "answer": "A", "category": d,
             "pred": "A" if s[model] else None}
            for i, (d, q, s) in enumerate(prompts(1, 100))
        ]  # fmt: skip
        name = f"model_outputs_{model}_5shots"
        if n == 0:
            with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
                archive.writestr(f"{name}.json", json.dumps(rows))
        else:
            (folder / f"{name}.json").write_text(json.dumps(rows))


def write_routerarena(folder: Path) -> None:
    for model in MODELS:
        lines = [
            json.dumps({"global_index": f"{d}_{i}", "question": q,
                        "evaluation_result": {"score": s[model], "inference_cost": 0.001 * (1 + MODELS.index(model))}})
            for i, (d, q, s) in enumerate(prompts(1, 100))
        ]  # fmt: skip
        (folder / f"{model}.jsonl").write_text("\n".join(lines) + "\n")


def write_routerbench(folder: Path) -> None:
    for split, seed in (("train", 1), ("test", 2)):
        with (folder / f"both_{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["", "sample_id", "prompt", "eval_name", *MODELS, *(f"{m}|total_cost" for m in MODELS)])
            for i, (d, q, s) in enumerate(prompts(seed)):
                prices = [0.001, 0.002, 0.003]
                writer.writerow([i, f"{d}.{i}", str([q, "Answer."]), d, *(s[m] for m in MODELS), *prices])
            writer.writerow([99, "lost", "no result", "sums", "", 1.0, 1.0, 0.1, 0.1, 0.1])


WRITERS = {
    "routerdc": write_routerdc,
    "mmlu-pro": write_mmlu_pro,
    "routerarena": write_routerarena,
    "routerbench": write_routerbench,
}


def a_table(folder: Path, name: str) -> ResultTable:
    (folder / name).mkdir(parents=True)
    WRITERS[name](folder / name)
    return read_table(name, folder / name)


@pytest.mark.parametrize("name", READERS)
def test_a_table_is_read_as_its_publisher_writes_it(tmp_path: Path, name: str) -> None:
    table = a_table(tmp_path, name)
    assert table.models == sorted(MODELS)
    known = {row.dataset for row in table.of("known")}
    assert known == set(TOPICS) == {row.dataset for row in table.of("train")}
    for row in table.of("known"):
        expert = TOPICS[row.dataset][1]
        assert row.right[expert] == 1.0
        assert bool(row.cost) == (name in ("routerarena", "routerbench"))
    if name == "routerdc":
        unknown = table.of("unknown")
        assert {row.dataset for row in unknown} == {"mbpp"}
        assert max(row.right["clever"] for row in unknown) == pytest.approx(0.3), "a share of attempts stays one"
    if name == "routerbench":
        assert table.of("known")[0].prompt.endswith("?\nAnswer.")


def test_no_test_row_is_in_the_training(tmp_path: Path) -> None:
    write_routerdc(tmp_path)
    path = tmp_path / "sums_train.json"
    rows = json.loads(path.read_text())
    tested = json.loads((tmp_path / "sums_test.json").read_text())[0]
    path.write_text(json.dumps([*rows, tested | {"question": tested["question"].upper() + " "}]))
    table = read_table("routerdc", tmp_path)
    assert table.left_out == 1
    assert len(table.of("train")) == 80


@pytest.mark.parametrize("content", ["{}", '[{"question": "x"}]', "[1]", "no JSON", "[]"])
def test_other_files_are_refused_with_their_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "sums_train.json").write_text(content)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        read_table("routerdc", tmp_path)


def test_the_split_of_a_table_without_one_is_fixed() -> None:
    assert [half_of(str(n)) for n in range(8)] == [half_of(str(n)) for n in range(8)]
    assert 400 < sum(half_of(str(n)) == "train" for n in range(1000)) < 600


@pytest.mark.parametrize("change", routers.CHANGES)
def test_a_change_keeps_most_of_the_words(change: str) -> None:
    words = " ".join(f"word{n}" for n in range(40))
    changed = routers.CHANGES[change](words, random.Random(0))
    assert changed != words
    assert len(set(words.split()) & set(changed.split())) >= 36
    assert routers.CHANGES[change]("a", random.Random(0)).strip()


def test_the_score_counts_data_sets_and_prompts(tmp_path: Path) -> None:
    rows = [*a_table(tmp_path, "routerdc").of("known")]
    some = [row for row in rows if row.dataset == "sums"][:10] + [row for row in rows if row.dataset == "cells"][:30]
    score = routers.score(some, np.array([row.dataset == "sums" for row in some], np.float64))
    assert score["macro"] == [0.5, 0.5, 0.5]
    assert score["prompts"] == [0.25, 0.25, 0.25]


def test_the_whole_analysis_finds_the_model_of_each_topic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "MIN_LABEL_ROWS", 5)
    for name in ("routerdc", "routerbench"):
        (tmp_path / "tables" / name).mkdir(parents=True)
        WRITERS[name](tmp_path / "tables" / name)
    out = tmp_path / "out"
    assert routers.main(["--tables", str(tmp_path / "tables"), "--out", str(out)]) == 0
    tables = json.loads((out / "routers.json").read_text())["tables"]
    for name in ("routerdc", "routerbench"):
        found = {k: v["macro"][0] for k, v in tables[name]["splits"]["known"]["routers"].items()}
        assert found["soft clusters, lexical"] > 0.95
        assert found["20 nearest neighbours"] > 0.95
        assert found["best single model of the training"] <= 0.5
        assert found["the same, results shuffled"] < 0.9, "nothing can be learned from other prompts' results"
        assert found["random"] == pytest.approx(0.5, abs=0.01)
        assert found["best model per prompt (oracle)"] == found["best model per data set, in hindsight"] == 1.0
        assert tables[name]["labels"]["prompts"][0] > 0.95
    curve = tables["routerbench"]["cost"]["curve"]
    assert curve[0][2] > 0.95
    assert curve[-1][1] == pytest.approx(0.001), "with the largest weight, the cheapest model gets everything"
    report = (out / "routers.md").read_text()
    assert "| RouterDC, 280M encoder (arXiv 2409.19886) | 0.5854, as published |" in report
    assert "plain (than" not in report.partition("## routerbench")[0]
    figures = {path.name for path in out.glob("*.svg")}
    assert figures == {
        f"{name}.svg" for name in ("routerdc-known", "routerdc-unknown", "routerbench-known", "routerbench-cost")
    }


def test_a_table_that_is_measured_alone_leaves_the_results_of_the_others(tmp_path: Path) -> None:
    for name in ("routerdc", "routerbench"):
        (tmp_path / "tables" / name).mkdir(parents=True)
        WRITERS[name](tmp_path / "tables" / name)
    out = tmp_path / "out"
    runs = []
    for only in ("routerbench", "routerdc"):
        assert routers.main(["--tables", str(tmp_path / "tables"), "--only", only, "--out", str(out)]) == 0
        runs.append(json.loads((out / "routers.json").read_text())["tables"])
    assert [list(tables) for tables in runs] == [["routerbench"], ["routerdc", "routerbench"]]
    assert runs[1]["routerbench"] == runs[0]["routerbench"]
    report = (out / "routers.md").read_text()
    assert report.count("\nMeasured 20") == 2
    assert report.index("## routerdc") < report.index("## routerbench")


def test_a_folder_without_a_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        routers.main(["--tables", str(tmp_path)])
    assert stopped.value.code == 2
    assert "no folder of a table" in capsys.readouterr().err
