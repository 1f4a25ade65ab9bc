"""The shell commands that point plain OpenAI clients to a run: `eval "$(hpc-router env)"`.

The address is that of a running `connect` process with a port, because that address stays the same when another router
leads. If none runs, it is the router's own address, after the router has proven its identity.
"""

import shlex
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from hpc_router.client.router_source import EndpointFolder, source_of
from hpc_router.cluster.commands.router_access import router_access
from hpc_router.connect.listener import running_forwarder

_PROXIES: Final = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def exports(folder: EndpointFolder, environment: Mapping[str, str]) -> tuple[list[str], str | None]:
    """Returns lines for a POSIX shell, and a note for the user or None. Raises LaunchError if no router serves, or if
    the process at its address does not prove its identity.

    If `environment` names a proxy, the lines make clients reach the router without it, so that no token passes through
    the proxy.
    """
    forwarder, note = running_forwarder(folder, tcp=True), None
    if forwarder is not None:
        url, token = forwarder.address, source_of(folder).token()
    else:
        access = router_access(folder)
        url, token = access.url, access.token
        note = f"the address of {access.replica} changes when it moves; that of `hpc-router connect --port N` does not"
        if access.certificate is not None:
            note += "; clients must trust its certificate (router.tls_cert), for example by SSL_CERT_FILE"
    values = {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": token}
    if any(environment.get(name) for name in _PROXIES):
        for name in ("no_proxy", "NO_PROXY"):
            hosts = [host for host in environment.get(name, "").split(",") if host]
            values[name] = ",".join([*hosts, urlsplit(url).hostname or ""])
    return [f"export {name}={shlex.quote(value)}" for name, value in values.items()], note
