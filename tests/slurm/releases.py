"""Releases of Debian whose Slurm is newer than the machine's: each a root of its own, made by debootstrap.

    python -m tests.slurm.releases newest | trixie | sid     # makes it, if it is not there, and prints its folder

Rules: a root lies in the user's cache folder, is made once, and is never written to again; hosts write to a layer of
their own (init.py). It is made under another name and renamed when its Slurm has answered, both under a lock, so
makers do not meet and a killed maker leaves nothing that is used. Mirror, proxies and certificates are those of apt's
configuration. The name has a hash of PACKAGES. What a release contains today is read, not assumed: `sid` changes.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.slurm.host import SlurmClusterError, command

RELEASES: Final[tuple[str, ...]] = ("trixie", "sid")
NEWEST: Final = "newest"
VARIABLE: Final = "TEST_SLURM_RELEASE"
"""Environment variable with the release that clusters have if none is given; empty: the machine's own Slurm."""
KNOWN: Final = ((22, 5), (24, 11), (26, 5))
"""Versions of Slurm that the tests and the table in docs/slurm.md describe."""
PACKAGES: Final = (
    *("slurmctld", "slurmd", "slurmdbd", "slurm-client", "munge"),
    *("mariadb-server-core", "mariadb-client-core"),
    *("iproute2", "procps", "python3", "curl", "environment-modules", "sshfs", "openssh-sftp-server"),
)
MAKING_S: Final = 1200.0
_SLURM: Final = "etc/hpcr-slurm-version"


def chosen() -> str | None:
    """The release that the environment names; None: the machine's own. Raises if there is no such release."""
    name = os.environ.get(VARIABLE) or None
    if name not in (None, NEWEST, *RELEASES):
        raise SlurmClusterError(f"{VARIABLE}={name}: no such release (valid: {', '.join((NEWEST, *RELEASES))})")
    return newest() if name == NEWEST else name


def need_chosen() -> None:
    """Skips the tests where the chosen release cannot be had. In CI it fails if the mirror answers, because then a
    release that is not sid can be made."""
    try:
        release = chosen()
        if release is not None:
            version = root_of(release).version
            if version not in KNOWN:
                pytest.skip(f"{release} has Slurm {version[0]}.{version[1]:02}, which docs/slurm.md does not know yet")
    except SlurmClusterError as error:
        required = os.environ.get("CI") and os.environ.get(VARIABLE) != "sid" and mirror_answers()
        (pytest.fail if required else pytest.skip)(str(error))


def newest(*, make: bool = False) -> str:
    """The newest release that is there and whose Slurm is known. Where none is, or to `make` it: the newest that can
    be made. Packages of sid may be broken on any day, and then it is the one before."""
    there = [name for name in RELEASES if _is_complete(_folder(name)) and Root(name).version in KNOWN]
    if there and not make:
        return there[-1]
    for release in reversed(RELEASES[1:]):
        with contextlib.suppress(SlurmClusterError):
            if root_of(release).version in KNOWN:
                return release
    return RELEASES[0]


class Root:
    """The root of a release, made and complete."""

    def __init__(self, release: str) -> None:
        self.release, self.folder = release, _folder(release)

    @property
    def version(self) -> tuple[int, int]:
        return version_of((self.folder / _SLURM).read_text())

    @property
    def clients(self) -> list[str]:
        """The names of Slurm's commands."""
        listed = (self.folder / "var/lib/dpkg/info/slurm-client.list").read_text().splitlines()
        return [Path(line).name for line in listed if Path(line).parent == Path("/usr/bin")]


def version_of(text: str) -> tuple[int, int]:
    """(24, 11) of "slurm-wlm 24.11.5"."""
    found = re.search(r"(\d+)\.(\d+)\.\d+", text)
    if found is None:
        raise SlurmClusterError(f"no version of Slurm in {text!r}")
    return int(found[1]), int(found[2])


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpc-router" / "slurm-releases"


def root_of(release: str) -> Root:
    """The root of the release, which is made first if it is not there. Raises SlurmClusterError."""
    if _is_complete(_folder(release)):
        return Root(release)
    if lack := _lacking():
        raise SlurmClusterError(f"needs {lack}, for the Slurm of {release}")
    with _locked(release) as lock:
        if not _is_complete(_folder(release)):
            _make(release, _folder(release), lock)
    return Root(release)


def _folder(release: str) -> Path:
    return cache() / f"{release}-{hashlib.sha256(' '.join(PACKAGES).encode()).hexdigest()[:8]}"


def _lacking() -> str:
    if os.geteuid() != 0:
        return "root"
    absent = [name for name in ("debootstrap", "apt-get", "setpriv", "unshare", "pivot_root") if not shutil.which(name)]
    return ", ".join(absent)


