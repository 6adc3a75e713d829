"""One dialect for all commands, and one line for whatever a user can get wrong."""

import json
import re

import pytest

pytest.importorskip("ultralytics")

from fgd_hooks.cli.main import COMMANDS, as_arguments, main
from fgd_hooks.cli.settings import split_settings
from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.utils.structured_config import known_keys

TRAIN = "train teacher=t.pt model=yolo26n.yaml data=coco8.yaml"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "t.pt").write_bytes(b"no weights")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trian", "Did you mean 'train'"),
        ("zzz", "Known are: train, doctor"),
        ("train teacher=t.pt model=yolo26n.yaml", "data= is missing"),
        (f"{TRAIN} epoch=2", "Did you mean 'epochs'"),
        (f"{TRAIN} balance.ratio=0.5", "Did you mean 'fgd.balance.ratio'?"),
        (f"{TRAIN} qqqq=1", "None of the"),
        (f"{TRAIN} epochs=two", "'epochs' must be an int|int"),
        (f"{TRAIN} epochs=", "epochs= has no value"),
        (f"{TRAIN} epochs=0", "epochs"),
        (f"{TRAIN} imgsz=big", "imgsz is 'big'; expected a whole number"),
        (f"{TRAIN} imgsz=-3", "imgsz is -3"),
        (f"{TRAIN} batch=0", "batch is 0"),
        (f"{TRAIN} lr0=fast", "lr0"),
        (f"{TRAIN} device=99", "device=99 is not there: torch sees"),
        (f"{TRAIN} device=gpu", "device=gpu is no device"),
        (f"{TRAIN} fgd.levels=", "has no value"),
        (f"{TRAIN} fgd.weight=x", "expected float"),
        (f"{TRAIN} config=empty", "'empty' does not exist"),
        (f"{TRAIN} --weight=2", "--weight"),
        (f"{TRAIN} resume", "expected key=value"),
        (TRAIN, "'t.pt' is no Ultralytics checkpoint"),
        ("train teacher=empty model=yolo26n.yaml data=coco8.yaml", "no weights/last.pt"),
        ("train teacher=t.pt model=empty data=coco8.yaml", "no weights/last.pt"),
        ("train teacher=t.pt model=t.pt data=coco8.yaml", "'t.pt' is no model"),
        ("train teacher=t.pt model=yolo26n.yaml data=a.json", "a YOLO training takes a data yaml"),
        ("train resume=True", "model= is missing"),
        ("train model=empty resume=True", "no weights/last.pt"),
        ("doctor teacher=t.pt model=yolo26n.yaml", "data= is missing"),
        ("levels", "model= is missing"),
        ("levels teacher=yolo26n.yaml", "model= is missing"),
        ("levels yolo26n.yaml imgsz=abc", "'abc'"),
        ("levels yolo26n.yaml imgzs=64", "Did you mean 'imgsz'"),
        ("levels a b c", "unrecognized arguments: c"),
        ("levels empty", "no weights/last.pt"),
        ("eval t.pt data=a.json", "'t.pt'|a.json"),
        ("eval t.pt data=empty", "expected one data yaml in it"),
        ("eval t.pt data=d.yaml imgsz=abc", "imgsz is 'abc'"),
        ("eval t.pt data=d.yaml conf=7", "conf"),
        ("eval t.pt data=d.yaml batch=2.5", "batch is 2.5; expected int"),
        ("eval t.pt data=d.yaml match=foo", "expected name or order"),
        ("eval t.pt data=d.yaml limit=x", "limit is 'x'"),
        ("eval t.pt other data=d.yaml", "'other' cannot be read"),
        ("eval t.pt data=d.yaml --json", "--json"),
        ("show student=t.pt teacher=t.pt top=x", "top is 'x'; expected int"),
        ("show student=empty teacher=t.pt", "no weights/last.pt"),
        ("compare empty", "no run of Ultralytics"),
        ("compare empty weights=middle", "'middle'"),
        ("quickstart seeds=0,0", "different numbers"),
        ("quickstart seeds=x", "'x'"),
        ("study", "study= is missing"),
        ("study empty", "'empty' does not exist"),
        ("settings nonsense=1", "no setting 'nonsense'"),
    ],
)
def test_what_is_wrong_is_one_line(line, expected, capsys):
    assert main(line.split()) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("fgd")
    assert re.search(expected.replace("?", "\\?"), said), said


