"""Every recipe of configs/ loads, builds, and says nothing that is not so."""

import re
import shlex
from pathlib import Path

import pytest

from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.distiller import Distiller
from fgd_hooks.pairing import build_loss
from tests.helpers.tiny import TinyDetector, trained

ROOT = Path(__file__).parents[2]
# those of the detector trainers are files of another kind, see tests/trainers/test_recipes.py
TRAINERS = ["bccd-fasterrcnn", "bccd-fcos", "bccd-retinanet", "coco-retinanet-r50"]
RECIPES = sorted(file for file in (ROOT / "configs").glob("*.yaml") if file.stem not in TRAINERS)
FAMILIES, SIZES = ("yolo26", "yolo11", "yolov8"), ("ns", "sm", "ml", "lx")
YOLO = [f"{family}{one}-from-{family}{other}" for family in FAMILIES for one, other in SIZES]
# temperature, alpha, beta, gamma, lambda of the paper
PAPER = {
    "paper_anchor_based": (0.5, 1e-3, 5e-4, 5e-4, 5e-6),
    "retinanet-r50-from-r101": (0.5, 1e-3, 5e-4, 5e-4, 5e-6),
    "fcos-r50-from-r101": (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6),
    "faster-rcnn-r50-from-r101": (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7),
    "mask-rcnn-r50-from-r101": (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7),
}


def named(name):
    return ROOT / "configs" / f"{name}.yaml"


def command(file):
    """The settings of the ``fgd train`` line in a recipe's comment."""
    text = file.read_text(encoding="utf-8")
    line = re.search(r"^# +fgd train (.+)$", text, re.M)
    assert line, f"{file.name} does not say how it is used"
    return dict(setting.split("=", 1) for setting in shlex.split(line[1]))


def test_every_documented_pairing_has_a_recipe():
    assert {*YOLO, *PAPER, "yolo", "imitation", "start"} == {file.stem for file in RECIPES}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_builds(file):
    config = load_config(file)
    student, teacher = TinyDetector((8, 12, 16)), trained(TinyDetector((16, 24, 32)))
    with Distiller(student, teacher, config) as distiller:
        assert distiller.level_names == ["P3", "P4", "P5"]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_are_the_papers(name):
    config = load_config(named(name))
    loss = build_loss(config.loss, 8)
    assert (loss.temperature, loss.alpha, loss.beta, loss.gamma, loss.lambda_) == PAPER[name]
    assert config.balance.mode == "fixed"
    assert config.schedule.stop_epoch is None
    if name != "paper_anchor_based":
        assert config.inherit == "neck+head"


@pytest.mark.parametrize("name", YOLO)
def test_a_yolo_recipe_is_the_default_and_names_models_that_exist(name):
    pytest.importorskip("ultralytics")
    from ultralytics.nn.tasks import yaml_model_load
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    assert load_config(named(name)) == FGDConfig()
    settings = command(named(name))
    student, teacher = name.split("-from-")
    assert settings["config"] == f"configs/{name}.yaml"
    assert (settings["model"], settings["teacher"]) == (f"{student}.pt", f"{teacher}.pt")
    assert {settings["model"], settings["teacher"]} <= set(GITHUB_ASSETS_NAMES)
    for model in (student, teacher):
        assert model[-1] in yaml_model_load(f"{model}.yaml")["scales"]


@pytest.mark.parametrize("family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])])
def test_the_smallest_pair_is_real_and_has_the_channels_that_its_recipe_names(family):
    pytest.importorskip("ultralytics")
    from ultralytics.nn.tasks import DetectionModel

    file = named(f"{family}n-from-{family}s")
    student, teacher = (DetectionModel(f"{family}{size}.yaml", verbose=False) for size in "ns")
    with Distiller(student, teacher, load_config(file)) as distiller:
        channels = [
            "/".join(str(getattr(pair, side).channels) for pair in distiller.pairs) for side in ("student", "teacher")
        ]
    assert f"P3/P4/P5: {channels[0]} <- {channels[1]}." in file.read_text(encoding="utf-8")
