"""Detectors of a timm backbone, torchvision's FPN and each kind of head."""

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from fgd_hooks.errors import ConfigError
from fgd_hooks.integrations.torchvision import TorchvisionDistiller
from tests.helpers.tiny_detectors import rectangles


def build(backbone="test_efficientnet", **settings):
    from detector_settings import ImageSettings
    from timm_detector import TimmModel, build_model

    torch.manual_seed(0)
    model = TimmModel(backbone=backbone, pretrained=False, **{"channels": 32, **settings})
    return build_model(model, 2, ImageSettings([64], 96))


@pytest.mark.parametrize("head", ["retinanet", "fcos", "faster_rcnn"])
def test_each_kind_of_detector_learns_from_its_like(head):
    student, teacher = build(head=head), build("test_resnet", head=head, channels=64)
    images, targets = rectangles()
    with TorchvisionDistiller(student, teacher=teacher) as distiller:
        assert distiller.level_names == ["P3", "P4", "P5"]
        assert [pair.teacher.channels for pair in distiller.pairs] == [64] * 3
        for _ in range(3):
            losses = student(images, targets)
            (sum(losses.values()) + distiller().loss).backward()
        assert distiller.balance.unmeasured == []
    with torch.no_grad():
        found = student.eval()(images)
    assert all(set(each) == {"boxes", "labels", "scores"} for each in found)


def test_the_transform_normalises_as_the_backbone_wants():
    student, teacher = build(), build("test_resnet")
    assert tuple(student.transform.image_mean) == (0.485, 0.456, 0.406)
    assert tuple(teacher.transform.image_std) == (0.5, 0.5, 0.5)
    seen = {}
    teacher.backbone.body.register_forward_pre_hook(lambda module, args: seen.update(images=args[0]))
    images, targets = rectangles()
    with TorchvisionDistiller(student, teacher=teacher) as distiller:
        student(images, targets)
        distiller()
    white = seen["images"][0][:, 40:50, 16:24]  # inside the rectangle, away from its border, at 64 / 80 of its size
    torch.testing.assert_close(white, torch.ones_like(white))


def test_levels_and_anchors():
    model = build(strides=[8, 16], p6p7=True, anchors=[8, 16, 32, 64])
    assert [tuple(sizes) for sizes in model.anchor_generator.sizes][:2] == [(8, 10, 13), (16, 20, 25)]
    assert list(model.backbone(torch.zeros(1, 3, 64, 64))) == ["0", "1", "p6", "p7"]
    rcnn = build(head="faster_rcnn", strides=[4, 8, 16, 32])
    assert [sizes[0] for sizes in rcnn.rpn.anchor_generator.sizes] == [16, 32, 64, 128, 256]
    assert rcnn.roi_heads.box_roi_pool.featmap_names == ["0", "1", "2", "3"]
    assert [sizes[0] for sizes in build(head="fcos").anchor_generator.sizes] == [8, 16, 32]


def test_channels_last_backbones_and_frozen_parts():
    model = build("test_mambaout", head="fcos")
    assert [tuple(each.shape) for each in model.backbone(torch.zeros(1, 3, 64, 64)).values()] == [
        (1, 32, 8, 8),
        (1, 32, 4, 4),
        (1, 32, 2, 2),
    ]
    frozen = build(frozen=["conv_stem", "bn1"])
    stem = {name for name, each in frozen.backbone.body.named_parameters() if not each.requires_grad}
    assert "conv_stem.weight" in stem
    before = frozen.backbone.body.bn1.running_mean.clone()
    frozen.train()(*rectangles())
    assert torch.equal(frozen.backbone.body.bn1.running_mean, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "yolo"}, "head is 'yolo'.*retinanet"),
        ({"strides": [8, 64]}, r"strides names \[64\].*\[2, 4, 8, 16, 32\]"),
        ({"anchors": [8]}, r"anchors has 1 sizes.*\[8, 16, 32\]"),
    ],
)
def test_errors_say_what_was_expected(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)
