"""A router of two experts that decides by a small trained classifier."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_router.config.schema import Deployment
from hpc_router.routing import exemplars
from hpc_router.state.run_directory import RunDir
from tests.router.fakes import a_deployment

EXPERTS = {
    "code": ["def f(x): return x", "sort a python list", "python class with a method"],
    "math": ["solve x + 1 = 2", "what is 3 times 4", "the derivative of a polynomial"],
}
SWAPPED = {"code": EXPERTS["math"], "math": EXPERTS["code"]}
CODE, MATH, GREEK = "sort a python list", "solve the polynomial", "Ζητώ μια ιδέα"


def trained(folder: Path, prompts: dict[str, list[str]] = EXPERTS) -> str:
    """-> its version. No margin is low, so that each prompt's place is known."""
    artefact = replace(exemplars.train(prompts), margin_threshold=0.0)
    artefact.write(folder)
    return artefact.version


def deployed(run: RunDir, **policy: Any) -> Deployment:
    deployment = a_deployment("math", "code", policy="classifier", fallback="math")
    return replace(deployment, policy=replace(deployment.policy, artefact=str(run.classifier), **policy))
