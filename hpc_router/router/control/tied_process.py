"""Runs a program beside the control process that ends with it, because its standard input is then closed."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hpc_router.state.io_thread import FileThread, OutputLog

STOP_S: Final = 10.0
"""Maximum time in seconds for the program to end after SIGTERM, before it is killed."""
OUTPUT_S: Final = 2.0
"""Maximum time in seconds to copy the remaining output of a program that has ended."""


async def run_process(argv: Sequence[str], files: FileThread, log: Path) -> int:
    """Runs the program with the command line `argv` until it ends, and returns its exit status. Its output goes to the
    file `log`. If this task is cancelled, the program gets SIGTERM and is awaited."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    copying = asyncio.create_task(OutputLog(files, log).copy(process.stdout), name=f"output to {log.name}")
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        await asyncio.wait({copying}, timeout=OUTPUT_S)
        copying.cancel()
        await asyncio.gather(copying, return_exceptions=True)
