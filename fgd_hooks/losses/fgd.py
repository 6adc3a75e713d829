"""Focal and Global Distillation of one pyramid level (FGD, CVPR 2022, arXiv 2111.11837)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fgd_hooks.losses.attention import Inputs, Weights, compute_dtype, plain_terms, unfilled
from fgd_hooks.losses.base import FeatureLoss, LossResult, Targets, check_temperature, register_loss
from fgd_hooks.losses.compiled import Choice
from fgd_hooks.losses.fused import constants, fused_terms
from fgd_hooks.losses.gc_block import GcBlock
from fgd_hooks.utils.registry import suggestion

PRESETS: dict[str, dict[str, float]] = {
    "two_stage": {"temperature": 0.5, "alpha": 5e-5, "beta": 2.5e-5, "gamma": 5e-5, "lambda_": 5e-7},
    "anchor_based": {"temperature": 0.5, "alpha": 1e-3, "beta": 5e-4, "gamma": 5e-4, "lambda_": 5e-6},
    "anchor_free": {"temperature": 0.5, "alpha": 1.6e-3, "beta": 8e-4, "gamma": 8e-4, "lambda_": 8e-6},
    "fcos": {"temperature": 0.8, "alpha": 1.6e-3, "beta": 8e-4, "gamma": 8e-4, "lambda_": 8e-6},
}
"""The authors' settings by kind of detector: Faster and Mask R-CNN; RetinaNet, GFL and SOLO; RepPoints; FCOS."""


@register_loss("fgd")
class FGDLoss(FeatureLoss):
    """Focal and global distillation of one level.

        foreground = alpha  * sum S A_S^t A_C^t (F_t - F_s)^2 / N
        background = beta   * sum B A_S^t A_C^t (F_t - F_s)^2 / N
        attention  = gamma  * (sum |A_S^s - A_S^t| + sum |A_C^s - A_C^t|) / N
        global     = lambda * sum (R_t(F_t) - R_s(F_s))^2 / N

    with the masks S and B of :func:`fgd_hooks.masks.box_masks`, the attentions A_S and A_C of the teacher (t) and the
    student (s), and a trained context block R for each. A weight of 0 saves that part's work; the part is then 0.

    Args:
        channels: C of both features.
        temperature: T of both attentions.
        alpha: weight of the foreground part.
        beta: weight of the background part.
        gamma: weight of the attention part.
        lambda_: weight of the global part.
        fused: compute with :mod:`fgd_hooks.losses.fused`: several times faster, a fraction of the memory, the same
            numbers. False means plain PyTorch operations, which are also what ``torch.compile`` gets to see and what
            ``create_graph=True`` differentiates a second time.
        compiled: run the fused function's heavy passes through ``torch.compile``: True, False, or None, which on a GPU
            times both ways after some steps and keeps the faster one (:mod:`fgd_hooks.losses.compiled`).

    Raises:
        ValueError: channels below 2, a temperature that is not positive, a weight that is negative or not finite.
    """

    part_names = ("foreground", "background", "attention", "global")
    takes_preset = True

    def __init__(
        self,
        channels: int,
        temperature: float = 0.5,
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 5e-4,
        lambda_: float = 5e-6,
        fused: bool = True,
        compiled: bool | None = None,
    ) -> None:
        super().__init__(channels, alpha=alpha, beta=beta, gamma=gamma, lambda_=lambda_)
        check_temperature(temperature)
        self.temperature = temperature
        self.fused = fused
        self.choice = Choice(compiled)
        self._on_device: tuple[Any, Tensor] | None = None
        self.student_context = GcBlock(channels)
        self.teacher_context = GcBlock(channels)

    @classmethod
    def from_preset(cls, preset: str, channels: int, **changes: Any) -> FGDLoss:
        """The loss with the authors' settings for a kind of detector (see :data:`PRESETS`).

        Args:
            preset: "two_stage", "anchor_based", "anchor_free" or "fcos".
            channels: C of both features.
            **changes: arguments that shall differ from the preset.

        Raises:
            ValueError: no such preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"There is no FGD preset {preset!r}. {suggestion(preset, PRESETS)}")
        return cls(channels, **{**PRESETS[preset], **changes})

    def compare(self, student: Tensor, teacher: Tensor, targets: Targets) -> LossResult:
        """The parts by the fused passes, which weigh and sum them too; else by the template."""
        if not self.fused or torch.compiler.is_compiling():
            return super().compare(student, teacher, targets)
        with unfilled():
            inputs = self._inputs(student, teacher, targets)
            loss, *vectors = fused_terms(inputs, self.choice, self._constants(inputs))
        parts, raw = (dict(zip(self.part_names, each.unbind(), strict=True)) for each in vectors)
        return LossResult(parts, raw, loss)

    def _constants(self, inputs: Inputs) -> Tensor:
        """The constants of the fused passes on the device, made again where a weight or the size has changed."""
        like = inputs.foreground
        key = (inputs.weights, inputs.temperature, inputs.student.shape, like.dtype, like.device)
        if self._on_device is None or self._on_device[0] != key:
            self._on_device = key, constants(inputs)
        return self._on_device[1]

    def terms(self, student: Tensor, teacher: Tensor, targets: Targets) -> list[Tensor]:
        """The four terms of two features (N, C, H, W), () each."""
        return plain_terms(self._inputs(student, teacher, targets))

    def _inputs(self, student: Tensor, teacher: Tensor, targets: Targets) -> Inputs:
        weights = Weights(*self.weights.values())
        if weights.focal:
            masks = targets.masks(student, teacher)
        else:
            masks = (student.new_zeros(student[:, 0].shape, dtype=compute_dtype(student, teacher)),) * 2
        blocks = self.student_context.weights(), self.teacher_context.weights()
        return Inputs(student, teacher, *masks, *blocks, self.temperature, weights)

    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Load the context blocks from a state_dict of the authors' loss class.

        Their ``conv_mask_s``, ``channel_add_conv_s.0/1/3`` and the same with ``_t`` become ``student_context`` and
        ``teacher_context``; 1x1 convolutions become linear layers. ``conv_mask_*.bias``, which has no effect, and
        ``align.*``, which is an adapter here, are left out.

        Raises:
            ValueError: a key is missing or of another size.
        """
        mine = self.state_dict()
        for key, value in mine.items():
            name = official_name(key)
            if name not in state:
                raise ValueError(f"The state_dict has no {name!r}: it is not one of the authors' FGD loss.")
            if state[name].numel() != value.numel():
                raise ValueError(
                    f"{name} has shape {tuple(state[name].shape)}, which is not that of {self.channels} channels."
                )
            mine[key] = state[name].reshape(value.shape)
        self.load_state_dict(mine)


def official_name(key: str) -> str:
    """What the authors' loss class calls the entry ``key`` of :meth:`FGDLoss.state_dict`."""
    block, layer, kind = key.split(".")
    theirs = {"attend": "conv_mask_{}", "reduce": "channel_add_conv_{}.0", "norm": "channel_add_conv_{}.1"}
    return f"{theirs.get(layer, 'channel_add_conv_{}.3').format(block[0])}.{kind}"
