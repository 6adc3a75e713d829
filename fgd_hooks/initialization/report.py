"""What a student took over from its teacher before its training, and how well its layers repeat the teacher's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class InitializationReport:
    """What was copied from the teacher's layers, and what was fitted to them.

    Args:
        copied: name of each student tensor (parameter or buffer) that was set -> name of the teacher's.
        kept: name of each other student tensor in these parts -> why it stayed as it was.
        modules: for each part the modules that were compared, (student's name, teacher's name); empty: nothing was to
            be copied.
        parameters: how many numbers were copied, buffers not counted.
        of: how many there are in these parts of the student.
        fitted: name of each convolution that was fitted -> the share of the variance of the teacher's outputs that its
            outputs explain, mean over its channels, on the cells that it was fitted to; None: nothing was to be fitted.
        unfitted: name of each other convolution -> why it stayed as it was.
    """

    copied: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    modules: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    parameters: int = 0
    of: int = 0
    fitted: dict[str, float] | None = None
    unfitted: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line."""
        parts, texts = "+".join(self.modules), []
        if self.copied:
            texts.append(
                f"{self.parameters:,} of {self.of:,} parameters of the {parts} were initialised from the teacher "
                f"({len(self.copied)} tensors, {len(self.kept)} kept)"
            )
        elif self.modules:
            texts.append(f"nothing of the {parts} was initialised from the teacher")
        texts += [f"{name} kept: {reason}" for name, reason in list(self.kept.items())[:1]]
        if self.fitted:
            count, share = len(self.fitted), statistics.median(self.fitted.values())
            texts.append(
                f"{count} of {count + len(self.unfitted)} convolutions were fitted to the teacher's outputs "
                f"and explain {share:.0%} of their variance (median)"
            )
        elif self.fitted is not None:
            reason = next(iter(self.unfitted.values()), "the student has none")
            texts.append(f"no convolution was fitted; {reason}")
        return "; ".join(texts)

    def __str__(self) -> str:
        lines = [self.summary]
        for part, modules in self.modules.items():
            names = [one if one == other else f"{one} <- {other}" for one, other in modules]
            lines.append(f"  {part}: {', '.join(names) or 'nothing was compared'}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  {names[0]}{more} kept: {reason}")
        lines += [f"  {name}: {share:.0%}" for name, share in (self.fitted or {}).items()]
        return "\n".join(lines + [f"  {name} kept: {reason}" for name, reason in self.unfitted.items()])
