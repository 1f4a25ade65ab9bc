"""Settings of a router that serves: kept in `desired.json`, taken over by the router, without an end to any stream."""

from collections.abc import Mapping, Sequence
from typing import Any

from hpc_router.cluster.control_loop.desired_state import deployment_of
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError
from hpc_router.router.settings import KEY, settings_in, with_settings
from hpc_router.state.run_directory import RunDir


def parse_settings(words: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """`router.max_in_flight=100` -> its text; `router.max_in_flight=` -> a key to be as in the config again."""
    values: dict[str, str | None] = {}
    back: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise ConfigError(f"set: '{word}' is not KEY=VALUE (valid: for example router.max_in_flight=500)")
        if text:
            values[key] = _scalar(text)
        else:
            back.append(key)
    return values, back


def _scalar(text: str) -> str | None:
    """A value as typed; without its quotes, and None for null."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return None if text.lower() in ("null", "~") else text


def change(run: RunDir, values: Mapping[str, Any], back: Sequence[str]) -> dict[str, Any]:
    """All settings that differ from the config's now, as their fields hold them. Raises ConfigError."""
    wishes = run.read_desired()
    given = {k: v for k, v in {**settings_in(wishes), **values}.items() if k not in back}
    changed = with_settings(deployment_of(run), given)
    settings = {key: _value_of(changed, key) for key in given}
    run.write_desired({**wishes, KEY: settings})
    run.event("set", settings=settings)
    return settings


def _value_of(deployment: Deployment, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(deployment, section), name)
