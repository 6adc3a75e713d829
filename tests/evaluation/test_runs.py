"""Reading run folders, from small made-up ones."""

import json

import pytest
import yaml

from fgd_hooks.errors import RunError
from fgd_hooks.evaluation.runs import read_evaluation, read_run, weights_of

HEADER = "epoch,time,train/box_loss,metrics/mAP50(B),metrics/mAP50-95(B)"


def make_run(folder, maps, *, times=None, fgd=None, **settings):
    """A run folder as Ultralytics leaves it; ``maps`` are mAP50-95 of the epochs, mAP50 is twice that."""
    folder.mkdir(parents=True)
    arguments = {"epochs": len(maps), "seed": 0, "val": True, "patience": 0, "lr0": 0.01, "name": folder.name}
    (folder / "args.yaml").write_text(yaml.safe_dump({**arguments, **settings}))
    times = times or [60.0 * (epoch + 1) for epoch in range(len(maps))]
    loss = ",train/fgd_fg" if fgd is not None else ""
    lines = [
        f"{epoch + 1},{time},2.0,{2 * value},{value}" + (",1.0" if loss else "")
        for epoch, (value, time) in enumerate(zip(maps, times, strict=True))
    ]
    (folder / "results.csv").write_text("\n".join([HEADER + loss, *lines]) + "\n")
    if fgd:
        (folder / "fgd.yaml").write_text(yaml.safe_dump(fgd))
    return folder


def evaluation(value=0.5, **more):
    classes = [{"name": "disc", "map50_95": value}, {"name": "star", "map50_95": None}]
    sizes = {"map_small": None, "map_medium": value, "map_large": value}
    return {"map50_95": value, "map50": value, **sizes, "per_class": classes, **more}


@pytest.mark.parametrize("begun", ["with", "without"])
def test_a_run_that_was_resumed_without_or_with_distillation_is_read(tmp_path, begun):
    folder = make_run(tmp_path / "a", [0.1, 0.3])
    own = "epoch,time,train/box_loss,{}metrics/mAP50(B),metrics/mAP50-95(B),val/box_loss,{}lr/pg0"
    rows = ["1,60,2.0,{}0.2,0.1,3.0,{}0.01", "2,120,2.0,{}0.6,0.3,3.0,{}0.02"]
    header = own.format(*(("train/fgd,train/fgd_fg,", "val/fgd,") if begun == "with" else ("", "")))
    wide, narrow = ("7,8,", "0,"), ("", "")
    cells = [wide, narrow] if begun == "with" else [narrow, wide]
    lines = [row.format(*each) for row, each in zip(rows, cells, strict=True)]
    (folder / "results.csv").write_text("\n".join([header, *lines]) + "\n")
    run = read_run(folder)
    assert run.curve == ((1, 0.1, 0.2), (2, 0.3, 0.6))
    assert run.minutes == 2


def test_the_weights_of_a_run(tmp_path):
    (tmp_path / "weights").mkdir()
    with pytest.raises(FileNotFoundError, match="no weights/last.pt"):
        weights_of(tmp_path)
    for name in ("best", "last"):
        (tmp_path / "weights" / f"{name}.pt").touch()
        assert weights_of(tmp_path).name == weights_of(str(tmp_path / "weights")).name == f"{name}.pt"
    assert weights_of("yolo26n.pt").name == "yolo26n.pt"


def test_epochs_best_and_last(tmp_path):
    run = read_run(make_run(tmp_path / "a", [0.1, 0.3, 0.2], seed=4))
    assert (run.name, run.seed, run.epochs, run.planned) == ("a", 4, 3, 3)
    assert run.best == (2, 0.3, 0.6)
    assert run.last == (3, 0.2, 0.4)
    assert run.minutes == 3.0
    assert run.finished
    assert run.distillation == {}
    assert run.settings == {"epochs": 3, "val": True, "patience": 0, "lr0": 0.01}


def test_a_resumed_runs_clock_starts_anew(tmp_path):
    run = read_run(make_run(tmp_path / "a", [0.1, 0.2, 0.3, 0.4], times=[60, 120, 30, 90]))
    assert run.minutes == pytest.approx((120 + 90) / 60)


