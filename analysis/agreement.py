"""Measures what the answers of several models say beyond the prompt: a second opinion, a vote, a larger model.

    python -m analysis.agreement --tables DIR [--out DIR]

A router sees the prompt alone. This measures what reading answers would add, on MMLU-Pro's outputs of each model:
DIR/mmlu-pro has the files of small models (see `analysis.router_tables`), DIR/mmlu-pro-large those of larger ones, of
which the best on the training rows counts. Half of the prompts are the training: the soft clusters that choose and
order the models, and the weights of their votes, come from it alone. The outputs contain no log-probabilities, so a
model's own certainty is not measured. Results: `agreement.json` and `agreement.md` in --out. Needs the extras
`analysis` and `train`.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from analysis import markdown
from analysis.router_tables import KNOWN, TableRow, checked_table, half_of, mmlu_pro_outputs
from analysis.routers import score, trained, training_rows
from hpc_router.bench.provenance import git_state
from hpc_router.errors import ConfigError, HpcRouterError
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.confidence import auroc
from hpc_router.routing.evaluation import SHARES, bootstrap_interval

Result = dict[str, Any]
Doubles = NDArray[np.float64]
Ids = NDArray[np.intp]

ROOT: Final = Path(__file__).parent.parent
POOL: Final = "mmlu-pro"
LARGE: Final = "mmlu-pro-large"
OPTIONS: Final = 10
"""Number of options of most questions, for the weight of a vote."""
VOTERS: Final = (3, 5, 8)
_STATED: Final = re.compile(r"answer is \(?([A-J])\)?")
"""How an output states its answer. MMLU-Pro counts an output without it as wrong, or as a random guess."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredRow(TableRow):
    """A prompt with the results and the answers of each model. `answer`: the right option. `stated`: the option that
    each model's output states; None if it states none. `length`: characters of each output."""

    row_id: str
    answer: str
    stated: Mapping[str, str | None]
    length: Mapping[str, int]


def read_answers(folder: Path) -> list[AnsweredRow]:
    """Reads all files of MMLU-Pro in `folder`. Raises ConfigError if there are none or if they have another form."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    models: list[str] = []
    try:
        for model, outputs in mmlu_pro_outputs(folder):
            models.append(model)
            for value in outputs:
                text = value.get("generated_text") or value.get("model_outputs") or ""
                stated = _STATED.search(text)
                found.setdefault(str(value["question_id"]), {})[model] = {
                    "prompt": "\n".join((value["question"], *map(str, value["options"]))),
                    "category": value["category"],
                    "answer": value["answer"],
                    "right": float(value["pred"] == value["answer"]),
                    "stated": stated[1] if stated else None,
                    "length": len(text),
                }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder}: the files are not MMLU-Pro's ({type(error).__name__}: {error})") from error
    if not models:
        raise ConfigError(f"{folder}: no file model_outputs_MODEL_5shots.json or .zip")
    return [
        AnsweredRow(
            prompt=by_model[models[0]]["prompt"],
            dataset=by_model[models[0]]["category"],
            split=half_of(row_id),
            right={model: by_model[model]["right"] for model in models},
            cost={},
            row_id=row_id,
            answer=by_model[models[0]]["answer"],
            stated={model: by_model[model]["stated"] for model in models},
            length={model: by_model[model]["length"] for model in models},
        )
        for row_id, by_model in sorted(found.items())
        if len(by_model) == len(models)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinions:
    """The answers to the test prompts, with the models of each prompt in the order in which they are asked: best
    expected quality first. All arrays are prompts x models. `stated`: number of the stated option, -1 for none."""

    stated: Ids
    right: Doubles
    expected: Doubles
    length: Doubles
    correct: Ids
    """The right option of each prompt."""

    def single(self) -> Doubles:
        """Returns 1 for each prompt whose first model is right, as published."""
        return self.right[:, 0]

    def until_stated(self) -> tuple[Doubles, Doubles]:
        """Asks the next model if one states no answer. Returns whether the answer is right, and the number of calls."""
        states = self.stated >= 0
        first = np.where(states.any(axis=1), states.argmax(axis=1), 0)
        return self._result(first), first + 1.0

    def vote(self, voters: int, *, early: bool) -> tuple[Doubles, Doubles]:
        """Asks up to `voters` models; the answer with the largest sum of weights wins, where a model that is right with
        the probability p weighs log(p / (1 - p)) - log of the same for a guess. Returns as `until_stated`.

        `early`: stop as soon as two models agree.
        """
        p = np.clip(self.expected[:, :voters], 0.01, 0.99)
        weight = np.maximum(np.log(p / (1 - p)) + np.log(OPTIONS - 1), 0.01)
        right, calls = np.zeros(len(p)), np.zeros(len(p))
        for n in range(len(p)):
            sums: dict[int, float] = {}
            for m in range(voters):
                calls[n] += 1
                option = int(self.stated[n, m])
                if option >= 0:
                    agreed = option in sums
                    sums[option] = sums.get(option, 0.0) + float(weight[n, m])
                    if early and agreed:
                        break
            best = max(sums, key=lambda option: sums[option]) if sums else None
            right[n] = self.right[n, 0] if best is None else float(best == self.correct[n])
        return right, calls

    def agreement(self) -> Doubles:
        """Returns the share of the other models that state the first model's answer."""
        same = (self.stated[:, 1:] == self.stated[:, :1]) & (self.stated[:, :1] >= 0)
        share: Doubles = same.mean(axis=1)
        return share

    def _result(self, column: Ids) -> Doubles:
        result: Doubles = np.take_along_axis(self.right, column[:, None], axis=1)[:, 0]
        return result


