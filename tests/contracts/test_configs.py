"""Every recipe of configs/ is found by name, loads, builds, and says nothing that is not so."""

import re
import shlex
from pathlib import Path

import pytest

from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.distiller import Distiller
from fgd_hooks.errors import ConfigError
from fgd_hooks.pairing import build_loss
from fgd_hooks.utils.recipes import recipe_path, recipes
from tests.helpers.tiny import TinyDetector, trained

ROOT = Path(__file__).parents[2]
# those of the detector trainers are files of another kind, see tests/trainers/test_recipes.py
TRAINERS = [f"detectors/{name}" for name in ("bccd-fasterrcnn", "bccd-fcos", "bccd-retinanet", "coco-retinanet-r50")]
# temperature, alpha, beta, gamma, lambda of the paper
PAPER = {
    "paper/anchor_based": (0.5, 1e-3, 5e-4, 5e-4, 5e-6),
    "paper/fcos": (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6),
    "paper/two_stage": (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7),
}
SAME_AS = {
    "detectors/retinanet-r50-from-r101": "paper/anchor_based",
    "detectors/fcos-r50-from-r101": "paper/fcos",
    "detectors/faster-rcnn-r50-from-r101": "paper/two_stage",
    "detectors/mask-rcnn-r50-from-r101": "paper/two_stage",
}
OURS = ["yolo", "start", "imitation", *PAPER, *SAME_AS]
PAIRINGS = ROOT / "docs" / "yolo-families.md"


def pairings():
    """Student, teacher, and the channels of both, as the table in docs/yolo-families.md has them."""
    rows = re.findall(r"^\| (\S+) \| (\S+) \| ([\d/]+) \| ([\d/]+) \|", PAIRINGS.read_text(encoding="utf-8"), re.M)
    assert len(rows) == 12
    return rows


def test_no_recipe_is_forgotten():
    assert {*OURS, *TRAINERS} == set(recipes())
    assert recipe_path("yolo") == ROOT / "configs" / "yolo.yaml"


def test_a_recipe_is_found_by_name_from_anywhere_and_a_file_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("paper/fcos", ["weight=2"]).loss.preset == "fcos"
    Path("yolo").write_text("interval: 3")
    assert load_config("yolo").interval == 3


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"'paper/fcoss' .*'paper/fcos'"):
        load_config("paper/fcoss")
    with pytest.raises(ConfigError, match=r"detectors/bccd-fcos\.yaml: .*data"):
        load_config("detectors/bccd-fcos")  # a file of the trainers


@pytest.mark.parametrize("name", OURS)
def test_builds(name):
    config = load_config(name)
    student, teacher = TinyDetector((8, 12, 16)), trained(TinyDetector((16, 24, 32)))
    with Distiller(student, teacher=teacher, config=config) as distiller:
        assert distiller.level_names == ["P3", "P4", "P5"]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_are_the_papers(name):
    config = load_config(name)
    loss = build_loss(config.loss, 8)
    assert (loss.temperature, loss.alpha, loss.beta, loss.gamma, loss.lambda_) == PAPER[name]
    assert config.balance.mode == "fixed"
    assert config.schedule.stop is None


@pytest.mark.parametrize("name", SAME_AS)
def test_the_papers_pairs_inherit_besides(name):
    assert load_config(name) == load_config(SAME_AS[name], {"inherit": "neck+head"})


def test_the_yolo_recipe_is_the_default_and_its_command_trains_a_pairing_of_the_table():
    assert load_config("yolo") == FGDConfig()
    (line,) = re.findall(r"^# +fgd train (.+)$", recipe_path("yolo").read_text(encoding="utf-8"), re.M)
    settings = dict(setting.split("=", 1) for setting in shlex.split(line))
    assert settings["config"] == "yolo"
    assert (settings["model"], settings["teacher"]) in [(student, teacher) for student, teacher, *_ in pairings()]


def test_the_pairings_are_of_models_that_exist():
    pytest.importorskip("ultralytics")
    from ultralytics.nn.tasks import yaml_model_load
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    for pair in pairings():
        assert set(pair[:2]) <= set(GITHUB_ASSETS_NAMES)
        for name in pair[:2]:
            model = name.removesuffix(".pt")
            assert model[-1] in yaml_model_load(f"{model}.yaml")["scales"]


@pytest.mark.parametrize(
    "family", ["yolo26", *(pytest.param(each, marks=pytest.mark.slow) for each in ("yolo11", "yolov8"))]
)
def test_the_smallest_pair_of_a_family_is_real_and_has_the_channels_of_the_table(family):
    pytest.importorskip("ultralytics")
    from ultralytics.nn.tasks import DetectionModel

    student, teacher = (DetectionModel(f"{family}{size}.yaml", verbose=False) for size in "ns")
    with Distiller(student, teacher=teacher, config=load_config("yolo")) as distiller:
        assert distiller.level_names == ["P3", "P4", "P5"]
        channels = [
            "/".join(str(getattr(p, side).channels) for p in distiller.pairs) for side in ("student", "teacher")
        ]
    assert (f"{family}n.pt", f"{family}s.pt", *channels) in pairings()
