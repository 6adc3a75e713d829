"""One forward pass under observation: which module saw and returned which tensors, and what was computed from what."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Key = int | str
Path = tuple[Key, ...]

DEPTH, WIDTH = 6, 64  # of containers that are looked into
FILLED = tuple(f"::{kind}_like" for kind in ("ones", "zeros", "full", "empty", "rand", "randn", "randint"))
FILLED += tuple(f"::new_{kind}" for kind in ("ones", "zeros", "full", "empty", "empty_strided"))
"""How the names of operations end that take no more than shape and kind of a tensor."""


def entries(value: Any) -> list[tuple[Key, Any]]:
    """The keys and values of a list, tuple, mapping, dataclass or padded batch; empty for anything else."""
    if isinstance(value, Mapping):
        return [(key, item) for key, item in value.items() if isinstance(key, (int, str))]
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(each.name, getattr(value, each.name, None)) for each in dataclasses.fields(value)]
    if isinstance(getattr(value, "tensors", None), Tensor):  # features with a mask of what is padding, in DETR's code
        return [("tensors", value.tensors)]
    return []


@dataclass(frozen=True)
class Leaf:
    """A tensor as it was seen: its number, the same for one tensor wherever it turns up, and its shape."""

    number: int
    shape: tuple[int, ...]


Tree = Leaf | list[tuple[Key, Any]]
"""A tensor, or the entries of a container that hold some."""


def leaves(tree: Tree | None, path: Path = ()) -> Iterator[tuple[Path, Leaf]]:
    """The tensors in a tree and where they are."""
    if isinstance(tree, Leaf):
        yield path, tree
    for key, inner in tree if isinstance(tree, list) else ():
        yield from leaves(inner, (*path, key))


@dataclass
class ModuleCall:
    """One call of a module.

    Args:
        module: its name.
        number: how often it was called before, in this pass.
        parent: the position of the call around it among all calls; None for the outermost.
        weighted: whether it has parameters.
        start: the moment of the call; moments count computed and seen tensors and calls.
        end: the moment of its return.
        inputs: the trees of its arguments, each with the way to say where it is (see :class:`~fgd_hooks.taps.tap.Tap`).
        output: the tree of what it returned.
    """

    module: str
    number: int
    parent: int | None
    weighted: bool
    start: int
    end: int = -1
    inputs: list[tuple[str, Path, Tree]] = field(default_factory=list)
    output: Tree | None = None

    @property
    def direct(self) -> list[tuple[str, Path, Leaf]]:
        """The arguments that are tensors themselves."""
        return [(io, path, tree) for io, path, tree in self.inputs if isinstance(tree, Leaf)]


class Dataflow(TorchDispatchMode):
    """Numbers each tensor that is computed, and knows what it was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self.known = WeakTensorKeyDictionary()
        self.bits: dict[int, int] = {}  # number -> a bit, for each tensor that depends on the images
        self.sources: dict[int, int] = {}  # number -> the bits of all tensors that it was computed from
        self.used: dict[int, int] = {}  # number -> the moment of its last use in a computation
        self.changed: dict[int, int] = {}  # number -> the moment of the last operation in place

    def tick(self) -> int:
        """The next moment."""
        self.clock += 1
        return self.clock

    def number(self, tensor: Tensor, sources: int = 0) -> int:
        """The number of a tensor; a new one, computed from what ``sources`` says, for a tensor not seen yet."""
        found = self.known.get(tensor)
        if found is None:
            found = self.known[tensor] = self.tick()
            if sources:
                self.bits[found], self.sources[found] = 1 << len(self.bits), sources
        return int(found)

    def follow(self, tensor: Tensor) -> int:
        """The number of a tensor from which on origins are noted: images."""
        number = self.number(tensor)
        self.bits.setdefault(number, 1 << len(self.bits))
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what its results are computed from."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        sources = 0
        now = self.tick()
        for each in given:
            number = self.number(each)
            self.used[number] = now
            if not func._schema.name.endswith(FILLED):
                sources |= self.sources.get(number, 0) | self.bits.get(number, 0)
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                if each in self.known:  # written in place
                    number = self.number(each)
                    if sources:
                        own = self.bits.setdefault(number, 1 << len(self.bits))
                        self.sources[number] = (self.sources.get(number, 0) | sources) & ~own
                    if func._schema.is_mutable:
                        self._note_change(each, number, now)
                else:
                    self.number(each, sources)
        return result

    def _note_change(self, tensor: Tensor, number: int, now: int) -> None:
        self.changed[number] = now
        base = tensor._base if not tensor.is_inference() and tensor._is_view() else None
        if base is not None and base in self.known:
            self.changed[self.number(base)] = now


