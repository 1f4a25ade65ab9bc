"""Reads typed fields of a JSON request body. A null value counts as absent. Errors name the key."""

import json
from typing import Final

from hpc_router.sim.api_error import ApiError

_WORDS: Final = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True) | dict.fromkeys(
    ("false", "f", "no", "n", "off", "0"), False
)
"""The words that pydantic, and so vLLM, reads as truth values."""


class RequestFields:
    """The fields of one request body. The methods return the value of a field, and raise ApiError if its type is
    wrong."""

    def __init__(self, raw: bytes) -> None:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as exc:
            raise ApiError(f"The body is not valid JSON: {exc}") from exc
        if not isinstance(body, dict):
            raise ApiError("The body must be a JSON object.")
        self._body: dict[str, object] = body

    def value(self, key: str) -> object:
        return self._body.get(key)

    def text(self, key: str) -> str | None:
        value = self._body.get(key)
        if value is not None and not isinstance(value, str):
            raise ApiError(f"'{key}' must be a string.", param=key)
        return value

    def flag(self, key: str) -> bool:
        """Returns the field `key` as a truth value. As in vLLM, it may be given as a number or a word."""
        value = self._body.get(key)
        if isinstance(value, str):
            value = _WORDS.get(value.lower(), value)
        if value is not None and (not isinstance(value, int | float) or value not in (0, 1)):
            raise ApiError(f"'{key}' must be true or false.", param=key)
        return bool(value)

    def integer(self, key: str, *, minimum: int, maximum: int | None = None) -> int | None:
        value = self._body.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise ApiError(f"'{key}' must be an integer.", param=key)
        if value < minimum or (maximum is not None and value > maximum):
            upper = f" and at most {maximum}" if maximum else ""
            raise ApiError(f"'{key}' must be at least {minimum}{upper}.", param=key)
        return value

    def priority(self) -> int:
        """Returns the request's priority; the lowest value goes first."""
        return self.integer("priority", minimum=-(2**63)) or 0

    def number(self, key: str) -> float | None:
        value = self._body.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ApiError(f"'{key}' must be a number.", param=key)
        try:
            return float(value)
        except OverflowError as error:
            raise ApiError(f"'{key}' is too large.", param=key) from error

    def count(self, key: str) -> int | None:
        """Returns the number of log probabilities that the field `key` requests: -1 for the whole vocabulary, None if
        it is absent."""
        value = self._body.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise ApiError(f"`{key}` must be an integer.", param=key)
        if value < -1:
            raise ApiError(f"`{key}` must be a positive value or -1.", param=key)
        return value
