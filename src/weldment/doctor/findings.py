"""What a diagnosis says: findings, each with its level, whose it is, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["problem", "warning", "note"]
LEVELS: Sequence[Level] = ("problem", "warning", "note")
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: "problem": broken, or cannot be merged; "warning": will probably disappoint; "note": good to know.
        code: the kind of finding, the same in every version.
        subject: the model it is about; "" for all.
        text: a sentence without a full stop, with the numbers that it rests on.
        advice: what to do, or "".
        evidence: the numbers, for programs.
        other: where it is about two models, the second.
    """

    level: Level
    code: str
    subject: str
    text: str
    advice: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    other: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "level": self.level,
            "code": self.code,
            "models": [name for name in (self.subject, self.other) if name],
            "text": self.text,
            "advice": self.advice,
            "evidence": self.evidence,
        }


def ranked(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first; those of one level stay in their order."""
    return tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level)))


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
