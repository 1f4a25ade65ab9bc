"""Words of a command line that assign values to names, such as `math=3`."""

from collections.abc import Iterable
from typing import TypeVar

from hpc_router.errors import ConfigError

T = TypeVar("T")


def unique(pairs: Iterable[tuple[str, T]], *, where: str) -> dict[str, T]:
    """Returns {name: value}. Raises ConfigError if a name occurs twice. `where`: the verb or option, for that error."""
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"{where}: '{name}' is given twice")
        found[name] = value
    return found
