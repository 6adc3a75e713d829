"""Studies: arms x seeds x data sets, run side by side and resumable, with tables and plots (``fgd study``)."""

from fgd_hooks.errors import StudyError
from fgd_hooks.study.spec import StudySpec, load_study

__all__ = ["StudyError", "StudySpec", "load_study"]
