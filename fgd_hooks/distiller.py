"""The Distiller: taps, adapters, losses, balance, schedule and a frozen teacher; what a training loop calls."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgd_hooks.adapters import create_adapter
from fgd_hooks.balance import Balance
from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.errors import TapError, TeacherError
from fgd_hooks.guards import GradientGuard, StepHealth, zero_unless_finite
from fgd_hooks.losses.base import LossResult
from fgd_hooks.masks import PackedBoxes, check_boxes
from fgd_hooks.pairing import DistillationPair, build_loss, check_names, plan, signature
from fgd_hooks.schedule import Clock, schedule_factor
from fgd_hooks.taps.hooks import FeatureTaps
from fgd_hooks.taps.levels import find_sources
from fgd_hooks.taps.tap import Tap
from fgd_hooks.teacher import FrozenTeacher, check_apart
from fgd_hooks.utils.checkpoint import check_count, check_tensor
from fgd_hooks.utils.distributed import is_distributed
from fgd_hooks.utils.modules import unwrap

logger = logging.getLogger("fgd_hooks")


@dataclass
class Distilled:
    """What one step of distillation gives.

    Args:
        loss: (), to be added to the task's loss.
        parts: each part of the loss summed over the levels, as it enters ``loss`` (detached).
        levels: the same for each level: ``levels["P3"]["foreground"]`` (detached).
        raw: each level's parts before the loss's own weights, the balance and the schedule (detached).
        weight: what the loss is multiplied by in this step, the configured weight times the schedule; 0 when the step
            does not distil.
        resting: whether the step does not distil because of ``every``.
        measured: whether this step measured the balance, so that the student learned from the task alone.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    levels: dict[str, dict[str, Tensor]]
    raw: dict[str, dict[str, Tensor]]
    weight: float
    measured: bool = False
    resting: bool = False


def check_not_replicated(student: nn.Module) -> None:
    """Refuse a DataParallel over several devices: its copies share one set of hooks, and all but one would be lost.

    Raises:
        ValueError: the student is one.
    """
    if isinstance(student, nn.DataParallel) and len(student.device_ids) > 1:
        raise ValueError(
            f"The student is a DataParallel over {len(student.device_ids)} devices, whose copies share one set of "
            "hooks. Use DistributedDataParallel, one process per device (docs/several-gpus.md)."
        )


class PerTeacher(tuple[Any, ...]):
    """One input for each of several teachers, where they want different ones (another normalisation, say)."""


