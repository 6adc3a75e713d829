"""Fit the layers of a thinned student to what its teacher's layers compute, in a few forward passes over a few images.

::

    inherited = inherit_channels(student, teacher=teacher)
    print(fit_channels(student, teacher=teacher, images=images))  # images: a batch of the training's own

Evenly spaced channels of a layer meet fewer inputs than they were trained with, so that the copy computes something
else than the teacher. Here each convolution is fitted by least squares, from its inputs in the student, to the outputs
of the teacher's channels that it took, in the order in which the layers run, so that later layers make up for what
earlier ones miss. Channel pruning reconstructs feature maps in this way, too: He et al.,
"Channel Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017, arXiv 1707.06168).
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fgd_hooks.initialization.dataflow import counterparts, layer_graph, repeats_itself, run_on
from fgd_hooks.initialization.layers import BatchNorm, Unit, checked, units
from fgd_hooks.initialization.report import InitializationReport
from fgd_hooks.taps.hooks import first_argument
from fgd_hooks.utils.distributed import WORLD, ProcessGroup, broadcast, on_any_process
from fgd_hooks.utils.linalg import cell_places, chosen_cells, evenly_spaced, ridge_change, wide
from fgd_hooks.utils.modules import all_tensors, write_tensors
from fgd_hooks.utils.preserve import preserve

MOST_NUMBERS = 2**24  # of a map, in float64 at a time
CONSTANT = 1e-10  # a channel whose variance is at most this share of its squared mean: rounding explains it

Padding = tuple[int, int, int, int]
"""Zeros left, right, above and below."""


@torch.no_grad()
def fit_channels(
    student: nn.Module,
    *,
    teacher: nn.Module,
    images: Any,
    modules: Sequence[tuple[str, str]] | None = None,
    graph: Mapping[str, set[str]] | None = None,
    process_group: ProcessGroup = WORLD,
) -> InitializationReport:
    """Fit each of the student's convolutions to the evenly spaced channels of the teacher's of that name, in place.

    Minimises sum |t - W x|² + r |W - W0|² for each layer, over at most :data:`MAX_CELLS` cells a call: x is what the
    layer meets in the student, whose earlier layers are fitted already, t what the teacher's layer gives, both less
    their means, W0 the weights at hand times the scale that suits each channel best, r as in :meth:`FittedConv.fit`. A
    bias makes the means equal; without a bias or a batch normalisation nothing is subtracted. A batch normalisation
    that follows takes the statistics of these images and lets out what the teacher's lets out, and the weights before
    it stay as long as they were, channel by channel: their length changes nothing that is computed, but an optimizer
    turns longer ones more slowly, so that a student whose weights grew in the fit ends worse (docs/inheriting.md).

    Takes one pass of the teacher, one of the student, one more for each layer that runs several times (a head that all
    levels share), and a linear system per layer. Layers stay as they are that have no counterpart of equal kernel, that
    are frozen (YOLO's fixed DFL convolution is) or grouped (but for depthwise ones), that run on pieces of images
    (proposals), or not at all; so do channels that are the same in all cells, in the student or the teacher. With
    torch.distributed all processes must call this together: each fits to its images, and all take the weights of the
    first.

    Args:
        student: after :func:`fgd_hooks.inherit_channels`, before its training; wrappers are looked through.
        teacher: its batch normalisations must not be folded in (fused). It is not changed.
        images: what both are called with, on their device: for most models (N, 3, H, W). Some dozens of images as the
            student will meet them in training; all of them go through the models at once.
        modules: the student's modules that are fitted, each with the teacher's; None: all, where blocks of a longer
            sequence in the teacher are taken evenly.
        graph: which of the student's layers take what others give, if that is known already
            (:func:`~fgd_hooks.initialization.dataflow.layer_graph`); None: found by one more pass.
        process_group: the processes that fit together; "world": all, where torch.distributed is at work; None: this
            one alone.

    Raises:
        TeacherError: the teacher is the student, shares its weights or holds NaN.
        ValueError: a model cannot be run on the images, or weights came out that are not finite, on any process; the
            student is as it was.
    """
    student, teacher, layers = checked(student, teacher)
    kept: dict[str, str] = {}
    fits: list[_Fit] = []
    before = {name: value.clone() for name, value in all_tensors(student).items()}
    failure: ValueError | None = None
    try:
        graph = layer_graph(student, images) if graph is None else graph
        for pair in counterparts(student, teacher) if modules is None else modules:
            for unit in units(student, pair[0]):
                name, layer = next(iter(unit.layers.items()))
                if isinstance(layer, nn.Conv2d):
                    others, reason = unit.match(layers, "outputs", *pair, graph)
                    reason = reason or _misfit(name, layer, others[name], layers[others[name]], graph)
                    if reason:
                        kept[name] = reason
                    else:
                        given = {each: layers[other] for each, other in others.items()}
                        fits.append(_Fit(name, unit, given, _count(images)))
        _run(teacher, images, "teacher", [fit.theirs.register_forward_hook(fit.observe) for fit in fits])
        unseen = "the teacher's does not run, or on pieces of images"
        kept |= {fit.name: unseen for fit in fits if not fit.targets}
        fits = [fit for fit in fits if fit.targets]
        for hooks in _passes(fits):
            buffers = [each for fit in fits for layer in fit.unit.layers.values() for each in layer.buffers()]
            _run(student, images, "student", [register() for register in hooks], buffers)
        for name, key, tensor in ((fit.name, *item) for fit in fits for item in fit.unit.tensors.items()):
            if not torch.isfinite(tensor).all():  # nor an overflow, of half precision, may get into what is trained
                raise ValueError(f"The fit of {name} gave {key} values that are not finite; are those of the images?")
    except ValueError as error:
        failure = error
    device = next(iter(before.values())).device if before else torch.device("cpu")
    if on_any_process(failure is not None, device, process_group):
        write_tensors(student, before)
        raise failure or ValueError("The student's layers could not be fitted on another process; see its log.")
    unfit = "it does not run as often as the teacher's, or its features are constant or not finite"
    kept |= {fit.name: unfit for fit in fits if fit.explained is None}
    for tensor in [*student.parameters(), *student.buffers()]:
        broadcast(tensor, process_group)
    return InitializationReport(fitted={f.name: f.explained for f in fits if f.explained is not None}, unfitted=kept)


def _misfit(name: str, mine: nn.Conv2d, other: str, theirs: nn.Module, graph: Mapping[str, set[str]]) -> str:
    """Why a convolution cannot be fitted to that of the teacher which its weights match, or an empty text."""
    if not mine.weight.requires_grad:
        return "its weights are frozen"
    if not isinstance(theirs, nn.Conv2d):
        return f"the teacher's {other} is a {type(theirs).__name__}"
    for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
        if getattr(mine, key) != getattr(theirs, key):
            return f"its {key} is {getattr(mine, key)}, the teacher's {getattr(theirs, key)}"
    if mine.padding_mode != "zeros":
        return f"it pads with {mine.padding_mode!r}, not with zeros"
    return "it takes what itself has given before" if repeats_itself(name, graph) else ""


def _passes(fits: Sequence[_Fit]) -> Iterator[list[Callable[[], Any]]]:
    """What registers the hooks of each pass of the student, in the order in which the layers run.

    A layer that runs several times is fitted to all that it meets, so that those behind it wait for the next pass.
    """
    for once, group in itertools.groupby(sorted(fits, key=lambda fit: fit.first), lambda fit: len(fit.targets) == 1):
        if once:
            yield [register for fit in group for register in fit.hooks()]
        else:
            yield from ([register] for fit in group for register in fit.hooks())


class _Target(typing.NamedTuple):
    """What one call of the teacher's layer gave, of the channels that the student has."""

    size: torch.Size  # (N, C, H, W)
    cells: Tensor  # (rows, C) on the CPU
    mean: Tensor  # (C,) over all cells
    variance: Tensor  # (C,)


class _Fit:
    """One convolution of the student, what the teacher's gives, and the normalisation that follows."""

    clock = itertools.count()

    def __init__(self, name: str, unit: Unit, teacher: Mapping[str, nn.Module], images: int | None) -> None:
        self.name, self.unit, self.images = name, unit, images
        self.layer: Any = unit.layers[name]
        self.theirs = teacher[name]
        norm = next((key for key, each in unit.layers.items() if isinstance(each, BatchNorm)), None)
        self.norms: tuple[Any, Any] | None = None if norm is None else (unit.layers[norm], teacher[norm])
        self.first, self.whole = -1, True  # when it first ran in the teacher; whether always on whole images
        self.targets: list[_Target] = []
        self.met: list[Tensor] = []
        self.given: list[tuple[int, Tensor, Tensor]] = []
        self.explained: float | None = None

    def hooks(self) -> list[Callable[[], Any]]:
        """Fit the student's layer before it runs (the last time), then its normalisation after it has run."""
        hooks = [lambda: self.layer.register_forward_pre_hook(self.fit, with_kwargs=True)]
        return hooks + ([lambda: self.layer.register_forward_hook(self.normalise)] if self.norms else [])

    def observe(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the teacher's layer."""
        if not self.targets:
            self.first = next(self.clock)
        self.whole &= output.dim() == 4 and self.images in (None, output.shape[0])
        if not self.whole:
            self.targets.clear()
            return
        taken = evenly_spaced(self.layer.out_channels, output.shape[1]).to(output.device)
        chosen = output.detach().index_select(1, taken)
        image, row, column = _places(chosen.shape, chosen.device)
        cells = chosen[image, :, row, column].cpu()
        self.targets.append(_Target(chosen.shape, cells, *_mean_and_variance(chosen)))

    def fit(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the student's layer: once it was called as often as the teacher's, fit it."""
        number = len(self.met)
        if self.explained is not None or number == len(self.targets):
            return
        features, size = first_argument(args, kwargs), self.targets[number].size
        padding = _padding(self.layer, features, size)
        if padding is not None:
            self.met.append(_patches(self.layer, features, size, padding))
        if len(self.met) == len(self.targets):
            self.solve(wide(torch.cat(self.met, dim=1)), wide(torch.cat([each.cells for each in self.targets])))

    def solve(self, patches: Tensor, cells: Tensor) -> None:
        """Set weights by ridge regression, and a bias if there is one; what is the same in all cells stays as it was.

        Args:
            patches: (groups, rows, inputs of one output) what the kernel meets.
            cells: (rows, C) what the teacher's layer gives there.
        """
        layer, depthwise, normalised = self.layer, self.layer.groups > 1, self.norms is not None
        cells = cells.to(patches.device)
        outputs = cells.t().unsqueeze(-1) if depthwise else cells.unsqueeze(0)
        given = wide(layer.weight).flatten(1)  # (outputs, inputs)
        start = given.unsqueeze(-1) if depthwise else given.t().unsqueeze(0)  # (groups, inputs, outputs of a group)
        inputs_mean, outputs_mean = patches.mean(1, keepdim=True), outputs.mean(1, keepdim=True)
        if not (torch.isfinite(inputs_mean).all() and torch.isfinite(outputs_mean).all()):
            return
        copied_mean = (inputs_mean @ start).flatten()
        if not normalised and layer.bias is None:  # nothing could make up for a difference of the means
            inputs_mean, outputs_mean = torch.zeros_like(inputs_mean), torch.zeros_like(outputs_mean)
        patches, outputs = patches - inputs_mean, outputs - outputs_mean
        copied = patches @ start  # sums of fewer terms than the teacher's: as good as they get by another scale
        varies = _varies(*(each.to(patches.device) for each in self.statistics))
        varies &= _varies(copied_mean, copied.var(1, correction=0).flatten())
        varies &= outputs.var(1, correction=0).flatten() > 0
        if not varies.any():
            return
        scale = (outputs * copied).sum(1) / copied.square().sum(1)
        start = start * torch.where(scale > 0, scale, 0)[:, None]
        rest = outputs - patches @ start
        count = patches.new_tensor(float(patches.shape[1]))
        change = ridge_change(patches.mT @ patches / count, patches.mT @ rest / count, count)
        left = (rest - patches @ change).square().mean(1).flatten()[varies]
        self.explained = float(1 - (left / outputs.square().mean(1).flatten()[varies]).mean())
        solution = start + change
        weight = solution.squeeze(-1) if depthwise else solution.squeeze(0).t()
        if normalised:  # as long as the copied ones
            length, copied_length = weight.norm(dim=1, keepdim=True), given.norm(dim=1, keepdim=True)
            weight = weight * torch.where((length > 0) & (copied_length > 0), copied_length / length, 1)
        layer.weight.copy_(torch.where(varies[:, None], weight, given).reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(torch.where(varies, (outputs_mean - inputs_mean @ solution).flatten(), wide(layer.bias)))
        self.met = [torch.empty(0)] * len(self.met)  # they are many numbers

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of what the teacher's layer gives, (C,) each."""
        return _pooled([(each.size[0] * each.size[2:].numel(), each.mean, each.variance) for each in self.targets])

    def normalise(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook: give the normalisation's outputs mean and deviation of the teacher's on these images."""
        norm, other = typing.cast(tuple[Any, Any], self.norms)
        missing = norm.running_mean is None or other.running_mean is None or norm.weight is None or other.weight is None
        if self.explained is None or missing:
            return
        self.given.append((output.numel() // output.shape[1], *_mean_and_variance(output)))
        if len(self.given) != len(self.targets):
            return
        (mean, variance), (their_mean, their_variance) = _pooled(self.given), self.statistics
        varies = _varies(mean, variance) & _varies(their_mean, their_variance)
        chosen = evenly_spaced(norm.num_features, other.num_features).to(mean.device)
        gain = wide(other.weight)[chosen] / (wide(other.running_var)[chosen] + other.eps).sqrt()
        values = {
            "running_mean": mean,
            "running_var": variance,
            "weight": gain * (their_variance + norm.eps).sqrt(),
            "bias": wide(other.bias)[chosen] + gain * (their_mean - wide(other.running_mean)[chosen]),
        }
        for key, value in values.items():
            tensor = getattr(norm, key)
            tensor.copy_(torch.where(varies, value, wide(tensor)))


def _run(model: nn.Module, images: Any, role: str, handles: Sequence[Any], fitted: Sequence[Tensor] = ()) -> None:
    """One pass in eval mode that leaves no trace but in parameters and ``fitted``; the hooks are removed."""
    try:
        with preserve(model, probe=True, but=fitted):
            run_on(model, images, role)
    finally:
        for handle in handles:
            handle.remove()


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


def _pooled(parts: Sequence[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and variance, (C,) each, over the cells of all maps: (cells, mean, variance) of each."""
    if len(parts) == 1:
        return parts[0][1:]
    counts, means, variances = zip(*parts, strict=True)
    share = torch.tensor(counts).to(means[0])[:, None] / sum(counts)
    every_mean, every_variance = torch.stack(means), torch.stack(variances)
    mean = (share * every_mean).sum(0)
    return mean, (share * (every_variance + (every_mean - mean).square())).sum(0)


def _varies(mean: Tensor, variance: Tensor) -> Tensor:
    """Which channels are not the same in all cells, but for rounding, and finite."""
    return torch.isfinite(variance) & (variance > CONSTANT * mean.square())


def _places(size: torch.Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of the cells of maps (N, C, H, W) that are compared."""
    return cell_places(chosen_cells(size[0] * size[2] * size[3]).to(device), size[2], size[3])


def _padding(layer: Any, features: Tensor, size: torch.Size) -> Padding | None:
    """The zeros with which a convolution makes a map of this size of its input; None where it makes another one.

    One that pads as its input asks for ("same", or timm's layers in TensorFlow's way) is recognised by what it gives.
    """
    plain = type(layer).forward is nn.Conv2d.forward and not isinstance(layer.padding, str)
    before, after = [0, 0], [0, 0]  # of columns and rows
    for place, side in enumerate((1, 0)):
        reach = (size[2 + side] - 1) * layer.stride[side] + layer.dilation[side] * (layer.kernel_size[side] - 1) + 1
        lacking = max(0, reach - features.shape[2 + side])
        before[place] = layer.padding[side] if plain else lacking // 2
        after[place] = layer.padding[side] if plain else lacking - lacking // 2
    padding = before[0], after[0], before[1], after[1]
    shape = (layer.stride, 0, layer.dilation, layer.groups)
    if plain:
        maps, weight = (torch.empty(each.shape, device="meta") for each in (features, layer.weight))
        made = nn.functional.conv2d(nn.functional.pad(maps, padding), weight, None, *shape)
        return padding if made.shape == size else None
    image = features.detach()[:1]
    made = nn.functional.conv2d(nn.functional.pad(image, padding), layer.weight, layer.bias, *shape)
    wanted = type(layer).forward(layer, image)
    alike = wanted.shape[1:] == size[1:] == made.shape[1:] and torch.allclose(made, wanted, rtol=1e-3, atol=1e-4)
    return padding if alike and size[0] == features.shape[0] else None


def _patches(layer: Any, features: Tensor, size: torch.Size, padding: Padding) -> Tensor:
    """What a convolution's kernel meets at the cells that are compared, in the order of the weights.

    (1, rows, C * kernel cells), of a depthwise one (C, rows, kernel cells).
    """
    padded = nn.functional.pad(features.detach(), padding) if any(padding) else features.detach()
    image, row, column = _places(size, features.device)
    top, left = row * layer.stride[0], column * layer.stride[1]
    seen = torch.stack(
        [
            padded[image, :, top + i * layer.dilation[0], left + j * layer.dilation[1]]
            for i in range(layer.kernel_size[0])
            for j in range(layer.kernel_size[1])
        ],
        dim=-1,
    )  # (rows, C, kernel cells)
    return seen.transpose(0, 1) if layer.groups > 1 else seen.flatten(1).unsqueeze(0)
