"""One run of an engine: its process below the guard, its log, and the cause of its end."""

import asyncio
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from hpc_router.expert.engine_process.guard import is_subreaper, kill_descendants
from hpc_router.expert.engines import EngineFailure, Place, classify
from hpc_router.expert.engines.base import ENGINE_GRACE_S
from hpc_router.expert.engines.failure import Sign
from hpc_router.state.io_thread import FileThread, OutputLog

logger = logging.getLogger(__name__)

GUARD: Final = Path(__file__).with_name("guard.py")
TAIL_BYTES: Final = 128 * 1024
OUTPUT_S: Final = 2.0
"""Time limit in seconds for reading the rest of the output of an engine that has ended."""
KILL_S: Final = 30.0
"""Time limit in seconds for a killed process to release its memory. After that, it hangs in the kernel."""


@dataclass(frozen=True, slots=True)
class Command:
    """The command line of an engine's process, the place where it runs, and the log of its output. If the agent dies,
    the guard removes the folder of `place`."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    place: Place
    log: Path
    grace_s: float = ENGINE_GRACE_S


class EngineProcess:
    """A running engine. `async with EngineProcess.start(...)` starts it; leaving the block kills the engine and all its
    descendants."""

    def __init__(self, guard: asyncio.subprocess.Process, command: Command, files: FileThread) -> None:
        assert guard.stderr is not None
        self._guard = guard
        self._command = command
        self._output = OutputLog(files, command.log, tail_bytes=TAIL_BYTES)
        self._copying = asyncio.create_task(self._output.copy(guard.stderr), name="engine output")
        self.pid: int | None = None

    @classmethod
    async def start(cls, command: Command, files: FileThread) -> Self:
        command.place.socket.unlink(missing_ok=True)  # left by a killed engine; vLLM does not replace it
        guard = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(GUARD)),
            *("--grace-s", str(command.grace_s), "--folder", str(command.place.folder), "--", *command.argv),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=command.environment,
            start_new_session=True,
        )
        process = cls(guard, command, files)
        assert guard.stdout is not None
        try:
            line = await guard.stdout.readline()
        except BaseException:
            await process.stop()
            raise
        process.pid = int(line) if line else None
        return process

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def wait(self) -> int:
        """Waits for the end of the process. Returns its exit status; 128 + N if signal N has killed it."""
        code = await self._guard.wait()
        if code >= 0:
            return code
        if is_subreaper():  # the guard was killed, so its descendants are our children; we have no others
            await asyncio.to_thread(kill_descendants)
        return 128 - code

    async def failure(self, signs: Sequence[Sign]) -> EngineFailure:
        """Waits until the process ends. Returns the cause, which follows from its exit status and from log lines that
        match one of `signs`."""
        status = await self.wait()
        await self._copied()
        return classify(status, self.tail(), signs)

    async def stop(self) -> None:
        """Sends SIGTERM and waits for the engine's end. The guard kills the whole process tree after the grace time."""
        with suppress(ProcessLookupError):
            self._guard.terminate()
        try:
            async with asyncio.timeout(self._command.grace_s + KILL_S):
                await self._guard.wait()
        except TimeoutError:
            logger.error("the engine cannot be killed: it hangs in the kernel; process %s is left behind", self.pid)
        await self._copied()
        self._copying.cancel()
        await asyncio.gather(self._copying, return_exceptions=True)
        assert self._guard.stdin is not None
        self._guard.stdin.close()

    async def _copied(self) -> None:
        """Waits until all output was read, at most OUTPUT_S: a process that outlives the guard keeps the pipe open."""
        await asyncio.wait({self._copying}, timeout=OUTPUT_S)

    def tail(self) -> list[str]:
        """Returns the last lines of this run's output."""
        return self._output.tail.decode("utf-8", "replace").splitlines()
