"""How strong the distillation is: a scale for each level, fixed or measured from gradients.

The paper's weights fit the losses and the 256-channel necks of mmdetection. On another detector they can be off by
orders of magnitude, and differently for each level. The gradient balance keeps the ratios between the parts of the
loss and measures the scale: such that at the tapped student feature the norm of the distillation's gradient is
``ratio`` times the norm of the task's gradient.

The two norms are measured apart, in steps that come every ``interval`` steps. In such a step the student's feature
enters the distillation detached, as a leaf. So the gradient that arrives at the feature in the backward pass is the
task's alone (the levels of a neck feed each other: with the distillation switched on, the gradient at P3 would hold
that of P4 and P5, and subtracting P3's own would not remove it), and the gradient at the leaf is that of this level's
distillation alone. Both come from the loop's own backward pass: no second pass, no retained graph, and a loss scaler
multiplies both alike. The price is one step in ``interval`` in which the student learns from the task alone.

At the beginning adapters learn fast and the scale has to follow, so there are more measurements (``EARLY_STEPS``).

One image can outweigh all others: the features of a teacher that was not trained for long can be twenty times as large
on some images as on the rest, and the loss is quadratic. A scale that was measured on such a batch means nothing for
the next. So what an image adds to the gradient is limited by what the median image of the batch adds (``image_limit``).
"""

from __future__ import annotations

import functools
import logging
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fgd_hooks.config import BalanceConfig
from fgd_hooks.taps.meter import GradientMeter
from fgd_hooks.utils.checkpoint import check_count, check_tensor
from fgd_hooks.utils.distributed import WORLD, ProcessGroup, all_reduce, is_distributed
from fgd_hooks.utils.modules import norm

logger = logging.getLogger("fgd_hooks")

EARLY_STEPS = (0, 1, 4, 8)
"""Steps that measure besides every ``interval``-th: before a scale is used, and while adapters learn fastest."""

MISSED = 3  # measurements in a row that no backward pass has reached: said

PATIENCE = 48  # calls, or three intervals: losses of so many calls may share a backward pass


