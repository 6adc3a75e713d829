import shutil

import pytest

pytest.importorskip("ultralytics")

from fgd_hooks import Distiller, FGDCallback
from fgd_hooks.cli.main import main
from fgd_hooks.cli.show import show
from fgd_hooks.diagnostics.attention import attention_distances, attention_sheets
from fgd_hooks.errors import CheckpointError
from fgd_hooks.evaluation.dataset import load_sample
from fgd_hooks.evaluation.readers import read_data
from fgd_hooks.integrations.ultralytics.teacher import fused, load_teacher
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT, read_checkpoint, write_checkpoint
from tests.conftest import SETTINGS


@pytest.fixture(scope="module")
def run(teacher_file, student_yaml, data, tmp_path_factory):
    """The weights folder of a tiny student that was trained with its teacher."""
    from ultralytics import YOLO

    folder = tmp_path_factory.mktemp("show")
    yolo = YOLO(str(student_yaml))
    FGDCallback(teacher_file, adapter="mlp").attach(yolo)
    yolo.train(**{**SETTINGS, "data": str(data), "project": str(folder), "name": "run", "epochs": 1})
    return folder / "run" / "weights"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick(monkeypatch):
    """Empty pictures: drawing is tested in test_visualize.py."""
    from matplotlib.figure import Figure

    monkeypatch.setattr("fgd_hooks.diagnostics.plots.draw_sheet", lambda sheet, **settings: Figure((1, 1)))


def expected_distances(run, teacher_file, data, count):
    """With everything that the training saved, put together by hand."""
    from ultralytics import YOLO

    student = YOLO(str(run / "last.pt")).model.float()
    images = read_data(data).images[:count]
    with Distiller(student, teacher=fused(load_teacher(teacher_file)), config={"adapter": "mlp"}) as distiller:
        distiller.load_training_state(read_checkpoint(run / LAST_CHECKPOINT)["distiller"])
        sheets = []
        for image in images:
            pixels, boxes = load_sample(image, 64)
            sheets += attention_sheets(distiller, student, pixels[None], [boxes])
    return attention_distances(sheets)


def test_the_command_draws_each_image_and_level(run, teacher_file, data, tmp_path, capsys):
    arguments = [f"student={run / 'last.pt'}", f"teacher={teacher_file}", f"data={data}", "images=1", "out=pictures"]
    assert main(["show", *arguments, "fgd.levels=[P3,P5]"]) == 0
    files = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert len(files) == 3
    assert sorted({name.rpartition("_")[2] for name in files}) == ["P3.png", "P5.png", "detections.png"]
    out = capsys.readouterr().out
    assert "last.fgd.safetensors" in out
    assert "P3: attention distance" in out


def test_adapters_come_from_the_side_file(run, teacher_file, data, quick):
    shown = show(run / "last.pt", teacher_file, data, images=4)
    assert shown.adapted
    assert len(shown.files) == 12
    assert shown.distances == pytest.approx(expected_distances(run, teacher_file, data, 4), rel=1e-4)
    again = show(run / "best.pt" if (run / "best.pt").exists() else run / "last.pt", teacher_file, data, images=1)
    assert LAST_CHECKPOINT in again.adapters


def test_without_a_side_file_it_says_so(run, teacher_file, data, tmp_path, capsys, quick):
    shutil.copy(run / "last.pt", tmp_path / "alone.pt")
    arguments = ["student=alone.pt", f"teacher={teacher_file}", f"data={data}", "images=1", "fgd.adapter=auto"]
    assert main(["show", *arguments]) == 0
    out = capsys.readouterr().out
    assert "no trained adapters" in out
    assert "attention distance" not in out, "it would compare what has no common unit"


def test_a_side_file_of_other_models_is_refused(run, teacher_file, data, tmp_path):
    shutil.copy(run / "last.pt", tmp_path / "last.pt")
    content = read_checkpoint(run / LAST_CHECKPOINT)
    content["distiller"]["levels"] = [each.replace("channels", "Kanäle") for each in content["distiller"]["levels"]]
    write_checkpoint(tmp_path / LAST_CHECKPOINT, content)
    with pytest.raises(CheckpointError, match=r"last\.fgd\.safetensors holds adapters for"):
        show("last.pt", teacher_file, data, images=1)


def test_what_the_student_found_before_its_training_is_drawn_too(run, teacher_file, data, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("fgd_hooks.cli.show.save_detections", lambda image, found, file: drawn.append(found) or file)
    monkeypatch.setattr("fgd_hooks.cli.show.save_sheets", lambda sheets, out, top: [])
    show(run / "last.pt", teacher_file, data, images=1, before=teacher_file)
    (found,) = drawn
    assert list(found) == ["teacher", "student before", "student"]
    assert found["teacher"] == found["student before"]


@pytest.mark.slow
def test_images_by_name(run, teacher_file, data, tmp_path, quick, caplog):
    file = read_data(data).images[0].file
    common = {"teacher": teacher_file, "imgsz": 64}
    with_boxes = show(run / "last.pt", data=data, images=[file], out="one", **common)
    assert [each.name for each in with_boxes.files] == [f"{file.stem}_{level}.png" for level in ("P3", "P4", "P5")]
    (tmp_path / "mine").mkdir()
    for name in "ab":
        shutil.copy(file, tmp_path / "mine" / f"{name}{file.suffix}")
    unlabelled = show(run / "last.pt", images=f"mine,{file}", out="more", **common)
    assert [each.name[0] for each in unlabelled.files[::3]] == ["a", "b", file.stem[0]]
    for name in "cde":
        shutil.copy(file, tmp_path / "mine" / f"{name}{file.suffix}")
    many = show(run, images="mine", out="many", **common)
    assert [each.name for each in many.detections] == [f"{name}_detections.png" for name in "abcd"]
    assert "the first 4 of 5 images" in caplog.text
    assert unlabelled.distances["P3"] == pytest.approx(with_boxes.distances["P3"]), "three times the same image"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "teacher= is missing"),
        ({"student": None}, "student= is missing"),
        ({"data": None}, "data= is missing"),
        ({"imgzs": "64"}, "'imgsz'"),
        ({"images": "0"}, "images is 0"),
        ({"images": "nowhere.jpg"}, "nowhere.jpg"),
        ({"student": "nowhere.pt"}, "nowhere.pt"),
        ({"fgd.levles": "[P3]"}, "'levels'"),
        ({"split": "tset"}, "tset"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_mistakes_are_named(run, teacher_file, data, changes, message, capsys):
    settings = {"student": run / "last.pt", "teacher": teacher_file, "data": data, **changes}
    assert main(["show", *(f"{key}={value}" for key, value in settings.items() if value)]) == 2
    assert message in capsys.readouterr().err
