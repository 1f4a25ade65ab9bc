"""Durations as Slurm writes and reads them: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS; UNLIMITED is infinite."""

import math
import re
from typing import Final

VALID: Final = "D-HH:MM:SS, HH:MM:SS, MM:SS, or minutes"
_PLAIN: Final = re.compile(r"(?:(?:(\d{1,9}):)?(\d{1,9}):(\d{1,9})|(\d{1,9}))", re.ASCII)
_WITH_DAYS: Final = re.compile(r"(\d{1,9})-(\d{1,9})(?::(\d{1,9})(?::(\d{1,9}))?)?", re.ASCII)


def walltime_s(text: str) -> float | None:
    """Returns the duration `text` in seconds (UNLIMITED: infinite); None if it is not in one of Slurm's formats."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    if match := _WITH_DAYS.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24.0 + hours) * 60 + minutes) * 60 + seconds
    if match := _PLAIN.fullmatch(text):
        hours, minutes, seconds, alone = (int(part or 0) for part in match.groups())
        return (hours * 60.0 + minutes + alone) * 60 + seconds
    return None


def walltime_text(seconds: float) -> str:
    """Formats a duration as Slurm does: D-HH:MM:SS, or HH:MM:SS below one day."""
    if math.isinf(seconds):
        return "UNLIMITED"
    days, rest = divmod(int(seconds), 86400)
    minutes, left = divmod(rest, 60)
    return f"{f'{days}-' if days else ''}{minutes // 60:02}:{minutes % 60:02}:{left:02}"
