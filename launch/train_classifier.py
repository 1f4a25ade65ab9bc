"""Train a classifier from a file of prompts.

    python -m launch.train_classifier data=prompts.jsonl encoder=/models/all-MiniLM-L6-v2 output=my-classifier
    python -m launch.train_classifier data=prompts.jsonl features=lexical clusters=32 output=my-classifier
    python -m launch.train_classifier data=labelled.jsonl method=exemplars features=lexical output=my-classifier

Keys: data method=discovered|exemplars|measured features=cbtm|lexical|distilled clusters=16 seed=0 encoder=PATH
corpus=FILE output=DIR weight=0 (docs/classifier.md). `sbatch sbatch/train.sbatch KEY=VALUE...` runs the same as a job.
"""

import sys
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hpc_router.cli.main import run_reporting_errors
from hpc_router.config.as_written import as_written
from hpc_router.config.parsing import parse
from hpc_router.config.sources import Sources, parse_override
from hpc_router.errors import ConfigError, suggest
from hpc_router.routing.training.train import TrainConfig, train


def train_classifier(config: TrainConfig) -> int:
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, object] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        artefact = train(config, progress=progress)
    artefact.write(Path(config.output))
    scores = artefact.training["scores"]
    assert isinstance(scores, dict)
    print(
        f"{config.output}: version {artefact.version}, {len(artefact.clusters)} clusters, {len(artefact.terms)} terms"
    )
    print(
        f"held out: {scores['held_out_agreement']:.3f} as trained; margin below {artefact.margin_threshold:.4f} is low"
    )
    nobodys = [name for name, expert in zip(artefact.clusters, artefact.experts, strict=True) if expert is None]
    if nobodys:
        cure = f"hpc-router classify assign {config.output} {nobodys[0]}=NAME ..."
        print(f"{len(nobodys)} clusters have no expert: `{cure}`")
    return 0


def config_of(words: list[str]) -> TrainConfig:
    """Raises ConfigError for a key or value that is none."""
    given: dict[str, object] = {}
    valid = [field.name for field in fields(TrainConfig)]
    for word in words:
        override = parse_override(word)
        key = override.key_or_group
        if key not in valid:
            raise ConfigError(f"'{key}': not a key of a training{suggest(key, valid)}")
        given[key] = override.value()
    return parse(TrainConfig, as_written(TrainConfig, given, Sources(words, ()).find), at="")


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    return run_reporting_errors(lambda: train_classifier(config_of(words)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
