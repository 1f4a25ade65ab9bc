"""What routing needs of a request body, and where its `model` value stands.

The client's bytes are the truth and go upstream unchanged; when a replica knows the model by another name, the bytes of
that one value are replaced and nothing else. Most bodies are left to a fast decoder. One that it refuses, or in which
something else than one member may be named `model`, is walked member by member, which also says what is wrong with it.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from json.decoder import JSONDecoder, scanstring  # type: ignore[attr-defined]
from typing import Any, Final

import orjson

from hpc_router.errors import BadRequestError

_MODEL: Final = b'"model"'
_model_member = re.compile(rb'"model"[ \t\n\r]*:[ \t\n\r]*(?=")').search
_decode_value = JSONDecoder().raw_decode
_space = re.compile(r"[ \t\n\r]*").match


@dataclass(slots=True)
class ApiCall:
    """One API body: the client's bytes and the decoded fields."""

    raw: bytes
    fields: dict[str, Any]

    @property
    def model_span(self) -> tuple[int, int]:
        """The span of bytes in which the model's name stands. Raises BadRequestError where a key stands twice."""
        raw = self.raw
        if raw.count(_MODEL) == 1 and b"\\u" not in raw and (found := _model_member(raw)):
            start = found.end()
            name = b'"%b"' % self.fields["model"].encode()
            if raw.startswith(name, start):  # the only member of this name, then, however deep it is looked for
                return start, start + len(name)
        text = raw.decode()
        start, end = _walked(text)[1]["model"]
        before = len(text[:start].encode())
        return before, before + len(text[start:end].encode())

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
        start, end = self.model_span
        return b"".join((self.raw[:start], _quoted(model), self.raw[end:]))


@lru_cache(maxsize=256)
def _quoted(model: str) -> bytes:
    return json.dumps(model).encode()


def decode(body: bytes) -> ApiCall:
    """Decode a JSON object. Raises BadRequestError for anything else."""
    if body.count(_MODEL) == 1:
        try:
            fields = orjson.loads(body)
        except orjson.JSONDecodeError:
            pass  # what is wrong comes out below
        else:
            if type(fields) is dict:
                return ApiCall(body, fields)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequestError("the body is not UTF-8") from error
    return ApiCall(body, _walked(text)[0])


def _walked(text: str) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Raises BadRequestError."""
    try:
        return _walk(text)
    except IndexError as error:
        raise BadRequestError("the body is not a JSON object: it ends too early") from error
    except RecursionError as error:
        raise BadRequestError("the body is not a JSON object: it is nested too deeply") from error
    except ValueError as error:
        raise BadRequestError(f"the body is not a JSON object: {error}") from error


def _walk(text: str) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The members of an object, and the span of text in which each one's value stands."""
    at = _skip_space(text, 0)
    if text[at : at + 1] != "{":
        raise ValueError("it does not begin with '{'")
    fields: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    at = _skip_space(text, at + 1)
    while text[at] != "}":
        if fields:
            at = _skip_space(text, _expect(text, at, ","))
        key, at = scanstring(text, _expect(text, at, '"'))
        if key in fields:
            raise ValueError(f"the key {key[:40]!r} stands twice")
        start = _skip_space(text, _expect(text, _skip_space(text, at), ":"))
        fields[key], end = _decode_value(text, start)
        spans[key] = (start, end)
        at = _skip_space(text, end)
    if _skip_space(text, at + 1) != len(text):
        raise ValueError("something follows its end")
    return fields, spans


def _skip_space(text: str, at: int) -> int:
    found = _space(text, at)
    assert found is not None  # it matches nothing as well
    return found.end()


def _expect(text: str, at: int, mark: str) -> int:
    if text[at] != mark:
        raise ValueError(f"{mark!r} expected at character {at}")
    return at + 1
