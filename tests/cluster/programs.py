"""Stand-ins for a site's commands, found before the system's own."""

import os
from pathlib import Path

import pytest


class Programs:
    """Writes commands into a folder that is first on the PATH, and records their calls."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def add(self, name: str, script: str) -> None:
        """Adds a command. Each call records its arguments, and its stdin if `script` reads it."""
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "$*" >>{self.folder}/{name}.calls\n{script}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """The recorded calls of a command."""
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []
