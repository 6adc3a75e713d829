"""Which versions of Ultralytics the callback works with."""

from __future__ import annotations

from fgd_hooks.versions import version_numbers

OLDEST = "8.4.177"


class VersionError(RuntimeError):
    """A version of Ultralytics that the callback would not work with, or not safely."""


def check_version() -> None:
    """Refuse a version that is too old.

    Before 8.4.177 the event ``teardown`` does not come after an error, and the hooks would stay on the model. Before
    8.4.140 callbacks do not reach the processes of a multi-GPU training, which would run without distillation and say
    nothing. Older ones still give the items of the loss as a tensor without names.

    Raises:
        VersionError: names the version found and the oldest that works.
    """
    import ultralytics

    if version_numbers(ultralytics.__version__) < version_numbers(OLDEST):
        raise VersionError(
            f"FGDCallback needs ultralytics {OLDEST} or newer; found {ultralytics.__version__}, which loses callbacks "
            "on several GPUs or after an error. Update it: pip install -U ultralytics"
        )
