"""Decodes request bodies for routing and finds the positions of the values that the router replaces.

The router sends the client's bytes upstream unchanged, with two exceptions: the model's name is replaced if the replica
uses another one, and `priority` is set if the engine obeys it. Most bodies are decoded by orjson. A body that orjson
rejects, or that does not contain the bytes `"model"` exactly once, is parsed member by member, which also gives exact
error messages.
"""

import json
import re
from codecs import BOM_UTF16_LE, BOM_UTF32_LE
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from json.decoder import JSONDecoder, scanstring  # type: ignore[attr-defined]
from typing import Any, Final

import orjson

from hpc_router.errors import BadRequestError
from hpc_router.router.replicas.lifetime import MAX_TOKENS_KEYS
from hpc_router.routing.prompt_text import Prompt

_MODEL: Final = b'"model"'
_TYPE: Final = b'"type"'
_ESCAPE: Final = b"\\u"
_MAX_PREFIX_BYTES: Final = 16
"""Maximum number of bytes before `"model"` for which the short check in `_is_top_level` is made: that they are only the
opening brace."""
MAX_CONTAINERS: Final = 1_000_000
MAX_COLONS: Final = 500_000
MAX_COMMAS: Final = 8_000_000
"""Limits of a long body; text inside strings counts as well. The decoder holds the interpreter's lock for up to 0.3 us
per object or list, 1 us per key (counted by its colon) and 0.05 us per number."""
MAX_DIGITS: Final = 400
"""Maximum number of digits of an integer: the time to decode one grows with the square of its length."""
_BYTE_ORDER_MARK: Final = "\ufeff"
"""Some programs begin a UTF-8 text with it, and Python's `json.loads`, which engines use, skips it."""
_SURROGATES: Final = "surrogatepass"
"""Half of a surrogate pair in the bytes is taken, as by `json.loads`; it is no valid Unicode text."""
_space = re.compile(r"[ \t\n\r]*").match
_MEDIA: Final = {
    **dict.fromkeys(("image_url", "image", "input_image", "image_pil", "image_embeds", "video_url"), "image"),
    **dict.fromkeys(("input_audio", "audio_url", "audio"), "audio"),
}
"""Type of a part of a message -> the kind of input that it is."""
MEDIA_KINDS: Final = frozenset(_MEDIA.values())
_CONVERSATIONS: Final = ("messages", "input")
_TOOLS: Final = frozenset({"tools", "functions"})
_LIMITS: Final = frozenset(MAX_TOKENS_KEYS)
_NO_NEEDS: Final = frozenset[str]()
BYTES_PER_TOKEN: Final = 4
"""Bytes of a body per token, for the estimate of a request's length."""


