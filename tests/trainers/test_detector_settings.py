"""Settings of the trainers: layers, roles, and errors that name the key."""

import pytest
import torch
import yaml
from torch import nn

from fgd_hooks.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    def read(content, *overrides):
        from detector_settings import Settings, load_settings

        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump({"data": {"train": "a.json", "val": "b.json"}, **content}))
        return load_settings(Settings, file, overrides)

    return read


PAIR = {"model": {"name": "small"}, "teacher": {"name": "large", "checkpoint": "large.pt"}}


def test_file_base_and_overrides(load, tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 3\nbatch: 8\noptimizer: {lr: 0.5, warmup: 7}\n")
    settings = load({"base": "base.yaml", "batch": 2, "model": {"name": "m"}}, "optimizer.lr=1e-3", "out=here")
    assert (settings.epochs, settings.batch, settings.out) == (3, 2, "here")
    assert (settings.optimizer.lr, settings.optimizer.warmup, settings.optimizer.name) == (1e-3, 7, "SGD")


def test_roles(load):
    assert [each.name for each in (load(PAIR).model, load(PAIR).teacher)] == ["small", "large"]
    alone = load(PAIR, "train=alone")
    assert (alone.model.name, alone.teacher) == ("small", None)
    itself = load(PAIR, "train=teacher")
    assert (itself.model.name, itself.teacher) == ("large", None)


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ({}, ["optimizer.lrr=1"], r"optimizer\.lrr.*optimizer\.lr"),
        ({"epoch": 3}, [], r"key epoch.*epochs"),
        ({}, ["epochs=many"], "epochs is 'many'; expected int"),
        ({}, ["epochs=0"], "epochs is 0"),
        ({}, ["optimizer.lr=-1"], r"optimizer\.lr is -1"),
        ({}, ["amp=half"], "amp is 'half'.*bfloat16"),
        ({}, ["optimizer.name=Adam"], r"optimizer\.name is 'Adam'.*SGD"),
        ({}, ["image.min_size=[]"], r"image\.min_size is \[\]; expected at least one size"),
        ({}, ["train=teacher"], "no teacher in these settings"),
        ({"fgd": {"weight": 1}}, [], "no teacher in these settings"),
        (PAIR, ["teacher.checkpoint=null"], r"no trained weights: give teacher\.checkpoint"),
        (PAIR, ["teacher.nam=x"], r"teacher\.nam"),
    ],
)
def test_errors_name_the_key(load, content, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load({"model": {"name": "m"}, **content}, *overrides)


def test_a_file_that_is_missing(load):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load({"base": "nowhere.yaml"})


def test_the_learning_rate_over_a_training():
    from detector_settings import OptimizerSettings

    steps = OptimizerSettings(warmup=4, milestones=[2, 3], gamma=0.1)
    found = [steps.factor(step, 10, 4) for step in (0, 1, 3, 19, 20, 30)]
    assert found == pytest.approx([0.25, 0.5, 1, 1, 0.1, 0.01])
    cosine = OptimizerSettings(warmup=0, schedule="cosine", final=0.2)
    assert [cosine.factor(step, 10, 4) for step in (0, 20, 40)] == pytest.approx([1, 0.6, 0.2])


def test_frozen_weights_are_left_to_themselves():
    from detector_settings import OptimizerSettings

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    model[1].requires_grad_(True)
    for name, kind in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):
        optimizer = OptimizerSettings(name=name, lr=0.3, weight_decay=0.2).build(model)
        assert isinstance(optimizer, kind)
        (group,) = optimizer.param_groups
        assert group["params"] == list(model[1].parameters())
        assert (group["lr"], group["weight_decay"]) == (0.3, 0.2)
