"""What classifiers reach on labelled prompts, by the commands that a user types: train, eval, predict, pack.

    python -m analysis.classifiers DATA --encoder MODEL --python .venv-train/bin/python

DATA: a folder with `domains_train`, `domains_test`, `mmlu_train` and `mmlu_test`, JSON lines with `prompt`, `domain`
and, in the mmlu files, `correct` of two models. PYTHON has torch and transformers. Artefacts and what each step found
stay in --work, and a step whose finding is there is not done again; `--only STEP` does that one alone and reports
nothing. In --out one result file, `classifiers.json`, and beside it `classifiers.md` and the figures. Needs the extra
`analysis`, and scikit-learn for the map.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from hpc_router.state.atomic_files import lines_of

ROOT: Final = Path(__file__).parent.parent
DRAWS: Final = range(6)
EACH: Final = 20
RUNS: Final = 7
TRANSFER: Final = {"computing": "code", "law": "law", "math": "math", "medicine": "medicine"}
"""Domains of mmlu that experts of the other files have, and the names they have there."""
DEARER: Final = "gpt-4-1106-preview"

Found = dict[str, Any]
Prompt = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bench:
    data: Path
    work: Path
    encoder: str
    python: str

    def train(self, name: str, **settings: object) -> Found:
        """By `launch.train_classifier`, timed from start to exit."""
        output = self.work / name
        keys = [f"{key}={value}" for key, value in ({"seed": 0} | settings | {"output": output}).items()]
        if settings.get("features", "distilled") == "distilled":
            keys.append(f"encoder={self.encoder}")
        argv = [self.python, "-m", "launch.train_classifier", *keys]
        started = time.monotonic()
        subprocess.run(argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        manifest = json.loads((output / "artefact.json").read_text())
        return {
            "command": self._shown(argv),
            "wall_s": round(time.monotonic() - started, 1),
            "bytes": sum(path.stat().st_size for path in output.iterdir()),
            "version": manifest["version"],
            "training": manifest["training"],
        }

    def classify(self, task: str, *words: object, as_json: bool = False) -> tuple[str, str]:
        """-> the command and what it printed."""
        argv = [sys.executable, "-m", "hpc_router.cli", "classify", task, *map(str, words), *(["--json"] * as_json)]
        done = subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return self._shown(argv), done.stdout

    def evaluate(self, name: str, prompts: Path, *, fit: Path | None = None, costs: Sequence[str] = ()) -> Found:
        words = [
            self.work / name,
            prompts,
            *(["--fit", fit] if fit else []),
            *(w for c in costs for w in ("--cost", c)),
        ]
        command, printed = self.classify("eval", *words, as_json=True)
        return {"command": command, **json.loads(printed)}

    def predict_accuracy(self, name: str, prompts: Path) -> Found:
        """Of the expert that `predict` names; without a fallback a low margin changes nothing."""
        command, printed = self.classify("predict", self.work / name, prompts)
        experts = [json.loads(line)["expert"] for line in printed.split("\n") if line]
        right = [e == row["domain"] for e, row in zip(experts, read(prompts), strict=True)]
        return {"command": command, "accuracy": sum(right) / len(right), "prompts": len(right)}

    def file(self, name: str) -> Path:
        """Of the data, or one of those made from it."""
        if (self.data / f"{name}.jsonl").exists():
            return self.data / f"{name}.jsonl"
        path = self.work / f"{name}.jsonl"
        if not path.exists():
            kind, _, number = name.partition("-")
            path.write_text("".join(json.dumps(row) + "\n" for row in MADE[kind](self, number)))
        return path

    def _shown(self, argv: Sequence[str]) -> str:
        """Without the folders of this machine."""
        known = {self.python: "python", sys.executable: "python", self.encoder: "ENCODER"}
        return self.without_folders(shlex.join(known.get(word, word) for word in argv))

    def without_folders(self, text: str) -> str:
        for folder, name in ((self.work, "WORK"), (self.data, "DATA"), (self.encoder, "ENCODER")):
            text = text.replace(str(folder), name)
        return text


def read(path: Path) -> list[Prompt]:
    return [json.loads(line) for _, line in lines_of(path)]


def exemplars(bench: Bench, number: str) -> Iterable[Prompt]:
    """20 prompts of each domain, another draw for each number."""
    rng = random.Random(int(number))
    rows = read(bench.file("domains_train"))
    for domain in sorted({row["domain"] for row in rows}):
        pool = sorted({row["prompt"] for row in rows if row["domain"] == domain})
        yield from ({"prompt": prompt, "domain": domain} for prompt in rng.sample(pool, EACH))


def transfer(bench: Bench, number: str) -> Iterable[Prompt]:
    """Of another source, under the names of the domains that the exemplars have."""
    for row in read(bench.file("mmlu_test")):
        if row["domain"] in TRANSFER:
            yield {"prompt": row["prompt"], "domain": TRANSFER[row["domain"]]}


def priced(bench: Bench, number: str) -> Iterable[Prompt]:
    """mmlu's two models with a cost: the dearer one 1, the other 0."""
    for row in read(bench.file(f"mmlu_{number}")):
        yield row | {"cost": {name: float(name == DEARER) for name in row.get("correct", {})}}


