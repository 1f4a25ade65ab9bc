"""Parses the tools of a request and returns the tool that the request forces. Each API has its own form. Errors are as
in vLLM."""

from hpc_router.sim.api_error import ApiError
from hpc_router.sim.generation import Tool


def chat_tool(tools: object, choice: object) -> Tool | None:
    """Returns the tool that a chat request forces, or None. A tool is `{"type": "function", "function": {"name":
    ...}}`."""
    offered = [
        _tool(_inner(entry), "parameters", index=i, inner="'function' that has a ") for i, entry in _entries(tools)
    ]
    name = _inner(choice).get("name") if isinstance(choice, dict) else choice
    return _chosen(offered, name, named=isinstance(choice, dict), required="required")


def response_tool(tools: object, choice: object) -> Tool | None:
    """Returns the tool that a request for /v1/responses forces, or None. A tool is `{"type": "function", "name": ...}`;
    other types are ignored."""
    offered = [
        _tool(entry, "parameters", index=i)
        for i, entry in _entries(tools)
        if not isinstance(entry, dict) or entry.get("type", "function") == "function"
    ]
    name = choice.get("name") if isinstance(choice, dict) else choice
    return _chosen(offered, name, named=isinstance(choice, dict), required="required")


def message_tool(tools: object, choice: object) -> Tool | None:
    """Returns the tool that a request for /v1/messages forces, or None. A tool is `{"name": ..., "input_schema": ...}`;
    `choice` is an object with a `type`."""
    offered = [_tool(entry, "input_schema", index=i) for i, entry in _entries(tools)]
    if choice is not None and (
        not isinstance(choice, dict) or choice.get("type") not in ("auto", "any", "tool", "none")
    ):
        raise ApiError("'tool_choice.type' must be 'auto', 'any', 'tool' or 'none'.", param="tool_choice")
    named = isinstance(choice, dict) and choice["type"] == "tool"
    name = None if not isinstance(choice, dict) else choice.get("name") if named else choice["type"]
    return _chosen(offered, name, named=named, required="any")


def _entries(tools: object) -> list[tuple[int, object]]:
    if tools is not None and not isinstance(tools, list):
        raise ApiError("'tools' must be a list.", param="tools")
    return list(enumerate(tools or ()))


def _inner(entry: object) -> dict[str, object]:
    function = entry.get("function") if isinstance(entry, dict) else None
    return function if isinstance(function, dict) else {}


def _tool(entry: object, schema: str, *, index: int, inner: str = "") -> Tool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ApiError(f"'tools[{index}]' must be an object with a {inner}'name'.", param="tools")
    return Tool(name=entry["name"], parameters=entry.get(schema))


def _chosen(offered: list[Tool], name: object, *, named: bool, required: str) -> Tool | None:
    """Returns the tool among `offered` that the request forces; None if it forces none. `named`: whether `name` is the
    name of a tool; otherwise it is a word such as `none`. `required`: the API's word that forces the first tool."""
    if not named and name in (None, "none", "auto"):
        return None
    if not offered:
        raise ApiError("When using `tool_choice`, `tools` must be set.", param="tool_choice")
    if not named and name == required:
        return offered[0]
    for tool in offered:
        if named and tool.name == name:
            return tool
    valid = f"'none', 'auto', '{required}' or name one of the `tools`"
    raise ApiError(f"'tool_choice' must be {valid}.", param="tool_choice")
