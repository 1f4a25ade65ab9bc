"""Builds the configured policy, with its classifier if it needs one."""

from pathlib import Path

from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError
from hpc_router.routing.artefact import read
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.policy import Policy, build_policy
from hpc_router.state.run_directory import RunDir


def artefact_folder(run: RunDir, deployment: Deployment) -> Path:
    """Returns the folder of the classifier's artefact, which may not exist."""
    artefact = deployment.policy.artefact
    return run.classifier if artefact is None else Path(artefact)


def artefact_folders(run: RunDir, deployment: Deployment) -> tuple[Path, ...]:
    """Returns the folders of the classifier and of its shadow, if one is configured."""
    shadow = deployment.policy.shadow
    return (artefact_folder(run, deployment), *(() if shadow is None else (Path(shadow),)))


def load_policy(run: RunDir, deployment: Deployment) -> Policy:
    """Returns the configured policy with its classifier and shadow. Raises ConfigError or ArtefactError if one cannot
    be loaded."""
    config = deployment.policy
    if config.kind != "classifier":
        return build_policy(kind=config.kind, fallback=config.fallback)
    folder = artefact_folder(run, deployment)
    if not folder.is_dir():
        raise ConfigError(
            f"policy=classifier finds no artefact at {folder}: give policy.artefact=DIR, or experts with exemplars "
            "and start with `hpc-router up`"
        )
    shadow = None if config.shadow is None else _by_classifier(deployment, Path(config.shadow), own=False)
    return _by_classifier(deployment, folder, shadow=shadow)


def _by_classifier(deployment: Deployment, folder: Path, *, shadow: Policy | None = None, own: bool = True) -> Policy:
    """Returns the policy with the classifier in `folder`. `own`: True for the policy that decides, False for a shadow
    policy. A shadow ignores `min_confidence` and `cost_weight`, because its artefact may lack the data for them."""
    config = deployment.policy
    classifier = Classifier(
        read(folder),
        experts=deployment.experts or None,
        margin_threshold=config.margin,
        cost_weight=config.cost_weight if own else None,
    )
    return build_policy(
        kind=config.kind,
        classifier=classifier,
        fallback=config.fallback,
        shadow=shadow,
        min_confidence=config.min_confidence if own else None,
    )
