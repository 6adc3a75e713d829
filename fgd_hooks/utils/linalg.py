"""Least squares and evenly spaced channels."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 0.05  # least weight of the regression's prior, as a share of the mean variance of the inputs
MAX_CELLS = 16384  # of a batch: enough for any width


def ridge_change(gram: Tensor, cross: Tensor, count: Tensor) -> Tensor:
    """The change of a linear map that minimises mean |rest - change x|² + r |change|².

    r is the mean variance of x times ``max(RIDGE, inputs / count)``.

    Args:
        gram: (..., inputs, inputs) covariance of the inputs x.
        cross: (..., inputs, outputs) covariance of the inputs with the rest that is to be explained.
        count: () number of cells.

    Returns:
        (..., inputs, outputs); zero where none can be found, for features that do not vary.
    """
    width = gram.shape[-1]
    ridge = gram.diagonal(dim1=-2, dim2=-1).mean(-1) * torch.clamp(width / count, min=RIDGE)
    change, failed = torch.linalg.solve_ex(gram + ridge[..., None, None] * torch.eye(width).to(gram), cross)
    found = (failed == 0) & torch.isfinite(change).flatten(-2).all(-1)
    return torch.where(found[..., None, None], change, 0)


def wide(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def evenly_spaced(count: int, of: int) -> Tensor:
    """(count,) the channels i * of // count that a layer with ``count`` takes of one with ``of``.

    Where channels of several layers are concatenated and all of them are thinned by one whole number, this takes from
    each what evenly spaced channels of it alone are.
    """
    return torch.div(torch.arange(count) * of, count, rounding_mode="floor")


def chosen_cells(count: int) -> Tensor:
    """(cells,) those of ``count`` that are compared: all, or :data:`MAX_CELLS` by a random choice that never changes.

    Not every n-th: where n and the width of a map have a common divisor, that sees some of its columns alone.
    """
    if count <= MAX_CELLS:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MAX_CELLS].sort().values


def cell_places(cells: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of cells that are numbered through a batch of maps, image by image and row by row."""
    return cells // (height * width), cells // width % height, cells % width