def opinions(rows: Sequence[AnsweredRow], expected: Doubles, models: Sequence[str]) -> Opinions:
    """Returns the answers of `models` to the rows, ordered by `expected`: the expected quality, prompts x models."""
    order = np.argsort(-expected, axis=1, kind="stable")

    def ordered(values: NDArray[Any]) -> NDArray[Any]:
        result: NDArray[Any] = np.take_along_axis(values, order, axis=1)
        return result

    stated = [[-1 if (s := row.stated[m]) is None else ord(s) - ord("A") for m in models] for row in rows]
    return Opinions(
        stated=ordered(np.array(stated)),
        right=ordered(np.array([[row.right[m] for m in models] for row in rows])),
        expected=ordered(expected),
        length=ordered(np.array([[row.length[m] for m in models] for row in rows], np.float64)),
        correct=np.array([ord(row.answer) - ord("A") for row in rows]),
    )


def measure(folder: Path, *, large_folder: Path) -> Result:
    """Returns all results. Raises ConfigError if one of the two folders has no usable files."""
    table = checked_table(POOL, read_answers(folder), folder=folder)
    models = table.models
    tests = [row for row in table.of(KNOWN) if isinstance(row, AnsweredRow)]
    training = table.of("train")
    classifier = Classifier(trained(training_rows(table), method="measured", features="lexical"))
    by_content = np.array([[classifier.expected_quality(row.prompt)[m] for m in models] for row in tests])
    overall = np.array([[np.mean([row.right[m] for row in training]) for m in models]] * len(tests))
    content, fixed = opinions(tests, by_content, models), opinions(tests, overall, models)
    strategies: Result = {}

    def add(name: str, right: Doubles, calls: float) -> None:
        strategies[name] = {"calls": calls, **score(tests, right)}

    for basis, one in (("best on the training", fixed), ("soft clusters", content)):
        add(f"{basis}: one model", one.single(), 1)
        right, calls = one.until_stated()
        add(f"{basis}: the next model if no answer is stated", right, float(calls.mean()))
        for voters in (number for number in VOTERS if number <= len(models)):
            right, calls = one.vote(voters, early=True)
            add(f"{basis}: until two of at most {voters} agree", right, float(calls.mean()))
            right, calls = one.vote(voters, early=False)
            add(f"{basis}: vote of {voters}", right, float(calls.mean()))
    in_hindsight = np.zeros(len(tests))
    for name in {row.dataset for row in tests}:
        here = np.array([row.dataset == name for row in tests])
        right_here = np.array([[row.right[m] for m in models] for row in tests if row.dataset == name])
        in_hindsight[here] = right_here[:, right_here.mean(axis=0).argmax()]
    add("best model per category, in hindsight", in_hindsight, 1)
    add("best model per prompt (oracle)", content.right.max(axis=1), 1)
    return {
        "models": models,
        "prompts": {"train": len(training), "test": len(tests)},
        "strategies": strategies,
        "signals": _signals(content),
        "large": _large(tests, training, content, read_answers(large_folder)),
    }


def _signals(content: Opinions) -> Result:
    """Returns how well each signal separates the prompts whose first model is right from the others, as AUROC."""
    right = content.single() > 0
    signals = {
        "expected quality, from the prompt": content.expected[:, 0],
        "the output states an answer": (content.stated[:, 0] >= 0).astype(np.float64),
        "short output": -content.length[:, 0],
        "the second model agrees": (
            (content.stated[:, 0] == content.stated[:, 1]) & (content.stated[:, 0] >= 0)
        ).astype(np.float64),
        "share of all other models that agree": content.agreement(),
    }
    return {name: auroc(value[right].tolist(), value[~right].tolist()) for name, value in signals.items()}