class ApiCall:
    """The body of one API request: the client's bytes (`raw`) and the decoded JSON object (`fields`). `model_at`:
    offset of the bytes `"model"` in `raw`; -1 if they do not occur exactly once."""

    prompt: Prompt | None = None
    """What a routing decision reads, if it was extracted in a thread; else None."""
    _needs: frozenset[str] | None = None
    _span: tuple[int, int] | None = None

    def __init__(self, raw: bytes, fields: dict[str, Any], model_at: int = -1) -> None:
        self.raw = raw
        self.fields = fields
        self.model_at = model_at

    def estimated_tokens(self) -> int:
        """Returns an estimate of the tokens of the prompt and the longest response together."""
        prompt = len(self.raw) // BYTES_PER_TOKEN
        if not self.fields.keys().isdisjoint(_LIMITS):
            for name in MAX_TOKENS_KEYS:
                if type(allowed := self.fields.get(name)) is int:
                    return prompt + max(allowed, 0)
        return prompt

    def needs(self) -> frozenset[str]:
        """Returns what the request contains beyond text, as `needs_of` does. A body in which no part of a message can
        have a type is not searched for one."""
        if self._needs is None:
            raw, fields = self.raw, self.fields
            # The bytes of a key are its letters, except in UTF-16 and UTF-32, where no `"model"` is found, or escaped.
            plain = self.model_at > 0 and raw.find(_TYPE) < 0 and raw.find(_ESCAPE) < 0
            self._needs = _NO_NEEDS if plain and fields.keys().isdisjoint(_TOOLS) else needs_of(fields)
        return self._needs

    @property
    def model_span(self) -> tuple[int, int]:
        """Start and end offset of the model's quoted name in `raw`. Raises BadRequestError for a duplicate key."""
        if self._span is None:
            self._span = self._find_model()
        return self._span

    def _find_model(self) -> tuple[int, int]:
        raw, model_at = self.raw, self.model_at
        if model_at > 0:
            name = b'"%b"' % self.fields["model"].encode()
            start = raw.find(name, model_at + len(_MODEL))
            if raw[model_at + len(_MODEL) : start].strip() == b":" and self._is_top_level():
                return start, start + len(name)
        return self._find("model")

    def _find(self, key: str) -> tuple[int, int]:
        """Returns where the value of a top-level key begins and ends, in bytes."""
        encoding = _encoding(self.raw)
        text = self.raw.decode(encoding, _SURROGATES)
        start, end = _parse_text(text)[1][key]
        before = len(text[:start].encode(encoding, _SURROGATES))
        return before, before + len(text[start:end].encode(encoding, _SURROGATES))

    def _is_top_level(self) -> bool:
        """Returns whether the `"model"` at `model_at` is a key of the top-level object, not of an inner one. It is if
        only the opening brace precedes it, or if `{` followed by the bytes from `model_at` on is valid JSON."""
        raw, at = self.raw, self.model_at
        if at <= _MAX_PREFIX_BYTES and raw[:at].strip() == b"{":
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
        """The name of the requested model. Raises BadRequestError if it is missing or not a string."""
        value = self.fields.get("model")
        if not isinstance(value, str) or not value:
            wrong = "is missing" if "model" not in self.fields else "must be a non-empty string"
            raise BadRequestError(f"'model' {wrong}: 'auto' or the name of an expert", param="model")
        return value

    def with_priority(self, priority: int) -> "ApiCall":
        """Returns a call with this `priority` in its body, whether or not the client has set one. Returns this call if
        it has no body, or if `priority` is 0, an engine's default, and the client set none. Raises BadRequestError for
        a duplicate key."""
        raw, encoding = self.raw, _encoding(self.raw)
        if "priority" not in self.fields:
            if not priority or not raw:
                return self
            end = raw.rindex("}".encode(encoding))
            changed = b"".join((memoryview(raw)[:end], f',"priority":{priority:d}}}'.encode(encoding)))
            call = ApiCall(changed, self.fields, self.model_at)
            call._span = self._span
            return call
        start, end = self.priority_span
        changed = b"".join((memoryview(raw)[:start], str(int(priority)).encode(encoding), memoryview(raw)[end:]))
        return ApiCall(changed, self.fields, changed.find(_MODEL) if self.model_at >= 0 else -1)

    @cached_property
    def priority_span(self) -> tuple[int, int]:
        """Start and end offset of the value of `priority` in `raw`. Raises BadRequestError for a duplicate key."""
        return self._find("priority")

    def body(self, model: str) -> bytes:
        """Returns the body with its model name replaced by `model`."""
        if self.model_at == 1 and self.raw.startswith(b'{"model":%b' % (asked := _quoted(self.fields["model"]))):
            return b'{"model":%b%b' % (_quoted(model), self.raw[9 + len(asked) :])  # the usual case
        start, end = self.model_span
        raw = memoryview(self.raw)  # avoids a second copy of the rest
        name = _quoted(model)
        return b"".join((raw[:start], name.decode().encode(_encoding(self.raw)), raw[end:]))


@lru_cache(maxsize=256)
def _quoted(model: str) -> bytes:
    return json.dumps(model).encode()


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has a number of more than {MAX_DIGITS} digits")
    return int(digits)


_decode_value = JSONDecoder(parse_int=_whole_number).raw_decode


def check_values(body: bytes) -> None:
    """Raises BadRequestError if the body has so many JSON values that decoding it would take too long."""
    containers, colons, commas = body.count(b"[") + body.count(b"{"), body.count(b":"), body.count(b",")
    if containers > MAX_CONTAINERS or colons > MAX_COLONS or commas > MAX_COMMAS:
        raise BadRequestError(
            f"the body has too many values: at most {MAX_CONTAINERS:,} times '[' or '{{', {MAX_COLONS:,} colons and "
            f"{MAX_COMMAS:,} commas"
        )


