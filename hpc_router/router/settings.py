"""Applies the changes in `desired.json` to a config, as far as they take effect while a router serves. No I/O.

In `desired.json`, `settings` has config keys with their values, and `replicas` the counts that `scale` has set. The
values that a process needs at its start (address, number of workers, access) stay until the router is restarted.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from functools import reduce
from operator import getitem
from typing import Any, Final

from hpc_router.config.adapters import host_of
from hpc_router.config.elastic import is_elastic
from hpc_router.config.parsing import parse, type_at
from hpc_router.config.schema import Deployment, PolicyConfig, RouterConfig
from hpc_router.config.validation import check
from hpc_router.errors import ConfigError, suggest

KEY: Final = "settings"
_FIXED: Final = frozenset(
    {
        *("place", "resources", "host", "port", "workers", "open", "reconcile", "standby", "drain_s", "max_body_mb"),
        *("tls_cert", "tls_key", "share_dir", "share_group"),
    }
)


def _keys(schema: type, at: str, *, without: Collection[str] = ()) -> Iterator[str]:
    """Yields the keys of the section with this `schema`, and those of its inner sections. `at`: the section's own key;
    `without`: names to leave out."""
    for item in fields(schema):
        if item.name in without:
            continue
        key = f"{at}.{item.name}"
        if isinstance(item.type, type) and is_dataclass(item.type):
            yield from _keys(item.type, key)
        else:
            yield key


LIVE: Final = (*_keys(PolicyConfig, "policy"), *_keys(RouterConfig, "router", without=_FIXED))
"""The config keys that can be set while a router serves."""


def value_at(deployment: Deployment, key: str) -> Any:
    """Returns the value of one of the keys in `LIVE`."""
    return reduce(getattr, key.split("."), deployment)


def with_settings(deployment: Deployment, settings: Mapping[str, Any]) -> Deployment:
    """Returns the deployment with these settings. Raises ConfigError for a key that cannot change and for an invalid
    value."""
    sections: dict[str, Any] = {"policy": asdict(deployment.policy), "router": asdict(deployment.router)}
    for key, value in settings.items():
        if key not in LIVE:
            raise ConfigError(_refusal(key), key=key)
        *path, name = key.split(".")
        reduce(getitem, path, sections)[name] = value
    changed = replace(
        deployment,
        policy=parse(PolicyConfig, sections["policy"], at="policy"),
        router=parse(RouterConfig, sections["router"], at="router"),
    )
    check(changed)
    return changed


def _refusal(key: str) -> str:
    """Returns the error text for a key that is not in `LIVE`: why it cannot be set, and which command changes it."""
    section, *path = parts = key.split(".")
    if section == "experts" and len(path) == 2 and path[1] == "replicas":
        return f"{key}: `hpc-router scale {path[0]}=N` changes the number of replicas"
    if path and type_at(Deployment, parts) is not None:
        return f"{key}: `hpc-router apply {key}=VALUE` changes it, and replaces the jobs that use it"
    if section in ("policy", "router"):
        return f"'{key}' is not a key of the config{suggest(key, LIVE)}"
    return f"'{key}' is not a key of the config (keys that can be set: {', '.join(LIVE)})"


def with_desired(deployment: Deployment, desired: Mapping[str, Any]) -> Deployment:
    """Returns the deployment with the settings and replica counts of `desired`, the content of `desired.json`. An
    elastic expert keeps its count, because that follows the demand. Raises ConfigError for invalid settings."""
    changed = with_settings(deployment, settings_in(desired))
    counts = desired.get("replicas")
    if not isinstance(counts, dict):
        return changed
    experts = {
        name: replace(expert, replicas=counts[name])
        if type(counts.get(name)) is int and not is_elastic(expert)
        else expert
        for name, expert in changed.experts.items()
    }
    return replace(changed, experts=experts)


def scaled_to_zero(deployment: Deployment) -> dict[str, str]:
    """Returns the experts whose number of replicas is 0 and is not raised on demand. For each, the value is the expert
    to scale up before it can serve: itself, or for an adapter its host."""
    hosts = {name: host_of(deployment.experts, name) for name in deployment.experts}
    absent = {name for name, e in deployment.experts.items() if e.replicas == 0 and not is_elastic(e)}
    return {name: host for name, host in hosts.items() if host in absent}


def settings_in(desired: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the settings in the content of `desired.json`. Raises ConfigError if they are not a mapping."""
    value = desired.get(KEY, {})
    if not isinstance(value, dict):
        raise ConfigError(f"desired.json: '{KEY}' is not a mapping of keys to values")
    return value
