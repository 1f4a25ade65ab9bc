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
_FIRST: Final = 16
"""Bytes, at most, before a body's first member."""
_decode_value = JSONDecoder().raw_decode
_space = re.compile(r"[ \t\n\r]*").match


@dataclass(slots=True)
class ApiCall:
    """One API body: the client's bytes and the decoded fields. `member`: where the only `"model"` is, or -1."""

    raw: bytes
    fields: dict[str, Any]
    member: int = -1

    @property
    def model_span(self) -> tuple[int, int]:
        """The span of bytes in which the model's name stands. Raises BadRequestError where a key stands twice."""
        raw, member = self.raw, self.member
        if member > 0:
            name = b'"%b"' % self.fields["model"].encode()
            start = raw.find(name, member + len(_MODEL))
            if raw[member + len(_MODEL) : start].strip() == b":" and self._on_top():
                return start, start + len(name)
        text = raw.decode()
        start, end = _walked(text)[1]["model"]
        before = len(text[:start].encode())
        return before, before + len(text[start:end].encode())

    def _on_top(self) -> bool:
        """Whether what stands at `member` is a member of the body itself: nothing but its brace comes before, or what
        follows closes no other."""
        raw, at = self.raw, self.member
        if at <= _FIRST and raw[:at].strip() == b"{":
            return True
        if raw[at - 1 : at] == b"\\":  # a quote within a string
            return False
        try:
            orjson.loads(b"{" + raw[at:])
        except orjson.JSONDecodeError:
            return False
        return True

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
        raw = memoryview(self.raw)  # or what follows would be copied twice
        return b"".join((raw[:start], _quoted(model), raw[end:]))


@lru_cache(maxsize=256)
def _quoted(model: str) -> bytes:
    return json.dumps(model).encode()


def decode(body: bytes) -> ApiCall:
    """Decode a JSON object. Raises BadRequestError for anything else."""
    member = body.find(_MODEL)
    if member >= 0 and body.find(_MODEL, member + 1) < 0:
        try:
            fields = orjson.loads(body)
        except orjson.JSONDecodeError:
            pass  # what is wrong comes out below
        else:
            if type(fields) is dict:
                return ApiCall(body, fields, member)
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
        raise ValueError("there is data after its end")
    return fields, spans


def _skip_space(text: str, at: int) -> int:
    found = _space(text, at)
    assert found is not None  # it matches nothing as well
    return found.end()


def _expect(text: str, at: int, mark: str) -> int:
    if text[at] != mark:
        raise ValueError(f"{mark!r} expected at character {at}")
    return at + 1
