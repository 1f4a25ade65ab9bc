"""`hpc-router classify`: what an artefact says of prompts, what it is worth, and the table cluster -> expert by hand.

Each function returns JSON values; printing is the command line's. The map from a discovered cluster to a label is
fitted on other prompts where `fit` names them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from hpc_router.errors import ConfigError, suggest
from hpc_router.routing import evaluation
from hpc_router.routing.artefact import Artefact, read
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.policy import ClassifierPolicy
from hpc_router.routing.rebalancing import pack
from hpc_router.routing.training.dataset import Row, read_rows
from hpc_router.routing.training.quality import quality_of

MEASURED: Final = "measured"


def named(artefact: Artefact) -> Artefact:
    """A cluster without an expert stands for itself."""
    experts = tuple(expert or cluster for expert, cluster in zip(artefact.experts, artefact.clusters, strict=True))
    return replace(artefact, experts=experts)


def predict(folder: Path, prompts: Path, *, fallback: str | None = None) -> Iterator[dict[str, object]]:
    """One decision per prompt (*contract*: its keys); reads everything before the first."""
    artefact = read(folder)
    policy = ClassifierPolicy(Classifier(named(artefact)), fallback=fallback)
    for row in read_rows(prompts):
        yield policy.select(row.text, ready={}).to_dict(id=row.id)


def evaluate(folder: Path, prompts: Path, *, fit: Path | None = None, costs: Mapping[str, float]) -> dict[str, Any]:
    artefact = read(folder)
    classifier = Classifier(named(artefact))
    rows = [row for row in read_rows(prompts) if row.text.strip()]
    if not rows:
        raise ConfigError(f"{prompts}: it contains no prompt with text")
    found = [classifier.classify(row.text) for row in rows]
    clusters = [each.cluster for each in found]
    margins = [each.margin for each in found]
    threshold = artefact.margin_threshold
    serving = [str(expert) for expert in dict.fromkeys(classifier.experts)]
    shares, efficiency = evaluation.balance([str(each.expert) for each in found], serving)
    result: dict[str, Any] = {
        "artefact": {"version": artefact.version, "method": artefact.method, "clusters": len(artefact.clusters)},
        "prompts": len(rows),
        "load_share": shares,
        "balance_efficiency": efficiency,
        "no_known_terms_share": float(np.mean([each.known_terms == 0 for each in found])),
        "low_margin_share": float(np.mean([m is not None and m < threshold for m in margins])),
    }
    labels = [row.label for row in rows]
    if all(label is not None for label in labels):
        result |= _judged(classifier, clusters, [str(label) for label in labels], margins, fit)
    if all(row.correct for row in rows):
        result["cost_quality"] = _measured(artefact, rows, clusters, costs)
    result["latency"] = evaluation.latency(classifier.classify, [row.text for row in rows])
    return result


def _judged(
    classifier: Classifier,
    clusters: Sequence[str],
    labels: Sequence[str],
    margins: Sequence[float | None],
    fit: Path | None,
) -> dict[str, Any]:
    artefact = classifier.artefact
    if fit is not None:
        taught = [row for row in read_rows(fit) if row.label is not None and row.text.strip()]
        if not taught:
            raise ConfigError(f"{fit}: no labelled prompt")
        fitted = [classifier.classify(row.text).cluster for row in taught]
        names, basis = evaluation.majority(fitted, [str(row.label) for row in taught]), str(fit)
    elif set(labels) <= {expert for expert in artefact.experts if expert is not None}:
        names = dict(zip(artefact.clusters, map(str, artefact.experts), strict=True))
        basis = "the artefact's experts"
    else:
        names, basis = evaluation.majority(clusters, labels), "the evaluated prompts"
    decided = [names.get(cluster, cluster) for cluster in clusters]
    right = [one == other for one, other in zip(decided, labels, strict=True)]
    low, high = evaluation.interval(lambda rows: float(np.array(right)[rows].mean()), rows=len(right))
    return {
        "accuracy": float(np.mean(right)),
        "accuracy_interval": [low, high],
        "cluster_names_from": basis,
        "nmi": evaluation.nmi(clusters, labels),
        "confusion": evaluation.confusion(decided, labels),
        "coverage": evaluation.coverage(margins, right, threshold=artefact.margin_threshold),
    }


def _measured(
    artefact: Artefact, rows: Sequence[Row], clusters: Sequence[str], costs: Mapping[str, float]
) -> dict[str, Any]:
    quality = quality_of(artefact.training, artefact.clusters)
    if quality is None:
        return {"note": "this artefact was not measured: train it with method=measured"}
    experts = list(quality.experts)
    unknown = sorted(set(costs) - set(experts))
    if unknown:
        raise ConfigError(f"--cost {unknown[0]}: no measured expert{suggest(unknown[0], experts)}")
    if any(set(experts) - set(row.correct) for row in rows):
        raise ConfigError(f'"correct" must name {", ".join(experts)} in each row')
    cost = np.array([costs.get(name, float(c)) for name, c in zip(experts, quality.cost, strict=True)])
    if len(set(cost.tolist())) == 1:  # nothing is known of costs: the one that was better in training is the dearer
        cost = (np.arange(len(experts)) == quality.rate.mean(axis=0).argmax()).astype(np.float64)
    dear, cheap = int(cost.argmax()), int(cost.argmin())
    gain = quality.rate[:, dear] - quality.rate[:, cheap]
    at = [artefact.clusters.index(cluster) for cluster in clusters]
    right = np.array([[row.correct[name] for name in experts] for row in rows])
    return evaluation.cost_quality(experts=experts, cost=cost, gain=gain[at], right=right)


def assign(folder: Path, table: Mapping[str, str | None], *, output: Path) -> dict[str, Any]:
    """Other experts for clusters: a new version, without training."""
    artefact = read(folder)
    for cluster in table:
        if cluster not in artefact.clusters:
            raise ConfigError(f"{cluster}: no cluster of {folder}{suggest(cluster, artefact.clusters)}")
    experts = tuple(table.get(c, e) for c, e in zip(artefact.clusters, artefact.experts, strict=True))
    changed = replace(artefact, experts=experts)
    changed.write(output)
    return {"version": changed.version, "experts": dict(zip(changed.clusters, changed.experts, strict=True))}


def repack(
    folder: Path,
    prompts: Path,
    *,
    capacity: Mapping[str, float],
    limit: float,
    most_loss: float,
    output: Path | None,
) -> dict[str, Any]:
    """The table packed against the traffic of `prompts`; labelled, they say what a move costs in accuracy."""
    artefact = read(folder)
    rows = [row for row in read_rows(prompts) if row.text.strip()]
    classifier = Classifier(named(artefact))
    at = [artefact.clusters.index(classifier.classify(row.text).cluster) for row in rows]
    load = np.bincount(at, minlength=len(artefact.clusters)) / len(rows)
    quality = quality_of(artefact.training, artefact.clusters)
    labels = sorted({row.label for row in rows if row.label is not None})
    experts = list(capacity) or (list(quality.experts) if quality is not None else labels)
    if len(experts) < 2:
        if capacity:
            raise ConfigError("--capacity names one expert; it must name all experts, or be omitted")
        raise ConfigError(f'{prompts}: no "expert" or "domain" says which experts there are; give --capacity EXPERT=N')
    if quality is not None and set(experts) <= set(quality.experts):
        score = quality.rate[:, [quality.experts.index(name) for name in experts]]
    else:
        score = np.zeros((len(artefact.clusters), len(experts)))
        for cluster, row in zip(at, rows, strict=True):
            if row.label in experts:
                score[cluster, experts.index(row.label)] += 1
        score /= np.maximum(score.sum(axis=1, keepdims=True), 1)
    best = [experts[e] for e in score.argmax(axis=1)]
    kept = [e if e in experts else b for e, b in zip(artefact.experts, best, strict=True)]
    total = sum(capacity.values()) if capacity else float(len(experts))
    shares = {name: (capacity.get(name, 0.0) if capacity else 1.0) / total for name in experts}
    packed = pack(
        [str(e) for e in kept], clusters=artefact.clusters, load=load, score=score,
        capacity=shares, limit=limit, most_loss=most_loss,
    )  # fmt: skip
    if output is not None:
        replace(artefact, experts=packed.table).write(output)
    before = np.bincount([experts.index(str(e)) for e in kept], weights=load, minlength=len(experts))
    return {
        "shares_before": dict(zip(experts, before.tolist(), strict=True)),
        "shares": dict(packed.shares),
        "largest_over_capacity": max(packed.shares[name] / shares[name] for name in experts),
        "loss": packed.loss,
        "moves": list(packed.moves),
        "replicas_recommended": {name: f"x{factor}" for name, factor in packed.replicas.items()},
    }
