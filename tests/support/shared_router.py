"""Calls of a shared router by one of its users."""

import urllib.error
import urllib.request
from pathlib import Path

from hpc_router.client import endpoint


def status_of(folder: Path, path: str) -> int:
    """The status of a GET with the user's token."""
    at = endpoint(folder)
    asked = urllib.request.Request(at.url + path, headers={"authorization": f"Bearer {at.token}"})
    try:
        with urllib.request.urlopen(asked) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
