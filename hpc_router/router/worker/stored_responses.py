"""Finds the replica that keeps a response, for requests with the response's id in their path.

Only the engine that made a response has it, and the id does not name the engine. So the router sends a GET for the
response to all ready replicas at the same time. With `x-session-id`, the replica that answered the session's last turn
is asked first. The router itself stores nothing, so the search works in every worker and after a restart.
"""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from hpc_router.errors import ResponseNotFoundError, UnavailableError, UpstreamError
from hpc_router.net import protocol
from hpc_router.relay.upstream.interface import Upstream
from hpc_router.router.replicas.replica import Replica, RoutingState
from hpc_router.router.replicas.sessions import STATELESS_ENGINES, Turn
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.router.worker.error_responses import RETRY_AFTER_S

ASK_S: Final = 10.0
"""Maximum time in seconds for a replica to say whether it has a response."""
MAX_CONCURRENT: Final = 32
"""Maximum number of replicas that are asked at the same time for one request."""
_MAX_ERROR_BYTES: Final = 2**16
_NOT_IMPLEMENTED: Final = 501
_TRANSIENT: Final = frozenset({408, 429})


@dataclass(slots=True)
class StoredResponses:
    """Searches the ready replicas of `table` for stored responses."""

    table: ReplicaTable
    client: Upstream

    async def find(self, response_id: str, *, turn: Turn | None) -> Replica:
        """Returns the replica that has the response. If only one ready replica can keep responses, it is not asked but
        returned at once. `turn`: the last turn of the request's session, if known. Raises ResponseNotFoundError if no
        replica has the response, and UnavailableError if a replica that may have it did not answer."""
        keeping = [
            replica
            for replica in self.table.all()
            if replica.state is RoutingState.READY and replica.record.engine.kind not in STATELESS_ENGINES
        ]
        if len(keeping) == 1:
            return keeping[0]
        first = [replica for replica in keeping if turn is not None and turn.is_at(replica)]
        unknown: list[str] = []
        for asked in (first, [replica for replica in keeping if replica not in first]):
            found = await self._ask(asked, f"{protocol.RESPONSES}/{response_id}", unknown)
            if found is not None:
                return found
        if unknown:
            raise UnavailableError(
                f"it is not known where the response {response_id!r} is: {', '.join(sorted(unknown))} did not answer",
                retry_after_s=RETRY_AFTER_S,
            )
        raise not_found(response_id, "no ready replica has it")

    async def _ask(self, replicas: Collection[Replica], target: str, unknown: list[str]) -> Replica | None:
        """Asks these replicas at the same time for the response at the path `target`. Returns the first one that has
        it; None if none has it. Appends the names of replicas that gave no clear answer to `unknown`."""
        limit = asyncio.Semaphore(MAX_CONCURRENT)
        tasks = [asyncio.create_task(self._has(replica, target, limit)) for replica in replicas]
        try:
            for task in asyncio.as_completed(tasks):
                replica, has = await task
                if has:
                    return replica
                if has is None:
                    unknown.append(replica.name)
        finally:
            for running in tasks:
                running.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return None

    async def _has(self, replica: Replica, target: str, limit: asyncio.Semaphore) -> tuple[Replica, bool | None]:
        """Asks one replica for the response at the path `target`. Returns the replica and whether it has the response;
        None if the answer is not clear, for example after a timeout. `limit` bounds the requests at a time."""
        try:
            async with (
                limit,
                asyncio.timeout(ASK_S),
                self.client.request("GET", replica.address, target, head=replica.authorization) as answer,
            ):
                status = answer.status
                if 200 <= status < 300:
                    return replica, True
                await answer.read(_MAX_ERROR_BYTES)  # so that the connection can be used again
        except (UpstreamError, TimeoutError):
            return replica, None
        refused = (400 <= status < 500 and status not in _TRANSIENT) or status == _NOT_IMPLEMENTED
        return replica, False if refused else None


def not_found(response_id: str, why: str) -> ResponseNotFoundError:
    """Returns the error for the response with this id, which no replica has. `why` becomes part of its message."""
    return ResponseNotFoundError(
        f"the response {response_id!r} is not found: {why}; engines keep responses in memory, until they end",
        param="response_id",
    )
