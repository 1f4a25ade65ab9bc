"""Reads descriptions of labels: a folder of expert files, a run's `config.yaml`, or a file {label: text}."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import yaml
from yaml import YAMLError

from hpc_router.config.frozen import yaml_error_text
from hpc_router.errors import ConfigError


def read_descriptions(path: Path, *, labels: Collection[str]) -> dict[str, str]:
    """Returns the descriptions of `labels` that are not empty; other names in the file are ignored.

    In a folder, `NAME.yaml` has the key `description`. A file is YAML or JSON: {label: text}, {label: {description:
    text}}, or either of them under the key `experts`. Raises ConfigError if no label has a description.
    """
    texts = {name: _text(value, place) for name, value, place in _entries(path)}
    found = {name: text.strip() for name, text in texts.items() if name in labels and text.strip()}
    if not found:
        raise ConfigError(f"descriptions={path}: it describes none of the labels {', '.join(sorted(labels))}")
    return dict(sorted(found.items()))


def read_exemplars(path: Path, *, labels: Collection[str]) -> list[tuple[str, str]]:
    """Returns the exemplars of `labels` in the same files, as pairs of label and prompt; empty if there are none."""
    found: list[tuple[str, str]] = []
    for name, value, _ in _entries(path):
        exemplars = value.get("exemplars") if isinstance(value, Mapping) else None
        if name in labels and isinstance(exemplars, list):
            found += ((name, text) for text in exemplars if isinstance(text, str) and text.strip())
    return found


def _entries(path: Path) -> Iterator[tuple[str, object, str]]:
    """Yields each name with its content and the place for errors."""
    if path.is_dir():
        for file in sorted(path.glob("*.yaml")):
            yield file.stem, _load(file), f"{file}"
        return
    content = _load(path)
    experts = content.get("experts")
    for name, value in (experts if isinstance(experts, Mapping) else content).items():
        yield str(name), value, f"{path}: '{name}'"


def _text(value: object, place: str) -> str:
    text = value.get("description", "") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise ConfigError(f"descriptions: {place} is of type {type(text).__name__}; a description must be text")
    return text


def _load(path: Path) -> Mapping[object, object]:
    try:
        with path.open(encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except OSError as error:
        raise ConfigError(f"descriptions={path}: {error.strerror or error}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"descriptions: {yaml_error_text(error, str(path))}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"descriptions={path}: not a mapping of labels to descriptions")
    return content
