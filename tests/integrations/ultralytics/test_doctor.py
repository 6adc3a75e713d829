import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback
from fgd_hooks.cli.main import main
from fgd_hooks.config import load_config
from fgd_hooks.diagnostics.report import Finding, Report, green, red, yellow
from fgd_hooks.errors import ConfigError
from fgd_hooks.integrations.ultralytics import doctor as ultralytics_doctor
from fgd_hooks.integrations.ultralytics import monitor as ultralytics_monitor
from fgd_hooks.integrations.ultralytics import session as ultralytics_run
from fgd_hooks.integrations.ultralytics.doctor import check_quality, check_size, diagnose_training

SMALL = {"imgsz": 64, "batch": 4, "workers": 0}


@dataclass
class Measured:
    map50_95: float
    images: int = 64
    left_out: int = 0


@pytest.fixture
def maps(monkeypatch):
    """``maps(teacher=0.4, student=0.3)``: what evaluate() shall find."""

    def use(**found):
        def evaluate(model, data, **settings):
            value = found[str(model).split(".")[0]]
            if isinstance(value, Exception):
                raise value
            return Measured(value)

        monkeypatch.setattr(ultralytics_doctor, "evaluate", evaluate)

    return use


@pytest.fixture
def diagnosed(teacher_file, student_yaml, data, monkeypatch):
    """``diagnosed("weight=2", freeze=10)``: the report on the tiny models, without measuring mAP."""
    from ultralytics import YOLO

    quality = Finding("green", "teacher's mAP", "not measured")
    monkeypatch.setattr(ultralytics_doctor, "check_quality", lambda *_, **__: quality)

    def run(*overrides, teacher=teacher_file, model=student_yaml, **settings):
        config, settings = load_config(None, overrides), {**SMALL, **settings}
        return diagnose_training(YOLO(str(model)), teacher=teacher, data=str(data), config=config, settings=settings)

    return run


def test_command_on_the_users_own_data(teacher_file, student_yaml, data, tmp_path, monkeypatch, capsys):
    """All checks on real batches; the tiny teacher finds nothing yet, which is red; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    keys = [f"teacher={teacher_file}", f"model={student_yaml}", f"data={data}", "imgsz=64", "batch=4", "epochs=3"]
    weights = teacher_file.read_bytes()
    assert main(["doctor", *keys, "--json", "report.json"]) == 1
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    status = {finding["name"]: finding["status"] for finding in report["findings"]}
    assert status.pop("teacher's mAP") == "red"
    assert "teacher's mAP" in out
    assert "Mend: Train the teacher" in out
    assert set(status.values()) == {"green"}, out
    assert len(status) == 13
    start = next(finding["found"] for finding in report["findings"] if finding["name"] == "start")
    assert "parameters of the network were initialised from the teacher" in start
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert teacher_file.read_bytes() == weights


def test_exit_codes(monkeypatch, teacher_file, student_yaml, data, capsys):
    def report(status):
        finding = Finding(status, "x", "y")
        monkeypatch.setattr("fgd_hooks.cli.train.diagnose_training", lambda *_, **__: Report((finding,)))

    keys = ["doctor", f"teacher={teacher_file}", f"model={student_yaml}", f"data={data}"]
    for status, code, strict in (("green", 0, 0), ("yellow", 0, 1), ("red", 1, 1)):
        report(status)
        assert (main(keys), main([*keys, "--strict"])) == (code, strict)
    assert main(keys[:-1]) == 2
    assert "data= is missing" in capsys.readouterr().err
    assert main([*keys, "fgd.balance.ratoi=1"]) == 2
    assert "'balance.ratio'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("teacher", "student", "status", "said"),
    [
        (0.49, None, "green", "49.0"),
        (0.49, 0.41, "green", "of the student as it is 41.0"),
        (0.41, 0.49, "red", "The student is better"),
        (0.45, 0.44, "yellow", "no better than the student"),
        (0.001, 0.0, "red", "next to nothing"),
        (0.06, None, "yellow", "weak"),
        (ultralytics_doctor.DataError("80 classes"), None, "yellow", "80 classes"),
        (0.49, ultralytics_doctor.DataError("80 classes"), "green", "other classes"),
    ],
)
def test_the_teacher_against_the_student(maps, teacher, student, status, said):
    maps(teacher=teacher, student=student)
    finding = check_quality(
        "student.pt" if student is not None else None, teacher="teacher.pt", data="d.yaml", settings={}
    )
    assert finding.status == status
    assert said in finding.found
    assert bool(finding.mend) == (status != "green")


def test_the_students_own_weights_are_measured(maps, teacher_file, data):
    """A trained student is measured as well, an untrained one (yaml) is not: see the command's test."""
    from ultralytics import YOLO

    maps(**{str(teacher_file).split(".")[0]: 0.4})
    report = diagnose_training(
        YOLO(str(teacher_file)), teacher=teacher_file, data=str(data), config=load_config(), settings=dict(SMALL)
    )
    assert report.of("teacher's mAP").status == "yellow"


def test_an_untrained_teacher(diagnosed, student_yaml, data, tmp_path):
    from ultralytics import YOLO

    YOLO(str(student_yaml)).save(tmp_path / "untrained.pt")
    finding = diagnosed(teacher=tmp_path / "untrained.pt").of("teacher's features")
    assert finding.status == "red"


