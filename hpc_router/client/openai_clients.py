"""In-cluster clients: the official openai client, which finds the router of a run and follows it to another address.

Every request reads the registry, so a new address or a new token of the router needs no restart of the client. The
token is sent only to a process that has proven to be the router, and never through a proxy. With another library, call
`endpoint`, and call it again after a failed request. Importing this module loads neither openai nor an HTTP library.
"""

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hpc_router.client.leader import NoRouterError
from hpc_router.client.router_identity import IdentityCheck
from hpc_router.client.router_source import EndpointFolder, find_folder, source_of, users_token
from hpc_router.errors import ConfigError, UnauthorizedError
from hpc_router.state.run_directory import RunDir

if TYPE_CHECKING:
    import openai

__all__ = ["Endpoint", "NoRouterError", "async_openai_client", "endpoint", "openai_client"]

FOLLOW_S: Final = 60.0
"""Default time limit in seconds for a request to find a router."""
_OURS: Final = ("api_key", "base_url", "http_client")
_KEY: Final = "from-the-run-directory"
"""The openai client requires a key; the transport replaces this one by the token."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The current address of the router, and the token for it."""

    url: str
    token: str = field(repr=False)

    @property
    def base_url(self) -> str:
        """Returns the value for the argument `base_url` of an OpenAI client."""
        return f"{self.url}/v1"


def endpoint(run: str | PathLike[str] | None = None) -> Endpoint:
    """Returns the address and token of the router of `run`: a run directory, or the share folder of another user's
    deployment (default: $HPC_ROUTER_RUN, then runs/latest).

    Raises NoRouterError if no router serves, or if the process at its address does not prove that it is the router, and
    UnauthorizedError if the router does not know this user's token.
    """
    source = source_of(_folder(run))
    router = source.find(recheck=True)
    if router is None:
        raise source.no_router_error()
    token = source.token()
    check = source.check(router, token)
    if check is IdentityCheck.TOKEN_UNKNOWN:
        raise UnauthorizedError(f"{router.replica} at {router.url}: {check}; ask the deployment's owner")
    if check is not IdentityCheck.PROVEN:
        raise NoRouterError(f"{router.replica} at {router.url}: {check}; {source.no_router_error()}")
    return Endpoint(router.url, token)


def openai_client(
    run: str | PathLike[str] | None = None, *, follow_s: float = FOLLOW_S, **options: Any
) -> "openai.OpenAI":
    """Returns an `openai.OpenAI` that sends its requests to the router of `run`, a run directory or a share folder
    (default: as for `endpoint`). `options`: further arguments of `openai.OpenAI`, such as `timeout` and `max_retries`.

    A request waits for a router for at most `follow_s` seconds, then raises NoRouterError.
    """
    _check_options(options)
    found = _folder(run)
    _need_openai()
    import openai

    from hpc_router.client.transport import PLACEHOLDER_HOST, FollowingTransport

    transport = FollowingTransport(found, follow_s=follow_s)
    http_client = openai.DefaultHttpxClient(transport=transport, trust_env=False, follow_redirects=False)
    return openai.OpenAI(base_url=f"http://{PLACEHOLDER_HOST}/v1", api_key=_KEY, http_client=http_client, **options)


def async_openai_client(
    run: str | PathLike[str] | None = None, *, follow_s: float = FOLLOW_S, **options: Any
) -> "openai.AsyncOpenAI":
    """Returns an `openai.AsyncOpenAI`. The arguments have the same meaning as those of `openai_client`."""
    _check_options(options)
    found = _folder(run)
    _need_openai()
    import openai

    from hpc_router.client.transport import PLACEHOLDER_HOST, AsyncFollowingTransport

    transport = AsyncFollowingTransport(found, follow_s=follow_s)
    http_client = openai.DefaultAsyncHttpxClient(transport=transport, trust_env=False, follow_redirects=False)
    return openai.AsyncOpenAI(
        base_url=f"http://{PLACEHOLDER_HOST}/v1", api_key=_KEY, http_client=http_client, **options
    )


def _folder(run: str | PathLike[str] | None) -> EndpointFolder:
    """Returns the run directory or share folder `run`. Raises ConfigError if it cannot be used, or if a share folder
    has no token for this user."""
    folder = find_folder(None if run is None else Path(run))
    if not isinstance(folder, RunDir):
        users_token(folder)
    return folder


def _check_options(options: dict[str, Any]) -> None:
    given = sorted(set(options) & set(_OURS))
    if given:
        raise ConfigError(
            f"{', '.join(given)}: the run directory sets this option; for another address use `openai.OpenAI(...)`"
        )


def _need_openai() -> None:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "hpc_router.client needs the openai package: pip install 'hpc-router[client]'", name="openai"
        ) from error
