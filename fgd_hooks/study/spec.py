"""What a study is: typed sections, read from a YAML file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import re
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fgd_hooks.config import load_config
from fgd_hooks.errors import ConfigError, StudyError
from fgd_hooks.evaluation.arms import TAKEN
from fgd_hooks.pairing import check_names
from fgd_hooks.utils.registry import suggestion
from fgd_hooks.utils.structured_config import load

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

RESERVED = ("data", "device", "distill_model", "epochs", "exist_ok", "model", "name", "project", "resume", "seed")
"""Ultralytics' settings that the study itself sets."""


@dataclass
class TeacherSpec:
    """The teacher of one data set."""

    weights: str | None = None  # its file; used where it exists
    model: str | None = None  # model yaml of a teacher that the study trains itself where there are no weights
    scale: list[float] | None = None  # depth, width and most channels that replace those of that yaml
    epochs: int = 25  # how long it is trained
    seed: int = 0  # of its training
    train: dict[str, Any] = field(default_factory=dict)  # Ultralytics settings that differ from the study's


@dataclass
class PretrainSpec:
    """A training of the student alone on another data set, whose last weights the students of all arms start from."""

    data: str = ""  # name of a data set of the study
    epochs: int = 45  # how long
    seed: int = 0  # of that training; one serves all seeds of the students


@dataclass
class StudentSpec:
    """The student."""

    model: str = "yolo26n.yaml"  # model yaml (a file, or a name that Ultralytics brings along) or weights
    scale: list[float] | None = None  # depth, width and most channels that replace those of the yaml
    name: str | None = None  # what to call it in tables; null: the file's name
    pretrain: PretrainSpec | None = None  # where its weights come from; null: from ``model``


@dataclass
class DataSpec:
    """One data set.

    ``holdout`` is for sets without a test split: this share of the training images becomes val, and the yaml's val
    becomes test. With a ``fraction``, ``keep_steps`` shows as many images in all as without it: more epochs, and about
    as many optimizer steps (more where few images leave the last batch of an epoch half empty).
    """

    yaml: str | None = None  # data yaml in YOLO format; null with ``scenes``
    scenes: dict[str, Any] | None = None  # settings of the drawn set (scenes.py), whose test split has another seed
    holdout: float = 0.0
    fraction: float = 1.0  # share of the training images that the students see; a smaller share is part of a larger one
    subset_seed: int = 0  # which images holdout and fraction choose
    keep_steps: bool = False
    teacher: TeacherSpec | None = None  # of this data set; it sees all training images, whatever the fraction
    student: StudentSpec | None = None  # instead of the study's
    epochs: int | None = None  # instead of the study's
    train: dict[str, Any] = field(default_factory=dict)  # Ultralytics settings that differ from the study's
    compare: bool = True  # whether the arms are trained on it; false: for pretraining alone


@dataclass
class ArmSpec:
    """One way to train the student.

    ``compute`` names an arm: this one trains as many epochs as cost the same CPU seconds, measured on the finished runs
    of that arm and of the baseline.
    """

    kind: str = "fgd"  # "alone", "builtin" (Ultralytics' ``distill_model=``) or "fgd"
    epochs: int | None = None  # instead of the study's; then the arm's budget differs from the others'
    compute: str | None = None
    fgd: dict[str, Any] = field(default_factory=dict)  # of the distillation, where they differ from the defaults
    train: dict[str, Any] = field(default_factory=dict)  # Ultralytics settings that differ from the other arms'
    data: list[str] | None = None  # names of the data sets; null: all


@dataclass
class StudySpec:
    """A study: arms x seeds x data sets."""

    name: str = ""  # of the study and of its folder of results
    about: str = ""  # what it asks, for the head of its tables
    epochs: int = 45  # of every student, unless a data set or an arm says otherwise
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of the students
    baseline: str = "alone"  # the arm that the others are compared with
    plugins: list[str] = field(default_factory=list)  # Python files beside this one: losses, adapters
    train: dict[str, Any] = field(default_factory=dict)  # Ultralytics settings of all runs that differ from SETTINGS
    fgd: dict[str, Any] = field(default_factory=dict)  # of the distillation in all arms; an arm's own win
    student: StudentSpec = field(default_factory=StudentSpec)  # of all data sets that name none
    data: dict[str, DataSpec] = field(default_factory=dict)  # the data sets by name
    arms: dict[str, ArmSpec] = field(default_factory=dict)  # the arms by name, in the order of the tables