def decode(body: bytes) -> ApiCall:
    """Returns the decoded body. Raises BadRequestError if it is not a JSON object."""
    model_at = body.find(_MODEL)
    if model_at >= 0 and body.rfind(_MODEL) == model_at:  # rfind is twice as fast as a second `find`
        try:
            fields = orjson.loads(body)
        except orjson.JSONDecodeError:
            pass  # the parser below finds the error
        else:
            if type(fields) is dict:
                return ApiCall(body, fields, model_at)
    encoding = _encoding(body)
    try:
        text = body.decode(encoding, _SURROGATES)
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not {encoding.upper()}") from error
    return ApiCall(body, _parse_text(text)[0])


def _encoding(body: bytes) -> str:
    """Returns the encoding of a JSON text, as `json.loads` detects it, for engines decode bodies with that function: a
    text in UTF-16 or UTF-32 has null bytes or a byte order mark. The decoded text keeps this mark."""
    match json.detect_encoding(body):
        case "utf-8-sig":
            return "utf-8"
        case "utf-16":
            return "utf-16-le" if body.startswith(BOM_UTF16_LE) else "utf-16-be"
        case "utf-32":
            return "utf-32-le" if body.startswith(BOM_UTF32_LE) else "utf-32-be"
        case encoding:
            return encoding


def _parse_text(text: str) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Returns the members of the JSON object in `text`, and the start and end of each value in it (see
    `_parse_members`). Raises BadRequestError if the text is not a JSON object."""
    try:
        return _parse_members(text)
    except IndexError as error:
        raise BadRequestError("the body is not a JSON object: it ends too early") from error
    except RecursionError as error:
        raise BadRequestError("the body is not a JSON object: it is nested too deeply") from error
    except ValueError as error:
        raise BadRequestError(f"the body is not a JSON object: {error}") from error


def _parse_members(text: str) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Returns by key the members of the JSON object in `text`, and the start and end of their values in `text`. Raises
    ValueError, IndexError or RecursionError if it is not a JSON object or has a duplicate key."""
    at = _skip_space(text, text.startswith(_BYTE_ORDER_MARK))
    if text[at : at + 1] != "{":
        raise ValueError("it does not start with '{'")
    fields: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    at = _skip_space(text, at + 1)
    while text[at] != "}":
        if fields:
            at = _skip_space(text, _expect(text, at, ","))
        key, at = scanstring(text, _expect(text, at, '"'))
        if key in fields:
            raise ValueError(f"the key {key[:40]!r} occurs twice")
        start = _skip_space(text, _expect(text, _skip_space(text, at), ":"))
        fields[key], end = _decode_value(text, start)
        spans[key] = (start, end)
        at = _skip_space(text, end)
    if _skip_space(text, at + 1) != len(text):
        raise ValueError("there is data after its end")
    return fields, spans


def _skip_space(text: str, at: int) -> int:
    found = _space(text, at)
    assert found is not None  # the pattern also matches the empty string
    return found.end()


def _expect(text: str, at: int, mark: str) -> int:
    if text[at] != mark:
        raise ValueError(f"{mark!r} expected at character {at}")
    return at + 1


def needs_of(fields: Mapping[str, Any]) -> frozenset[str]:
    """Returns the kinds of input in a decoded body beyond text: `image`, `audio`, `tools`. Tools count if the model may
    choose whether to call one, because engines serve a forced call without knowing the model's format of calls."""
    needs = set()
    if (fields.get("tools") or fields.get("functions")) and _may_choose(fields.get("tool_choice")):
        needs.add("tools")
    for name in _CONVERSATIONS:
        value = fields.get(name)
        if type(value) is list:
            for item in value:
                parts = item.get("content", item.get("output")) if type(item) is dict else None
                if type(parts) is list:
                    needs.update(_media(parts))
    return frozenset(needs)


def _may_choose(choice: object) -> bool:
    if isinstance(choice, dict):
        choice = choice.get("type")
    return choice is None or choice == "auto"


def _media(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        if type(part) is dict:
            kind = part.get("type")
            if type(kind) is str and kind in _MEDIA:
                yield _MEDIA[kind]
            elif kind == "tool_result" and type(part.get("content")) is list:
                yield from _media([one for one in part["content"] if type(one) is dict and "content" not in one])
