"""Asks agents over HTTP to drain. One that cannot be asked is cancelled later, which drains it too."""

import asyncio
import logging
from collections.abc import Sequence

from hpc_router.auth import replica_key
from hpc_router.cluster.http import Unreachable, call, session
from hpc_router.registry import Record
from hpc_router.rundir import RunDir
from hpc_router.wire import DRAIN

logger = logging.getLogger(__name__)


def ask_to_drain(run: RunDir, records: Sequence[Record]) -> None:
    """All at once, two seconds at most."""
    if records:
        asyncio.run(_ask(run.secret(), records))


async def _ask(secret: str, records: Sequence[Record]) -> None:
    async with session() as client:

        async def one(record: Record) -> None:
            key = replica_key(secret, record.nonce) if record.nonce else None
            try:
                answer = await call(client, "POST", record.url + DRAIN, token=key)
            except Unreachable as error:
                logger.warning("%s cannot be asked to drain: %s", record.replica, error)
            else:
                if answer.status >= 300:
                    logger.warning("%s refused to drain: %s", record.replica, answer.message)

        await asyncio.gather(*(one(record) for record in records))
