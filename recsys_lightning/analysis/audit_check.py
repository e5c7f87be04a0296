"""What one check of the leakage audit found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["pass", "FAIL", "not checked"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was looked at.
        status: ``FAIL`` is a leak, or a run that is not what it says it is; ``not checked`` is neither.
        detail: one line: what holds, what is wrong, or why it was not checked.
        figures: the numbers behind it.
    """

    name: str
    status: Status
    detail: str
    figures: Mapping[str, int | float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status:<11}  {self.name}: {self.detail}"


def verdict(name: str, problems: Sequence[str], passed: str, figures: Mapping[str, int | float] | None = None) -> Check:
    """A check that fails by every problem there is, and passes where there is none."""
    return Check(name, "FAIL" if problems else "pass", "; ".join(problems) or passed, figures or {})


def not_checked(name: str, reason: str) -> Check:
    """A check that could not be made."""
    return Check(name, "not checked", reason)
