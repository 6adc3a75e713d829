"""The fused loss's heavy passes through ``torch.compile``, where a trial in the running training shows that it pays.

On a GPU the passes of :mod:`~fgd_hooks.losses.fused_passes` are bound by memory: each of their dozen operations reads
and writes the whole feature, which compiled code does in a few sweeps. How much that gives depends on the card, on
torch and on the level's size. So nothing is assumed: when a level has been seen ``TRIED_AT`` times in one size, both
ways are timed on its own tensors, and the faster one is used from then on. A compiler that is missing or fails leaves
all as it was. Where deterministic algorithms are asked for (Ultralytics does by default) the size alone decides:
the two ways differ in the last bits of the gradient, and a clock must not decide what a seed gives.
"""

from __future__ import annotations

import logging
import time
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgd_hooks.losses.fused_passes import backward_group, forward_group

logger = logging.getLogger("fgd_hooks")

TRIED_AT = 20  # uses: a size that comes by chance, in a multi-scale training, is not worth compiling for
REPEATS = 5
PAYS = 0.95  # of the time as it is
BACKEND = "inductor"
LARGE = 1 << 22  # elements of a feature: 16 MiB, bound by memory on any card


class Passes(NamedTuple):
    """One way to run the two heavy passes over a group of images."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


AS_THEY_ARE = Passes(forward_group, backward_group)


def compiled_passes(backend: str = "inductor") -> Passes:
    """The same passes compiled, with a cache of their own: at the second size for any.

    The compiler counts what it makes of one piece of code, and gives up for good at the eighth; so each level compiles
    a copy, and a level whose maps change their size from step to step is compiled twice.
    """
    return Passes(*(torch.compile(_copy(each), backend=backend) for each in AS_THEY_ARE))


def _copy(function: Any) -> Any:
    """The same function with a code object of its own, which the compiler's caches go by."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


class Choice:
    """Which passes one level's loss uses; plain numbers, so that it can be copied and pickled.

    Args:
        wanted: True: compiled, False: as they are, None: what a trial says, on a GPU; elsewhere as they are. Where
            deterministic algorithms are asked for, the trial compiles and does not time: a level of
            :data:`LARGE` elements or more is compiled if it can be.
    """

    def __init__(self, wanted: bool | None) -> None:
        self.wanted = wanted
        self._compiled: Passes | None = None
        self.uses: Counter[tuple[Any, ...]] = Counter()
        self.found: dict[tuple[Any, ...], bool] = {}

    def passes(self, feature: Tensor, trial: Callable[[Passes], object]) -> Passes:
        """The passes for a feature (N, C, H, W); ``trial`` runs forward and backward once, on tensors of its own."""
        wanted = self.wanted
        if wanted is None and feature.device.type == "cuda":
            kind = (tuple(feature.shape), feature.dtype, feature.stride())
            self.uses[kind] += 1
            if self.uses[kind] == TRIED_AT:
                timed = not torch.are_deterministic_algorithms_enabled()
                worth = timed or feature.numel() >= LARGE
                self.found[kind] = worth and faster(self.compiled(), trial, feature.device, timed)
            wanted = self.found.get(kind)
        return self.compiled() if wanted else AS_THEY_ARE

    def compiled(self) -> Passes:
        """This level's compiled passes."""
        if self._compiled is None:
            self._compiled = compiled_passes(BACKEND)
        return self._compiled

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}


def faster(compiled: Passes, trial: Callable[[Passes], object], device: torch.device, timed: bool = True) -> bool:
    """Whether compiled passes take less time, or without a clock whether they run; False if they cannot be compiled."""
    logger.info("FGD: trying whether the loss's heavy passes are faster compiled; this takes a moment, once per level.")
    try:
        trial(compiled)  # compiles
        if not timed:
            return True
        times: dict[Passes, list[float]] = {compiled: [], AS_THEY_ARE: []}
        for _ in range(REPEATS):
            for passes, spent in times.items():
                spent.append(seconds(trial, passes, device))
    except Exception as error:  # whatever a compiler says; the passes as they are need none
        logger.debug("The loss's passes are not compiled: %s", " ".join(str(error).split())[:300])
        return False
    new, old = min(times[compiled]), min(times[AS_THEY_ARE])
    logger.debug("The loss's passes: %.3f ms as they are, %.3f ms compiled.", 1e3 * old, 1e3 * new)
    return new < PAYS * old


def seconds(trial: Callable[[Passes], object], passes: Passes, device: torch.device) -> float:
    """The time of one trial on a GPU."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    trial(passes)
    torch.cuda.synchronize(device)
    return time.perf_counter() - start
