"""Measures classifiers on labelled prompts, with the commands that a user types: train, eval, predict, pack.

    python -m analysis.classifiers DATA --encoder MODEL --python .venv-train/bin/python

DATA is a folder with `domains_train`, `domains_test`, `mmlu_train` and `mmlu_test`: JSON lines with `prompt`, `domain`
and, in the mmlu files, `correct` of two models. PYTHON needs torch and transformers. Artefacts and the result of each
step stay in --work, and a step with a stored result is not repeated. `--only STEP` runs one step and writes no report.
The report goes to --out: `classifiers.json`, `classifiers.md` and the figures. Needs the extra `analysis`, and
scikit-learn for the map.
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
EXEMPLARS_PER_DOMAIN: Final = 20
LATENCY_RUNS: Final = 7
TRANSFER: Final = {"computing": "code", "law": "law", "math": "math", "medicine": "medicine"}
"""Domains in the mmlu files that also occur in the other files -> their names there."""
EXPENSIVE_MODEL: Final = "gpt-4-1106-preview"

Result = dict[str, Any]
Prompt = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Experiment:
    data: Path
    work: Path
    encoder: str
    python: str

    def train(self, name: str, **settings: object) -> Result:
        """Trains with `launch.train_classifier`. In the result, `wall_s` is the time of the whole command."""
        output = self.work / name
        keys = [f"{key}={value}" for key, value in ({"seed": 0} | settings | {"output": output}).items()]
        if settings.get("features", "distilled") == "distilled":
            keys.append(f"encoder={self.encoder}")
        argv = [self.python, "-m", "launch.train_classifier", *keys]
        started = time.monotonic()
        subprocess.run(argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        manifest = json.loads((output / "artefact.json").read_text())
        return {
            "command": self._displayed(argv),
            "wall_s": round(time.monotonic() - started, 1),
            "bytes": sum(path.stat().st_size for path in output.iterdir()),
            "version": manifest["version"],
            "training": manifest["training"],
        }

    def classify(self, task: str, *arguments: object, as_json: bool = False) -> tuple[str, str]:
        """Runs `hpc-router classify` and returns the command and its stdout."""
        argv = [sys.executable, "-m", "hpc_router.cli", "classify", task, *map(str, arguments), *(["--json"] * as_json)]
        done = subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return self._displayed(argv), done.stdout

    def evaluate(self, name: str, prompts: Path, *, fit: Path | None = None, costs: Sequence[str] = ()) -> Result:
        options = [*(["--fit", fit] if fit else []), *(word for cost in costs for word in ("--cost", cost))]
        command, stdout = self.classify("eval", self.work / name, prompts, *options, as_json=True)
        return {"command": command, **json.loads(stdout)}

    def predict_accuracy(self, name: str, prompts: Path) -> Result:
        """Returns the accuracy of the experts that `predict` names. Without a fallback, low margins change nothing."""
        command, stdout = self.classify("predict", self.work / name, prompts)
        experts = [json.loads(line)["expert"] for line in stdout.split("\n") if line]
        right = [e == row["domain"] for e, row in zip(experts, read(prompts), strict=True)]
        return {"command": command, "accuracy": sum(right) / len(right), "prompts": len(right)}

    def file(self, name: str) -> Path:
        """Returns the path of a data file, or of one derived from the data, which is written on first use."""
        if (self.data / f"{name}.jsonl").exists():
            return self.data / f"{name}.jsonl"
        path = self.work / f"{name}.jsonl"
        if not path.exists():
            kind, _, number = name.partition("-")
            path.write_text("".join(json.dumps(row) + "\n" for row in DERIVED_FILES[kind](self, number)))
        return path

    def _displayed(self, argv: Sequence[str]) -> str:
        """Returns the command line without the folders of this machine."""
        known = {self.python: "python", sys.executable: "python", self.encoder: "ENCODER"}
        return self.without_folders(shlex.join(known.get(word, word) for word in argv))

    def without_folders(self, text: str) -> str:
        for folder, name in ((self.work, "WORK"), (self.data, "DATA"), (self.encoder, "ENCODER")):
            text = text.replace(str(folder), name)
        return text


def read(path: Path) -> list[Prompt]:
    return [json.loads(line) for _, line in lines_of(path)]


def exemplars(experiment: Experiment, number: str) -> Iterable[Prompt]:
    """Draws 20 prompts of each domain. `number`: seed of the draw."""
    rng = random.Random(int(number))
    rows = read(experiment.file("domains_train"))
    for domain in sorted({row["domain"] for row in rows}):
        pool = sorted({row["prompt"] for row in rows if row["domain"] == domain})
        yield from ({"prompt": prompt, "domain": domain} for prompt in rng.sample(pool, EXEMPLARS_PER_DOMAIN))


def transfer(experiment: Experiment, number: str) -> Iterable[Prompt]:
    """Yields prompts of another source, with the domain names of the exemplars."""
    for row in read(experiment.file("mmlu_test")):
        if row["domain"] in TRANSFER:
            yield {"prompt": row["prompt"], "domain": TRANSFER[row["domain"]]}


def priced(experiment: Experiment, number: str) -> Iterable[Prompt]:
    """Yields mmlu's prompts with a cost for its two models: 1 for the expensive one, 0 for the other."""
    for row in read(experiment.file(f"mmlu_{number}")):
        yield row | {"cost": {name: float(name == EXPENSIVE_MODEL) for name in row.get("correct", {})}}


