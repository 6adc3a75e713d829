"""The examination of a distillation on one batch, before a training: :func:`diagnose`, and ``fgd doctor``.

:func:`diagnose` runs student and teacher a few times on one batch and hands what it sees to the checks of
:mod:`fgd_hooks.diagnostics.checks`. :func:`first_step` only looks at what a training step leaves behind anyway.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fgd_hooks.config import ScheduleConfig
from fgd_hooks.diagnostics import checks
from fgd_hooks.diagnostics.report import Finding, Report, red, yellow
from fgd_hooks.distilled import Distilled
from fgd_hooks.distiller import Distiller
from fgd_hooks.errors import TapError
from fgd_hooks.guards import StepHealth
from fgd_hooks.masks import PackedBoxes
from fgd_hooks.schedule import Clock
from fgd_hooks.teacher import doubts, first_input
from fgd_hooks.utils.modules import gradient_norm
from fgd_hooks.utils.preserve import RandomState, bit_equal, preserve

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def diagnose(
    distiller: Distiller,
    images: Any = None,
    boxes: Sequence[Tensor] | PackedBoxes | None = None,
    *,
    loss: Callable[[], Tensor],
    optimizer: Optimizers | None = None,
    canvas: tuple[int, int] | None = None,
) -> Report:
    """Examine the whole distillation on one batch, and leave no trace in models, gradients and random state.

    ::

        report = diagnose(
            distiller, images, boxes, loss=lambda: criterion(student(images), targets), optimizer=optimizer
        )
        print(report)

    The student runs five times (six where ``images`` is None) and the teacher three times. Set the student to train
    mode before, as in training. Among several processes all must call it: adapters are fitted and the balance is
    measured over all of them.

    Args:
        distiller: what is examined.
        images: as for :meth:`fgd_hooks.Distiller.forward`; None for a host whose distiller takes them from the
            student's own pass, such as :class:`~fgd_hooks.integrations.torchvision.TorchvisionDistiller`.
        boxes: as for :meth:`fgd_hooks.Distiller.forward`; None with ``images=None``.
        loss: runs the student on this batch and gives the task's loss, one number; it is called several times and
            must not call ``backward`` or ``step``.
        optimizer: the one (or those) that shall train the adapters and context blocks; None: not checked, and said.
        canvas: as for :meth:`fgd_hooks.Distiller.forward`.

    Raises:
        ValueError: gradients are switched off, ``loss`` does not give one number, or there are no images.
    """
    if not torch.is_grad_enabled():
        raise ValueError("diagnose() needs gradients: call it outside torch.no_grad().")
    with distiller.batch_to_diagnose(images, boxes, loss) as (images, boxes):
        patient = _Patient(distiller, images, loss, optimizer)
        models = (patient.student, *patient.teachers, distiller)
        with preserve(*models), distiller.taps.aside():
            return Report(tuple(_findings(patient, boxes, canvas)))


def first_step(distiller: Distiller, distilled: Distilled, boxes: PackedBoxes, adapter_gradient: float) -> Report:
    """What a training step that distilled shows by itself; nothing is run, nothing is changed.

    ``adapter_gradient`` is the norm of what arrived at adapters and losses; 0 where they have no parameters.
    """
    names = distiller.level_names
    training = [name for teacher in distiller.teachers for name, module in teacher.named_modules() if module.training]
    findings = [
        checks.check_masks(boxes, names, _sizes(distiller, boxes)),
        _parts(distiller, distilled, boxes),
        checks.check_frozen([], training, []),
    ]
    if next(distiller.adapters.parameters(), None) is not None:
        findings.append(checks.check_gradient(names, [], {"all": adapter_gradient}, None, _taken(distiller)))
    return Report(tuple(findings))


class _Patient:
    """What is examined, and how it is run."""

    def __init__(
        self, distiller: Distiller, images: Any, loss: Callable[[], Tensor], optimizer: Optimizers | None
    ) -> None:
        self.distiller = distiller
        self.images = images
        self.loss = loss
        self.optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
        self.student = distiller.student
        self.teachers = distiller.teachers
        self.random = RandomState.now(self.student, *self.teachers)

    def run(self) -> Tensor:
        """The task's loss of a student that starts from the same random state each time."""
        self.random.restore()
        self.distiller.taps.clear()
        task = self.loss()
        if not isinstance(task, Tensor) or task.numel() != 1:
            found = f"a tensor of shape {tuple(task.shape)}" if isinstance(task, Tensor) else type(task).__name__
            raise ValueError(f"loss() must run the student and return the task's loss as one number; it gave {found}.")
        return task.reshape(())

    def distil(self, boxes: PackedBoxes, weight: float, mode: str) -> Distilled:
        """One step of the Distiller as at the beginning of a training, with another weight and balance."""
        own = self.distiller
        own.config = config = copy.deepcopy(own.config)
        config.weight, config.interval, config.schedule = weight, 1, ScheduleConfig(stop=None)
        if config.balance.mode == "fixed":
            config.balance.per_level = True  # measured for each level, since each has its own fixed strength
        config.balance.mode = mode
        own.balance, own.clock, own._health = own.new_balance(config), Clock(), StepHealth(config)
        distilled: Distilled = own(self.images, boxes)
        return distilled

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the student's parameters since the last call."""
        found = {name: p.grad for name, p in self.student.named_parameters() if p.grad is not None}
        for parameter in [*self.student.parameters(), *self.distiller.parameters()]:
            parameter.grad = None
        return found


