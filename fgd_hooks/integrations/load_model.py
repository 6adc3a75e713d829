"""Models by name: YOLO files, torchvision's detectors, timm's backbones, and factories of one's own.

======================================  ==========================================================================
``yolo26n.yaml``, ``runs/.../last.pt``  an Ultralytics model
``runs/detect/train``                   the best weights of a run folder
``torchvision:retinanet_resnet50_fpn``  a detector of torchvision, with random weights
``timm:resnet18``                       a backbone of timm as it gives features, with random weights
``transformers:RTDetrConfig``           the detector of transformers that this configuration's defaults describe
``package.module:factory``              what the function ``factory`` returns, or the module of that name
======================================  ==========================================================================

Nothing is downloaded but YOLO weights that Ultralytics offers. A Python path imports and runs that code.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fgd_hooks.errors import ModelNameError, needs_extra
from fgd_hooks.evaluation.runs import weights_of
from fgd_hooks.taps.probe import probe_input
from fgd_hooks.utils.registry import suggestion

FILES = (".pt", ".pth", ".yaml", ".yml")


HEADS = {"RTDETRDecoder": "RTDETR", "WorldDetect": "YOLOWorld", "YOLOE": "YOLOE"}
"""How the name of a yaml's last module begins, and the class of Ultralytics that builds and trains such a model."""


EXPECTED = (
    "expected a YOLO file (yolo26n.yaml, last.pt) or run folder, torchvision:NAME of a detector, timm:NAME of a "
    "backbone, transformers:NAME of a configuration, or package.module:factory"
)


@dataclass(frozen=True)
class NamedModel:
    """A model with an example of its input.

    Args:
        module: the model.
        example: what it is called with, zeros (1, C, size, size).
        fixed: whether the model takes images of this one size only.
        taps: where its levels are, where that is known; None: to be found.
    """

    module: nn.Module
    example: Tensor
    fixed: bool = False
    taps: list[str] | None = None


def load_model(name: str, size: int = 640) -> NamedModel:
    """The model that a name stands for (see above), in eval mode or as its factory made it.

    Args:
        name: of the model.
        size: side of the example in pixels; a model that takes images of one size only keeps to that.

    Raises:
        ModelNameError: no such model, or the factory gives none.
        MissingExtraError: the package that the model comes from is not installed.
        FileNotFoundError: the YOLO file does not exist.
    """
    kind, colon, rest = name.partition(":")
    if not colon or name.endswith(FILES) or Path(name).is_dir():
        module = load_yolo(name).model
        return NamedModel(module, probe_input(module, size))
    if not kind or not rest or ":" in rest:
        raise ModelNameError(f"The model {name!r} cannot be read; {EXPECTED}.")
    if kind == "torchvision":
        return _torchvision(rest, size)
    if kind == "timm":
        return _timm(rest, size)
    if kind == "transformers":
        module = _transformers(rest)
        return NamedModel(module, probe_input(module, size, 3))
    module = _made(kind, rest)
    if type(getattr(module, "transform", None)).__name__ == "GeneralizedRCNNTransform":
        return _detector(module, size)
    return NamedModel(module, probe_input(module, size))


def load_yolo(model: str) -> Any:
    """The ``YOLO`` object of a weights or yaml file; by its head an ``RTDETR``, ``YOLOWorld`` or ``YOLOE`` object.

    ``YOLO`` itself looks at the head of weights, but at no more than the name of a yaml file.

    Raises:
        FileNotFoundError: there is no such file, and Ultralytics knows no download of that name.
        ModelNameError: a yaml file that describes no model.
    """
    with needs_extra():
        import ultralytics
        from ultralytics.nn.tasks import yaml_model_load

    model = str(weights_of(model))
    try:
        name = "YOLO"
        if Path(model).suffix in (".yaml", ".yml"):
            layers = yaml_model_load(model).get("head")
            if not (isinstance(layers, list) and layers and isinstance(layers[-1], list) and len(layers[-1]) == 4):
                raise ModelNameError(f"{model!r} describes no model: it has no list 'head' of layers (a data yaml?).")
            name = next((made for prefix, made in HEADS.items() if str(layers[-1][2]).startswith(prefix)), name)
        return getattr(ultralytics, name)(model)
    except TypeError as error:
        raise ModelNameError(f"{model!r} is no model of Ultralytics': {' '.join(str(error).split())}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The model file {model!r} does not exist, and no download has that name.") from error


