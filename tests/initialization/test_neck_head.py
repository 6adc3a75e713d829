import copy

import pytest
import torch
from torch import nn

from fgd_hooks.errors import TapError
from fgd_hooks.initialization.neck_head import find_parts
from tests.helpers.tiny import TinyDetector, TinyHead, TinyNeck, block


class Nested(nn.Module):
    """As torchvision's: body and neck together in the backbone, the head of two branches that get the levels apart."""

    def __init__(self):
        super().__init__()
        widths = (8, 12, 16)
        self.backbone = nn.Module()
        self.backbone.body = nn.ModuleList([block(3, 8, 8), block(8, 12, 2), block(12, 16, 2)])
        self.backbone.fpn = TinyNeck(widths)
        self.classes, self.boxes = TinyHead(widths), TinyHead(widths)

    def forward(self, images):
        maps = []
        for stage in self.backbone.body:
            images = stage(images)
            maps.append(images)
        maps = self.backbone.fpn(maps)
        return self.classes(maps), self.boxes(list(maps))


class WithoutNeck(TinyDetector):
    def __init__(self):
        super().__init__()
        self.neck = nn.Identity()


def test_neck_and_head_of_a_plain_detector():
    assert find_parts(TinyDetector()) == {"neck": ["neck"], "head": ["head"]}


def test_parts_are_named_by_their_largest_modules():
    assert find_parts(Nested()) == {"neck": ["backbone.fpn"], "head": ["classes", "boxes"]}


def test_a_detector_without_a_neck():
    assert find_parts(WithoutNeck()) == {"neck": [], "head": ["head"]}


def test_a_backbone_has_neither():
    class Backbone(TinyDetector):
        def forward(self, images):
            maps = [self.stem(images)]
            for stage in self.stages:
                maps.append(stage(maps[-1]))
            return maps

    assert find_parts(Backbone()) == {"neck": [], "head": []}


def test_the_probe_leaves_no_trace():
    model = TinyDetector().train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    find_parts(model)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_levels():
    with pytest.raises(TapError, match="No feature levels"):
        find_parts(nn.Sequential(nn.Conv2d(3, 4, 1)), role="teacher")
