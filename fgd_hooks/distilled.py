"""What one step of distillation gives: the loss, and on request its parts level by level."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fgd_hooks.losses.base import LossResult


class Found(NamedTuple):
    """The parts of all levels one after another, () each and detached, and how they enter the loss."""

    parts: list[Tensor]
    raw: list[Tensor]
    factors: Tensor  # (L,) of the levels
    finite: Tensor  # () bool


@dataclass
class Distilled:
    """What one step of distillation gives.

    Args:
        loss: (), to be added to the task's loss.
        names: of each level's parts.
        found: what the parts are computed from when they are asked for; None: all are 0.
        weight: what the loss is multiplied by in this step, the configured weight times the schedule; 0 when the step
            does not distil.
        measured: whether this step measured the balance, so that the student learned from the task alone.
        resting: whether the step does not distil because of ``interval``.
    """

    loss: Tensor
    names: Mapping[str, Sequence[str]]
    found: Found | None = None
    weight: float = 0.0
    measured: bool = False
    resting: bool = False

    @functools.cached_property
    def parts(self) -> dict[str, Tensor]:
        """Each part of the loss summed over the levels, as it enters ``loss`` (detached)."""
        every = list(dict.fromkeys(part for parts in self.names.values() for part in parts))
        if self.found is None:
            return dict.fromkeys(every, self._zero)
        if all(list(parts) == every for parts in self.names.values()):
            return dict(zip(every, self._table.view(-1, len(every)).sum(0).unbind(), strict=True))
        levels = self.levels.values()
        return {part: torch.stack([level[part] for level in levels if part in level]).sum() for part in every}

    @functools.cached_property
    def levels(self) -> dict[str, dict[str, Tensor]]:
        """The same for each level: ``levels["P3"]["foreground"]`` (detached)."""
        return self._named(self._table.unbind() if self.found else None)

    @functools.cached_property
    def raw(self) -> dict[str, dict[str, Tensor]]:
        """Each level's parts before the loss's own weights, the balance and the schedule (detached)."""
        return self._named(self.found.raw if self.found else None)

    @functools.cached_property
    def _table(self) -> Tensor:
        """(L * parts,) of :attr:`levels`, 0 in a step whose loss is not finite."""
        parts, _, factors, finite = cast(Found, self.found)
        each = zip(factors.unbind(), self.names.values(), strict=True)
        return torch.where(finite, torch.stack(parts) * torch.cat([one.expand(len(names)) for one, names in each]), 0.0)

    @property
    def _zero(self) -> Tensor:
        return self.loss.detach()

    def _named(self, values: Sequence[Tensor] | None) -> dict[str, dict[str, Tensor]]:
        given = iter(values or [self._zero] * sum(map(len, self.names.values())))
        return {level: {part: next(given) for part in parts} for level, parts in self.names.items()}


def assemble(
    losses: Tensor, results: Mapping[str, LossResult], factors: Tensor, zero: Tensor
) -> tuple[Distilled, Tensor]:
    """The levels' losses as one, 0 and without gradient where it is not finite; and whether it is, () bool.

    Args:
        losses: (L,) those of ``results``.
        results: what each level's loss gives.
        factors: (L,) what the losses are multiplied by.
        zero: ().
    """
    total = (losses * factors).sum()
    finite = total.detach().abs() < float("inf")
    parts = [value.detach() for result in results.values() for value in result.parts.values()]
    raw = [value.detach() for result in results.values() for value in result.raw.values()]
    names = {name: tuple(result.parts) for name, result in results.items()}
    return Distilled(torch.where(finite, total, zero), names, Found(parts, raw, factors, finite)), finite
