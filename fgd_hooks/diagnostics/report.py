"""What a check-up finds: one finding for each check, and the report that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


Status = Literal["green", "yellow", "red"]


_ORDER: tuple[Status, ...] = ("green", "yellow", "red")


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        status: "green" (well), "yellow" (works, but look at it) or "red" (will not distil, or will harm).
        name: of the check.
        found: what was found, with the numbers.
        mend: how to mend it, in one line; empty where green.
        values: the numbers by name.
    """

    status: Status
    name: str
    found: str
    mend: str = ""
    values: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status}: {self.name}: {self.found}" + (f" Mend: {self.mend}" if self.mend else "")


@dataclass(frozen=True)
class Report:
    """All findings of a check-up.

    Attributes:
        findings: in the order of the checks.
    """

    findings: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        """The worst status of all findings; green where there is none."""
        return worst(finding.status for finding in self.findings)

    def of(self, name: str) -> Finding:
        """The finding of the check ``name``.

        Raises:
            KeyError: that check has not run; the message names those that have.
        """
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"There is no check {name!r} here; there are {', '.join(f.name for f in self.findings)}.")

    @property
    def troubles(self) -> tuple[Finding, ...]:
        """The findings that are not green, worst first."""
        return tuple(f for status in ("red", "yellow") for f in self.findings if f.status == status)

    def summary(self) -> str:
        """One line: how many checks, and how many of them are yellow and red."""
        counts = {status: sum(f.status == status for f in self.findings) for status in _ORDER}
        return f"{self.status}: {len(self.findings)} checks, " + ", ".join(f"{n} {s}" for s, n in counts.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite become None, which JSON can hold."""
        return {"status": self.status, "findings": [_finite(asdict(finding)) for finding in self.findings]}

    def __str__(self) -> str:
        return "\n".join([*(str(finding) for finding in self.findings), self.summary()])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        table = Table(show_lines=True)
        for column in ("", "check", "found, and how to mend it"):
            table.add_column(column, overflow="fold")
        for finding in self.findings:
            cell = Text(finding.found)
            if finding.mend:
                cell.append(f"\nMend: {finding.mend}", style="bold")
            table.add_row(Text(finding.status, style=finding.status), finding.name, cell)
        yield table
        yield Text(self.summary(), style=self.status)


def worst(statuses: Iterable[Status]) -> Status:
    """The worst of several; green where there is none."""
    return max(statuses, key=_ORDER.index, default="green")


def per_level(names: Iterable[str], values: Iterable[float], form: str = ".3g") -> str:
    """``P3 0.5, P4 2`` from the levels' names and numbers."""
    return ", ".join(f"{name} {value:{form}}" for name, value in zip(names, values, strict=True))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
