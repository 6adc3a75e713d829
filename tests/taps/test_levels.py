import copy
import logging
import random

import numpy as np
import pytest
import torch
from torch import nn

from fgd_hooks.errors import PairingError, TapError
from fgd_hooks.pairing import pair_levels
from fgd_hooks.taps.levels import find_levels
from fgd_hooks.taps.tap import Tap
from tests.helpers.tiny import TinyDetector, batch, trained


def test_automatic_levels_are_the_maps_that_feed_the_head():
    levels = find_levels(TinyDetector((8, 12, 16)))
    assert [(level.name, level.stride, level.channels) for level in levels] == [
        ("P3", 8, 8),
        ("P4", 16, 12),
        ("P5", 32, 16),
    ]
    assert [level.tap for level in levels] == [Tap("head", "input", (i,)) for i in range(3)]


def test_outputs_serve_where_no_module_receives_levels():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, 4, 1), nn.Conv2d(4, 6, 3, 2, 1)

        def forward(self, x):
            x = self.a(x)
            return {"fine": x, "coarse": self.b(x)}

    levels = find_levels(Backbone())
    assert [(level.stride, level.channels, str(level.tap)) for level in levels] == [
        (4, 4, "(model)[fine]"),
        (8, 6, "(model)[coarse]"),
    ]


def test_a_head_that_is_called_by_keyword():
    class ByKeyword(TinyDetector):
        def forward(self, images):
            features = [self.stem(images)]
            for stage in self.stages:
                features.append(stage(features[-1]))
            return self.head(features=self.neck(features))

    levels = find_levels(ByKeyword((8, 12, 16)))
    assert [level.tap for level in levels] == [Tap("head", "input", (i,)) for i in range(3)]


def test_a_module_that_runs_once_per_level_is_no_tap():
    class Shared(TinyDetector):
        def __init__(self):
            super().__init__((8, 8, 8))
            self.neck.out[1] = self.neck.out[2] = self.neck.out[0]

    with pytest.raises(TapError, match=r"neck\.out\.0 runs 3 times"):
        find_levels(Shared(), ["neck.out.0"])


def test_named_taps_globs_and_collections():
    model = TinyDetector()
    assert [level.stride for level in find_levels(model, ["neck.out.*"])] == [8, 16, 32]
    assert [level.stride for level in find_levels(model, ["stages.0", "stem"])] == [8, 16]
    assert [str(level.tap) for level in find_levels(model, ["neck"])] == ["neck[0]", "neck[1]", "neck[2]"]


def test_no_levels_is_an_error_that_says_what_to_do():
    with pytest.raises(TapError, match="Name the taps"):
        find_levels(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))


def test_a_probe_that_fails_is_told():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("needs two arguments")

    with pytest.raises(TapError, match="needs two arguments"):
        find_levels(Broken())


def test_the_probe_leaves_no_trace():
    class Caching(TinyDetector):
        def forward(self, images):
            self.anchors = torch.rand(3)  # a head that caches, and a use of the global random states
            random.random()
            np.random.rand()
            return super().forward(images)

    model = trained(Caching())
    model.neck.eval()  # a mixture of modes must survive
    before_modes = [m.training for m in model.modules()]
    before_state = copy.deepcopy(model.state_dict())
    model.anchors = anchors = torch.zeros(3)
    model(batch()[0])["scores"].sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.anchors = anchors
    model.load_state_dict(before_state)
    random_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    find_levels(model)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert random.getstate() == python_state
    assert (np.random.get_state()[1] == numpy_state).all()
    assert [m.training for m in model.modules()] == before_modes
    assert model.anchors is anchors
    assert all(torch.equal(value, before_state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_probe_leaves_no_trace_after_an_error():
    model = TinyDetector().train()
    with pytest.raises(TapError):
        find_levels(model, ["head"])
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_levels_pair_by_stride_and_the_rest_is_said(caplog):
    student = find_levels(TinyDetector((8, 12, 16), first=8))
    teacher = find_levels(TinyDetector((4, 6, 8, 10), first=4))
    with caplog.at_level(logging.WARNING, logger="fgd_hooks"):
        pairs = pair_levels(student, teacher=teacher)
    assert [(p.name, p.student.channels, p.teacher.channels) for p in pairs] == [
        ("P3", 8, 6),
        ("P4", 12, 8),
        ("P5", 16, 10),
    ]
    assert "P2" in caplog.text
    assert "teacher" in caplog.text


def test_nothing_in_common_prints_both_pyramids():
    student = find_levels(TinyDetector((8, 12), first=4))
    teacher = find_levels(TinyDetector((8, 12), first=16))
    with pytest.raises(PairingError) as raised:
        pair_levels(student, teacher=teacher)
    message = str(raised.value)
    assert all(text in message for text in ("stride 4 ", "stride 8 ", "stride 16", "stride 32"))


def test_several_levels_of_one_stride_pair_in_order():
    student = find_levels(TinyDetector((8, 12)), ["stem", "neck.out.0"])
    teacher = find_levels(TinyDetector((6, 9)), ["stem", "neck.out.0"])
    pairs = pair_levels(student, teacher=teacher)
    assert [p.name for p in pairs] == ["P3", "P3_2"]
    assert [(str(p.student.tap), str(p.teacher.tap)) for p in pairs] == [("stem", "stem"), ("neck.out.0", "neck.out.0")]
