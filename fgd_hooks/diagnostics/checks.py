"""The checks of a distilling step: each takes what was observed and gives one finding.

In each the reasons to complain come first, the worst one before the others; green is what is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fgd_hooks.config import FGDConfig
from fgd_hooks.diagnostics.report import Finding, green, keyed, per_level, red, yellow
from fgd_hooks.masks import PackedBoxes, box_masks, check_boxes
from fgd_hooks.pairing import LevelPair
from fgd_hooks.taps.levels import Level
from fgd_hooks.taps.tap import Tap

OFF, FAR_OFF = 10.0, 100.0  # factors between the distillation's gradient and its target that are yellow and red
UNEVEN = 50.0  # factor between two levels' gradient ratios that is yellow
DEAD, CONSTANT = 1e-4, 1e-3  # root mean square of a feature; its spread over the batch relative to that


def check_numbers(student: nn.Module, task_loss: float) -> Finding:
    """Whether the student's weights and the task's loss are finite (the teacher's weights are, or it is refused)."""
    tensors = [*student.named_parameters(), *student.named_buffers()]
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if bad:
        found = f"{len(bad)} tensors of the student hold NaN or infinity, for example {bad[0]}."
        mend = "Start from another checkpoint, and lower the learning rate of the training that made this one."
        return red("numbers", found, mend)
    if not math.isfinite(task_loss):
        found = f"The task's loss alone is {task_loss}."
        return red("numbers", found, "Mend the training without distillation first.")
    found = f"Weights of the student and the task's loss ({task_loss:.4g}) are finite."
    return green("numbers", found, {"task_loss": task_loss})


def check_teacher(doubts: Mapping[str, tuple[str, str]]) -> Finding:
    """What speaks against a teacher (:func:`fgd_hooks.teacher.doubts`); that nothing does says little."""
    if doubts:
        found, mend = (" ".join(texts) for texts in zip(*doubts.values(), strict=True))
        return (yellow if set(doubts) == {"smaller"} else red)("teacher", found, mend)
    unknown = "whether it detects well cannot be told from here: measure its mAP on your images."
    return green("teacher", f"Its weights are no reason to doubt it, but {unknown}")


def check_taps(taps: Sequence[Tap], features: Sequence[Tensor | None]) -> Finding:
    """Whether each tap of the student has captured a map in the forward pass."""
    missing = [str(tap) for tap, feature in zip(taps, features, strict=True) if feature is None]
    if missing:
        found = f"{len(missing)} of {len(taps)} taps of the student did not fire: {', '.join(missing)}."
        mend = "Run the very student that the Distiller was given, with gradients enabled, or name other student_taps."
        return red("taps", found, mend)
    maps = ", ".join(f"{tap} {tuple(f.shape)}" for tap, f in zip(taps, features, strict=True) if f is not None)
    return green("taps", f"All {len(taps)} taps of the student fired: {maps}.")


def check_levels(
    pairs: Sequence[LevelPair], student: Sequence[Level], teacher: Sequence[Level], chosen: Sequence[str] | None
) -> Finding:
    """Which levels pair, and which levels of either model are left without a partner."""
    channels = [f"{p.name} ({p.student.channels} <- {p.teacher.channels} channels)" for p in pairs]
    found = f"Distilled: {', '.join(channels)}"
    if chosen is not None:
        return green("levels", f"{found}; chosen by levels={list(chosen)}.")
    alone = {}
    for role, levels in (("student", student), ("teacher", teacher)):
        paired = [getattr(pair, role) for pair in pairs]
        alone[role] = ", ".join(level.name for level in levels if level not in paired)
    found += "".join(f"; only the {role} has {names}" for role, names in alone.items() if names)
    if alone["student"]:
        mend = "Use a teacher that has these levels too, or name taps that have partners."
        return yellow("levels", f"{found}.", mend)
    return green("levels", f"{found}.")


def check_optimizer(
    trained: Iterable[nn.Parameter],
    teacher: Iterable[nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer] | None,
) -> Finding:
    """Whether an optimizer holds what is trained beside the student, and nothing of the teacher."""
    own = list(trained)
    if not own:
        return green("optimizer", "Adapters and losses have no parameters to train.")
    if optimizers is None:
        found = f"No optimizer was given, so it is not known whether {len(own)} tensors of adapters and losses train."
        return yellow("optimizer", found, "Pass optimizer= to diagnose().")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}
    missing = sum(id(parameter) not in rates for parameter in own)
    values = {"missing": float(missing), "held": float(len(own) - missing)}
    if any(id(parameter) in rates for parameter in teacher):
        found = "The optimizer holds parameters of the teacher; weight decay would change them."
        mend = "Build the optimizer from student.parameters() and distiller.parameters() alone."
        return red("optimizer", found, mend, values)
    whose = f"{len(own)} tensors of adapters and losses"
    if missing:
        found = f"{missing} of {whose} are in no optimizer; they would never be trained."
        mend = "Make the optimizer with distiller.param_groups(), or add_param_group them before its scheduler is made."
        return red("optimizer", found, mend, values)
    if all(rates[id(parameter)] == 0 for parameter in own):
        mend = "Well during a warm-up that begins at 0; else give their group a learning rate."
        return yellow("optimizer", f"All {whose} have the learning rate 0 now.", mend, values)
    return green("optimizer", f"All {whose} are in it.", values)


