"""Where a config value came from: the override or the file to edit.

Asked only after something was found wrong. Hydra's composed result does not know, so its own list of files is walked
again, last winner first. Whatever Hydra cannot tell is left out of the message, never guessed.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from hpc_router.errors import ConfigError
from hpc_router.frozen import shown


def parse_override(text: str) -> Override:
    """Hydra's view of one override. Raises ConfigError naming it."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        first = str(error).split("\n", 1)[0]
        raise ConfigError(
            f"override '{text}': {first} (valid: key=value, a group's topology=name, ~key; "
            "quote values with special characters: key='a, b')"
        ) from error


def place_of(key: str, overrides: Sequence[str]) -> str:
    """`override 'router.port=x': ` or `my/topology/a.yaml: ` for the value at `key`; empty when nobody knows.

    Call it while Hydra is initialised.
    """
    for text in reversed(overrides):
        override = parse_override(text)
        if _touches(override.key_or_group, key):
            return f"override '{text}': "
    for path, package, content in reversed(list(_files(overrides))):
        if _has(content, _below(key, package)):
            return f"{path}: "
    return ""


def _touches(overridden: str, key: str) -> bool:
    return key == overridden or key.startswith(f"{overridden}.") or overridden.startswith(f"{key}.")


def _files(overrides: Sequence[str]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Every file of the composition: where it lies, the key it is put below, what it says."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    loader = hydra.config_loader
    chosen = loader.compute_defaults_list("deploy", list(overrides), RunMode.MULTIRUN)
    sources = [source for source in loader.get_sources() if source.scheme() == "file"]
    for default in chosen.defaults:
        if default.config_path is None:
            continue
        for source in sources:
            path = Path(source.path) / f"{default.config_path}.yaml"
            if path.is_file():
                yield shown(path), default.package or "", _content(path)
                break


def _content(path: Path) -> Mapping[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(path))
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _below(key: str, package: str) -> list[str] | None:
    """The path of `key` inside a file that is put below `package`; None where it cannot be."""
    parts, prefix = key.split("."), package.split(".") if package else []
    return parts[len(prefix) :] if parts[: len(prefix)] == prefix else None


def _has(content: Any, parts: list[str] | None) -> bool:
    if not parts:
        return False
    for part in parts:
        if not isinstance(content, Mapping):
            return False
        named = {str(name): value for name, value in content.items()}
        if part not in named:
            return False
        content = named[part]
    return True
