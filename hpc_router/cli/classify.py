"""`hpc-router classify`: predicts with an artefact, evaluates it, and edits its table, which gives each cluster an
expert.

Each function returns JSON values; the command line prints them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc_router.errors import ConfigError, suggest
from hpc_router.routing import evaluation
from hpc_router.routing.artefact import Artefact, read
from hpc_router.routing.classifier import Classification, Classifier
from hpc_router.routing.confidence import auroc, expected_calibration_error
from hpc_router.routing.policy import ClassifierPolicy
from hpc_router.routing.rebalancing import rebalance
from hpc_router.routing.training.dataset import Row, read_rows


def with_cluster_names(artefact: Artefact) -> Artefact:
    """Returns the artefact with an expert for every cluster: for a cluster without an expert, the cluster's own name
    stands in its place."""
    experts = tuple(expert or cluster for expert, cluster in zip(artefact.experts, artefact.clusters, strict=True))
    return replace(artefact, experts=experts)


def predict(folder: Path, prompts: Path, *, fallback: str | None = None) -> Iterator[dict[str, object]]:
    """Reads and checks all prompts, then yields one decision per prompt. `folder`: the artefact. `fallback`: expert for
    prompts that belong to no expert's domain; None: no such expert."""
    artefact = read(folder)
    policy = ClassifierPolicy(Classifier(with_cluster_names(artefact)), fallback=fallback)
    for row in read_rows(prompts):
        yield policy.select(row.text, ready={}).to_dict(id=row.id)


def evaluate(folder: Path, prompts: Path, *, fit: Path | None = None, costs: Mapping[str, float]) -> dict[str, Any]:
    """Returns the balance, margins and latency of the artefact in `folder` on these prompts. If the prompts have
    labels, adds the accuracy, and if they have `correct` (which experts answer them correctly), adds cost against
    quality.

    The accuracy needs a name for each cluster. `fit`: labelled prompts that give each cluster the commonest label of
    its prompts; None: clusters have the names of their experts, or if these do not cover all labels, the commonest
    label of the evaluated prompts. `costs`: cost of an answer by expert, in place of the measured cost.
    """
    artefact = read(folder)
    classifier = Classifier(with_cluster_names(artefact))
    rows = [row for row in read_rows(prompts) if row.text.strip()]
    if not rows:
        raise ConfigError(f"{prompts}: the file contains no prompt with text")
    results = [classifier.classify(row.text) for row in rows]
    clusters = [each.cluster for each in results]
    margins = [each.margin for each in results]
    threshold = artefact.margin_threshold
    experts = [str(expert) for expert in dict.fromkeys((*classifier.experts, *(each.expert for each in results)))]
    shares, efficiency = evaluation.balance([str(each.expert) for each in results], experts)
    report: dict[str, Any] = {
        "artefact": {"version": artefact.version, "method": artefact.method, "clusters": len(artefact.clusters)},
        "prompts": len(rows),
        "load_share": shares,
        "balance_efficiency": efficiency,
        "no_known_terms_share": float(np.mean([each.known_terms == 0 for each in results])),
        "low_margin_share": float(np.mean([m is not None and m < threshold for m in margins])),
    }
    labels = [row.label for row in rows]
    if any(label is not None for label in labels):
        report |= _confidence(classifier, results, labels)
    if all(label is not None for label in labels):
        report |= _accuracy(classifier, clusters, [str(label) for label in labels], margins, fit)
    if all(row.correct for row in rows):
        report["cost_quality"] = _cost_quality(classifier, rows, [str(each.expert) for each in results], costs)
    report["latency"] = evaluation.latency(classifier.classify, [row.text for row in rows])
    return report