def load_study(file: str | Path) -> StudySpec:
    """Read and check a study file, and import its plug-ins."""
    try:
        spec = load(StudySpec, file)
    except ConfigError as error:
        raise StudyError(str(error)) from error
    file = Path(file)
    spec.plugins = [str((file.parent / Path(plugin).expanduser()).resolve()) for plugin in spec.plugins]
    load_plugins(spec.plugins)
    for arm in spec.arms.values():
        if arm.kind == "fgd":  # before the check: two settings may exclude each other
            arm.fgd = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(spec.fgd, arm.fgd)))
    rules = [_rules(where, section, spec) for where, section in sections(spec)]
    for holds, message in itertools.chain(*rules, _baseline(spec)):
        if not holds:
            raise StudyError(f"{file}: {message}")
    return spec


def load_plugins(files: Iterable[str]) -> None:
    """Import Python files, each once a process: they register losses and adapters under names that the runs use."""
    for file in files:
        if not Path(file).is_file() or Path(file).suffix != ".py":
            raise StudyError(f"plugins: {file!r} does not exist; expected a Python file beside the study file.")
        name = f"fgd_plugin_{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]}"  # a copy is the same plug-in
        specification = importlib.util.spec_from_file_location(name, file)
        if name in sys.modules or specification is None or specification.loader is None:
            continue
        module = sys.modules[name] = importlib.util.module_from_spec(specification)
        try:
            specification.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise StudyError(f"plugins: {file!r} fails: {type(error).__name__}: {error}") from error


