"""Layers with the normalisations that follow them: which of the teacher's fit the student's, and their copy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fgd_hooks.initialization.report import InitializationReport
from fgd_hooks.teacher import check_apart, check_finite
from fgd_hooks.utils.linalg import evenly_spaced
from fgd_hooks.utils.modules import Weighted, join, normalises, own_tensors, unwrap, write_tensors

BatchNorm = nn.modules.batchnorm._BatchNorm

Fit = Literal["equal", "channels", "outputs"]
"""What fits the teacher's layer: tensors of equal shapes; channels of them; a layer whose outputs are channels of its
outputs, whatever the inputs and what follows."""


@dataclass
class Unit:
    """A layer with weights and the normalisations that follow it: what is copied or fitted as a whole."""

    layers: dict[str, nn.Module]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of all its layers by name."""
        return {join(name, key): t for name, layer in self.layers.items() for key, t in own_tensors(layer).items()}

    @property
    def normalised(self) -> bool:
        """Whether its last layer is a normalisation."""
        return normalises(list(self.layers.values())[-1])

    def match(
        self,
        teacher: Mapping[str, nn.Module],
        fit: Fit,
        prefix: str = "",
        counterpart: str = "",
        hidden: Collection[str] = (),
    ) -> tuple[dict[str, str], str]:
        """The student's layers -> the teacher's if all of them fit, else nothing and the reason.

        ``teacher`` holds its modules by name; ``counterpart`` is what it calls the student's module ``prefix``.
        ``hidden`` are layers whose outputs other layers take, so that they may be channels of the teacher's.
        """
        others = {name: join(counterpart, name[len(prefix) :].lstrip(".")) for name in self.layers}
        missing = [(other, normalises(self.layers[name])) for name, other in others.items() if other not in teacher]
        if missing:
            fused = len(missing) < len(others) and all(norm for _, norm in missing)
            return {}, f"the teacher has no {missing[0][0]}" + (" (is it fused?)" if fused else "")
        for name, other in others.items():
            if reason := self._misfit(name, other, teacher[other], fit, self.normalised or name in hidden):
                return {}, reason
        return others, ""

    def _misfit(self, name: str, other: str, theirs: nn.Module, fit: Fit, inside: bool) -> str:
        """Why one layer does not fit the teacher's, or an empty text; ``inside``: its outputs may be channels."""
        layer = self.layers[name]
        mine, given, weighted = own_tensors(layer), own_tensors(theirs), isinstance(layer, Weighted)
        if mine.keys() != given.keys():
            return f"the teacher's {other} holds {', '.join(given) or 'nothing'}, not {', '.join(mine)}"
        if getattr(layer, "transposed", False) != getattr(theirs, "transposed", False):
            return f"{name} is a {type(layer).__name__}, the teacher's {other} a {type(theirs).__name__}"
        groups = getattr(layer, "groups", 1), getattr(theirs, "groups", 1)
        alike = groups[0] == groups[1] if fit == "equal" else groups == (1, 1)
        if not alike and not (is_depthwise(layer) and is_depthwise(theirs)):
            return f"{name} has {groups[0]} groups, the teacher's {groups[1]}"
        if weighted and fit != "equal":
            count, of = (tensors["weight"].shape[1 - _input_dim(layer)] for tensors in (mine, given))
            if count > of or (count < of and not inside):
                alone = "" if inside else ", which no other layer is known to take,"
                return f"the {count} outputs of {name}{alone} are no channels of the teacher's {of}"
        if fit == "outputs":
            return ""
        thinner = fit == "channels" and (weighted or normalises(layer))
        for key in mine:
            shape, whole = tuple(mine[key].shape), tuple(given[key].shape)
            within = len(shape) == len(whole) and all(one <= most for one, most in zip(shape, whole, strict=True))
            if shape != whole and not (thinner and within and shape[2:] == whole[2:]):
                no_channels, called = "which are no channels of " * thinner, f"{join(other, key)} " * (other != name)
                return f"{join(name, key)} is {shape}, {no_channels}the teacher's {called}{whole}"
        return ""


def units(model: nn.Module, prefix: str) -> Iterator[Unit]:
    """The units of a module of the model, in the order of definition."""
    unit: Unit | None = None
    for name, layer in model.get_submodule(prefix).named_modules(prefix=prefix):
        if not own_tensors(layer):
            continue
        if unit and normalises(layer) and name.rpartition(".")[0] == list(unit.layers)[-1].rpartition(".")[0]:
            unit.layers[name] = layer
            continue
        if unit:
            yield unit
        unit = Unit({name: layer})
    if unit:
        yield unit


def checked(student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """Both models without wrappers, and the teacher's modules by name; a teacher that cannot give is refused."""
    student, teacher = unwrap(student), unwrap(teacher)
    check_apart(student, teacher)
    check_finite(teacher)
    return student, teacher, dict(teacher.named_modules(remove_duplicate=False))


def take_over(
    student: nn.Module,
    teacher: Mapping[str, nn.Module],
    modules: Mapping[str, Sequence[tuple[str, str]]],
    fit: Fit,
    kept: Mapping[str, str] | None = None,
    least: float = 0.0,
    hidden: Collection[str] = (),
) -> InitializationReport:
    """Copy what fits of ``modules``, pairs of names for each part; all is compared before the first number is copied.

    ``kept`` are tensors that stay for another reason, with it. Below ``least`` of the parameters nothing is copied.
    """
    kept = dict(kept or {})
    copied: dict[str, str] = {}
    values: dict[str, Tensor] = {}
    for name, counterpart in (pair for pairs in modules.values() for pair in pairs):
        for unit in units(student, name):
            others, reason = unit.match(teacher, fit, name, counterpart, hidden)
            kept.update(dict.fromkeys(unit.tensors, reason) if reason else {})
            for layer, other in others.items():
                for key, value in _channels(unit.layers[layer], teacher[other], unit.normalised):
                    copied[join(layer, key)], values[join(layer, key)] = join(other, key), value
    counts = {name: parameter.numel() for name, parameter in student.named_parameters()}
    parameters, of = (sum(counts.get(name, 0) for name in names) for names in (copied, [*copied, *kept]))
    if parameters < least * of:
        reason = f"only {parameters:,} of {of:,} parameters fit; " + next(iter(kept.values()), "")
        return InitializationReport({}, dict.fromkeys([*copied, *kept], reason), modules, 0, of)
    write_tensors(student, values)
    return InitializationReport(copied, kept, modules, parameters, of)


def _channels(layer: nn.Module, theirs: nn.Module, normalised: bool) -> Iterator[tuple[str, Tensor]]:
    """New values of a layer's tensors: evenly spaced channels of the teacher's, larger where sums have fewer terms."""
    for key, tensor in own_tensors(layer).items():
        given = own_tensors(theirs)[key].detach()
        value = given
        for dim, (count, of) in enumerate(zip(tensor.shape, given.shape, strict=True)):
            if count != of:
                value = value.index_select(dim, evenly_spaced(count, of).to(value.device))
        if key == "weight" and not normalised and isinstance(layer, Weighted):
            value = value * (given.shape[_input_dim(layer)] / tensor.shape[_input_dim(layer)])
        yield key, value


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a convolution gives each channel a kernel of its own."""
    return getattr(layer, "groups", 1) == getattr(layer, "in_channels", 0) == getattr(layer, "out_channels", 0)


def _input_dim(layer: nn.Module) -> int:
    """The dimension of a layer's weight that counts its inputs."""
    return 0 if getattr(layer, "transposed", False) else 1
