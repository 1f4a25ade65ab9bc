"""Who the leading router is, as the registry says now: the only one that a client may send the owner's token to, once
it has proven itself (`proof`).

Rules: `registry.json` names the leader and the leader's own record must agree, for the file outlives a router that has
left. Where they differ, or a request failed (`doubt`), the records in the folder decide. A file of another user names
nobody. While the file system answers with errors or not at all, the last view stands.
"""

import logging
import os
import threading
from pathlib import Path
from typing import Any

from hpc_router.errors import HpcRouterError, RegistryError
from hpc_router.state.atomic_files import read_json
from hpc_router.state.registry import Reader, Record, RecordKind, State, leading_router
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)


class NoRouterError(HpcRouterError):
    """No router of the run serves, or none came in time."""


class Leader:
    """Looks at one run again and again, from any thread; opens only files that changed since the last look."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._summary = _JsonFile(run.registry_json)
        self._own: _JsonFile | None = None
        self._reader = Reader(run.registry)
        self._view: Record | None = None
        self._looked = False
        self._looking = threading.Lock()

    @property
    def view(self) -> Record | None:
        """What the last look saw."""
        return self._view

    def look(self, *, doubt: bool = False) -> Record | None:
        """One look at a time: while another thread's hangs or works, its last view will do."""
        if not self._looking.acquire(blocking=doubt or not self._looked):
            return self._view
        try:
            self._view = self._find(doubt=doubt)
            self._looked = True
        except FileNotFoundError:  # the run directory was removed
            self._view = None
        except OSError as error:
            logger.warning("the registry of %s cannot be read, the last view stands: %s", self._run.path, error)
        finally:
            self._looking.release()
        return self._view

    def missing(self) -> NoRouterError:
        path = self._run.path
        return NoRouterError(f"no router serves {path}; `hpc-router up --run {path}` starts one, `status` shows more")

    def _find(self, *, doubt: bool) -> Record | None:
        named = None if doubt else self._named()
        return self._confirmed(named) or leading_router(self._reader.snapshot())

    def _named(self) -> Record | None:
        value = self._summary.read() or {}
        listed = value.get("records")
        records = [_record(entry) for entry in listed] if isinstance(listed, list) else []
        return leading_router({record.replica: record for record in records if record is not None})

    def _confirmed(self, named: Record | None) -> Record | None:
        """The leader's own record, if it says the same."""
        if named is None:
            return None
        path = self._run.registry / f"{named.replica}.json"
        if self._own is None or self._own.path != path:
            self._own = _JsonFile(path)
        own = _record(self._own.read())
        agrees = own is not None and (own.replica, own.url, own.kind) == (named.replica, named.url, RecordKind.ROUTER)
        return own if agrees and own is not None and own.state is State.READY else None


class _JsonFile:
    """One file of ours, parsed again when it was replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._value: dict[str, Any] | None = None

    def read(self) -> dict[str, Any] | None:
        """None when it is absent, another user's, or was never whole. Raises OSError when that cannot be told."""
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            self._stamp = self._value = None
            return None
        if status.st_uid != os.getuid():
            logger.warning("%s belongs to uid %d: refused", self.path, status.st_uid)
            return None
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp != self._stamp:
            value = read_json(self.path)
            if value is not None:
                self._stamp, self._value = stamp, value
        return self._value


def _record(value: object) -> Record | None:
    if not isinstance(value, dict):
        return None
    try:
        return Record.from_json(value)
    except RegistryError:
        return None