def sections(section: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """A section and all those inside it, each with its place: ``("data.cells.teacher", TeacherSpec(...))``."""
    yield where, section
    for name, value in vars(section).items():
        for key, each in value.items() if isinstance(value, dict) else [("", value)]:
            if dataclasses.is_dataclass(each):
                yield from sections(each, _join(where, f"{name}.{key}".rstrip(".")))


def check_training(spec: StudySpec, find: Callable[[str], str]) -> None:
    """Check the ``train`` settings and the models' yaml files of a study by what Ultralytics says to them."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import yaml_model_load
    from ultralytics.utils import DEFAULT_CFG_DICT

    for where, section in sections(spec):
        settings, model = getattr(section, "train", {}), getattr(section, "model", None)
        for key in settings:
            if key not in DEFAULT_CFG_DICT:
                known = suggestion(key, DEFAULT_CFG_DICT)
                raise StudyError(f"{_join(where, 'train')}.{key} is no setting of Ultralytics. {known}")
        try:
            get_cfg(overrides={**SETTINGS, **settings})
        except (TypeError, ValueError) as error:
            raise StudyError(f"{_join(where, 'train')}: {error}") from error
        if model and Path(model).suffix in (".yaml", ".yml"):  # not weights, which Ultralytics may have to fetch
            try:
                yaml_model_load(find(model))
            except FileNotFoundError as error:
                message = f"{where}.model: {model!r} is neither a file nor a model that Ultralytics brings along."
                raise StudyError(message) from error


Rules = Iterator[tuple[bool, str]]
"""What has to hold, one after the other, and what to say where it does not."""

BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda value: value >= 1, "1 or more"),
    "fraction": (lambda value: 0 < value <= 1, "a share above 0, up to 1"),
    "holdout": (lambda value: 0 <= value < 1, "a share from 0 to below 1"),
    "scale": (lambda value: len(value) == 3 and min(value) > 0, "three numbers above 0: depth, width, most channels"),
    "seeds": (lambda value: 0 < len(value) == len(set(value)), "different numbers, one or more"),
}
"""Key, in whatever section -> which values it may have, unless it is null."""


def _rules(where: str, section: Any, spec: StudySpec) -> Rules:
    for key, value in vars(section).items():
        if key in BOUNDS and value is not None:
            holds, expected = BOUNDS[key]
            yield holds(value), f"{_join(where, key)} is {value}; expected {expected}."
    for key in getattr(section, "train", ()):
        yield key not in RESERVED, f"{_join(where, 'train')}.{key} is set by the study itself."
    if type(section) in RELATIONS:
        yield from RELATIONS[type(section)](where, section, spec)


def _study(where: str, study: StudySpec, spec: StudySpec) -> Rules:
    yield Path(study.name).name == study.name != "", f"name is {study.name!r}; expected a folder's name."
    for key, named in (("data", study.data), ("arms", study.arms)):
        yield len(named) > 0, f"{key} is empty; expected one or more."
        for name in named:  # names become files' names, and parts of patterns that look for them
            yield bool(re.fullmatch(r"[\w.-]+", name)), f"{key}.{name}: expected letters, digits, '_', '.' and '-'."
    for name in TAKEN:
        yield name not in study.arms, f"arms.{name}: the name is taken; {' and '.join(TAKEN)} are what the arms need."
    for pair, count in Counter(f"{data}-{arm}" for data in study.data for arm in study.arms).items():
        yield count == 1, f"data set and arm are both called {pair!r} in two ways; rename one of them."
    yield from _distillation("fgd", study.fgd)


def _baseline(spec: StudySpec) -> Rules:
    known = suggestion(spec.baseline, spec.arms)
    yield spec.baseline in spec.arms, f"baseline is {spec.baseline!r}, which is no arm. {known}"


def _distillation(where: str, settings: dict[str, Any]) -> Rules:
    try:
        check_names(load_config(None, settings))
    except ConfigError as error:
        yield False, f"{where}: {error}"


def _data(where: str, data: DataSpec, spec: StudySpec) -> Rules:
    yield (data.yaml is None) != (data.scenes is None), f"{where} needs either yaml or scenes."
    yield not data.holdout or data.yaml is not None, f"{where}.holdout: the drawn set has a test split of its own."
    teacher = data.teacher
    yield (
        teacher is None or bool(teacher.weights or teacher.model),
        f"{where}.teacher needs weights, or a model to train.",
    )


def _pretrain(where: str, pretrain: PretrainSpec, spec: StudySpec) -> Rules:
    known = suggestion(pretrain.data, spec.data)
    yield pretrain.data in spec.data, f"{where}.data: no data set {pretrain.data!r}. {known}"


def _arm(where: str, arm: ArmSpec, spec: StudySpec) -> Rules:
    yield arm.kind in KINDS, f"{where}.kind is {arm.kind!r}. {suggestion(arm.kind, KINDS)}"
    yield arm.kind == "fgd" or not arm.fgd, f"{where}.fgd has no effect with kind {arm.kind}."
    yield arm.data != [], f"{where}.data is empty; expected names of data sets, or null for all."
    names = arm.data or list(spec.data)
    for name in names:
        yield name in spec.data, f"{where}.data: there is no data set {name!r}. {suggestion(name, spec.data)}"
        taught = arm.kind != "alone" and spec.data[name].compare
        yield not taught or spec.data[name].teacher is not None, f"{where} needs data.{name}.teacher."
    if arm.compute is not None:
        yield arm.epochs is None, f"{where} has both epochs and compute; expected one of them."
        yield arm.compute in spec.arms, f"{where}.compute is no arm. {suggestion(arm.compute, spec.arms)}"
        yield from _baseline(spec)
        for other in (arm.compute, spec.baseline):
            fixed = spec.arms[other].compute is None
            yield fixed, f"{where}.compute must name an arm whose epochs are given, as must the baseline."
            lacking = sorted(set(names) - set(spec.arms[other].data or spec.data))
            yield not lacking, f"{where}.compute: {other} has no run on {', '.join(lacking)}."
    if arm.kind == "fgd":
        yield from _distillation(f"{where}.fgd", arm.fgd)


RELATIONS: dict[type, Callable[[str, Any, StudySpec], Rules]] = {
    StudySpec: _study,
    DataSpec: _data,
    PretrainSpec: _pretrain,
    ArmSpec: _arm,
}
"""Section -> what has to hold between its keys, and with other sections."""


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
