"""What the verbs `trace` and `feedback` do: find the records of one request, and add a score to it."""

from typing import Any

from hpc_router.cluster.commands.router_access import router_access
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.net import protocol
from hpc_router.net.http_client import Unreachable, call_blocking
from hpc_router.state.request_records import REQUEST_ID, find_records
from hpc_router.state.run_directory import RunDir


def trace(run: RunDir, request_id: str) -> list[dict[str, Any]]:
    """Returns the records of the request with this id, oldest first. Raises LaunchError if there is none."""
    found = find_records(run, check_id(request_id))
    if not found:
        raise LaunchError(
            f"no record of a request {request_id} in {run.records}: it has not ended, its record is older than "
            "router.records_gb keeps, or it had no valid token"
        )
    return found


def send_feedback(run: RunDir, request_id: str, score: float) -> None:
    """Gives `score` to an earlier request, through the running router. Raises LaunchError."""
    access = router_access(run)
    body = {"id": check_id(request_id), "score": score}
    try:
        response = call_blocking(
            "POST", access.url + protocol.FEEDBACK, token=access.token, body=body, certificate=access.certificate
        )
    except Unreachable as error:
        raise LaunchError(f"the router does not answer at {access.url}: {error}") from error
    if response.status != 200:
        raise LaunchError(f"the router refused the score: {response.message}")


def check_id(request_id: str) -> str:
    """Returns `request_id`. Raises ConfigError if it does not have the form of a request's id."""
    if not REQUEST_ID.fullmatch(request_id):
        raise ConfigError(f"{request_id[:80]!r} is not the id of a request (the header x-request-id of its response)")
    return request_id
