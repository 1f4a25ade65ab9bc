"""What routing needs of a request body, and where its `model` value stands.

The client's bytes are the truth and go upstream unchanged. They are walked member by member, so that when a replica
knows the model by another name, the bytes of that one value can be replaced and nothing else.
"""

import json
import re
from dataclasses import dataclass
from json.decoder import JSONDecoder, scanstring  # type: ignore[attr-defined]
from typing import Any

from hpc_router.errors import BadRequestError

_decode_value = JSONDecoder().raw_decode
_space = re.compile(r"[ \t\n\r]*").match


@dataclass(frozen=True, slots=True)
class ApiCall:
    """One API body: the client's bytes, the decoded fields and the text span of the `model` value."""

    raw: bytes
    text: str
    fields: dict[str, Any]
    model_span: tuple[int, int] | None

    @property
    def model(self) -> str:
        """Raises BadRequestError when it is missing or no string."""
        value = self.fields.get("model")
        if not isinstance(value, str) or not value:
            wrong = "is missing" if "model" not in self.fields else "must be a non-empty string"
            raise BadRequestError(f"'model' {wrong}: 'auto' or the name of an expert", param="model")
        return value

    def body(self, model: str) -> bytes:
        """The body with `model` as its model name."""
        assert self.model_span is not None
        start, end = self.model_span
        return (self.text[:start] + json.dumps(model) + self.text[end:]).encode()


def decode(body: bytes) -> ApiCall:
    """Walk a JSON object. Raises BadRequestError for anything else."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequestError("the body is not UTF-8") from error
    try:
        return _walk(body, text)
    except IndexError as error:
        raise BadRequestError("the body is not a JSON object: it ends too early") from error
    except RecursionError as error:
        raise BadRequestError("the body is not a JSON object: it is nested too deeply") from error
    except ValueError as error:
        raise BadRequestError(f"the body is not a JSON object: {error}") from error


def _walk(raw: bytes, text: str) -> ApiCall:
    at = _skip_space(text, 0)
    if text[at : at + 1] != "{":
        raise ValueError("it does not begin with '{'")
    fields: dict[str, Any] = {}
    span = None
    at = _skip_space(text, at + 1)
    while text[at] != "}":
        if fields:
            at = _skip_space(text, _expect(text, at, ","))
        key, at = scanstring(text, _expect(text, at, '"'))
        if key in fields:
            raise ValueError(f"the key {key[:40]!r} stands twice")
        start = _skip_space(text, _expect(text, _skip_space(text, at), ":"))
        fields[key], end = _decode_value(text, start)
        if key == "model":
            span = (start, end)
        at = _skip_space(text, end)
    if _skip_space(text, at + 1) != len(text):
        raise ValueError("something follows its end")
    return ApiCall(raw, text, fields, span)


def _skip_space(text: str, at: int) -> int:
    found = _space(text, at)
    assert found is not None  # it matches nothing as well
    return found.end()


def _expect(text: str, at: int, mark: str) -> int:
    if text[at] != mark:
        raise ValueError(f"{mark!r} expected at character {at}")
    return at + 1
