"""Ultralytics' multi-process training with the callback: launcher, pickling, averaging, side file, resume."""

import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT, read_checkpoint

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")


@pytest.fixture
def two_ranks(monkeypatch, data, student_yaml, teacher_file, tmp_path):
    """``train(**settings)``: train on two processes; returns the folder with what both recorded and the weights."""
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def train(model=None, ranks=2, resume=False, fail_in_epoch=None, inherit="", **settings):
        from ultralytics import YOLO

        from tests.conftest import SETTINGS
        from tests.helpers.two_ranks import Recorder, TwoRanksTrainer

        folder = tmp_path / f"seen_by_{ranks}"
        folder.mkdir()
        yolo = YOLO(str(model or student_yaml))
        distillation = {"balance": {"interval": 2}, "schedule": {"stop": None}, "inherit": inherit}
        callback = FGDCallback(str(teacher_file), **distillation)
        callback.attach(yolo)
        Recorder(folder, callback, fail_in_epoch).attach(yolo)
        if resume:
            settings["resume"] = True
        else:
            settings = {**SETTINGS, "data": str(data), "project": str(tmp_path), "name": "run", **settings}
        yolo.train(trainer=TwoRanksTrainer if ranks == 2 else None, **settings)
        return folder

    return train


def recorded(folder, rank, name="rank"):
    return torch.load(folder / f"{name}{rank}.pt", weights_only=True)


def assert_equal_on_both(one, other):
    for key, tensor in one["adapters"].items():
        assert torch.equal(tensor, other["adapters"][key]), key
    for key, tensor in one["student"].items():
        assert torch.equal(tensor, other["student"][key]), key
    assert torch.equal(one["scales"], other["scales"])


@pytest.mark.slow
def test_ranks_agree_both_distil_and_one_saves(two_ranks, tmp_path):
    folder = two_ranks(epochs=2, nbs=8)
    one, other = recorded(folder, 0), recorded(folder, 1)
    assert one["world"] == other["world"] == 2
    assert one["accumulate"] == 2, "gradients are accumulated over two backward passes"
    assert_equal_on_both(one, other)
    assert len(one["losses"]) == len(other["losses"]) == 10
    assert all(loss > 0 for loss in one["losses"] + other["losses"])
    assert one["losses"] != other["losses"], "each rank saw images of its own"
    assert (folder / "saved.txt").read_text().split("\n") == ["0 0 True", "0 1 True", ""]
    saved = read_checkpoint(tmp_path / "run" / "weights" / LAST_CHECKPOINT)
    assert saved["epoch"] == 1
    for key, tensor in one["adapters"].items():
        assert torch.equal(tensor, saved["distiller"]["modules"][key]), key
    start = next(key for key in one["adapters"] if key.endswith("weight"))
    assert one["adapters"][start].abs().sum() > 0


@pytest.mark.slow
def test_ranks_inherit_alike(two_ranks, teacher_file, tmp_path):
    from fgd_hooks.integrations.ultralytics.teacher import load_teacher
    from tests.conftest import WIDE, architecture

    folder = two_ranks(model=architecture(tmp_path, "yolo26n.yaml", WIDE), epochs=1, nbs=8, inherit="neck+head")
    one, other = recorded(folder, 0, "start"), recorded(folder, 1, "start")
    assert_equal_on_both(one, other)
    teacher, layer = load_teacher(teacher_file).state_dict(), "model.13.cv1.conv.weight"
    assert torch.equal(one["student"][layer], teacher[layer])
    assert not torch.equal(one["student"]["model.0.conv.weight"], teacher["model.0.conv.weight"])
    assert_equal_on_both(recorded(folder, 0), recorded(folder, 1))


@pytest.mark.slow
def test_ranks_are_fitted_alike(two_ranks):
    folder = two_ranks(epochs=1, nbs=8, inherit="fitted")
    assert_equal_on_both(recorded(folder, 0, "start"), recorded(folder, 1, "start"))
    assert_equal_on_both(recorded(folder, 0), recorded(folder, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_on_another_number_of_ranks(two_ranks, tmp_path, before, after):
    with pytest.raises((RuntimeError, subprocess.CalledProcessError)):
        two_ranks(ranks=before, epochs=2, fail_in_epoch=1)
    weights = tmp_path / "run" / "weights"
    saved = read_checkpoint(weights / LAST_CHECKPOINT)
    assert saved["epoch"] == 0
    folder = two_ranks(ranks=after, model=weights / "last.pt", resume=True)
    for rank in range(after):
        start = recorded(folder, rank, "start")
        assert start["world"] == after
        assert start["step"] == saved["distiller"]["step"]
        assert torch.equal(start["scales"], saved["distiller"]["balance"]["scales"])
        for key, tensor in saved["distiller"]["modules"].items():
            assert torch.equal(tensor, start["adapters"][key]), key
        assert all(loss > 0 for loss in recorded(folder, rank)["losses"])
    if after == 2:
        assert_equal_on_both(recorded(folder, 0), recorded(folder, 1))
    assert read_checkpoint(weights / LAST_CHECKPOINT)["epoch"] == 1
