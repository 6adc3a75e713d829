"""Whether a study's trainings would begin: what Ultralytics says to their settings and models, before any of them."""

from __future__ import annotations

from pathlib import Path

from fgd_hooks.errors import StudyError
from fgd_hooks.study.plan import Planner
from fgd_hooks.study.spec import SETTINGS, StudySpec
from fgd_hooks.utils.registry import suggestion


def check_training(spec: StudySpec, planner: Planner) -> None:
    """Check the ``train`` settings and the models' yaml files of a study.

    Raises:
        StudyError: a setting that Ultralytics does not have (the message names the nearest) or not with that value, or
            a yaml that is no file and none that Ultralytics brings along.
    """
    sections = [("train", spec.train)]
    models = [("student.model", spec.student.model)]
    for name, data in spec.data.items():
        sections.append((f"data.{name}.train", data.train))
        if data.student is not None:
            models.append((f"data.{name}.student.model", data.student.model))
        if data.teacher is not None:
            sections.append((f"data.{name}.teacher.train", data.teacher.train))
            models += [(f"data.{name}.teacher.model", data.teacher.model)] if data.teacher.model else []
    sections += [(f"arms.{name}.train", arm.train) for name, arm in spec.arms.items()]
    for where, settings in sections:
        _check_settings(where, settings)
    for where, model in models:
        _check_model(where, planner.model(model))


def _check_settings(where: str, settings: dict[str, object]) -> None:
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import DEFAULT_CFG_DICT

    unknown = [key for key in settings if key not in DEFAULT_CFG_DICT]
    if unknown:
        raise StudyError(
            f"{where}.{unknown[0]} is no setting of Ultralytics. {suggestion(unknown[0], DEFAULT_CFG_DICT)}"
        )
    try:
        get_cfg(overrides={**SETTINGS, **settings})
    except (TypeError, ValueError) as error:
        raise StudyError(f"{where}: {error}") from error


def _check_model(where: str, model: str) -> None:
    from ultralytics.nn.tasks import yaml_model_load

    if Path(model).suffix not in (".yaml", ".yml"):
        return  # weights, which Ultralytics may have to fetch
    try:
        yaml_model_load(model)
    except FileNotFoundError as error:
        raise StudyError(f"{where}: {model!r} is neither a file nor a model that Ultralytics brings along.") from error
