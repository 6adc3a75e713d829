"""The checks of a distilling step: each takes what was observed and gives one finding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fgd_hooks.config import FGDConfig
from fgd_hooks.diagnostics.report import Finding, Status, per_level
from fgd_hooks.masks import PackedBoxes, box_masks, check_boxes
from fgd_hooks.pairing import LevelPair
from fgd_hooks.taps.levels import Level
from fgd_hooks.taps.tap import Tap

OFF, FAR_OFF = 10.0, 100.0  # factors between the distillation's gradient and its target that are yellow and red


UNEVEN = 50.0  # factor between two levels' gradient ratios that is yellow


def check_taps(taps: Sequence[Tap], features: Sequence[Tensor | None]) -> Finding:
    """Whether each tap of the student has captured a map in the forward pass."""
    missing = [str(tap) for tap, feature in zip(taps, features, strict=True) if feature is None]
    if missing:
        return Finding(
            "red",
            "taps",
            f"{len(missing)} of {len(taps)} taps of the student did not fire: {', '.join(missing)}.",
            "Run the very student that the Distiller was given, with gradients enabled, or name other student_taps.",
        )
    maps = ", ".join(f"{tap} {tuple(f.shape)}" for tap, f in zip(taps, features, strict=True) if f is not None)
    return Finding("green", "taps", f"All {len(taps)} taps of the student fired: {maps}.")


def check_levels(
    pairs: Sequence[LevelPair], student: Sequence[Level], teacher: Sequence[Level], chosen: Sequence[str] | None
) -> Finding:
    """Which levels pair, and which levels of either model are left without a partner."""
    text = "Distilled: " + ", ".join(f"{p.name} ({p.student.channels} <- {p.teacher.channels} channels)" for p in pairs)
    alone = {
        role: [level.name for level in levels if level not in used]
        for role, levels, used in (
            ("student", student, [p.student for p in pairs]),
            ("teacher", teacher, [p.teacher for p in pairs]),
        )
    }
    for role, names in alone.items():
        text += f"; only the {role} has {', '.join(names)}" if names and chosen is None else ""
    if chosen is not None:
        return Finding("green", "levels", f"{text}; chosen by levels={list(chosen)}.")
    if alone["student"]:
        return Finding(
            "yellow", "levels", f"{text}.", "Use a teacher that has these levels too, or name taps that have partners."
        )
    return Finding("green", "levels", f"{text}.")


def check_masks(boxes: PackedBoxes, names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Finding:
    """Whether the foreground lies on the objects: boxes in range, covering cells of each level, and not all of them.

    Args:
        boxes: of the batch.
        names: of the levels, finest first.
        sizes: (H, W) of their maps in cells.
    """
    if len(boxes) == 0:
        return Finding(
            "yellow",
            "masks",
            f"There is no box in this batch of {boxes.num_images} image(s), so there is no foreground.",
            "Check with a batch that has objects; if all batches are like this, the labels are not found.",
        )
    mend = "Pass pixel corners x1 y1 x2 y2 of the image as the model sees it, after resizing and padding."
    try:
        check_boxes(boxes)
    except ValueError as error:
        return Finding("red", "masks", str(error), mend)
    count = len(boxes)
    own = PackedBoxes(
        boxes.boxes, torch.arange(count, device=boxes.image.device), boxes.canvas[boxes.image], count, boxes.relative
    )
    covering, share = [], []
    for height, width in sizes:
        covering.append(float((box_masks(own, height, width)[0].flatten(1).amax(1) > 0).float().mean()))
        share.append(float((box_masks(boxes, height, width)[0] > 0).float().mean()))
    corners = boxes.relative.clamp(0, 1)
    area = _areas(boxes.relative)
    inside = float(_areas(corners).sum() / area.sum().clamp(min=1e-12))
    reach = float(boxes.relative[:, 2:].amax())
    found = (
        f"{count} boxes in {boxes.num_images} images, {inside:.0%} of their area inside the image; of the boxes "
        f"{per_level(names, covering, '.0%')} cover a cell; foreground: {per_level(names, share, '.1%')} of the cells."
    )
    values = {f"covering/{name}": value for name, value in zip(names, covering, strict=True)}
    values |= {f"foreground/{name}": value for name, value in zip(names, share, strict=True)} | {"inside": inside}
    if min(covering) < 0.5 or inside < 0.5 or reach < 0.05:
        return Finding("red", "masks", found, mend, values)
    if count >= 4 and reach < 0.5:
        found = f"{found} All lie in the upper left quarter (up to {reach:.0%} of the image's sides)."
        return Finding("yellow", "masks", found, f"The boxes look like those of a smaller image. {mend}", values)
    if min(covering) < 0.9 or inside < 0.8 or share[0] > 0.98:
        return Finding("yellow", "masks", found, f"Look whether boxes and image have the same size. {mend}", values)
    return Finding("green", "masks", found, "", values)


def empty_parts(boxes: PackedBoxes, names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[str]:
    """The parts that are 0 by definition: a foreground without any box, a background where objects cover every cell."""
    if len(boxes) == 0:
        return [f"{name}/foreground" for name in names]
    full = [bool((box_masks(boxes, height, width)[0] > 0).all()) for height, width in sizes]
    return [f"{name}/background" for name, covered in zip(names, full, strict=True) if covered]


def check_parts(
    raw: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float], empty: Sequence[str] = ()
) -> Finding:
    """Whether every part of the loss is finite and not zero.

    Args:
        raw: each level's parts before any weight.
        weights: the loss's own weight of each part; absent ones count as not zero.
        empty: parts that are 0 by definition in this batch, as "level/part"; see :func:`empty_parts`.
    """
    values = {f"{level}/{part}": float(value) for level, parts in raw.items() for part, value in parts.items()}
    off = sorted(part for part, weight in weights.items() if weight == 0)
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    zero = [n for n, value in values.items() if value == 0 and n.split("/")[1] not in off and n not in empty]
    if bad:
        return Finding(
            "red",
            "loss parts",
            f"{len(bad)} of {len(values)} parts are NaN or infinite: {', '.join(bad)}.",
            "Look at the findings on weights and on the teacher's features; if both are well, train in float32.",
            values,
        )
    if zero:
        return Finding(
            "red",
            "loss parts",
            f"{len(zero)} of {len(values)} parts are exactly 0: {', '.join(zero)}.",
            "A part that is 0 teaches nothing: see whether the masks lie on objects and teacher and student differ.",
            values,
        )
    switched = f"; switched off: {', '.join(off)}" if off else ""
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    none = f"nothing to compare in {', '.join(empty)}" if empty else "none is 0"
    found = f"All {len(values)} parts are finite, {none} (raw {low:.3g} to {high:.3g}){switched}."
    return Finding("green", "loss parts", found, "", values)


def check_gradient(
    levels: Sequence[str],
    blocked: Sequence[str],
    adapters: Mapping[str, float],
    student: float | None,
    teacher: Sequence[str],
) -> Finding:
    """Whether the distillation's gradient reaches the student and the adapters, and not the teacher.

    Args:
        levels: names of all levels.
        blocked: those whose student feature takes no gradient.
        adapters: norm of the gradient at each adapter that has parameters.
        student: norm of the distillation's gradient in the student's parameters; None: not looked at.
        teacher: names of the teacher's parameters that take or have a gradient.
    """
    norms = {**({} if student is None else {"student": student}), **{f"adapter {n}": v for n, v in adapters.items()}}
    values = {name.replace(" ", "/"): norm for name, norm in norms.items()}
    if teacher:
        return Finding(
            "red",
            "gradient",
            f"{len(teacher)} parameters of the teacher take a gradient, for example {teacher[0]}.",
            "Do not call requires_grad_() on the teacher after the Distiller is built, and keep it out of the student.",
            values,
        )
    if blocked:
        free = [name for name in levels if name not in blocked]
        return Finding(
            "red",
            "gradient",
            f"The student's features at {', '.join(blocked)} take no gradient: all layers before them are frozen.",
            "Unfreeze layers before these taps (freeze=)" + (f", or set levels=[{', '.join(free)}]." if free else "."),
            values,
        )
    silent = [name for name, norm in norms.items() if not 0 < norm < math.inf]
    if silent:
        return Finding(
            "red",
            "gradient",
            f"No finite gradient of the distillation arrives at {', '.join(silent)}.",
            "See whether every part of the loss is finite and not zero, and whether the tapped maps are detached.",
            values,
        )
    found = f"Norms of the distillation's gradient: {per_level(norms, norms.values())}; the teacher takes none."
    return Finding("green", "gradient", found, "", values)


def check_scale(
    names: Sequence[str], raw: Sequence[float], scales: Sequence[float], config: FGDConfig, weight: float
) -> Finding:
    """How strong the distillation's gradient is against the task's at each level, and what becomes of it.

    Args:
        names: of the levels.
        raw: |distillation gradient| / |task gradient| at the student's feature, for a scale of 1.
        scales: what the gradient balance makes of it; not used in mode "fixed".
        config: of the distillation.
        weight: the configured one.
    """
    fixed = config.balance.mode == "fixed"
    values = {f"raw_ratio/{name}": value for name, value in zip(names, raw, strict=True)}
    unknown = [name for name, value in zip(names, raw, strict=True) if not (math.isfinite(value) and value > 0)]
    if unknown:
        return Finding(
            "red",
            "loss scale",
            f"At {', '.join(unknown)} no gradient ratio can be measured: one of the two gradients is 0 or not finite.",
            "See that the task's loss depends on these levels and is finite, or leave them out of levels=.",
            values,
        )
    effective = [ratio * (1 if fixed else scale) * weight for ratio, scale in zip(raw, scales, strict=True)]
    values |= {f"ratio/{name}": value for name, value in zip(names, effective, strict=True)}
    values |= {} if fixed else {f"scale/{name}": value for name, value in zip(names, scales, strict=True)}
    found = f"|distillation|/|task| gradient, raw: {per_level(names, raw)}; "
    found += "weights are fixed" if fixed else f"the balance multiplies by {per_level(names, scales)}"
    found += f", which gives {per_level(names, effective)}."
    # judged against 1, the default of the balance's ratio
    mean = math.exp(sum(math.log(value) for value in effective) / len(effective))
    factor = max(max(value, 1 / value) for value in effective)
    uneven = max(effective) / min(effective)
    status: Status = "red" if factor > FAR_OFF else "yellow" if factor > OFF or uneven > UNEVEN else "green"
    mend = ""
    if status != "green" and fixed:
        mend = f"Set balance.mode=gradient, which measures the scale, or weight={weight / mean:.2g}."
    elif status != "green":
        low, high = config.balance.min_scale, config.balance.max_scale
        bound = [name for name, scale in zip(names, scales, strict=True) if not 1.001 * low < scale < 0.999 * high]
        mend = "Set balance.ratio=1 and weight=1, the defaults: the ratio aimed at is their product."
        if bound:
            mend = (
                f"Widen balance.min_scale and balance.max_scale: {', '.join(bound)} is at a bound ({low:g}, {high:g})."
            )
    return Finding(status, "loss scale", found, mend, values)


def check_weight_zero(parameters: int, different: Sequence[str], noise: Sequence[str]) -> Finding:
    """Whether with weight 0 the student's gradient is the plain one bit for bit.

    Args:
        parameters: how many were compared.
        different: names of those whose gradient differs with weight 0.
        noise: names of those whose gradient differs between two plain passes.
    """
    if different and not noise:
        return Finding(
            "red",
            "weight 0",
            f"With weight 0 the gradient of {len(different)} of {parameters} parameters of the student changes, for "
            f"example {different[0]}.",
            "Something outside the Distiller acts on the student: remove other hooks; loss= must be the task's alone.",
        )
    if different:
        return Finding(
            "green",
            "weight 0",
            f"Two plain passes differ already ({len(noise)} of {parameters} parameters: operations that are not "
            f"deterministic), so {len(different)} that differ with weight 0 say nothing.",
        )
    found = f"With weight 0 the student's gradient is the plain one bit for bit ({parameters} parameters)."
    return Finding("green", "weight 0", found)


def _areas(relative: Tensor) -> Tensor:
    return (relative[:, 2:] - relative[:, :2]).clamp(min=0).prod(1)


DEAD, CONSTANT = 1e-4, 1e-3  # root mean square of a feature; its spread over the batch relative to that


def check_optimizer(
    trained: Iterable[nn.Parameter],
    teacher: Iterable[nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer] | None,
) -> Finding:
    """Whether an optimizer holds what is trained beside the student, and nothing of the teacher."""
    own = list(trained)
    mend = 'Call optimizer.add_param_group({"params": distiller.parameters()}) before the first step.'
    if not own:
        return Finding("green", "optimizer", "Adapters and losses have no parameters to train.")
    if optimizers is None:
        return Finding(
            "yellow",
            "optimizer",
            f"No optimizer was given, so it is not known whether {len(own)} tensors of adapters and losses train.",
            "Pass optimizer= to check().",
        )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}
    missing = sum(id(parameter) not in rates for parameter in own)
    values = {"missing": float(missing), "held": float(len(own) - missing)}
    if any(id(parameter) in rates for parameter in teacher):
        return Finding(
            "red",
            "optimizer",
            "The optimizer holds parameters of the teacher; weight decay would change them.",
            "Build the optimizer from student.parameters() and distiller.parameters() alone.",
            values,
        )
    if missing:
        return Finding(
            "red",
            "optimizer",
            f"{missing} of {len(own)} tensors of adapters and losses are in no optimizer; they would never be trained.",
            mend,
            values,
        )
    if all(rates[id(parameter)] == 0 for parameter in own):
        return Finding(
            "yellow",
            "optimizer",
            f"All {len(own)} tensors of adapters and losses have the learning rate 0 now.",
            "Well during a warm-up that begins at 0; else give their group a learning rate.",
            values,
        )
    return Finding("green", "optimizer", f"All {len(own)} tensors of adapters and losses are in it.", "", values)


def check_frozen(changed: Sequence[str], training: Sequence[str], batch_statistics: Sequence[str]) -> Finding:
    """Whether the teacher stays as it is when it runs.

    Args:
        changed: names of its parameters and buffers that a forward pass changed.
        training: names of its modules that were in train mode in it.
        batch_statistics: its normalisations that keep no running statistics.
    """
    mend = "Let nothing in the teacher's forward() call train(); load it anew, since its statistics have moved."
    if changed:
        found = f"A forward pass changed {len(changed)} tensors of the teacher, for example {changed[0]}."
        return Finding("red", "teacher frozen", found, mend)
    if training:
        found = f"{len(training)} modules of the teacher are in train mode after its forward pass: {training[0]}."
        return Finding("red", "teacher frozen", found, mend)
    if batch_statistics:
        return Finding(
            "yellow",
            "teacher frozen",
            f"{len(batch_statistics)} batch normalisations of the teacher keep no running statistics and normalise by "
            f"the batch: {batch_statistics[0]}.",
            "Use a teacher with track_running_stats=True, or batches of the size it was trained with.",
        )
    return Finding(
        "green", "teacher frozen", "In eval mode; a forward pass changed none of its weights and statistics."
    )


def check_features(names: Sequence[str], features: Sequence[Tensor]) -> Finding:
    """Whether the teacher's features say something: finite, not vanishing, not the same everywhere.

    Args:
        names: of the levels.
        features: (N, C, H, W) each.
    """
    size, spread = [], []
    for feature in features:
        feature = feature.double()
        size.append(float(feature.square().mean().sqrt()))
        spread.append(float((feature - feature.mean((0, 2, 3), keepdim=True)).square().mean().sqrt()))
    relative = [s / r if r > 0 else 0.0 for s, r in zip(spread, size, strict=True)]
    values = {f"size/{n}": v for n, v in zip(names, size, strict=True)}
    values |= {f"spread/{n}": v for n, v in zip(names, relative, strict=True)}
    found = (
        f"root mean square {per_level(names, size)}; spread over the batch relative to it {per_level(names, relative)}."
    )
    if not all(math.isfinite(value) for value in size):
        bad = [name for name, value in zip(names, size, strict=True) if not math.isfinite(value)]
        return Finding(
            "red",
            "teacher's features",
            f"NaN or infinite at {', '.join(bad)}.",
            "Set teacher.dtype=float32; if that does not help, the teacher's weights are damaged: use another file.",
            values,
        )
    if min(size) < DEAD or min(relative) < CONSTANT:
        return Finding(
            "red",
            "teacher's features",
            f"They are (nearly) constant: {found}",
            "The teacher is not trained, or its weights were not loaded: give trained weights, and check them alone.",
            values,
        )
    return Finding("green", "teacher's features", f"{found[0].upper()}{found[1:]}", "", values)


def check_numbers(student: nn.Module, task_loss: float) -> Finding:
    """Whether the student's weights and the task's loss are finite (the teacher's weights are, or it is refused)."""
    tensors = [*student.named_parameters(), *student.named_buffers()]
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if bad:
        return Finding(
            "red",
            "numbers",
            f"{len(bad)} tensors of the student hold NaN or infinity, for example {bad[0]}.",
            "Start from another checkpoint, and lower the learning rate of the training that made this one.",
        )
    if not math.isfinite(task_loss):
        return Finding(
            "red", "numbers", f"The task's loss alone is {task_loss}.", "Mend the training without distillation first."
        )
    found = f"Weights of the student and the task's loss ({task_loss:.4g}) are finite."
    return Finding("green", "numbers", found, "", {"task_loss": task_loss})
