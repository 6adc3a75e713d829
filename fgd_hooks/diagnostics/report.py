"""What a check-up finds: one finding for each check, and the report that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
    values: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status}: {self.name}: {self.found}" + (f" Mend: {self.mend}" if self.mend else "")


def green(name: str, found: str, values: Mapping[str, float] | None = None) -> Finding:
    """All is well."""
    return Finding("green", name, found, "", values or {})


def yellow(name: str, found: str, mend: str, values: Mapping[str, float] | None = None) -> Finding:
    """It works, but look at it."""
    return Finding("yellow", name, found, mend, values or {})


def red(name: str, found: str, mend: str, values: Mapping[str, float] | None = None) -> Finding:
    """It will not distil, or will harm."""
    return Finding("red", name, found, mend, values or {})


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
        return max((finding.status for finding in self.findings), key=_ORDER.index, default="green")

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

    def short(self) -> Report:
        """What is yellow or red, and one finding that names all that is green."""
        well = [finding.name for finding in self.findings if finding.status == "green"]
        rest = (green("well", f"{', '.join(well)} (--verbose shows them)."),) if well else ()
        return Report((*self.troubles, *rest))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite become None, which JSON can hold."""
        findings = [asdict(finding) for finding in self.findings]
        for each in findings:
            each["values"] = {k: value if math.isfinite(value) else None for k, value in each["values"].items()}
        return {"status": self.status, "findings": findings}

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
            table.add_row(Text(finding.status, style=finding.status), Text(finding.name), cell)
        yield table
        yield Text(self.summary(), style=self.status)


def per_level(names: Iterable[str], values: Iterable[float], form: str = ".3g") -> str:
    """``P3 0.5, P4 2`` from the levels' names and numbers."""
    return ", ".join(f"{name} {value:{form}}" for name, value in zip(names, values, strict=True))


def keyed(kind: str, names: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    """``{"kind/P3": 0.5, "kind/P4": 2}``, for :attr:`Finding.values`."""
    return {f"{kind}/{name}": value for name, value in zip(names, values, strict=True)}
