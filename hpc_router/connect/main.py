"""The process of `hpc-router connect`: serves until a signal, in the foreground or detached.

The detached process reports its address, or why it could not serve, to the command that started it.
"""

import asyncio
import hashlib
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NoReturn

import uvloop

from hpc_router.client.router_source import EndpointFolder
from hpc_router.connect.forwarder import Forwarder
from hpc_router.connect.listener import RunningForwarder, private_folder, running_forwarder, serving_address
from hpc_router.errors import ConfigError, HpcRouterError, LaunchError
from hpc_router.relay.downstream.server import listening, raise_file_limit
from hpc_router.state.io_thread import file_thread
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OnServing = Callable[[RunningForwarder], object]


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """Options of `connect`. `run`: the run directory or share folder. `port`: TCP port on the loopback; None: a unix
    socket is served. `hold_s`: seconds that a request waits for a router. `max_body_mb`: the router's limit for the
    body of a request."""

    run: EndpointFolder
    port: int | None
    hold_s: float
    max_body_mb: float


def connect(options: ConnectOptions, *, on_serving: OnServing) -> None:
    """Serves in this process until SIGINT, SIGTERM or SIGHUP. Calls `on_serving` once the address accepts connections.

    Raises LaunchError if another process serves the run, and ConfigError if the port is in use.
    """
    _serve(options, on_serving, log=None)


def connect_detached(options: ConnectOptions) -> RunningForwarder:
    """Returns the `connect` process that serves the run at the address that `options` ask for, the socket or a port. If
    there is none, starts one and returns once it accepts connections. Raises LaunchError and ConfigError."""
    running = running_forwarder(options.run, tcp=options.port is not None)
    if running is not None and running.port == options.port:
        return running
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        _detached(options, writing)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as stream:
        text = stream.read()
    report = json.loads(text) if text else {"error": f"the process ended before it served; see {_log_path(options)}"}
    if "error" in report:
        raise (ConfigError if report.get("config") else LaunchError)(report["error"])
    return RunningForwarder(**report)


def _log_path(options: ConnectOptions) -> Path:
    """Returns the path of the log of a detached process. Members cannot write to a share folder, so with one the log is
    in the user's private folder on this host."""
    name = f"connect{'' if options.port is None else '-tcp'}"
    if isinstance(options.run, RunDir):
        return options.run.logs / f"{name}.{socket.gethostname()}.log"
    return private_folder() / f"{name}-{hashlib.sha256(os.fsencode(options.run.path)).hexdigest()[:12]}.log"


def _detached(options: ConnectOptions, report_to: int) -> NoReturn:
    """Serves in this process, which was forked, without a terminal and with a log of its own. Writes its address, or
    why it cannot serve, to the file descriptor `report_to`."""

    def report(value: object) -> None:
        with os.fdopen(report_to, "w", encoding="utf-8") as stream:
            json.dump(value, stream)

    status = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.chdir("/")
        log = _log_path(options)
        with file_thread("log", log=log):
            try:
                _serve(options, lambda running: report(asdict(running)), log=str(log))
                status = 0
            except (HpcRouterError, OSError) as error:
                report({"error": str(error), "config": isinstance(error, ConfigError)})
            except BaseException:
                logger.exception("connect failed")
                raise
    finally:
        os._exit(status)


def _serve(options: ConnectOptions, on_serving: OnServing, *, log: str | None) -> None:
    raise_file_limit()
    with serving_address(options.run, port=options.port, log=log) as (running, sock):
        uvloop.run(_until_stopped(options, sock, lambda: on_serving(running)))


async def _until_stopped(options: ConnectOptions, sock: socket.socket, on_serving: Callable[[], object]) -> None:
    stop = asyncio.Event()
    for number in _STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` and scripts let background jobs ignore it
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # Above the router's limit, so that the router refuses larger bodies.
    max_body = int((options.max_body_mb + 1) * 2**20)
    with closing(Forwarder(options.run, hold_s=options.hold_s, adds_tokens=options.port is None)) as forwarder:
        async with listening(forwarder.handle, sock, max_body=max_body):
            on_serving()
            await forwarder.report_leader()
            await stop.wait()
