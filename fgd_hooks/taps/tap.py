"""Taps by name: which module's input or output is meant, and which entry of a list or dict found there.

A tap names a module, says whether its input or its output is meant, and may index into a list, tuple, dict or
dataclass found there. In text form: ``module[#call][:input|:output|:args|:kwargs][index]...[@layout]``, for example

    neck.fpn.2                 the output of the module ``neck.fpn.2``
    model.23:input[1]          the second feature map that feeds the module ``model.23``
    head:args[2]               the third argument of the module ``head``; ``head:kwargs[features]`` one by keyword
    backbone:output[pool]      the entry ``pool`` of the dict that ``backbone`` returns
    neck.out_convs.*           one tap for each module that the glob matches
    neck#0[1]                  of a module that runs several times in a pass: of its first call (without: of its last)
    blocks.11@16+1             tokens of 16 x 16 pixels after one class token (see fgd_hooks/taps/layout.py)

The module name may be a glob when taps are given by the user; :func:`expand_taps` resolves it.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from fgd_hooks.errors import LayoutError, TapError
from fgd_hooks.taps.layout import Layout
from fgd_hooks.utils.modules import unwrap
from fgd_hooks.utils.registry import suggestion

Index = int | str


_NUMBER = re.compile(r"-?\d+")


_TAP_TEXT = re.compile(
    r"^(?P<module>[^:\[\]@#]*)(?:#(?P<call>\d+))?(?::(?P<io>input|output|args|kwargs))?"
    r"(?P<indices>(?:\[[^\[\]]+\])*)(?:@(?P<layout>.+))?$"
)


@dataclass(frozen=True)
class Tap:
    """Where one feature map is found.

    Args:
        module: name as in ``model.named_modules()``; empty for the model itself.
        io: ``"output"`` of the module, or its first ``"input"`` (the first keyword argument where it has no other);
            ``"args"`` and ``"kwargs"`` are all of its arguments, of which the index picks one.
        index: keys into nested lists, tuples, dicts or dataclasses, outermost first.
        layout: of tokens and channels-last maps; None: a map (N, C, H, W), or not known before the probe.
        call: which call of a module that runs several times in a pass, from 0; None: the last.
        runs: how often the module runs in a pass, by the probe.
        rewritten: whether an operation in place follows, by the probe; the map is then kept as it was before it.
    """

    module: str
    io: Literal["input", "output", "args", "kwargs"] = "output"
    index: tuple[Index, ...] = ()
    layout: Layout | None = field(default=None, compare=False)
    call: int | None = None
    runs: int = field(default=1, compare=False)
    rewritten: bool = field(default=False, compare=False)
    part: int = field(default=0, init=False, repr=False)  # of tokens of several levels: which one

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", len(self.layout.before) if self.layout else 0)

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Read the text form, ``module[#call][:input|:output|:args|:kwargs][index]...[@layout]``.

        Raises:
            TapError: the text does not have that form.
        """
        match = _TAP_TEXT.match(text)
        if match is None:
            raise TapError(
                f"The tap {text!r} cannot be read. Expected module[#call][:input|:output][index]...[@layout], "
                "for example 'neck.fpn.2', 'model.23:input[1]', 'backbone[pool]' or 'blocks.11@16+1'."
            )
        try:
            layout = None if match["layout"] is None else Layout.parse(match["layout"])
        except LayoutError as error:
            raise TapError(f"The tap {text!r} cannot be read: {error}.") from None
        keys = re.findall(r"\[([^\[\]]+)\]", match["indices"])
        index = tuple(int(key) if _NUMBER.fullmatch(key) else key.strip("'\"") for key in keys)
        call = None if match["call"] is None else int(match["call"])
        io: Any = match["io"] or "output"
        return cls(match["module"], io, index, layout, call)

    def __str__(self) -> str:
        io = "" if self.io == "output" else f":{self.io}"
        call = "" if self.call is None else f"#{self.call}"
        # a text that reads as a number is quoted, as parse() takes it
        keys = [repr(key) if isinstance(key, str) and _NUMBER.fullmatch(key) else key for key in self.index]
        layout = f"@{self.layout}" if self.layout else ""
        return f"{self.module or '(model)'}{call}{io}{''.join(f'[{key}]' for key in keys)}{layout}"


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


def pick(value: Any, keys: Sequence[Index]) -> Any:
    """What nested keys lead to.

    Raises:
        KeyError, IndexError, TypeError, AttributeError: there is no such entry.
    """
    for key in keys:
        if isinstance(key, str) and not isinstance(value, Mapping) and not isinstance(value, (list, tuple)):
            value = getattr(value, key)
        else:
            value = value[key]
    return value


def replaced(container: Any, keys: Sequence[Index], value: Any) -> Any:
    """The container with another value at nested keys; the containers on the way are shallow copies."""
    if not keys:
        return value
    inner = replaced(pick(container, keys[:1]), keys[1:], value)
    if isinstance(container, tuple):
        items = list(container)
        items[int(keys[0])] = inner
        return type(container)(*items) if hasattr(container, "_fields") else tuple(items)
    container = copy.copy(container)
    if isinstance(container, (Mapping, list)):
        container[keys[0]] = inner  # type: ignore[index]
    else:
        object.__setattr__(container, str(keys[0]), inner)  # of a frozen dataclass, too
    return container
