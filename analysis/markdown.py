"""Parts of the reports in Markdown."""

from collections.abc import Iterable, Iterator, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Yields the lines of a table with these titles and cells."""
    yield "| " + " | ".join(columns) + " |"
    yield "| " + " | ".join("---" for _ in columns) + " |"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"


def interval(value: Sequence[float]) -> str:
    """Returns a value with its interval, from its three numbers: the value, the lowest and the highest."""
    return f"{value[0]:.4f} ({value[1]:.3f} to {value[2]:.3f})"
