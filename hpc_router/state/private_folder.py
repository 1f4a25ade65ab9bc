"""A user's folder on a node's local disk, such as `/tmp/hpc-router-1000`: mode 0700, and never that of another user.

All users share the folder around it, so another user may have taken the name, also with a link.
"""

import logging
import os
import stat
from pathlib import Path

logger = logging.getLogger(__name__)


def user_folder(scratch: Path) -> Path:
    """The path of this user's folder in `scratch`."""
    return scratch / f"hpc-router-{os.getuid()}"


def own_folder(path: Path) -> os.stat_result | None:
    """The status of a real folder that we own; None for anything else."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() else None


def is_private(path: Path) -> bool:
    """Whether `path` is a real folder that we own and no other user can access."""
    return (status := own_folder(path)) is not None and not status.st_mode & 0o077


def make_private(folder: Path) -> bool:
    """Make the folder, or close it to others; False if another user owns it, or it is no folder. Raises OSError."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        return False
    status = own_folder(folder)
    if status is not None and status.st_mode & 0o777 != 0o700:
        logger.warning("%s had mode %o: closed to others", folder, stat.S_IMODE(status.st_mode))
        folder.chmod(0o700)  # we own it, so in a sticky folder like /tmp no other user can replace it by a link
    return status is not None
