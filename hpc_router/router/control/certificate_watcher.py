"""Watches the files of `router.tls_cert` and `router.tls_key`, so that a renewed certificate needs no restart.

If certificate and key do not fit together, for example while only one of the files is replaced, this is logged and the
old pair stays in use.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hpc_router.background_tasks import OnFailure, background
from hpc_router.config.schema import RouterConfig
from hpc_router.errors import HpcRouterError
from hpc_router.net.tls import read_certificate, server_context
from hpc_router.state.io_thread import FileThread
from hpc_router.state.stamped_file import Stamp, stamp_at

logger = logging.getLogger(__name__)

CHECK_S: Final = 1.0
"""Interval in seconds between two checks."""


@dataclass(slots=True)
class CertificateWatcher:
    """Calls `on_change` with the new certificate, in PEM, when it has been renewed. `certificate`: the present one, as
    in the router's record; None if the router serves HTTP, so that nothing is watched."""

    config: RouterConfig
    certificate: str | None
    files: FileThread
    on_change: Callable[[str], None]
    on_failure: OnFailure = lambda task, error: None
    _stamps: tuple[Stamp | None, Stamp | None] | None = None

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Checks the files repeatedly within the block."""
        if self.certificate is None or self.config.tls_cert is None or self.config.tls_key is None:
            yield
            return
        async with background("certificate watcher", self._check_forever, self.on_failure):
            yield

    async def _check_forever(self) -> None:
        while True:
            try:
                found = await self.files.run(self._changed)
            except (HpcRouterError, OSError) as error:
                logger.warning("the certificate was not changed: %s", error)
            else:
                if found is not None and found != self.certificate:
                    self.certificate = found
                    self.on_change(found)
            await asyncio.sleep(CHECK_S)

    def _changed(self) -> str | None:
        """Returns the new certificate if the files have changed and fit together, else None. If they do not fit, raises
        ConfigError, once per change."""
        assert self.config.tls_cert is not None
        assert self.config.tls_key is not None
        cert, key = Path(self.config.tls_cert), Path(self.config.tls_key)
        stamps = stamp_at(cert), stamp_at(key)
        if stamps == self._stamps:
            return None
        self._stamps = stamps
        server_context(cert, key)
        return read_certificate(cert)
