"""Output of the verbs: data goes to stdout, warnings and progress go to stderr."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDE: Final = 240
"""Width in columns if stdout is not a terminal, so that tables are not folded."""


def print_value(value: "RenderableType | Mapping[str, Any] | list[Any]", *, fold: bool = True) -> int:
    """Prints a mapping or list as JSON, anything else with rich. `fold=False` keeps long lines whole, so that they can
    be copied."""
    if isinstance(value, Mapping | list):
        print(json.dumps(value, indent=1, ensure_ascii=False))
        return 0
    from rich.console import Console

    console = Console(markup=False) if sys.stdout.isatty() else Console(width=WIDE, markup=False)
    console.print(value, soft_wrap=not fold)
    return 0


def print_lines(lines: Iterable[str]) -> int:
    for line in lines:
        print(line)
    return 0


def print_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        sys.stderr.write(f"hpc-router: warning: {warning}\n")


def stderr_console() -> "Console":
    from rich.console import Console

    return Console(stderr=True, markup=False)