class Balance:
    """The scales of the levels' distillation losses.

    Args:
        config: mode, target ratio, moving average and bounds.
        count: number of levels L; with several losses or teachers, one for each level of each.
        weights: (L,) what multiplies the target ratio, or in mode "fixed" the scale; None: 1.
        groups: for each level the number of its loss and teacher: without ``per_level``, one scale for each of these;
            None: all are of one.
        process_group: the processes that measure together.

    Attributes:
        scales: (L,) what the losses are multiplied by; 1 each in mode "fixed".
        ratios: (L,) |distillation gradient| / |task gradient| found by the last measurement, with the scales before it;
            NaN before the first.
        cosines: (L,) cosine between the two gradients of the last measurement, on this process's images: below 0 where
            teacher and task pull apart; NaN before the first, and where a compiled student has no gradient to look at.
    """

    def __init__(
        self,
        config: BalanceConfig,
        count: int,
        weights: Sequence[float] | None = None,
        groups: Sequence[int] | None = None,
        process_group: ProcessGroup = WORLD,
    ) -> None:
        self.config = config
        self.process_group = process_group
        self.weights = torch.ones(count) if weights is None else torch.tensor([float(each) for each in weights])
        self.groups = torch.zeros(count, dtype=torch.long) if groups is None else torch.tensor(list(groups))
        self.scales = torch.ones(count)
        self.ratios = torch.full((count,), math.nan)
        self.cosines = torch.full((count,), math.nan)
        self._measured = torch.zeros(count)  # measurements that counted, per level
        self._steps = 0
        self._open: _Measurement | None = None
        self._missed = 0  # measurements in a row without a backward pass
        self._told: set[str] = set()

    @property
    def measures(self) -> bool:
        """Whether this kind of balance measures at all."""
        return self.config.mode == "gradient"

    def to(self, device: torch.device) -> None:
        """Keep the scales on the device of the losses, so that no step waits for the device."""
        if self.scales.device != device:
            for name in ("scales", "ratios", "cosines", "_measured", "weights", "groups"):
                setattr(self, name, getattr(self, name).to(device))

    def next_step(self) -> bool:
        """Close the last measurement, if its backward pass has come, and say whether the step that begins measures.

        :data:`EARLY_STEPS` measure, and every ``interval``-th step; none while a measurement waits for its backward
        pass, which the losses of several calls may share.
        """
        self.close()
        if not self.measures:
            return False
        step, self._steps = self._steps, self._steps + 1
        return (step in EARLY_STEPS or step % self.config.interval == 0) and not self._waits()

    def _waits(self) -> bool:
        """Whether a measurement is open whose backward pass may still come."""
        if self._open is None:
            return False
        calls = self._steps - 1 - self._open.step
        lost = not is_distributed(self.process_group) and self._open.is_lost  # ranks must agree, and count alone
        if not lost and calls < max(PATIENCE, 3 * self.config.interval):
            return True
        self._open, self._missed = None, self._missed + 1
        if self._missed >= MISSED or not lost:
            self._tell(
                f"No backward pass has reached the last {self._missed} measurement(s) of the balance, the last one "
                f"{calls} calls ago, so the scales stay as they are: call (task_loss + distilled.loss).backward(), of "
                "several calls at once if you like, and keep no loss of a step that is left out."
            )
        return False

    def _tell(self, message: str) -> None:
        """Warn, once of each kind."""
        if message[:40] not in self._told:
            self._told.add(message[:40])
            logger.warning(message)

    def observe(
        self, features: list[Tensor], weight: float, meters: Sequence[GradientMeter | None] = ()
    ) -> list[Tensor]:
        """Begin a measurement; returns leaves that stand in for the student's features in the distillation.

        The norms are taken when the backward pass of this step comes along, at once or with those of later calls; when
        none comes, nothing is measured.

        Args:
            features: the student's tapped features, (N, C, H, W) each.
            weight: what the losses are multiplied by in this step besides ``scales``.
            meters: of a compiled student, what finds the norm of the task's gradient inside the compiled graphs.
        """
        leaves = [feature.detach().requires_grad_() for feature in features]
        self._open = _Measurement(features, leaves, weight, meters, self._steps - 1)
        return leaves

    def limited(self, feature: Tensor) -> Tensor:
        """The same feature (N, C, H, W), with ``image_limit`` on the gradient that comes back through it."""
        limit = self.config.image_limit
        if not self.measures or limit is None or not feature.requires_grad:
            return feature
        feature = feature.view_as(feature)  # where there is no adapter, the task's gradient comes through the feature
        feature.register_hook(functools.partial(limit_images, limit=limit))
        return feature

    @property
    def unmeasured(self) -> list[int]:
        """The levels that no measurement has reached yet, and that do not distil therefore."""
        return [number for number, count in enumerate(self._measured.tolist()) if count == 0] if self.measures else []

    def warn_if_unmeasured(self, names: Sequence[str]) -> None:
        """Name those levels in a warning, if there are any."""
        if unmeasured := self.unmeasured:
            logger.warning(
                "The balance could not measure %s yet, so these levels do not distil: call the distiller before the "
                "backward pass of (task_loss + distilled.loss), and see that the task's loss depends on them.",
                ", ".join(names[number] for number in unmeasured),
            )

    def trial(self, losses: Tensor) -> Tensor:
        """(L,) factors of the losses in a measuring step: the scales, or where there is none yet 1 over the loss.

        Only adapters learn from such a step. A loss of thousands would stay in their optimizer's averages for long.

        Args:
            losses: (L,) of this step.
        """
        size = losses.detach().abs().to(self.scales)
        guess = torch.where(torch.isfinite(size) & (size > 0), 1 / size, torch.ones_like(size))
        used = torch.where(self._measured > 0, self.scales, guess)
        if self._open is not None:
            self._open.used = used
        return used

    @property
    def factors(self) -> Tensor:
        """(L,) what the losses are multiplied by: 0 for a level that no measurement has reached yet."""
        return self.scales * (self._measured > 0) if self.measures else self.scales * self.weights

    def forget(self) -> None:
        """Drop a measurement whose step came to nothing, with all that it holds of the step."""
        self._open = None

    def close(self) -> None:
        """Take the norms of a measuring step whose backward pass has come; levels that it did not reach count as 0.

        The next step does this by itself. Under DDP all ranks must call it together.
        """
        measurement = self._open
        if measurement is None or not measurement.has_arrived:
            return
        self._open, self._missed = None, 0
        if measurement.is_void:
            self._tell(
                "Several backward passes went through the features of one measuring step, each with a part of the "
                "task's gradient, so that nothing was measured: add the losses and call backward() once, or set "
                "balance.mode=fixed."
            )
            return
        task, distillation, products = measurement.norms(self.scales)
        self.cosines = products / (task * distillation)
        self.update(task, distillation / (measurement.used.to(self.scales) * measurement.weight))

    def update(self, task: Tensor, distillation: Tensor) -> None:
        """Take one measurement into the scales.

        Args:
            task: (L,) norms of the task's gradient at the student's features.
            distillation: (L,) norms of the distillation's gradient there, for a scale of 1.

        A level whose norms are 0 or not finite keeps its scale. The moving average is one of the scale's logarithm,
        with the plain mean at the beginning. Only the way up is limited: a task's gradient can fall by a factor of
        hundreds within some steps, and a scale that follows slowly would leave the level to the distillation.
        """
        config = self.config
        task, distillation = task.to(self.scales), distillation.to(self.scales)
        if is_distributed(self.process_group):
            both = torch.stack([task, distillation]).square()
            all_reduce(both, self.process_group)  # the ranks must agree on the scales
            task, distillation = both.sqrt()
        if not config.per_level:
            task, distillation = (self._whole(norms) for norms in (task, distillation))
        target = config.ratio * self.weights * task / distillation
        good = torch.isfinite(target) & (target > 0)
        found = torch.where(good, target, torch.ones_like(target)).clamp(config.min_scale, config.max_scale)
        kept = (self._measured / (self._measured + 1)).clamp(max=config.momentum)
        change = (1 - kept) * (found.log() - self.scales.log())
        limit = torch.where(self._measured > 0, math.log(config.max_change), math.inf)
        change = torch.minimum(change, limit)
        self.ratios = torch.where(good, distillation * self.scales / task, self.ratios)
        self.scales = torch.where(good, (self.scales.log() + change).exp(), self.scales)
        self.scales = self.scales.clamp(config.min_scale, config.max_scale) if self.measures else self.scales
        self._measured = self._measured + good

    def _whole(self, norms: Tensor) -> Tensor:
        """(L,) for each level the norm over all levels of its loss and teacher."""
        sums = torch.zeros_like(norms).index_add(0, self.groups, norms.square())
        return sums[self.groups].sqrt()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs: plain tensors and numbers."""
        if not is_distributed(self.process_group):  # one rank saves alone; there, close() comes before
            self.close()
        state = {name: getattr(self, name).cpu() for name in ("scales", "ratios", "_measured")}
        return {**state, "_steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Saved scales stay inside the bounds of this configuration; with fixed weights they are left out.
        """
        names = ("scales", "ratios", "_measured")
        saved = {name: state.get(name) for name in names}
        for tensor in saved.values():
            if isinstance(tensor, Tensor) and tensor.shape != self.scales.shape:
                raise ValueError(
                    f"The saved balance has {tensor.numel()} levels; this distillation has {self.scales.numel()}."
                )
        check_tensor("balance's scales", saved["scales"], self.scales, finite=True, low=0)
        check_tensor("balance's ratios", saved["ratios"], self.ratios)  # NaN before the first measurement
        check_tensor("balance's measurements", saved["_measured"], self._measured, finite=True, low=0)
        steps = check_count("balance's number of steps", state.get("_steps"))
        if not self.measures:
            return
        for name in names:
            setattr(self, name, saved[name].to(self.scales.device).clone())  # type: ignore[union-attr]
        self.scales = self.scales.clamp(self.config.min_scale, self.config.max_scale)
        self._steps = steps
        self.forget()


