import sys

import pytest
import torch

from fgd_hooks.errors import MissingExtraError, ModelNameError
from fgd_hooks.integrations.load_model import load_model, load_yolo
from fgd_hooks.taps.levels import find_levels
from tests.conftest import TINY, architecture

FACTORIES = """
from tests.helpers.tiny import TinyDetector as Tiny

made = Tiny((4, 6, 8))
number = 7


def factory():
    return Tiny((8, 12, 16))


def needs(width):
    return Tiny((width,) * 3)


def wrong():
    return "no model"


def retinanet():
    from tests.helpers.tiny_detectors import retinanet  # torchvision's

    return retinanet()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a package of one's own, as a user has it."""
    (tmp_path / "own_models").mkdir()
    (tmp_path / "own_models" / "detectors.py").write_text(FACTORIES)
    (tmp_path / "own_models" / "broken.py").write_text("import there_is_no_such_package\n")
    (tmp_path / "own_models" / "worse.py").write_text("raise ValueError('no licence')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "own_models"]:
        del sys.modules[name]


def levels(name, size):
    model = load_model(name, size)
    return [(level.stride, level.channels) for level in find_levels(model.module, model.taps, example=model.example)]


def test_a_factory_and_a_module_by_their_python_path():
    assert levels("own_models.detectors:factory", 64) == [(8, 8), (16, 12), (32, 16)]
    assert levels("own_models.detectors:made", 64) == [(8, 4), (16, 6), (32, 8)]
    assert load_model("own_models.detectors:made", 96).example.shape == (1, 3, 96, 96)


def test_a_torchvision_detector_of_ones_own_is_measured_behind_its_resizing():
    pytest.importorskip("torchvision")
    assert [stride for stride, _ in levels("own_models.detectors:retinanet", 128)] == [8, 16, 32, 64, 128]


def test_a_yolo_file():
    pytest.importorskip("ultralytics")
    assert levels("yolo26n.yaml", 64) == [(8, 64), (16, 128), (32, 256)]


CLASSES = {
    "yolov8n-rtdetr.yaml": "RTDETR",
    "yolov8s-worldv2.yaml": "YOLOWorld",
    "yoloe-11s-seg.yaml": "YOLOE",
    "yolo26n-obb.yaml": "YOLO",
}


@pytest.mark.parametrize(("name", "expected"), CLASSES.items())
def test_a_yolo_yaml_is_built_by_the_class_of_its_head(tmp_path, name, expected):
    """Whatever the file is called; and so are weights made from it."""
    pytest.importorskip("ultralytics")
    scale = "s" if "s-" in name else "n"
    own = architecture(tmp_path, name, {scale: TINY["n"]})
    own = own.rename(own.with_name(f"mine{len(name)}{scale}.yaml"))  # not a word of the family in it
    yolo = load_yolo(str(own))
    assert type(yolo).__name__ == expected
    yolo.save(str(tmp_path / "rtdetr-taught.pt"))
    assert type(load_yolo(str(tmp_path / "rtdetr-taught.pt"))).__name__ == expected


def test_a_yaml_without_a_head_is_no_model(tmp_path):
    pytest.importorskip("ultralytics")
    (tmp_path / "data.yaml").write_text("train: images\n")
    with pytest.raises(ModelNameError, match=r"data\.yaml.*'head'"):
        load_yolo(str(tmp_path / "data.yaml"))


def test_a_backbone_of_timm():
    pytest.importorskip("timm")
    found = [(2, 64), (4, 64), (8, 128), (16, 256), (32, 512)]
    assert levels("timm:resnet18", 64) == found


@pytest.mark.slow
def test_transformers_of_timm():
    """Of a fixed size, and with maps (N, H, W, C) inside."""
    pytest.importorskip("timm")
    model = load_model("timm:swin_tiny_patch4_window7_224", 640)
    assert model.fixed
    assert model.example.shape == (1, 3, 224, 224)
    found = find_levels(model.module, example=model.example)
    assert [(level.stride, level.channels) for level in found] == [(4, 96), (8, 192), (16, 384), (32, 768)]


def test_a_detector_of_torchvision():
    pytest.importorskip("torchvision")
    model = load_model("torchvision:ssdlite320_mobilenet_v3_large", 640)
    assert model.fixed
    assert model.example.shape == (1, 3, 320, 320), "SSDlite sees no other size"
    found = find_levels(model.module, model.taps, example=model.example)
    assert [(level.stride, level.channels) for level in found[:3]] == [(16, 672), (32, 480), (64, 512)]


@pytest.mark.slow
def test_retinanet_of_torchvision():
    pytest.importorskip("torchvision")
    assert levels("torchvision:retinanet_resnet50_fpn", 128) == [(stride, 256) for stride in (8, 16, 32, 64, 128)]


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    name = package.partition(".")[0]
    with pytest.raises(MissingExtraError, match=rf'package {name} .*: pip install "fgd-hooks\[{name}\]"$'):
        load_model(f"{name}:resnet18")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (":factory", "expected a YOLO file.*torchvision:NAME.*timm:NAME.*package.module:factory"),
        ("own_models.detectors:", "expected a YOLO file"),
        ("a:b:c", "expected a YOLO file"),
        ("there_is_no_such.package:factory", "no Python module 'there_is_no_such'"),
        ("own_models.nothing:factory", "no Python module 'own_models.nothing'"),
        ("own_models.broken:factory", "importing own_models.broken failed.*there_is_no_such_package"),
        ("own_models.worse:factory", "importing own_models.worse failed: ValueError: no licence"),
        ("own_models.detectors:factry", "no 'factry'.*'factory'"),
        ("own_models.detectors:number", "gives a int; expected a function that returns an nn.Module"),
        ("own_models.detectors:wrong", "gives a str"),
        ("own_models.detectors:needs", "called without arguments, failed: TypeError.*width"),
        ("timm:resnet81", "timm has no model 'resnet81'.*resnet"),
        ("torchvision:retinanet", "no detector 'retinanet'.*'retinanet_resnet50_fpn'"),
    ],
)
def test_a_mistake_names_what_was_found_and_expected(name, words):
    if name.startswith(("timm:", "torchvision:")):
        pytest.importorskip(name.split(":")[0])
    with pytest.raises(ModelNameError, match=words):
        load_model(name)


def test_a_missing_yolo_file():
    pytest.importorskip("ultralytics")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_model("nowhere.pt")


def test_weights_are_random_and_nothing_is_downloaded(monkeypatch):
    pytest.importorskip("torchvision")

    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    load_model("torchvision:ssdlite320_mobilenet_v3_large")
