"""What router and agent say to each other over HTTP: paths, headers, the answer to a probe.

`GET /health?challenge=HEX` needs no token and is answered with a `Health` as JSON. `POST /drain` and the API paths need
`Authorization: Bearer <replica key>`. A draining agent answers new requests with 503 and `DRAINING_HEADER`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

HEALTH: Final = "/health"
DRAIN: Final = "/drain"
METRICS: Final = "/metrics"
MODELS: Final = "/v1/models"
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
EMBEDDINGS: Final = "/v1/embeddings"
GENERATE_PATHS: Final = (CHAT, COMPLETIONS, EMBEDDINGS)
"""The API paths that are classified and relayed, all POST."""

DRAINING_HEADER: Final = "x-hpc-router-draining"
STARTING_HEADER: Final = "x-hpc-router-starting"
"""On an agent's 503: its engine does not answer yet, or again."""
REQUEST_ID_HEADER: Final = "x-request-id"


@dataclass(frozen=True, slots=True)
class Health:
    """The answer to a probe. `models`: the names the engine answers to; None before it was ready."""

    replica: str
    state: str
    in_flight: int
    models: tuple[str, ...] | None
    answer: str | None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self | None:
        """None when a stranger answered."""
        models = value.get("models")
        if not isinstance(value.get("replica"), str) or not isinstance(models, list | None):
            return None
        return cls(
            replica=value["replica"],
            state=str(value.get("state")),
            in_flight=value["in_flight"] if isinstance(value.get("in_flight"), int) else 0,
            models=None if models is None else tuple(str(m) for m in models),
            answer=str(value.get("answer")),
        )
