"""Writes `registry.json`: the whole registry in one file, for people and scripts, written by the leading router."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from hpc_router.state.atomic_files import replace_json
from hpc_router.state.io_thread import FileThread
from hpc_router.state.registry import SCHEMA, Record, RegistryReader, leading_router, split_replica
from hpc_router.state.run_directory import RunDir


class RegistryFile:
    """The writer of `registry.json`, which is active while this router leads. `replica`: name of this router."""

    def __init__(self, run: RunDir, replica: str, files: FileThread) -> None:
        self._run, self._replica, self._files = run, replica, files
        self._content: Mapping[str, Any] | None = None
        self._left = False

    def keep(self, snapshot: Mapping[str, Record]) -> None:
        """Writes the records of `snapshot` to the file in the background, if this router leads and a record has changed
        since the last write."""
        leader = leading_router(snapshot)
        if leader is None or leader.replica != self._replica or self._left:
            return
        content = registry_file(snapshot)
        if content != self._content:
            self._content = content
            self._files.post(partial(replace_json, self._run.registry_json, content))

    def leave(self) -> None:
        """Writes the file once more without this router, whose record was withdrawn, unless its successor writes it."""
        self._left = True
        if self._content is not None:
            self._files.post(self._write_last)

    def _write_last(self) -> None:
        others = {name: r for name, r in RegistryReader(self._run.registry).snapshot().items() if name != self._replica}
        leader = leading_router(others)
        if leader is None or leader.generation < split_replica(self._replica)[2]:  # else the successor writes the file
            replace_json(self._run.registry_json, registry_file(others))


def registry_file(records: Mapping[str, Record]) -> dict[str, Any]:
    """Returns the content of `registry.json`."""
    return {"schema": SCHEMA, "records": [records[name].to_json() for name in sorted(records)]}
