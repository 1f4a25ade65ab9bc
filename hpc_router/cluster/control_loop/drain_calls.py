"""Calls the `/drain` path of agents. The caller decides what happens to an agent that cannot be reached."""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from hpc_router.net.auth import replica_key
from hpc_router.net.http_client import Unreachable, call, session
from hpc_router.net.protocol import drain_target
from hpc_router.state.registry import Record
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)


def ask_to_drain(
    run: RunDir, records: Sequence[Record], until_at: Mapping[str, float | None] | None = None
) -> list[Record]:
    """Calls `/drain` of the agents in `records` at the same time, for at most two seconds. Returns the records of those
    that refused or did not answer. `until_at`: by replica, the Unix time until which its requests in flight may run;
    None: the agent's usual time limit."""
    return asyncio.run(_ask(run.secret(), records, until_at or {})) if records else []


async def _ask(secret: str, records: Sequence[Record], until_at: Mapping[str, float | None]) -> list[Record]:
    async with session() as client:

        async def agrees(record: Record) -> bool:
            target = drain_target(until_at.get(record.replica))
            key = replica_key(secret, record.nonce) if record.nonce else None
            try:
                response = await call(client, "POST", record.url + target, token=key)
            except Unreachable as error:
                logger.warning("%s does not answer the drain call: %s", record.replica, error)
                return False
            if response.status >= 300:
                logger.warning("%s refused to drain: %s", record.replica, response.message)
            return response.status < 300

        agreed = await asyncio.gather(*(agrees(record) for record in records))
    return [record for record, accepted in zip(records, agreed, strict=True) if not accepted]
