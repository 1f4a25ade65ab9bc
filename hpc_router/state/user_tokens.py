"""The tokens of other users: `tokens.json` in the run directory, which the verb `token` writes and the router reads.

A token is `hpcr-ID-SECRET`. The file has only its SHA-256 digest, which is enough because the secret has 256 random
bits. The ID finds the entry, so only one digest has to be compared, in constant time. Every token has a number, its
`slot`: the index of its counters in the memory that the router's workers share. Slots are assigned in a circle, so that
a new token does not get the counters of one that was just revoked.
"""

import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from hpc_router.errors import ConfigError, LaunchError, RegistryError
from hpc_router.net.auth import new_token, token_digest
from hpc_router.state.atomic_files import MAX_FILE_BYTES, load_json, replace_json
from hpc_router.state.exclusive import exclusive
from hpc_router.state.run_directory import RunDir

SCHEMA: Final = 1
SLOTS: Final = 4096
"""Number of slots."""
MAX_TOKENS: Final = 1024
"""Maximum number of tokens in the file. There are more slots, so that a slot is not reused at once."""
_TOKEN: Final = re.compile(r"hpcr-([0-9a-f]{8})-[0-9a-f]{64}")
_USER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,63}")
_NO_DIGEST: Final = token_digest("")


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """The limits of one token. `requests`: requests per minute; `tokens`: generated tokens per minute; `concurrency`:
    requests in flight. None: no limit."""

    requests: int | None = None
    tokens: int | None = None
    concurrency: int | None = None


LIMITS: Final = tuple(item.name for item in fields(TokenLimits))
"""The names of the limits."""


@dataclass(frozen=True, slots=True)
class UserToken:
    """One token. `digest`: SHA-256 of its text, in hex. `created_at`, `expires_at`: Unix seconds; `expires_at` is None
    for a token that does not expire. `experts`: the experts that it may use; None: all."""

    id: str
    user: str
    digest: str
    slot: int
    created_at: float
    expires_at: float | None = None
    limits: TokenLimits = TokenLimits()
    experts: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the token's fields as JSON values, without `digest` and `slot`."""
        value = asdict(self)
        del value["digest"], value["slot"]
        return value


def token_id(text: str) -> str | None:
    """Returns the ID in the text of a token; None if `text` does not have the form of a token."""
    match = _TOKEN.fullmatch(text)
    return None if match is None else match[1]


def find_token(text: str, by_id: Mapping[str, UserToken]) -> UserToken | None:
    """Returns the entry of the token whose text is `text`; None if there is none. The duration depends neither on the
    secret nor on whether the ID exists, so that it reveals nothing."""
    name = token_id(text)
    found = None if name is None else by_id.get(name)
    equal = hmac.compare_digest(token_digest(text), _NO_DIGEST if found is None else found.digest)
    return found if equal else None


def parse_tokens(content: Mapping[str, Any]) -> tuple[UserToken, ...]:
    """Returns the tokens in the content of `tokens.json`, the oldest first. Raises RegistryError."""
    if content.get("schema") != SCHEMA:
        raise RegistryError(f"schema {content.get('schema')!r}; this version reads {SCHEMA}")
    try:
        tokens = tuple(_entry(name, value) for name, value in content["tokens"].items())
        tokens = tuple(sorted(tokens, key=lambda token: token.created_at))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RegistryError(f"not a list of tokens: {error}") from error
    if len({token.slot for token in tokens}) != len(tokens):
        raise RegistryError("two tokens have the same slot")
    return tokens


def read_tokens(run: RunDir) -> tuple[UserToken, ...]:
    """Returns the tokens of a run. Raises RegistryError if the file cannot be read."""
    return parse_tokens(_read(run.tokens_json))


