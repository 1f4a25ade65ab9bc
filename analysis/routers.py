"""Measures this project's classifiers on public tables of models' results, beside what else could choose a model.

    python -m analysis.routers --tables DIR [--encoder MODEL] [--out DIR]

`analysis.router_tables` says what DIR has to contain; its tables are not part of the repository. Families and settings
are fixed here, before a table is read, and each family reads a test set once. Every family is trained on the training
rows only. Results: `routers.json`, `routers.md` and figures in --out. Needs the extra `analysis`, and the extra `train`
for training.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from analysis.router_tables import READERS, ResultTable, TableRow, read_table
from hpc_router.errors import HpcRouterError
from hpc_router.routing.artefact import Artefact
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.evaluation import BOOTSTRAP_SAMPLES, latency
from hpc_router.routing.features import Features, counts_of, vocabulary_of
from hpc_router.routing.training.dataset import Row
from hpc_router.routing.training.train import TrainConfig, TrainingSet, train_on

Result = dict[str, Any]
Doubles = NDArray[np.float64]

SEED: Final = 0
NEIGHBOURS: Final = 20
"""Number of training prompts whose results the nearest-neighbour router averages."""
ROBUSTNESS_PROMPTS: Final = 500
MIN_LABEL_ROWS: Final = 20
"""Minimum number of training rows of each data set for the classifier of data sets."""
COST_STEPS: Final = 25
PUBLISHED: Final[Mapping[str, Mapping[str, Mapping[str, float]]]] = {
    "routerdc": {"RouterDC, 280M encoder (arXiv 2409.19886)": {"known": 0.5854, "unknown": 0.4585}}
}
"""Published means over data sets, by table, router and kind of data set."""


def training_rows(table: ResultTable, *, shuffled: bool = False) -> list[Row]:
    """Returns the training rows of the table. With `shuffled`, each prompt gets the results of another prompt, so that
    nothing can be learned but which model is the best on the whole."""
    rows = table.of("train")
    results = list(range(len(rows)))
    if shuffled:
        random.Random(SEED).shuffle(results)
    return [
        Row(line=n, id=n, text=row.prompt, domain=row.dataset, correct=rows[r].right, cost=rows[r].cost)
        for n, (row, r) in enumerate(zip(rows, results, strict=True), 1)
    ]


def trained(rows: Sequence[Row], **settings: Any) -> Artefact:
    config = TrainConfig(data="table", output="none", seed=SEED, **settings)
    seen: dict[str, Row] = {}
    for row in rows:
        if row.text.strip():
            seen.setdefault(" ".join(row.text.lower().split()), row)
    return train_on(TrainingSet(rows=list(seen.values())), config=config, progress=lambda *_: None)


def nearest_neighbours(train: Sequence[TableRow], tests: Sequence[TableRow], models: Sequence[str]) -> list[str]:
    """Returns the model for each test prompt whose results are best, on the average, over the nearest training prompts
    by TF-IDF cosine."""
    from scipy.sparse import csr_matrix

    features = Features()
    vocabulary = vocabulary_of([row.prompt for row in train], features=features)

    def matrix(rows: Sequence[TableRow], idf: Doubles | None) -> tuple[Any, Doubles]:
        counts = counts_of([row.prompt for row in rows], vocabulary=vocabulary)
        if idf is None:
            df = np.bincount(counts.term, minlength=counts.terms)
            idf = np.log((len(rows) + 1) / np.maximum(df, 1))
        values = idf[counts.term]
        length = np.sqrt(np.bincount(counts.text, weights=values**2, minlength=len(rows)))
        values = values / np.where(length > 0, length, 1)[counts.text]
        return csr_matrix((values, (counts.text, counts.term)), shape=(counts.texts, counts.terms)), idf

    known, idf = matrix(train, None)
    right = np.array([[row.right[model] for model in models] for row in train])
    number = min(NEIGHBOURS, len(train))
    chosen: list[str] = []
    for start in range(0, len(tests), 500):
        similarity = (matrix(tests[start : start + 500], idf)[0] @ known.T).toarray()
        nearest = np.argpartition(-similarity, number - 1, axis=1)[:, :number]
        chosen += [models[best] for best in right[nearest].mean(axis=1).argmax(axis=1)]
    return chosen


def best_single(table: ResultTable) -> str:
    """Returns the model with the highest mean over the data sets of the training."""
    rows = table.of("train")
    datasets = sorted({row.dataset for row in rows})
    means = {
        model: np.mean([np.mean([row.right[model] for row in rows if row.dataset == name]) for name in datasets])
        for model in table.models
    }
    return max(table.models, key=lambda model: (means[model], model))


def score(rows: Sequence[TableRow], values: Doubles) -> Result:
    """Returns the mean of `values`, one per row, over the prompts and over the data sets (macro), each with its 95 %
    bootstrap interval. Prompts are drawn within their data sets."""
    groups = [np.flatnonzero([row.dataset == name for row in rows]) for name in sorted({row.dataset for row in rows})]
    rng = np.random.default_rng(SEED)
    samples = []
    for _ in range(BOOTSTRAP_SAMPLES):
        drawn = [values[group[rng.integers(len(group), size=len(group))]] for group in groups]
        samples.append((np.concatenate(drawn).mean(), np.mean([one.mean() for one in drawn])))
    low, high = np.quantile(samples, 0.025, axis=0), np.quantile(samples, 0.975, axis=0)
    return {
        "prompts": [float(values.mean()), float(low[0]), float(high[0])],
        "macro": [float(np.mean([values[group].mean() for group in groups])), float(low[1]), float(high[1])],
    }


def _swapped_letters(words: list[str], rng: random.Random) -> str:
    """One word in twenty has two neighbouring letters swapped; at least one word."""
    long = [n for n, word in enumerate(words) if len(word) > 3]
    for n in rng.sample(long, min(len(long), max(1, len(words) // 20))):
        at = rng.randrange(1, len(words[n]) - 2)
        words[n] = words[n][:at] + words[n][at + 1] + words[n][at] + words[n][at + 2 :]
    return " ".join(words)


def _dropped_words(words: list[str], rng: random.Random) -> str:
    """One word in twenty is missing; at least one."""
    missing = set(rng.sample(range(len(words)), max(1, len(words) // 20))) if len(words) > 1 else set()
    return " ".join(word for n, word in enumerate(words) if n not in missing)


CHANGES: Final[Mapping[str, Callable[[str, random.Random], str]]] = {
    "typos": lambda text, rng: _swapped_letters(text.split(" "), rng),
    "white space": lambda text, rng: f"  \n{text.replace(' ', '  ')}\n\n ",
    "polite words": lambda text, rng: f"Hello! Could you please help me with this? {text} Thank you very much!",
    "dropped words": lambda text, rng: _dropped_words(text.split(" "), rng),
}


def robustness(classifier: Classifier, prompts: Sequence[str]) -> Result:
    """Returns the share of the prompts that keep their model, by kind of change."""
    rng = random.Random(SEED)
    drawn = rng.sample(list(prompts), min(len(prompts), ROBUSTNESS_PROMPTS))
    before = [classifier.classify(text).expert for text in drawn]
    return {
        name: float(
            np.mean([classifier.classify(change(t, rng)).expert == b for t, b in zip(drawn, before, strict=True)])
        )
        for name, change in CHANGES.items()
    }


def cost_curve(artefact: Artefact, rows: Sequence[TableRow]) -> list[list[float]]:
    """Returns the points `[cost weight, mean cost in dollars, share of right answers]` for several values of
    `policy.cost_weight`, from 0 to the one that always chooses the cheapest model."""
    quality = artefact.quality
    assert quality is not None
    spread = np.diff(np.unique(quality.cost))
    most = 1 / spread.min() if spread.size else 1.0
    points: list[list[float]] = []
    for weight in (0.0, *np.geomspace(most * 1e-4, most, COST_STEPS)):
        classifier = Classifier(artefact, cost_weight=float(weight))
        chosen = [str(classifier.classify(row.prompt).expert) for row in rows]
        cost = np.mean([row.cost[model] for row, model in zip(rows, chosen, strict=True)])
        right = np.mean([row.right[model] for row, model in zip(rows, chosen, strict=True)])
        if not points or points[-1][1:] != [float(cost), float(right)]:
            points.append([float(weight), float(cost), float(right)])
    return points


def measure(table: ResultTable, *, encoder: str | None) -> Result:
    """Returns all results on one table, by split of its test sets and by router."""
    models, train = table.models, table.of("train")
    families: dict[str, Artefact] = {}
    seconds: dict[str, float] = {}
    settings: dict[str, tuple[bool, dict[str, Any]]] = {
        "soft clusters, lexical": (False, {"method": "measured", "features": "lexical"}),
        "the same, results shuffled": (True, {"method": "measured", "features": "lexical"}),
    }
    if encoder is not None:
        distilled = {"method": "measured", "features": "distilled", "encoder": encoder}
        settings["clusters, distilled"] = (False, distilled)
    for name, (shuffled, keys) in settings.items():
        print(f"-- {table.name}: {name}", file=sys.stderr)
        started = time.monotonic()
        families[name] = trained(training_rows(table, shuffled=shuffled), **keys)
        seconds[name] = round(time.monotonic() - started, 1)
    classifiers = {name: Classifier(artefact) for name, artefact in families.items()}
    single = best_single(table)
    main = classifiers["soft clusters, lexical"]
    result: Result = {
        "models": models,
        "prompts": {split: len(table.of(split)) for split in ("train", "known", "unknown")},
        "left_out": table.left_out,
        "best_single": single,
        "published": PUBLISHED.get(table.name, {}),
        "families": {
            name: {
                "training_s": seconds[name],
                "clusters": len(artefact.clusters),
                "terms": len(artefact.terms),
                "bytes": len(artefact.tables),
                "robustness": robustness(classifiers[name], [row.prompt for row in table.of("known")]),
                "latency": latency(classifiers[name].classify, [row.prompt for row in table.of("known")]),
            }
            for name, artefact in families.items()
        },
        "splits": {},
        "labels": _labels(table),
    }
    for split in ("known", "unknown"):
        rows = table.of(split)
        if rows:
            chosen = {name: [str(c.classify(row.prompt).expert) for row in rows] for name, c in classifiers.items()}
            chosen[f"{NEIGHBOURS} nearest neighbours"] = nearest_neighbours(train, rows, models)
            chosen["best single model of the training"] = [single] * len(rows)
            result["splits"][split] = _scores(rows, models, chosen)
    if table.rows[0].cost:
        rows = table.of("known")
        result["cost"] = {
            "curve": cost_curve(main.artefact, rows),
            "single": {
                m: [float(np.mean([r.cost[m] for r in rows])), float(np.mean([r.right[m] for r in rows]))]
                for m in models
            },
        }
    return result


def _scores(rows: Sequence[TableRow], models: Sequence[str], chosen: Mapping[str, Sequence[str]]) -> Result:
    """Returns the scores of the routers in `chosen` (a model for each row), of each model, and of the bounds."""
    right = np.array([[row.right[model] for model in models] for row in rows])
    datasets = np.array([row.dataset for row in rows])
    per_set = np.zeros(len(rows))
    for name in sorted(set(datasets)):
        here = datasets == name
        per_set[here] = right[here][:, right[here].mean(axis=0).argmax()]
    values = {
        **{
            name: np.array([row.right[m] for row, m in zip(rows, picks, strict=True)]) for name, picks in chosen.items()
        },
        "random": right.mean(axis=1),
        "best model per data set, in hindsight": per_set,
        "best model per prompt (oracle)": right.max(axis=1),
    }
    by_model = {m: score(rows, right[:, n])["macro"][0] for n, m in enumerate(models)}
    return {"routers": {name: score(rows, one) for name, one in values.items()}, "models": by_model}


def _labels(table: ResultTable) -> Result | None:
    """Returns how well the data set of a known test prompt is recognised without an encoder; None if a data set has too
    few training rows or if there is only one."""
    train, tests = table.of("train"), table.of("known")
    datasets = sorted({row.dataset for row in train})
    counts = [sum(row.dataset == name for row in train) for name in datasets]
    if len(datasets) < 2 or min(counts) < MIN_LABEL_ROWS:
        return None
    rows = [Row(line=n, id=n, text=row.prompt, domain=row.dataset) for n, row in enumerate(train, 1)]
    classifier = Classifier(trained(rows, method="exemplars", features="lexical"))
    right = np.array([classifier.classify(row.prompt).expert == row.dataset for row in tests], np.float64)
    return {"data_sets": len(datasets), **score(tests, right)}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.routers",
        description=sys.modules["analysis.router_tables"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tables", type=Path, required=True, metavar="DIR", help="folder with a folder per table")
    parser.add_argument("--encoder", metavar="MODEL", help="also measure distilled features, with this encoder")
    parser.add_argument(
        "--only",
        action="append",
        choices=[*READERS],
        help="measure this table (may be repeated) and keep the results of others in --out",
    )
    parser.add_argument("--out", type=Path, default=Path("analysis/results/routers"))
    options = parser.parse_args(arguments)
    names = [name for name in READERS if (options.tables / name).is_dir() and name in (options.only or READERS)]
    if not names:
        parser.error(f"{options.tables} has no folder of a table (valid: {', '.join(READERS)})")
    from analysis.router_report import write

    try:
        tables = [read_table(name, options.tables / name) for name in names]
        results = {table.name: measure(table, encoder=options.encoder) for table in tables}
    except HpcRouterError as error:
        print(error, file=sys.stderr)
        return 2
    write(results, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
