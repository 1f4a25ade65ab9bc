"""The result of a check: its severity, what was found, how to fix it, and the config key to edit."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """The severity of a finding."""

    OK = "ok"  # a fact, for information
    NOTE = "note"  # the deployment works, with this consequence
    FAULT = "fault"  # a part of the deployment will not work


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check. `key`: the config key to edit; None if the fix is not in the config."""

    severity: Severity
    what: str
    fix: str | None = None
    key: str | None = None

    def __str__(self) -> str:
        return self.what if self.fix is None else f"{self.what} ({self.fix})"

    @property
    def advice(self) -> str | None:
        """Returns what the user should do: the fix, else to edit the config key; None if there is neither. A finding
        has no `fix` if `what` names the valid values."""
        return self.fix or (f"edit {self.key}" if self.key is not None else None)

    def to_json(self) -> dict[str, Any]:
        return {"state": str(self.severity), "what": self.what, "fix": self.advice, "key": self.key}


def ok(what: str) -> Finding:
    """Returns a finding that needs no action."""
    return Finding(Severity.OK, what)


def note(what: str, fix: str | None = None, key: str | None = None) -> Finding:
    """Returns a finding that the user should know about, such as a consequence of the config, although the deployment
    works."""
    return Finding(Severity.NOTE, what, fix, key)


def fault(what: str, fix: str | None = None, key: str | None = None) -> Finding:
    """Returns a finding that a part of the deployment will not work."""
    return Finding(Severity.FAULT, what, fix, key)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The findings of one or several checks."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return [str(f) for f in self.findings if f.severity is Severity.FAULT]

    @property
    def warnings(self) -> list[str]:
        return [str(f) for f in self.findings if f.severity is Severity.NOTE]
