"""Figures of classifiers: where prompts and clusters lie, what is taken for what, what quality costs.

Told apart without colour: by marker, line and number.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.figures import RC, STYLES, WIDTH_IN, Drawn
from hpc_router.routing.artefact import read
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.evaluation import majority


def cluster_map(artefact: Path, prompts: Sequence[Mapping[str, Any]]) -> Drawn:
    """Each prompt at the place that its scores for all clusters have in two dimensions (t-SNE)."""
    from sklearn.manifold import TSNE

    classifier = Classifier(read(artefact))
    scores = np.array([classifier.scores(row["prompt"]) for row in prompts])
    held = scores.argmax(axis=1)
    labels = np.array([row["domain"] for row in prompts])
    names = majority([str(c) for c in held], labels.tolist())
    place = TSNE(random_state=0, perplexity=40, init="pca").fit_transform(scores)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH_IN, 5.4), layout="constrained")
        axes = figure.add_subplot()
        for number, label in enumerate(sorted(set(labels))):
            colour, _, marker = STYLES[number % len(STYLES)]
            at = place[labels == label]
            axes.scatter(at[:, 0], at[:, 1], s=14, marker=marker, facecolor="none" if number % 2 else colour,
                         edgecolor=colour, linewidth=0.7, label=label)  # fmt: skip
        for cluster in sorted(set(held.tolist())):
            x, y = np.median(place[held == cluster], axis=0)
            axes.text(x, y, str(cluster), fontsize=9, fontweight="bold", ha="center", va="center",
                      bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": "black"})  # fmt: skip
        figure.suptitle("Prompts and clusters, by their scores", fontsize=11, fontweight="bold")
        axes.set_xlabel("t-SNE of the clusters' scores, first dimension (no unit)")
        axes.set_ylabel("second dimension (no unit)")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False)
    named = ", ".join(f"{cluster} {names[str(cluster)]}" for cluster in sorted(set(held.tolist())))
    told = (
        f"{len(prompts)} prompts of {len(set(labels))} domains (markers); a number stands at the middle of its "
        f"cluster, whose commonest domain is: {named}."
    )
    return Drawn("clusters", "Prompts and clusters, by their scores", told, figure)


def confusion(table: Mapping[str, Mapping[str, int]]) -> Drawn:
    labels = sorted(table)
    names = sorted({name for row in table.values() for name in row} | set(labels))
    counts = np.array([[table[label].get(name, 0) for name in names] for label in labels])
    shares = counts / counts.sum(axis=1, keepdims=True)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH_IN, 1.9 + 0.42 * len(labels)), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(100 * np.sqrt(shares), cmap="Greys", vmin=0, vmax=130, aspect="auto")
        for (y, x), count in np.ndenumerate(counts):
            if count:
                axes.text(x, y, str(count), ha="center", va="center", color="white" if shares[y, x] > 0.5 else "black")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("expert it is sent to (number of prompts)")
        axes.set_ylabel("domain of the prompt")
        figure.suptitle("Which domain goes where", fontsize=11, fontweight="bold")
    wrong = int(counts.sum() - sum(table[label].get(label, 0) for label in labels))
    told = f"20 exemplars per domain: of {counts.sum()} prompts {wrong} are sent to another domain's expert."
    return Drawn("confusion", "Which domain goes where", told, figure)


def cost_quality(found: Mapping[str, Any]) -> Drawn:
    rows, single = found["curve"], found["single"]
    cheap, dear = single[found["cheap"]], single[found["dear"]]
    at = np.array([0.0, *(row["cost"] for row in rows), 1.0])

    def whole(key: str, first: float, last: float) -> Any:
        return 100 * np.array([first, *(row[key] for row in rows), last])

    random = whole("random", cheap, dear)
    low, high = (random + whole(key, 0.0, 0.0) for key in ("low", "high"))
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(at, low, high, color="#cccccc", label="its 95 % interval against random mixing")
        axes.plot(at, whole("accuracy", cheap, dear), color="black", marker="o", label="by cluster")
        axes.plot(at, random, color="black", linestyle="--", linewidth=1.2, label="random mixing")
        axes.plot(at, whole("oracle", cheap, found["oracle"]), color="black", linestyle=":", marker="^",
                  markerfacecolor="white", label="oracle")  # fmt: skip
        axes.set_xlabel(f"cost: share of the prompts sent to {found['dear']}")
        axes.set_ylabel("% of the answers that are right")
        axes.grid(visible=True, color="#d8d8d8", linewidth=0.6)
        axes.legend(loc="center right", bbox_to_anchor=(1, 0.78), frameon=False)
        figure.suptitle("What quality costs, two models", fontsize=11, fontweight="bold")
    above = found["above_random_mixing"]
    told = (
        f"{found['cheap']} alone {cheap:.3f}, {found['dear']} alone {dear:.3f}, oracle {found['oracle']:.3f}; "
        f"by cluster {100 * above['mean']:.2f} points above random mixing "
        f"({100 * above['low']:.2f} to {100 * above['high']:.2f}), averaged over costs 0.1 to 0.9."
    )
    return Drawn("cost-quality", "What quality costs, two models", told, figure)
