"""Taps by name: which module's input or output is meant, and which entry of a list or dict found there.

A tap names a module, says whether its input or its output is meant, and may index into a list, tuple or dict found
there. In text form: ``module[:input|:output][index]...[@layout]``, for example

    neck.fpn.2                 the output of the module ``neck.fpn.2``
    model.23:input[1]          the second feature map that feeds the module ``model.23``
    backbone:output[pool]      the entry ``pool`` of the dict that ``backbone`` returns
    neck.out_convs.*           one tap for each module that the glob matches
    blocks.11@16+1             tokens of 16 x 16 pixels after one class token (see fgd_hooks/layouts.py)

The module name may be a glob when taps are given by the user; :func:`expand_taps` resolves it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from fgd_hooks.layouts import Layout, LayoutError
from fgd_hooks.registry import suggestion

Index = int | str
_NUMBER = re.compile(r"-?\d+")
_TAP_TEXT = re.compile(
    r"^(?P<module>[^:\[\]@]*)(?::(?P<io>input|output))?(?P<indices>(?:\[[^\[\]]+\])*)(?:@(?P<layout>.+))?$"
)


class TapError(RuntimeError):
    """A tap that cannot be resolved, did not fire, or saw something that is no feature map."""


@dataclass(frozen=True)
class Tap:
    """Where one feature map is found.

    Args:
        module: name as in ``model.named_modules()``; empty for the model itself.
        io: ``"output"`` of the module, or its first ``"input"`` (the first keyword argument where it has no other).
        index: keys into nested lists, tuples or dicts, outermost first.
        layout: of tokens and channels-last maps; None: a map (N, C, H, W), or not known before the probe.
    """

    module: str
    io: Literal["input", "output"] = "output"
    index: tuple[Index, ...] = ()
    layout: Layout | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Read the text form, ``module[:input|:output][index]...[@layout]``.

        Raises:
            TapError: the text does not have that form.
        """
        match = _TAP_TEXT.match(text)
        if match is None:
            raise TapError(
                f"The tap {text!r} cannot be read. Expected module[:input|:output][index]...[@layout], "
                "for example 'neck.fpn.2', 'model.23:input[1]', 'backbone[pool]' or 'blocks.11@16+1'."
            )
        try:
            layout = None if match["layout"] is None else Layout.parse(match["layout"])
        except LayoutError as error:
            raise TapError(f"The tap {text!r} cannot be read: {error}.") from None
        keys = re.findall(r"\[([^\[\]]+)\]", match["indices"])
        index = tuple(int(key) if _NUMBER.fullmatch(key) else key.strip("'\"") for key in keys)
        return cls(match["module"], "input" if match["io"] == "input" else "output", index, layout)

    def __str__(self) -> str:
        io = ":input" if self.io == "input" else ""
        # a text that reads as a number is quoted, as parse() takes it
        keys = [repr(key) if isinstance(key, str) and _NUMBER.fullmatch(key) else key for key in self.index]
        layout = f"@{self.layout}" if self.layout else ""
        return f"{self.module or '(model)'}{io}{''.join(f'[{key}]' for key in keys)}{layout}"


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DataParallel, DistributedDataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def expand_taps(model: nn.Module, taps: Sequence[str | Tap]) -> list[Tap]:
    """Resolve texts and globs to taps of existing modules, in the order given (globs: order of definition).

    Raises:
        TapError: no module has that name; the message lists the nearest module names.
    """
    names = [name for name, _ in unwrap(model).named_modules()]
    expanded: list[Tap] = []
    for given in taps:
        tap = Tap.parse(given) if isinstance(given, str) else given
        if tap.module in names:
            matches = [tap.module]
        else:
            matches = [name for name in names if name and fnmatch.fnmatchcase(name, tap.module)]
        if not matches:
            raise TapError(
                f"The tap {given!s} names no module of {type(unwrap(model)).__name__}. "
                + suggestion(tap.module, [name for name in names if name])
            )
        expanded += [replace(tap, module=name) for name in matches]
    return expanded


def describe(value: object) -> str:
    """One line on what a tap saw, for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {list(value)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}: " + ", ".join(describe(item) for item in value[:6])
    return f"an object of type {type(value).__name__}"
