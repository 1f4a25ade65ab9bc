"""A user's folder on a node's local disk, such as `/tmp/hpc-router-1000`, with mode 0700 and owned by that user.

All users share the parent folder, so another user may have created a folder or a link with this name.
"""

import logging
import os
import stat
from pathlib import Path

logger = logging.getLogger(__name__)


def user_folder(scratch: Path) -> Path:
    """Returns the path of this user's folder in `scratch`."""
    return scratch / f"hpc-router-{os.getuid()}"


def own_folder(path: Path) -> os.stat_result | None:
    """Returns the status of `path` (as `os.lstat`) if it is a folder that this user owns; None for a link and anything
    else."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() else None


def is_private(path: Path) -> bool:
    """Returns whether `path` is a folder, and not a link, that this user owns and no other user can access."""
    return (status := own_folder(path)) is not None and not status.st_mode & 0o077


def make_private(folder: Path) -> bool:
    """Creates the folder, or removes other users' access to it. Returns False if another user owns it or it is not a
    folder. Raises OSError."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        return False
    status = own_folder(folder)
    if status is not None and status.st_mode & 0o777 != 0o700:
        logger.warning("%s had mode %o: closed to others", folder, stat.S_IMODE(status.st_mode))
        folder.chmod(0o700)  # this user owns it, so in a sticky folder like /tmp no other user can replace it by a link
    return status is not None
