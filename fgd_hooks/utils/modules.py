"""Small helpers on modules, their tensors and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DataParallel, DistributedDataParallel, ``torch.compile`` and ``YOLO`` wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif hasattr(model, "add_callback") and isinstance(model._modules.get("model"), nn.Module):
            model = model.get_submodule("model")  # Ultralytics' YOLO object, whose call predicts
        else:
            return model


Weighted = (nn.Linear, nn.modules.conv._ConvNd)


def normalises(layer: nn.Module) -> bool:
    """Whether a layer is a normalisation, of torch or of a package."""
    return "norm" in type(layer).__name__.lower()


def has_tensors(module: nn.Module) -> bool:
    """Whether a module or one inside it holds parameters or persistent buffers."""
    return any(map(own_tensors, module.modules()))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers that a module itself holds, without those of its children."""
    tensors: dict[str, Tensor | None] = {**module._parameters}
    tensors.update({k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set})
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def join(*names: str) -> str:
    """The dotted name of these parts; empty ones are left out."""
    return ".".join(name for name in names if name)


def write_tensors(student: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set parameters and buffers by name, in place; all can be changed, or none is."""
    mine = all_tensors(student)
    for name in values:
        if mine[name].is_inference():
            raise ValueError(f"The student's {name} was made in inference mode and cannot be changed; build it anew.")
    with torch.no_grad():
        for name, value in values.items():
            mine[name].copy_(value)


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name, shared ones under each of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def norm(tensor: Tensor) -> Tensor:
    """() the norm of a tensor of any floating-point type, in float32; summed in no less."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    dims = tuple(range(tensor.dim()))  # all of them: without, channels-last memory would be copied first
    found: Tensor = torch.linalg.vector_norm(tensor, dim=dims, dtype=wide)
    return found.float()


def gradient_norm(gradients: Iterable[Tensor | None]) -> float:
    """The norm of several gradients together; 0 where there is none."""
    norms = [norm(gradient) for gradient in gradients if gradient is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
