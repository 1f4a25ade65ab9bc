"""Finds out which requests vLLM's Rust front end refuses or fails although the replica is healthy.

The router sends every request to the front end and looks only at its error responses, so that a newer front end that
serves more requests needs no change here. The cause is looked up in the request, because the text of the front end's
error does not always name it. docs/rust-frontend.md lists the causes.
"""

from collections.abc import Mapping
from typing import Any, Final

from hpc_router.state.registry import EngineInfo

NAME: Final = "Rust front end"
_NO_TOOL_PARSER: Final = b"tool parsing is disabled"
_FREE_CHOICES: Final = (None, "auto", "none")
"""Values of `tool_choice` that leave the text of the response free."""


def has_rust_frontend(engine: EngineInfo) -> bool:
    return engine.frontend == "rust"


def refused_field(fields: Mapping[str, Any], *, status: int, body: bytes) -> tuple[str, str] | None:
    """Returns the name of the request field that the front end cannot serve, and a text that says why; None if the
    error has another cause. `fields`: the request's body. `status`, `body`: the front end's error response."""
    prompts, count = fields.get("prompt"), fields.get("n")
    if status == 500 and _NO_TOOL_PARSER in body:
        return "tools", "was started without a tool parser: engine.options.extra needs tool-call-parser"
    if status != 400:
        return None
    if isinstance(prompts, list) and not all(type(token) is int for token in prompts):
        return "prompt", "takes one prompt per request, and not a list of prompts"
    if type(count) is int and count > 1:
        return "n", f"makes one answer per request, and not n={count}"
    return None


def is_constrained(fields: Mapping[str, Any]) -> bool:
    """Returns whether the request body `fields` prescribes the form of the response, such as JSON. The first such
    request that an engine behind the Rust front end gets decides which forms it can serve; it answers 500 to others."""
    form = fields.get("response_format")
    free = form is None or (isinstance(form, dict) and form.get("type") == "text")
    return not free or fields.get("structured_outputs") is not None or fields.get("tool_choice") not in _FREE_CHOICES