def test_where_the_student_begins(diagnosed, teacher_file):
    for overrides, model, status, words in (
        (["inherit="], None, "green", "the weights that it has"),
        (["inherit=neck"], None, "yellow", "nothing of the neck was initialised from the teacher"),
        (["inherit=auto"], teacher_file.with_name("best.pt"), "green", "the weights that it has"),
    ):
        report = diagnosed(*overrides, **({"model": model} if model else {}))
        (finding,) = [finding for finding in report.findings if finding.name == "start"]
        assert (finding.status, words in finding.found) == (status, True), str(finding)


@pytest.mark.slow
def test_a_frozen_student(diagnosed):
    assert diagnosed(freeze=10).of("gradient").status == "green", "the neck still learns"
    finding = diagnosed(freeze=23).of("gradient")
    assert finding.status == "red"
    assert "freeze=" in finding.mend


@pytest.mark.slow
def test_fixed_weights_that_are_absurd(diagnosed):
    finding = diagnosed("balance.mode=fixed", "weight=1e6").of("loss scale")
    assert finding.status == "red"
    assert "balance.mode=gradient" in finding.mend


def test_boxes_in_the_wrong_unit(diagnosed, monkeypatch):
    own = ultralytics_run.boxes_of

    def wrong(batch):
        return own({**batch, "bboxes": batch["bboxes"] / batch["img"].shape[-1]})

    monkeypatch.setattr(ultralytics_run, "boxes_of", wrong)
    assert diagnosed().of("masks").status == "red"


def test_a_teacher_without_common_levels(diagnosed, monkeypatch):
    class Shallow(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, 2, 1)
            self.down = nn.Conv2d(4, 4, 3, 2, 1)

        def forward(self, images):
            first = self.stem(images)
            return [first, self.down(first)]

    shallow = Shallow()
    monkeypatch.setattr(ultralytics_doctor, "load_teachers", lambda *_, **__: [shallow])
    report = diagnosed("inherit=null", "teacher.fuse=false")
    assert report.of("levels").status == "red"
    assert "no feature level of the same stride" in report.of("levels").found


def test_a_misspelt_setting_of_the_host(diagnosed):
    with pytest.raises(ConfigError, match="epchs"):
        diagnosed(epchs=3)
    with pytest.raises(ConfigError, match="resume"):
        diagnosed(resume=True)


# what the callback says at the start of each training


@pytest.fixture
def said(caplog):
    """``said()``: the lines of ours in the host's log, which does not propagate."""
    from ultralytics.utils import LOGGER

    LOGGER.addHandler(caplog.handler)
    # the host puts a word and a sign before its warnings
    yield lambda: [text[text.index("FGD: ") :] for r in caplog.records if "FGD: " in (text := r.getMessage())]
    LOGGER.removeHandler(caplog.handler)


def test_a_training_says_what_it_distils_and_that_all_is_well(train, teacher_file, said):
    train(FGDCallback(teacher_file))
    cost = [line for line in said() if "GFLOPs" in line]
    assert len(cost) == 1
    assert "a step of 4 images of 64x64" in cost[0]
    assert sum("the first distilling step is well" in line for line in said()) == 1
    assert not any("Mend: " in line for line in said())


def test_a_training_says_what_is_not_well(train, teacher_file, said, monkeypatch):
    """Boxes that have shrunk to fractions of a pixel, in every batch."""
    own = ultralytics_run.boxes_of

    def wrong(batch):
        return own({**batch, "bboxes": batch["bboxes"] / 64})

    monkeypatch.setattr(ultralytics_run, "boxes_of", wrong)
    train(FGDCallback(teacher_file))
    found = [line for line in said() if line.startswith("FGD: red: masks: ")]
    assert len(found) == 1
    assert "Mend: " in found[0]


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"nbs": 16}, marks=pytest.mark.slow)], ids=["each step", "accumulated"]
)
def test_the_short_form_changes_nothing(train, teacher_file, monkeypatch, settings):
    """The weights after two epochs are the same bit for bit with and without what is said at the start."""
    said = train(FGDCallback(teacher_file), name="said", epochs=2, **settings).trainer.model.state_dict()
    monkeypatch.setattr(ultralytics_monitor.TrainingMonitor, "announce", lambda *_: None)
    monkeypatch.setattr(ultralytics_monitor.TrainingMonitor, "look", lambda *_: None)
    silent = train(FGDCallback(teacher_file), name="silent", epochs=2, **settings).trainer.model.state_dict()
    assert all(torch.equal(value, silent[name]) for name, value in said.items())


def test_the_short_report_shows_what_is_not_green_and_names_the_rest():
    made = (green("taps", "well"), yellow("start", "odd", "look"), green("cost", "low"), red("parts", "none", "mend"))
    short = Report(made).short()
    assert [finding.name for finding in short.findings] == ["parts", "start", "well"]
    assert short.findings[-1].found.startswith("taps, cost (--verbose")
    assert Report(made[1:2]).short().findings == made[1:2]


@pytest.mark.parametrize(("trained", "given", "said"), [(192, None, True), (192, 192, False), (640, 640, False)])
def test_a_teacher_of_another_image_size_is_noted(trained, given, said):
    teacher = torch.nn.Linear(1, 1)
    teacher.args = {"imgsz": trained}
    found = check_size("big.pt", teacher, given)
    assert (found is not None and f"imgsz={trained}" in found.mend) == said
