"""Reads public tables of models' results per prompt, which the user has fetched. Nothing of them is in the repository.

DIR has a folder per table, with the files as their publishers name them:

- `routerdc/`: the files of `datasets/split2_model7` of RouterDC's repository: JSON lists of `{question, scores: {model:
  number}}`. Files `*train.json` are the training; of the others, those of the same data sets are the known sets, and
  `mbpp`, `MATH_prealgebra` and `ceval` the unknown ones, as in its paper. In a set of multiple-choice questions a
  score is the probability of the right choice, or 0 if another one is more likely; any positive one counts as right,
  as in its evaluation.
- `mmlu-pro/`: `model_outputs_MODEL_5shots.json` or `.zip` of MMLU-Pro's `eval_results`: lists of `{question_id,
  question, options, answer, pred, category}`.
- `routerarena/`: `MODEL.jsonl` of RouterArena's `cached_results`: `{global_index, question, evaluation_result: {score,
  inference_cost}}`.
- `routerbench/`: CSV files of RouterBench with `sample_id`, `prompt`, `eval_name`, a column per model and one
  `MODEL|total_cost`; `*_train.csv` and `*_test.csv`, or other names, which are split here. A row without the result of
  a model is left out.

A table without a split of its own is split by a hash of each prompt's id, so no choice of ours is in it. A prompt of
the training that also is in a test set is left out of the training.
"""

import ast
import csv
import hashlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hpc_router.errors import ConfigError

KNOWN, UNKNOWN = "known", "unknown"
_ROUTERDC_UNKNOWN: Final = ("mbpp", "MATH_prealgebra", "ceval")
_ROUTERDC_UNUSED: Final = ("arc_easy", "javascript")
"""Sets of RouterDC's repository that are not in the averages of its paper."""
_ROUTERDC_ATTEMPTS: Final = ("gsm8k", "humaneval", "mbpp", "MATH_prealgebra", "javascript")
"""Sets whose scores are shares of right attempts; those of the others are probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """A prompt and the result of each model. `split`: `train`, `known` (a test set whose data set is in the training)
    or `unknown`. `cost`: price of each model's answer in dollars; empty if the table has no prices."""

    prompt: str
    dataset: str
    split: str
    right: Mapping[str, float]
    cost: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultTable:
    """A table of results. All rows have the same models. `left_out`: number of training rows that are in a test set."""

    name: str
    rows: Sequence[TableRow]
    left_out: int = 0

    def of(self, split: str) -> list[TableRow]:
        return [row for row in self.rows if row.split == split]

    @property
    def models(self) -> list[str]:
        return sorted(self.rows[0].right)


def read_table(name: str, folder: Path) -> ResultTable:
    """Reads the table `name`, one of `READERS`. Raises ConfigError if its files are missing or have another form."""
    try:
        rows = list(READERS[name](folder))
    except (KeyError, TypeError, ValueError, AttributeError, SyntaxError) as error:
        raise ConfigError(f"{folder}: the files are not those of {name} ({type(error).__name__}: {error})") from error
    return checked_table(name, rows, folder=folder)


def checked_table(name: str, rows: Sequence[TableRow], *, folder: Path) -> ResultTable:
    """Returns the table of these rows, without the results of models that are not in every row, and without training
    rows that are in a test set. Raises ConfigError, with `folder`, if the rows are too few for a table."""
    if not rows:
        raise ConfigError(f"{folder}: no file of {name}; see python -m analysis.routers --help")
    models = set.intersection(*({*row.right} for row in rows))
    if len(models) < 2 or not {row.split for row in rows} - {"train"} or "train" not in {row.split for row in rows}:
        raise ConfigError(f"{folder}: {name} needs two models or more, and prompts for the training and for the test")
    rows = [_limited(row, models) for row in rows]
    tested = {_key(row.prompt) for row in rows if row.split != "train"}
    kept = [row for row in rows if row.split != "train" or _key(row.prompt) not in tested]
    return ResultTable(name=name, rows=kept, left_out=len(rows) - len(kept))


def _key(prompt: str) -> str:
    return " ".join(prompt.lower().split())


def _limited(row: TableRow, models: set[str]) -> TableRow:
    right = {model: row.right[model] for model in sorted(models)}
    cost = {model: row.cost[model] for model in right} if models <= row.cost.keys() else {}
    return replace(row, right=right, cost=cost)


