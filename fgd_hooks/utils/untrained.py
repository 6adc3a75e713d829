"""Whether a model, or a part of it, still has the weights that it was built with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fgd_hooks.utils.modules import Weighted, normalises, own_tensors

_ENOUGH = 64  # so many drawn numbers nearly fill their interval


def is_untrained(model: nn.Module, names: Iterable[str] = ("",)) -> bool:
    """Whether no layer of these modules shows a sign of training, and at least one would.

    A batch normalisation would by its statistics (0 and 1 at first), another normalisation and a convolution or linear
    layer by numbers that an optimizer moves apart: weights of a normalisation, biases that all begin alike, weights and
    biases inside the interval from which torch draws them by default. Of other weights nothing is known.

    Args:
        model: any model; it is not run.
        names: of its modules.
    """
    found = False
    for module in (each for name in names for each in model.get_submodule(name).modules()):
        trained = _shows_training(module)
        if trained:
            return False
        found |= trained is False
    return found


def _shows_training(module: nn.Module) -> bool | None:
    """True: it was trained; False: it was not; None: this module does not show it."""
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if isinstance(mean, Tensor) and isinstance(variance, Tensor):
        return bool(mean.any()) or not bool(torch.all(variance == 1))
    # sharded and quantised tensors are of kinds of their own, with operations of their own
    tensors = {key: each for key, each in own_tensors(module).items() if type(each) in (Tensor, nn.Parameter)}
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if normalises(module):
        given = [each for each in (weight, bias) if each is not None and each.numel() > 1]
        return any(not _constant(each) for each in given) if given else None
    if not isinstance(module, Weighted) or weight is None or weight.dim() < 2:
        return None
    if bias is not None and bias.numel() > 1 and _constant(bias):
        return False
    if weight.numel() < _ENOUGH:
        return None
    bound = weight[0].numel() ** -0.5 * (1 + 1e-6)
    given = [each for each in (weight, bias) if each is not None]
    if all(float(each.detach().abs().max()) <= bound for each in given):
        return False if float(weight.detach().abs().max()) > 0.9 * bound else None
    return True if bias is not None and bias.numel() > 1 else None


def _constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())
