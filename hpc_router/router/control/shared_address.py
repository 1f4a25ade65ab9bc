"""Keeps the router's address in the share folder, while the router leads (`state.share_dir`).

The file is replaced atomically, and written again if it was changed or removed, for example by a predecessor that was
suspended. The address of another run is not replaced: `up` does that, once it has found that the other run does not
serve. A folder that cannot be written delays nothing else; `trouble` has the reason.
"""

import logging
from pathlib import Path

from hpc_router.config.schema import RouterConfig
from hpc_router.errors import HpcRouterError
from hpc_router.state.registry import Record
from hpc_router.state.run_directory import RunDir
from hpc_router.state.share_dir import ROUTER_FILE, SharedRouter, claimed_share, shared_record, write_router
from hpc_router.state.stamped_file import Stamp, stamp_at

logger = logging.getLogger(__name__)


class SharedAddress:
    """The address of this router in the share folder. All methods do I/O, so they run in the file thread. `trouble`:
    why the last attempt to write the address failed; None if it succeeded."""

    def __init__(self, run: RunDir, path: Path, group: str, *, max_body_mb: float) -> None:
        self._run, self._path, self._group, self._max_body_mb = run, path, group, max_body_mb
        self._written: tuple[Record, Stamp | None] | None = None
        self.trouble: str | None = None

    def keep(self, router: Record) -> None:
        """Writes the address in `router`, the record of this router, unless the file has it already."""
        record = shared_record(router)
        try:
            if self._written is None or self._written != (record, stamp_at(self._path / ROUTER_FILE)):
                self._write(record)
                self._written = record, stamp_at(self._path / ROUTER_FILE)
        except (HpcRouterError, OSError) as error:
            self._failed(str(error))
        else:
            self.trouble = None

    def leave(self) -> None:
        """Removes the address, because this router ends and no other router leads. Does nothing if this router has not
        written it."""
        if self._written is not None:
            self._write(None)

    def _write(self, router: Record | None) -> None:
        share = claimed_share(self._path, self._group, self._run)
        write_router(share, SharedRouter(str(self._run.path.resolve()), self._max_body_mb, router), group=self._group)

    def _failed(self, reason: str) -> None:
        if reason != self.trouble:
            logger.warning("the router is not shared: %s", reason)
        self.trouble = reason


def shared_address(run: RunDir, config: RouterConfig) -> SharedAddress | None:
    """Returns the shared address of a router with this config; None if it is not shared."""
    if config.share_dir is None or config.share_group is None:
        return None
    return SharedAddress(run, Path(config.share_dir), config.share_group, max_body_mb=config.max_body_mb)