@dataclass
class Observation:
    """What was seen in one forward pass.

    Args:
        calls: of modules, in order of their start.
        flow: numbers and origins of the tensors.
        images: numbers of the images that the model was called with.
        count: how many images these are.
        canvas: (h, w) in pixels of the first.
        channels: of the images.
        traced: whether the origins of tensors are known.
        failure: the error that ended the pass, if any.
        outputs: numbers of all tensors that the model returned.
    """

    flow: Dataflow
    traced: bool
    calls: list[ModuleCall] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    failure: Exception | None = None
    count: int = 1
    canvas: tuple[int, int] = (0, 0)
    channels: int = 3

    def depends(self, later: int, earlier: int) -> bool:
        """Whether one tensor was computed from another."""
        return bool(self.flow.sources.get(later, 0) & self.flow.bits.get(earlier, 0))

    def of_images(self, number: int) -> bool:
        """Whether a tensor depends on what the model was called with; True where that is not known."""
        return not self.traced or not self.images or number in self.flow.bits

    def used_after(self, number: int, moment: int) -> bool:
        """Whether something was computed from a tensor after a moment; True where that is not known."""
        return not self.traced or self.flow.used.get(number, -1) > moment

    def around(self, call: ModuleCall) -> Iterator[ModuleCall]:
        """The calls inside which a call was made, the innermost first."""
        while call.parent is not None:
            call = self.calls[call.parent]
            yield call

    def runs(self, module: str) -> int:
        """How often a module was called."""
        return sum(call.module == module for call in self.calls)


def observe(
    model: nn.Module, run: Callable[[nn.Module], Any], inputs: Any = None, *, traced: bool = True
) -> Observation:
    """Run a model once and write down what its modules saw and returned.

    Args:
        model: any model.
        run: calls it.
        inputs: what it is called with, to know the images among the tensors.
        traced: also note what each tensor is computed from.
    """
    flow = Dataflow()
    seen = Observation(flow, traced)
    names = {module: name for name, module in model.named_modules()}
    weighted = {module: next(module.parameters(), None) is not None for module in names}
    counts = dict.fromkeys(names, 0)
    stack: list[int] = []

    def note_images(value: Any) -> None:
        found = [each for each in tensors_in(value) if each.is_floating_point() and each.ndim >= 3]
        seen.images = [flow.follow(each) for each in found]
        if found:
            seen.count = int(found[0].shape[0]) if found[0].ndim == 4 else len(found)
            seen.channels, height, width = map(int, found[0].shape[-3:])
            seen.canvas = (height, width)

    def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = ModuleCall(names[module], counts[module], stack[-1] if stack else None, weighted[module], flow.tick())
        counts[module] += 1
        if not seen.images:
            note_images((args, kwargs))
        given: list[tuple[str, Path, Any]] = [("args", (number,), value) for number, value in enumerate(args)]
        given += [("kwargs", (name,), value) for name, value in kwargs.items()]
        for position, (io, path, value) in enumerate(given):
            tree = as_tree(value, flow)
            if tree is not None:
                call.inputs.append(("input", (), tree) if position == 0 else (io, path, tree))
        stack.append(len(seen.calls))
        seen.calls.append(call)

    def post(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while stack:  # calls that were left early by an exception are above it
            call = seen.calls[stack.pop()]
            if call.module == names[module]:
                call.output, call.end = as_tree(output, flow), flow.tick()
                break

    note_images(inputs)
    handles = [module.register_forward_pre_hook(pre, with_kwargs=True) for module in names]
    handles += [module.register_forward_hook(post) for module in names]
    try:
        with flow if traced else contextlib.nullcontext():
            output = run(model)
        seen.outputs = [flow.number(each) for each in tensors_in(output)]
    except Exception as error:
        seen.failure = error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def as_tree(value: Any, flow: Dataflow, depth: int = DEPTH) -> Tree | None:
    """The tensors of floating point with three or four dimensions in a value; None where there is none."""
    if isinstance(value, Tensor):
        wanted = value.is_floating_point() and value.ndim in (3, 4) and value.numel() > 0
        return Leaf(flow.number(value), tuple(value.shape)) if wanted else None
    inner = [(key, as_tree(item, flow, depth - 1)) for key, item in entries(value)[:WIDTH]] if depth else []
    found = [(key, tree) for key, tree in inner if tree is not None]
    return found or None


def tensors_in(value: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        for _, item in entries(value)[:WIDTH]:
            yield from tensors_in(item, depth - 1)
