"""The result file of `analysis.classifiers`, its tables and its figures."""

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
from analysis.classifiers import DRAWS, ROOT, Bench, Found, read
from hpc_router.bench.provenance import git_state, hardware

LIMITS_US: Final = {"200 B": 40.0, "2000 B": 150.0}
MINUTES: Final = 5
FILES: Final = ("domains_train", "domains_test", "mmlu_train", "mmlu_test")
MOST_MB: Final = 40


def write(bench: Bench, steps: Mapping[str, Found], *, out: Path) -> None:
    result = {
        "command": bench.without_folders(shlex.join(["python", *sys.orig_argv[1:]])),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_state(ROOT),
        "hardware": {key: value for key, value in hardware().items() if key != "host"},
        "versions": {"python": platform.python_version(), **steps["measured"]["training"]["training"]["packages"]},
        "data": {name: len(read(bench.file(name))) for name in FILES},
        "steps": {name: _brief(found) for name, found in steps.items()},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    drawn = [
        figures.cluster_map(bench.work / "discovered-distilled", read(bench.file("domains_test"))),
        figures.confusion(steps["exemplars-0"]["test"]["confusion"]),
        figures.cost_quality(steps["measured"]["test"]["cost_quality"]),
    ]
    for figure in drawn:
        figure.save(out)
    (out / "classifiers.json").write_text(bench.without_folders(json.dumps(result, indent=1)) + "\n")
    told = "\n".join(f"![{one.title}]({one.name}.svg)\n\n{one.told}\n" for one in drawn)
    (out / "classifiers.md").write_text("\n".join(_markdown(result)) + "\n\n" + told)


def _brief(found: Found) -> Found:
    """Without the long parts that the artefact has itself."""
    training = found.get("training")
    if not training:
        return found
    kept = {key: training[key] for key in ("command", "wall_s", "bytes", "version")}
    return found | {"training": kept | {"scores": training["training"]["scores"], "data": training["training"]["data"]}}


def _markdown(result: Mapping[str, Any]) -> Iterator[str]:
    steps, hard, git = result["steps"], result["hardware"], result["git"] or {}
    yield "# Classifiers on labelled prompts"
    yield f"\n`{result['command']}`, {result['at']}\n"
    commit = f"commit {git.get('commit', 'unknown')[:12]}{' with changes' if git.get('changed') else ''}"
    yield f"{hard['cpu']}, {hard['cpus']} cores, Linux {hard['kernel']}; {commit}; " + ", ".join(
        f"{name} {version}" for name, version in result["versions"].items()
    )
    yield "\nEach figure is what a command printed that stands beside it in `classifiers.json`; training times"
    yield "are of whole commands.\n"
    yield from _table(
        ("training", "accuracy (interval)", "NMI", "other source", "s", "MB", "balance"),
        (_row(name, found) for name, found in steps.items() if "training" in found),
    )
    draws = [steps[f"exemplars-{n}"] for n in DRAWS]
    same, other = ([found[key]["accuracy"] for found in draws] for key in ("predict", "transfer"))
    yield f"\nExemplars, 20 per domain, mean of {len(draws)} draws:"
    yield f"{mean(same):.4f} ({min(same):.4f} to {max(same):.4f});"
    yield f"on the other source {mean(other):.3f} ({min(other):.3f} to {max(other):.3f}).\n"
    yield "## What was asked for\n"
    yield from _table(("what", "target", "found", ""), _checks(steps, mean(same)))
    yield "\n## Decisions, in microseconds\n"
    runs = steps["latency"]["runs"]
    yield f"Median of {len(runs)} runs, and their range; `sum(range(1000))` says how fast the machine was.\n"
    yield from _table(
        ("prompt", "p50", "p99"), ((k, _spread(runs, k, "p50_us"), _spread(runs, k, "p99_us")) for k in runs[0])
    )
    yield "\n## Cost and quality of two models, mmlu_test\n"
    quality = steps["measured"]["test"]["cost_quality"]
    rows = quality["curve"]
    yield from _table(
        ("cost", "accuracy", "random mixing", "above it (interval)", "oracle"),
        (
            (r["cost"], f"{r['accuracy']:.3f}", f"{r['random']:.3f}",
             f"{100 * (r['accuracy'] - r['random']):.1f} ({100 * r['low']:.1f} to {100 * r['high']:.1f}) points",
             f"{r['oracle']:.3f}")
            for r in rows
        ),
    )  # fmt: skip
    alone = ", ".join(f"{name} {value:.3f}" for name, value in quality["single"].items())
    yield f"\nAlone: {alone}; oracle {quality['oracle']:.3f}.\n"
    yield "## Six equal experts, domains_test, no share beyond 1.3 x its capacity\n"
    packed = {name.partition("-")[2]: found for name, found in steps.items() if name.startswith("packed")}
    yield from _table(
        ("clusters of", "largest / capacity before", "after", "accuracy lost", "clusters moved"),
        (
            (name, f"{len(p['shares']) * max(p['shares_before'].values()):.2f}", f"{p['largest_over_capacity']:.2f}",
             f"{100 * p['loss']:.1f} points", len(p["moves"]))
            for name, p in packed.items()
        ),
    )  # fmt: skip


def _row(name: str, found: Found) -> Sequence[object]:
    test, training = found["test"], found["training"]
    low, high = test["accuracy_interval"]
    other = found.get("transfer", {}).get("accuracy")
    return (
        name, f"{test['accuracy']:.4f} ({low:.3f} to {high:.3f})", f"{test['nmi']:.3f}",
        "-" if other is None else f"{other:.3f}", f"{training['wall_s']:.0f}", f"{training['bytes'] / 1e6:.1f}",
        f"{test['balance_efficiency']:.2f}",
    )  # fmt: skip


def _checks(steps: Mapping[str, Found], exemplars: float) -> Iterator[Sequence[object]]:
    above = steps["measured"]["test"]["cost_quality"]["above_random_mixing"]
    runs = steps["latency"]["runs"]
    trained = [found["training"] for found in steps.values() if "training" in found]
    wall, largest = max(t["wall_s"] for t in trained), max(t["bytes"] for t in trained) / 1e6
    packed = min(found["largest_over_capacity"] for name, found in steps.items() if name.startswith("packed"))
    found: list[tuple[str, str, float, float, str]] = [
        ("domains_test, discovered, 16 clusters", ">=", 0.98, steps["discovered-distilled"]["test"]["accuracy"], ".4f"),
        ("mmlu_test, discovered, 64 clusters", ">=", 0.66, steps["measured"]["test"]["accuracy"], ".4f"),
        ("domains_test, 20 exemplars per domain", ">=", 0.97, exemplars, ".4f"),
        ("measured, points above random mixing", ">=", 1.5, 100 * above["mean"], ".2f"),
        ("the lower end of its interval", ">=", 0.0, 100 * above["low"], ".2f"),
        ("packed: largest share over its capacity", "<=", 1.3, packed, ".2f"),
        ("the longest training, s", "<=", 60.0 * MINUTES, wall, ".0f"),
        ("the largest artefact, MB", "<=", MOST_MB, largest, ".1f"),
        *(
            (f"a decision, {length}, p50 us", "<=", limit, median(run[length]["p50_us"] for run in runs), ".1f")
            for length, limit in LIMITS_US.items()
        ),
    ]
    for what, sign, target, value, shape in found:
        met = value >= target if sign == ">=" else value <= target
        yield what, f"{sign} {target:g}", format(value, shape), "met" if met else "NOT MET"


def _spread(runs: Sequence[Mapping[str, Any]], length: str, key: str) -> str:
    values = [run[length][key] for run in runs]
    return f"{median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def _table(columns: Sequence[str], rows: Iterator[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "| " + " | ".join("---" for _ in columns) + " |"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
