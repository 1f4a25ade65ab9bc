"""Exemplars of three experts for the routing tests, and an artefact trained on them."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from hpc_router.routing import artefact as artefact_module
from hpc_router.routing.artefact import MANIFEST, Artefact, SoftDecision
from hpc_router.routing.exemplars import train
from hpc_router.routing.features import Features
from hpc_router.routing.quality import Quality
from hpc_router.routing.training.soft_clusters import NEAREST

EXPLANATION_KEYS = ["id", "cluster", "expert", "score", "margin", "runner_up", "reason", "terms", "decided_by", "topic"]
"""Those of `Explanation.to_dict`, in their order."""
SOFT = SoftDecision(sharpness=5.0, nearest=NEAREST)

EXEMPLARS = {
    "code": [
        "Write a Python function that sorts a list of integers.",
        "Why does this loop raise an IndexError? for i in range(len(xs) + 1): print(xs[i])",
        "Explain what a pointer is in C and fix the bug in my function.",
        "How do I parse JSON in a shell script?",
    ],
    "math": [
        "What is the derivative of x^2 + 3*x?",
        "Prove that the sum of two even numbers is even.",
        "Solve the equation 2x + 5 = 17 for x.",
        "A box holds 12 pens. How many pens are in 7 boxes?",
    ],
    "medicine": [
        "What are the symptoms of diabetes?",
        "Which treatment helps a patient with high blood pressure?",
        "Is asthma inherited, and how is it diagnosed?",
        "病人发烧应该怎么办？",
    ],
}


def artefact(features: Features | None = None) -> Artefact:
    return train(EXEMPLARS, features=features)


def topic_artefact(**changes: object) -> Artefact:
    """The artefact of three labels, of which the last, `medicine`, is a topic of no expert."""
    trained = artefact()
    values: dict[str, object] = {
        "clusters": trained.clusters[:2],
        "experts": trained.experts[:2],
        "topics": trained.clusters[2:],
        "offsets": trained.offsets[:2],
        **changes,
    }
    return dataclasses.replace(trained, **values)  # type: ignore[arg-type]


def soft_artefact(*, names: tuple[str, str] = ("big", "small"), **changes: object) -> Artefact:
    """The artefact of three labels, with the measured quality of two experts."""
    trained = artefact()
    rates = np.array([[0.9, 0.2], [0.3, 0.8], [0.5, 0.6]])
    measured = Quality(experts=names, rate=rates, cost=np.array([1.0, 0.0]))
    training = {"quality": measured.to_json(trained.clusters)}
    experts = (names[0], names[1], names[1])
    values: dict[str, object] = {"experts": experts, "training": training, "soft": SOFT, "parts": None, **changes}
    return dataclasses.replace(trained, **values)  # type: ignore[arg-type]


def edit(folder: Path, **changes: object) -> None:
    """Changes the manifest and recomputes its version, as a defective writer would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.update(changes)
    del manifest["version"]
    (folder / MANIFEST).write_text(json.dumps({"version": artefact_module._version(manifest), **manifest}))