def _confidence(
    classifier: Classifier, results: Sequence[Classification], labels: Sequence[str | None]
) -> dict[str, Any]:
    """Returns two measures of the calibrated probabilities: how well they agree with the share of right decisions, and
    how well they separate prompts of the experts' domains from other prompts. Empty if the artefact has no calibration
    or no label is an expert.

    `labels`: one per result. A prompt belongs to no expert's domain if its label is None or no expert.
    """
    calibration = classifier.artefact.calibration
    experts = {expert for expert in classifier.artefact.experts if expert is not None}
    if calibration is None or not experts & set(labels):
        return {}
    confidence = [
        0.0
        if each.known_terms == 0
        else 1.0
        if each.margin is None
        else calibration.probability(each.margin, each.score)
        for each in results
    ]
    own = [n for n, label in enumerate(labels) if label in experts]
    right = [results[n].expert == labels[n] for n in own]
    stated = [confidence[n] for n in own]
    margins = [results[n].margin for n, ok in zip(own, right, strict=True) if ok]
    lost = [margin is not None and margin < classifier.margin_threshold for margin in margins]
    report: dict[str, Any] = {
        "ece": expected_calibration_error(stated, right),
        "right_below_threshold": float(np.mean(lost)) if lost else 0.0,
    }
    others = sorted(set(range(len(labels))) - set(own))
    if others:
        report["auroc"] = auroc(stated, [confidence[n] for n in others])
    return {"confidence": report}


def _accuracy(
    classifier: Classifier,
    clusters: Sequence[str],
    labels: Sequence[str],
    margins: Sequence[float | None],
    fit: Path | None,
) -> dict[str, Any]:
    artefact = classifier.artefact
    if fit is not None:
        fit_rows = [row for row in read_rows(fit) if row.label is not None and row.text.strip()]
        if not fit_rows:
            raise ConfigError(f"{fit}: the file contains no labelled prompt")
        fit_clusters = [classifier.classify(row.text).cluster for row in fit_rows]
        names, basis = evaluation.majority(fit_clusters, [str(row.label) for row in fit_rows]), str(fit)
    elif set(labels) <= {expert for expert in artefact.experts if expert is not None}:
        names = dict(zip(artefact.clusters, map(str, artefact.experts), strict=True))
        basis = "the artefact's experts"
    else:
        names, basis = evaluation.majority(clusters, labels), "the evaluated prompts"
    decided = [names.get(cluster, cluster) for cluster in clusters]
    right = [name == label for name, label in zip(decided, labels, strict=True)]
    low, high = evaluation.bootstrap_interval(lambda rows: float(np.array(right)[rows].mean()), rows=len(right))
    return {
        "accuracy": float(np.mean(right)),
        "accuracy_interval": [low, high],
        "cluster_names_from": basis,
        "nmi": evaluation.nmi(clusters, labels),
        "confusion": evaluation.confusion(decided, labels),
        "coverage": evaluation.coverage(margins, right, threshold=artefact.margin_threshold),
    }


