"""The kinds of fault, the rules that select requests, and the JSON form of both.

`at` counts tokens: at k, the fault replaces the token that would follow k tokens. Parsing checks all values, and the
error for an unknown kind or key names the nearest valid one. `fault_schedule` decides which rule applies to a request,
and `fault_injection` decides what happens to the connection.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from hpc_router.errors import ConfigError, suggest

CONNECT: Final = -2  # before a byte of the request is read
HEADERS: Final = -1  # before a byte of the response is sent


class FaultKind(StrEnum):
    """The kind of a fault."""

    DIE = "die"
    HANG = "hang"
    STATUS = "status"
    SLOW = "slow"
    ERROR_EVENT = "error_event"
    CUT = "cut"
    GARBAGE = "garbage"
    RESET = "reset"
    PARTIAL_BODY = "partial_body"
    LOAD_FAIL = "load_fail"


class ResponseForm(StrEnum):
    """The form of the response that a request would get. It decides which faults are possible."""

    STREAM = "stream"
    BODY = "body"
    OTHER = "other"  # /health, /metrics, /v1/models: only for rules that name the path


_ANYWHERE = frozenset({FaultKind.DIE, FaultKind.HANG, FaultKind.STATUS, FaultKind.GARBAGE, FaultKind.RESET})
EXPRESSIBLE: Final = {
    ResponseForm.STREAM: _ANYWHERE | {FaultKind.SLOW, FaultKind.ERROR_EVENT, FaultKind.CUT},
    ResponseForm.BODY: _ANYWHERE | {FaultKind.SLOW, FaultKind.PARTIAL_BODY},
    ResponseForm.OTHER: _ANYWHERE,
}

LOAD_FAILURES: Final = ("out_of_memory", "kv_cache", "weights", "cuda")

_KEYS: Final = {
    FaultKind.DIE: ("at", "exit_code"),
    FaultKind.HANG: ("at", "for_s"),
    FaultKind.STATUS: ("status", "retry_after_s", "message"),
    FaultKind.SLOW: ("factor",),
    FaultKind.ERROR_EVENT: ("at", "message"),
    FaultKind.CUT: ("at",),
    FaultKind.GARBAGE: ("at",),
    FaultKind.RESET: ("at",),
    FaultKind.PARTIAL_BODY: (),
    FaultKind.LOAD_FAIL: ("reason", "counter"),
}
_SELECTORS: Final = ("times", "every", "probability", "path", "model")
_DEFAULT_AT: Final = {FaultKind.HANG: HEADERS, FaultKind.GARBAGE: HEADERS, FaultKind.RESET: CONNECT}
_NAMED_AT: Final = {"connect": CONNECT, "headers": HEADERS, "first_token": 0}
_EARLIEST_AT: Final = {FaultKind.RESET: CONNECT, FaultKind.ERROR_EVENT: 0, FaultKind.CUT: 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault and its parameters."""

    kind: FaultKind
    at: int = 0
    for_s: float | None = None
    status: int = 503
    retry_after_s: float | None = None
    message: str = "simulated fault"
    factor: float = 2.0
    exit_code: int | None = None
    reason: str = LOAD_FAILURES[0]
    counter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A fault, and the requests to which it applies.

    A rule applies to every `every`-th request that matches `path` and `model`, with the probability `probability`, and
    to at most `times` requests in total.
    """

    fault: Fault
    times: int | None = None
    every: int = 1
    probability: float = 1.0
    path: str | None = None
    model: str | None = None
    source: dict[str, object] = field(default_factory=dict, compare=False)


def parse_rules(value: object) -> tuple[Rule, ...]:
    """Parses a JSON list of rules, as text or decoded. A single rule counts as a list of one. Raises ConfigError."""
    value = _decoded(value, where="faults")
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise ConfigError('faults: a JSON list of objects is needed, such as [{"kind": "die", "at": 3}]')
    return tuple(_rule(entry, where=f"faults[{index}]") for index, entry in enumerate(entries))


def parse_fault(value: object, *, where: str) -> Fault:
    """Parses the fault that a request specifies for itself, given as JSON text or decoded. Raises ConfigError. `where`:
    name of the field or header that has it, for error messages.

    The fault applies to this request, so it must not have `path` or other keys that select requests. The connection is
    accepted before the request is read, so `connect` is changed to `headers`.
    """
    source = _object(_decoded(value, where=where), where=where)
    fault = _fault(source, where=where, extra=())
    if fault.kind is FaultKind.LOAD_FAIL:
        raise ConfigError(f"{where}: load_fail is injected at the start only: give it to --faults")
    return Fault(kind=FaultKind.RESET, at=HEADERS) if fault.at == CONNECT else fault


def _rule(value: object, *, where: str) -> Rule:
    source = _object(value, where=where)
    fault = _fault(source, where=where, extra=_SELECTORS)
    rule = Rule(
        fault=fault,
        times=_integer(source, "times", where=where, minimum=0),
        every=_integer(source, "every", where=where, minimum=1) or 1,
        probability=1.0 if (share := _number(source, "probability", where=where, maximum=1.0)) is None else share,
        path=_string(source, "path", where=where),
        model=_string(source, "model", where=where),
        source=source,
    )
    if fault.at == CONNECT and (rule.path is not None or rule.model is not None):
        raise ConfigError(f"{where}: a reset at connect has neither path nor model; give it 'at': 'headers'")
    if fault.kind is FaultKind.LOAD_FAIL and rule.times is not None and fault.counter is None:
        raise ConfigError(f"{where}: load_fail with 'times' needs 'counter', a file that counts across starts")
    return rule


def _fault(source: dict[str, object], *, where: str, extra: Sequence[str]) -> Fault:
    name = source.get("kind")
    if not isinstance(name, str) or name not in list(FaultKind):
        raise ConfigError(f"{where}: unknown kind {name!r}{suggest(str(name), list(FaultKind))}")
    kind = FaultKind(name)
    valid = ("kind", *_KEYS[kind], *extra)
    for key in source:
        if key not in valid:
            raise ConfigError(f"{where}: unknown key '{key}' for kind '{kind}'{suggest(key, valid)}")
    reason = _string(source, "reason", where=where) or LOAD_FAILURES[0]
    if reason not in LOAD_FAILURES:
        raise ConfigError(f"{where}: unknown reason '{reason}'{suggest(reason, LOAD_FAILURES)}")
    status = _integer(source, "status", where=where, minimum=400) or 503
    if status > 599:
        raise ConfigError(f"{where}: status {status} is no error status (valid: 400 to 599)")
    factor = _number(source, "factor", where=where)
    return Fault(
        kind=kind,
        at=_position(source, kind=kind, where=where),
        for_s=_number(source, "for_s", where=where),
        status=status,
        retry_after_s=_number(source, "retry_after_s", where=where),
        message=_string(source, "message", where=where) or "simulated fault",
        factor=2.0 if factor is None else factor,
        exit_code=_integer(source, "exit_code", where=where, minimum=0),
        reason=reason,
        counter=_string(source, "counter", where=where),
    )


def _position(source: dict[str, object], *, kind: FaultKind, where: str) -> int:
    value = source.get("at", _DEFAULT_AT.get(kind, 0))
    if isinstance(value, str) and value in _NAMED_AT:
        value = _NAMED_AT[value]
    elif isinstance(value, str):
        raise ConfigError(f"{where}: unknown position '{value}'{suggest(value, _NAMED_AT)}, or a number of tokens")
    elif "at" in source and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigError(f"{where}: 'at' is {value!r}; valid: a number of tokens from 0, {', '.join(_NAMED_AT)}")
    assert isinstance(value, int)
    if value < _EARLIEST_AT.get(kind, HEADERS):
        raise ConfigError(f"{where}: {kind} cannot be injected at '{source['at']}'; valid: a later position")
    return value


def _decoded(value: object, *, where: str) -> object:
    if not isinstance(value, str | bytes):
        return value
    try:
        decoded: object = json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{where}: not JSON: {exc}") from exc
    return decoded


def _object(value: object, *, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: an object with a 'kind' is needed, not {json.dumps(value)}")
    return value


def _string(source: dict[str, object], key: str, *, where: str) -> str | None:
    value = source.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{where}: '{key}' is {value!r}; a string is needed")
    return value


def _integer(source: dict[str, object], key: str, *, where: str, minimum: int) -> int | None:
    value = source.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{where}: '{key}' is {value!r}; a whole number from {minimum} is needed")
    return value


def _number(source: dict[str, object], key: str, *, where: str, maximum: float = 1e9) -> float | None:
    value = source.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= maximum:
        raise ConfigError(f"{where}: '{key}' is {value!r}; a number from 0 to {maximum:g} is needed")
    return float(value)