def _findings(patient: _Patient, boxes: Sequence[Tensor] | PackedBoxes, canvas: Any) -> Iterator[Finding]:
    """Run the passes and yield what the checks find; ends early where the rest cannot be run."""
    distiller, names = patient.distiller, patient.distiller.level_names
    task = patient.run()
    yield checks.check_numbers(patient.student, float(task.detach()))
    features = distiller.taps.captured
    taps = checks.check_taps(distiller.taps.taps, features)
    yield taps
    for number, found in enumerate(distiller.found_levels):
        pairs = [pair for pair in distiller.pairs if pair.number == number]
        yield checks.check_levels(pairs, found.student, found.teacher, found.chosen)
        yield checks.check_teacher(doubts(patient.student, patient.teachers[number]))
    frozen = [parameter for teacher in patient.teachers for parameter in teacher.parameters()]
    yield checks.check_optimizer(distiller.parameters(), frozen, patient.optimizers)
    if taps.status == "red":
        return
    captured = [feature for feature in features if feature is not None]
    try:
        packed = PackedBoxes.of_batch(first_input(patient.images), boxes, canvas, captured[0].device)
    except ValueError as error:
        yield red("masks", str(error), "Pass one (n, 4) tensor of pixel x1 y1 x2 y2 per image.")
        return
    yield checks.check_masks(packed, names, [(f.shape[2], f.shape[3]) for f in captured])
    yield from _teacher(patient, captured)
    blocked = [name for name, feature in zip(names, captured, strict=True) if not feature.requires_grad]
    if blocked or not task.requires_grad:
        yield checks.check_gradient(names, blocked or names, {}, 0.0, [])
        return
    del features, captured, taps
    try:
        yield from _passes(patient, packed)
    except (ValueError, TapError) as error:
        yield red("step", str(error), "Mend this first; the checks that need a whole step were left out.")


def _teacher(patient: _Patient, student: list[Tensor]) -> Iterator[Finding]:
    """The teacher alone: does it stay as it is, and do its features say anything."""

    def tensors() -> list[tuple[str, Tensor]]:  # asked for twice: the teacher may move to another device
        return [pair for teacher in patient.teachers for pair in teacher.state_dict().items()]

    before = [tensor.clone() for _, tensor in tensors()]
    taught = patient.distiller.teach(patient.images, student[0].device)[0]
    pairs = zip(tensors(), before, strict=True)
    changed = [name for (name, tensor), old in pairs if not bit_equal(tensor, old.to(tensor))]
    modules = [pair for teacher in patient.teachers for pair in teacher.named_modules()]
    training = [name or "(model)" for name, module in modules if module.training]
    batch = nn.modules.batchnorm._BatchNorm
    unkept = [name for name, module in modules if isinstance(module, batch) and module.running_mean is None]
    yield checks.check_frozen(changed, training, unkept)
    yield checks.check_features(patient.distiller.level_names, taught)


def _taken(distiller: Distiller) -> list[str]:
    """Names of the teachers' parameters that take or have a gradient."""
    parameters = [pair for teacher in distiller.teachers for pair in teacher.named_parameters()]
    return [name for name, p in parameters if p.requires_grad or p.grad is not None]


def _passes(patient: _Patient, boxes: PackedBoxes) -> Iterator[Finding]:
    """Whole steps: one that measures, one for the distillation's gradient alone, a plain one and one of weight 0."""
    distiller, names = patient.distiller, patient.distiller.level_names
    config = distiller.config
    task = patient.run()
    distilled = patient.distil(boxes, 1.0, "gradient")
    (task + distilled.loss).backward()
    distiller.balance.close()
    ratios, scales = distiller.balance.ratios.tolist(), distiller.balance.scales.tolist()
    own = {name: list(adapter.parameters()) for name, adapter in distiller.adapters.items()}
    adapters = {name: gradient_norm(p.grad for p in parameters) for name, parameters in own.items() if parameters}
    taken = _taken(distiller)
    patient.gradients()
    yield _parts(distiller, distilled, boxes)

    patient.run()
    loss = patient.distil(boxes, 1.0, "fixed").loss
    student = [p for p in patient.student.parameters() if p.requires_grad]
    reached = gradient_norm(torch.autograd.grad(loss, student, allow_unused=True)) if loss.requires_grad else 0.0
    yield checks.check_gradient(names, [], adapters, reached, taken)
    yield checks.check_scale(names, ratios, scales, config, config.weight or 1.0)

    def plain() -> dict[str, Tensor]:
        patient.run().backward()
        return patient.gradients()

    first = plain()
    (patient.run() + patient.distil(boxes, 0.0, config.balance.mode).loss).backward()
    different = _different(first, patient.gradients())
    yield checks.check_weight_zero(len(first), different, _different(first, plain()) if different else [])
    if config.weight == 0:
        found = "The weight is 0: the distillation is switched off. The findings above are those for weight 1."
        yield yellow("weight", found, "Set weight=1.")


def _sizes(distiller: Distiller, boxes: PackedBoxes) -> list[tuple[int, int]]:
    """(H, W) of the levels' maps, from the first image's canvas and the strides."""
    height, width = boxes.canvas[0].tolist()
    strides = [pair.student.stride for pair in distiller.pairs]
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]


def _parts(distiller: Distiller, distilled: Distilled, boxes: PackedBoxes) -> Finding:
    weights: dict[str, float] = {}  # of a part that several losses have, the largest
    for loss in distiller.losses.values():
        for part, weight in getattr(loss, "weights", {}).items():
            weights[part] = max(weight, weights.get(part, 0.0))
    empty = checks.empty_parts(boxes, distiller.level_names, _sizes(distiller, boxes))
    return checks.check_parts(distilled.raw, weights, empty)


def _different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    both = one.keys() & other.keys()
    return [name for name in one | other if name not in both or not bit_equal(one[name], other[name])]