def create_token(
    run: RunDir,
    user: str,
    *,
    expires_at: float | None = None,
    limits: TokenLimits = TokenLimits(),
    experts: Sequence[str] | None = None,
) -> tuple[UserToken, str]:
    """Adds a token for `user`. Returns its entry, and the text of the token, which is stored nowhere.

    Raises ConfigError for a wrong user name, LaunchError if there are `MAX_TOKENS` already, and RegistryError if the
    file cannot be read or changed.
    """
    if not _USER.fullmatch(user):
        raise ConfigError(
            f"--user {user[:80]!r}: not a user name (valid: 1 to 64 letters, digits and _.@+-, a letter or digit first)"
        )
    made: list[tuple[UserToken, str]] = []

    def add(content: dict[str, Any]) -> None:
        tokens = parse_tokens(content)
        if len(tokens) >= MAX_TOKENS:
            raise LaunchError(f"{run.tokens_json} has {MAX_TOKENS} tokens, which is the limit: revoke some first")
        ids, used = {token.id for token in tokens}, {token.slot for token in tokens}
        name = next(name for name in iter(lambda: secrets.token_hex(4), "") if name not in ids)
        slot = next(
            s % SLOTS for s in range(content["next_slot"], content["next_slot"] + SLOTS) if s % SLOTS not in used
        )
        text = f"hpcr-{name}-{new_token()}"
        entry = UserToken(
            name, user, token_digest(text), slot, round(time.time(), 3), expires_at, limits,
            None if experts is None else tuple(experts),
        )  # fmt: skip
        content["next_slot"] = (slot + 1) % SLOTS
        content["tokens"][name] = _stored(entry)
        made.append((entry, text))

    _change(run, add)
    return made[0]


def revoke_tokens(run: RunDir, *, by: str, ids: Collection[str] = (), user: str | None = None) -> list[UserToken]:
    """Removes the tokens with these IDs, or all tokens of `user`, and returns them. `by`: the user who revokes them,
    for the event in `events.jsonl`.

    Raises ConfigError if an ID or the user has no token, and RegistryError if the file cannot be read or changed.
    """
    revoked: list[UserToken] = []

    def remove(content: dict[str, Any]) -> None:
        tokens = {token.id: token for token in parse_tokens(content)}
        users = sorted({token.user for token in tokens.values()})
        if unknown := [name for name in ids if name not in tokens]:
            raise ConfigError(f"no token has the ID {unknown[0][:80]!r} (valid: {', '.join(tokens) or 'none'})")
        if user is not None and user not in users:
            raise ConfigError(f"--user {user[:80]!r} has no token (valid: {', '.join(users) or 'none'})")
        revoked.extend(token for token in tokens.values() if token.id in ids or token.user == user)
        for token in revoked:
            del content["tokens"][token.id]

    _change(run, remove)
    for token in revoked:
        run.event("token_revoked", replica=None, expert=None, reason=f"token {token.id} of {token.user}", by=by)
    return revoked


def _stored(token: UserToken) -> dict[str, Any]:
    value = asdict(token)
    del value["id"]
    return value


def _entry(name: str, value: Mapping[str, Any]) -> UserToken:
    """Returns the token with the ID `name` from its JSON object `value`. Raises KeyError, TypeError or ValueError if
    that is not valid."""
    limits = TokenLimits(**{key: value["limits"].get(key) for key in LIMITS})
    experts = value["experts"]
    if not isinstance(experts, list | None):
        raise TypeError(f"token {name!r}: its experts are not a list")
    token = UserToken(
        name, value["user"], value["digest"], value["slot"], value["created_at"], value["expires_at"], limits,
        None if experts is None else tuple(experts),
    )  # fmt: skip
    counts = all(limit is None or (type(limit) is int and limit > 0) for limit in asdict(limits).values())
    texts = all(isinstance(text, str) for text in (token.user, token.digest, *(token.experts or ())))
    times = type(token.created_at) in (int, float) and type(token.expires_at) in (int, float, type(None))
    if not (counts and texts and times and len(token.digest) == len(_NO_DIGEST) and token.digest.isascii()):
        raise ValueError(f"token {name!r} has a wrong value")
    if type(token.slot) is not int or not 0 <= token.slot < SLOTS:
        raise ValueError(f"token {name!r} has the slot {token.slot!r} (valid: 0 to {SLOTS - 1})")
    return token


def _read(path: Path) -> dict[str, Any]:
    try:
        return load_json(path)
    except FileNotFoundError:
        return {"schema": SCHEMA, "next_slot": 0, "tokens": {}}
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RegistryError(f"cannot read {path}: {why} (repair or remove it)") from error


def _change(run: RunDir, apply: Callable[[dict[str, Any]], None]) -> None:
    """Reads `tokens.json`, lets `apply` change its content, and writes it. Meanwhile no other process can change the
    file."""
    path = run.tokens_json
    with exclusive(path.with_name(".tokens.changing")):
        content = _read(path)
        try:
            apply(content)
        except RegistryError as error:
            raise RegistryError(f"{path}: {error} (repair or remove it)") from error
        if len(json.dumps(content, indent=1)) > MAX_FILE_BYTES:
            raise LaunchError(f"{path} would have more than {MAX_FILE_BYTES} bytes: revoke some tokens first")
        replace_json(path, content)
