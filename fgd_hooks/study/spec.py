"""What a study is: typed sections, read from a YAML file."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fgd_hooks.study.ablation  # noqa: F401  (registers its loss)
from fgd_hooks.config import load_config
from fgd_hooks.errors import ConfigError, StudyError
from fgd_hooks.pairing import check_names
from fgd_hooks.utils.registry import suggestion

KINDS = ("alone", "builtin", "fgd")

SETTINGS: dict[str, Any] = {
    "imgsz": 192,
    "batch": 8,
    "nbs": 8,
    "optimizer": "AdamW",
    "lr0": 1e-3,
    "lrf": 1e-2,
    "warmup_epochs": 1,
    "weight_decay": 5e-4,
    "amp": False,
    "mosaic": 0.0,
    "mixup": 0.0,
    "erasing": 0.0,
    "auto_augment": None,
    "fliplr": 0.5,
    "flipud": 0.5,
    "hsv_h": 0.01,
    "hsv_s": 0.3,
    "hsv_v": 0.2,
    "translate": 0.1,
    "scale": 0.25,
    "close_mosaic": 0,
    "workers": 0,
    "plots": False,
    "val": False,
    "pretrained": False,
    "deterministic": True,
    "patience": 0,
}
"""Ultralytics' settings of every run, unless the study says otherwise (``train:``)."""

TAKEN = ("teacher", "pretrain")
"""Names that no arm may have: those of the runs that arms need."""

Require = Callable[[bool, str], None]

RESERVED = ("data", "device", "distill_model", "epochs", "exist_ok", "model", "name", "project", "resume", "seed")


@dataclass
class TeacherSpec:
    """The teacher of one data set.

    Attributes:
        weights: its file; used where it exists.
        model: model yaml of a teacher that the study trains itself where there are no weights.
        scale: depth, width and most channels that replace those of that yaml; null: as they are.
        epochs: how long it is trained.
        seed: of its training.
        train: Ultralytics settings that differ from the study's.
    """

    weights: str | None = None
    model: str | None = None
    scale: list[float] | None = None
    epochs: int = 25
    seed: int = 0
    train: dict[str, Any] = field(default_factory=dict)


@dataclass
class PretrainSpec:
    """A training of the student alone on another data set, whose last weights the students of all arms start from.

    Attributes:
        data: name of a data set of the study.
        epochs: how long.
        seed: of that training; one serves all seeds of the students.
    """

    data: str = ""
    epochs: int = 45
    seed: int = 0


@dataclass
class StudentSpec:
    """The student.

    Attributes:
        model: model yaml (a file, or the name of one that Ultralytics brings along) or weights.
        scale: depth, width and most channels that replace those of the yaml; null: as they are.
        name: what to call it in tables; null: the file's name.
        pretrain: where its weights come from; null: from ``model``.
    """

    model: str = "yolo26n.yaml"
    scale: list[float] | None = None
    name: str | None = None
    pretrain: PretrainSpec | None = None


@dataclass
class DataSpec:
    """One data set.

    Attributes:
        yaml: data yaml in YOLO format; null with ``scenes``.
        scenes: settings of the drawn set (fgd_hooks/study/scenes.py); its test split is drawn with another seed.
        holdout: this share of the training images becomes val, and the yaml's val becomes test: for sets without a
            test split.
        fraction: share of the training images that the students see, chosen by ``subset_seed``; a smaller share is
            part of a larger one.
        subset_seed: of holdout and fraction.
        keep_steps: with a fraction, show as many images in all as without it (more epochs, and about as many
            optimizer steps; more where few images leave the last batch of an epoch half empty); false: the same number
            of epochs.
        teacher: of this data set; it sees all training images, whatever the fraction.
        student: instead of the study's.
        epochs: instead of the study's.
        train: Ultralytics settings that differ from the study's.
        compare: whether the arms are trained on it; false: for pretraining alone.
    """

    yaml: str | None = None
    scenes: dict[str, Any] | None = None
    holdout: float = 0.0
    fraction: float = 1.0
    subset_seed: int = 0
    keep_steps: bool = False
    teacher: TeacherSpec | None = None
    student: StudentSpec | None = None
    epochs: int | None = None
    train: dict[str, Any] = field(default_factory=dict)
    compare: bool = True