def test_without_validation_only_the_last_epoch_counts(tmp_path):
    run = read_run(make_run(tmp_path / "a", [0, 0, 0.3], val=False))
    assert run.curve == ((3, 0.3, 0.6),)
    assert run.best is None
    assert run.last == (3, 0.3, 0.6)
    unfinished = read_run(make_run(tmp_path / "b", [0, 0, 0], val=False, epochs=9))
    assert unfinished.curve == ()
    assert unfinished.last is None


def test_unfinished_or_stopped_by_its_patience(tmp_path):
    maps = [0.3, 0.1, 0.1]
    assert not read_run(make_run(tmp_path / "a", maps, epochs=9)).finished
    assert not read_run(make_run(tmp_path / "b", maps, epochs=9, patience=3)).finished
    assert read_run(make_run(tmp_path / "c", maps, epochs=9, patience=2)).finished


def test_the_distillations_settings(tmp_path):
    settings = {"weight": 2.0, "log_interval": 3, "loss": {"name": "fgd", "options": {}}, "teacher": {"name": "t.pt"}}
    run = read_run(make_run(tmp_path / "a", [0.1], fgd=settings))
    assert run.distillation == {
        "fgd.weight": 2.0,
        "fgd.loss.name": "fgd",
        "fgd.loss.options": {},
        "fgd.teacher.name": "t.pt",
    }
    assert read_run(make_run(tmp_path / "unknown", [0.1], fgd={})).distillation is None
    stale = make_run(tmp_path / "stale", [0.1])
    (stale / "fgd.yaml").write_text("weight: 1.0")
    assert read_run(stale).distillation == {}, "an older run's file in the same folder: this log has no such losses"


def test_older_logs_are_padded_and_have_no_clock(tmp_path):
    folder = make_run(tmp_path / "a", [0.1])
    (folder / "results.csv").write_text("  epoch,  metrics/mAP50(B),   metrics/mAP50-95(B)\n   1,   0.5,   0.25\n")
    run = read_run(folder)
    assert run.last == (1, 0.25, 0.5)
    assert run.minutes is None


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_run(tmp_path / "nowhere")
    make_run(tmp_path / "inside", [0.1])
    with pytest.raises(RunError, match=r"results.csv and args.yaml missing. There are runs inside it: inside"):
        read_run(tmp_path)
    folder = make_run(tmp_path / "a", [0.1])
    (folder / "args.yaml").unlink()
    with pytest.raises(RunError, match=r"a is no run of Ultralytics': args.yaml missing"):
        read_run(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + "\n", "no finished epoch"),
        ("epoch,metrics/accuracy_top1\n1,0.5\n", r"no column metrics/mAP50-95\(B\), metrics/mAP50\(B\)"),
        (HEADER + "\n1,60,2.0,0.5\n", "damaged"),
        (HEADER + "\n1,60,2.0,0.5,x\n", "damaged"),
    ],
)
def test_a_damaged_log_is_named(tmp_path, content, message):
    folder = make_run(tmp_path / "a", [0.1])
    (folder / "results.csv").write_text(content)
    with pytest.raises(RunError, match=rf"results.csv.*{message}"):
        read_run(folder)


def test_damaged_settings_are_named(tmp_path):
    folder = make_run(tmp_path / "a", [0.1])
    (folder / "args.yaml").write_text("a: [")
    with pytest.raises(RunError, match=r"args.yaml is no valid YAML"):
        read_run(folder)


def test_evaluations(tmp_path):
    file = tmp_path / "eval.json"
    assert read_evaluation(file) is None
    file.write_text(json.dumps(evaluation()))
    assert read_evaluation(file) == evaluation()
    file.write_text('{"map50_95": 0.5')
    with pytest.raises(RunError, match="no valid JSON"):
        read_evaluation(file)
    file.write_text('{"map50_95": 0.5}')
    with pytest.raises(RunError, match="map50, map_small"):
        read_evaluation(file)
