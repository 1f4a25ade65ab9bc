"""`/score` and `/rerank`, which say how well documents fit queries, in the format of vLLM's pooling models.

The two texts determine a score. The bodies follow vllm/entrypoints/pooling/scoring/protocol.py; only texts are
supported. This module knows neither HTTP nor time.
"""

from dataclasses import dataclass

from hpc_router.sim.api_error import ApiError
from hpc_router.sim.request_fields import RequestFields
from hpc_router.sim.response_formats import Envelope, encode, usage
from hpc_router.sim.tokens import count_tokens, unit_vector

_FIELDS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
_DIMENSIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """A request to score pairs of a query and a document. `top_n`: number of results of a request to `/rerank`, 0 for
    all; None for a request to `/score`."""

    model: str | None
    pairs: tuple[tuple[str, str], ...]
    top_n: int | None = None
    priority: int = 0
    fault: object = None

    @property
    def prompt_tokens(self) -> int:
        return sum(max(1, count_tokens(f"{query} {document}")) for query, document in self.pairs)


def parse_score(raw: bytes) -> Scoring:
    fields = RequestFields(raw)
    names = next((pair for pair in _FIELDS if None not in map(fields.value, pair)), _FIELDS[0])
    first, second = (_texts(fields.value(name), key=name) for name in names)
    if len(first) not in (1, len(second)):
        raise ApiError("Input lengths must be either 1:1, 1:N or N:N", param=names[0])
    queries = first * len(second) if len(first) == 1 else first
    pairs = tuple(zip(queries, second, strict=True))
    return Scoring(model=fields.text("model"), pairs=pairs, priority=fields.priority(), fault=fields.value("sim_fault"))


def parse_rerank(raw: bytes) -> Scoring:
    fields = RequestFields(raw)
    query = fields.text("query")
    if query is None:
        raise ApiError("'query' is required.", param="query")
    documents = _texts(fields.value("documents"), key="documents")
    return Scoring(
        model=fields.text("model"),
        pairs=tuple((query, document) for document in documents),
        top_n=fields.integer("top_n", minimum=0) or 0,
        priority=fields.priority(),
        fault=fields.value("sim_fault"),
    )


def scores_body(envelope: Envelope, scoring: Scoring, *, seed: int) -> bytes:
    """Returns the body of a response to `/score` or `/rerank`."""
    scores = [_score(query, document, model=envelope.model, seed=seed) for query, document in scoring.pairs]
    tokens = scoring.prompt_tokens
    if scoring.top_n is None:
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        body = envelope.wrap("list", [], data=data, usage=usage(tokens))
        del body["choices"]
        return encode(body)
    results: list[dict[str, object]] = [
        {
            "index": index,
            "document": {"text": scoring.pairs[index][1], "multi_modal": None},
            "relevance_score": scores[index],
        }
        for index in sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)
    ]
    return encode(
        {
            "id": envelope.id,
            "model": envelope.model,
            "simulated": True,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": results[: scoring.top_n or None],
        }
    )


def _score(query: str, document: str, *, model: str, seed: int) -> float:
    """Returns a number between 0 and 1 that the two texts, the model and the seed determine; 1 for equal texts."""
    first, second = (unit_vector(text, model=model, seed=seed, dimensions=_DIMENSIONS) for text in (query, document))
    return round((1 + sum(a * b for a, b in zip(first, second, strict=True))) / 2, 6)


def _texts(value: object, *, key: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ApiError(f"'{key}' must be a text or a list of texts, and not empty.", param=key)
    return texts