@dataclass
class ArmSpec:
    """One way to train the student.

    Attributes:
        kind: "alone", "builtin" (Ultralytics' ``distill_model=``) or "fgd".
        epochs: instead of the study's; then the arm's budget differs from the others'.
        compute: name of an arm; this one trains as many epochs as cost the same CPU seconds, measured on the finished
            runs of that arm and of the baseline.
        fgd: settings of the distillation that differ from the library's defaults.
        train: Ultralytics settings that differ from the other arms'.
        data: names of the data sets; null: all.
    """

    kind: str = "fgd"
    epochs: int | None = None
    compute: str | None = None
    fgd: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    data: list[str] | None = None


@dataclass
class StudySpec:
    """A study: arms x seeds x data sets.

    Attributes:
        name: of the study and of its folder in results/.
        about: what it asks, for the head of its tables.
        epochs: of every student, unless a data set or an arm says otherwise.
        seeds: of the students.
        baseline: the arm that the others are compared with.
        train: Ultralytics settings of all runs that differ from ``SETTINGS``.
        fgd: settings of the distillation, in all arms of kind "fgd", that differ from the library's defaults; those of
            an arm are merged into them.
        student: of all data sets that name none.
        data: the data sets by name.
        arms: the arms by name, in the order of the tables.
    """

    name: str = ""
    about: str = ""
    epochs: int = 45
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    baseline: str = "alone"
    train: dict[str, Any] = field(default_factory=dict)
    fgd: dict[str, Any] = field(default_factory=dict)
    student: StudentSpec = field(default_factory=StudentSpec)
    data: dict[str, DataSpec] = field(default_factory=dict)
    arms: dict[str, ArmSpec] = field(default_factory=dict)