def check_masks(boxes: PackedBoxes, names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Finding:
    """Whether the foreground lies on the objects: boxes in range, covering cells of each level, and not all of them.

    The ``sizes`` (H, W) of the levels' maps are in cells, the finest first.
    """
    count = len(boxes)
    if count == 0:
        found = f"There is no box in this batch of {boxes.num_images} image(s), so there is no foreground."
        mend = "Check with a batch that has objects; if all batches are like this, the labels are not found."
        return yellow("masks", found, mend)
    mend = "Pass pixel corners x1 y1 x2 y2 of the image as the model sees it, after resizing and padding."
    try:
        check_boxes(boxes)
    except ValueError as error:
        return red("masks", str(error), mend)
    # each box as if it were alone in an image of its own
    alone = torch.arange(count, device=boxes.image.device)
    single = PackedBoxes(boxes.boxes, alone, boxes.canvas[boxes.image], count, boxes.relative)
    covering = [float((box_masks(single, *size)[0].flatten(1).amax(1) > 0).float().mean()) for size in sizes]
    share = [float((box_masks(boxes, *size)[0] > 0).float().mean()) for size in sizes]
    area, seen = ((b[:, 2:] - b[:, :2]).clamp(min=0).prod(1) for b in (boxes.relative, boxes.relative.clamp(0, 1)))
    inside = float(seen.sum() / area.sum().clamp(min=1e-12))
    reach = float(boxes.relative[:, 2:].amax())
    found = (
        f"{count} boxes in {boxes.num_images} images, {inside:.0%} of their area inside the image; of the boxes "
        f"{per_level(names, covering, '.0%')} cover a cell; foreground: {per_level(names, share, '.1%')} of the cells."
    )
    values = {**keyed("covering", names, covering), **keyed("foreground", names, share), "inside": inside}
    if min(covering) < 0.5 or inside < 0.5 or reach < 0.05:
        return red("masks", found, mend, values)
    if count >= 4 and reach < 0.5:
        found = f"{found} All lie in the upper left quarter (up to {reach:.0%} of the image's sides)."
        return yellow("masks", found, f"The boxes look like those of a smaller image. {mend}", values)
    if min(covering) < 0.9 or inside < 0.8 or share[0] > 0.98:
        return yellow("masks", found, f"Look whether boxes and image have the same size. {mend}", values)
    return green("masks", found, values)


def check_frozen(changed: Sequence[str], training: Sequence[str], batch_statistics: Sequence[str]) -> Finding:
    """Whether the teacher stays as it is when it runs.

    Named are the tensors that a forward pass ``changed``, the modules that were in train mode in it, and the
    normalisations that keep no running statistics.
    """
    mend = "Let nothing in the teacher's forward() call train(); load it anew, since its statistics have moved."
    if changed:
        found = f"A forward pass changed {len(changed)} tensors of the teacher, for example {changed[0]}."
        return red("teacher frozen", found, mend)
    if training:
        found = f"{len(training)} modules of the teacher are in train mode after its forward pass: {training[0]}."
        return red("teacher frozen", found, mend)
    if batch_statistics:
        found = (
            f"{len(batch_statistics)} batch normalisations of the teacher keep no running statistics and normalise by "
            f"the batch: {batch_statistics[0]}."
        )
        mend = "Use a teacher with track_running_stats=True, or batches of the size it was trained with."
        return yellow("teacher frozen", found, mend)
    return green("teacher frozen", "In eval mode; a forward pass changed none of its weights and statistics.")


def check_features(names: Sequence[str], features: Sequence[Tensor]) -> Finding:
    """Whether the teacher's features (N, C, H, W), one a level, are finite, not vanishing, not the same everywhere."""
    name, size, spread = "teacher's features", [], []
    for feature in (each.double() for each in features):
        size.append(float(feature.square().mean().sqrt()))
        deviation = float((feature - feature.mean((0, 2, 3), keepdim=True)).square().mean().sqrt())
        spread.append(deviation / size[-1] if size[-1] > 0 else 0.0)
    values = {**keyed("size", names, size), **keyed("spread", names, spread)}
    if bad := [level for level, value in zip(names, size, strict=True) if not math.isfinite(value)]:
        mend = "Set teacher.dtype=float32; if that does not help, the teacher's weights are damaged: use another file."
        return red(name, f"NaN or infinite at {', '.join(bad)}.", mend, values)
    found = f"Root mean square {per_level(names, size)}; spread over the batch against it {per_level(names, spread)}."
    if min(size) < DEAD or min(spread) < CONSTANT:
        mend = "The teacher is not trained, or its weights were not loaded: give trained weights, and check them alone."
        return red(name, f"They are (nearly) constant. {found}", mend, values)
    return green(name, found, values)


def empty_parts(boxes: PackedBoxes, names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[str]:
    """The parts that are 0 by definition: a foreground without any box, a background where objects cover every cell."""
    if len(boxes) == 0:
        return [f"{name}/foreground" for name in names]
    full = [bool((box_masks(boxes, *size)[0] > 0).all()) for size in sizes]
    return [f"{name}/background" for name, covered in zip(names, full, strict=True) if covered]


def check_parts(
    raw: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float], empty: Sequence[str] = ()
) -> Finding:
    """Whether every part of the loss is finite and not zero.

    The parts are ``raw``, before any weight; those of weight 0 and those that :func:`empty_parts` names may be 0.
    """
    values = {f"{level}/{part}": float(value) for level, parts in raw.items() for part, value in parts.items()}
    off = sorted(part for part, weight in weights.items() if weight == 0)
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        found = f"{len(bad)} of {len(values)} parts are NaN or infinite: {', '.join(bad)}."
        mend = "Look at the findings on weights and on the teacher's features; if both are well, train in float32."
        return red("loss parts", found, mend, values)
    if zero := [n for n, value in values.items() if value == 0 and n.split("/")[1] not in off and n not in empty]:
        found = f"{len(zero)} of {len(values)} parts are exactly 0: {', '.join(zero)}."
        mend = "A part that is 0 teaches nothing: see whether the masks lie on objects and teacher and student differ."
        return red("loss parts", found, mend, values)
    switched = f"; switched off: {', '.join(off)}" if off else ""
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    none = f"nothing to compare in {', '.join(empty)}" if empty else "none is 0"
    found = f"All {len(values)} parts are finite, {none} (raw {low:.3g} to {high:.3g}){switched}."
    return green("loss parts", found, values)


def check_gradient(
    levels: Sequence[str],
    blocked: Sequence[str],
    adapters: Mapping[str, float],
    student: float | None,
    teacher: Sequence[str],
) -> Finding:
    """Whether the distillation's gradient reaches the student and the adapters, and not the teacher.

    Of the ``levels`` some may be ``blocked``: their student feature takes no gradient. ``adapters`` and ``student`` are
    norms of the distillation's gradient (None: not looked at), ``teacher`` names parameters that take or have one.
    """
    norms = {**({} if student is None else {"student": student}), **{f"adapter {n}": v for n, v in adapters.items()}}
    values = {name.replace(" ", "/"): norm for name, norm in norms.items()}
    if teacher:
        found = f"{len(teacher)} parameters of the teacher take a gradient, for example {teacher[0]}."
        mend = "Do not call requires_grad_() on the teacher once the Distiller is built; keep it out of the student."
        return red("gradient", found, mend, values)
    if blocked:
        free = ", ".join(name for name in levels if name not in blocked)
        found = f"The student's features at {', '.join(blocked)} take no gradient: all layers before them are frozen."
        mend = "Unfreeze layers before these taps (freeze=)" + (f", or set levels=[{free}]." if free else ".")
        return red("gradient", found, mend, values)
    if silent := [name for name, norm in norms.items() if not 0 < norm < math.inf]:
        found = f"No finite gradient of the distillation arrives at {', '.join(silent)}."
        mend = "See whether every part of the loss is finite and not zero, and whether the tapped maps are detached."
        return red("gradient", found, mend, values)
    found = f"Norms of the distillation's gradient: {per_level(norms, norms.values())}; the teacher takes none."
    return green("gradient", found, values)


def check_scale(
    names: Sequence[str], raw: Sequence[float], scales: Sequence[float], config: FGDConfig, weight: float
) -> Finding:
    """How strong the distillation's gradient is against the task's at each level, and what becomes of it.

    ``raw`` is their ratio at the student's feature for a scale of 1, ``scales`` is what the balance makes of it.
    """
    fixed = config.balance.mode == "fixed"
    values = keyed("raw_ratio", names, raw)
    if unknown := [name for name, value in zip(names, raw, strict=True) if not (math.isfinite(value) and value > 0)]:
        where = ", ".join(unknown)
        found = f"At {where} no gradient ratio can be measured: one of the two gradients is 0 or not finite."
        mend = "See that the task's loss depends on these levels and is finite, or leave them out of levels=."
        return red("loss scale", found, mend, values)
    effective = [ratio * (1 if fixed else scale) * weight for ratio, scale in zip(raw, scales, strict=True)]
    values |= keyed("ratio", names, effective) | ({} if fixed else keyed("scale", names, scales))
    found = f"|distillation|/|task| gradient, raw: {per_level(names, raw)}; "
    found += "weights are fixed" if fixed else f"the balance multiplies by {per_level(names, scales)}"
    found += f", which gives {per_level(names, effective)}."
    factor = max(max(value, 1 / value) for value in effective)  # against 1, the default of the balance's ratio
    uneven = max(effective) / min(effective)
    if factor <= OFF and uneven <= UNEVEN:
        return green("loss scale", found, values)
    low, high = config.balance.min_scale, config.balance.max_scale
    bound = [name for name, scale in zip(names, scales, strict=True) if not 1.001 * low < scale < 0.999 * high]
    if fixed:
        mean = math.exp(sum(math.log(value) for value in effective) / len(effective))
        mend = f"Set balance.mode=gradient, which measures the scale, or weight={weight / mean:.2g}."
    elif bound:
        mend = f"Widen balance.min_scale and balance.max_scale: {', '.join(bound)} is at a bound ({low:g}, {high:g})."
    else:
        mend = "Set balance.ratio=1 and weight=1, the defaults: the ratio aimed at is their product."
    return (red if factor > FAR_OFF else yellow)("loss scale", found, mend, values)


def check_weight_zero(parameters: int, different: Sequence[str], noise: Sequence[str]) -> Finding:
    """Whether with weight 0 the gradients of so many parameters of the student are the plain ones bit for bit.

    Named are those that are ``different`` with weight 0, and those that differ between two plain passes (``noise``).
    """
    if different and not noise:
        found = f"With weight 0 the gradient of {len(different)} of {parameters} parameters changes: {different[0]} ..."
        mend = "Something else acts on the student: remove other hooks; loss= must be the task's alone."
        return red("weight 0", found, mend)
    if different:
        found = f"Two plain passes differ already ({len(noise)} of {parameters} parameters: operations that are not "
        return green("weight 0", f"{found}deterministic), so {len(different)} that differ with weight 0 say nothing.")
    found = f"With weight 0 the student's gradient is the plain one bit for bit ({parameters} parameters)."
    return green("weight 0", found)
