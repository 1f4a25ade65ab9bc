"""Checks a deployment for conditions between several fields, and for the form of names and addresses.

Every error names the key and what is valid. Nothing here depends on the machine; `cluster.planning` checks that.
"""

import ipaddress
import re
import shlex
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from hpc_router.config.adapters import check_adapter, hosts
from hpc_router.config.parsing import check_values
from hpc_router.config.schema import (
    EXPERT_NAME,
    RESERVED_NAMES,
    ClusterConfig,
    Deployment,
    ExpertConfig,
    ResourceConfig,
    RouterConfig,
    VllmOptions,
    options_of,
)
from hpc_router.config.slurm_options import (
    check_environment,
    check_not_empty,
    check_one_line,
    check_options,
    check_script,
)
from hpc_router.errors import ConfigError, suggest

_RUN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HOST: Final = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
_ORIGIN: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?)(:(?P<port>[1-9][0-9]{0,4}))?"
)
ACCEPTS: Final = ("text", "image", "audio", "tools", "embeddings")
"""Kinds of input in `experts.E.accepts` and in the registry."""
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
"""The default port of each URL scheme. Browsers leave it out of an origin."""
_INTERFACE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.:@-]{0,14}")
_SPANS_NODES: Final = ("vllm", "sim")
"""Kinds of engine of which one replica can run on several nodes."""


def check(deployment: Deployment) -> None:
    """Raises ConfigError for the first invalid value of a deployment."""
    check_values(deployment, at="")
    check_one_line("name", deployment.name)
    if not _RUN_NAME.fullmatch(deployment.name):
        valid = "letters, digits, '.', '-' and '_', at most 63"
        raise ConfigError(f"name={deployment.name}: cannot name a run directory (valid: {valid})", key="name")
    check_not_empty("runs", deployment.runs)
    _check_cluster(deployment.cluster)
    check_router(deployment.router)
    _check_router_job(deployment.router.resources, deployment.cluster)
    for name, expert in deployment.experts.items():
        if expert.adapter_of is not None:
            check_adapter(name, deployment.experts)
        _check_expert(name, expert, deployment.cluster)
    _check_gpus(deployment)
    if deployment.experts:
        check_fallback(deployment.policy.fallback, deployment.experts)
        _check_classifier(deployment)


def _check_gpus(deployment: Deployment) -> None:
    """Raises ConfigError if the deployment's configured replicas have more GPUs together than `cluster.max_gpus`."""
    most = deployment.cluster.max_gpus
    if most is None:
        return
    used = {name: e.replicas * e.resources.total_gpus for name, e in hosts(deployment.experts).items()}
    if sum(used.values()) > most:
        each = ", ".join(f"{name} {gpus}" for name, gpus in used.items() if gpus)
        raise ConfigError(
            f"cluster.max_gpus={most}: the replicas have {sum(used.values())} GPUs ({each}; valid: that or more, or "
            "fewer replicas)",
            key="cluster.max_gpus",
        )


def _check_elastic(at: str, expert: ExpertConfig, cluster: ClusterConfig) -> None:
    """Raises ConfigError if `min_replicas` or `max_replicas` of the expert contradicts `replicas` or
    `cluster.replicas_per_job`. `at`: the expert's key."""
    if expert.min_replicas is None and expert.max_replicas is None:
        return
    limits = ((expert.min_replicas, "min_replicas", 1), (expert.max_replicas, "max_replicas", -1))
    for limit, name, sign in limits:
        if limit is not None and sign * limit > sign * expert.replicas:
            valid = f"{expert.replicas} or {'less' if sign > 0 else 'more'}, or another {at}.replicas"
            raise ConfigError(
                f"{at}.{name}={limit}: {at}.replicas={expert.replicas} is outside of it (valid: {valid})",
                key=f"{at}.{name}",
            )
    if cluster.replicas_per_job > 1:
        raise ConfigError(
            f"{at}.{'min' if expert.max_replicas is None else 'max'}_replicas: the replicas of one job end together, "
            f"so their number cannot follow demand with cluster.replicas_per_job={cluster.replicas_per_job} (valid: 1)",
            key="cluster.replicas_per_job",
        )