def load_study(file: str | Path) -> StudySpec:
    """Read and check a study file.

    Raises:
        FileNotFoundError: there is no such file.
        StudyError: it is no YAML, has an unknown key (the message names the nearest one), a wrong type or an
            impossible value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
    from yaml import YAMLError

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"The study file {str(file)!r} does not exist.")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(StudySpec), OmegaConf.load(file))
        spec = typing.cast(StudySpec, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        key = str(error.full_key)
        known = [name for name in _keys(StudySpec) if name]
        raise StudyError(f"{file}: there is no key {key}. {suggestion(key.rsplit('.', 1)[-1], known)}") from error
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise StudyError(f"{file}: {' '.join(str(error).split())}") from error
    for arm in spec.arms.values():
        if arm.kind == "fgd":  # before the check: two settings may exclude each other
            arm.fgd = typing.cast(dict[str, Any], OmegaConf.to_object(OmegaConf.merge(spec.fgd, arm.fgd)))
    _check(spec, file)
    return spec


def _keys(schema: Any) -> list[str]:
    """The names of all fields of a section and of those inside it."""
    found: list[str] = []
    for name, kind in typing.get_type_hints(schema).items():
        found.append(name)
        for part in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(part):
                found += _keys(part)
    return list(dict.fromkeys(found))


def _check(spec: StudySpec, file: Path) -> None:
    def require(holds: bool, message: str) -> None:
        if not holds:
            raise StudyError(f"{file}: {message}")

    def check_settings(where: str, settings: dict[str, Any]) -> None:
        try:
            check_names(load_config(None, settings))
        except ConfigError as error:
            raise StudyError(f"{file}: {where}: {error}") from error

    def check_name(where: str, name: str) -> None:
        # names become files' names, and parts of patterns that look for them
        require(re.fullmatch(r"[\w.-]+", name) is not None, f"{where}: expected letters, digits, '_', '.' and '-'.")

    def check_baseline() -> None:
        known = suggestion(spec.baseline, spec.arms)
        require(spec.baseline in spec.arms, f"baseline is {spec.baseline!r}, which is no arm. {known}")

    require(bool(spec.name) and Path(spec.name).name == spec.name, f"name is {spec.name!r}; expected a folder's name.")
    require(bool(spec.data), "data is empty; expected one data set or more.")
    require(bool(spec.arms), "arms is empty; expected one arm or more.")
    require(bool(spec.seeds) and len(set(spec.seeds)) == len(spec.seeds), f"seeds are {spec.seeds}; expected one each.")
    require(spec.epochs >= 1, f"epochs is {spec.epochs}; expected 1 or more.")
    for name, data in spec.data.items():
        check_name(f"data.{name}", name)
        _check_data(spec, name, data, require)
    pairs = Counter(f"{data}-{arm}" for data in spec.data for arm in spec.arms)
    twins = [pair for pair, count in pairs.items() if count > 1]
    require(not twins, f"data set and arm are both called {''.join(twins[:1])!r} in two ways; rename one of them.")
    _check_student("student", spec.student, spec, require)
    check_settings("fgd", spec.fgd)
    for name, arm in spec.arms.items():
        where = f"arms.{name}"
        check_name(where, name)
        require(name not in TAKEN, f"{where}: the name is taken; {' and '.join(TAKEN)} are what the arms need.")
        require(arm.kind in KINDS, f"{where}.kind is {arm.kind!r}. {suggestion(arm.kind, KINDS)}")
        require(arm.kind == "fgd" or not arm.fgd, f"{where}.fgd has no effect with kind {arm.kind}.")
        require(arm.epochs is None or arm.epochs >= 1, f"{where}.epochs is {arm.epochs}; expected 1 or more.")
        if arm.compute is not None:
            require(arm.epochs is None, f"{where} has both epochs and compute; expected one of them.")
            require(arm.compute in spec.arms, f"{where}.compute is no arm. {suggestion(arm.compute, spec.arms)}")
            check_baseline()
            fixed = all(spec.arms[each].compute is None for each in (arm.compute, spec.baseline))
            require(fixed, f"{where}.compute must name an arm whose epochs are given, as must the baseline.")
            for each in (arm.compute, spec.baseline):
                lacking = set(arm.data or spec.data) - set(spec.arms[each].data or spec.data)
                require(not lacking, f"{where}.compute: {each} has no run on {', '.join(sorted(lacking))}.")
        require(arm.data != [], f"{where}.data is empty; expected names of data sets, or null for all.")
        for each in arm.data or ():
            require(each in spec.data, f"{where}.data: there is no data set {each!r}. {suggestion(each, spec.data)}")
        compared = [each for each in arm.data or spec.data if spec.data[each].compare and arm.kind != "alone"]
        for each in compared:
            require(spec.data[each].teacher is not None, f"{where} needs data.{each}.teacher.")
        if arm.kind == "fgd":
            check_settings(f"{where}.fgd", arm.fgd)
    sections = [("train", spec.train), *((f"data.{k}.train", v.train) for k, v in spec.data.items())]
    sections += [(f"arms.{k}.train", v.train) for k, v in spec.arms.items()]
    sections += [(f"data.{k}.teacher.train", v.teacher.train) for k, v in spec.data.items() if v.teacher]
    for where, settings in sections:
        taken = [key for key in RESERVED if key in settings]
        require(not taken, f"{where}.{''.join(taken[:1])} is set by the study itself.")
    check_baseline()


def _check_data(spec: StudySpec, name: str, data: DataSpec, require: Require) -> None:
    where = f"data.{name}"
    require((data.yaml is None) != (data.scenes is None), f"{where} needs either yaml or scenes.")
    require(0 < data.fraction <= 1, f"{where}.fraction is {data.fraction}; expected a share above 0, up to 1.")
    require(0 <= data.holdout < 1, f"{where}.holdout is {data.holdout}; expected a share from 0 to below 1.")
    require(not data.holdout or data.yaml is not None, f"{where}.holdout: the drawn set has a test split of its own.")
    require(data.epochs is None or data.epochs >= 1, f"{where}.epochs is {data.epochs}; expected 1 or more.")
    if data.teacher is not None:
        given = data.teacher.weights or data.teacher.model
        require(bool(given), f"{where}.teacher needs weights, or a model to train.")
        found = data.teacher.epochs
        require(found >= 1, f"{where}.teacher.epochs is {found}; expected 1 or more (only a teacher without weights).")
        _check_scale(f"{where}.teacher", data.teacher.scale, require)
    if data.student is not None:
        _check_student(f"{where}.student", data.student, spec, require)


def _check_student(where: str, student: StudentSpec, spec: StudySpec, require: Require) -> None:
    _check_scale(where, student.scale, require)
    if (pretrain := student.pretrain) is not None:
        known = suggestion(pretrain.data, spec.data)
        require(pretrain.data in spec.data, f"{where}.pretrain.data: no data set {pretrain.data!r}. {known}")
        found = pretrain.epochs
        require(found >= 1, f"{where}.pretrain.epochs is {found}; expected 1 or more.")


def _check_scale(where: str, scale: list[float] | None, require: Require) -> None:
    right = scale is None or (len(scale) == 3 and min(scale) > 0)
    require(right, f"{where}.scale is {scale}; expected three numbers above 0: depth, width and most channels.")
