"""Which trainings a study consists of: names and keys of the runs, what they need, and what is done already.

A run's key is a hash of everything that shapes its result, and is the end of its folder's name: a run with the same key
is the same run, in whatever study and under whatever name of an arm, and changed settings are another run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fgd_hooks.config import config_to_dict, load_config
from fgd_hooks.errors import StudyError
from fgd_hooks.evaluation.arms import TAKEN
from fgd_hooks.study.data import Prepared, find_file, prepare, read_source
from fgd_hooks.study.spec import SETTINGS, ArmSpec, PretrainSpec, StudentSpec, StudySpec
from fgd_hooks.utils.files import read_json

logger = logging.getLogger("fgd_hooks")

RESULT, TEST = "result.json", "test.json"


@dataclass(frozen=True, eq=False)
class Run:
    """One training, or one teacher that is given and only measured."""

    data: str  # name of the data set
    arm: str  # its name; "teacher" and "pretrain" for what the arms need
    kind: str  # of the arm, or "teacher" or "pretrain"
    seed: int
    epochs: int  # 0 for a teacher that is given
    student: str  # what the model is called
    model: str  # model yaml (a file or a name), or weights
    scale: tuple[float, ...] | None  # depth, width and most channels instead of the yaml's
    settings: dict[str, Any]  # Ultralytics' settings
    fgd: dict[str, Any]  # settings of the distillation that differ from the defaults
    prepared: Prepared  # the images
    out: Path  # the folder of all runs
    teacher: Run | None = None  # the run that gives the teacher
    start: Run | None = None  # the run whose last weights this one starts from
    plugins: tuple[str, ...] = ()  # Python files that register what the distillation's settings name
    key: str = field(init=False)  # see above

    def __post_init__(self) -> None:
        model = Path(self.model)
        content = {
            "kind": "alone" if self.kind in TAKEN and self.epochs else self.kind,
            "seed": self.seed,
            "epochs": self.epochs,
            "model": hashlib.sha256(model.read_bytes()).hexdigest() if model.is_file() else self.model,
            "scale": self.scale,
            "settings": self.settings,
            "fgd": _settings(self.fgd) if self.kind == "fgd" else {},
            "data": self.prepared.key,
            "teacher": self.teacher.key if self.teacher else None,
            "start": self.start.key if self.start else None,
        }
        text = json.dumps(content, sort_keys=True, default=str)
        object.__setattr__(self, "key", hashlib.sha256(text.encode()).hexdigest()[:10])

    @property
    def name(self) -> str:
        """The folder's name when this run makes it."""
        return f"{self.data}-{self.arm}-s{self.seed}-{self.key}"

    @property
    def folder(self) -> Path:
        """Where the run lies: an existing folder with the same key, whatever it is called, or one of its own."""
        present = sorted(path for path in self.out.glob(f"*-s{self.seed}-{self.key}") if path.is_dir())
        done = [path for path in present if read_result(path) is not None]
        return (done or present or [self.out / self.name])[0]

    @property
    def weights(self) -> Path:
        """The weights that the run leaves, or that are given."""
        return self.folder / "weights" / "last.pt" if self.epochs else Path(self.model)

    @property
    def needs(self) -> tuple[Run, ...]:
        """The runs that must be done before."""
        return tuple(run for run in (self.teacher, self.start) if run is not None)

    def job(self, **machine: Any) -> dict[str, Any]:
        """What a process has to know to do the run, as plain values."""
        files = {"model": self.model, "data_yaml": str(self.prepared.yaml), "weights": str(self.weights)}
        given = {name: str(run.weights) for name in ("teacher", "start") if (run := getattr(self, name))}
        kept = ("key", "name", "data", "student", "arm", "kind", "seed", "epochs", "scale", "settings", "fgd")
        return {
            **{name: getattr(self, name) for name in kept},
            "images": self.prepared.counts,
            "needs": [need.name for need in self.needs],
            "machine": {**files, **given, "plugins": list(self.plugins), **machine},
        }

    def result(self) -> dict[str, Any] | None:
        """What the finished run found; None while it is not finished."""
        return read_result(self.folder)

    def test(self) -> dict[str, Any] | None:
        """The figures on the test split; None while they were not measured."""
        file = self.folder / TEST
        return read_json(file) if file.is_file() else None


