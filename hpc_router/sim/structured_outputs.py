"""Answers with a text that the request determines: JSON for a schema, one of several choices, or a tool call's
arguments.

vLLM 0.32 names these constraints `response_format`, `structured_outputs`, `text.format` and `output_config.format`
(vllm/entrypoints/generate/base/protocol.py, vllm/sampling_params.py). Constraints that need a grammar are refused.
"""

import json
from typing import Final

from hpc_router.sim.api_error import ApiError
from hpc_router.sim.generation import Tool
from hpc_router.sim.json_schema import SchemaError, example

_KINDS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def constrained_text(
    *, response_format: object, structured_outputs: object, key: str = "response_format"
) -> str | None:
    """Returns the text that the answer must be; None if the request does not constrain it.

    `key`: name of the field that has `response_format`, for error messages. If both parameters set a constraint of the
    same kind, that of `response_format` applies.
    """
    constraints = _constraints(structured_outputs)
    constraints |= _of_format(response_format, key=key)
    if structured_outputs is None and not constraints:
        return None
    if not constraints:
        message = "You must use one kind of structured outputs constraint but none are specified"
        raise ApiError(f"{message} (valid: {', '.join(_KINDS)}).", param="structured_outputs")
    if len(constraints) > 1:
        message = "You can only use one kind of structured outputs constraint but multiple are specified"
        raise ApiError(f"{message}: {', '.join(constraints)}.", param="structured_outputs")
    ((kind, value),) = constraints.items()
    return _text(kind, value)


def tool_arguments(tool: Tool) -> str:
    """Returns the arguments of a forced tool call as JSON."""
    return _json(tool.parameters if isinstance(tool.parameters, dict) else {"type": "object"}, param="tools")


def _constraints(value: object) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ApiError("'structured_outputs' must be an object.", param="structured_outputs")
    return {kind: value[kind] for kind in _KINDS if value.get(kind) is not None}


def _of_format(value: object, *, key: str) -> dict[str, object]:
    """Returns the constraint, by its kind, that a `response_format` sets; empty if it sets none. A JSON schema is in
    its field `json_schema` in chat requests, and in `schema` beside `type` in other APIs."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ApiError(f"'{key}' must be an object with a 'type'.", param=key)
    match value.get("type"):
        case "text":
            return {}
        case "json_object":
            return {"json_object": True}
        case "json_schema" if key == "response_format":
            inner = value.get("json_schema")
            if not isinstance(inner, dict):
                message = "When response_format type is 'json_schema', the 'json_schema' field must be provided."
                raise ApiError(message, param=key)
            return _schema_of(inner, key="response_format.json_schema")
        case "json_schema":
            return _schema_of(value, key=key)
        case "structural_tag":
            return {"structural_tag": value}
        case kind:
            valid = "'text', 'json_object' or 'json_schema'"
            raise ApiError(f"'{key}.type' is {kind!r} and must be {valid}.", param=key)


def _schema_of(value: dict[str, object], *, key: str) -> dict[str, object]:
    if not isinstance(value.get("schema"), dict):
        raise ApiError(f"'{key}.schema' must be a JSON schema.", param=key)
    return {"json": value["schema"]}


def _text(kind: str, value: object) -> str:
    key = f"structured_outputs.{kind}"
    match kind:
        case "json":
            return _json(_decoded(value, key=key) if isinstance(value, str) else value, param=key)
        case "json_object":
            return json.dumps({"simulated": True})
        case "choice":
            if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
                raise ApiError(f"'{key}' must be a non-empty list of strings.", param=key)
            return str(value[0])
        case _:
            valid = "json, json_object, choice"
            raise ApiError(f"The simulated engine cannot follow '{key}' (valid: {valid}).", param=key)


def _decoded(text: str, *, key: str) -> object:
    try:
        decoded: object = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ApiError(f"'{key}' is not valid JSON: {exc}", param=key) from exc
    return decoded


def _json(schema: object, *, param: str) -> str:
    try:
        return json.dumps(example(schema))
    except (SchemaError, RecursionError) as exc:
        raise ApiError(f"{exc}.", param=param) from exc
