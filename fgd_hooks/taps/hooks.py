"""Feature taps: forward hooks that capture one tensor each, and the early exit of a forward pass."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fgd_hooks.errors import LayoutError, TapError
from fgd_hooks.taps.calls import call_model
from fgd_hooks.taps.canvas import Size
from fgd_hooks.taps.meter import GradientMeter, NormOfGradient
from fgd_hooks.taps.tap import Tap, describe, expand_taps, pick, replaced
from fgd_hooks.utils.modules import unwrap

logger = logging.getLogger("fgd_hooks")


class StopForward(BaseException):
    """Raised by a tap to leave a forward pass early; caught by :func:`run_until_tapped`.

    Derived from BaseException so that no ``except Exception`` inside a model swallows it.
    """


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module is called with: its first positional argument, else its first keyword argument, else None."""
    return args[0] if args else next(iter(kwargs.values()), None)


class LiveHook:
    """Base of every hook that this library registers: a copy of it does nothing.

    A copy made by ``deepcopy`` or ``pickle`` (of the hooked model) becomes a method of the standard library that
    accepts any arguments and returns None, so a copied or saved model carries no features and needs no fgd_hooks.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


def scrub(model: nn.Module) -> int:
    """Remove what copies of our hooks left in a copied model; returns how many there were."""
    removed = 0
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), contextlib.nullcontext):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    removed += 1
    return removed


class _Hook(LiveHook):
    """Hands what a module received or returned to the taps that look at it."""

    def __init__(self, owner: FeatureTaps, members: list[int], io: str) -> None:
        self.owner = owner
        self.members = members
        self.io = io
        self.counts = any(owner.taps[position].runs > 1 for position in members)
        self.calls = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> Any:
        """Called by torch as a forward pre-hook (``value``: keyword arguments) or as a forward hook (the output)."""
        if not self.owner.listening:
            return None
        number, self.calls = self.calls, self.calls + self.counts
        seen = {"output": value, "kwargs": value, "args": args}.get(self.io)
        if self.io == "input":
            seen = first_argument(args, value)
        given = self.owner._capture(self.members, seen, number)
        if given is seen:
            return None
        if self.io == "output":
            return given
        if self.io != "input":
            return (given, value) if self.io == "args" else (args, given)
        return ((given, *args[1:]), value) if args else (args, {**value, next(iter(value)): given})


class _PassBegins(LiveHook):
    """Forward pre-hook of a model some of whose modules run several times: their calls are counted anew."""

    def __init__(self, hooks: Sequence[_Hook]) -> None:
        self.hooks = hooks

    def __call__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.calls = 0


class _ImagesSeen(LiveHook):
    """Forward pre-hook of a module that images go into: keeps their (h, w), which the grid of tokens depends on."""

    def __init__(self, owner: FeatureTaps, name: str) -> None:
        self.owner = owner
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = first_argument(args, kwargs)
        if isinstance(images, Tensor) and images.ndim >= 3:
            self.owner._sizes[self.name] = (int(images.shape[-2]), int(images.shape[-1]))


class _Meter(LiveHook):
    """Forward hook, only for a compiled model, of the module that a tapped feature comes from.

    Inside a compiled graph a feature is no tensor of its own: no hook on it sees the gradient of the layers behind.
    """

    def __init__(self, owner: FeatureTaps, meter: GradientMeter) -> None:
        self.owner = owner
        self.meter = meter

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling() and self.owner.listening:
            return NormOfGradient.apply(output, self.meter.scalar)  # type: ignore[no-untyped-call]
        return None


def check_not_replicated(model: nn.Module) -> None:
    """Refuse a DataParallel over several devices: its copies share one set of hooks, and all but one would be lost.

    Raises:
        ValueError: the model is one.
    """
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            f"The student is a DataParallel over {len(model.device_ids)} devices, whose copies share one set of "
            "hooks. Use DistributedDataParallel, one process per device (docs/several-gpus.md)."
        )


class FeatureTaps:
    """Captures the feature maps of several taps of one model, batch by batch.

    Args:
        model: the model; DDP, DataParallel and compile wrappers are looked through.
        taps: resolved taps (see :func:`expand_taps`), in the order in which :meth:`pop` returns their features.
        role: "student" or "teacher", for error messages.
        grad_only: capture only while gradients are recorded. A student is validated under ``no_grad``, and its
            features must then not be kept.
        stop: leave the forward pass, by :class:`StopForward`, as soon as every tap has fired.
        sources: for each tap the module that returns the map, if one does (see ``pyramid.find_sources``). While
            compiled code runs, ``meters[k].norm`` is the norm of the gradient there in the last backward pass.

    The hooks are registered at once and stay until :meth:`detach`. Features captured are handed out once, by
    :meth:`pop`, and forgotten.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[Tap],
        *,
        role: str = "model",
        grad_only: bool = False,
        stop: bool = False,
        sources: Sequence[str | None] = (),
    ) -> None:
        self.taps = list(taps)
        self.role = role
        self.enabled = True
        self._grad_only = grad_only
        self._stop = stop
        self._features: dict[int, Tensor] = {}
        self._sizes: dict[str, Size] = {}
        self._versions: dict[int, int] = {}
        self._kept_apart = {position for position, tap in enumerate(self.taps) if tap.rewritten}
        self._said: set[str] = set()
        self._handles: list[Any] = []
        modules = dict(unwrap(model).named_modules())
        groups: dict[tuple[str, str], list[int]] = {}
        for position, tap in enumerate(self.taps):
            if tap.module not in modules:
                expand_taps(model, [tap])  # raises with the nearest names
            groups.setdefault((tap.module, tap.io), []).append(position)
        self._hooks: list[_Hook] = []
        for (name, io), members in groups.items():
            hook = _Hook(self, members, io)
            self._hooks.append(hook)
            if io == "output":
                self._handles.append(modules[name].register_forward_hook(hook))
            else:
                self._handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        if any(hook.counts for hook in self._hooks):
            begins = _PassBegins(self._hooks)
            self._handles.append(unwrap(model).register_forward_pre_hook(begins, prepend=True))
        for name in {tap.layout.images for tap in self.taps if tap.layout and tap.layout.cell}:
            watch = _ImagesSeen(self, name)
            self._handles.append(modules[name].register_forward_pre_hook(watch, with_kwargs=True, prepend=True))
        device = next((parameter.device for parameter in unwrap(model).parameters()), None)
        self.meters: list[GradientMeter | None] = []
        for source in sources:
            if source is None:
                self.meters.append(None)
                continue
            meter = GradientMeter(device)
            self.meters.append(meter)
            # before the hooks that capture: what they see has passed the meter
            self._handles.append(modules[source].register_forward_hook(_Meter(self, meter), prepend=True))

    @property
    def listening(self) -> bool:
        """Whether a forward pass that ran now would be captured."""
        return self.enabled and (not self._grad_only or torch.is_grad_enabled())

    def _capture(self, members: list[int], value: Any, number: int = 0) -> Any:
        """Keep the maps of some taps, seen in one call of their module; returns what the model shall go on with."""
        for position in members:
            tap = self.taps[position]
            if tap.runs > 1 and number % tap.runs != (tap.runs - 1 if tap.call is None else tap.call):
                continue
            feature = self._pick(position, value)
            apart = position in self._kept_apart
            if tap.layout is None:
                self._check_map(position, feature)
                self._keep(position, feature)
                if apart:  # what follows in place then changes a copy
                    value = replaced(value, tap.index, feature.clone())
                continue
            images = self._sizes.get(tap.layout.images)
            try:
                kept = tap.layout.to_map(feature, images)
            except LayoutError as error:
                self._complain(position, f"it saw {describe(feature)}; {error}")
            kept = kept.clone() if apart else kept
            self._keep(position, kept)
            if self._grad_only:
                # a student goes on from the map itself: the gradient of its task is then that of the map, too
                again = tap.layout.from_map(kept, feature, images)
                value = replaced(value, tap.index, again.clone() if apart else again)
        if self._stop and len(self._features) == len(self.taps):
            raise StopForward
        return value

    def _keep(self, position: int, feature: Tensor) -> None:
        if self._grad_only and not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() != -1:
                return  # activation checkpointing runs a part of the model again in the backward pass
            if position in self._features:
                self._say_once(
                    "The student's tap %s fired several times since the last call of the distiller: several passes of "
                    "the student in one step? The last is distilled; call the distiller once after each pass.",
                    self.taps[position],
                )
            if not feature.is_inference():
                self._versions[position] = feature._version
        self._features[position] = feature

    def _say_once(self, text: str, *values: object) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text, *values)

    def _check_unchanged(self, features: Mapping[int, Tensor]) -> None:
        """Say which maps were written to in place since they were captured, and keep them apart from now on."""
        for position, version in self._versions.items():
            feature = features.get(position)
            if feature is not None and feature._version != version and position not in self._kept_apart:
                self._kept_apart.add(position)
                self._say_once(
                    "What the student's tap %s captures is changed in place behind it; from the next step on it is "
                    "kept as it was.",
                    self.taps[position],
                )

    def _pick(self, position: int, value: Any) -> Any:
        for key in self.taps[position].index:
            try:
                value = pick(value, (key,))
            except (KeyError, IndexError, TypeError, AttributeError):
                self._complain(position, f"there is no entry [{key}] in {describe(value)}")
        if not isinstance(value, Tensor):
            self._check_map(position, value)
        return value

    def _check_map(self, position: int, value: Any) -> None:
        if not isinstance(value, Tensor) or value.ndim != 4:
            self._complain(position, f"it saw {describe(value)}; expected a feature map of shape (N, C, H, W)")

    def _complain(self, position: int, reason: str) -> NoReturn:
        self._forget()
        raise TapError(f"The {self.role}'s tap {self.taps[position]} cannot be used: {reason}.")

    def pop(self) -> list[Tensor]:
        """The features (N, C, H, W) captured since the last call, in the order of the taps, and forget them.

        Raises:
            TapError: a tap did not fire, or a feature of ``grad_only`` taps takes no gradient.
        """
        features = self._features
        self._check_unchanged(features)
        self._forget()
        missing = [str(tap) for position, tap in enumerate(self.taps) if position not in features]
        if missing:
            raise TapError(
                f"The {self.role}'s tap(s) {', '.join(missing)} did not fire. Either the {self.role}'s forward pass "
                f"did not run before this call{' with gradients enabled' if self._grad_only else ''}, or it does not "
                "pass through the tapped module. A student under torch.compile that ran before the taps were set "
                "goes on without them: make the Distiller before the first compiled call, or call "
                "torch.compiler.reset() after it."
            )
        for position, tap in enumerate(self.taps) if self._grad_only else ():
            if not features[position].requires_grad:
                raise TapError(
                    f"The {self.role}'s feature at {tap} takes no gradient, so distilling it would change nothing. All "
                    "layers before it are frozen, or it was detached: unfreeze them, or leave this level out "
                    '(levels=[...]). If they are frozen at first only, begin later, as in schedule.start="3 epochs".'
                )
        return [features[position] for position in range(len(self.taps))]

    @property
    def captured(self) -> list[Tensor | None]:
        """What :meth:`pop` would hand out now; None for a tap that has not fired."""
        return [self._features.get(position) for position in range(len(self.taps))]

    def clear(self) -> None:
        """Forget what was captured."""
        self._forget()

    def _forget(self) -> None:
        self._features, self._versions = {}, {}
        for hook in self._hooks:
            hook.calls = 0

    def detach(self) -> None:
        """Remove all hooks and forget what was captured. May be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()
        self._hooks.clear()  # they know their owner: a circle would keep it alive

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Listen inside this block, and go back to what was captured before at its end."""
        enabled, features = self.enabled, self._features
        self.enabled, self._features = True, {}
        try:
            yield
        finally:
            self.enabled, self._features = enabled, features

    @contextlib.contextmanager
    def only_here(self) -> Iterator[None]:
        """Listen inside this block alone (a teacher that its owner also calls elsewhere)."""
        self.enabled = True
        try:
            yield
        finally:
            self.enabled = False

    def __enter__(self) -> FeatureTaps:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()


def run_until_tapped(model: nn.Module, taps: FeatureTaps, inputs: Any) -> list[Tensor]:
    """Call the model and return the tapped features; the pass ends after the last tap if ``taps`` stop it.

    Args:
        model: the model that is tapped.
        taps: where.
        inputs: what it is called with, in any form of :func:`fgd_hooks.taps.calls.call_model`.
    """
    taps.clear()
    with contextlib.suppress(StopForward):
        call_model(model, inputs)
    return taps.pop()
