"""In-cluster clients: the official openai client, which finds a run's router by itself and follows it when it moves.

The registry is asked at each request, so neither a router's new address nor a new token needs a restart. The token goes
to nothing that has not proven to be the router, and nothing goes through proxies. Whoever uses another library takes
`endpoint`, and takes it again when a call fails. Importing this loads neither openai nor an HTTP library.
"""

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hpc_router.client.leader import Leader, NoRouterError
from hpc_router.client.router_identity import IdentityCheck, examine
from hpc_router.errors import ConfigError
from hpc_router.state.run_directory import RunDir, find_run

if TYPE_CHECKING:
    import openai

__all__ = ["Endpoint", "NoRouterError", "async_openai_client", "endpoint", "openai_client"]

FOLLOW_S: Final = 60.0
_OURS: Final = ("api_key", "base_url", "http_client")
_KEY: Final = "from-the-run-directory"
"""Stands where the openai client wants a key; the transport puts the token in its place."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The router's address now, and the owner's token for it."""

    url: str
    token: str = field(repr=False)

    @property
    def base_url(self) -> str:
        """As OpenAI clients want it."""
        return f"{self.url}/v1"


def endpoint(run: str | PathLike[str] | None = None) -> Endpoint:
    """Of the run directory `run` (default: $HPC_ROUTER_RUN, then runs/latest).

    Raises NoRouterError, also when what answers at the address does not prove to be the router.
    """
    found = _run(run)
    leader = Leader(found)
    router = leader.look(doubt=True)
    if router is None:
        raise leader.missing()
    finding = examine(router, found.secret())
    if finding is not IdentityCheck.PROVEN:
        raise NoRouterError(f"{router.replica} at {router.url}: {finding}; {leader.missing()}")
    return Endpoint(router.url, found.token())


def openai_client(
    run: str | PathLike[str] | None = None, *, follow_s: float = FOLLOW_S, **options: Any
) -> "openai.OpenAI":
    """An `openai.OpenAI` for the run; `options` are its own (`timeout`, `max_retries`, ...).

    While no router takes a request it waits for one, `follow_s` at most, then raises NoRouterError.
    """
    _check(options)
    found = _run(run)
    _need_openai()
    import openai

    from hpc_router.client.transport import NOWHERE, FollowingTransport

    transport = FollowingTransport(found, follow_s=follow_s)
    http_client = openai.DefaultHttpxClient(transport=transport, trust_env=False, follow_redirects=False)
    return openai.OpenAI(base_url=f"http://{NOWHERE}/v1", api_key=_KEY, http_client=http_client, **options)


def async_openai_client(
    run: str | PathLike[str] | None = None, *, follow_s: float = FOLLOW_S, **options: Any
) -> "openai.AsyncOpenAI":
    """The same as an `openai.AsyncOpenAI`."""
    _check(options)
    found = _run(run)
    _need_openai()
    import openai

    from hpc_router.client.transport import NOWHERE, AsyncFollowingTransport

    transport = AsyncFollowingTransport(found, follow_s=follow_s)
    http_client = openai.DefaultAsyncHttpxClient(transport=transport, trust_env=False, follow_redirects=False)
    return openai.AsyncOpenAI(base_url=f"http://{NOWHERE}/v1", api_key=_KEY, http_client=http_client, **options)


def _run(run: str | PathLike[str] | None) -> RunDir:
    return find_run(None if run is None else Path(run))


def _check(options: dict[str, Any]) -> None:
    given = sorted(set(options) & set(_OURS))
    if given:
        raise ConfigError(
            f"{', '.join(given)}: the run directory decides this; for another address use `openai.OpenAI(...)` itself"
        )


def _need_openai() -> None:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "hpc_router.client needs the openai package: pip install 'hpc-router[client]'", name="openai"
        ) from error
