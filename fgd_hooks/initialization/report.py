"""What a student took over from its teacher, and how well its layers repeat the teacher's."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Inheritance:
    """What a student took over from its teacher.

    Args:
        copied: name of each student tensor (parameter or buffer) that was set -> name of the teacher's.
        kept: name of each other student tensor in these parts -> why it stayed as it was.
        modules: for each part the modules that were compared, (student's name, teacher's name).
        parameters: how many numbers were copied, buffers not counted.
        of: how many there are in these parts of the student.
        fitted: how well the student's layers repeat the teacher's, where they were fitted to it.
    """

    copied: dict[str, str]
    kept: dict[str, str]
    modules: dict[str, list[tuple[str, str]]]
    parameters: int
    of: int
    fitted: Reconstruction | None = None

    @property
    def summary(self) -> str:
        """One line."""
        parts = "+".join(self.modules)
        text = f"nothing of the {parts} was inherited"
        if self.copied:
            text = (
                f"{self.parameters:,} of {self.of:,} parameters of the {parts} were inherited "
                f"({len(self.copied)} tensors, {len(self.kept)} kept)"
            )
        text += "".join(f"; {name} kept: {reason}" for name, reason in list(self.kept.items())[:1])
        return f"{text}; {self.fitted.summary}" if self.fitted else text

    def __str__(self) -> str:
        lines = [f"{self.parameters:,} of {self.of:,} parameters inherited, {len(self.copied)} tensors"]
        for part, modules in self.modules.items():
            names = [one if one == other else f"{one} <- {other}" for one, other in modules]
            lines.append(f"  {part}: {', '.join(names) or 'nothing was compared'}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"{len(self.kept)} tensors kept"] if self.kept else []
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  {names[0]}{more}: {reason}")
        lines += [str(self.fitted)] if self.fitted else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Reconstruction:
    """How well a student's layers repeat its teacher's.

    Args:
        explained: name of each convolution that was fitted -> the share of the variance of the teacher's outputs that
            its outputs explain, mean over its channels, on the cells that it was fitted to.
        kept: name of each other convolution -> why it stayed as it was.
    """

    explained: dict[str, float]
    kept: dict[str, str]

    @property
    def summary(self) -> str:
        """One line."""
        if not self.explained:
            return f"no convolution was fitted; {next(iter(self.kept.values()), 'the student has none')}"
        fitted = len(self.explained)
        return (
            f"{fitted} of {fitted + len(self.kept)} convolutions were fitted to the teacher's outputs "
            f"and explain {statistics.median(self.explained.values()):.0%} of their variance (median)"
        )

    def __str__(self) -> str:
        lines = [self.summary, *(f"  {name}: {share:.0%}" for name, share in self.explained.items())]
        return "\n".join(lines + [f"  {name} kept: {reason}" for name, reason in self.kept.items()])