def limit_images(gradient: Tensor, limit: float) -> Tensor:
    """A gradient in which no image has a norm of more than ``limit`` times the median image's.

    Args:
        gradient: (N, C, H, W). Of an even number of images the lower of the two middle norms is the median.
        limit: 1 or more.

    Returns:
        (N, C, H, W); images that are not finite, and all where the median is 0, are as they were.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)  # the squares of float16 overflow
    norms = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), dtype=wide)
    excess = (norms / norms.median()).mul_(1 / limit).clamp_(min=1).nan_to_num_(nan=1, posinf=1)
    limited: Tensor = gradient / excess.to(gradient.dtype)[:, None, None, None]
    return limited


class _Measurement:
    """One measuring step: what gradients come back through its features, in the backward pass that it waits for."""

    def __init__(
        self,
        features: list[Tensor],
        leaves: list[Tensor],
        weight: float,
        meters: Sequence[GradientMeter | None],
        step: int,
    ) -> None:
        self.weight, self.meters, self.step = weight, list(meters), step
        self.used = torch.ones(len(features))  # what the losses are multiplied by
        self.is_void = False
        self._leaves = [weakref.ref(leaf) for leaf in leaves]
        self._records: list[dict[str, Tensor]] = [{} for _ in features]
        for meter in self.meters:
            if meter is not None:
                meter.norm = None
        for record, feature, leaf in zip(self._records, features, leaves, strict=True):
            feature.register_hook(functools.partial(self._record, record, "task"))
            leaf.register_hook(functools.partial(self._record, record, "distillation"))

    def _record(self, record: dict[str, Tensor], key: str, gradient: Tensor | None) -> None:
        """A gradient hook that notes the norm, and with the second gradient of a level the product with the first."""
        if gradient is None:  # a compiled student whose head does not use this feature; counts as 0
            return
        if key in record:  # another backward pass: neither it nor the first has seen the whole gradient
            self.is_void = True
            record.pop("first", None)
            return
        gradient = gradient.detach()
        record[key] = norm(gradient)
        other = record.pop("first", None)
        if other is None:
            record["first"] = gradient
        else:
            record["product"] = (other.float() * gradient).sum()

    @property
    def has_arrived(self) -> bool:
        """Whether a backward pass has come through any of the features."""
        return any(self._records) or any(meter is not None and meter.norm is not None for meter in self.meters)

    @property
    def is_lost(self) -> bool:
        """Whether no backward pass can come any more: the step's graph is gone."""
        return all(leaf() is None for leaf in self._leaves)

    def norms(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(L,) each: norms of the task's and the distillation's gradient, their product (NaN: not known)."""
        for record, meter in zip(self._records, self.meters, strict=False):
            if meter is not None and meter.norm is not None:
                # where graphs end between neck and head, the feature's own hook has seen a part of the gradient only
                record["task"] = meter.norm
        missing = {"task": 0.0, "distillation": 0.0, "product": math.nan}
        task, distillation, products = (
            torch.stack(
                [record[key].to(like) if key in record else like.new_full((), value) for record in self._records]
            )
            for key, value in missing.items()
        )
        return task, distillation, products
