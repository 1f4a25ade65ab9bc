"""Writes the result file of `analysis.routers`, its tables and its figures."""

import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis import markdown
from analysis.figures import RC, STYLES, WIDTH_IN, Drawing
from analysis.router_tables import READERS
from hpc_router.bench.provenance import git_state, hardware

ROOT: Final = Path(__file__).parent.parent
COMMAND: Final = "python -m analysis.routers --tables DIR"
SPLITS: Final = {"known": "data sets of the training", "unknown": "data sets that the training does not have"}


def write(results: Mapping[str, Mapping[str, Any]], *, out: Path) -> None:
    """Writes `routers.json`, `routers.md` and the figures to `out`. `results`: what `analysis.routers.measure` returns,
    by table. Results of other tables that `out` has stay there, with the commit and the time of their own run."""
    out.mkdir(parents=True, exist_ok=True)
    stored = out / "routers.json"
    tables: dict[str, Mapping[str, Any]] = json.loads(stored.read_text())["tables"] if stored.exists() else {}
    run = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_state(ROOT),
        "hardware": {key: value for key, value in hardware().items() if key != "host"},
        "python": platform.python_version(),
        "arguments": [word for word in sys.argv[1:] if word.startswith("--")],
    }
    tables |= {name: {"run": run, **result} for name, result in results.items()}
    tables = {name: tables[name] for name in READERS if name in tables}
    stored.write_text(json.dumps({"command": COMMAND, "tables": tables}, indent=1) + "\n")
    lines = [*_head()]
    for name, result in tables.items():
        lines += [f"\n## {name}\n", *_markdown(result)]
        for drawing in _drawings(name, result):
            drawing.save(out)
            lines += [f"\n![{drawing.title}]({drawing.name}.svg)\n", drawing.description]
    (out / "routers.md").write_text("\n".join(lines) + "\n")


def _head() -> Iterator[str]:
    yield "# Routers on public tables\n"
    yield f"`{COMMAND}`\n"
    yield "Shares of right answers, with 95 % bootstrap intervals over prompts. In the mean over data sets each set"
    yield "counts the same, in that over prompts each prompt. Training rows alone decide everything; the lines in"
    yield "hindsight and the oracle are bounds."


def _run(run: Mapping[str, Any]) -> str:
    machine, git = run["hardware"], run["git"] or {}
    commit = f"commit {git.get('commit', 'unknown')[:12]}{' with changes' if git.get('changed') else ''}"
    return f"Measured {run['at']} on {machine['cpu']}, {machine['cpus']} cores, {commit}.\n"


def _markdown(result: Mapping[str, Any]) -> Iterator[str]:
    prompts = result["prompts"]
    yield _run(result["run"])
    yield (
        f"{len(result['models'])} models; {prompts['train']} prompts in the training, {prompts['known']} in tests on "
        f"its data sets, {prompts['unknown']} in tests on others; {result['left_out']} training prompts left out: "
        "they are in a test set, too."
    )
    for split, scores in result["splits"].items():
        yield f"\n### Test: {SPLITS[split]}\n"
        rows = [
            (name, markdown.interval(one["macro"]), markdown.interval(one["prompts"]))
            for name, one in scores["routers"].items()
        ]
        rows += [(name, f"{one[split]:.4f}, as published", "") for name, one in result["published"].items()]
        yield from markdown.table(("router", "mean over data sets", "over prompts"), rows)
        best = max(scores["models"], key=scores["models"].get)
        yield f"\nThe best model alone, in hindsight: {best}, {scores['models'][best]:.4f} over data sets."
    if result["labels"] is not None:
        labels = result["labels"]
        yield f"\nThe data set of a test prompt, out of {labels['data_sets']}, is recognised without an encoder"
        yield f"(`exemplars`, `lexical`) for {markdown.interval(labels['prompts'])} of the prompts."
    yield "\n### Robustness, time and size\n"
    yield "Robustness: share of the prompts that keep their model after a change.\n"
    changes = [*next(iter(result["families"].values()))["robustness"]]
    yield from markdown.table(
        ("classifier", *changes, "us per decision of 200 / 2,000 characters (p50)", "MB", "training, s"),
        [
            (
                name,
                *(f"{one['robustness'][change]:.3f}" for change in changes),
                f"{one['latency']['200 B']['p50_us']} / {one['latency']['2000 B']['p50_us']}",
                f"{one['bytes'] / 1e6:.1f}",
                f"{one['training_s']:.0f}",
            )
            for name, one in result["families"].items()
        ],
    )
    worse = _dear_and_worse(result)
    if worse:
        yield f"\nDearer and worse than another model: {', '.join(worse)}."


