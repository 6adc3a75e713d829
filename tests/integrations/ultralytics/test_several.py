"""Several losses and several teachers in an Ultralytics training."""

import csv
import pickle

import pytest
import torch
import yaml

from fgd_hooks import FGDCallback, load_config
from fgd_hooks.cli.main import main
from fgd_hooks.diagnostics.tensorboard import hyper_parameters
from fgd_hooks.errors import ConfigError
from fgd_hooks.integrations.ultralytics.teacher import fused, load_teacher, score_taps
from fgd_hooks.taps.hooks import FeatureTaps, run_until_tapped
from fgd_hooks.taps.tap import expand_taps


def columns(folder):
    rows = list(csv.DictReader((folder / "results.csv").open()))
    return {key.strip(): float(value) for key, value in rows[-1].items() if "fgd_" in key and "train" in key}


def test_two_teachers_and_two_losses_train_and_resume_and_leave_a_record(train, teacher_file, tmp_path):
    config = {"losses": ["fgd", {"name": "cwd", "weight": 0.5}], "teachers": [{}, {"weight": 0.5, "levels": ["P5"]}]}
    teachers = [str(teacher_file), load_teacher(teacher_file)]
    seen = {}

    def look(trainer):
        seen["distiller"] = callback.distiller(trainer)

    callback = FGDCallback(teachers, config=config)
    train(callback, hooks=[("on_train_batch_end", look)])
    distiller = seen["distiller"]
    first = [f"{level}-teacher1-{loss}" for level in ("P3", "P4", "P5") for loss in ("fgd", "cwd")]
    assert distiller.level_names == [*first, "P5-teacher2-fgd", "P5-teacher2-cwd"]
    assert not distiller.balance.unmeasured
    values = columns(tmp_path / "run")
    assert {name.split("/")[1] for name in values} == {"fgd_fg", "fgd_bg", "fgd_att", "fgd_glob", "fgd_channelwise"}
    assert all(value > 0 for value in values.values())
    recorded = yaml.safe_load((tmp_path / "run" / "fgd.yaml").read_text())
    assert [share["name"] for share in recorded["teachers"]] == [str(teacher_file), "DetectionModel"]
    assert load_config(tmp_path / "run" / "fgd.yaml").losses == callback.config.losses
    assert not any(module._forward_hooks for module in teachers[1].modules())


@pytest.mark.slow
def test_teachers_named_in_the_configuration(teacher_file, train, tmp_path):
    callback = FGDCallback(config={"teachers": [str(teacher_file)]})
    assert callback.teacher == [str(teacher_file)]
    assert pickle.loads(pickle.dumps(callback)).teacher == [str(teacher_file)]
    train(callback)
    assert columns(tmp_path / "run")["train/fgd_fg"] > 0
    with pytest.raises(ConfigError, match="teachers has 1 entries, but 2 teachers are given"):
        FGDCallback(["a.pt", "b.pt"], config={"teachers": [{"weight": 2}]})
    for config in (None, {"teachers": [{"weight": 2}]}):
        with pytest.raises(ConfigError, match="There is no teacher"):
            FGDCallback(config=config)


@pytest.mark.slow
def test_several_teachers_from_the_command_line(teacher_file, student_yaml, data, capsys):
    keys = [f"teacher={teacher_file},{teacher_file}", f"model={student_yaml}", f"data={data}", "imgsz=64"]
    main(["doctor", "--verbose", *keys])
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("teacher's mAP") == 2 and "P5-teacher2" in out


@pytest.mark.parametrize(("fuse", "branch"), [(False, "cv3"), (True, "cv3"), (True, "one2one_cv3")])
def test_class_scores_of_a_yolo_teacher(teacher_file, fuse, branch):
    """What the taps see is the class half of what the head itself puts together."""
    teacher = load_teacher(teacher_file).eval()
    if branch == "one2one_cv3":
        teacher.model[-1].end2end = True  # fusing then drops the one-to-many branch
    if fuse:
        teacher = fused(teacher)
    names = score_taps(teacher)
    assert names == [f"model.23.{branch}.{level}" for level in range(3)]
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FeatureTaps(teacher, expand_taps(teacher, names)) as taps:
        raw = teacher(images)[1]
        maps = taps.pop()
    scores = (raw["one2one"] if branch == "one2one_cv3" else raw.get("one2many", raw))["scores"]
    assert [tuple(each.shape[2:]) for each in maps] == [(8, 8), (4, 4), (2, 2)]
    torch.testing.assert_close(torch.cat([each.flatten(2) for each in maps], 2), scores)
    with torch.no_grad(), FeatureTaps(teacher, expand_taps(teacher, names), stop=True) as taps:
        assert len(run_until_tapped(teacher, taps, images)) == 3


@pytest.mark.slow
def test_scored_trains(train, teacher_file, tmp_path):
    train(FGDCallback(teacher_file, loss={"name": "scored"}))
    assert columns(tmp_path / "run")["train/fgd_scored"] > 0


def test_what_runs_are_compared_by_names_all_teachers_and_losses(teacher_file):
    config = {"losses": ["fgd", "cwd"], "teachers": [{"name": "runs/a.pt"}, {"name": "b.pt"}]}
    row = hyper_parameters(load_config(config))
    assert (row["fgd.teacher"], row["fgd.loss"]) == ("a.pt+b.pt", "fgd+cwd")


def test_a_part_that_is_switched_off_in_one_of_several_losses_is_known():
    """Its context block then gets no gradient, which DistributedDataParallel has to be told."""
    assert not load_config({"losses": ["cwd", "fgd"]}).has_zero_weights
    off = {"name": "fgd", "options": {"lambda_": 0}}
    assert load_config({"losses": ["cwd", off]}).has_zero_weights