def test_an_error_of_the_host_is_one_line_and_the_rest_is_kept(monkeypatch, capsys):
    def refused(arguments):
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr("fgd_hooks.cli.levels.levels_command", refused)
    assert main(["levels", "x"]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    file = re.fullmatch(r"fgd levels: RuntimeError: no such thing \(where: (.*)\)", said)[1]
    with open(file) as kept:
        assert "in refused" in kept.read()


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ("eval", "model=m.pt data=d.yaml", "m.pt data=d.yaml"),
        ("eval", "data=d.yaml m.pt --json out.json imgsz=64", "m.pt data=d.yaml imgsz=64 --json out.json"),
        ("eval", "data=d.yaml json=out.json model=m.pt", "m.pt data=d.yaml --json=out.json"),
        ("levels", "teacher=t.pt model=s.pt imgsz=64 json=True", "s.pt t.pt --imgsz=64 --json"),
        ("compare", "a b data=d.yaml markdown=true", "a b --data=d.yaml --markdown"),
        ("compare", "folders=a,b --out c", "a b --out c"),
        ("compare", "a markdown=False", "a"),
        ("quickstart", "seeds=[0,1] out=q", "--seeds 0 1 --out=q"),
        ("study", "s.yaml --slurm partition=gpu time=1 --jobs 2", "s.yaml --slurm partition=gpu time=1 --jobs 2"),
        ("study", "study=s.yaml max_minutes=5 dry-run=true", "s.yaml --max-minutes=5 --dry-run"),
        ("train", "model=m.pt fgd.weight=2", "model=m.pt fgd.weight=2"),
        ("doctor", "--strict model=m.pt verbose=True", "model=m.pt --strict --verbose"),
        ("train", "model=m.pt --help", "--help"),
    ],
)
def test_every_command_takes_key_value(command, given, expected):
    assert as_arguments(COMMANDS[command], given.split()) == expected.split()


def test_a_file_with_an_equal_sign_is_a_file(tmp_path):
    (tmp_path / "model=1.pt").touch()
    assert as_arguments(COMMANDS["levels"], ["model=1.pt"]) == ["model=1.pt"]


def test_lists_go_without_brackets(tmp_path):
    found, ours = split_settings(["teacher=a.pt,b.pt", "fgd.levels=P3,P4", "fgd.student_taps=model.23:input[0]"])
    assert found == {"teacher": ["a.pt", "b.pt"]}
    config = load_config(None, ours)
    assert (config.levels, config.student_taps) == (["P3", "P4"], ["model.23:input[0]"])
    (tmp_path / "a,b.pt").touch()
    assert split_settings(["teacher=a,b.pt"])[0] == {"teacher": "a,b.pt"}
    assert split_settings(["teacher=['a.pt', b.pt]"])[0] == {"teacher": ["a.pt", "b.pt"]}


def test_settings_lists_every_key_with_its_meaning(capsys):
    assert main(["settings"]) == 0
    out = capsys.readouterr().out
    assert main(["settings", "--json"]) == 0
    schema = json.loads(capsys.readouterr().out)
    keys = known_keys(FGDConfig)
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    for key in leaves:
        entry = schema
        for part in key.split("."):
            entry = entry["properties"][part]
        assert len(entry["description"]) > 5, key
        assert f"fgd.{key}={json.dumps(entry['default'])}\n" in out
    assert schema["properties"]["levels"]["type"] == ["array", "null"]
    assert schema["additionalProperties"] is False
