"""From C source to a program, once per version of the source: in a private cache folder, named after its hash."""

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


def built(program: Program, *, cache: Path | None = None) -> Path:
    """The program's path; compiled now unless this source was before. LaunchError says what is missing."""
    source = SOURCES / f"{program}.c"
    content = source.read_bytes() + (SOURCES / "loop.h").read_bytes() + " ".join(FLAGS).encode()
    key = hashlib.sha256(content).hexdigest()[:16]
    folder = _private(default_cache() if cache is None else cache)
    made = folder / f"{program}-{platform.machine()}-{key}"
    if not made.exists():
        _compile(source, made)
    return made


def compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hpc-router" / "native"


def _compile(source: Path, made: Path) -> None:
    cc = compiler()
    if cc is None:
        raise LaunchError(
            f"no C compiler to build {source.name} with: install gcc (Debian: apt-get install gcc libc6-dev)"
        )
    temporary = made.with_name(f".{made.name}.{secrets.token_hex(4)}")
    command = [cc, *FLAGS, "-o", str(temporary), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
            raise LaunchError(f"{cc} cannot build {source.name}: {said} (it needs Linux and libc6-dev)")
        temporary.replace(made)
    finally:
        temporary.unlink(missing_ok=True)


def _private(folder: Path) -> Path:
    """Programs are run from it: nobody else may write there."""
    with private_umask():
        folder.mkdir(parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise LaunchError(f"{folder} is open to other users: chmod 700 it, or name another in XDG_CACHE_HOME")
    return folder
