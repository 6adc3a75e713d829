import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("ultralytics")

import fgd_hooks
from fgd_hooks.cli.main import COMMANDS, main
from fgd_hooks.config import load_config


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")


def fails(capsys, *arguments):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) >= 1
    return captured.err


def run(*arguments, missing=(), **environment):
    """``python -m fgd_hooks`` in a process of its own, without some packages; its output ends with what it imported."""
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({list(missing)!r})); sys.argv = {['fgd', *arguments]!r}\n"
        "try:\n    runpy.run_module('fgd_hooks', run_name='__main__')\n"
        "finally:\n    print(*(name for name in ('torch', 'numpy', 'ultralytics') if sys.modules.get(name)))"
    )
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "quickstart"),
        (["--version"], fgd_hooks.__version__),
        (["train", "--help"], "fgd.balance.ratio"),
        (["compare", "--help"], "curves.png"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_help_and_version_import_nothing_heavy(arguments, shown):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert done.stdout.splitlines()[-1] == "", "torch is imported only where it is needed"


@pytest.mark.parametrize(
    ("arguments", "missing", "extra"),
    [
        (["train", "teacher=t.pt", "model=m.yaml"], "ultralytics", "ultralytics"),
        (["show", "student=s.pt", "teacher=t.pt"], "PIL", "ultralytics"),
        (["eval", "m.pt", "data=d.yaml"], "rich", "ultralytics"),
        (["compare", "run"], "rich", "eval"),
        (["levels", "yolo26n.yaml"], "ultralytics", "ultralytics"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_a_missing_package_is_one_line_with_the_command(arguments, missing, extra):
    done = run(*arguments, missing=[missing])
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line == (
        f'fgd {arguments[0]}: The package {missing} is not installed; install it with: pip install "fgd-hooks[{extra}]"'
    )


def test_another_missing_package_is_no_matter_of_extras(monkeypatch):
    def of_the_users_own(arguments):
        raise ModuleNotFoundError("No module named 'mine'", name="mine")

    monkeypatch.setattr("fgd_hooks.cli.levels.levels_command", of_the_users_own)
    with pytest.raises(ModuleNotFoundError, match="mine"):
        main(["levels", "mine:model"])


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_says_how_to_go_on(name, monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    module, _, function = COMMANDS[name].run.partition(":")
    monkeypatch.setattr(f"fgd_hooks.cli.{module}.{function}", interrupted)
    assert main([name, *(["x"] if name in ("levels", "eval", "compare", "study") else [])]) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"fgd {name}: interrupted; {COMMANDS[name].again}."


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("fgd qui", "quickstart "), ("fgd study s.yaml --clu", "--cluster ")],
    ids=["word", "option"],
)
def test_the_shell_completes_words_and_options(typed, offered, tmp_path):
    pytest.importorskip("argcomplete")
    variables = {"_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "_ARGCOMPLETE_IFS": "\n"}
    run(**variables, _ARGCOMPLETE_STDOUT_FILENAME=str(tmp_path / "offered"))
    assert (tmp_path / "offered").read_text().splitlines() == [offered]


def test_levels_of_one_model(capsys):
    assert main(["levels", "yolo26n.yaml"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "model.23" in line]
    found = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert found == [
        ["P3", "8", "64", "80x80", "model.23:input[0]"],
        ["P4", "16", "128", "40x40", "model.23:input[1]"],
        ["P5", "32", "256", "20x20", "model.23:input[2]"],
    ]


def test_levels_of_a_pair(capsys):
    assert main(["levels", "yolo26n.yaml", "yolo26-p2.yaml", "--imgsz", "320"]) == 0
    out = capsys.readouterr().out
    assert "not distilled" in next(line for line in out.splitlines() if "P2" in line and "│" in line)
    assert "conv1x1" not in next(line for line in out.splitlines() if "│ P3" in line), "equal channels"


def test_levels_without_a_common_one_and_of_a_missing_file(capsys):
    assert "nowhere.pt" in fails(capsys, "levels", "nowhere.pt")


def test_levels_of_a_python_path(capsys):
    assert main(["levels", "tests.helpers.tiny:TinyDetector", "yolo26n.yaml", "--imgsz", "64"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "model.23" in line]
    found = [[cell.strip() for cell in line.split("│")[1:5]] for line in lines]
    assert found == [["P3", "8", "8", "64"], ["P4", "16", "12", "128"], ["P5", "32", "16", "256"]]
    assert "'TinyDetector'" in fails(capsys, "levels", "tests.helpers.tiny:TinyDetecter")
    assert "no multiple" in fails(capsys, "levels", "tests.helpers.tiny:TinyDetector", "--imgsz", "100")


def test_train_asks_for_what_is_missing(capsys):
    assert "teacher= is missing" in fails(capsys, "train", "model=yolo26n.yaml")
    assert "model= is missing" in fails(capsys, "train", "teacher=t.pt")
    assert "data= is missing" in fails(capsys, "train", "teacher=t.pt", "model=yolo26n.yaml")
    assert "key=value" in fails(capsys, "train", "teacher")
    assert "twice" in fails(capsys, "train", "teacher=a.pt", "teacher=b.pt")


def test_train_names_a_misspelt_key_of_ours(capsys):
    message = fails(capsys, "train", "teacher=t.pt", "model=yolo26n.yaml", "data=d.yaml", "fgd.balance.ratoi=1")
    assert "balance.ratoi" in message
    assert "'balance.ratio'" in message


def test_train_names_missing_files(capsys):
    common = ["train", "teacher=t.pt", "model=yolo26n.yaml"]
    assert "nowhere.yaml" in fails(capsys, *common, "data=nowhere.yaml")
    assert "mine.yaml" in fails(capsys, *common, "data=coco8.yaml", "config=mine.yaml")
    assert "t.pt" in fails(capsys, *common, "data=coco8.yaml")


def test_eval_asks_for_data_and_names_a_misspelt_key(capsys):
    assert "data= is missing" in fails(capsys, "eval", "m.pt")
    assert "'split'" in fails(capsys, "eval", "m.pt", "data=d.yaml", "splitt=val")


def test_no_command_prints_the_usage(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "quickstart" in capsys.readouterr().err


def test_train_resume_and_eval_of_a_real_run(teacher_file, student_yaml, data, tmp_path, capsys, monkeypatch):
    arguments = [
        "train",
        f"teacher={teacher_file}",
        f"model={student_yaml}",
        f"data={data}",
        "epochs=2",
        "imgsz=64",
        "batch=4",
        "workers=0",
        "plots=False",
        "device=cpu",
        f"project={tmp_path}",
        "name=run [v1]",
        "fgd.balance.ratio=2",
    ]

    def interrupted(session):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fgd_hooks.integrations.ultralytics.session.TrainingSession.on_fit_epoch_end", interrupted)
        assert main(arguments) == 130
    run = tmp_path / "run [v1]"
    assert capsys.readouterr().err.endswith(f"to go on: fgd train model='{run}' resume=True.\n")
    assert main(["train", f"model={run}", "resume=True"]) == 0
    out = capsys.readouterr().out
    assert "The student's mAP50-95 on val: " in out and "(last, epoch 2)" in out
    assert f"fgd eval '{run}' data={data}" in out
    assert load_config(run / "fgd.yaml").balance.ratio == 2, "the settings that the run was begun with"
    assert "finished, so there is nothing to resume" in fails(capsys, "train", f"model={run}", "resume=True")
    last = run / "weights" / "last.pt"
    assert last.with_suffix(".fgd.safetensors").is_file()
    header, *epochs = (run / "results.csv").read_text().splitlines()
    assert [line.count(",") for line in epochs] == [header.count(",")] * 2
    assert "train/fgd_fg" in header
    capsys.readouterr()
    assert main(["eval", f"model={run}", f"data={data}", "imgsz=64", "--json", "metrics.json"]) == 0
    out = capsys.readouterr().out
    assert "mAP50-95" in out and "run [v1]" in out.replace("\n", "")
    assert 0 <= json.loads((tmp_path / "metrics.json").read_text())["map50_95"] <= 1


def test_train_passes_unknown_keys_on_to_ultralytics(teacher_file, student_yaml, data, capsys):
    message = fails(capsys, "train", f"teacher={teacher_file}", f"model={student_yaml}", f"data={data}", "epchs=1")
    assert "epchs" in message
    assert "epochs" in message
