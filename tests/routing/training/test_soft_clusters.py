"""Training of soft clusters: measured quality without an encoder."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpc_router.cli.classify import evaluate
from hpc_router.cli.main import main
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.training.dataset import Row, read_rows
from hpc_router.routing.training.feature_spaces import lexical
from hpc_router.routing.training.soft_clusters import _candidates
from hpc_router.routing.training.train import TrainConfig, train
from hpc_router.routing.training.validation import counts_to_try, domain_folds, first_within_error, row_weights
from tests.routing.training.samples import WORDS, prompts, write_jsonl

BEST = {"astronomy": "a", "cooking": "b", "sailing": "c"}


def measured_rows(*, shuffled: bool = False, seed: int = 0, each: int = 60) -> list[dict[str, object]]:
    """Each expert is right for the prompts of one domain, and now and then elsewhere. `shuffled`: for random prompts
    instead."""
    rng = random.Random(seed)
    rows = prompts(each=each, seed=seed)
    domains = [str(row["domain"]) for row in rows]
    if shuffled:
        rng.shuffle(domains)
    for row, domain in zip(rows, domains, strict=True):
        row["correct"] = {name: name == BEST[domain] or rng.random() < 0.2 for name in "abc"}
        row["correct"]["a"] |= rng.random() < 0.1  # type: ignore[index]
    return rows


def config(path: Path, **options: object) -> TrainConfig:
    return TrainConfig(data=str(path), output="x", method="measured", features="lexical", **options)  # type: ignore[arg-type]


def quiet(what: str, done: int, total: int) -> None:
    pass


def test_the_expert_that_was_right_for_such_prompts_is_chosen(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", measured_rows())
    artefact = train(config(data), progress=quiet)
    assert artefact.soft is not None
    assert artefact.margin_threshold == 0.0
    classifier = Classifier(artefact)
    for domain, words in WORDS.items():
        assert classifier.classify(f"{words[0]} {words[1]} {words[2]}").expert == BEST[domain]
    assert train(config(data), progress=quiet).version == artefact.version


def test_the_domains_that_the_rows_name_are_tried_as_clusters(tmp_path: Path) -> None:
    rows = read_rows(write_jsonl(tmp_path / "named.jsonl", measured_rows(each=20)))
    base = lexical([row.text for row in rows], seed=0)
    (names, assignment), *others = _candidates(rows, base, clusters=None, seed=0)
    assert names == ("astronomy", "cooking", "sailing")
    assert [names[c] for c in assignment] == [row.domain for row in rows]
    assert [len(names) for names, _ in others] == [2]
    unnamed = [replace(row, domain=None) for row in rows]
    assert [len(names) for names, _ in _candidates(unnamed, base, clusters=None, seed=0)] == [2]
    assert [len(names) for names, _ in _candidates(rows, base, clusters=5, seed=0)] == [5]


def test_with_shuffled_results_the_choice_is_no_better_than_the_best_expert(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", measured_rows(shuffled=True))
    test = write_jsonl(tmp_path / "test.jsonl", measured_rows(shuffled=True, seed=1))
    train(config(data), progress=quiet).write(tmp_path / "a")
    result = evaluate(tmp_path / "a", test, costs={})["cost_quality"]
    best, routed = max(result["single"].values()), result["routed"]
    assert routed["low"] <= best
    assert routed["accuracy"] < best + 0.05
    right = write_jsonl(tmp_path / "right.jsonl", measured_rows(seed=1))
    train(config(write_jsonl(tmp_path / "d.jsonl", measured_rows())), progress=quiet).write(tmp_path / "b")
    result = evaluate(tmp_path / "b", right, costs={})["cost_quality"]
    assert result["routed"]["low"] > max(result["single"].values())


def test_eval_says_when_the_dearer_expert_is_the_worse_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured_rows(each=20)
    for row in rows:
        row["correct"] = {"dear": row["domain"] == "cooking", "cheap": row["domain"] != "cooking"}
        row["cost"] = {"dear": 2.0, "cheap": 1.0}
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    train(config(data), progress=quiet).write(tmp_path / "a")
    assert evaluate(tmp_path / "a", data, costs={})["cost_quality"]["dear_is_worse"]
    assert not evaluate(tmp_path / "a", data, costs={"dear": 0.5})["cost_quality"]["dear_is_worse"]
    assert main(["classify", "eval", str(tmp_path / "a"), str(data)]) == 0
    assert "the dearer model is the worse one: dear 0.333, cheap 0.667" in capsys.readouterr().out


def test_a_table_of_experts_is_not_edited_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", measured_rows())
    train(config(data), progress=quiet).write(tmp_path / "a")
    assert main(["classify", "assign", str(tmp_path / "a"), "sailing=a", "--output", str(tmp_path / "b")]) == 2
    assert main(["classify", "pack", str(tmp_path / "a"), str(data)]) == 2
    assert capsys.readouterr().err.count("belong to no expert") == 2


def test_the_simplest_setting_within_one_standard_error_is_taken() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(400)
    slightly_worse = base - rng.choice([0.0, 0.5, -0.5], 400)
    slightly_worse += base.mean() - slightly_worse.mean() - 0.001
    gains = [base - 0.2, slightly_worse, base, slightly_worse]
    assert first_within_error(gains, np.ones(400)) == 1
    assert first_within_error([base - 0.2, base], np.ones(400)) == 1


def test_a_row_of_a_large_domain_weighs_less() -> None:
    rows = [Row(line=n, id=n, text="x", domain="big" if n < 16 else "small") for n in range(20)]
    weight = row_weights(rows)
    assert weight.mean() == pytest.approx(1)
    assert weight[-1] / weight[0] == pytest.approx(2)


def test_whole_domains_are_held_out_where_there_are_three_or_more() -> None:
    def rows(*domains: str | None) -> list[Row]:
        return [Row(line=n, id=n, text="x", domain=domain) for n, domain in enumerate(domains)]

    assert domain_folds(rows("a", "b", "a")) == []
    assert domain_folds(rows("a", "b", "c", None)) == []
    (fold,) = domain_folds(rows(*"abcdefab"))
    assert fold.tolist() == [0, 1, 2, 3, 4, 0, 0, 1]


def test_clusters_that_are_tried_have_enough_rows() -> None:
    assert counts_to_try(30) == (2,)
    assert counts_to_try(400) == (8, 16)
    assert counts_to_try(10_000) == (8, 16, 32, 64)
