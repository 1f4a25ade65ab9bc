"""Draws docstrings of the package for a reader to judge: `python -m tests.support.draw_docstrings SEED [NUMBER]`.

Prints NUMBER (default 40) docstrings of modules, classes and functions with their definition. They are drawn by
`random.Random(SEED)` from all of them in order of file and line, so a seed names the same docstrings in the same tree.
"""

import ast
import random
import sys
from pathlib import Path

import hpc_router

ROOT = Path(hpc_router.__file__).parent


def docstrings() -> list[tuple[str, str, str]]:
    """Returns (`file:line`, definition, docstring) of each docstring, in order of file and line."""
    found: list[tuple[Path, int, str, str]] = []
    for path in ROOT.rglob("*.py"):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, kinds) and (text := ast.get_docstring(node)) is not None:
                first = 0 if isinstance(node, ast.Module) else node.lineno
                definition = " ".join(line.strip() for line in lines[first - 1 : node.body[0].lineno - 1] if first)
                found.append((path.relative_to(ROOT.parent), first, definition, text))
    return [(f"{path}:{max(line, 1)}", definition, text) for path, line, definition, text in sorted(found)]


if __name__ == "__main__":
    everything = docstrings()
    number = int(sys.argv[2]) if len(sys.argv) > 2 else 40
    sys.stdout.write(f"{number} of {len(everything)} docstrings, seed {sys.argv[1]}\n")
    for place, definition, text in random.Random(int(sys.argv[1])).sample(everything, number):
        sys.stdout.write(f"\n{place}  {definition}\n    {text.replace(chr(10), chr(10) + '    ')}\n")
