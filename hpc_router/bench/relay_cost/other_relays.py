"""Other relays, configured like this router: one core, keep-alive connections, no access log.

They do less than this router: none of them checks a token or reads the prompt, and none keeps a short response back so
that the request can be sent again to another replica.
"""

import os
import pwd
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hpc_router.bench.relay_cost.interface import Relay, RelayPlacement, StartedRelay, find, wait_until_serving
from hpc_router.bench.relay_cost.processes import pinned_to, process_group
from hpc_router.net.addresses import free_port
from hpc_router.state.run_directory import private_umask

KEEPALIVE: Final = 4096
"""Maximum number of idle connections to the engine that a relay keeps open."""


@dataclass(frozen=True, slots=True)
class Direct(Relay):
    """The baseline without a relay: load generator and engine alone."""

    name: str = "direct"
    hops: int = 0

    @contextmanager
    def started(self, placement: RelayPlacement) -> Iterator[StartedRelay]:
        assert placement.engine.port is not None
        yield StartedRelay(placement.engine.port, None)


@dataclass(frozen=True, slots=True)
class Nginx(Relay):
    """The relay nginx, as a reverse proxy."""

    name: str = "nginx"

    def absent(self) -> str | None:
        return None if find("nginx", None) else "not installed (Debian: apt-get install nginx-light)"

    def version(self) -> str:
        return _version([_program("nginx"), "-v"], r"nginx/(\S+)")

    @contextmanager
    def started(self, placement: RelayPlacement) -> Iterator[StartedRelay]:
        port = free_port()
        text = nginx_conf(placement.folder, port=port, engine=_port(placement), user=pwd.getpwuid(os.geteuid()).pw_name)
        conf = _write_private(placement.folder / "nginx.conf", text)
        command = [_program("nginx"), "-c", str(conf), "-p", str(placement.folder), "-e", str(placement.log)]
        with _run(command, port, placement) as started:
            yield started


def nginx_conf(folder: Path, *, port: int, engine: int, user: str) -> str:
    owner = f"user {user};\n" if os.geteuid() == 0 else ""
    places = "".join(
        f"  {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""{owner}daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/log warn;
events {{ worker_connections 16384; }}
http {{
  access_log off;
{places}  upstream engine {{ server 127.0.0.1:{engine}; keepalive {KEEPALIVE}; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    keepalive_requests 1000000000;
    keepalive_timeout 300s;
    client_max_body_size 64m;
    client_body_buffer_size 1m;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Haproxy(Relay):
    """The relay HAProxy, as a reverse proxy."""

    name: str = "haproxy"

    def absent(self) -> str | None:
        return None if find("haproxy", None) else "not installed (Debian: apt-get install haproxy)"

    def version(self) -> str:
        return _version([_program("haproxy"), "-v"], r"[Vv]ersion (\S+)")

    @contextmanager
    def started(self, placement: RelayPlacement) -> Iterator[StartedRelay]:
        port = free_port()
        conf = _write_private(placement.folder / "haproxy.cfg", haproxy_cfg(port=port, engine=_port(placement)))
        with _run([_program("haproxy"), "-db", "-f", str(conf)], port, placement) as started:
            yield started


def haproxy_cfg(*, port: int, engine: int) -> str:
    return f"""global
  nbthread 1
  maxconn 8192
defaults
  mode http
  option http-no-delay
  option abortonclose
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout http-keep-alive 300s
frontend clients
  bind 127.0.0.1:{port} backlog 4096
  default_backend engines
backend engines
  server engine 127.0.0.1:{engine} pool-max-conn {KEEPALIVE}
"""


@dataclass(frozen=True, slots=True)
class Package(Relay):
    """A router from PyPI that is installed in the virtual environment `environment`. `arguments`: words of its command
    line between the program's name and the options."""

    environment: Path | None = None
    arguments: tuple[str, ...] = ()

    def absent(self) -> str | None:
        if find(self.name, self.environment):
            return None
        return "not installed (make bench-peers, then --peers .venv-bench-peers)"

    def version(self) -> str:
        program = find(self.name, self.environment)
        if program is None or not (python := program.with_name("python")).exists():
            return ""
        program_text = f"from importlib.metadata import version; print(version({self.name!r}))"
        return _version([str(python), "-c", program_text], r"(\S+)")

    @contextmanager
    def started(self, placement: RelayPlacement) -> Iterator[StartedRelay]:
        port = free_port()
        argv = package_argv(_program(self.name, self.environment), self.arguments, port=port, engine=_port(placement))
        with _run(argv, port, placement) as started:
            yield started


def package_argv(program: str, arguments: tuple[str, ...], *, port: int, engine: int) -> list[str]:
    return [
        *(program, *arguments),
        *("--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{engine}"),
        *("--policy", "round_robin", "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
        *("--max-concurrent-requests", "16384", "--log-level", "error"),
    ]


def other_relays(environment: Path | None) -> list[Relay]:
    """Returns all other relays. `environment`: virtual environment of the routers from PyPI."""
    return [
        Direct(),
        Nginx(),
        Haproxy(),
        Package("vllm-router", environment=environment),
        Package("sglang-router", environment=environment, arguments=("launch",)),
    ]


@contextmanager
def _run(argv: list[str], port: int, placement: RelayPlacement) -> Iterator[StartedRelay]:
    with process_group() as processes:
        with pinned_to(placement.cores):
            processes.start(argv, log=placement.log)
        started = StartedRelay(port, processes)
        wait_until_serving(started, placement.log)
        yield started


def _port(placement: RelayPlacement) -> int:
    assert placement.engine.port is not None
    return placement.engine.port


def _program(name: str, folder: Path | None = None) -> str:
    found = find(name, folder)
    assert found is not None, f"{name} is not installed"
    return str(found)


def _write_private(path: Path, text: str) -> Path:
    with private_umask():
        path.write_text(text, encoding="utf-8")
    return path


def _version(argv: list[str], pattern: str) -> str:
    """Runs the command `argv` and returns the first group of `pattern` in its output; empty if nothing matches."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(pattern, done.stdout + done.stderr)
    return match[1] if match else ""