MADE: Final[Mapping[str, Callable[[Bench, str], Iterable[Prompt]]]] = {
    "exemplars": exemplars,
    "transfer": transfer,
    "priced": priced,
}


def discovered(bench: Bench, features: str) -> Found:
    train, name = bench.file("domains_train"), f"discovered-{features}"
    return {
        "training": bench.train(name, data=train, method="discovered", features=features, clusters=16),
        "test": bench.evaluate(name, bench.file("domains_test"), fit=train),
        "transfer": bench.evaluate(name, bench.file("transfer"), fit=train),
    }


def exemplified(bench: Bench, number: int, *, corpus: bool = False) -> Found:
    name, more = f"exemplars-{number}", {"corpus": bench.file("domains_train")} if corpus else {}
    folder = f"corpus-{number}" if corpus else name
    return {
        "training": bench.train(folder, data=bench.file(name), method="exemplars", features="distilled", **more),
        "predict": bench.predict_accuracy(folder, bench.file("domains_test")),
        "transfer": bench.predict_accuracy(folder, bench.file("transfer")),
        "test": bench.evaluate(folder, bench.file("domains_test")),
    }


def measured(bench: Bench) -> Found:
    """Its clusters are the discovered ones, so its accuracy is theirs."""
    train = bench.file("priced-train")
    return {
        "training": bench.train("measured", data=train, method="measured", features="distilled", clusters=64),
        "test": bench.evaluate("measured", bench.file("priced-test"), fit=train),
    }


def packed(bench: Bench, features: str) -> Found:
    """Clusters of domains_train against six equal experts, with the traffic of domains_test."""
    words = (bench.work / f"discovered-{features}", bench.file("domains_test"), "--limit", 1.3, "--max-loss", 0.2)
    command, printed = bench.classify("pack", *words)
    return {"command": command, **json.loads(printed)}


def latency(bench: Bench) -> Found:
    """Several times, in processes of their own: a shared machine is not always as fast."""
    prompts = bench.file("domains_test")
    runs = [bench.evaluate("discovered-distilled", prompts) for _ in range(RUNS)]
    return {"command": runs[0]["command"], "runs": [run["latency"] for run in runs]}


STEPS: Final[Mapping[str, Callable[[Bench], Found]]] = {
    **{f"discovered-{f}": partial(discovered, features=f) for f in ("distilled", "lexical", "cbtm")},
    **{f"exemplars-{n}": partial(exemplified, number=n) for n in DRAWS},
    "corpus-0": partial(exemplified, number=0, corpus=True),
    "measured": measured,
    "latency": latency,
    **{f"packed-{f}": partial(packed, features=f) for f in ("distilled", "lexical")},
}


def done(bench: Bench, step: str) -> Found:
    """What the step finds, or found before."""
    path = bench.work / f"{step}.json"
    if not path.exists():
        print(f"-- {step}", file=sys.stderr)
        found = STEPS[step](bench)
        path.write_text(json.dumps(found, indent=1) + "\n")
    value: Found = json.loads(path.read_text())
    return value


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.classifiers", description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--encoder", required=True, metavar="MODEL")
    parser.add_argument("--python", default=sys.executable, help="what trains (default: this one)")
    parser.add_argument("--work", type=Path, default=Path("results/classifiers"))
    parser.add_argument("--out", type=Path, default=Path("analysis/results/classifiers"))
    parser.add_argument("--only", choices=[*STEPS])
    given = parser.parse_args(words)
    given.work.mkdir(parents=True, exist_ok=True)
    python = str(Path(given.python).absolute()) if os.sep in given.python else given.python
    bench = Bench(given.data.absolute(), given.work.absolute(), given.encoder, python)
    steps = {step: done(bench, step) for step in STEPS if given.only in (None, step)}
    if given.only is None:
        from analysis.classifier_report import write

        write(bench, steps, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
