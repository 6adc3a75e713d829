"""The programs' command lines: help, and mistakes in one line."""

import runpy
import sys

import pytest

from tests.trainers.conftest import ROOT

NEEDS = {"yolo": "ultralytics", "torchvision_detector": "torchvision", "timm_detector": "timm"}


@pytest.fixture(params=NEEDS)
def run(request, monkeypatch, capsys):
    """Runs a program; returns its exit code and what it printed on both streams."""
    pytest.importorskip(NEEDS[request.param])

    def program(*arguments):
        monkeypatch.setattr(sys, "argv", [f"{request.param}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "trainers" / f"{request.param}.py"), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    program.name = request.param
    return program


def test_help(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert f"python trainers/{run.name}.py" in out and "show this help message" in out


def test_nothing_given(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "the following arguments are required" in err


def test_a_file_that_is_missing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("nowhere.yaml", *(["teacher.pt", "data.yaml"] if run.name == "yolo" else []))
    assert code == 2
    assert "nowhere.yaml" in err.splitlines()[-1] and "Traceback" not in err


def test_a_setting_that_is_unknown(run, tmp_path):
    if run.name == "yolo":
        pytest.skip("it has none")
    (tmp_path / "settings.yaml").write_text("train: alone\n")
    code, out, err = run(str(tmp_path / "settings.yaml"), "epochss=3")
    assert (code, out) == (2, "")
    assert err == f"{run.name}.py: error: overrides: there is no key epochss. Did you mean 'epochs'?\n"
