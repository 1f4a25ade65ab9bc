"""What the verb `token` does: creates, lists and revokes the tokens of users other than the owner."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from hpc_router.cluster.control_loop.desired_state import readable_deployment
from hpc_router.errors import ConfigError, suggest
from hpc_router.state.registry import RegistryReader
from hpc_router.state.run_directory import RunDir
from hpc_router.state.share_dir import claimed_share, is_member, remove_token, write_token
from hpc_router.state.user_tokens import LIMITS, TokenLimits, UserToken

MAX_LIMIT: Final = 10**9
_UNITS_S: Final = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_DURATION: Final = re.compile(r"([0-9]{1,6})([mhdw])")


def parse_limits(words: Sequence[str]) -> TokenLimits:
    """Returns the limits in words such as `requests=60,tokens=100000`. Raises ConfigError."""
    given: dict[str, int] = {}
    for word in ",".join(words).split(",") if words else ():
        name, equals, text = word.partition("=")
        if name not in LIMITS or not equals:
            valid = ", ".join(f"{limit}=N" for limit in LIMITS)
            raise ConfigError(f"--limit {word[:80]!r}: not a limit (valid: {valid})")
        if name in given:
            raise ConfigError(f"--limit {name}: given twice")
        if not re.fullmatch(r"[0-9]{1,10}", text) or not 1 <= int(text) <= MAX_LIMIT:
            raise ConfigError(f"--limit {name}={text[:80]!r}: not a whole number (valid: 1 to {MAX_LIMIT})")
        given[name] = int(text)
    return TokenLimits(**given)


def parse_expiry(text: str, *, now: float) -> float:
    """Returns the Unix time at which a token expires. `text`: a duration such as `30d`, or a date with or without a
    time, in local time. Raises ConfigError."""
    valid = (
        "valid: a time from now such as 90m, 12h, 30d or 4w, or a future date such as 2031-12-31 or 2031-12-31T18:00"
    )
    if match := _DURATION.fullmatch(text):
        expires_at = now + int(match[1]) * _UNITS_S[match[2]]
    else:
        try:
            expires_at = datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError) as error:
            raise ConfigError(f"--expires {text[:80]!r}: not a time ({valid})") from error
    if not now < expires_at < math.inf:
        raise ConfigError(f"--expires {text[:80]!r}: not in the future ({valid})")
    return expires_at


def check_experts(run: RunDir, names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of experts without duplicates. Raises ConfigError if there are none, and for a name that is
    neither in the config nor registered."""
    registered = {e for record in RegistryReader(run.registry).snapshot().values() for e in record.serves}
    valid = set(readable_deployment(run).experts) | registered
    for name in names:
        if name not in valid:
            raise ConfigError(f"--experts {name[:80]!r}: no expert has this name{suggest(name, valid)}")
    if not names:
        raise ConfigError(f"--experts: no expert is named{suggest('', valid)}")
    return tuple(dict.fromkeys(names))


def share_token(run: RunDir, token: UserToken, text: str) -> str | None:
    """If the run has a share folder, writes the token's text to its user's file there. Returns a note for the owner;
    None without a share folder. `token`: the entry of the new token."""
    share = _share_of(run)
    if share is None:
        return None
    path, group = share
    try:
        folder = claimed_share(path, group, run)
        reason = write_token(folder, token.user, text)
    except (ConfigError, OSError) as error:  # the token exists, and its text must not be lost
        reason = str(error)
    if reason is not None:
        return f"not written to {path / 'tokens'}, because {reason}; give it to its user in a file of mode 0600"
    member = "" if is_member(token.user, group) else f"; {token.user} must be in the group {group} to open the folder"
    return f"{token.user} can read it in {folder.tokens / token.user}{member}"


def unshare_tokens(run: RunDir, revoked: Sequence[UserToken]) -> None:
    """Removes the files of revoked tokens from the run's share folder, if it has one. Raises ConfigError and
    OSError."""
    share = _share_of(run)
    if share is not None:
        folder = claimed_share(*share, run)
        for token in revoked:
            remove_token(folder, token.user, token.id)


def _share_of(run: RunDir) -> tuple[Path, str] | None:
    router = readable_deployment(run).router
    if router.share_dir is None or router.share_group is None:
        return None
    return Path(router.share_dir), router.share_group


def described(token: UserToken, *, now: float) -> dict[str, Any]:
    """Returns the token's entry as JSON values, and in the key `expired` whether the token has expired."""
    expired = token.expires_at is not None and token.expires_at <= now
    return token.to_json() | {"expired": expired}


def table_row(token: UserToken, *, now: float) -> tuple[str, ...]:
    """Returns the cells of a line of `token list`: id, user, end, limits, experts."""
    expiry = "-" if token.expires_at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(token.expires_at))
    if token.expires_at is not None and token.expires_at <= now:
        expiry += " (expired)"
    limits = [(item.name, getattr(token.limits, item.name)) for item in fields(token.limits)]
    shown = " ".join(f"{name}={limit}" for name, limit in limits if limit is not None)
    return token.id, token.user, expiry, shown or "-", "all" if token.experts is None else ",".join(token.experts)
