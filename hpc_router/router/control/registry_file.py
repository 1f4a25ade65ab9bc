"""Writes the files by which other programs find the deployment, while this router leads: `registry.json`, the whole
registry in one file, for people and scripts; `prometheus_sd.json`, with the router's address, for Prometheus; and the
address in the share folder, for other users."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from hpc_router.net import protocol
from hpc_router.router.control.shared_address import SharedAddress
from hpc_router.state.atomic_files import replace_json, replace_text
from hpc_router.state.io_thread import FileThread
from hpc_router.state.registry import SCHEMA, Record, RegistryReader, leading_router, split_replica
from hpc_router.state.run_directory import RunDir


class RegistryFile:
    """Writes the files while this router leads. `replica`: name of this router. `shared`: its address in the share
    folder; None if it is not shared."""

    def __init__(self, run: RunDir, replica: str, files: FileThread, shared: SharedAddress | None = None) -> None:
        self._run, self._replica, self._files, self._shared = run, replica, files, shared
        self._content: Mapping[str, Any] | None = None
        self._targets: str | None = None
        self._left = False
        self.leads = False
        """Whether this router leads, as the last `keep` has seen."""

    def keep(self, snapshot: Mapping[str, Record]) -> None:
        """If this router leads and the content of the files has changed, writes them in the background. `snapshot`: the
        records of the registry."""
        leader = leading_router(snapshot)
        self.leads = leader is not None and leader.replica == self._replica and not self._left
        if leader is None or not self.leads:
            return
        content = registry_file(snapshot)
        if content != self._content:
            self._content = content
            self._files.post(partial(replace_json, self._run.registry_json, content))
        targets = prometheus_targets(leader, self._run.path.name)
        if targets != self._targets:
            self._targets = targets
            self._files.post(partial(replace_text, self._run.prometheus_sd_json, targets))
        if self._shared is not None:
            self._files.post(partial(self._shared.keep, leader))

    def leave(self) -> None:
        """Writes the files once more, without this router, after its record was withdrawn. Does nothing if a successor
        leads, which then writes them."""
        self._left, self.leads = True, False
        if self._content is not None:
            self._files.post(self._write_last)

    def _write_last(self) -> None:
        others = {name: r for name, r in RegistryReader(self._run.registry).snapshot().items() if name != self._replica}
        leader = leading_router(others)
        if leader is None or leader.generation < split_replica(self._replica)[2]:  # else the successor writes the file
            replace_json(self._run.registry_json, registry_file(others))
            replace_text(self._run.prometheus_sd_json, prometheus_targets(leader, self._run.path.name))
            if self._shared is not None:
                self._shared.leave()


def registry_file(records: Mapping[str, Record]) -> dict[str, Any]:
    """Returns the content of `registry.json` for the registry's `records`."""
    return {"schema": SCHEMA, "records": [records[name].to_json() for name in sorted(records)]}


def prometheus_targets(router: Record | None, run: str) -> str:
    """Returns the content of `prometheus_sd.json`, in the format of Prometheus' `file_sd_configs`. Its only target is
    the address of `router`; with None, it has no target. `run`: name of the run directory, for the label `run`."""
    if router is None:
        return "[]\n"
    parts = urlsplit(router.url)
    labels = {"__scheme__": parts.scheme, "__metrics_path__": protocol.METRICS, "run": run}
    return json.dumps([{"targets": [parts.netloc], "labels": labels}], indent=1) + "\n"
