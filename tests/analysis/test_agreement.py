"""The analysis of what several models' answers say, with small tables in MMLU-Pro's format that the tests write."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from analysis import agreement
from analysis.agreement import Opinions, read_answers

LETTERS = "ABCDEFGHIJ"
CATEGORIES = {"sums": "integral equation theorem polynomial matrix", "cells": "protein patient fever enzyme tissue"}


def write_outputs(folder: Path, *, quality: dict[str, float], prompts: int = 400, missing: int = 0) -> None:
    """Each model is right with its quality, independently; one output in ten states no answer and counts as wrong."""
    folder.mkdir(parents=True)
    for model, share in quality.items():
        draw, rows = random.Random(model), []
        for n in range(prompts):
            rng = random.Random(n)
            category = ("sums", "cells")[n % 2]
            answer = rng.choice(LETTERS)
            words = " ".join(rng.choices(CATEGORIES[category].split(), k=6))
            pred = answer if draw.random() < share else draw.choice(LETTERS)
            stated = draw.random() > 0.1
            text = f"Let us see. The answer is ({pred})." if stated else "It depends on"
            rows.append(
                {"question_id": n, "question": f"Question {n}: {words}?", "options": ["x"], "answer": answer,
                 "category": category, "pred": pred if stated else None, "generated_text": text}
            )  # fmt: skip
        (folder / f"model_outputs_{model}_5shots.json").write_text(json.dumps(rows[missing:]))


def some(stated: list[list[int]], correct: list[int]) -> Opinions:
    answers, right = np.array(stated), np.array(correct)
    return Opinions(
        stated=answers,
        right=(answers == right[:, None]).astype(np.float64),
        expected=np.array([[0.5, 0.4, 0.4][: answers.shape[1]]] * len(right)),
        length=np.ones(answers.shape),
        correct=right,
    )


def test_the_next_model_is_asked_if_one_states_no_answer() -> None:
    right, calls = some([[1, 2], [-1, 1], [-1, -1]], [1, 1, 1]).until_stated()
    assert (right.tolist(), calls.tolist()) == ([1, 1, 0], [1, 2, 1])


@pytest.mark.parametrize(
    ("stated", "right", "calls_early"),
    [([1, 1, 2], 1, 2), ([2, 1, 1], 1, 3), ([1, 2, 3], 1, 3), ([-1, 1, -1], 1, 3), ([-1, -1, -1], 0, 3)],
)
def test_the_answer_with_the_largest_weight_wins(stated: list[int], right: float, calls_early: float) -> None:
    one = some([stated], [1])
    for early, calls in ((False, 3.0), (True, calls_early)):
        assert [values.tolist() for values in one.vote(3, early=early)] == [[right], [calls]]


def test_the_agreement_counts_the_other_models() -> None:
    assert some([[1, 1, 2], [1, 1, 1], [-1, -1, 2]], [1, 1, 1]).agreement().tolist() == [0.5, 1.0, 0.0]


def test_the_answers_of_each_model_are_read(tmp_path: Path) -> None:
    write_outputs(tmp_path / "some", quality={"good": 1.0, "poor": 0.0}, prompts=50)
    rows = read_answers(tmp_path / "some")
    assert len(rows) == 50
    for row in rows:
        stated = row.stated["good"]
        assert stated in (row.answer, None)
        assert row.right["good"] == float(stated is not None)
        assert row.length["good"] == (len("Let us see. The answer is (A).") if stated else len("It depends on"))


def test_the_whole_analysis_finds_what_answers_say(tmp_path: Path) -> None:
    tables, out = tmp_path / "tables", tmp_path / "out"
    write_outputs(tables / "mmlu-pro", quality={"one": 0.6, "two": 0.6, "three": 0.6})
    write_outputs(tables / "mmlu-pro-large", quality={"huge": 0.95, "bad": 0.1}, missing=20)
    assert agreement.main(["--tables", str(tables), "--out", str(out)]) == 0
    result = json.loads((out / "agreement.json").read_text())
    right = {name: one["prompts"][0] for name, one in result["strategies"].items()}
    assert right["soft clusters: vote of 3"] > right["soft clusters: one model"] + 0.05
    assert right["soft clusters: the next model if no answer is stated"] > right["soft clusters: one model"]
    assert right["best model per prompt (oracle)"] >= max(right.values())
    assert result["signals"]["the second model agrees"] > 0.7
    assert result["signals"]["expected quality, from the prompt"] < 0.7, "each model is equally good everywhere"
    large = result["large"]
    assert large["model"] == "huge"
    assert large["prompts"] < result["prompts"]["test"]
    assert large["cascade"]["above_random"][1] > 0
    assert "## A cascade to huge" in (out / "agreement.md").read_text()


def test_a_folder_without_outputs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert agreement.main(["--tables", str(tmp_path)]) == 2
    assert "no file model_outputs_MODEL_5shots.json" in capsys.readouterr().err
