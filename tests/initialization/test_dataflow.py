"""Which layers take what others give, and which blocks of a deeper teacher a student's are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fgd_hooks.initialization.dataflow import counterparts, layer_graph, repeats_itself
from tests.helpers.tiny import TinyDetector


class Branches(nn.Module):
    """Two layers whose outputs are joined, one that predicts from them, one that takes what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 1)
        self.other = nn.Conv2d(3, 4, 1)
        self.scores = nn.Conv2d(8, 5, 1)
        self.again = nn.Conv2d(5, 5, 1)
        self.vector = nn.Linear(5, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.one(images).relu_(), torch.sigmoid(self.other(images))], 1)
        scores = self.scores(joined)
        return scores, self.vector(self.again(self.again(scores)).mean((2, 3)))


def test_layers_whose_outputs_others_take():
    model = Branches()
    graph = layer_graph(model, torch.rand(2, 3, 4, 4))
    assert graph == {"one": {"scores"}, "other": {"scores"}, "scores": {"again"}, "again": {"again", "vector"}}
    assert repeats_itself("again", graph)
    assert not repeats_itself("scores", graph)


def test_the_pass_leaves_no_trace():
    model = TinyDetector().train()
    model.stem[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    layer_graph(model, torch.rand(2, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["stem.0.weight"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"The student \(TinyDetector\) cannot be run on the images"):
        layer_graph(model, "no images")


def stage(blocks: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(blocks)))


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (2, 2, [("", "")]),
        (2, 5, [("deep.0", "deep.0"), ("deep.1", "deep.4"), ("last", "last")]),
        (3, 5, [("deep.0", "deep.0"), ("deep.1", "deep.2"), ("deep.2", "deep.4"), ("last", "last")]),
        (1, 3, [("", "")]),
        (5, 2, [("", "")]),
    ],
)
def test_blocks_of_a_deeper_teacher_are_taken_evenly(mine, theirs, expected):
    models = [nn.ModuleDict({"deep": stage(blocks), "last": nn.Conv2d(4, 4, 1)}) for blocks in (mine, theirs)]
    assert counterparts(*models) == expected


def test_sequences_of_different_things_pair_by_name():
    layers = [nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)]
    assert counterparts(nn.Sequential(*layers[:2]), nn.Sequential(*layers)) == [("", "")]
    levels = [nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(count)) for count in (2, 3)]
    assert counterparts(*levels) == [("", "")], "these may be levels as well as blocks"