@contextlib.contextmanager
def _locked(release: str) -> Iterator[int]:
    """The children of a killed maker hold the lock until they have ended, too."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{release}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _is_complete(folder: Path) -> bool:
    """Whether its Slurm says the version that it had when it was made."""
    try:
        return (folder / _SLURM).read_text() == _slurm_in(folder)
    except (OSError, SlurmClusterError):
        return False


def _slurm_in(folder: Path) -> str:
    return command(["chroot", str(folder), "slurmctld", "-V"])


def _make(release: str, folder: Path, lock: int) -> None:
    """Everything but the final name is removed first: it is of a maker that was killed, or damaged."""
    for left in (folder, *cache().glob(f".{release}-*")):
        if left.exists():
            shutil.rmtree(left)
    making = Path(tempfile.mkdtemp(prefix=f".{release}-", dir=cache()))
    making.chmod(0o755)  # packages become other users while they are configured
    # The kernel ends all of it with this process, and its mounts with it.
    alone = ["unshare", "--mount-proc", "--pid", "--fork", "--kill-child=SIGKILL"]
    strap = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", release, str(making), mirror()]
    log = making / "debootstrap" / "debootstrap.log"
    try:
        with _as_apt() as environment:
            argv = ["setpriv", "--pdeathsig=KILL", *alone, *strap]
            command(argv, timeout_s=MAKING_S, environment=environment, inherit=(lock,))
        for package in (making / "var/cache/apt/archives").glob("*.deb"):
            package.unlink()
        (making / _SLURM).write_text(_slurm_in(making))
        making.rename(folder)
    except SlurmClusterError as error:
        told = log.read_text(errors="replace") if log.exists() else str(error)
        raise SlurmClusterError(
            f"debootstrap could not make {release}: {' / '.join(told.splitlines()[-4:])}"
        ) from error
    finally:
        if making.exists():
            shutil.rmtree(making)


def mirror() -> str:
    """The address of the packages of this Debian, which also has the other releases."""
    system = platform.freedesktop_os_release()
    if system.get("ID") != "debian":
        raise SlurmClusterError(
            f"needs Debian, for its packages; this is {system.get('PRETTY_NAME', 'another system')}"
        )
    asked = ["apt-get", "indextargets", "--no-release-info", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"]
    suites = {system.get("VERSION_CODENAME"), "oldstable", "stable", "testing", "unstable", "sid"}
    found = [line.split() for line in command([*asked, "Created-By: Packages"]).splitlines()]
    urls: list[str] = [url.rstrip("/") for url, suite, component in found if suite in suites and component == "main"]
    if not urls:
        raise SlurmClusterError("needs a source of Debian's packages in apt's configuration; it names none")
    return next((url for url in urls if url.endswith("/debian")), urls[0])


def mirror_answers() -> bool:
    with contextlib.suppress(SlurmClusterError), _as_apt() as environment:
        command(["wget", "--quiet", "--spider", f"{mirror()}/dists/{RELEASES[0]}/Release"], environment=environment)
        return True
    return False


@contextlib.contextmanager
def _as_apt() -> Iterator[dict[str, str]]:
    """An environment in which wget, which debootstrap uses, has apt's proxies and certificates."""
    with tempfile.NamedTemporaryFile("w", suffix=".wgetrc") as file:
        file.write("".join(f"{name} = {value}\n" for name, value in wget_settings(_apt_settings()).items()))
        file.flush()
        yield {**os.environ, "WGETRC": file.name}


def _apt_settings() -> dict[str, str]:
    text = command(["apt-config", "dump", "--no-empty", "--format", "%f %v%n", "Acquire"])
    return dict(line.partition(" ")[::2] for line in text.splitlines())


def wget_settings(apt: Mapping[str, str]) -> dict[str, str]:
    """The lines of a wgetrc that say what apt's settings say."""
    settings = {"timeout": "60", "tries": "3"}
    for scheme in ("http", "https"):
        proxy = apt.get(f"Acquire::{scheme}::Proxy")
        if proxy and proxy != "DIRECT":
            settings[f"{scheme}_proxy"] = proxy
    if bundle := apt.get("Acquire::https::CAInfo"):
        settings["ca_certificate"] = bundle
    if apt.get("Acquire::https::Verify-Peer") == "false":
        settings["check_certificate"] = "off"
    return settings


def main() -> int:
    for name in sys.argv[1:]:
        try:
            root = root_of(newest(make=True) if name == NEWEST else name)
        except SlurmClusterError as error:  # the tests decide whether that is a failure
            print(f"{name}: {error}", file=sys.stderr)
            continue
        print(f"{root.folder}: Slurm {root.version[0]}.{root.version[1]:02}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
