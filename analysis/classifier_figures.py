"""Draws the figures of classifiers: map of the clusters, confusion matrix, cost against quality.

Markers, line styles and numbers distinguish the series without colour.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.figures import RC, STYLES, WIDTH_IN, Drawing
from hpc_router.routing.artefact import read
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.evaluation import majority


def cluster_map(artefact: Path, prompts: Sequence[Mapping[str, Any]]) -> Drawing:
    """Draws each prompt at its scores for all clusters, reduced to two dimensions by t-SNE."""
    from sklearn.manifold import TSNE

    classifier = Classifier(read(artefact))
    scores = np.array([classifier.scores(row["prompt"]) for row in prompts])
    assignment = scores.argmax(axis=1)
    labels = np.array([row["domain"] for row in prompts])
    names = majority([str(c) for c in assignment], labels.tolist())
    position = TSNE(random_state=0, perplexity=40, init="pca").fit_transform(scores)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH_IN, 5.4), layout="constrained")
        axes = figure.add_subplot()
        for number, label in enumerate(sorted(set(labels))):
            colour, _, marker = STYLES[number % len(STYLES)]
            x, y = position[labels == label].T
            axes.scatter(x, y, s=14, marker=marker, facecolor="none" if number % 2 else colour,
                         edgecolor=colour, linewidth=0.7, label=label)  # fmt: skip
        for cluster in sorted(set(assignment.tolist())):
            x, y = np.median(position[assignment == cluster], axis=0)
            axes.text(x, y, str(cluster), fontsize=9, fontweight="bold", ha="center", va="center",
                      bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": "black"})  # fmt: skip
        figure.suptitle("Prompts and clusters, by their scores", fontsize=11, fontweight="bold")
        axes.set_xlabel("t-SNE of the clusters' scores, first dimension (no unit)")
        axes.set_ylabel("second dimension (no unit)")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False)
    named = ", ".join(f"{cluster} {names[str(cluster)]}" for cluster in sorted(set(assignment.tolist())))
    description = (
        f"{len(prompts)} prompts of {len(set(labels))} domains (markers). Each number marks the median of a cluster. "
        f"The most frequent domains of the clusters are: {named}."
    )
    return Drawing("clusters", "Prompts and clusters, by their scores", description, figure)


def confusion(table: Mapping[str, Mapping[str, int]]) -> Drawing:
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
        axes.set_xlabel("chosen expert (number of prompts)")
        axes.set_ylabel("domain of the prompt")
        figure.suptitle("Domains and the experts chosen for them", fontsize=11, fontweight="bold")
    wrong = int(counts.sum() - sum(table[label].get(label, 0) for label in labels))
    description = (
        f"20 exemplars per domain: {wrong} of {counts.sum()} prompts are sent to the expert of another domain."
    )
    return Drawing("confusion", "Domains and the experts chosen for them", description, figure)


def cost_quality(result: Mapping[str, Any]) -> Drawing:
    rows, single = result["curve"], result["single"]
    cheap, expensive = single[result["cheap"]], single[result["dear"]]
    costs = np.array([0.0, *(row["cost"] for row in rows), 1.0])

    def percent(key: str, first: float, last: float) -> Any:
        """Returns the values over all costs: `first` at cost 0, `last` at cost 1."""
        return 100 * np.array([first, *(row[key] for row in rows), last])

    random = percent("random", cheap, expensive)
    low, high = (random + percent(key, 0.0, 0.0) for key in ("low", "high"))
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(costs, low, high, color="#cccccc", label="95 % interval of the gain over random mixing")
        axes.plot(costs, percent("accuracy", cheap, expensive), color="black", marker="o", label="by cluster")
        axes.plot(costs, random, color="black", linestyle="--", linewidth=1.2, label="random mixing")
        axes.plot(costs, percent("oracle", cheap, result["oracle"]), color="black", linestyle=":", marker="^",
                  markerfacecolor="white", label="oracle")  # fmt: skip
        axes.set_xlabel(f"cost: share of the prompts sent to {result['dear']}")
        axes.set_ylabel("% of the answers that are correct")
        axes.grid(visible=True, color="#d8d8d8", linewidth=0.6)
        axes.legend(loc="center right", bbox_to_anchor=(1, 0.78), frameon=False)
        figure.suptitle("Cost and quality of two models", fontsize=11, fontweight="bold")
    above = result["above_random_mixing"]
    description = (
        f"{result['cheap']} alone {cheap:.3f}, {result['dear']} alone {expensive:.3f}, oracle {result['oracle']:.3f}; "
        f"chosen by cluster {100 * above['mean']:.2f} points above random mixing "
        f"({100 * above['low']:.2f} to {100 * above['high']:.2f}), averaged over costs 0.1 to 0.9."
    )
    return Drawing("cost-quality", "Cost and quality of two models", description, figure)
