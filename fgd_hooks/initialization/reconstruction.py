"""Fit the layers of a thinned student to what its teacher's layers compute, in one forward pass over a few images.

::

    inherited = inherit_channels(student, teacher)
    print(fit_channels(student, teacher, images))  # images: a batch of the training's own

Evenly spaced channels of a layer meet fewer inputs than they were trained with, so that
the copy computes something else than the teacher. Here each convolution is fitted by least squares, from its inputs in
the student, to the outputs of the teacher's channels that it took, in the order in which the layers run, so that later
layers make up for what earlier ones miss. Channel pruning reconstructs feature maps in this way, too: He et al.,
"Channel Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017, arXiv 1707.06168).
"""

from __future__ import annotations

import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fgd_hooks.initialization.layers import BatchNorm, Unit, is_depthwise, units
from fgd_hooks.initialization.report import Reconstruction
from fgd_hooks.taps.hooks import first_argument
from fgd_hooks.teacher import check_apart, check_finite
from fgd_hooks.utils.distributed import is_distributed, on_any_process
from fgd_hooks.utils.linalg import MAX_CELLS, evenly_spaced, ridge_change, wide
from fgd_hooks.utils.modules import all_tensors, unwrap, write_tensors
from fgd_hooks.utils.preserve import preserve

MOST_NUMBERS = 2**24
"""Of a map's numbers, how many are in float64 at a time."""


CONSTANT = 1e-10
"""A channel whose variance is at most this share of its squared mean is taken as constant: rounding explains it."""


@dataclass(frozen=True)
class _Target:
    """What a layer of the teacher gives: at the cells that are compared, and over all of them."""

    cells: Tensor  # (rows, channels) its outputs at the sampled cells, before a normalisation; on the CPU
    size: torch.Size  # (N, C, H, W) of its whole output
    mean: Tensor  # (channels,)
    variance: Tensor


@torch.no_grad()
def fit_channels(student: nn.Module, teacher: nn.Module, images: Any) -> Reconstruction:
    """Fit each of the student's convolutions to the evenly spaced channels of the teacher's of that name, in place.

    Minimises sum |t - W x|² + r |W - W0|² for each layer, over at most :data:`MAX_CELLS` cells: x is
    what the layer meets in the student, whose earlier layers are fitted already, t what the teacher's layer gives, both
    less their means, W0 the weights at hand times the scale that suits each channel best, r as in
    :meth:`FittedConv.fit`. A batch normalisation that follows takes the statistics of these images and
    lets out what the teacher's lets out, and the weights before it stay as long as they were, channel by channel. Their
    length has no effect on what is computed, but an optimizer turns longer ones more slowly: a student whose weights
    grew in the fit ends worse (docs/inheriting.md). A bias makes the means equal. Takes one pass of each model and a
    linear system per layer; without a bias or a batch normalisation nothing is subtracted. Layers stay as they are that
    have no counterpart of equal kernel, that are frozen (YOLO's fixed DFL convolution is) or grouped (but for depthwise
    ones), that run several times in a pass, on pieces of images (proposals), or not at all; so do channels that are the
    same in all cells, in the student or the teacher. With torch.distributed all processes must call this together: each
    fits to its images, and all take the weights of the first.

    Args:
        student: after :func:`fgd_hooks.inherit_channels`, before its training; wrappers are looked through.
        teacher: its batch normalisations must not be folded in (fused). It is not changed.
        images: what both are called with, on their device: for most models (N, 3, H, W). Some dozens of images as the
            student will meet them in training; all of them go through the models at once.

    Raises:
        TeacherError: the teacher is the student, shares its weights or holds NaN.
        ValueError: a model cannot be run on the images, or weights came out that are not finite, on any process; the
            student is as it was.
    """
    student, teacher = unwrap(student), unwrap(teacher)
    check_apart(student, teacher)
    check_finite(teacher)
    layers = dict(teacher.named_modules(remove_duplicate=False))
    kept: dict[str, str] = {}
    fits: dict[str, Unit] = {}
    for unit in units(student, ""):
        name, layer = next(iter(unit.layers.items()))
        if isinstance(layer, nn.Conv2d):
            if reason := _misfit(unit, layer, layers):
                kept[name] = reason
            else:
                fits[name] = unit
    before = {name: value.clone() for name, value in all_tensors(student).items()}
    explained: dict[str, float] = {}
    failure: ValueError | None = None
    try:
        targets = _observe(teacher, images, {name: (layers[name], unit.layers[name]) for name, unit in fits.items()})
        for name in [name for name in fits if name not in targets]:
            kept[name] = "the teacher's runs not once in a pass, or on pieces of images"
            del fits[name]
        explained = _fit_all(student, images, fits, targets, layers)
        _check_weights(fits)
    except ValueError as error:
        failure = error
    if on_any_process(failure is not None, next(iter(before.values())).device if before else torch.device("cpu")):
        write_tensors(student, before)
        raise failure or ValueError("The student's layers could not be fitted on another process; see its log.")
    unfit = "it does not run, or its features are constant or not finite"
    kept.update({name: unfit for name in fits if name not in explained})
    if is_distributed():
        for tensor in [*student.parameters(), *student.buffers()]:
            torch.distributed.broadcast(tensor, 0)
    return Reconstruction(explained, kept)


