"""The checks of what takes part in a distillation: student, teacher and optimizer. See fgd_hooks/doctor.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fgd_hooks.findings import Finding, per_level

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