def check_router(router: RouterConfig) -> None:
    if router.host is not None:
        check_host("router.host", router.host)
    for origin in router.allowed_origins:
        _check_origin(origin)
    _check_tls(router)
    _check_share(router)
    if router.eject_most_s < router.eject_s:
        key = "router.eject_most_s"
        valid = f"router.eject_s={router.eject_s:g} or more"
        raise ConfigError(f"{key}={router.eject_most_s:g}: shorter than the first ejection (valid: {valid})", key=key)


def _check_tls(router: RouterConfig) -> None:
    for name, path, other in (
        ("tls_cert", router.tls_cert, router.tls_key),
        ("tls_key", router.tls_key, router.tls_cert),
    ):
        key = f"router.{name}"
        if path is None and other is not None:
            raise ConfigError(f"{key}=null: HTTPS needs both router.tls_cert and router.tls_key", key=key)
        if path is not None and not path.startswith("/"):
            raise ConfigError(f"{key}={path}: not an absolute path (valid: /path/to/file.pem)", key=key)


def _check_share(router: RouterConfig) -> None:
    if router.share_group is not None:
        check_not_empty("router.share_group", router.share_group)
    if (router.share_dir is None) != (router.share_group is None):
        key = f"router.{'share_dir' if router.share_dir is None else 'share_group'}"
        raise ConfigError(f"{key}=null: sharing needs both router.share_dir and router.share_group", key=key)
    if router.share_dir is not None and not router.share_dir.startswith("/"):
        key = "router.share_dir"
        raise ConfigError(f"{key}={router.share_dir}: not an absolute path (valid: /path/to/folder)", key=key)
    if router.share_dir is not None and router.open:
        raise ConfigError("router.open=true: a shared router needs tokens (valid: false)", key="router.open")


def _check_origin(origin: str) -> None:
    """Raises ConfigError unless `origin` is `*` or has the form of an Origin header, such as `https://example.org`."""
    if origin == "*" or _is_origin(origin):
        return
    key, near = "router.allowed_origins", _nearest_origin(origin)
    hint = f"; did you mean '{near}'?" if near is not None else ""
    valid = (
        "scheme://host or scheme://host:port as browsers send it, such as http://localhost:3000, or * for every page"
    )
    raise ConfigError(f"{key}: '{origin}' is not the origin of a web page{hint} (valid: {valid})", key=key)


def _is_origin(text: str) -> bool:
    found = _ORIGIN.fullmatch(text)
    if found is None:
        return False
    port = found["port"]
    return port is None or (int(port) < 2**16 and port != _DEFAULT_PORTS.get(found["scheme"]))


def _nearest_origin(text: str) -> str | None:
    """Returns the origin in a URL that the user wrote in place of an origin; None if there is none."""
    try:
        parts = urlsplit(text.strip().lower())
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return None
    host = f"[{host}]" if ":" in host else host
    near = f"{parts.scheme}://{host}"
    if port is not None and str(port) != _DEFAULT_PORTS.get(parts.scheme):
        near += f":{port}"
    return near if _is_origin(near) else None


def check_host(key: str, host: str) -> None:
    """Raises ConfigError if `host` does not have the form of a host name or an IP address."""
    check_not_empty(key, host)
    try:
        ipaddress.ip_address(host)
    except ValueError as error:
        if not _HOST.fullmatch(host) or len(host) > 253 or host.replace(".", "").isdecimal():
            valid = "a host's name such as node7, or an address such as 10.1.2.3 or 0.0.0.0; the port is router.port"
            problem = f"{key}={host}: neither a host's name nor an address (valid: {valid})"
            raise ConfigError(problem, key=key) from error


