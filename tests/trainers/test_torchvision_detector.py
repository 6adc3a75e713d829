"""The loop: alone and with a teacher, resumed and straight, and the files it leaves."""

import csv
import os
import subprocess
import sys

import pytest
import torch
import yaml

pytest.importorskip("torchvision")

from fgd_hooks.evaluation.runs import read_evaluation, read_run
from fgd_hooks.utils.checkpoint import read_checkpoint
from tests.helpers.tiny_detectors import build as tiny
from tests.trainers.conftest import ROOT, data_settings

WIDTHS = {"student": (8, 8, 12, 16), "wide": (12, 8, 12, 16), "teacher": (12, 12, 16, 24)}


def build(settings, classes, image):
    assert classes == 2
    return tiny("retinanet", WIDTHS[settings.name], min_size=image.min_size[0], max_size=image.max_size)


@pytest.fixture
def train(coco, tmp_path):
    """Runs a training in a folder of that name, with settings that differ from these; returns the folder."""
    torch.save(tiny("retinanet", WIDTHS["teacher"], seed=1).state_dict(), tmp_path / "teacher.pt")
    base = {
        "data": data_settings(coco),
        "image": {"min_size": [64], "max_size": 96},
        "model": {"name": "student"},
        "teacher": {"name": "teacher", "checkpoint": str(tmp_path / "teacher.pt")},
        "fgd": {"schedule": {"stop": None}},
        "optimizer": {"lr": 1e-3, "warmup": 2, "milestones": [1]},
        "epochs": 2,
        "batch": 2,
        "workers": 0,
        "log_every": 2,
        "device": "cpu",
    }
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(base))

    def run(name, *overrides):
        from torchvision_detector import main

        main([str(file), f"out={tmp_path / name}", *overrides], build)
        return tmp_path / name

    run.file = file
    return run


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def same(one, other):
    return all(torch.equal(weights(one)[name], tensor) for name, tensor in weights(other).items())


def test_with_a_teacher_and_without(train):
    alone, taught, silent = train("alone", "train=alone"), train("fgd"), train("silent", "fgd.weight=0")
    assert same(alone, silent), "weight 0 is the stock run, bit for bit"
    assert not same(alone, taught)
    # the files of a run
    stock = tiny("retinanet", WIDTHS["student"])
    stock.load_state_dict(weights(taught))
    stock.load_state_dict(torch.load(taught / "best.pt", weights_only=True))
    assert set(torch.load(taught / "last.pt", weights_only=True)) == {"model", "optimizer", "rate", "scaler", "rows"}
    assert read_checkpoint(taught / "last.fgd.safetensors")["distiller"]["step"] == 6
    assert not (alone / "last.fgd.safetensors").exists()
    assert not (alone / "fgd.yaml").exists()
    with (taught / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row["train/fgd_foreground"]) > 0 for row in rows)
    assert float(rows[1]["lr"]) == pytest.approx(1e-4)
    # what fgd compare makes of it
    run = read_run(taught)
    assert (run.epochs, run.planned, run.finished, len(run.curve)) == (2, 2, True, 2)
    assert run.distillation["fgd.teacher.name"].endswith("teacher.pt")
    assert read_run(alone).distillation == {}
    assert read_run(alone).settings == run.settings
    for split in ("val", "test"):
        assert read_evaluation(taught / f"eval-{split}.json")["images"] == 2
    assert any(file.name.startswith("events.out.tfevents") for file in taught.iterdir())


def test_a_resumed_run_ends_like_a_straight_one(train, monkeypatch):
    from torchvision_detector import Training

    straight = train("straight")
    whole = Training.train_epoch

    def interrupted(self, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return whole(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("resumed")
    resumed = train("resumed", "resume=true")
    assert same(straight, resumed)
    states = [read_checkpoint(folder / "last.fgd.safetensors")["distiller"] for folder in (straight, resumed)]
    for name, tensor in states[0]["modules"].items():
        assert torch.equal(tensor, states[1]["modules"][name]), name
    assert len(read_run(resumed).curve) == 2


def test_nothing_to_resume_is_an_error(train):
    with pytest.raises(FileNotFoundError, match=r"last\.pt to resume from"):
        train("nothing", "resume=true")


def test_weights_of_another_model_are_refused(train, tmp_path):
    torch.save({"some": torch.zeros(1)}, tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"teacher\.pt do not fit the RetinaNet"):
        train("other")


def test_the_teacher_is_trained_by_the_same_program(train):
    folder = train("itself", "train=teacher", "epochs=1", "eval_every=5")
    tiny("retinanet", WIDTHS["teacher"]).load_state_dict(weights(folder))
    assert len(read_run(folder).curve) == 1, "the last epoch is always validated"


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_with_clipping_and_another_optimiser(train, amp):
    settings = ["optimizer.name=AdamW", "optimizer.clip=1", "optimizer.schedule=cosine"]
    folder = train(amp, f"amp={amp}", "epochs=1", *settings)
    assert all(torch.isfinite(tensor.float()).all() for tensor in weights(folder).values())


def test_inheriting_copies_the_neck_before_the_training(train):
    folder = train("inherit", "fgd.inherit=neck+head", "epochs=1", "optimizer.lr=1e-9", "optimizer.weight_decay=0")
    name = "backbone.fpn.layer_blocks.0.0.weight"
    teacher = tiny("retinanet", WIDTHS["teacher"], seed=1).state_dict()
    torch.testing.assert_close(weights(folder)[name], teacher[name], atol=1e-6, rtol=0)


def test_a_distillation_without_weights_of_its_own(train):
    """Equal widths need no adapter, and CWD has nothing to learn: there is no second optimiser."""
    taught = train("taught", "model.name=wide", "fgd.loss.name=cwd")
    again = train("again", "model.name=wide", "fgd.loss.name=cwd", "epochs=1")
    assert not same(taught, train("alone", "model.name=wide", "train=alone"))
    train("again", "model.name=wide", "fgd.loss.name=cwd", "resume=true")
    assert same(taught, again)


def test_models_of_torchvision_are_built_for_the_classes_of_the_data():
    from detector_settings import ImageSettings, ModelSettings
    from torchvision_detector import build_model

    options = {"trainable_backbone_layers": 6}
    settings = ModelSettings("fasterrcnn_mobilenet_v3_large_320_fpn", options=options)
    model = build_model(settings, 2, ImageSettings([96, 128], 160))
    assert model.roi_heads.box_predictor.cls_score.out_features == 3
    assert (tuple(model.transform.min_size), model.transform.max_size) == ((96, 128), 160)


@pytest.mark.slow
def test_two_processes(train, tmp_path):
    """The whole program under torchrun; each process has half of every step's images."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'trainers')!r}]\n"
        "from tests.trainers.test_torchvision_detector import build\nfrom torchvision_detector import main\n"
        "main(sys.argv[1:], build)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    out = tmp_path / "two"
    done = subprocess.run(
        [*command, str(train.file), f"out={out}", "batch=1", "threads=1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_evaluation(out / "eval-test.json")["images"] == 2
    assert read_checkpoint(out / "last.fgd.safetensors")["distiller"]["step"] == 6
