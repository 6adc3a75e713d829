"""Tables, grouping and curves of several runs; the numbers are computed by hand."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from fgd_hooks.cli.main import main
from fgd_hooks.evaluation.compare import compare
from tests.evaluation.test_runs import evaluation, make_run

FGD = {"weight": 1.0, "balance": {"ratio": 1.0}, "teacher": {"name": "weights/big.pt"}}


@pytest.fixture
def runs(tmp_path):
    """Two arms: alone with seeds 0 and 1 (last mAP 30 and 34), with FGD the seeds 0 and 1 (40 and 50)."""
    make_run(tmp_path / "alone-s0", [0.20, 0.30], seed=0)
    make_run(tmp_path / "alone-s1", [0.36, 0.34], seed=1, times=[60, 240])
    make_run(tmp_path / "fgd-s0", [0.30, 0.40], seed=0, fgd=FGD)
    make_run(tmp_path / "fgd-s1", [0.30, 0.50], seed=1, fgd={**FGD, "log_interval": 7})
    return sorted(tmp_path.iterdir())


def table(result, number):
    found = result.tables()[number]
    return [dict(zip(found.headings, row, strict=True)) for row in found.rows]


def test_seeds_of_one_arm_are_averaged(runs):
    result = compare(runs)
    assert table(result, 0) == [
        {
            "arm": "alone",
            "runs": "2",
            "mAP50-95": "32.0 ± 2.8",  # 30 and 34: deviation sqrt(8)
            "mAP50": "64.0 ± 5.7",
            "best mAP50-95": "33.0 ± 4.2",  # 30 and 36
            "best epoch": "2 ± 1",  # 2 and 1: mean 1.5, deviation 0.7
            "epochs": "2",
            "minutes": "3.0 ± 1.4",  # 2 and 4
            "mAP50-95 above alone": "-",
        },
        {
            "arm": "fgd",
            "runs": "2",
            "mAP50-95": "45.0 ± 7.1",
            "mAP50": "90.0 ± 14.1",
            "best mAP50-95": "45.0 ± 7.1",
            "best epoch": "2 ± 0",
            "epochs": "2",
            "minutes": "2.0 ± 0.0",
            "mAP50-95 above alone": "+13.0 (-25.1 .. +51.1)",  # 10 and 16 at the same seeds: t(0.975, 1) * 3
        },
    ]
    assert result.differing == {"FGD": ("none", "teacher big.pt")}


def test_a_folder_given_twice_counts_once(runs):
    assert [len(arm.runs) for arm in compare([*runs, runs[0]]).arms] == [2, 2]


def test_settings_that_differ_make_arms(tmp_path):
    make_run(tmp_path / "a", [0.1], lr0=0.01, fgd=FGD)
    make_run(tmp_path / "b", [0.1], lr0=0.02, fgd={**FGD, "balance": {"ratio": 0.5}})
    make_run(tmp_path / "c", [0.1], lr0=0.02, model="nets/small.yaml")
    result = compare([tmp_path / name for name in "abc"])
    assert [arm.name for arm in result.arms] == ["a", "b", "c"]
    assert result.differing == {
        "FGD": ("teacher big.pt", "teacher big.pt", "none"),
        "fgd.balance.ratio": ("1.0", "0.5", "-"),
        "lr0": ("0.01", "0.02", "0.02"),
        "model": ("None", "None", "small.yaml"),
    }


def test_seeds_on_other_devices_and_with_a_yaml_of_their_own_are_one_arm(tmp_path):
    for seed in (0, 1):
        folder = tmp_path / f"a-s{seed}"
        make_run(folder, [0.1], seed=seed, device=str(seed), model=str(folder / "model.yaml"))
        (folder / "model.yaml").write_text("nc: 3\n")
    other = make_run(tmp_path / "b-s0", [0.1], device="0", model=str(tmp_path / "b-s0/model.yaml"))
    (other / "model.yaml").write_text("nc: 4\n")
    result = compare([tmp_path / name for name in ("a-s0", "a-s1", "b-s0")])
    assert [len(arm.runs) for arm in result.arms] == [2, 1]
    assert list(result.differing) == ["FGD", "model"] or list(result.differing) == ["model"]


def test_several_teachers_are_all_named(tmp_path):
    make_run(tmp_path / "a", [0.1], fgd=FGD)
    make_run(tmp_path / "b", [0.1], fgd={**FGD, "teachers": [{"name": "runs/one.pt"}, {"name": "two.pt"}]})
    assert compare([tmp_path / "a", tmp_path / "b"]).differing["FGD"] == ("teacher big.pt", "teacher one.pt + two.pt")


def test_unfinished_and_unknown_runs_stay_alone_and_are_said(tmp_path):
    make_run(tmp_path / "r-s0", [0.1, 0.2], seed=0, epochs=2)
    make_run(tmp_path / "r-s1", [0.1], seed=1, epochs=2)
    for seed in (0, 1):
        make_run(tmp_path / f"old-s{seed}", [0.1, 0.2], seed=seed, fgd={})
    result = compare(sorted(tmp_path.iterdir()))
    assert [len(arm.runs) for arm in result.arms] == [1, 1, 1, 1]
    notes = "\n".join(result.notes)
    assert "r-s1 is unfinished: 1 of 2 epochs" in notes
    assert "without fgd.yaml, so each stays alone: old-s0, old-s1." in notes
    assert result.differing["FGD"] == ("settings unknown", "settings unknown", "none", "none")


def test_the_same_seed_twice_is_said(tmp_path):
    for name in ("x-1", "x-2"):
        make_run(tmp_path / name, [0.1], seed=3)
    assert any("same seed (3, 3)" in note for note in compare(sorted(tmp_path.iterdir())).notes)


def test_classes_and_sizes_come_from_the_evaluations(runs):
    for folder, value in zip(runs, (0.30, 0.34, 0.40, 0.50), strict=True):
        (folder / "eval.json").write_text(json.dumps(evaluation(value, data="d.yaml", split="test", model="w/last.pt")))
    result = compare(runs)
    title = result.tables()[1].title
    assert "d.yaml test last.pt" in title
    alone, fgd = table(result, 1)
    assert alone == {
        "arm": "alone",
        "runs": "2",
        "mAP50-95": "32.0 ± 2.8",
        "mAP50": "32.0 ± 2.8",
        "small": "-",
        "medium": "32.0 ± 2.8",
        "large": "32.0 ± 2.8",
        "disc": "32.0 ± 2.8",
        "star": "-",
    }
    assert fgd["disc"] == "45.0 ± 7.1"
    assert not any("No AP by class" in note for note in result.notes)
    (runs[0] / "eval.json").write_text(json.dumps(evaluation(data="other.yaml", model="w/last.pt")))
    assert "DIFFERENT" in compare(runs).tables()[1].title


def test_figures_older_than_the_weights_are_left_out(runs, caplog):
    for folder in runs:
        (folder / "weights").mkdir(exist_ok=True)
        (folder / "weights" / "last.pt").write_bytes(b"new")
        (folder / "eval.json").write_text(json.dumps(evaluation(0.9, data="d.yaml", split="val", model="w/last.pt")))
    assert table(compare(runs), 1)[0]["mAP50-95"] == "90.0 ± 0.0"
    os.utime(runs[0] / "eval.json", (0, 0))
    assert table(compare(runs), 1)[0]["mAP50-95"] == "90.0"
    assert "eval.json is older than last.pt" in caplog.text


def test_folders_of_one_name_are_told_apart(tmp_path):
    for number, name in enumerate(("alone", "fgd", "x", "y")):
        make_run(tmp_path / name / "train", [0.1], seed=0, lr0=0.1 + number)
    result = compare([tmp_path / name / "train" for name in ("alone", "fgd", "x", "y")])
    assert [row["arm"] for row in table(result, 0)] == ["alone/train", "fgd/train", "x/train", "y/train"]


def test_markdown_and_json(runs):
    result = compare(runs)
    assert "| fgd | 2 | 45.0 ± 7.1 | 90.0 ± 14.1 |" in result.markdown()
    content = json.loads(json.dumps(result.to_dict()))
    assert [arm["label"] for arm in content["arms"]] == ["alone", "fgd"]
    first = content["arms"][1]["runs"][1]
    assert first["last"] == {"epoch": 2, "map50_95": 0.5, "map50": 1.0}
    assert first["distillation"]["fgd.balance.ratio"] == 1.0


def test_the_picture_has_a_line_per_arm(runs, tmp_path):
    compare(runs).draw(tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (np.abs(pixels - colour).max(1) < 8).sum() > 300


def test_the_command(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    names = [str(folder) for folder in runs]
    out = tmp_path / "out"
    assert main(["compare", *names, "--json", str(tmp_path / "c.json"), "--out", str(out)]) == 0
    assert "45.0 ± 7.1" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["arms"]
    assert (out / "curves.png").is_file()
    assert main(["compare", *names, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("Last epoch")
    assert main(["compare", str(tmp_path)]) == 2
    assert "is no run of Ultralytics'" in capsys.readouterr().err
    assert main(["compare", names[0], "--data", "d.yaml"]) == 2
    assert "no weights/last.pt" in capsys.readouterr().err


def test_weights_are_measured_once(teacher_file, data, tmp_path, monkeypatch):
    """A real run: the first call measures, the second one reads, and weights that are newer are measured again."""
    import fgd_hooks.evaluation.evaluate

    folder = shutil.copytree(teacher_file.parent.parent, tmp_path / "run")
    first = compare([folder], data=data)
    value = first.arms[0].runs[0].evaluation
    assert value["split"] == "val"
    assert json.loads((folder / "eval-val.json").read_text()) == json.loads(json.dumps(value))
    calls = []
    real = fgd_hooks.evaluation.evaluate.evaluate
    monkeypatch.setattr(fgd_hooks.evaluation.evaluate, "evaluate", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert compare([folder], data=data).tables() == first.tables()
    assert compare([folder]).tables() == first.tables(), "what lies there is shown without --data too"
    assert not calls
    later = (folder / "eval-val.json").stat().st_mtime + 10
    os.utime(folder / "weights" / "last.pt", (later, later))
    compare([folder], data=data)
    assert calls == [1]
