"""Generates a value that a JSON schema accepts. The value is deterministic, small and complete.

Supports what pydantic, zod and hand-written schemas use: types, enums, bounds, formats, `$ref`, `anyOf` and `allOf`. An
unsupported keyword that restricts the value is an error, because vLLM would apply it. This module does not know
requests or tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

_STRING: Final = "simulated"
_FORMATS: Final[Mapping[str, str]] = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "duration": "P1D",
    "email": "simulated@example.org",
    "hostname": "example.org",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "json-pointer": "/simulated",
    "relative-json-pointer": "0",
    "time": "00:00:00Z",
    "uri": "https://example.org/",
    "uri-reference": "https://example.org/",
    "uri-template": "https://example.org/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
"""An example for each format of vLLM: STRING_SUPPORTED_FORMATS in vllm/v1/structured_output/backend_xgrammar.py."""
_UNSUPPORTED: Final = ("not", "pattern", "patternProperties", "propertyNames", "contains", "if", "dependentRequired")
_TYPES: Final = ("object", "array", "string", "integer", "number", "boolean", "null")
_KEYWORD_TYPES: Final = {
    "properties": "object",
    "required": "object",
    "additionalProperties": "object",
    "items": "array",
    "prefixItems": "array",
    "minItems": "array",
    "minimum": "number",
    "maximum": "number",
}
"""The type that a keyword implies in a schema without `type`."""


class SchemaError(ValueError):
    """Raised for a schema that is invalid or uses an unsupported keyword."""


class _EndlessError(SchemaError):
    """Raised for a schema that refers to itself at a place where a value is required."""


def example(schema: object) -> object:
    """Returns a value that the schema accepts. Raises SchemaError."""
    return _Examples(schema).value(schema)


class _Examples:
    """Generates a value for one schema. `_open`: the references that are being resolved, to detect endless ones."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._open: list[str] = []

    def value(self, schema: object) -> object:
        if not isinstance(schema, dict):
            return _STRING  # `true` accepts anything
        for keyword in _UNSUPPORTED:
            if keyword in schema:
                raise SchemaError(f"the simulated engine cannot follow the keyword '{keyword}' of a JSON schema")
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return _values(schema)[0]
        if "allOf" in schema:
            return self.value(self._merged(schema))
        if isinstance(reference := schema.get("$ref"), str):
            return self._referenced(reference)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._any_of(schema[keyword], keyword)
        return self._typed(schema)

    def _referenced(self, reference: str) -> object:
        if reference in self._open:
            raise _endless(reference)
        self._open.append(reference)
        try:
            return self.value(self._target(reference))
        finally:
            self._open.pop()

    def _target(self, reference: str) -> object:
        """Returns the schema that `reference`, a JSON pointer (RFC 6901), names in the whole schema."""
        found = self._root
        path, _, pointer = reference.partition("#")
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, dict) else None
        if path or found is None:
            raise SchemaError(f"the JSON schema has no '{reference}'")
        return found

    def _resolved(self, schema: object) -> dict[str, object]:
        """Returns the schema with its `$ref` replaced by the keywords of the schema to which it refers. Other keywords
        stay."""
        resolved, followed = _mapping(schema), set[str]()
        while isinstance(reference := resolved.get("$ref"), str):
            if reference in followed:
                raise _endless(reference)
            followed.add(reference)
            resolved = _mapping(self._target(reference)) | {k: v for k, v in resolved.items() if k != "$ref"}
        return resolved

    def _merged(self, schema: Mapping[str, object]) -> dict[str, object]:
        """Returns `schema` merged with the schemas of its `allOf`: their properties and required names are united."""
        merged: dict[str, object] = {}
        alternatives = schema["allOf"]
        rest = {key: value for key, value in schema.items() if key != "allOf"}
        for part in (*(alternatives if isinstance(alternatives, list) else ()), rest):
            for key, value in self._resolved(part).items():
                before = merged.get(key)
                if isinstance(before, dict) and isinstance(value, dict):
                    merged[key] = before | value
                elif key == "required" and isinstance(before, list) and isinstance(value, list):
                    merged[key] = before + value
                else:
                    merged[key] = value
        return merged

    def _any_of(self, alternatives: object, keyword: str) -> object:
        """Returns a value for the first of the `alternatives` for which one can be generated; null alternatives are
        tried last."""
        if not isinstance(alternatives, list) or not alternatives:
            raise SchemaError(f"'{keyword}' of a JSON schema must be a list that is not empty")
        failure: SchemaError | None = None
        for alternative in sorted(alternatives, key=lambda one: isinstance(one, dict) and one.get("type") == "null"):
            try:
                return self.value(alternative)
            except SchemaError as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _typed(self, schema: Mapping[str, object]) -> object:
        match _type(schema):
            case "object":
                return self._object(schema)
            case "array":
                return self._array(schema)
            case "string":
                return _string(schema)
            case "integer" | "number" as kind:
                return _number(schema, whole=kind == "integer")
            case "boolean":
                return True
            case "null":
                return None
            case _:
                return _STRING

    def _object(self, schema: Mapping[str, object]) -> dict[str, object]:
        properties, required = _mapping(schema.get("properties")), schema.get("required")
        names = [str(name) for name in required] if isinstance(required, list) else []
        made: dict[str, object] = {}
        for name, field in properties.items():
            try:
                made[name] = self.value(field)
            except _EndlessError:
                if name in names:
                    raise
        for name in names:
            if name not in made:
                made[name] = self.value(schema.get("additionalProperties"))
        return made

    def _array(self, schema: Mapping[str, object]) -> list[object]:
        first, items = schema.get("prefixItems"), schema.get("items")
        made = [self.value(item) for item in first] if isinstance(first, list) else []
        least = schema.get("minItems")
        while isinstance(least, int) and len(made) < least:
            made.append(self._another(items, made) if schema.get("uniqueItems") is True else self.value(items))
        return made

    def _another(self, items: object, made: Sequence[object]) -> object:
        """Returns a value that is not in `made`: the next value of an enum, a larger number, or a longer string."""
        schema, last = self._resolved(items), made[-1] if made else None
        candidates: list[object]
        if "enum" in schema:
            candidates = _values(schema)
        elif schema.get("type") == "boolean":
            candidates = [True, False]
        elif isinstance(last, str):
            candidates = [self.value(schema | {"minLength": len(last) + 1})]
        elif isinstance(last, int | float):
            candidates = [self.value(schema | {"minimum": last + 1})]
        else:
            candidates = [self.value(schema)]
        for value in candidates:
            if value not in made:
                return value
        raise SchemaError("the simulated engine cannot follow the keyword 'uniqueItems' of this JSON schema")


