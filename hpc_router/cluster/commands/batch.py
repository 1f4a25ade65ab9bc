"""What the verb `batch` does, through the run's router: submit batches, show and cancel them, and fetch their results.

Each call finds the router again, because it may have moved since the last one.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import aiohttp

from hpc_router.cluster.commands.router_access import RouterAccess, router_access
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.net import protocol
from hpc_router.net.http_client import Unreachable, bounded_body, call_blocking, session, tls_option
from hpc_router.router.batches.stored_batches import ENDED
from hpc_router.state.run_directory import RunDir

POLL_S: Final = 1.0
"""Interval in seconds at which `followed` asks for the state of a batch."""
AWAY_S: Final = 600.0
"""Time in seconds for which `followed` waits for a router while none answers."""
_PART_BYTES: Final = 2**18

BatchObject = dict[str, Any]
"""The batch object of OpenAI's API."""


class BatchCallRefusedError(LaunchError):
    """The router has refused a call, and would refuse it again."""


def submit(run: RunDir, path: Path, *, endpoint: str, window: str) -> BatchObject:
    """Uploads the file at `path`, one request per line, and starts a batch of it. Raises ConfigError if the file cannot
    be read, and LaunchError if the router refuses it."""
    try:
        with path.open("rb") as content:
            uploaded = asyncio.run(_upload(router_access(run), content, path.name))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    fields = {"input_file_id": uploaded["id"], "endpoint": endpoint, "completion_window": window}
    return _call(run, "POST", protocol.BATCHES, fields)


def batches(run: RunDir) -> list[BatchObject]:
    """Returns the newest batches of the owner, the newest first, at most 100. Raises LaunchError."""
    listed: list[BatchObject] = _call(run, "GET", f"{protocol.BATCHES}?limit=100")["data"]
    return listed


def batch(run: RunDir, batch_id: str) -> BatchObject:
    """Returns the state of a batch. Raises LaunchError."""
    return _call(run, "GET", f"{protocol.BATCHES}/{_checked(batch_id)}")


def cancel(run: RunDir, batch_id: str) -> BatchObject:
    """Cancels a batch, and returns its state. Raises LaunchError."""
    return _call(run, "POST", f"{protocol.BATCHES}/{_checked(batch_id)}/cancel", {})


def followed(
    run: RunDir,
    batch_id: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[BatchObject]:
    """Yields the state of a batch every `POLL_S` seconds until it has ended. Raises BatchCallRefusedError, and
    LaunchError if no router answers for `AWAY_S` seconds."""
    answered_at = clock()
    while True:
        try:
            state = batch(run, batch_id)
        except BatchCallRefusedError:
            raise
        except LaunchError:
            if clock() - answered_at > AWAY_S:
                raise
        else:
            answered_at = clock()
            yield state
            if state["status"] in ENDED:
                return
        sleep(POLL_S)


def fetch(run: RunDir, file_id: str, write: Callable[[bytes], object]) -> None:
    """Passes the content of a file to `write`, part by part. Raises LaunchError if it does not arrive completely."""
    asyncio.run(_fetch(router_access(run), file_id, write))


def fetch_to(run: RunDir, file_id: str, path: Path) -> None:
    """Writes the content of a file to `path`, with mode 0600. The file appears when it is complete. Raises LaunchError,
    and ConfigError if it cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            fetch(run, file_id, file.write)
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


async def _upload(access: RouterAccess, content: BinaryIO, name: str) -> dict[str, Any]:
    form = aiohttp.FormData(quote_fields=False)
    form.add_field("purpose", "batch")
    form.add_field("file", content, filename=name.replace('"', "_"), content_type="application/jsonl")
    try:
        async with (
            session(timeout_s=None) as client,
            client.post(access.url + protocol.FILES, data=form, **_options(access)) as response,
        ):
            body = await bounded_body(response)
            if response.status != 200:
                raise LaunchError(f"the router refused the file: {body.decode(errors='replace')[:500]}")
            uploaded: dict[str, Any] = json.loads(body)
            return uploaded
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise LaunchError(f"the upload to {access.url} failed: {error}") from error


async def _fetch(access: RouterAccess, file_id: str, write: Callable[[bytes], object]) -> None:
    url = f"{access.url}{protocol.FILES}/{file_id}/content"
    try:
        async with session(timeout_s=None) as client, client.get(url, **_options(access)) as response:
            if response.status != 200:
                text = (await bounded_body(response)).decode(errors="replace")
                raise LaunchError(f"the router does not give {file_id}: {text[:500]}")
            async for part in response.content.iter_chunked(_PART_BYTES):
                write(part)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise LaunchError(f"{file_id} did not arrive from {access.url}: {error}") from error


def _options(access: RouterAccess) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {access.token}"}
    return {"headers": headers, "ssl": tls_option(access.certificate), "allow_redirects": False}


def _call(run: RunDir, method: str, path: str, fields: dict[str, Any] | None = None) -> BatchObject:
    access = router_access(run)
    try:
        response = call_blocking(
            method, access.url + path, token=access.token, body=fields, certificate=access.certificate, timeout_s=30.0
        )
    except Unreachable as error:
        raise LaunchError(f"the router does not answer at {access.url}: {error}") from error
    if response.status != 200:
        refused = BatchCallRefusedError if response.status < 500 else LaunchError
        raise refused(f"the router refused the request: {response.message}")
    body: BatchObject = response.body
    return body


def _checked(batch_id: str) -> str:
    """Returns the ID. Raises ConfigError if it cannot be one of a batch."""
    if not batch_id.startswith("batch_") or not batch_id.replace("_", "").isalnum() or not batch_id.isascii():
        raise ConfigError(
            f"{batch_id[:80]!r} is not the ID of a batch, which begins with batch_ (`batch status` lists)"
        )
    return batch_id
