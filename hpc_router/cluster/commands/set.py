"""Changes settings of a running router in `desired.json`; the router applies them without ending any stream."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final, get_origin

from hpc_router.cluster.control_loop.desired_state import deployment_of
from hpc_router.config.assignments import unique
from hpc_router.config.schema import RouterConfig
from hpc_router.errors import ConfigError
from hpc_router.router.settings import KEY, settings_in, value_at, with_settings
from hpc_router.state.run_directory import RunDir

_LISTS: Final = frozenset(f"router.{item.name}" for item in fields(RouterConfig) if get_origin(item.type) is list)
"""Keys whose value is a list of texts. These contain no commas."""


def parse_settings(words: Sequence[str]) -> tuple[dict[str, str | list[str] | None], list[str]]:
    """Returns the values to set and the keys to reset. The word `router.max_in_flight=100` sets a value;
    `router.max_in_flight=` resets the key to the config's value. A list is written with commas, with or without
    brackets. Raises ConfigError for other words."""
    values: dict[str, str | list[str] | None] = {}
    reset: list[str] = []
    pairs = []
    for word in words:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise ConfigError(f"set: '{word}' is not KEY=VALUE (valid: for example router.max_in_flight=500)")
        pairs.append((key, text))
    for key, text in unique(pairs, where="set").items():
        if text and key in _LISTS:
            items = text.removeprefix("[").removesuffix("]").split(",")
            values[key] = [item.strip().strip("'\"") for item in items if item.strip()]
        elif text:
            values[key] = _scalar(text)
        else:
            reset.append(key)
    return values, reset


def _scalar(text: str) -> str | None:
    """Returns `text` without quotes around it; None for `null` or `~`."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return None if text.lower() in ("null", "~") else text


def change(run: RunDir, values: Mapping[str, Any], reset: Sequence[str]) -> dict[str, Any]:
    """Sets the keys in `values`, and resets those in `reset` to the config's values. Returns all settings that now
    override the config, each with the type of its field. Raises ConfigError for a key or value that is not valid."""
    deployment, settings = deployment_of(run), dict[str, Any]()

    def changes(desired: Mapping[str, Any]) -> dict[str, Any]:
        given = {k: v for k, v in {**settings_in(desired), **values}.items() if k not in reset}
        changed = with_settings(deployment, given)
        settings.update({key: value_at(changed, key) for key in given})
        return {KEY: settings}

    run.change_desired(changes)
    run.event("set", settings=settings)
    return settings