def _cost_quality(
    classifier: Classifier, rows: Sequence[Row], chosen: Sequence[str], costs: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the curve of quality against cost, and the share of the prompts in `rows` that are answered correctly if
    each goes to its expert in `chosen`. `costs`: cost of an answer by expert, in place of the measured cost."""
    quality = classifier.artefact.quality
    if quality is None:
        return {"note": "this artefact has no measured quality: train it with method=measured"}
    experts = list(quality.experts)
    unknown = sorted(set(costs) - set(experts))
    if unknown:
        raise ConfigError(f"--cost {unknown[0]}: the artefact has no such expert{suggest(unknown[0], experts)}")
    if any(set(experts) - set(row.correct) for row in rows):
        raise ConfigError(f'"correct" must name {", ".join(experts)} in each row')
    cost = np.array([costs.get(name, float(c)) for name, c in zip(experts, quality.cost, strict=True)])
    if len(set(cost.tolist())) == 1:  # equal costs: the better expert counts as the more expensive one
        cost = (np.arange(len(experts)) == quality.rate.mean(axis=0).argmax()).astype(np.float64)
    expensive, cheap = int(cost.argmax()), int(cost.argmin())
    expected = [classifier.expected_quality(row.text) for row in rows]
    gain = np.array([scores[experts[expensive]] - scores[experts[cheap]] for scores in expected])
    right = np.array([[row.correct[name] for name in experts] for row in rows])
    curve = evaluation.cost_quality(experts=experts, cost=cost, gain=gain, right=right)
    indices = [experts.index(name) if name in experts else None for name in chosen]
    routed = np.array([right[row, e] if e is not None else 0.0 for row, e in enumerate(indices)])
    low, high = evaluation.bootstrap_interval(lambda sample: float(routed[sample].mean()), rows=len(routed))
    worse = float(right[:, expensive].mean()) < float(right[:, cheap].mean())
    return {**curve, "dear_is_worse": worse, "routed": {"accuracy": float(routed.mean()), "low": low, "high": high}}


def assign(folder: Path, table: Mapping[str, str | None], *, output: Path) -> dict[str, Any]:
    """Gives clusters of the artefact in `folder` to other experts, and writes the result to `output` as a new version,
    without training.

    `table`: the new expert of each cluster to be changed; None leaves the cluster without an expert. Raises ConfigError
    for a cluster that the artefact does not have.
    """
    artefact = _with_table(folder)
    for cluster in table:
        if cluster not in artefact.clusters:
            raise ConfigError(f"{folder} has no cluster '{cluster}'{suggest(cluster, artefact.clusters)}")
    experts = tuple(table.get(c, e) for c, e in zip(artefact.clusters, artefact.experts, strict=True))
    changed = replace(artefact, experts=experts)
    changed.write(output)
    return {"version": changed.version, "experts": dict(zip(changed.clusters, changed.experts, strict=True))}


def _with_table(folder: Path) -> Artefact:
    """Returns the artefact in `folder`. Raises ConfigError if it decides by measured quality, because its clusters then
    belong to no expert."""
    artefact = read(folder)
    if artefact.soft is not None:
        raise ConfigError(
            f"{folder}: its clusters belong to no expert, because the measured quality in several clusters decides "
            "(soft clusters); train with features=distilled or features=cbtm for a table of experts"
        )
    return artefact


def pack(
    folder: Path, prompts: Path, *, capacity: Mapping[str, float], limit: float, max_loss: float, output: Path | None
) -> dict[str, Any]:
    """Moves clusters to other experts so that each expert gets its share of the load of `prompts`. Returns the shares
    and moves, and writes the changed artefact to `output` if given.

    A move costs accuracy. This loss is estimated from the artefact's measured quality, or else from the labels of the
    prompts. `capacity`: by expert, in any unit; empty: equal experts. `limit`: highest ratio of an expert's share of
    the load to its share of the capacity. `max_loss`: highest total loss of accuracy.
    """
    artefact = _with_table(folder)
    rows = [row for row in read_rows(prompts) if row.text.strip()]
    classifier = Classifier(with_cluster_names(artefact))
    indices = [artefact.clusters.index(classifier.classify(row.text).cluster) for row in rows]
    load = np.bincount(indices, minlength=len(artefact.clusters)) / len(rows)
    quality = artefact.quality
    labels = sorted({row.label for row in rows if row.label is not None})
    experts = list(capacity) or (list(quality.experts) if quality is not None else labels)
    if len(experts) < 2:
        if capacity:
            raise ConfigError("--capacity names one expert; it must name all of them, or be left out")
        raise ConfigError(
            f'{prompts}: the rows name fewer than two experts in "expert" or "domain"; give --capacity EXPERT=N'
        )
    if quality is not None and set(experts) <= set(quality.experts):
        score = quality.rate[:, [quality.experts.index(name) for name in experts]]
    else:
        score = np.zeros((len(artefact.clusters), len(experts)))
        for cluster, row in zip(indices, rows, strict=True):
            if row.label in experts:
                score[cluster, experts.index(row.label)] += 1
        score /= np.maximum(score.sum(axis=1, keepdims=True), 1)
    best = [experts[e] for e in score.argmax(axis=1)]
    table = [e if e in experts else b for e, b in zip(artefact.experts, best, strict=True)]
    total = sum(capacity.values()) if capacity else float(len(experts))
    shares = {name: (capacity.get(name, 0.0) if capacity else 1.0) / total for name in experts}
    rebalanced = rebalance(
        [str(e) for e in table], clusters=artefact.clusters, load=load, score=score,
        capacity=shares, limit=limit, max_loss=max_loss,
    )  # fmt: skip
    if output is not None:
        replace(artefact, experts=rebalanced.table).write(output)
    before = np.bincount([experts.index(str(e)) for e in table], weights=load, minlength=len(experts))
    return {
        "shares_before": dict(zip(experts, before.tolist(), strict=True)),
        "shares": dict(rebalanced.shares),
        "largest_over_capacity": max(rebalanced.shares[name] / shares[name] for name in experts),
        "loss": rebalanced.loss,
        "moves": list(rebalanced.moves),
        "replicas_recommended": {name: f"x{factor}" for name, factor in rebalanced.replicas.items()},
    }