def check_fallback(fallback: str | None, experts: Iterable[str]) -> None:
    names = list(experts)
    if fallback is not None and fallback not in names:
        key = "policy.fallback"
        raise ConfigError(f"{key}: no expert is named '{fallback}'{suggest(fallback, names)}", key=key)


def check_fabric(fabric: str) -> None:
    """Raises ConfigError if `fabric` does not have the form of an interface name, a network or an IP address."""
    key, valid = "cluster.fabric", "an interface such as ib0, a network such as 10.1.0.0/16, an address"
    check_not_empty(key, fabric)
    try:
        nearest = str(ipaddress.ip_network(fabric, strict=False))
    except ValueError as error:
        if _INTERFACE.fullmatch(fabric):
            return
        raise ConfigError(f"{key}={fabric}: {error} (valid: {valid})", key=key) from error
    if "/" in fabric and nearest.partition("/")[0] != str(ipaddress.ip_interface(fabric).ip):
        problem = f"has bits beyond its mask; did you mean '{nearest}'? (valid: {valid})"
        raise ConfigError(f"{key}={fabric}: {problem}", key=key)


def _check_cluster(cluster: ClusterConfig) -> None:
    if cluster.fabric is not None:
        check_fabric(cluster.fabric)
    if cluster.stage_to is not None:
        check_not_empty("cluster.stage_to", cluster.stage_to)
    if cluster.notify is not None:
        notify_command(cluster.notify)
    if cluster.kind == "local":
        _check_no_slurm(cluster)
    check_options("cluster", cluster, warn_s=cluster.warn_s)
    check_script(cluster)


def notify_command(notify: str) -> list[str] | None:
    """Returns the words of the command in `cluster.notify`; None if the value is a mail address. Raises ConfigError if
    it is neither."""
    key = "cluster.notify"
    try:
        words = shlex.split(notify)
    except ValueError as error:
        raise ConfigError(f"{key}={notify}: not a command: {error}", key=key) from error
    if not words:
        raise ConfigError(f"{key}: it is empty (valid: a mail address, or a command with arguments)", key=key)
    return None if len(words) == 1 and "@" in words[0] and "/" not in words[0] else words


def _check_no_slurm(cluster: ClusterConfig) -> None:
    """Raises ConfigError if a key for Slurm is set although `cluster.kind` is `local`. Without this check, a site's
    file that lacks `kind: slurm` would start the engines on the login node."""
    for name in ("partition", "account", "qos", "reservation"):
        if getattr(cluster, name) is not None:
            key = f"cluster.{name}"
            raise ConfigError(
                f"{key}={getattr(cluster, name)}: this key is for Slurm, and cluster.kind is local; set `kind: slurm`",
                key=key,
            )


def _check_router_job(resources: ResourceConfig, cluster: ClusterConfig) -> None:
    _check_resources("router.resources", resources, cluster)
    if resources.nodes != 1:
        key = "router.resources.nodes"
        raise ConfigError(f"{key}={resources.nodes}: a router runs on one node (valid: 1)", key=key)


def _check_resources(at: str, resources: ResourceConfig, cluster: ClusterConfig) -> None:
    """Checks the resources at the key `at`, those of the router or of one expert. Raises ConfigError."""
    check_options(at, resources, warn_s=cluster.warn_s)
    have = 0 if cluster.gpus is None and cluster.kind == "local" else cluster.gpus
    if have is not None and resources.gpus > have:
        raise ConfigError(f"{at}.gpus={resources.gpus}: a node has cluster.gpus={have}", key=f"{at}.gpus")