def _large(
    tests: Sequence[AnsweredRow], training: Sequence[TableRow], content: Opinions, large: Sequence[AnsweredRow]
) -> Result:
    """Returns the cost-quality curves of a cascade: a share of the prompts goes to the large model, chosen by each of
    several signals; the others keep the answer of the small models that are asked."""
    by_id = {row.row_id: row for row in large}
    trained_ids = [row.row_id for row in training if isinstance(row, AnsweredRow)]
    names = sorted(large[0].right)
    model = max(names, key=lambda name: np.mean([by_id[i].right[name] for i in trained_ids if i in by_id]))
    known = np.array([row.row_id in by_id for row in tests])
    dear = np.array([by_id[row.row_id].right[model] for row in tests if row.row_id in by_id])
    single, expected = content.single()[known], content.expected[known, 0]
    second, calls = (values[known] for values in content.until_stated())
    same = ((content.stated[:, 0] == content.stated[:, 1]) & (content.stated[:, 0] >= 0))[known]
    tie_breaker = np.random.default_rng(0).random(len(dear))
    # The prompts with the lowest value go to the large model first.
    orders: dict[str, tuple[Doubles, Doubles, float]] = {
        "at random": (tie_breaker, single, 1.0),
        "expected quality, from the prompt": (expected, single, 1.0),
        "no stated answer first, then expected quality": (expected + calls.clip(1, 2) * -10, second, 1.0),
        "disagreement of two, then expected quality": (expected + 10 * same, second, 2.0),
        "oracle": (single - dear, single, 1.0),
    }
    curves: Result = {}
    for name, (value, small, small_calls) in orders.items():
        first = np.lexsort((tie_breaker, value))
        curve = []
        for share in SHARES:
            taken = np.zeros(len(dear), np.bool_)
            taken[first[: round(share * len(dear))]] = True
            curve.append(float(np.where(taken, dear, small).mean()))
        curves[name] = {"small_calls": small_calls, "right": curve}
    cascade = np.where(same, single, dear)
    share = float((~same).mean())
    mixed = share * dear + (1 - share) * single
    low, high = bootstrap_interval(lambda rows: float((cascade - mixed)[rows].mean()), rows=len(dear))
    return {
        "model": model,
        "prompts": len(dear),
        "right": float(dear.mean()),
        "shares": list(SHARES),
        "curves": curves,
        "cascade": {
            "share_to_large": share,
            "right": float(cascade.mean()),
            "above_random": [float((cascade - mixed).mean()), low, high],
            "right_where_two_agree": float(single[same].mean()),
            "large_right_where_two_agree": float(dear[same].mean()),
        },
    }


def write(result: Result, *, out: Path) -> None:
    """Writes `agreement.json` and `agreement.md` to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    head = {
        "command": "python -m analysis.agreement --tables DIR",
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_state(ROOT),
    }
    (out / "agreement.json").write_text(json.dumps({**head, **result}, indent=1) + "\n")
    (out / "agreement.md").write_text("\n".join(_markdown(head, result)) + "\n")


def _markdown(head: Mapping[str, Any], result: Result) -> Iterator[str]:
    prompts, large = result["prompts"], result["large"]
    git = head["git"] or {}
    yield "# What answers say beyond the prompt\n"
    yield f"`{head['command']}`, {head['at']}, commit {git.get('commit', 'unknown')[:12]}. MMLU-Pro:"
    yield f"{len(result['models'])} models, {prompts['train']} training prompts, {prompts['test']} test prompts.\n"
    yield "`one model` is what a router can do, which sees the prompt alone; the other lines read answers. Intervals:"
    yield "95 % bootstrap over prompts.\n"
    rows = [
        (name, f"{one['calls']:.2f}", markdown.interval(one["prompts"]), markdown.interval(one["macro"]))
        for name, one in result["strategies"].items()
    ]
    yield from markdown.table(("strategy", "calls per prompt", "right, over prompts", "mean over categories"), rows)
    yield "\n## Signals that the first model's answer is right\n"
    yield from markdown.table(("signal", "AUROC"), [(name, f"{v:.3f}") for name, v in result["signals"].items()])
    yield f"\n## A cascade to {large['model']}\n"
    yield f"It is right for {large['right']:.4f} of the {large['prompts']} test prompts that its file has. Share of"
    yield "right answers if a share of the prompts goes to it, chosen by:\n"
    yield from markdown.table(
        ("chosen by", "small models asked", *map(str, large["shares"])),
        [
            (name, f"{one['small_calls']:.0f}", *(f"{right:.3f}" for right in one["right"]))
            for name, one in large["curves"].items()
        ],
    )
    cascade = large["cascade"]
    above = cascade["above_random"]
    yield f"\nTwo small models agree on {1 - cascade['share_to_large']:.3f} of the prompts, and are right there for"
    yield f"{cascade['right_where_two_agree']:.3f} (the large one: {cascade['large_right_where_two_agree']:.3f}). With"
    yield f"the large model for the others, {cascade['right']:.4f} are right; that is {above[0]:.4f} ({above[1]:.3f} to"
    yield f"{above[2]:.3f}) more than with the same share at random."


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tables", type=Path, required=True, metavar="DIR", help=f"folder with {POOL} and {LARGE}")
    parser.add_argument("--out", type=Path, default=Path("analysis/results/agreement"))
    options = parser.parse_args(arguments)
    try:
        result = measure(options.tables / POOL, large_folder=options.tables / LARGE)
    except HpcRouterError as error:
        print(error, file=sys.stderr)
        return 2
    write(result, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