def half_of(row_id: str) -> str:
    """Returns the split of a prompt whose table has none, by a hash of its id."""
    return "train" if hashlib.sha256(row_id.encode()).digest()[0] % 2 else KNOWN


def _routerdc(folder: Path) -> Iterator[TableRow]:
    for path in sorted(folder.glob("*.json")):
        dataset = path.stem.removesuffix("train").removesuffix("test").rstrip("-_")
        if dataset in _ROUTERDC_UNUSED:
            continue
        split = "train" if path.stem.endswith("train") else UNKNOWN if dataset in _ROUTERDC_UNKNOWN else KNOWN
        for value in json.loads(path.read_text()):
            scores: dict[str, float] = {name: float(score) for name, score in value["scores"].items()}
            if dataset not in _ROUTERDC_ATTEMPTS:
                scores = {name: float(score > 0) for name, score in scores.items()}
            yield TableRow(prompt=value["question"], dataset=dataset, split=split, right=scores, cost={})


def _mmlu_pro(folder: Path) -> Iterator[TableRow]:
    prompts: dict[str, tuple[str, str]] = {}
    right: dict[str, dict[str, float]] = {}
    models = 0
    for model, outputs in mmlu_pro_outputs(folder):
        models += 1
        for value in outputs:
            row_id = str(value["question_id"])
            prompts[row_id] = "\n".join((value["question"], *map(str, value["options"]))), value["category"]
            right.setdefault(row_id, {})[model] = float(value["pred"] == value["answer"])
    for row_id in sorted(prompts):
        prompt, category = prompts[row_id]
        if len(right[row_id]) == models:
            yield TableRow(prompt=prompt, dataset=category, split=half_of(row_id), right=right[row_id], cost={})


def mmlu_pro_outputs(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields the name of each model of MMLU-Pro's files in `folder`, with its outputs."""
    for path in sorted([*folder.glob("model_outputs_*.json"), *folder.glob("model_outputs_*.zip")]):
        yield path.stem.removeprefix("model_outputs_").removesuffix("_5shots"), _outputs(path)


def _outputs(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".json":
        content: Any = json.loads(path.read_text())
    else:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if Path(name).name == f"{path.stem}.json")
            content = json.loads(archive.read(name))
    if not isinstance(content, list):
        raise TypeError(f"{path.name} is not a list")
    return content


def _routerarena(folder: Path) -> Iterator[TableRow]:
    rows: dict[str, TableRow] = {}
    paths = sorted(folder.glob("*.jsonl"))
    for path in paths:
        for line in path.read_text().splitlines():
            value = json.loads(line)
            row_id, result = value["global_index"], value["evaluation_result"]
            before = rows.get(row_id)
            rows[row_id] = TableRow(
                prompt=value["question"],
                dataset=row_id.rpartition("_")[0],
                split=half_of(row_id),
                right={**(before.right if before else {}), path.stem: float(result["score"])},
                cost={**(before.cost if before else {}), path.stem: float(result["inference_cost"])},
            )
    yield from (rows[row_id] for row_id in sorted(rows) if len(rows[row_id].right) == len(paths))


def _routerbench(folder: Path) -> Iterator[TableRow]:
    csv.field_size_limit(sys.maxsize)
    for path in sorted(folder.glob("*.csv")):
        named = "train" if path.stem.endswith("_train") else KNOWN if path.stem.endswith("_test") else None
        with path.open(newline="") as file:
            for value in csv.DictReader(file):
                models = [key.removesuffix("|total_cost") for key in value if key.endswith("|total_cost")]
                if not all(value[model] for model in models):
                    continue
                prompt = value["prompt"]
                if prompt.startswith("["):  # a list of messages, written by Python
                    prompt = "\n".join(map(str, ast.literal_eval(prompt)))
                yield TableRow(
                    prompt=prompt,
                    dataset=value["eval_name"],
                    split=named or half_of(value["sample_id"]),
                    right={model: float(value[model]) for model in models},
                    cost={model: float(value[f"{model}|total_cost"]) for model in models},
                )


READERS: Final[Mapping[str, Callable[[Path], Iterator[TableRow]]]] = {
    "routerdc": _routerdc,
    "mmlu-pro": _mmlu_pro,
    "routerarena": _routerarena,
    "routerbench": _routerbench,
}