def _dear_and_worse(result: Mapping[str, Any]) -> list[str]:
    """Returns the models that cost more than another one that is right more often."""
    single = result.get("cost", {}).get("single", {})
    return [
        f"{name} (than {other})"
        for name, (cost, right) in single.items()
        if (other := next((o for o, (c, r) in single.items() if c < cost and r > right), None)) is not None
    ]


def _drawings(name: str, result: Mapping[str, Any]) -> Iterator[Drawing]:
    for split, scores in result["splits"].items():
        yield _intervals(name, split, scores["routers"], result["published"])
    if "cost" in result:
        yield _cost(name, result["cost"])


def _intervals(table: str, split: str, routers: Mapping[str, Any], published: Mapping[str, Any]) -> Drawing:
    points = {name: one["macro"] for name, one in routers.items()}
    points |= {name: [one[split]] * 3 for name, one in published.items()}
    names = sorted(points, key=lambda name: points[name][0])
    title = f"{table}: {SPLITS[split]}"
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH_IN, 1.2 + 0.36 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        for y, name in enumerate(names):
            value, low, high = (100 * number for number in points[name])
            axes.plot([low, high], [y, y], color="black", linewidth=1.2)
            axes.plot(value, y, "D" if name in published else "o", color="black",
                      markerfacecolor="white" if name in published else "black")  # fmt: skip
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("% of the answers that are right, mean over data sets")
        axes.grid(visible=True, axis="x", color="#d8d8d8", linewidth=0.6)
        figure.suptitle(title, fontsize=11, fontweight="bold")
    description = "; ".join(f"{name} {100 * points[name][0]:.1f} %" for name in reversed(names)) + "."
    return Drawing(f"{table}-{split}", title, description, figure)


def _cost(table: str, cost: Mapping[str, Any]) -> Drawing:
    title = f"{table}: cost and quality by policy.cost_weight"
    curve = np.array(cost["curve"])
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
        axes = figure.add_subplot()
        order = np.argsort(curve[:, 1])
        axes.plot(1000 * curve[order, 1], 100 * curve[order, 2], color="black", marker="o", label="routed")
        for n, (name, (price, right)) in enumerate(sorted(cost["single"].items())):
            colour, _, marker = STYLES[1 + n % (len(STYLES) - 1)]
            filled = colour if n < len(STYLES) - 1 else "white"
            axes.plot(1000 * price, 100 * right, marker, color=colour, markerfacecolor=filled, label=name)
        axes.set_xscale("log")
        axes.set_xlabel("mean cost of an answer, dollars per 1,000 prompts")
        axes.set_ylabel("% of the answers that are right")
        axes.grid(visible=True, color="#d8d8d8", linewidth=0.6)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=7)
        figure.suptitle(title, fontsize=11, fontweight="bold")
    best, cheapest = max(curve.tolist(), key=lambda p: p[2]), min(curve.tolist(), key=lambda p: p[1])
    description = (
        f"Routed: {100 * best[2]:.1f} % right at {1000 * best[1]:.3f} dollars per 1,000 prompts (cost weight "
        f"{best[0]:.3g}), {100 * cheapest[2]:.1f} % at {1000 * cheapest[1]:.3f} (cost weight {cheapest[0]:.3g}). "
        "Single markers: one model for all prompts."
    )
    return Drawing(f"{table}-cost", title, description, figure)