def _misfit(unit: Unit, mine: nn.Conv2d, teacher: Mapping[str, nn.Module]) -> str:
    """Why a convolution cannot be fitted to the teacher's of its name, or an empty text."""
    _, reason = unit.counterparts(teacher)
    if reason:
        return reason
    if not mine.weight.requires_grad:
        return "its weights are frozen"
    name = next(iter(unit.layers))
    theirs = teacher[name]
    if not isinstance(theirs, nn.Conv2d):
        return f"the teacher's {name} is a {type(theirs).__name__}"
    for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
        if getattr(mine, key) != getattr(theirs, key):
            return f"its {key} is {getattr(mine, key)}, the teacher's {getattr(theirs, key)}"
    if isinstance(mine.padding, str) or mine.padding_mode != "zeros":
        return f"it pads with {mine.padding_mode!r} by {mine.padding!r}, not with zeros by a number of cells"
    if (mine.groups, theirs.groups) != (1, 1) and not (is_depthwise(mine) and is_depthwise(theirs)):
        return f"it has {mine.groups} groups, the teacher's {theirs.groups}"
    if mine.out_channels > theirs.out_channels or (not unit.normalised and mine.out_channels != theirs.out_channels):
        return f"its {mine.out_channels} outputs are no channels of the teacher's {theirs.out_channels}"
    return ""


