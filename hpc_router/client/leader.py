"""Finds the router that leads a run, for clients.

Rules: `registry.json` names the leader, and the leader's own record must confirm it, because `registry.json` remains
when a router has ended. If the two differ, or after a failed request (`recheck`), the leader is found among the records
in the registry folder. Files of other users are ignored. While the file system fails or does not respond, the last
result is used. `router_identity` checks the leader before a client sends it the token.
"""

import logging
import threading
from typing import Any, Final

from hpc_router.errors import HpcRouterError, RegistryError
from hpc_router.state.registry import Record, RecordKind, RegistryReader, State, leading_router, record_file
from hpc_router.state.run_directory import RunDir
from hpc_router.state.stamped_file import StampedFile

logger = logging.getLogger(__name__)

REGISTRY_TIMEOUT_S: Final = 2.0
"""Time limit in seconds of one read of the registry by an asynchronous client. After it, the last result is used."""


class NoRouterError(HpcRouterError):
    """No router of the run serves, or none became ready within the time limit."""


class Leader:
    """Finds the router that leads one run. Can be called repeatedly and from any thread; parses only files that have
    changed since the last call."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._summary = StampedFile(run.registry_json, _leader_in_summary)
        self._own: StampedFile[Record] | None = None
        self._reader = RegistryReader(run.registry)
        self._last: Record | None = None
        self._found_once = False
        self._lock = threading.Lock()

    @property
    def last(self) -> Record | None:
        """Returns the result of the last `find`."""
        return self._last

    def find(self, *, recheck: bool = False) -> Record | None:
        """Returns the record of the router that leads; None if no router serves. `recheck`: whether to read all records
        in the registry folder, not only `registry.json`. One thread at a time reads files; meanwhile, calls of other
        threads without `recheck` return the last result."""
        if not self._lock.acquire(blocking=recheck or not self._found_once):
            return self._last
        try:
            named = None if recheck else self._summary.read()
            self._last = self._confirmed(named) or leading_router(self._reader.snapshot())
            self._found_once = True
        except FileNotFoundError:  # the run directory was removed
            self._last = None
        except OSError as error:
            logger.warning("the registry of %s cannot be read, so its last content is used: %s", self._run.path, error)
        finally:
            self._lock.release()
        return self._last

    def no_router_error(self) -> NoRouterError:
        """Returns an error whose message says that no router serves the run, and how to start one."""
        path = self._run.path
        return NoRouterError(f"no router serves {path}; `hpc-router up --run {path}` starts one, `status` shows more")

    def _confirmed(self, named: Record | None) -> Record | None:
        """Returns the leader's own record if it is ready and agrees with `named`, the leader's entry in
        `registry.json`; else None."""
        if named is None:
            return None
        path = self._run.registry / f"{named.replica}.json"
        if self._own is None or self._own.path != path:
            self._own = record_file(path)
        own = self._own.read()
        agrees = own is not None and (own.url, own.kind) == (named.url, RecordKind.ROUTER)
        return own if agrees and own is not None and own.state is State.READY else None


def _leader_in_summary(summary: dict[str, Any]) -> Record | None:
    """Returns the router that leads according to `summary`, the content of `registry.json`; None if it lists none.
    Skips entries that are not valid records."""
    listed = summary.get("records")
    records = [_record(entry) for entry in listed] if isinstance(listed, list) else []
    return leading_router({record.replica: record for record in records if record is not None})


def _record(value: object) -> Record | None:
    if not isinstance(value, dict):
        return None
    try:
        return Record.from_json(value)
    except RegistryError:
        return None