class Distiller(nn.Module):
    """Lets a frozen teacher teach a student through the feature maps of their necks.

    ::

        distiller = Distiller(student, teacher)
        optimizer.add_param_group({"params": distiller.parameters()})
        for images, targets in loader:
            task_loss = criterion(student(images), targets)
            distilled = distiller(images, boxes)
            (task_loss + distilled.loss).backward()

    ``parameters()`` and ``state_dict()`` hold what is trained (adapters, context blocks) and nothing else. Student and
    teacher are no submodules; the teacher is frozen and stays in eval mode. Use it as a context manager, or call
    :meth:`detach`, to remove every hook again. A teacher serves one Distiller at a time.

    Several teachers teach each with its own pairs of levels, several losses (``losses: [fgd, cwd]``) each with its own
    adapters; :attr:`pairs` has one entry for each level of each of them.

    Args:
        student: the model that learns; wrappers (DDP, compile) are looked through.
        teacher: the model that teaches, or a list of them.
        config: an :class:`~fgd_hooks.config.FGDConfig`, a dict, a YAML file, or None for the defaults.
        example: what both models are called with in the probe; None: zeros of 256 x 256 pixels.

    Raises:
        TeacherError: the teacher is the student, shares its weights or holds NaN.
        ValueError: the student is a DataParallel over several devices, whose copies share one set of hooks.
        TapError: a tap cannot be resolved, or no levels are found.
        PairingError: no level is common.
        ConfigError: the configuration does not fit (unknown adapter, loss, level or loss option).
        ValueError: an adapter or the level's sizes do not match.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module],
        config: FGDConfig | Mapping[str, Any] | str | Path | None = None,
        *,
        example: Any = None,
    ) -> None:
        super().__init__()
        self.config = config = load_config(config)
        check_names(config)
        check_not_replicated(student)
        student = unwrap(student)
        teachers = [unwrap(each) for each in ([teacher] if isinstance(teacher, nn.Module) else teacher)]
        if not teachers:
            raise TeacherError("The list of teachers is empty; give at least one.")
        for number, each in enumerate(teachers):
            check_apart(student, each)
            if any(each is other for other in teachers[:number]):
                raise TeacherError("The same teacher is given twice; several losses go into losses=[...].")
        self._student = weakref.ref(student)
        self.pairs, self.found_levels = plan(student, teachers, config, example)
        self.adapters = nn.ModuleDict()
        self.losses = nn.ModuleDict()
        for pair in self.pairs:
            self.adapters[pair.name] = create_adapter(config.adapter, pair.student.channels, pair.teacher.channels)
            self.losses[pair.name] = build_loss(pair.loss, pair.teacher.channels)
        reference = next(student.parameters(), torch.empty(0))
        self.to(reference.device)
        self.balance = self.new_balance(config)
        self.clock = Clock()
        self._health = StepHealth(config)
        for parameter in self.parameters():
            parameter.register_hook(zero_unless_finite)
        self._teachers: list[FrozenTeacher] = []
        taps = [pair.student.tap for pair in self.pairs]
        try:
            for number, each in enumerate(teachers):
                self._teachers.append(FrozenTeacher(each, self._teacher_taps(number), config.teacher))
            sources = find_sources(student, taps, example=example)
            self.taps = FeatureTaps(student, taps, role="student", grad_only=True, sources=sources)
        except BaseException:
            for made in self._teachers:
                made.release()
            raise

    def _teacher_taps(self, number: int) -> list[Tap]:
        """The taps of one teacher: its levels, and then the class scores that losses need."""
        mine = [pair for pair in self.pairs if pair.number == number]
        return [pair.teacher.tap for pair in mine] + [pair.scores for pair in mine if pair.scores is not None]

    def new_balance(self, config: FGDConfig) -> Balance:
        """A fresh balance for these pairs."""
        weights, groups = zip(*((pair.weight, pair.group) for pair in self.pairs), strict=True)
        return Balance(config.balance, len(self.pairs), weights, groups)

    @property
    def teachers(self) -> list[nn.Module]:
        """The teachers, frozen."""
        return [teacher.model for teacher in self._teachers]

    @property
    def level_names(self) -> list[str]:
        """Names of the distilled levels, finest first: "P3", ...; of several losses or teachers "P3-cwd" and so on."""
        return [pair.name for pair in self.pairs]

    @property
    def part_names(self) -> list[str]:
        """Names of the losses' parts, the keys of :attr:`Distilled.parts`; losses may share one."""
        names = [part for loss in self.losses.values() for part in loss.part_names]  # type: ignore[union-attr]
        return list(dict.fromkeys(names))

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
        if epochs is not None and epochs != self.clock.epochs and self.config.weight > 0:
            schedule, step = self.config.schedule, self.config.schedule.warmup_steps
            if not any(schedule_factor(schedule, Clock(step, each, epochs)) for each in range(epochs)):
                logger.warning(
                    "No epoch of %d distils with schedule.start_epoch=%s and stop_epoch=%s.",
                    epochs,
                    schedule.start_epoch,
                    schedule.stop_epoch,
                )
        self.clock.epoch = epoch
        if epochs is not None:
            self.clock.epochs = epochs

    def forward(
        self,
        images: Any,
        boxes: Sequence[Tensor] | PackedBoxes,
        *,
        canvas: tuple[int, int] | None = None,
        task_loss: Tensor | None = None,
    ) -> Distilled:
        """Distil the batch that the student has just seen. Without gradients (validation) it does nothing.

        Args:
            images: what the teacher is called with, usually the student's (N, 3, H, W) batch; :class:`PerTeacher` where
                several teachers want different ones.
            boxes: ground truth of each image, a list of N float tensors (n_i, 4) of pixel x1 y1 x2 y2, or packed.
            canvas: (h, w) in pixels that the feature maps cover; None: the size of ``images``, which then is a tensor.
            task_loss: () the student's own loss; only to warn when the distillation dominates it for long.

        Raises:
            TapError: a tap did not fire, or the student's feature takes no gradient.
            ValueError: boxes or features do not fit together.
            NonFiniteError: NaN or infinite for ``max_bad_steps`` steps in a row.
        """
        if not torch.is_grad_enabled():
            self.taps.clear()
            return self._nothing()
        if self.clock.step == 0 and self.clock.epochs is None and 0 < (self.config.schedule.stop_epoch or 0) < 1:
            logger.warning(
                "schedule.stop_epoch=%s is a fraction of the training: it takes effect once "
                "distiller.set_epoch(epoch, epochs) says how long the training is.",
                self.config.schedule.stop_epoch,
            )
        weight = self.config.weight * schedule_factor(self.config.schedule, self.clock)
        resting = weight != 0 and self.clock.step % self.config.every != 0
        self.clock.step += 1
        if weight == 0 or resting:
            self.taps.clear()
            return self._nothing(resting)
        features = self.taps.pop()
        self._check_gradient(features)
        device = features[0].device
        given = boxes
        boxes = self.pack(images, boxes, canvas, device)
        if given is not boxes and self._health.steps < 3:
            check_boxes(boxes)  # mistakes of format and unit show at once; a GPU waits for this check
        if boxes.num_images != features[0].shape[0]:
            raise ValueError(
                f"There are boxes for {boxes.num_images} image(s), but the student's features hold "
                f"{features[0].shape[0]}. Pass one (n, 4) tensor per image, empty where it has no object."
            )
        taught, scores = self._teach(images, device)
        self._fit_adapters(features, taught)
        self.balance.to(device)
        measuring = self.balance.next_step()
        if measuring:
            features = self.balance.observe(features, weight, self.taps.meters)
        guard = GradientGuard()
        results = [
            self._level(pair, guard.watch(feature), target, boxes, score)
            for pair, feature, target, score in zip(self.pairs, features, taught, scores, strict=True)
        ]
        losses = torch.stack([result.loss for result in results])
        scales = self.balance.trial(losses) if measuring else self.balance.factors
        distilled = self._assemble(losses, results, scales * weight, guard)
        distilled.weight, distilled.measured = weight, measuring
        if task_loss is not None:
            self._health.compare(distilled.loss, task_loss)
        return distilled

    def teacher_features(self, images: Any) -> list[Tensor]:
        """The frozen teachers' features (N, C, H, W) of a batch, one for each of :attr:`pairs`, without gradient."""
        return self._teach(images)[0]

    def _teach(self, images: Any, device: torch.device | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
        """For each of :attr:`pairs` the teacher's feature and, if its loss needs them, class scores (N, K, H, W)."""
        given = list(images) if isinstance(images, PerTeacher) else [images] * len(self._teachers)
        if len(given) != len(self._teachers):
            raise ValueError(f"PerTeacher holds {len(given)} inputs for {len(self._teachers)} teacher(s).")
        features: list[Tensor] = []
        scores: list[Tensor | None] = []
        for number, (teacher, its_images) in enumerate(zip(self._teachers, given, strict=True)):
            if device is not None:
                teacher.to(device)
            mine = [pair for pair in self.pairs if pair.number == number]
            taken = teacher.features(its_images)
            more = iter(taken[len(mine) :])
            features += taken[: len(mine)]
            scores += [None if pair.scores is None else next(more) for pair in mine]
        return features, scores

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
        adapter = self.adapters[pair.name]
        own = next(adapter.parameters(), None)
        kind = student.device.type
        autocast = torch.is_autocast_enabled(kind)
        # float16 ends at 65504: a loss scaler's factor would overflow the gradients of the adapter's weights
        narrow = autocast and torch.get_autocast_dtype(kind) is torch.float16
        with torch.autocast(kind, enabled=False) if narrow else contextlib.nullcontext():
            if own is not None and (narrow or not autocast):
                student = student.to(own.dtype)  # a student that ran under autocast, or in half precision
            adapted: Tensor = adapter(student)
        return self._resized(pair, adapted, size)

    def _resized(self, pair: DistillationPair, feature: Tensor, size: Sequence[int]) -> Tensor:
        """A student's map with (h, w) cells.

        Raises:
            ValueError: it has other ones, and ``resize`` is off.
        """
        if feature.shape[2:] == tuple(size):
            return feature
        if not self.config.resize:
            raise ValueError(
                f"At level {pair.name} the student's map is {tuple(feature.shape[2:])} and the teacher's "
                f"{tuple(size)} cells. Give both models the same input size, or set resize=true."
            )
        return nn.functional.interpolate(feature, tuple(size), mode="bilinear", align_corners=False)

    @staticmethod
    def pack(
        images: Any, boxes: Sequence[Tensor] | PackedBoxes, canvas: tuple[int, int] | None, device: torch.device
    ) -> PackedBoxes:
        """The boxes as :meth:`forward` takes them, packed on ``device``; packed ones are passed through.

        Raises:
            ValueError: another form than a list of (n, 4) tensors, or the canvas is not known.
        """
        if isinstance(boxes, PackedBoxes):
            return boxes
        if isinstance(images, PerTeacher):
            images = images[0]
        if canvas is None:
            if not isinstance(images, Tensor):
                raise ValueError(
                    f"images is a {type(images).__name__}, so the size that the feature maps cover is not known: "
                    "pass canvas=(h, w), the padded size in pixels, and boxes in pixels of it."
                )
            canvas = (int(images.shape[-2]), int(images.shape[-1]))
        return PackedBoxes.from_list(boxes, canvas, device)

    @contextlib.contextmanager
    def batch_to_diagnose(
        self, images: Any, boxes: Sequence[Tensor] | PackedBoxes | None, loss: Callable[[], Tensor]
    ) -> Iterator[tuple[Any, Sequence[Tensor] | PackedBoxes]]:
        """Images and boxes for :func:`fgd_hooks.diagnose`; a host that sees them in the student's pass overrides it.

        Args:
            images: as for :meth:`forward`.
            boxes: as for :meth:`forward`.
            loss: runs the student on the batch.

        Raises:
            ValueError: there are none.
        """
        if images is None or boxes is None:
            raise ValueError(f"diagnose() got no {'images' if images is None else 'boxes'}; pass images and boxes.")
        yield images, boxes

    def _level(
        self, pair: DistillationPair, student: Tensor, teacher: Tensor, boxes: PackedBoxes, scores: Tensor | None = None
    ) -> LossResult:
        adapted = self.balance.limited(self.adapt(pair, student, teacher.shape[2:]))
        more = {} if scores is None else {"scores": scores}
        result: LossResult = self.losses[pair.name](adapted, teacher, boxes, **more)
        return result

    def _assemble(self, losses: Tensor, results: list[LossResult], factors: Tensor, guard: GradientGuard) -> Distilled:
        total = (losses * factors).sum()
        finite = guard.finite = torch.isfinite(total.detach())
        zero = torch.zeros_like(finite, dtype=total.dtype)
        self._count(finite)
        levels: dict[str, dict[str, Tensor]] = {}
        raw: dict[str, dict[str, Tensor]] = {}
        for number, (name, result) in enumerate(zip(self.level_names, results, strict=True)):
            raw[name] = {part: value.detach() for part, value in result.raw.items()}
            levels[name] = {
                part: torch.where(finite, value.detach() * factors[number], zero)
                for part, value in result.parts.items()
            }
        parts = {
            part: torch.stack([level[part] for level in levels.values() if part in level]).sum()
            for part in self.part_names
        }
        return Distilled(torch.where(finite, total, zero), parts, levels, raw, 0.0)

    def _count(self, finite: Tensor) -> None:
        """Count steps that are not finite, and say what would otherwise fail in silence."""
        self._health.count(finite)
        if self._health.steps == self.config.balance.interval + 2 and self.balance.unmeasured:
            names = ", ".join(self.level_names[number] for number in self.balance.unmeasured)
            logger.warning(
                "The balance could not measure %s yet, so these levels do not distil: call the distiller before the "
                "backward pass of (task_loss + distilled.loss), and see that the task's loss depends on them.",
                names,
            )

    @property
    def skipped_steps(self) -> int:
        """Steps so far whose distillation loss was not finite and was left out."""
        return self._health.skipped

    def _nothing(self, resting: bool = False) -> Distilled:
        """A step without distillation. Under DDP the parameters must take part in each step all the same."""
        device = next(self.parameters(), torch.empty(0)).device
        loss = torch.zeros((), device=device)
        if is_distributed() and torch.is_grad_enabled():
            loss = loss + 0.0 * sum(parameter.sum() for parameter in self.parameters())
        zeros = {part: torch.zeros((), device=device) for part in self.part_names}
        levels = {
            name: {part: zeros[part] for part in loss.part_names}  # type: ignore[union-attr]
            for name, loss in self.losses.items()
        }
        return Distilled(
            loss, dict(zeros), levels, {name: dict(each) for name, each in levels.items()}, 0.0, resting=resting
        )

    def _check_gradient(self, features: list[Tensor]) -> None:
        for pair, feature in zip(self.pairs, features, strict=True):
            if not feature.requires_grad:
                raise TapError(
                    f"The student's feature at {pair.name} ({pair.student.tap}) takes no gradient, so distilling it "
                    "would change nothing. All layers before it are frozen, or it was detached: unfreeze them, or "
                    "leave this level out (levels=[...])."
                )

    def training_state(self) -> dict[str, Any]:
        """All that a resumed training needs: parameters, balance and clock; copies, as plain tensors and numbers."""
        return training_state(self)

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`training_state` gave; nothing is changed when it does not fit.

        Raises:
            ValueError: it is the state of other levels, adapters or losses, or it is damaged.
        """
        restore(self, state)

    def describe(self) -> str:
        """One line per level: what is distilled into what, and the trained parameters."""
        lines = [
            f"{pair.name} (stride {pair.student.stride}): student {pair.student.channels} -> teacher "
            f"{pair.teacher.channels} channels, {type(self.adapters[pair.name]).__name__}"
            for pair in self.pairs
        ]
        count = sum(parameter.numel() for parameter in self.parameters())
        return "\n".join([*lines, f"{count:,} parameters of adapters and loss are trained beside the student"])

    def detach(self) -> None:
        """Remove every hook and give the teacher back as it was; may be called again."""
        self.taps.detach()
        for teacher in self._teachers:
            teacher.release()

    def __enter__(self) -> Distiller:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()


def _kind(distiller: Distiller) -> dict[str, Any]:
    """What must be equal for a saved state to fit."""
    return {
        "levels": [signature(pair) for pair in distiller.pairs],
        "loss": "+".join(loss.name for loss in distiller.config.all_losses),
        "adapter": distiller.config.adapter,
    }


def training_state(distiller: Distiller) -> dict[str, Any]:
    """See :meth:`fgd_hooks.Distiller.training_state`."""
    return {
        **_kind(distiller),
        "modules": {name: tensor.to("cpu", copy=True) for name, tensor in distiller.state_dict().items()},
        "balance": distiller.balance.state_dict(),
        "step": distiller.clock.step,
    }


def restore(distiller: Distiller, state: Mapping[str, Any]) -> None:
    """See :meth:`fgd_hooks.Distiller.load_training_state`."""
    if not isinstance(state, Mapping):
        raise ValueError(f"The saved state is a {type(state).__name__}; expected what training_state() gave.")
    for key, expected in _kind(distiller).items():
        found = state.get(key)
        texts = found if isinstance(found, list) else [found]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"The saved state is damaged: its {key} is missing or no text; remove the file.")
        if found != expected:
            raise ValueError(
                f"The saved state belongs to another distillation: its {key} is {str(found)[:500]!r}, here it is "
                f"{expected!r}. Use the student, teacher and configuration it was saved with, or remove the file."
            )
    modules, own, balance = state.get("modules"), distiller.state_dict(), state.get("balance")
    if not isinstance(modules, Mapping) or set(modules) != set(own) or not isinstance(balance, Mapping):
        raise ValueError("The saved state does not hold the tensors of these adapters and losses; remove the file.")
    trained = {name for name, _ in distiller.named_parameters()}
    for name, tensor in own.items():
        # statistics of a batch normalisation may hold NaN: while training they are not used
        check_tensor(name, modules[name], tensor, finite=name in trained)
    step = check_count("number of steps", state.get("step"))
    distiller.balance.load_state_dict(dict(balance))
    distiller.load_state_dict(dict(modules))
    distiller.clock.step = step
