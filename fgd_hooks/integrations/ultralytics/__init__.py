"""Distillation inside Ultralytics' own trainings; needs the extra ``ultralytics``."""

from fgd_hooks.errors import needs_extra

with needs_extra("ultralytics"):
    import ultralytics  # noqa: F401