def _observe(teacher: nn.Module, images: Any, pairs: Mapping[str, tuple[nn.Module, nn.Module]]) -> dict[str, _Target]:
    """The teacher's outputs, for those layers that run once; ``pairs``: name -> (the teacher's, the student's)."""
    targets: dict[str, _Target] = {}
    calls: Counter[str] = Counter()
    count = _count(images)

    def record(name: str, mine: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            calls[name] += 1
            if calls[name] == 1 and output.dim() == 4 and count in (None, output.shape[0]):
                chosen = output.detach().index_select(
                    1, evenly_spaced(mine.out_channels, output.shape[1]).to(output.device)
                )
                cells = chosen.movedim(1, -1).flatten(0, -2)
                rows = _rows(cells.shape[0]).to(cells.device)
                targets[name] = _Target(cells[rows].cpu(), chosen.shape, *_mean_and_variance(chosen))

        return hook

    handles = [theirs.register_forward_hook(record(name, mine)) for name, (theirs, mine) in pairs.items()]
    _run(teacher, images, "teacher", handles)
    return {name: target for name, target in targets.items() if calls[name] == 1}


def _fit_all(
    student: nn.Module,
    images: Any,
    fits: Mapping[str, Unit],
    targets: Mapping[str, _Target],
    teacher: Mapping[str, nn.Module],
) -> dict[str, float]:
    """Run the student once and fit each layer just before it runs, its normalisation just after."""
    explained: dict[str, float] = {}

    def before(name: str, normalised: bool) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in explained:
                share = _fit(module, first_argument(args, kwargs), targets[name], normalised)
                if share is not None:
                    explained[name] = share

        return hook

    def after(name: str, norm: Any, other: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if name in explained:
                _normalise(norm, other, output, targets[name])

        return hook

    handles = []
    for name, unit in fits.items():
        layer = unit.layers[name]
        key = next((key for key, each in unit.layers.items() if isinstance(each, BatchNorm)), None)
        handles.append(layer.register_forward_pre_hook(before(name, key is not None), with_kwargs=True))
        if key is not None:
            handles.append(layer.register_forward_hook(after(name, unit.layers[key], teacher[key])))
    fitted = [buffer for unit in fits.values() for layer in unit.layers.values() for buffer in layer.buffers()]
    _run(student, images, "student", handles, fitted)
    return explained


def _count(images: Any) -> int | None:
    """How many images these are, None where that cannot be told."""
    if isinstance(images, Tensor) and images.dim() == 4:
        return images.shape[0]
    if isinstance(images, (list, tuple)) and all(isinstance(each, Tensor) and each.dim() == 3 for each in images):
        return len(images)
    return None


def _mean_and_variance(maps: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) each, of (N, C, H, W) maps; some channels at a time, for maps in float64 may not fit in the memory."""
    step = max(1, MOST_NUMBERS * maps.shape[1] // max(1, maps.numel()))
    parts = [torch.var_mean(wide(part), dim=(0, 2, 3), correction=0) for part in maps.detach().split(step, dim=1)]
    variances, means = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(variances)


def _varies(mean: Tensor, variance: Tensor) -> Tensor:
    """Which channels are not the same in all cells, but for rounding, and finite."""
    return torch.isfinite(variance) & (variance > CONSTANT * mean.square())


def _check_weights(fits: Mapping[str, Unit]) -> None:
    """No NaN and no overflow (of half precision, say) may get into what is trained."""
    for name, unit in fits.items():
        for key, tensor in unit.tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"The fit of {name} gave values in {key} that are not finite; are those of the images?"
                )


def _run(model: nn.Module, images: Any, role: str, handles: list[Any], fitted: Sequence[Tensor] = ()) -> None:
    """One pass in eval mode that leaves no trace but in parameters and ``fitted``; the hooks are removed."""
    try:
        with preserve(model, probe=True, but=fitted):
            model(images)
    except Exception as error:
        raise ValueError(f"The {role} ({type(model).__name__}) cannot be run on the images: {error}") from error
    finally:
        for handle in handles:
            handle.remove()


def _rows(count: int) -> Tensor:
    """(rows,) the cells that are compared: all, or a random choice that is the same in every call."""
    if count <= MAX_CELLS:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MAX_CELLS].sort().values


def _fit(layer: nn.Conv2d, features: Tensor, target: _Target, normalised: bool) -> float | None:
    """Fit weights (and bias) of a convolution; the share of variance explained, None where nothing was changed."""
    size = target.size
    height, width = _output_size(layer, features)
    if (features.shape[0], height, width) != (size[0], size[2], size[3]):
        return None
    # Without a normalisation or a bias nothing could make up for a difference of the means.
    solution = _solve(layer, features, target, centred=normalised or layer.bias is not None)
    if solution is None:
        return None
    given = wide(layer.weight).flatten(1)
    weight = solution.weight
    if normalised:
        length, copied_length = weight.norm(dim=1, keepdim=True), given.norm(dim=1, keepdim=True)
        weight = weight * torch.where((length > 0) & (copied_length > 0), copied_length / length, 1)
    layer.weight.copy_(torch.where(solution.fitted[:, None], weight, given).reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(torch.where(solution.fitted, solution.bias, wide(layer.bias)))
    return solution.explained


@dataclass(frozen=True)
class _Solution:
    """What least squares makes of a convolution."""

    weight: Tensor  # (outputs, inputs of one output)
    bias: Tensor  # (outputs,) makes the means equal
    fitted: Tensor  # (outputs,) False where a channel is the same in all cells, here or in the teacher
    explained: float  # share of the variance of the teacher's outputs, mean over those that were fitted


def _solve(layer: nn.Conv2d, features: Tensor, target: _Target, centred: bool) -> _Solution | None:
    """Ridge regression from what the kernel meets in ``features`` to the teacher's cells, towards the weights at hand.

    With ``centred`` both are less their means. None where nothing can be fitted.
    """
    patches = wide(_patches(layer, features, target.size))  # (groups, rows, inputs of one output)
    cells = wide(target.cells).to(patches.device)
    outputs = cells.t().unsqueeze(-1) if layer.groups > 1 else cells.unsqueeze(0)
    given = wide(layer.weight).flatten(1)  # (outputs, inputs)
    start = given.unsqueeze(-1) if layer.groups > 1 else given.t().unsqueeze(0)  # (groups, inputs, outputs of a group)
    inputs_mean, outputs_mean = patches.mean(1, keepdim=True), outputs.mean(1, keepdim=True)
    if not (torch.isfinite(inputs_mean).all() and torch.isfinite(outputs_mean).all()):
        return None
    copied_mean = (inputs_mean @ start).flatten()
    if not centred:
        inputs_mean, outputs_mean = torch.zeros_like(inputs_mean), torch.zeros_like(outputs_mean)
    patches, outputs = patches - inputs_mean, outputs - outputs_mean
    copied = patches @ start  # sums of fewer terms than the teacher's: as good as they get by another scale
    fitted = _varies(target.mean.to(patches.device), target.variance.to(patches.device))
    fitted &= _varies(copied_mean, copied.var(1, correction=0).flatten())
    fitted &= outputs.var(1, correction=0).flatten() > 0
    if not fitted.any():
        return None
    scale = (outputs * copied).sum(1) / copied.square().sum(1)
    start = start * torch.where(scale > 0, scale, 0)[:, None]
    rest = outputs - patches @ start
    count = patches.new_tensor(float(patches.shape[1]))
    change = ridge_change(patches.mT @ patches / count, patches.mT @ rest / count, count)
    left = (rest - patches @ change).square().mean(1).flatten()[fitted]
    total = outputs.square().mean(1).flatten()[fitted]
    weight = start + change
    flat = weight.squeeze(-1) if layer.groups > 1 else weight.squeeze(0).t()
    bias = (outputs_mean - inputs_mean @ weight).flatten()
    return _Solution(flat, bias, fitted, float(1 - (left / total).mean()))


def _output_size(layer: nn.Conv2d, features: Tensor) -> tuple[int, int]:
    """(H, W) of what a convolution makes of its input."""
    height, width = (
        (features.shape[2 + dim] + 2 * pad - layer.dilation[dim] * (layer.kernel_size[dim] - 1) - 1)
        // layer.stride[dim]
        + 1
        for dim, pad in enumerate(_pads(layer))
    )
    return height, width


def _pads(layer: nn.Conv2d) -> tuple[int, int]:
    """Cells of zeros at each side, (vertical, horizontal)."""
    return typing.cast(tuple[int, int], layer.padding)  # no text: such a layer is kept


def _patches(layer: nn.Conv2d, features: Tensor, size: torch.Size) -> Tensor:
    """What a convolution's kernel meets at the cells that are compared.

    Returns:
        (1, rows, C * kernel cells), in the order of the weights; of a depthwise one (C, rows, kernel cells).
    """
    vertical, horizontal = _pads(layer)
    padded = features.detach()
    if vertical or horizontal:
        padded = nn.functional.pad(padded, (horizontal, horizontal, vertical, vertical))
    rows = _rows(size[0] * size[2] * size[3]).to(features.device)
    image = rows // (size[2] * size[3])
    top = rows // size[3] % size[2] * layer.stride[0]
    left = rows % size[3] * layer.stride[1]
    seen = torch.stack(
        [
            padded[image, :, top + i * layer.dilation[0], left + j * layer.dilation[1]]
            for i in range(layer.kernel_size[0])
            for j in range(layer.kernel_size[1])
        ],
        dim=-1,
    )  # (rows, C, kernel cells)
    return seen.transpose(0, 1) if layer.groups > 1 else seen.flatten(1).unsqueeze(0)


def _normalise(norm: Any, other: Any, output: Tensor, target: _Target) -> None:
    """Set a batch normalisation so that its outputs have the mean and deviation of the teacher's on these images."""
    if norm.running_mean is None or other.running_mean is None or norm.weight is None or other.weight is None:
        return
    mean, variance = _mean_and_variance(output)
    varies = _varies(mean, variance) & _varies(target.mean, target.variance)
    chosen = evenly_spaced(norm.num_features, other.num_features).to(mean.device)
    gain = wide(other.weight)[chosen] / (wide(other.running_var)[chosen] + other.eps).sqrt()
    values = {
        "running_mean": mean,
        "running_var": variance,
        "weight": gain * (target.variance + norm.eps).sqrt(),
        "bias": wide(other.bias)[chosen] + gain * (target.mean - wide(other.running_mean)[chosen]),
    }
    for key, value in values.items():
        tensor = getattr(norm, key)
        tensor.copy_(torch.where(varies, value, wide(tensor)))
