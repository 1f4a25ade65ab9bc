"""Writes the result file of `analysis.classifiers`, its tables and its figures."""

import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

from analysis import classifier_figures as figures
from analysis import markdown
from analysis.classifiers import DRAWS, ROOT, Experiment, Result, read
from hpc_router.bench.provenance import git_state, hardware

LIMITS_US: Final = {"200 B": 40.0, "2000 B": 150.0}
MAX_TRAINING_S: Final = 300.0
FILES: Final = ("domains_train", "domains_test", "mmlu_train", "mmlu_test")
MAX_MB: Final = 40


def write(experiment: Experiment, steps: Mapping[str, Result], *, out: Path) -> None:
    report = {
        "command": experiment.without_folders(shlex.join(["python", *sys.orig_argv[1:]])),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_state(ROOT),
        "hardware": {key: value for key, value in hardware().items() if key != "host"},
        "versions": {"python": platform.python_version(), **steps["measured"]["training"]["training"]["packages"]},
        "data": {name: len(read(experiment.file(name))) for name in FILES},
        "steps": {name: _without_artefact_details(result) for name, result in steps.items()},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    drawings = [
        figures.cluster_map(experiment.work / "discovered-distilled", read(experiment.file("domains_test"))),
        figures.confusion(steps["exemplars-0"]["test"]["confusion"]),
        figures.cost_quality(steps["measured"]["test"]["cost_quality"]),
    ]
    for drawing in drawings:
        drawing.save(out)
    (out / "classifiers.json").write_text(experiment.without_folders(json.dumps(report, indent=1)) + "\n")
    images = "\n".join(f"![{one.title}]({one.name}.svg)\n\n{one.description}\n" for one in drawings)
    (out / "classifiers.md").write_text("\n".join(_markdown(report)) + "\n\n" + images)


def _without_artefact_details(result: Result) -> Result:
    """Removes the parts of the training record that are long and also in the artefact."""
    training = result.get("training")
    if not training:
        return result
    kept = {key: training[key] for key in ("command", "wall_s", "bytes", "version")}
    return result | {
        "training": kept | {"scores": training["training"]["scores"], "data": training["training"]["data"]}
    }


def _markdown(report: Mapping[str, Any]) -> Iterator[str]:
    steps, hardware, git = report["steps"], report["hardware"], report["git"] or {}
    yield "# Classifiers on labelled prompts"
    yield f"\n`{report['command']}`, {report['at']}\n"
    commit = f"commit {git.get('commit', 'unknown')[:12]}{' with changes' if git.get('changed') else ''}"
    yield f"{hardware['cpu']}, {hardware['cpus']} cores, Linux {hardware['kernel']}; {commit}; " + ", ".join(
        f"{name} {version}" for name, version in report["versions"].items()
    )
    yield "\nA command printed each figure; `classifiers.json` has the command next to it. Training times are those of"
    yield "whole commands.\n"
    yield from markdown.table(
        ("training", "accuracy (interval)", "NMI", "other source", "s", "MB", "balance"),
        (_row(name, result) for name, result in steps.items() if "training" in result),
    )
    draws = [steps[f"exemplars-{n}"] for n in DRAWS]
    same, other = ([result[key]["accuracy"] for result in draws] for key in ("predict", "transfer"))
    yield f"\nExemplars, 20 per domain, mean of {len(draws)} draws:"
    yield f"{mean(same):.4f} ({min(same):.4f} to {max(same):.4f});"
    yield f"on the other source {mean(other):.3f} ({min(other):.3f} to {max(other):.3f}).\n"
    yield "## Targets\n"
    yield from markdown.table(("quantity", "target", "measured", ""), _checks(steps, mean(same)))
    yield "\n## Decisions, in microseconds\n"
    runs = steps["latency"]["runs"]
    yield f"Median of {len(runs)} runs and their range; `sum(range(1000))` shows the speed of the machine.\n"
    yield from markdown.table(
        ("prompt", "p50", "p99"), ((k, _spread(runs, k, "p50_us"), _spread(runs, k, "p99_us")) for k in runs[0])
    )
    yield "\n## Cost and quality of two models, mmlu_test\n"
    quality = steps["measured"]["test"]["cost_quality"]
    rows = quality["curve"]
    yield from markdown.table(
        ("cost", "accuracy", "random mixing", "above it (interval)", "oracle"),
        (
            (r["cost"], f"{r['accuracy']:.3f}", f"{r['random']:.3f}",
             f"{100 * (r['accuracy'] - r['random']):.1f} ({100 * r['low']:.1f} to {100 * r['high']:.1f}) points",
             f"{r['oracle']:.3f}")
            for r in rows
        ),
    )  # fmt: skip
    single = ", ".join(f"{name} {value:.3f}" for name, value in quality["single"].items())
    yield f"\nSingle models: {single}; oracle {quality['oracle']:.3f}.\n"
    yield "## Six equal experts, domains_test, no share above 1.3 x its capacity\n"
    packed = {name.partition("-")[2]: result for name, result in steps.items() if name.startswith("packed")}
    yield from markdown.table(
        ("clusters of", "largest / capacity before", "after", "accuracy lost", "clusters moved"),
        (
            (name, f"{len(p['shares']) * max(p['shares_before'].values()):.2f}", f"{p['largest_over_capacity']:.2f}",
             f"{100 * p['loss']:.1f} points", len(p["moves"]))
            for name, p in packed.items()
        ),
    )  # fmt: skip


def _row(name: str, result: Result) -> Sequence[object]:
    test, training = result["test"], result["training"]
    low, high = test["accuracy_interval"]
    other = result.get("transfer", {}).get("accuracy")
    return (
        name, f"{test['accuracy']:.4f} ({low:.3f} to {high:.3f})", f"{test['nmi']:.3f}",
        "-" if other is None else f"{other:.3f}", f"{training['wall_s']:.0f}", f"{training['bytes'] / 1e6:.1f}",
        f"{test['balance_efficiency']:.2f}",
    )  # fmt: skip


def _checks(steps: Mapping[str, Result], exemplars: float) -> Iterator[Sequence[object]]:
    above = steps["measured"]["test"]["cost_quality"]["above_random_mixing"]
    runs = steps["latency"]["runs"]
    trained = [result["training"] for result in steps.values() if "training" in result]
    wall, largest = max(t["wall_s"] for t in trained), max(t["bytes"] for t in trained) / 1e6
    packed = min(result["largest_over_capacity"] for name, result in steps.items() if name.startswith("packed"))
    checks: list[tuple[str, str, float, float, str]] = [
        ("domains_test, discovered, 16 clusters", ">=", 0.98, steps["discovered-distilled"]["test"]["accuracy"], ".4f"),
        ("mmlu_test, discovered, 64 clusters", ">=", 0.66, steps["measured"]["test"]["accuracy"], ".4f"),
        ("domains_test, 20 exemplars per domain", ">=", 0.97, exemplars, ".4f"),
        ("measured, points above random mixing", ">=", 1.5, 100 * above["mean"], ".2f"),
        ("the lower end of its interval", ">=", 0.0, 100 * above["low"], ".2f"),
        ("packed: largest share over its capacity", "<=", 1.3, packed, ".2f"),
        ("the longest training, s", "<=", MAX_TRAINING_S, wall, ".0f"),
        ("the largest artefact, MB", "<=", MAX_MB, largest, ".1f"),
        *(
            (f"a decision, {length}, p50 us", "<=", limit, median(run[length]["p50_us"] for run in runs), ".1f")
            for length, limit in LIMITS_US.items()
        ),
    ]
    for quantity, sign, target, value, shape in checks:
        met = value >= target if sign == ">=" else value <= target
        yield quantity, f"{sign} {target:g}", format(value, shape), "met" if met else "NOT MET"


def _spread(runs: Sequence[Mapping[str, Any]], length: str, key: str) -> str:
    values = [run[length][key] for run in runs]
    return f"{median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
