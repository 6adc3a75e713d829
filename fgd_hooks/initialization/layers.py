"""Layers with the normalisations that follow them: what is copied or fitted as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fgd_hooks.utils.modules import join, own_tensors


@dataclass
class Unit:
    """A layer with weights and the normalisations that follow it: what is copied as a whole."""

    layers: dict[str, nn.Module]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of all its layers by name."""
        return {join(name, key): t for name, layer in self.layers.items() for key, t in own_tensors(layer).items()}

    @property
    def normalised(self) -> bool:
        """Whether its last layer is a normalisation."""
        return _normalises(list(self.layers.values())[-1])

    def counterparts(
        self, teacher: Mapping[str, nn.Module], prefix: str = "", counterpart: str = ""
    ) -> tuple[dict[str, str], str]:
        """The student's layers -> the teacher's of one kind, or nothing and the reason; ``teacher``: its modules."""
        others = {name: join(counterpart, name[len(prefix) :].lstrip(".")) for name in self.layers}
        missing = [(other, _normalises(self.layers[name])) for name, other in others.items() if other not in teacher]
        if missing:
            fused = len(missing) < len(others) and all(norm for _, norm in missing)
            return {}, f"the teacher has no {missing[0][0]}" + (" (is it fused?)" if fused else "")
        for name, layer in self.layers.items():
            other = others[name]
            mine, theirs = own_tensors(layer), own_tensors(teacher[other])
            if mine.keys() != theirs.keys():
                return {}, f"the teacher's {other} holds {', '.join(theirs) or 'nothing'}, not {', '.join(mine)}"
            if getattr(layer, "transposed", False) != getattr(teacher[other], "transposed", False):
                return {}, f"it is a {type(layer).__name__}, the teacher's {other} a {type(teacher[other]).__name__}"
        return others, ""

    def fit(self, teacher: Mapping[str, nn.Module], prefix: str, counterpart: str) -> tuple[dict[str, str], str]:
        """The student's tensors -> the teacher's, or nothing and the reason; ``teacher``: its modules by name."""
        names: dict[str, str] = {}
        others, reason = self.counterparts(teacher, prefix, counterpart)
        for name, other in others.items():
            mine, theirs = own_tensors(self.layers[name]), own_tensors(teacher[other])
            for key, tensor in mine.items():
                if tensor.shape != theirs[key].shape:
                    shapes = f"{tuple(tensor.shape)}, the teacher's {join(other, key)} {tuple(theirs[key].shape)}"
                    return {}, f"{join(name, key)} is {shapes}"
                names[join(name, key)] = join(other, key)
        return names, reason


def units(model: nn.Module, prefix: str) -> Iterator[Unit]:
    """The units of a module of the model, in the order of definition."""
    unit: Unit | None = None
    for name, layer in model.get_submodule(prefix).named_modules(prefix=prefix):
        if not own_tensors(layer):
            continue
        if unit and _normalises(layer) and name.rpartition(".")[0] == list(unit.layers)[-1].rpartition(".")[0]:
            unit.layers[name] = layer
            continue
        if unit:
            yield unit
        unit = Unit({name: layer})
    if unit:
        yield unit


def _normalises(layer: nn.Module) -> bool:
    return "norm" in type(layer).__name__.lower()


BatchNorm = nn.modules.batchnorm._BatchNorm


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a convolution gives each channel a kernel of its own."""
    return getattr(layer, "groups", 1) == getattr(layer, "in_channels", 0) == getattr(layer, "out_channels", 0)
