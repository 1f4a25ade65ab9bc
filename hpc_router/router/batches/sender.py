"""Sends the requests of batches to the workers of the router beside which the executor runs, over HTTP.

A request has the owner's token and names the token of the user who created the batch, so the router treats it as this
user's: limits, experts, fair queueing and records apply. Its class is `batch`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import aiohttp

from hpc_router.net import protocol
from hpc_router.net.http_client import session, tls_option
from hpc_router.router.batches.line_results import LineResponse
from hpc_router.state.registry import record_file
from hpc_router.state.run_directory import RunDir

CONNECT_S: Final = 5.0
"""Time limit in seconds to connect to a worker."""


class RouterSender:
    """Sends requests to the router `replica` of a run; `sending` makes one."""

    def __init__(self, run: RunDir, replica: str, client: aiohttp.ClientSession) -> None:
        self._client, self._run, self._token = client, run, run.token()
        self._record = record_file(run.registry / f"{replica}.json")

    async def send(self, endpoint: str, body: bytes, *, request_id: str, token_id: str | None) -> LineResponse:
        """Sends one request and returns the response. `token_id`: the user's token; None: the owner's."""
        headers = {
            "authorization": f"Bearer {self._token}",
            "content-type": "application/json",
            protocol.PRIORITY_HEADER: "batch",
            protocol.REQUEST_ID_HEADER: request_id,
        }
        if token_id is not None:
            headers[protocol.ON_BEHALF_HEADER] = token_id
        record = self._record.read()
        if record is None:
            return LineResponse(None)
        try:
            async with self._client.post(
                record.url + endpoint, data=body, headers=headers, ssl=tls_option(record.certificate),
                allow_redirects=False,
            ) as response:  # fmt: skip
                given = response.headers
                if response.status == 401:
                    self._token = self._run.token()  # it may have been replaced
                return LineResponse(
                    response.status,
                    await response.read(),
                    given.get(protocol.REQUEST_ID_HEADER, request_id),
                    _seconds(given.get("retry-after")),
                    final=given.get("x-should-retry") == "false",
                )
        except (aiohttp.ClientError, OSError, ValueError, asyncio.IncompleteReadError):
            return LineResponse(None)


@asynccontextmanager
async def sending(run: RunDir, replica: str, *, connections: int) -> AsyncIterator[RouterSender]:
    """Yields a sender that has at most `connections` connections. Responses may take any time."""
    async with session(timeout_s=None, connect_s=CONNECT_S, connections=connections) as client:
        yield RouterSender(run, replica, client)


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
