"""Tokens and channels-last maps: where each token lands, gradients, and what is refused."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from fgd_hooks import Distiller
from fgd_hooks.errors import LayoutError, TapError
from fgd_hooks.taps.canvas import fits
from fgd_hooks.taps.hooks import FeatureTaps, run_until_tapped
from fgd_hooks.taps.layout import Layout, infer_layout
from fgd_hooks.taps.levels import common_size, find_levels
from fgd_hooks.taps.probe import fixed_size, probe_input
from fgd_hooks.taps.tap import Tap, replaced
from tests.helpers.tiny import TinyDetector, batch

CELL = 8


class Tokens(nn.Module):
    """A transformer in miniature: patches of 8 x 8 pixels, prefix tokens, two blocks, a head over all tokens."""

    def __init__(self, width: int = 6, prefix: int = 1, say: bool = True) -> None:
        super().__init__()
        if say:
            self.num_prefix_tokens = prefix
        self.patches = nn.Conv2d(3, width, CELL, CELL)
        self.prefix = nn.Parameter(torch.full((1, prefix, width), 99.0))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return {"scores": self.head(self.norm(tokens))}


class ChannelsLast(nn.Module):
    """Two maps (N, H, W, C) of the strides 8 and 16, in a list."""

    def __init__(self, widths=(6, 10)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 8, 8)
        self.down = nn.Conv2d(widths[0], widths[1], 2, 2)

    def forward(self, images):
        fine = self.stem(images)
        return [fine.permute(0, 2, 3, 1), self.down(fine).permute(0, 2, 3, 1)]


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_a_token_lands_on_the_cell_that_it_stands_for(prefix):
    rows, columns, cell = 3, 5, 16
    places = torch.tensor([[row, column] for row in range(rows) for column in range(columns)], dtype=torch.float32)
    tokens = torch.cat([torch.full((prefix, 2), -1.0), places])[None].repeat(2, 1, 1)
    found = Layout(cell, prefix).to_map(tokens, (rows * cell, columns * cell))
    assert found.shape == (2, 2, rows, columns)
    for row in range(rows):
        for column in range(columns):
            assert found[1, :, row, column].tolist() == [row, column]


@pytest.mark.parametrize("layout", [Layout(4, 0), Layout(4, 3), Layout()])
def test_there_and_back_is_the_feature_itself(layout):
    feature = torch.randn(2, 2, 3, 7) if layout.cell is None else torch.randn(2, 6 + layout.prefix, 7)
    assert torch.equal(layout.from_map(layout.to_map(feature, (8, 12)), feature), feature)


@pytest.mark.parametrize("images", [(40, 24), (45, 27)])
def test_patches_that_are_not_full_are_left_out_or_padded(images):
    left_out, padded = 5 * 3, -(-images[0] // 8) * -(-images[1] // 8)
    assert Layout(8, 1).grid(left_out + 1, images) == (5, 3)
    assert Layout(8, 1).grid(padded + 1, images) == (-(-images[0] // 8), -(-images[1] // 8))


def test_tokens_that_do_not_cover_the_images_are_refused():
    with pytest.raises(LayoutError, match=r"16 tokens do not cover images of 40 x 24 pixels.*each 8 x 8.*5 x 3"):
        Layout(8).to_map(torch.zeros(1, 16, 2), (40, 24))
    with pytest.raises(LayoutError, match=r"tokens \(N, L, C\)"):
        Layout(8).to_map(torch.zeros(1, 2, 5, 3), (40, 24))
    with pytest.raises(LayoutError, match="channels-last"):
        Layout().to_map(torch.zeros(1, 15, 3), (40, 24))


def test_text_forms():
    for text, layout in (("16", Layout(16)), ("16+5", Layout(16, 5)), ("nhwc", Layout())):
        tap = Tap.parse(f"blocks.1[0]@{text}")
        assert tap == Tap("blocks.1", index=(0,))
        assert tap.layout == layout
        assert Tap.parse(str(tap)).layout == layout
    for text in ("16+", "0", "nchw", "+1"):
        with pytest.raises(TapError, match=r"cannot be read.*16\+1"):
            Tap.parse(f"blocks.1@{text}")


@pytest.mark.parametrize(
    ("shape", "prefix", "expected"),
    [
        ((1, 8, 32, 32), None, None),  # a map as usual
        ((1, 32, 32, 8), None, Layout()),
        ((1, 32, 32, 32), None, None),  # could be both
        ((1, 3, 5, 5), None, None),  # neither: left as it is
        ((1, 1024, 8), None, Layout(8, 0)),
        ((1, 1025, 8), None, Layout(8, 1)),
        ((1, 261, 8), None, Layout(16, 5)),
        ((1, 261, 8), 5, Layout(16, 5)),
    ],
)
def test_layouts_are_told_from_shapes(shape, prefix, expected):
    assert infer_layout(torch.zeros(shape), (256, 256), prefix) == expected


def test_what_cannot_be_told_says_how_to_give_it():
    with pytest.raises(LayoutError, match=r"100 tokens over images of 256 x 256.*no square cell.*'blocks\.11@16\+1'"):
        infer_layout(torch.zeros(1, 100, 8), (256, 256))
    with pytest.raises(LayoutError, match=r"several are possible: 64\+0, 128\+12"):
        infer_layout(torch.zeros(1, 16, 8), (256, 256))


def test_cells_cover_a_canvas_that_is_not_square():
    assert fits((20, 12), (160, 96))
    assert fits((6, 4), (45, 27))
    assert not fits((12, 20), (160, 96))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("say", [True, False])
def test_a_named_tap_gives_the_map_of_the_tokens(prefix, say):
    model = Tokens(prefix=prefix, say=say)
    (level,) = find_levels(model, ["blocks.0"])
    assert (level.stride, level.channels, level.size) == (CELL, 6, (32, 48))
    assert level.tap.layout == Layout(CELL, prefix, "patches")
    images = torch.rand(2, 3, 40, 24)  # another size than the probe's
    with FeatureTaps(model, [level.tap], stop=True) as taps:
        (found,) = run_until_tapped(model, taps, images)
    expected = model.blocks[0](model.patches(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)


def test_a_model_that_says_its_prefix_is_found_without_a_name():
    (level,) = find_levels(Tokens(prefix=2))
    assert str(level.tap) == "norm@8+2"


def test_queries_are_not_taken_for_tokens():
    class Queries(Tokens):
        def __init__(self):
            super().__init__(say=False)
            self.queries = nn.Identity()

        def forward(self, images):
            return self.queries(super().forward(images)["scores"].new_zeros(1, 100, 6))

    with pytest.raises(TapError, match="No feature levels"):
        find_levels(Queries())
    with pytest.raises(TapError, match=r"model's tap queries cannot be used.*\(1, 100, 6\).*@16\+1"):
        find_levels(Queries(), ["queries"])


def test_a_backbone_inside_another_model_takes_the_size_of_its_own_images():
    class Resizing(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Tokens()

        def forward(self, images):
            return self.backbone(nn.functional.interpolate(torch.stack(list(images)), (256, 256)))

    model = Resizing()
    (level,) = find_levels(model, ["backbone.blocks.1"])
    assert level.tap.layout.images == "backbone.patches"
    with FeatureTaps(model, [level.tap], stop=True) as taps:
        (found,) = run_until_tapped(model, taps, torch.rand(1, 3, 100, 60))
    assert found.shape == (1, 6, 32, 32)


def test_channels_last_levels_are_found_and_learn():
    student, teacher = ChannelsLast(), ChannelsLast((8, 12)).eval()
    images, boxes = batch(size=64)
    with Distiller(student, teacher=teacher) as distiller:
        assert [(level.name, level.channels, str(level.tap)) for level in distiller.found_levels[0].student] == [
            ("P3", 6, "(model)[0]@nhwc"),
            ("P4", 10, "(model)[1]@nhwc"),
        ]
        maps = student(images)
        features = distiller.taps.captured
        for seen, feature in zip(maps, features, strict=True):
            assert torch.equal(seen, feature.permute(0, 2, 3, 1))
        taught = distiller.teacher_features(images)
        assert [tuple(each.shape) for each in taught] == [(2, 8, 8, 8), (2, 12, 4, 4)]
        distiller(images, boxes)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_learn_and_the_balance_measures_them(prefix):
    torch.manual_seed(0)
    student, teacher = Tokens(prefix=prefix), Tokens(9, prefix=2)
    images, boxes = batch(size=64)
    with torch.no_grad():
        before = student(images)["scores"]
    with Distiller(student, teacher=teacher) as distiller:
        assert torch.equal(student(images)["scores"], before)
        for _ in range(3):
            student.zero_grad()
            task = student(images)["scores"].square().mean()
            (task + distiller(images, boxes).loss).backward()
        assert distiller.balance.unmeasured == []
        both = student.patches.weight.grad.clone()
        student.zero_grad()
        student(images)["scores"].square().mean().backward()
        assert not torch.allclose(both, student.patches.weight.grad)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in student.modules())


def test_the_gradient_at_the_map_is_the_task_s():
    student = Tokens(prefix=1)
    images, _ = batch(size=64)
    (level,) = find_levels(student, ["blocks.0"])
    with FeatureTaps(student, [level.tap], grad_only=True) as taps:
        loss = student(images)["scores"].square().mean()
        (feature,) = taps.pop()
        (found,) = torch.autograd.grad(loss, feature)
    seen = {}
    handle = student.blocks[0].register_forward_hook(lambda module, args, out: seen.update(out=out))
    loss = student(images)["scores"].square().mean()
    (expected,) = torch.autograd.grad(loss, seen["out"])
    handle.remove()
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected[:, 1:])


def test_tokens_pair_with_a_convolutional_level_of_the_same_stride():
    with Distiller(Tokens(), teacher=TinyDetector()) as distiller:
        assert [(pair.name, pair.student.channels, pair.teacher.channels) for pair in distiller.pairs] == [("P3", 6, 8)]


def test_a_tap_on_an_input_goes_on_from_the_map_as_well():
    student = Tokens(prefix=1)
    images, _ = batch(size=64)
    (level,) = find_levels(student, ["norm:input"])
    with FeatureTaps(student, [level.tap], grad_only=True) as taps:
        loss = student(images)["scores"].square().mean()
        assert torch.autograd.grad(loss, taps.pop()[0])[0].abs().sum() > 0


def test_replaced_copies_the_containers_on_the_way_alone():
    Pair = namedtuple("Pair", "left right")
    given = {"a": [1, (2, 3)], "b": Pair(4, OrderedDict(x=5))}
    assert replaced(given, ("a", 1, 0), 9) == {"a": [1, (9, 3)], "b": given["b"]}
    assert replaced(given, ("b", 1, "x"), 9)["b"] == Pair(4, {"x": 9})
    assert given == {"a": [1, (2, 3)], "b": Pair(4, {"x": 5})}


def test_models_of_one_size_are_probed_at_it():
    def strict(*size):
        model = Tokens()
        model.patches.strict_img_size, model.patches.img_size = True, size
        return model

    assert fixed_size(strict(112, 96)) == (112, 96)
    assert probe_input(strict(112, 96)).shape == (1, 3, 112, 96)
    assert probe_input(Tokens()).shape == (1, 3, 256, 256)
    assert common_size([TinyDetector(), strict(112, 96)]) == (112, 96)
    with pytest.raises(ValueError, match=r"112 x 96 and 64 x 64 pixels only.*img_size"):
        common_size([strict(112, 96), strict(64, 64)])
    with Distiller(TinyDetector(), teacher=strict(96, 64)) as distiller:
        assert distiller.pairs[0].teacher.size == (12, 8)