DERIVED_FILES: Final[Mapping[str, Callable[[Experiment, str], Iterable[Prompt]]]] = {
    "exemplars": exemplars,
    "transfer": transfer,
    "priced": priced,
}


def discovered(experiment: Experiment, features: str) -> Result:
    train, name = experiment.file("domains_train"), f"discovered-{features}"
    return {
        "training": experiment.train(name, data=train, method="discovered", features=features, clusters=16),
        "test": experiment.evaluate(name, experiment.file("domains_test"), fit=train),
        "transfer": experiment.evaluate(name, experiment.file("transfer"), fit=train),
    }


def from_exemplars(experiment: Experiment, number: int, *, corpus: bool = False) -> Result:
    name, extra = f"exemplars-{number}", {"corpus": experiment.file("domains_train")} if corpus else {}
    folder = f"corpus-{number}" if corpus else name
    return {
        "training": experiment.train(
            folder, data=experiment.file(name), method="exemplars", features="distilled", **extra
        ),
        "predict": experiment.predict_accuracy(folder, experiment.file("domains_test")),
        "transfer": experiment.predict_accuracy(folder, experiment.file("transfer")),
        "test": experiment.evaluate(folder, experiment.file("domains_test")),
    }


def measured(experiment: Experiment) -> Result:
    """Measures method=measured. Its clusters, and so their accuracy, are the same as with method=discovered."""
    train = experiment.file("priced-train")
    return {
        "training": experiment.train("measured", data=train, method="measured", features="distilled", clusters=64),
        "test": experiment.evaluate("measured", experiment.file("priced-test"), fit=train),
    }


def packed(experiment: Experiment, features: str) -> Result:
    """Assigns the clusters of domains_train to six equal experts, by the traffic of domains_test."""
    arguments = (
        experiment.work / f"discovered-{features}",
        experiment.file("domains_test"),
        "--limit",
        1.3,
        "--max-loss",
        0.2,
    )
    command, stdout = experiment.classify("pack", *arguments)
    return {"command": command, **json.loads(stdout)}


def latency(experiment: Experiment) -> Result:
    """Measures the latency several times in separate processes, because the speed of a shared machine varies."""
    prompts = experiment.file("domains_test")
    runs = [experiment.evaluate("discovered-distilled", prompts) for _ in range(LATENCY_RUNS)]
    return {"command": runs[0]["command"], "runs": [run["latency"] for run in runs]}


STEPS: Final[Mapping[str, Callable[[Experiment], Result]]] = {
    **{f"discovered-{f}": partial(discovered, features=f) for f in ("distilled", "lexical", "cbtm")},
    **{f"exemplars-{n}": partial(from_exemplars, number=n) for n in DRAWS},
    "corpus-0": partial(from_exemplars, number=0, corpus=True),
    "measured": measured,
    "latency": latency,
    **{f"packed-{f}": partial(packed, features=f) for f in ("distilled", "lexical")},
}


def run_step(experiment: Experiment, step: str) -> Result:
    """Returns the result of a step, from its file if it was run before."""
    path = experiment.work / f"{step}.json"
    if not path.exists():
        print(f"-- {step}", file=sys.stderr)
        path.write_text(json.dumps(STEPS[step](experiment), indent=1) + "\n")
    value: Result = json.loads(path.read_text())
    return value


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.classifiers", description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--encoder", required=True, metavar="MODEL")
    parser.add_argument("--python", default=sys.executable, help="interpreter that trains (default: this one)")
    parser.add_argument("--work", type=Path, default=Path("results/classifiers"))
    parser.add_argument("--out", type=Path, default=Path("analysis/results/classifiers"))
    parser.add_argument("--only", choices=[*STEPS])
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    python = str(Path(options.python).absolute()) if os.sep in options.python else options.python
    experiment = Experiment(options.data.absolute(), options.work.absolute(), options.encoder, python)
    steps = {step: run_step(experiment, step) for step in STEPS if options.only in (None, step)}
    if options.only is None:
        from analysis.classifier_report import write

        write(experiment, steps, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