def _check_classifier(deployment: Deployment) -> None:
    policy = deployment.policy
    if policy.min_confidence is not None and policy.margin is not None:
        raise ConfigError(
            f"policy.min_confidence={policy.min_confidence:g} and policy.margin={policy.margin:g} both say when the "
            "fallback is used: set one of them to null",
            key="policy.min_confidence",
        )
    if deployment.policy.kind != "classifier" or deployment.policy.artefact is not None:
        return
    with_exemplars = [name for name, expert in deployment.experts.items() if expert.exemplars]
    if len(with_exemplars) < 2:
        raise ConfigError(
            "policy=classifier needs policy.artefact=DIR or exemplars of at least two experts; "
            f"exemplars were given for: {', '.join(with_exemplars) or 'none'} (policy=model_field needs neither)"
        )


def _check_expert(name: str, expert: ExpertConfig, cluster: ClusterConfig) -> None:
    at = f"experts.{name}"
    if not EXPERT_NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise ConfigError(
            f"{at}: '{name}' cannot name an expert (valid: lower-case letters, digits, '-' and '_', at most 63, "
            f"not {' or '.join(sorted(RESERVED_NAMES))})",
            key=at,
        )
    if not expert.model:
        raise ConfigError(f"{at}.model is empty (valid: a model folder or a hub id)", key=f"{at}.model")
    check_one_line(f"{at}.model", expert.model)
    check_environment(f"{at}.engine.env", expert.engine.env)
    for kind in expert.accepts or ():
        if kind not in ACCEPTS:
            raise ConfigError(f"{at}.accepts={kind}: no kind of input{suggest(kind, ACCEPTS)}", key=f"{at}.accepts")
    _check_resources(f"{at}.resources", expert.resources, cluster)
    if expert.adapter_of is not None:
        return
    _check_elastic(at, expert, cluster)
    options = options_of(name, expert.engine)
    if expert.resources.nodes > 1:
        _check_several_nodes(at, expert, cluster)
    if isinstance(options, VllmOptions):
        _check_vllm(at, expert, options)


def _check_several_nodes(at: str, expert: ExpertConfig, cluster: ClusterConfig) -> None:
    key, nodes, kind = f"{at}.resources.nodes", expert.resources.nodes, expert.engine.kind
    if cluster.kind == "local":
        raise ConfigError(f"{key}={nodes}: cluster=local is one node", key=key)
    if kind not in _SPANS_NODES:
        valid = f"1, or engine.kind {' or '.join(_SPANS_NODES)}"
        raise ConfigError(f"{key}={nodes}: the engine '{kind}' does not span nodes (valid: {valid})", key=key)
    if cluster.replicas_per_job > 1:
        problem = f"cluster.replicas_per_job={cluster.replicas_per_job} puts several replicas on one node"
        raise ConfigError(f"{key}={nodes}: {problem} (valid: one of the two is 1)", key=key)
    own = expert.resources.exclusive
    if not (cluster.exclusive if own is None else own) and not cluster.trusted_network:
        raise ConfigError(
            f"{key}={nodes}: an engine's ranks communicate without authentication, so on shared nodes any user "
            f"could connect to them (valid: {at}.resources.exclusive=true for whole nodes, or "
            f"cluster.trusted_network=true if all users of the network are trusted)",
            key=key,
        )


def _check_vllm(at: str, expert: ExpertConfig, options: VllmOptions) -> None:
    tensor, pipeline = options.tensor_parallel_size, options.pipeline_parallel_size
    nodes, gpus = expert.resources.nodes, expert.resources.gpus
    if options.device == "cpu" and nodes > 1 and tensor * pipeline != nodes:
        raise ConfigError(
            f"{at}: tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} = {tensor * pipeline} ranks, but "
            f"{at}.resources.nodes={nodes}, and on CPUs each node runs one; make them equal",
            key=f"{at}.engine.options",
        )
    if options.device == "cuda" and tensor * pipeline != nodes * gpus:
        raise ConfigError(
            f"{at}: tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} = {tensor * pipeline} GPUs, but "
            f"{at}.resources ask for {nodes} node(s) x {gpus} GPUs = {nodes * gpus}; make them equal",
            key=f"{at}.engine.options",
        )
