"""Error responses in the formats of vLLM's server, so that clients raise their usual exceptions."""

import json
from http import HTTPStatus

from hpc_router.errors import HpcRouterError


class ApiError(HpcRouterError):
    """An error that is sent as a response. The request's path decides the format of the body."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers or {}

    def body(self, path: str) -> bytes:
        if path.startswith("/v1/messages"):
            return messages_error_body(str(self), kind=_kind(self.status))
        return error_body(str(self), status=self.status, param=self.param)


def error_body(message: str, *, status: int, param: str | None = None) -> bytes:
    """Returns an error body in OpenAI's format."""
    return json.dumps({"error": error_of(message, status=status, param=param), "simulated": True}).encode()


def error_of(message: str, *, status: int, param: str | None = None) -> dict[str, object]:
    return {"message": message, "type": _kind(status), "param": param, "code": status}


def messages_error_body(message: str, *, kind: str) -> bytes:
    """Returns an error body in Anthropic's format. `kind`: the error type, one of those that vLLM uses."""
    return json.dumps({"type": "error", "error": {"type": kind, "message": message}, "simulated": True}).encode()


def _kind(status: int) -> str:
    """Returns vLLM's name for the type of an error with this status."""
    try:
        name = HTTPStatus(status).phrase.replace(" ", "")
    except ValueError:
        name = "Unknown"
    return name if name.endswith("Error") else f"{name}Error"
