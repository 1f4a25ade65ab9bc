"""Compiles the C programs into a private cache folder, once per version of their source. The file name of a compiled
program contains the hash of its source."""

import hashlib
import os
import platform
import secrets
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Final, Literal

from hpc_router.errors import LaunchError
from hpc_router.state.run_directory import private_umask

Program = Literal["load", "engine"]
SOURCES: Final = Path(__file__).parent
FLAGS: Final = ("-std=c11", "-O2", "-Wall", "-Wextra")
COMPILERS: Final = ("cc", "gcc", "clang")


def build_program(program: Program, *, cache: Path | None = None) -> Path:
    """Returns the path of the compiled program. Compiles it first if the folder `cache` does not have it. Raises
    LaunchError if there is no working C compiler."""
    source = SOURCES / f"{program}.c"
    content = source.read_bytes() + (SOURCES / "loop.h").read_bytes() + " ".join(FLAGS).encode()
    key = hashlib.sha256(content).hexdigest()[:16]
    folder = _private(default_cache() if cache is None else cache)
    binary = folder / f"{program}-{platform.machine()}-{key}"
    if not binary.exists():
        _compile(source, binary)
    return binary


def compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hpc-router" / "native"


def _compile(source: Path, binary: Path) -> None:
    cc = compiler()
    if cc is None:
        raise LaunchError(
            f"no C compiler found to build {source.name}: install gcc (Debian: apt-get install gcc libc6-dev)"
        )
    temporary = binary.with_name(f".{binary.name}.{secrets.token_hex(4)}")
    command = [cc, *FLAGS, "-o", str(temporary), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            message = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
            raise LaunchError(f"{cc} cannot build {source.name}: {message} (requires Linux and libc6-dev)")
        temporary.replace(binary)
    finally:
        temporary.unlink(missing_ok=True)


def _private(folder: Path) -> Path:
    """Creates a folder for programs that will be executed. Raises LaunchError if other users can access it."""
    with private_umask():
        folder.mkdir(parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise LaunchError(f"{folder} is open to other users: chmod 700 it, or set XDG_CACHE_HOME to another folder")
    return folder
