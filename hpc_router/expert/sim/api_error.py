"""A refusal as vLLM's server sends it: OpenAI's error shape, so that clients raise their own exception classes."""

import json
from http import HTTPStatus

from hpc_router.errors import HpcRouterError


class ApiError(HpcRouterError):
    """A refusal in OpenAI's error shape."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers or {}

    def body(self) -> bytes:
        return error_body(str(self), status=self.status, param=self.param)


def error_body(message: str, *, status: int, param: str | None = None) -> bytes:
    try:
        name = HTTPStatus(status).phrase.replace(" ", "")
    except ValueError:
        name = "Unknown"
    kind = name if name.endswith("Error") else f"{name}Error"
    error = {"message": message, "type": kind, "param": param, "code": status}
    return json.dumps({"error": error, "simulated": True}).encode()
