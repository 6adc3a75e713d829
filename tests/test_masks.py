"""Boxes to masks: properties that any batch has to satisfy, and the errors for boxes that are wrong."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fgd_hooks.masks
from fgd_hooks.masks import PackedBoxes, box_masks, check_boxes
from tests.helpers.reference import slow_masks

examples = settings(deadline=None, max_examples=30, derandomize=True)

SIDES = st.integers(1, 12)
NUMBERS = st.floats(-60, 160, width=32)
CORNERS = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS)


@st.composite
def batches(draw, images=3, most=5):
    """Box tensors with any corners (inverted, degenerate, outside), canvas sizes, map height and width."""
    count = draw(st.integers(1, images))
    boxes = [torch.tensor(draw(st.lists(CORNERS, max_size=most))).reshape(-1, 4).float() for _ in range(count)]
    canvas = draw(st.lists(st.tuples(st.integers(1, 120), st.integers(1, 120)), min_size=count, max_size=count))
    return boxes, canvas, draw(SIDES), draw(SIDES)


def masks(boxes, canvas, height, width, dtype=torch.float64):
    return box_masks(PackedBoxes.from_list(boxes, canvas), height, width, dtype)


@examples
@given(batches())
def test_equal_to_the_slow_reference(batch):
    for found, wanted in zip(masks(*batch), slow_masks(*batch), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)


@examples
@given(batches(), st.randoms(use_true_random=False))
def test_order_of_boxes_does_not_matter(batch, random):
    boxes, *rest = batch
    shuffled = [of_image[random.sample(range(len(of_image)), len(of_image))] for of_image in boxes]
    for a, b in zip(masks(boxes, *rest), masks(shuffled, *rest), strict=True):
        assert torch.equal(a, b)


@examples
@given(batches())
def test_flat_and_list_agree_in_any_order(batch):
    boxes, canvas, height, width = batch
    image = torch.cat([torch.full((len(of_image),), float(i)) for i, of_image in enumerate(boxes)])
    order = torch.arange(len(image)).flip(0)
    flat = PackedBoxes.from_flat(torch.cat(boxes)[order], image[order], len(boxes), canvas)
    assert len(flat) == sum(map(len, boxes))
    for a, b in zip(box_masks(flat, height, width, torch.float64), masks(*batch), strict=True):
        assert torch.equal(a, b)


@examples
@given(batches())
def test_background_is_what_no_box_covers(batch):
    foreground, background = masks(*batch)
    assert bool(((foreground > 0) ^ (background > 0) | (background.sum((1, 2), keepdim=True) == 0)).all())
    for fg, bg in zip(foreground, background, strict=True):
        wanted = 1.0 if bool((fg == 0).any()) else 0.0
        assert float(bg.sum()) == pytest.approx(wanted, abs=1e-12)


@examples
@given(batches())
def test_images_do_not_mix(batch):
    boxes, canvas, height, width = batch
    together = masks(*batch)
    for i in range(len(boxes)):
        alone = masks(boxes[i : i + 1], canvas[i : i + 1], height, width)
        assert torch.equal(together[0][i], alone[0][0])
        assert torch.equal(together[1][i], alone[1][0])


def test_smallest_box_wins():
    large, small = [0.0, 0.0, 70.0, 70.0], [30.0, 30.0, 40.0, 40.0]
    foreground, background = masks([torch.tensor([small, large])], (80, 80), 8, 8)
    # 30..40 pixels are cells 3..4, both included; 0..70 are cells 0..7.
    assert foreground[0, 3:5, 3:5].eq(1 / 4).all()
    assert foreground[0].eq(1 / 4).sum() == 4
    assert foreground[0, 0].eq(1 / 64).all()
    assert background.eq(0).all()


def test_one_more_cell_than_ceil():
    foreground, background = masks([torch.tensor([[10.0, 20.0, 30.0, 40.0]])], (80, 80), 8, 8)
    wanted = torch.zeros(8, 8, dtype=torch.float64)
    wanted[2:5, 1:4] = 1 / 9
    assert torch.equal(foreground[0], wanted)
    torch.testing.assert_close(background[0], (wanted == 0) / torch.tensor(55.0, dtype=torch.float64))


def test_area_counts_what_is_cut_off_right_and_below_but_not_left_and_above():
    beyond = masks([torch.tensor([[60.0, 60.0, 110.0, 90.0]])], (80, 80), 8, 8)[0]
    assert beyond[0, 6:, 6:].eq(1 / (4 * 6)).all() and beyond.gt(0).sum() == 4  # rows 6..9, columns 6..11
    before = masks([torch.tensor([[-50.0, -50.0, 10.0, 20.0]])], (80, 80), 8, 8)[0]
    assert before[0, :3, :2].eq(1 / 6).all() and before.gt(0).sum() == 6


def test_coordinates_are_rounded_in_float32_division_first():
    # 13 / 22 * 22 is 12.999999 in float32; float64, or a multiplication first, gives 13.
    foreground, _ = masks([torch.tensor([[13.0, 0.0, 15.0, 1.0]])], (22, 22), 1, 22)
    assert foreground[0, 0].nonzero().flatten().tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize(
    "box",
    [[200.0, 10, 300, 30], [10.0, 200, 30, 300], [-90.0, 10, -50, 30], [50.0, 10, 30, 30], [10.0, 50, 30, 20]],
    ids=["right", "below", "left", "inverted x", "inverted y"],
)
def test_boxes_that_cover_nothing(box):
    foreground, background = masks([torch.tensor([box])], (80, 80), 8, 8)
    assert foreground.eq(0).all()
    assert background.eq(1 / 64).all()


def test_degenerate_box_covers_its_cell():
    foreground, _ = masks([torch.tensor([[35.0, 45.0, 35.0, 45.0]])], (80, 80), 8, 8)
    assert foreground[0, 4:6, 3:5].eq(1 / 4).all() and foreground.gt(0).sum() == 4


def test_no_boxes_at_all():
    foreground, background = masks([torch.zeros(0, 4), torch.zeros(0)], (80, 40), 4, 5)
    assert foreground.eq(0).all()
    assert background.eq(1 / 20).all()


def test_thousand_boxes(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1000, 2, generator=generator) * 150
    boxes = [torch.cat((corner, corner + torch.rand(1000, 2, generator=generator) * 10), 1)]
    at_once = masks(boxes, (160, 160), 20, 20)
    monkeypatch.setattr("fgd_hooks.masks._CPU_CHUNK", 400 * 7)
    in_chunks = masks(boxes, (160, 160), 20, 20)
    slow = slow_masks(boxes, [(160, 160)], 20, 20)
    for a, b, c in zip(at_once, in_chunks, slow, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_masks(dtype):
    pair = masks([torch.tensor([[1, 2, 30, 40]])], torch.tensor([80, 80]), 8, 8, dtype)
    assert all(mask.dtype == dtype and mask.shape == (1, 8, 8) for mask in pair)


def test_infinite_corner_is_no_nan():
    foreground, background = masks([torch.tensor([[10.0, 10, math.inf, 30], [0.0, 0, 9, 9]])], (80, 80), 8, 8)
    assert foreground.isfinite().all() and background.isfinite().all()
    assert foreground[0, 0, 0] == 1 / 4


def test_nan_box_is_an_error_that_names_it():
    good = torch.tensor([[1.0, 2, 3, 4]])
    with pytest.raises(ValueError, match=r"Image 1, box 1 has NaN"):
        PackedBoxes.from_list([good, torch.cat((good, good * math.nan))], (80, 80))


@pytest.mark.parametrize(
    ("boxes", "canvas", "message"),
    [
        (torch.zeros(2, 4), (80, 80), "list"),
        ([torch.zeros(2, 5)], (80, 80), r"boxes\[0\].*shape \(n, 4\).*\(2, 5\)"),
        ([torch.zeros(4)], (80, 80), "shape"),
        ([[1, 2, 3, 4]], (80, 80), "tensor"),
        ([torch.zeros(1, 4, dtype=torch.bool)], (80, 80), "dtype"),
        ([torch.zeros(1, 4)], (0, 80), "positive"),
        ([torch.zeros(1, 4)], [(80, 80), (80, 80)], "1 images"),
        ([torch.zeros(1, 4), torch.zeros(1, 4)], torch.tensor([[80, 80], [80, -1]]), "positive"),
    ],
)
def test_from_list_errors(boxes, canvas, message):
    with pytest.raises(ValueError, match=message):
        PackedBoxes.from_list(boxes, canvas)


def test_from_flat_errors():
    with pytest.raises(ValueError, match="one number per box"):
        PackedBoxes.from_flat(torch.zeros(2, 4), torch.zeros(3), 1, (80, 80))
    with pytest.raises(ValueError, match=r"0\.\.1, found 0\.\.2"):
        PackedBoxes.from_flat(torch.zeros(2, 4), torch.tensor([0, 2]), 2, (80, 80))


def test_to_same_device_is_free():
    packed = PackedBoxes.from_list([torch.zeros(1, 4)], (80, 80))
    assert packed.to("cpu") is packed


GOOD = torch.tensor([[10.0, 20, 30, 40], [300.0, 100, 660, 500]])


def test_check_accepts_good_boxes_and_slight_overshoot():
    check_boxes([GOOD, torch.zeros(0, 4)], (640, 640))
    check_boxes(PackedBoxes.from_flat(GOOD, torch.tensor([0, 1]), 2, [(640, 640), (512, 640)]))
    check_boxes([torch.zeros(0, 4)], (640, 640))
    check_boxes([torch.tensor([[0.0, 0, 0.5, 0.5]])], (1, 1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([10.0, 20, math.inf, 40], "not finite"),
        ([300.0, 200, 50, 60], "cxcywh"),
        ([900.0, 20, 950, 40], "outside its canvas"),
        ([10.0, -400, 30, -300], "outside its canvas"),
    ],
)
def test_check_names_image_and_box(wrong, message):
    with pytest.raises(ValueError, match=rf"Image 1, box 2 .*{message}|Image 1, box 2 {message}"):
        check_boxes([GOOD, torch.cat((GOOD, torch.tensor([wrong])))], (640, 640))


def test_check_normalised_boxes():
    with pytest.raises(ValueError, match="look normalised"):
        check_boxes([GOOD / 700, GOOD / 800], (640, 640))
    check_boxes([GOOD / 700, GOOD], (640, 640))  # one tiny box among others is none of that


def test_check_wants_a_canvas():
    with pytest.raises(ValueError, match="canvas is missing"):
        check_boxes([GOOD])


def test_boxes_go_to_a_gpu_through_pinned_memory(monkeypatch):
    """Pinning keeps the strides and copies into them, which torch refuses where rows overlap; here on no GPU."""

    def pin(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(fgd_hooks.masks, "_PINNED_FOR", ("meta",))
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.zeros(1, 2).expand(3, 2).pin_memory()
    boxes = [torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.zeros(0, 4), torch.zeros(0, 4)]
    moved = PackedBoxes.from_list(boxes, (8, 8)).to("meta")
    assert (moved.canvas.shape, moved.boxes.shape, moved.canvas.device.type) == ((3, 2), (1, 4), "meta")
    none = PackedBoxes.from_list([torch.zeros(0, 4, device="meta")] * 2, (8, 8))
    assert (none.boxes.device.type, none.canvas.shape) == ("meta", (2, 2))


@pytest.mark.parametrize("form", ["XYXY", "XYWH", "CXCYWH"])
def test_boxes_that_say_their_format_are_converted(form):
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    from torchvision.ops import box_convert

    corners = torch.tensor([[8.0, 8, 40, 24], [0, 4, 10, 12]])
    given = tv_tensors.BoundingBoxes(box_convert(corners, "xyxy", form.lower()), format=form, canvas_size=(64, 64))
    for packed in (
        PackedBoxes.from_list([given], (64, 64)),
        PackedBoxes.from_flat(given, torch.zeros(2), 1, (64, 64)),
    ):
        assert type(packed.boxes) is Tensor
        assert torch.equal(packed.boxes, corners)


def test_boxes_of_another_format_are_refused():
    class Turned(torch.Tensor):
        format = SimpleNamespace(name="CXCYWHR")

    with pytest.raises(ValueError, match="CXCYWHR"):
        PackedBoxes.from_list([torch.ones(1, 4).as_subclass(Turned)], (8, 8))
