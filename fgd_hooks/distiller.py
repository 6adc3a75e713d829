"""The Distiller: taps, adapters, losses, balance, schedule and frozen teachers; what a training loop calls."""

from __future__ import annotations

import contextlib
import dataclasses
import textwrap
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgd_hooks.adapters import create_adapter, run_adapter
from fgd_hooks.balance import Balance
from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.distilled import Distilled, assemble
from fgd_hooks.guards import AT_WORK, GradientGuard, StepHealth, detach_earlier
from fgd_hooks.losses.base import LossResult
from fgd_hooks.masks import PackedBoxes, check_boxes
from fgd_hooks.pairing import DistillationPair, build_loss, check_names, plan_pairs, signature
from fgd_hooks.schedule import Clock, next_step, warn_if_idle
from fgd_hooks.taps.calls import batch_in
from fgd_hooks.taps.hooks import FeatureTaps, check_not_replicated
from fgd_hooks.taps.levels import find_sources
from fgd_hooks.teacher import FrozenTeacher, as_modules, check_apart, first_input, run_teachers
from fgd_hooks.utils.checkpoint import check_count, check_tensor
from fgd_hooks.utils.distributed import WORLD, ProcessGroup
from fgd_hooks.utils.modules import unwrap

if TYPE_CHECKING:
    from typing_extensions import Self


