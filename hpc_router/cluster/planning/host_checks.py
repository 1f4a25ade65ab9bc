"""Checks of one host that need neither Slurm nor the run directory: home folder, proxies, and the hub's cache."""

import errno
import ipaddress
import os
import socket
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from hpc_router.cluster.planning.finding import CheckResult, fault, note, ok
from hpc_router.config.schema import ClusterConfig, Deployment
from hpc_router.errors import ConfigError
from hpc_router.expert.staging.model_files import local_models
from hpc_router.net.addresses import address

TRIED_BYTES: Final = 2**18
"""Size in bytes of the file that is written to detect a quota, which the free space does not show."""
MIN_HOME_BYTES: Final = 10**9
_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def home(folder: Path | None = None) -> CheckResult:
    """Checks whether files can be written to the home folder, where engines and libraries keep caches."""
    path = folder or Path(os.environ.get("HOME") or "/")
    host = socket.gethostname()
    elsewhere = "cluster.env={HF_HOME: DIR, XDG_CACHE_HOME: DIR}, with a DIR on another file system"
    try:
        with tempfile.TemporaryFile(dir=path) as stream:
            stream.write(bytes(TRIED_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        status = os.statvfs(path)
    except OSError as error:
        if error.errno in _FULL:
            what = f"the home folder {path} is full on {host}: {error.strerror}"
            return CheckResult(
                [fault(what, f"remove files (`quota`, `du -xsh ~/.cache`), or set {elsewhere}", "cluster.env")]
            )
        what = f"the home folder {path} cannot be used on {host}: {error.strerror}"
        return CheckResult([note(what, f"caches of engines need a folder: {elsewhere}", "cluster.env")])
    free = status.f_bavail * status.f_frsize
    if free < MIN_HOME_BYTES:
        what = f"the home folder {path} has {free / 1e9:.1f} GB left on {host}"
        return CheckResult([note(what, f"remove files, or set {elsewhere}", "cluster.env")])
    return CheckResult([ok(f"{path} has {free / 1e9:.0f} GB free")])


def proxies(
    cluster: ClusterConfig, *, on_node: bool, environment: Mapping[str, str] = os.environ, own: str | None = None
) -> CheckResult:
    """Checks whether requests from this host to addresses of its network would go to a proxy. `own`: this host's
    address; None: its address on `cluster.fabric`. This package's clients ignore proxies, but curl and most libraries
    use them."""
    values = {**environment, **(cluster.env if on_node else {})}
    lowered = {name.lower(): value for name, value in values.items() if value}
    names = [name for name in _PROXIES if name in lowered]
    if not names:
        return CheckResult([ok("no proxies are set")])
    try:
        own = own or address(cluster.fabric, kind=cluster.kind)
    except ConfigError:  # a login node may not be on the fabric
        own = address(None, kind=cluster.kind)
    exempt = lowered.get("no_proxy", "")
    if _exempts(exempt, own):
        return CheckResult([ok(f"{', '.join(names)} set; no_proxy exempts {own}")])
    host = socket.gethostname()
    what = f"{', '.join(names)} set on {host}, and no_proxy={exempt or '(not set)'} does not exempt its address {own}"
    effect = "curl and OpenAI clients would send requests for the router to the proxy"
    network = ipaddress.ip_network(f"{own}/{24 if ':' not in own else 64}", strict=False)
    fix = (
        f"cluster.env={{no_proxy: '{network}', NO_PROXY: '{network}'}}"
        if on_node
        else f"export no_proxy={own.rpartition('.')[0] or own}. or use `hpc_router.client`, `curl --noproxy '*'`"
    )
    return CheckResult([note(f"{what}: {effect}", fix, "cluster.env" if on_node else None)])


def _exempts(no_proxy: str, own: str) -> bool:
    """Returns whether the variable `no_proxy` exempts the address `own` from the proxy. Accepts names and suffixes, as
    urllib does, and networks, as many libraries do."""
    if urllib.request.proxy_bypass_environment(own, {"no": no_proxy}):  # type: ignore[attr-defined]
        return True
    for entry in (entry.strip() for entry in no_proxy.split(",")):
        try:
            if ipaddress.ip_address(own) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False


def hub_cache(deployment: Deployment, environment: Mapping[str, str] = os.environ) -> CheckResult:
    """Checks whether models that are hub ids are in the hub's cache on this host, where offline engines need them."""
    experts = deployment.experts
    models = {name: expert.model for name, expert in experts.items() if expert.engine.kind != "sim"}
    local = set(local_models(models.values()))
    hub = {name: model for name, model in models.items() if model not in local}
    values = {**environment, **deployment.cluster.env}
    cache = _cache_folder(values)
    missing = {name: model for name, model in hub.items() if not _is_cached(cache, model)}
    if not missing:
        return CheckResult([ok(f"{len(hub)} models of the hub are in {cache}" if hub else "no model is of the hub")])
    if not (deployment.cluster.offline or values.get("HF_HUB_OFFLINE", "0") not in ("", "0")):
        return CheckResult([ok(f"engines will download {', '.join(sorted(set(missing.values())))} to {cache}")])
    return CheckResult(
        [
            fault(
                f"experts.{name}.model={model}: not in the hub's cache {cache} on {socket.gethostname()}, and engines "
                "are offline",
                f"`HF_HOME={cache.parent} hf download {model}` where the internet is reachable, or cluster.env.HF_HOME "
                "with the folder that has it",
                f"experts.{name}.model",
            )
            for name, model in missing.items()
        ]
    )


def _cache_folder(environment: Mapping[str, str]) -> Path:
    home_folder = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(environment.get("HF_HUB_CACHE") or Path(home_folder) / "hub").expanduser()


def _is_cached(cache: Path, model: str) -> bool:
    snapshots = cache / f"models--{model.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())
