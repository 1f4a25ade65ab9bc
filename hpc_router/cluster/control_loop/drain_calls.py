"""Asks agents over HTTP to drain. Whoever asks decides what becomes of one that cannot be asked."""

import asyncio
import logging
from collections.abc import Sequence

from hpc_router.net.auth import replica_key
from hpc_router.net.http_client import Unreachable, call, session
from hpc_router.net.protocol import DRAIN
from hpc_router.state.registry import Record
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)


def ask_to_drain(run: RunDir, records: Sequence[Record]) -> list[Record]:
    """All at once, two seconds at most; those that did not agree."""
    return asyncio.run(_ask(run.secret(), records)) if records else []


async def _ask(secret: str, records: Sequence[Record]) -> list[Record]:
    async with session() as client:

        async def agrees(record: Record) -> bool:
            key = replica_key(secret, record.nonce) if record.nonce else None
            try:
                answer = await call(client, "POST", record.url + DRAIN, token=key)
            except Unreachable as error:
                logger.warning("%s cannot be asked to drain: %s", record.replica, error)
                return False
            if answer.status >= 300:
                logger.warning("%s refused to drain: %s", record.replica, answer.message)
            return answer.status < 300

        agreed = await asyncio.gather(*(agrees(record) for record in records))
    return [record for record, agrees_to in zip(records, agreed, strict=True) if not agrees_to]