def _transformers(name: str) -> nn.Module:
    """A detector, or else a backbone, of transformers with random weights, from the defaults of its configuration."""
    with needs_extra():
        import transformers
    kind = name.removesuffix("Config")
    config = getattr(transformers, f"{kind}Config", None)
    if config is None:
        known = [each for each in dir(transformers) if each.endswith("Config") and each[0].isupper()]
        raise ModelNameError(f"transformers has no configuration {name!r}. {suggestion(name, known)}")
    for suffix in ("ForObjectDetection", "Backbone", "ForSemanticSegmentation", "ForDepthEstimation", "Model"):
        made = getattr(transformers, f"{kind}{suffix}", None)
        if made is not None:
            try:
                settings = config()
                if getattr(settings, "use_pretrained_backbone", False):
                    settings.use_pretrained_backbone = False
                module: nn.Module = made(settings).eval()
            except Exception as error:
                raise ModelNameError(f"transformers:{name} cannot be built from its defaults: {error}") from error
            return module
    raise ModelNameError(f"transformers has no model for {name!r}.")


def _torchvision(name: str, size: int) -> NamedModel:
    with needs_extra():
        from torchvision import models
    known = models.list_models(module=models.detection)
    if name not in known:
        raise ModelNameError(f"torchvision has no detector {name!r}. {suggestion(name, known)}")
    return _detector(models.get_model(name, weights=None, weights_backbone=None), size)


def _detector(module: Any, size: int) -> NamedModel:
    """A detector of torchvision, seen from behind its transform, which would resize the example."""
    from fgd_hooks.integrations.torchvision import OnBatch, backbone_maps

    fixed = module.transform.fixed_size
    size = int(fixed[0]) if fixed else size
    face = OnBatch(module)
    return NamedModel(face, probe_input(module, size), bool(fixed), list(backbone_maps(face, [(size, size)])))


def _timm(name: str, size: int) -> NamedModel:
    with needs_extra():
        import timm
    if not timm.is_model(name):
        raise ModelNameError(f"timm has no model {name!r}. {suggestion(name, timm.list_models())}")
    settings: dict[str, Any] = {"pretrained": False, "features_only": True}
    try:
        module = timm.create_model(name, **settings)
        if str(getattr(module, "output_fmt", "NCHW")).rpartition(".")[2] != "NCHW":
            module = timm.create_model(name, feature_cls="getter", **settings)  # gives (N, C, H, W) for each model
    except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
        raise ModelNameError(f"timm:{name} cannot be built with features_only=True: {error}") from error
    settings = getattr(module, "pretrained_cfg", None) or {}
    fixed = bool(settings.get("fixed_input_size"))
    size = int(settings["input_size"][-1]) if fixed else size
    return NamedModel(module.eval(), probe_input(module, size), fixed)


def _made(path: str, name: str) -> nn.Module:
    """What a function of a module makes; the working directory counts as a place to import from."""
    text = f"{path}:{name}"
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(path)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{path}.".startswith(f"{missing}."):
            raise ModelNameError(f"{text!r}: there is no Python module {missing!r}; {EXPECTED}.") from error
        raise ModelNameError(f"{text!r}: importing {path} failed: {type(error).__name__}: {error}") from error
    made = getattr(module, name, None)
    if made is None:
        public = [each for each in vars(module) if not each.startswith("_")]
        raise ModelNameError(f"{path} has no {name!r}. {suggestion(name, public)}")
    if callable(made) and not isinstance(made, nn.Module):
        try:
            made = made()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise ModelNameError(f"{text!r}, called without arguments, failed: {said}") from error
    if not isinstance(made, nn.Module):
        raise ModelNameError(f"{text!r} gives a {type(made).__name__}; expected a function that returns an nn.Module.")
    return made
