"""Load a teacher for the Ultralytics callback: a file, a ``YOLO`` object or any ``nn.Module``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fgd_hooks.config import FGDConfig, TeacherConfig
from fgd_hooks.errors import TeacherError
from fgd_hooks.evaluation.runs import weights_of
from fgd_hooks.integrations.ultralytics.compat import TASKS, task_of
from fgd_hooks.pairing import needs_scores
from fgd_hooks.teacher import OWNED
from fgd_hooks.utils.modules import unwrap
from fgd_hooks.utils.registry import suggestion
from fgd_hooks.utils.untrained import is_untrained

NO_WEIGHTS = "describes an architecture and holds no weights; an untrained teacher teaches nothing. Give a .pt file."


def load_teacher(teacher: str | Path | nn.Module | Any) -> nn.Module:
    """The teacher's module, as it was trained: its batch normalisations are not folded in; from a file, in float32.

    A file goes through Ultralytics' own loader, which unpickles it: load weights only from a source that you trust.

    Args:
        teacher: a weights file (or the name of one that Ultralytics knows where to download), a ``YOLO`` object, or a
            module, which is used as it is.

    Raises:
        FileNotFoundError: there is no such file.
        TeacherError: the file cannot be read, or it is no detector.
    """
    if isinstance(teacher, (str, Path)):
        name, module = str(teacher), _load_file(Path(teacher))
    else:
        name = type(teacher).__name__
        module = getattr(teacher, "model", None) if hasattr(teacher, "add_callback") else teacher
    if not isinstance(module, nn.Module):
        expected = "a weights file, a YOLO object with weights, or an nn.Module"
        raise TeacherError(f"The teacher is a {name}; expected {expected}.")
    task = task_of(module)
    if task is not None and task not in TASKS:
        expected = f"a detector with a neck ({', '.join(TASKS)})"
        raise TeacherError(f"The teacher {name} is a model for the task {task!r}; FGD needs {expected}.")
    if hasattr(teacher, "add_callback") and is_untrained(module):
        raise TeacherError(f"The teacher, a {name} object, {NO_WEIGHTS}")
    return module


def load_teachers(teacher: Any) -> list[nn.Module]:
    """One teacher, or each of a list of them, as :func:`load_teacher` takes it."""
    if not (each := as_list(teacher)):
        raise TeacherError("The list of teachers is empty; give at least one.")
    return [load_teacher(one) for one in each]


def check_channels(student: nn.Module, teachers: Sequence[nn.Module]) -> None:
    """Refuse teachers of other images than those of the training, whose data say the channels.

    Raises:
        TeacherError: names both numbers of channels.
    """
    for teacher in teachers:
        mine, theirs = (_channels(unwrap(model)) for model in (student, teacher))
        if mine and theirs and mine != theirs:
            raise TeacherError(
                f"The teacher takes images of {theirs} channel(s), those of this training have {mine}. Use a teacher "
                "that was trained on such images, or other data (channels: in the data yaml)."
            )


def _channels(model: nn.Module) -> int | None:
    """The channels of the images that one of Ultralytics' models takes; None for any other."""
    layers = getattr(model, "model", None)
    if not (hasattr(model, "yaml") and isinstance(layers, nn.Sequential)):
        return None
    return next((m.in_channels for m in layers.modules() if isinstance(m, nn.Conv2d)), None)


def fuse_files(modules: Sequence[nn.Module], teacher: Any, settings: TeacherConfig) -> list[nn.Module]:
    """What :func:`load_teachers` made of ``teacher``, fused where it was a file and the settings ask for it.

    To be called after the student has inherited: it cannot from fused layers.
    """
    each = zip(modules, as_list(teacher), strict=True)
    return [fused(module) if settings.fuse and isinstance(given, (str, Path)) else module for module, given in each]


def as_list(teacher: Any) -> list[Any]:
    """One teacher or several, as a list."""
    return list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]


def file_of(teacher: Any) -> str | None:
    """The weights file that a teacher is, or that a ``YOLO`` object was loaded from; None for any other."""
    if isinstance(teacher, (str, Path)):
        return str(teacher)
    file = getattr(teacher, "ckpt_path", None)
    return str(file) if file and Path(str(file)).is_file() else None


def name_of(teacher: Any) -> str:
    """What a teacher is noted as: its file, else its class."""
    return file_of(teacher) or type(teacher).__name__


def with_score_taps(config: FGDConfig, teachers: Sequence[nn.Module]) -> FGDConfig:
    """The configuration with the places of the teachers' class scores, where a loss needs them and none are named."""
    wanted = any(needs_scores(loss.name) for loss in config.all_losses)
    if not wanted or config.score_taps is not None:
        return config
    found = [score_taps(teacher) for teacher in teachers]
    if any(each is None or each != found[0] for each in found):
        return config  # the Distiller says what is missing
    return dataclasses.replace(config, score_taps=found[0])


def score_taps(module: nn.Module) -> list[str] | None:
    """The modules of a YOLO head that return the class scores of its levels, finest first; None if it has none.

    The one-to-many branch, whose scores are spread over an object's cells, if the head runs it; a fused end-to-end head
    has the one-to-one branch alone.
    """
    for name, part in module.named_modules():
        for branch in ("cv3", "one2one_cv3"):
            convolutions = getattr(part, branch, None)
            if not (isinstance(convolutions, nn.ModuleList) and len(convolutions) == getattr(part, "nl", None)):
                continue
            # YOLO-World and YOLOE give vectors here, which they compare with those of the class names further on
            last = [each[-1] if isinstance(each, nn.Sequential) else each for each in convolutions]
            if all(getattr(each, "out_channels", None) == part.nc for each in last):
                return [f"{name}.{branch}.{number}" for number in range(len(convolutions))]
    return None


def fused(module: nn.Module) -> nn.Module:
    """An Ultralytics model with its batch normalisations folded into convolutions, weights channels-last; in place."""
    folded: nn.Module = module.fuse(verbose=False)  # type: ignore[operator]
    setattr(folded, OWNED, True)
    return folded.to(memory_format=torch.channels_last)


def _load_file(path: Path) -> Any:
    from ultralytics.nn.tasks import load_checkpoint
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    path = weights_of(path)
    if path.suffix in (".yaml", ".yml"):
        raise TeacherError(f"The teacher {str(path)!r} {NO_WEIGHTS}")
    if not path.is_file() and path.name not in GITHUB_ASSETS_NAMES:
        folder = path.parent
        present = sorted(f.name for f in folder.glob("*.pt")) if folder.is_dir() else []
        hint = suggestion(path.name, [*present, *GITHUB_ASSETS_NAMES]) if present else f"{folder} holds no .pt file."
        raise FileNotFoundError(f"The teacher file {str(path)!r} does not exist. {hint}")
    try:
        module = load_checkpoint(str(path))[0]
    except FileNotFoundError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise TeacherError(f"The teacher file {str(path)!r} is no Ultralytics checkpoint: {said}") from error
    return module.float()


def fast_dtype(device: torch.device) -> str:
    """The precision in which a frozen teacher runs fastest on a device without harm: "bfloat16" or "float32"."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not public: absent ones count as no
        if any(getattr(torch.cpu, check, bool)() for check in checks):
            return "bfloat16"
    return "float32"
