"""Settings of a router that serves: kept in `desired.json`, taken over by the router, without an end to any stream."""

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hpc_router.cluster.desired import deployment_of
from hpc_router.errors import ConfigError
from hpc_router.router.settings import KEY, settings_in, with_settings
from hpc_router.rundir import RunDir


def parse_settings(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """`router.max_in_flight=100` -> the value; `router.max_in_flight=` -> a key to be as in the config again."""
    values: dict[str, Any] = {}
    back: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise ConfigError(f"set: '{word}' is not KEY=VALUE (valid: for example router.max_in_flight=500)")
        if not text:
            back.append(key)
            continue
        try:
            values[key] = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[index, call-overload]
        except (OmegaConfBaseException, YAMLError) as error:
            raise ConfigError(f"set: '{word}': the value cannot be read", key=key) from error
    return values, back


def change(run: RunDir, values: dict[str, Any], back: Sequence[str]) -> dict[str, Any]:
    """All settings that differ from the config's now. Raises ConfigError."""
    wishes = run.read_desired()
    settings = {k: v for k, v in {**settings_in(wishes), **values}.items() if k not in back}
    with_settings(deployment_of(run), settings)
    run.write_desired({**wishes, KEY: settings})
    run.event("set", settings=settings)
    return settings