def _settings(fgd: dict[str, Any]) -> dict[str, Any]:
    """All settings of a distillation: a default that a later version changes, or that is written out, counts, too."""
    found = config_to_dict(load_config(fgd))
    found |= {key: value for key, value in fgd.items() if found.get(key) == value}  # 0 is not written 0.0
    return _under_first_names(found)


FIRST_NAMES = {"interval": "every", "start": "start_epoch", "stop": "stop_epoch"}
"""What settings were called when the first runs were made: keys are built with these names, so that they stay."""


def _under_first_names(found: dict[str, Any]) -> dict[str, Any]:
    schedule = {FIRST_NAMES.get(key, key): value for key, value in found["schedule"].items()}
    return {FIRST_NAMES.get(key, key): value for key, value in found.items()} | {"schedule": schedule}


def read_result(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder found; None while it is not finished, or where the file is damaged, which is said."""
    file = folder / RESULT
    try:
        return read_json(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        _say_damaged(file, str(error))
        return None


@functools.cache  # waiting runs are asked every half second
def _say_damaged(file: Path, error: str) -> None:
    logger.warning("%s is damaged (%s); the run counts as unfinished and will be done again.", file, error)


@dataclass(frozen=True)
class Plan:
    """The runs of a study."""

    runs: tuple[Run, ...]  # in an order in which each comes after what it needs
    waiting: tuple[str, ...]  # arms whose epochs follow from runs that are not finished, with what they wait for


@dataclass
class Planner:
    """Makes the plan of a study.

    Args:
        spec: the study.
        file: the study's file.
        out: folder of runs and laid-out data; studies that share it share runs.
        root: where the study's data sets are looked for.
    """

    spec: StudySpec
    file: Path
    out: Path
    root: Path | None = None
    _data: dict[tuple[str, bool], Prepared] = field(default_factory=dict)

    def plan(
        self, only: Sequence[str] | None = None, data: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> Plan:
        """The runs of some arms, data sets and seeds, or of all."""
        runs: dict[str, Run] = {}
        waiting: list[str] = []
        # one seed of all arms first: a study that is stopped early has whole comparisons
        for seed in self.spec.seeds if seeds is None else seeds:
            for name in [each for each in self.spec.data if data is None or each in data]:
                for arm_name, arm in self._arms(name):
                    if only is not None and arm_name not in only:
                        continue
                    epochs = self.epochs(name, arm)
                    if epochs is None:
                        text = f"{name}, {arm_name}: its epochs follow from the CPU seconds of {arm.compute}"
                        waiting += [text] if text not in waiting else []
                        for other in (self.spec.baseline, str(arm.compute)):
                            for each in self.spec.seeds:
                                self._add(runs, self.run(name, other, each))
                    else:
                        self._add(runs, self.run(name, arm_name, seed, epochs))
                if only is None and (teacher := self.teacher(name)) is not None and self.spec.data[name].compare:
                    self._add(runs, teacher)
        return Plan(tuple(runs.values()), tuple(waiting))

    def epochs(self, name: str, arm: ArmSpec) -> int | None:
        """How long an arm trains; None where that follows from runs that are not finished."""
        data = self.spec.data[name]
        common = data.epochs or self.spec.epochs
        if data.keep_steps:
            common = round(common / data.fraction)
        if arm.compute is None:
            return arm.epochs or common
        quickest: list[dict[str, float]] = []
        for other in (arm.compute, self.spec.baseline):
            found = [self.run(name, other, seed).result() for seed in self.spec.seeds]
            if not all(found):
                return None
            # other programs only ever slow a run down, so the quickest seed is nearest to the cost
            quickest.append({})
            for each in found:
                if each:
                    device, seconds = str(each.get("device")), float(each["cpu_s"]) / int(each["epochs"])
                    quickest[-1][device] = min(seconds, quickest[-1].get(device, seconds))
        shared = [device for device in quickest[0] if device in quickest[1]]
        if not shared:
            one, other = (", ".join(devices) for devices in quickest)
            raise StudyError(
                f"{name}: {arm.compute} ran on {one}, {self.spec.baseline} on {other}; their seconds "
                "cannot be compared. Run a seed of both on one, or give the arm its epochs."
            )
        costs = [seconds[shared[0]] for seconds in quickest]
        if min(costs) <= 0:
            raise StudyError(f"{name}: a run of {arm.compute} or {self.spec.baseline} took no CPU time; remove it.")
        length = self.epochs(name, self.spec.arms[arm.compute])
        return None if length is None else max(1, round(length * costs[0] / costs[1]))

    def run(self, name: str, arm_name: str, seed: int, epochs: int | None = None) -> Run:
        """The run of one arm."""
        data, arm = self.spec.data[name], self.spec.arms[arm_name]
        student = data.student or self.spec.student
        return self._make(
            name,
            arm_name,
            student,
            seed,
            epochs or self.epochs(name, arm) or 1,
            arm.train,
            kind=arm.kind,
            fgd=arm.fgd,
            teacher=self.teacher(name) if arm.kind != "alone" else None,
            start=self._pretrained(student, student.pretrain) if student.pretrain else None,
        )

    def teacher(self, name: str) -> Run | None:
        """The run that gives a data set's teacher: a training, or the measuring of weights that are given."""
        teacher = self.spec.data[name].teacher
        if teacher is None:
            return None
        if teacher.weights and (given := find_file(teacher.weights, self.root, self.file.parent)).is_file():
            return self._make(name, "teacher", StudentSpec(str(given)), 0, 0, teacher.train, whole=True)
        if teacher.model is None:
            raise StudyError(
                f"data.{name}.teacher.weights: {teacher.weights!r} is neither below the data root "
                f"({self.root or 'not given'}) nor beside the study file, and there is no model to train."
            )
        model = StudentSpec(teacher.model, teacher.scale)
        return self._make(name, "teacher", model, teacher.seed, teacher.epochs, teacher.train, whole=True)

    def _pretrained(self, student: StudentSpec, wanted: PretrainSpec) -> Run:
        return self._make(wanted.data, "pretrain", student, wanted.seed, wanted.epochs, {})

    def _make(
        self,
        name: str,
        arm: str,
        model: StudentSpec,
        seed: int,
        epochs: int,
        train: dict[str, Any],
        *,
        kind: str | None = None,
        fgd: dict[str, Any] | None = None,
        whole: bool = False,
        **needs: Run | None,
    ) -> Run:
        """A run; ``train`` is what it trains with beside the settings of the study and of its data set."""
        return Run(
            data=name,
            arm=arm,
            kind=kind or arm,
            seed=seed,
            epochs=epochs,
            student=model.name or Path(model.model).stem,
            model=self.model(model.model),
            scale=tuple(model.scale) if model.scale else None,
            settings={**SETTINGS, **self.spec.train, **self.spec.data[name].train, **train},
            fgd=fgd or {},
            prepared=self.prepared(name, whole),
            out=self.out,
            plugins=tuple(self.spec.plugins),
            **needs,
        )

    def prepared(self, name: str, whole: bool = False) -> Prepared:
        """The images of a data set; ``whole``: without the fraction."""
        spec = self.spec.data[name]
        whole = whole or spec.fraction == 1  # the same images: they are looked at once
        if (name, whole) not in self._data:
            source = read_source(name, spec, self.root, self.file.parent, self.out / "data")
            fraction = 1.0 if whole else spec.fraction
            stem = "scenes" if spec.yaml is None else Path(spec.yaml).parent.name or Path(spec.yaml).stem
            # links are named by what they hold, so sets that differ in the fraction alone share the whole one
            self._data[name, whole] = prepare(stem, source, self.out / "data", fraction, spec.subset_seed)
        return self._data[name, whole]

    def model(self, text: str) -> str:
        """A model file by its whole path; a name of Ultralytics' own as it is."""
        file = find_file(text, self.root, self.file.parent)
        return str(file) if file.is_file() else text

    def _arms(self, name: str) -> list[tuple[str, ArmSpec]]:
        chosen = self.spec.arms.items() if self.spec.data[name].compare else ()
        return [(each, arm) for each, arm in chosen if arm.data is None or name in arm.data]

    def _add(self, runs: dict[str, Run], run: Run) -> None:
        for each in (*run.needs, run):
            runs.setdefault(f"{each.data} {each.arm} {each.seed} {each.key}", each)