def _endless(reference: str) -> _EndlessError:
    return _EndlessError(f"the JSON schema '{reference}' refers to itself without an end")


def _values(schema: Mapping[str, object]) -> list[object]:
    values = schema["enum"]
    if not isinstance(values, list) or not values:
        raise SchemaError("'enum' of a JSON schema must be a list that is not empty")
    return values


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _type(schema: Mapping[str, object]) -> str | None:
    """Returns the type of the generated value: the schema's first type that is not null."""
    given = schema.get("type")
    names = given if isinstance(given, list) else [] if given is None else [given]
    for name in names:
        if name not in _TYPES:
            raise SchemaError(f"'{name}' is no type of a JSON schema (valid: {', '.join(_TYPES)})")
    if names:
        return str(next((name for name in names if name != "null"), "null"))
    return next((kind for keyword, kind in _KEYWORD_TYPES.items() if keyword in schema), None)


def _string(schema: Mapping[str, object]) -> str:
    kind = schema.get("format")
    if isinstance(kind, str):
        if kind not in _FORMATS:
            raise SchemaError(f"'{kind}' is no format that can be followed (valid: {', '.join(_FORMATS)})")
        return _FORMATS[kind]
    least, most = schema.get("minLength"), schema.get("maxLength")
    text = _STRING.ljust(least, "-") if isinstance(least, int) else _STRING
    return text[:most] if isinstance(most, int) else text


def _number(schema: Mapping[str, object], *, whole: bool) -> float:
    """Returns 0 if the bounds allow it, else the first allowed value near a bound."""
    low, high = _limit(schema, "minimum", -math.inf), _limit(schema, "maximum", math.inf)
    above, below = _limit(schema, "exclusiveMinimum", -math.inf), _limit(schema, "exclusiveMaximum", math.inf)
    step = _limit(schema, "multipleOf", 1.0 if whole else 0.0)
    candidates = [0.0]
    for bound in filter(math.isfinite, (low, above, high, below)):
        if step > 0:
            candidates += [(math.floor(bound / step) + offset) * step for offset in (0, 1, -1)]
        else:
            candidates += [bound, bound + 1, bound - 1]
    if step <= 0:
        candidates.append((max(low, above) + min(high, below)) / 2)
    for value in candidates:
        if low <= value <= high and above < value < below:
            return int(value) if value.is_integer() else value
    raise SchemaError("no number lies between 'minimum' and 'maximum' of the JSON schema")


def _limit(schema: Mapping[str, object], keyword: str, absent: float) -> float:
    value = schema.get(keyword)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else absent