class Distiller(nn.Module):
    """Lets a frozen teacher teach a student through the feature maps of their necks.

    ::

        distiller = Distiller(student, teacher=teacher, epochs=epochs)
        optimizer = AdamW([{"params": student.parameters()}, *distiller.param_groups()])
        for images, targets in loader:
            task_loss = criterion(student(images), targets)
            distilled = distiller(images, boxes)
            (task_loss + distilled.loss).backward()

    ``parameters()`` and ``state_dict()`` hold what is trained (adapters, context blocks) and nothing else. Student and
    teacher are no submodules; the teacher is frozen and stays in eval mode. Use it as a context manager, or call
    :meth:`detach`, to remove every hook again. A second Distiller of one student and teacher replaces the
    first. Of several teachers and losses (``losses: [fgd, cwd]``), :attr:`pairs` has one entry for each level of each.

    Args:
        student: the model that learns; wrappers (DDP, compile) are looked through.
        teacher: the model that teaches, or a list of them.
        config: an :class:`~fgd_hooks.config.FGDConfig`, a dict, a YAML file, or None for the defaults.
        example: what both models are called with in the probe (:func:`fgd_hooks.taps.calls.call_model`); None: zeros.
        teacher_inputs: the same for the teachers, where they are called in another way.
        epochs: how many the training will have, as for :meth:`set_epoch`.
        process_group: of ``torch.distributed``: the processes that fit and measure together, all of which then distil
            step by step; "world": all, where there is a process group; None: this process distils alone.

    Raises:
        TeacherError: the teacher is no module or the student, shares its weights, is given twice or holds NaN.
        TapError: a tap cannot be resolved, or no levels are found.
        PairingError: no level is common.
        ConfigError: the configuration does not fit (unknown adapter, loss, level or loss option).
        ValueError: an adapter does not fit, or the student is a DataParallel over several devices.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: nn.Module | Sequence[nn.Module],
        config: FGDConfig | Mapping[str, Any] | str | Path | None = None,
        example: Any = None,
        teacher_inputs: Any = None,
        epochs: int | None = None,
        process_group: ProcessGroup = WORLD,
    ) -> None:
        super().__init__()
        self.process_group = process_group
        self.config = config = load_config(config)
        check_names(config)
        check_not_replicated(student)
        student = unwrap(student)
        teachers = as_modules(teacher)
        check_apart(student, *teachers)
        self._student = weakref.ref(student)
        self.pairs, self.found_levels = plan_pairs(student, teachers, config, example, teacher_inputs)
        self.adapters, self.losses = nn.ModuleDict(), nn.ModuleDict()
        for pair in self.pairs:
            self.adapters[pair.name] = create_adapter(config.adapter, pair.student.channels, pair.teacher.channels)
            self.losses[pair.name] = build_loss(pair.loss, pair.teacher.channels)
        self.to(next(student.parameters(), torch.empty(0)).device)
        for adapter in self.adapters.values():
            adapter.process_group = process_group
        self.balance = self.new_balance(config)
        self.clock, self._health = Clock(), StepHealth(config)
        self.set_epoch(0, epochs)
        self.trained = list(self.parameters())
        taps = [pair.student.tap for pair in self.pairs]
        sources = find_sources(student, taps, example=example)
        detach_earlier(student, teachers)
        self.taps = FeatureTaps(student, taps, role="student", grad_only=True, sources=sources)
        self._teachers: list[FrozenTeacher] = []
        try:
            for number, each in enumerate(teachers):
                mine = [pair for pair in self.pairs if pair.number == number]
                theirs = [pair.teacher.tap for pair in mine] + [pair.scores for pair in mine if pair.scores]
                self._teachers.append(FrozenTeacher(each, theirs, config.teacher))
            AT_WORK.add(self)
        except BaseException:
            self.detach()
            raise

    def new_balance(self, config: FGDConfig) -> Balance:
        """A fresh balance for these pairs."""
        weights, groups = zip(*((pair.weight, pair.group) for pair in self.pairs), strict=True)
        return Balance(config.balance, len(self.pairs), weights, groups, self.process_group)

    @property
    def teachers(self) -> list[nn.Module]:
        """The teachers, frozen."""
        return [teacher.model for teacher in self._teachers]

    def param_groups(self) -> list[dict[str, Any]]:
        """What is trained beside the student, for an optimizer, which is to be made with it and before its scheduler.

        A group that is added to an optimizer later has no place in the scheduler's lists. Without any: no group.
        """
        return [{"params": self.trained}] if self.trained else []

    @property
    def level_names(self) -> list[str]:
        """Names of the distilled levels, finest first: "P3", ...; of several losses or teachers "P3-cwd" and so on."""
        return [pair.name for pair in self.pairs]

    @property
    def part_names(self) -> list[str]:
        """Names of the losses' parts, the keys of :attr:`Distilled.parts`; losses may share one."""
        return list(dict.fromkeys(part for loss in self.losses.values() for part in loss.part_names))  # type: ignore

    @property
    def skipped_steps(self) -> int:
        """Steps so far whose distillation loss was not finite and was left out."""
        return self._health.skipped

    @property
    def student(self) -> nn.Module:
        """The student, unwrapped.

        Raises:
            RuntimeError: it exists no more; the Distiller does not keep it alive.
        """
        student = self._student()
        if student is None:
            raise RuntimeError("The student of this Distiller has been deleted; build a Distiller for the new one.")
        return student

    def set_epoch(self, epoch: int, epochs: int | None = None) -> None:
        """Tell the schedule which epoch begins (from 0) and how many there will be; None: as many as it knows of."""
        if epochs is not None and epochs != self.clock.epochs:
            warn_if_idle(self.config, epochs)
            self.clock.epochs = epochs
        self.clock.epoch = epoch

    @property
    def rests(self) -> bool:
        """Whether the next call will distil nothing: the weight is 0 then, or it rests between two that distil."""
        weight, resting = next_step(self.config, dataclasses.replace(self.clock))
        return weight == 0 or resting or not torch.is_grad_enabled()

    def forward(
        self,
        images: Any,
        boxes: Sequence[Tensor] | PackedBoxes,
        *,
        canvas: tuple[int, int] | None = None,
        task_loss: Tensor | None = None,
        teacher_inputs: Any = None,
    ) -> Distilled:
        """Distil the batch that the student has just seen. Without gradients (validation) it does nothing.

        Args:
            images: the student's (N, 3, H, W) batch; :class:`~fgd_hooks.teacher.PerTeacher` where teachers want others.
            boxes: ground truth of each image, a list of N float tensors (n_i, 4) of pixel x1 y1 x2 y2, or packed.
            canvas: (h, w) in pixels that the feature maps cover; None: the size of the batch in ``images``.
            teacher_inputs: what the teacher is called with instead, see :func:`fgd_hooks.taps.calls.call_model`.
            task_loss: () the student's own loss; only to warn when the distillation dominates it for long.

        Raises:
            TapError: a tap did not fire, or the student's feature takes no gradient.
            ValueError: boxes or features do not fit together.
            NonFiniteError: NaN or infinite for ``max_bad_steps`` steps in a row.
        """
        weight, resting = next_step(self.config, self.clock) if torch.is_grad_enabled() else (0.0, False)
        if weight == 0 or resting:
            self.taps.clear()
            return self._nothing(resting)
        features = self.taps.pop()
        device, count = features[0].device, features[0].shape[0]
        packed = PackedBoxes.of_batch(batch_in(first_input(images)), boxes, canvas, device)
        if packed is not boxes and self._health.steps < 3:
            check_boxes(packed)  # mistakes of format and unit show at once; a GPU waits for this check
        if packed.num_images != count:
            raise ValueError(
                f"There are boxes for {packed.num_images} image(s), but the student's features hold {count}. Pass one "
                "(n, 4) tensor per image, empty where it has no object."
            )
        taught, scores = self.teach(images if teacher_inputs is None else teacher_inputs, device)
        packed = packed.for_maps([(each.shape[2], each.shape[3]) for each in taught])
        self._fit_adapters(features, taught)
        self.balance.to(device)
        measuring = self.balance.next_step()
        if measuring:
            features = self.balance.observe(features, weight, self.taps.meters)
        guard = GradientGuard(self.trained, device)
        results = {
            pair.name: self.level_loss(pair, guard.watch(feature), target, packed, score)
            for pair, feature, target, score in zip(self.pairs, features, taught, scores, strict=True)
        }
        losses = torch.stack([result.loss for result in results.values()])
        scales = self.balance.trial(losses) if measuring else self.balance.factors
        distilled, guard.finite = assemble(losses, results, scales * weight, guard.zero)
        guard.watch_parameters(distilled.loss)
        self._health.count(guard.finite, self.trained)
        if self._health.steps == self.config.balance.interval + 2:
            self.balance.warn_if_unmeasured(self.level_names)
        distilled.weight, distilled.measured = weight, measuring
        if task_loss is not None:
            self._health.compare(distilled.loss, task_loss)
        return distilled

    if TYPE_CHECKING:  # torch calls forward, and leaves the type of the call open
        __call__ = forward

    def teacher_features(self, images: Any) -> list[Tensor]:
        """The frozen teachers' features (N, C, H, W) of a batch, one for each of :attr:`pairs`, without gradient."""
        return self.teach(images)[0]

    def teach(self, images: Any, device: torch.device | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
        """For each of :attr:`pairs` the teacher's feature and, if its loss needs them, class scores (N, K, H, W)."""
        scored = [[pair.scores for pair in self.pairs if pair.number == each] for each in range(len(self._teachers))]
        return run_teachers(self._teachers, scored, images, device)

    def _fit_adapters(self, features: list[Tensor], taught: list[Tensor]) -> None:
        """Fit the adapters that want it to this batch, before they are used for the first time."""
        for pair, feature, target in zip(self.pairs, features, taught, strict=True):
            adapter: Any = self.adapters[pair.name]
            if getattr(adapter, "wants_fit", False):
                adapter.fit(self._resized(pair, feature.detach(), target.shape[2:]), target)

    def adapt(self, pair: DistillationPair, student: Tensor, size: Sequence[int]) -> Tensor:
        """The student's feature (N, C, H, W) of a level through its adapter, with the teacher's (h, w) cells.

        Raises:
            ValueError: the maps differ in size, and ``resize`` is off.
        """
        return self._resized(pair, run_adapter(self.adapters[pair.name], student), size)

    def _resized(self, pair: DistillationPair, feature: Tensor, size: Sequence[int]) -> Tensor:
        """A student's map with (h, w) cells."""
        if feature.shape[2:] == tuple(size):
            return feature
        if not self.config.resize:
            raise ValueError(
                f"At level {pair.name} the student's map is {tuple(feature.shape[2:])} and the teacher's "
                f"{tuple(size)} cells. Give both models the same input size, or set resize=true."
            )
        return nn.functional.interpolate(feature, tuple(size), mode="bilinear", align_corners=False)

    def level_loss(
        self, pair: DistillationPair, student: Tensor, teacher: Tensor, boxes: PackedBoxes, scores: Tensor | None = None
    ) -> LossResult:
        """The loss of one of :attr:`pairs`, before the balance: student's and teacher's feature (N, C, H, W)."""
        adapted = self.balance.limited(self.adapt(pair, student, teacher.shape[2:]))
        more = {} if scores is None else {"scores": scores}
        return self.losses[pair.name](adapted, teacher, boxes, **more)  # type: ignore[no-any-return]

    def _nothing(self, resting: bool) -> Distilled:
        """A step without distillation: one launch, and no gradient for the parameters, under DDP neither."""
        device = self.trained[0].device if self.trained else self.balance.scales.device
        names = {name: each.part_names for name, each in self.losses.items()}  # type: ignore[misc]
        return Distilled(torch.zeros((), device=device), names, resting=resting)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def batch_to_diagnose(
        self, images: Any, boxes: Sequence[Tensor] | PackedBoxes | None, loss: Callable[[], Tensor]
    ) -> Iterator[tuple[Any, Sequence[Tensor] | PackedBoxes]]:
        """What :func:`fgd_hooks.diagnose` examines; a host that sees it while ``loss`` runs the student replaces it."""
        if images is None or boxes is None:
            raise ValueError(f"diagnose() got no {'images' if images is None else 'boxes'}; pass images and boxes.")
        yield images, boxes

    def training_state(self) -> dict[str, Any]:
        """All that a resumed training needs: parameters, balance and clock; copies, as plain tensors and numbers."""
        return {
            **self._identity(),
            "modules": {name: tensor.to("cpu", copy=True) for name, tensor in self.state_dict().items()},
            "balance": self.balance.state_dict(),
            "step": self.clock.step,
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`training_state` gave; nothing is changed when it does not fit.

        Raises:
            ValueError: it is the state of other levels, adapters or losses, or it is damaged.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"The saved state is a {type(state).__name__}; expected what training_state() gave.")
        for key, expected in self._identity().items():
            found = state.get(key)
            texts = found if isinstance(found, list) else [found]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"The saved state is damaged: its {key} is missing or no text; remove the file.")
            if found != expected:
                raise ValueError(
                    f"The saved state belongs to another distillation: its {key} is {str(found)[:500]!r}, here it is "
                    f"{expected!r}. Use the student, teacher and configuration it was saved with, or remove the file."
                )
        modules, own, balance = state.get("modules"), self.state_dict(), state.get("balance")
        if not isinstance(modules, Mapping) or set(modules) != set(own) or not isinstance(balance, Mapping):
            raise ValueError("The saved state does not hold the tensors of these adapters and losses; remove the file.")
        trained = {name for name, _ in self.named_parameters()}
        for name, tensor in own.items():
            # statistics of a batch normalisation may hold NaN: while training they are not used
            check_tensor(name, modules[name], tensor, finite=name in trained)
        step = check_count("number of steps", state.get("step"))
        self.balance.load_state_dict(dict(balance))
        self.load_state_dict(dict(modules))
        self.clock.step = step

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a saved state to fit."""
        return {
            "levels": [signature(pair) for pair in self.pairs],
            "loss": "+".join(loss.name for loss in self.config.all_losses),
            "adapter": self.config.adapter,
        }

    def describe(self) -> str:
        """One line per level: what is distilled into what, and the trained parameters."""
        lines = [
            f"{pair.name} (stride {pair.student.stride}): student {pair.student.channels} -> teacher "
            f"{pair.teacher.channels} channels, {type(self.adapters[pair.name]).__name__}"
            for pair in self.pairs
        ]
        count = sum(parameter.numel() for parameter in self.parameters())
        return "\n".join([*lines, f"{count:,} parameters of adapters and loss are trained beside the student"])

    def __repr__(self) -> str:
        student = self._student()
        config, balance = self.config, self.config.balance
        strength = f"gradient ratio {balance.ratio:g}" if balance.mode == "gradient" else "fixed scales"
        text = (
            f"{'(deleted)' if student is None else type(student).__name__} <- "
            f"{', '.join(type(each).__name__ for each in self.teachers)}\n"
            f"{' + '.join(loss.name for loss in config.all_losses)}, weight {config.weight:g}, {strength}\n"
            f"{self.describe()}\n"
        )
        return f"{type(self).__name__}(\n{textwrap.indent(text, '  ')})"

    def detach(self) -> None:
        """Remove every hook and give the teacher back as it was; may be called again."""
        AT_WORK.discard(self)
        self.taps.detach()
        for teacher in self._teachers:
            teacher.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()
