import copy

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from torchvision.models import detection

from fgd_hooks import Distiller
from fgd_hooks.diagnostics.doctor import diagnose
from fgd_hooks.errors import PairingError, TapError, TeacherError
from fgd_hooks.initialization.initialize import initialize
from fgd_hooks.integrations.torchvision import TorchvisionDistiller, detector_parts, renormalise
from fgd_hooks.masks import PackedBoxes, box_masks
from tests.helpers.tiny_detectors import FAMILIES, SSDBody, build, rectangles

FIXED = {"balance": {"mode": "fixed"}, "schedule": {"stop": None}}
WIDE = (8, 12, 16, 24)
NORMALISATION = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 1.0]}


@pytest.fixture
def student():
    return build("retinanet")


@pytest.fixture
def teacher():
    return build("retinanet", WIDE, seed=1)


def spy(distiller, teacher):
    """The batches that the teacher's backbone gets, and the boxes that each level's loss gets, with their (H, W)."""
    batches, packed = [], {}
    teacher.backbone.register_forward_pre_hook(lambda module, args: batches.append(args[0]))
    for name, loss in distiller.losses.items():
        loss.register_forward_pre_hook(
            lambda module, args, name=name: packed.update({name: (args[2], *args[1].shape[2:])})
        )
    return batches, packed


def centre(weights):
    """Centre of mass (row, column) of (H, W), as a fraction of height and width."""
    mass = weights / weights.sum()
    height, width = weights.shape
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return torch.stack(((mass.sum(1) * rows).sum(), (mass.sum(0) * columns).sum()))


def misses(boxes, size, white):
    """How far, in cells, each image's foreground centre lies outside its white rectangle ((N, H, W), of pixels)."""
    foreground, _ = box_masks(boxes, *size)
    found = []
    for mask, pixels in zip(foreground, white, strict=True):
        rows, columns = pixels.any(1).nonzero(), pixels.any(0).nonzero()
        low = torch.stack((rows.min() / pixels.shape[0], columns.min() / pixels.shape[1]))
        high = torch.stack(((rows.max() + 1) / pixels.shape[0], (columns.max() + 1) / pixels.shape[1]))
        middle = centre((mask > 0).float())
        outside = torch.maximum(low - middle, middle - high) * torch.tensor(size)
        found.append(float(outside.max()))
    return found


def test_masks_lie_on_the_objects_of_images_of_different_sizes(student, teacher):
    images, targets = rectangles()
    with TorchvisionDistiller(student, teacher=teacher, config=FIXED) as distiller:
        batches, packed = spy(distiller, teacher)
        student(images, targets)
        distiller()
    (batch,) = batches
    assert batch.shape == (2, 3, 64, 128), "64 x 64 and 64 x 107 pixels, padded to a multiple of 32"
    white = (batch * 0.225 + 0.45 > 0.75).all(1)  # about the normalisation undone; padding is grey
    sizes = [(64, 64), (64, 107)]
    assert set(packed) == {"P3", "P4", "P5", "P6", "P7"}
    for name, (boxes, *size) in packed.items():
        assert max(misses(boxes, size, white)) <= 0.5, name
    boxes, *size = packed["P3"]
    unpadded = PackedBoxes.from_flat(boxes.boxes, boxes.image, 2, sizes)
    assert misses(unpadded, size, white)[0] > 0.5, "divided by the size without padding, the masks miss the objects"
    for row in range(2):  # corners to a pixel, against where the white is
        rows, columns = white[row].any(1).nonzero(), white[row].any(0).nonzero()
        corners = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        torch.testing.assert_close(boxes.boxes[row], corners.float(), atol=1.5, rtol=0)


def test_the_teacher_sees_the_students_pixels_in_its_own_normalisation(student):
    images, targets = rectangles()
    teacher = build("fcos", WIDE, seed=1, **NORMALISATION)
    with TorchvisionDistiller(student, teacher=teacher, config=FIXED) as distiller:
        batches, _ = spy(distiller, teacher)
        student(images, targets)
        distiller()
    expected, _ = teacher.transform(images)  # of the same sizes as the student's transform
    torch.testing.assert_close(batches[0], expected.tensors, atol=1e-5, rtol=0)


def test_the_geometry_is_the_students_whatever_the_teachers_transform_does(student):
    teacher = build("retinanet", WIDE, seed=1, min_size=200, max_size=300)
    with TorchvisionDistiller(student, teacher=teacher, config=FIXED) as distiller:
        batches, _ = spy(distiller, teacher)
        student(*rectangles())
        distiller()
        expected, _ = student.transform(rectangles()[0])
    assert torch.equal(batches[0], expected.tensors), "normalised alike: the very same numbers"


def test_the_teacher_may_be_kept_in_another_precision(student, teacher):
    with TorchvisionDistiller(student, teacher=teacher.to(torch.bfloat16), config=FIXED) as distiller:
        batches, _ = spy(distiller, teacher)
        student(*rectangles())
        assert distiller().loss.isfinite()
    assert batches[0].dtype == torch.bfloat16


def test_renormalise_by_hand():
    class Own:
        image_mean, image_std = (1.0,), (2.0,)

    class Other:
        image_mean, image_std = (3.0,), (4.0,)

    batch = torch.ones(1, 1, 2, 2)
    result = renormalise(batch, [(2, 2)], Own, Other)
    assert result.tolist() == [[[[0.0, 0.0], [0.0, 0.0]]]], "1 * 2 + 1 = 3 is the other's mean"
    result = renormalise(5 * batch, [(1, 2)], Own, Other)
    assert result.tolist() == [[[[2.0, 2.0], [0.0, 0.0]]]], "(5 * 2 + 1 - 3) / 4; padding is 0"
    result = renormalise(5 * batch, [(2, 1)], Own, Other)
    assert result.tolist() == [[[[2.0, 0.0], [2.0, 0.0]]]]
    assert renormalise(batch, [(1, 1)], Own, Own) is batch


def learns(student, teacher, levels, steps=20):
    """Levels pair; their gradient reaches the backbone; the distillation's loss falls; nothing stays behind."""
    before = hooks(student), hooks(teacher)
    images, targets = rectangles()
    student.train()
    # fitted adapters begin near the least loss, so that the student falls behind unless the distillation is heard
    distiller = TorchvisionDistiller(student, teacher=teacher, config={**FIXED, "weight": 1000.0})
    assert distiller.level_names == levels
    student(images, targets)
    tapped = distiller.taps.captured
    for pair, gradient in zip(distiller.pairs, torch.autograd.grad(distiller().loss, tapped), strict=True):
        assert gradient.abs().sum() > 0, f"the distillation's gradient reaches {pair.student.tap}"
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], 1e-3)
    losses = []
    for _ in range(steps):
        task = student(images, targets)
        distilled = distiller()
        (sum(task.values()) + distilled.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(distilled.loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    distiller.detach()
    assert (hooks(student), hooks(teacher)) == before
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


FINE, COARSE = ["P3", "P4", "P5"], ["P3", "P4", "P5", "P6", "P7"]
PAIRINGS = {
    ("retinanet", "retinanet"): COARSE,
    ("retinanet", "fcos"): COARSE,
    ("retinanet", "faster_rcnn"): FINE,
    ("retinanet", "mask_rcnn"): FINE,
    ("fcos", "retinanet"): COARSE,
    ("fcos", "mask_rcnn"): FINE,
    ("faster_rcnn", "retinanet"): FINE,
    ("faster_rcnn", "mask_rcnn"): ["P2", *FINE],
    ("mask_rcnn", "faster_rcnn"): ["P2", *FINE],
    ("mask_rcnn", "fcos"): FINE,
    ("ssd", "fcos"): [*FINE, "S96"],
    ("ssd", "mask_rcnn"): FINE,
}


def test_a_family_learns_from_another():
    learns(build("retinanet"), build("faster_rcnn", WIDE, seed=1), FINE)


@pytest.mark.slow
@pytest.mark.parametrize("families", PAIRINGS, ids="<-".join)
def test_every_family_learns_from_others(families):
    student, teacher = families
    learns(build(student), build(teacher, (8, 12, 24) if teacher == "ssd" else WIDE, seed=1), PAIRINGS[families])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_maps_of_the_neck_pair_for_every_family(family):
    with TorchvisionDistiller(build(family), teacher=build(family, seed=1)) as distiller:
        taps = [str(pair.student.tap) for pair in distiller.pairs]
        strides = [pair.student.stride for pair in distiller.pairs]
    if family == "ssd":  # its one canvas is 96 x 96
        assert (taps, strides) == ([f"backbone['{number}']" for number in range(4)], [8, 16, 32, 96])
    elif family in ("retinanet", "fcos"):
        assert strides == [8, 16, 32, 64, 128]
        assert taps == ["backbone['0']", "backbone['1']", "backbone['2']", "backbone[p6]", "backbone[p7]"]
    else:
        assert strides == [4, 8, 16, 32], "without pool, every second cell of P5"


def test_a_map_of_no_stride_in_common_has_no_partner(student, caplog):
    with TorchvisionDistiller(student, teacher=build("ssd", seed=1), config=FIXED) as distiller:
        assert distiller.level_names == FINE
    assert "Levels of the teacher without a partner are not distilled: S37 (backbone['3'])" in caplog.text


class Unpadded(SSDBody):
    """The last map as large as the student's P6 on 512 pixels, not on 320."""

    def __init__(self, widths):
        super().__init__(widths)
        self.last = nn.Sequential(nn.Conv2d(widths[-1], widths[-1], 7), nn.Conv2d(widths[-1], widths[-1], 3))


def test_a_map_of_equal_size_by_chance_does_not_pair(student, caplog):
    teacher = build("ssd", seed=1)
    teacher.backbone = Unpadded((8, 12, 16))  # 16 - 6 - 2 = 8 cells of 512 pixels, as P6; 2 of 320, where P6 has 5
    with TorchvisionDistiller(student, teacher=teacher, config=FIXED) as distiller:
        assert distiller.level_names == FINE
    assert "backbone['3'] has the size of a map of the student's on some canvases only" in caplog.text


def test_nothing_in_common_says_so(student):
    teacher = build("ssd", seed=1)
    teacher.backbone.stem[0] = nn.Conv2d(3, 8, 3, 3, 1)
    with pytest.raises(PairingError, match="no feature level of the same stride"):
        TorchvisionDistiller(student, teacher=teacher)


def test_named_taps_are_those_of_the_detector(student, teacher):
    config = {**FIXED, "student_taps": ["backbone.fpn.layer_blocks.*"], "teacher_taps": ["backbone['1']"]}
    with TorchvisionDistiller(student, teacher=teacher, config=config) as distiller:
        assert [str(pair.student.tap) for pair in distiller.pairs] == ["backbone.fpn.layer_blocks.1"]
        student(*rectangles())
        assert distiller().loss > 0


def test_a_step_is_the_distillers_own_on_the_transformed_batch(student, teacher):
    """The same numbers as the plain Distiller gives on the padded batch and the resized boxes."""
    images, targets = rectangles()
    batch, resized = student.transform(images, targets)
    taps = {"student_taps": ["backbone['0']"], "teacher_taps": ["backbone['0']"]}
    with TorchvisionDistiller(student, teacher=teacher, config={**FIXED, **taps}) as distiller:
        state = distiller.state_dict()
        student(images, targets)
        one = distiller()
    bare = {"student_taps": ["['0']"], "teacher_taps": ["['0']"]}
    with Distiller(student.backbone, teacher=teacher.backbone, config={**FIXED, **bare}) as plain:
        plain.load_state_dict(state)
        student.backbone(batch.tensors)
        other = plain(batch.tensors, [target["boxes"] for target in resized])
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-5)


def test_before_the_student_ran(student, teacher):
    with TorchvisionDistiller(student, teacher=teacher, config=FIXED) as distiller:
        with pytest.raises(TapError, match=r"has seen no batch since the last call. Run losses = student\(images"):
            distiller()
        student(*rectangles())
        distiller()
        with pytest.raises(TapError, match="has seen no batch since the last call"):
            distiller()


def test_a_copy_of_the_student_is_not_watched(student, teacher):
    with TorchvisionDistiller(student, teacher=teacher, config=FIXED) as distiller:
        other = copy.deepcopy(student)
        other(*rectangles())
        with pytest.raises(TapError, match="a copy of it is not watched"):
            distiller()
        kinds = {type(hook).__module__ for module in other.modules() for hook in module._forward_hooks.values()}
    assert kinds == {"builtins"}, "saved with the model, it needs no fgd_hooks to load"


def test_eval_mode_and_missing_targets_are_named(student, teacher):
    images, targets = rectangles()
    with TorchvisionDistiller(student, teacher=teacher, config=FIXED) as distiller:
        student.eval()
        student(images, targets)
        with pytest.raises(ValueError, match=r"eval mode: .* Call student.train\(\)"):
            distiller()
        student.train()
        with pytest.raises(AssertionError, match="targets should not be none"):  # torchvision's own
            student(images)
        student.backbone(student.transform(images)[0].tensors)
        with pytest.raises(ValueError, match=r"without targets.*call student\(images, targets\)"):
            distiller()
        student(images, targets)
        assert distiller().loss > 0, "an error leaves nothing behind"


def test_without_gradients_nothing_is_done_or_kept(student, teacher):
    with TorchvisionDistiller(student, teacher=teacher, config=FIXED) as distiller, torch.no_grad():
        student(*rectangles())
        assert distiller._seen.latest is None
        assert distiller().loss == 0
        assert distiller.clock.step == 0


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("model", [nn.Conv2d(3, 8, 3), "retinanet"], ids=["module", "text"])
def test_other_models_are_refused(student, model, role):
    pair = (model, student) if role == "student" else (student, model)
    with pytest.raises(TypeError, match=f"The {role} is a (Conv2d|str); expected a torchvision detector"):
        TorchvisionDistiller(pair[0], teacher=pair[1])


def test_a_teacher_that_is_the_student_is_refused(student):
    with pytest.raises(TeacherError, match="same object"):
        TorchvisionDistiller(student, teacher=student)
    assert hooks(student) == 0


def test_a_teacher_that_cannot_take_the_students_canvas_is_named():
    student = build("ssd", size=(64, 64))
    student.backbone.last = nn.Conv2d(16, 16, 3, padding=1)  # the teacher's has no padding, and 2 x 2 cells to go over
    with pytest.raises(TapError, match=r"teacher's backbone \(SSDBody\) failed on images of 64 x 64 pixels"):
        TorchvisionDistiller(student, teacher=build("ssd", seed=1))


def test_the_teacher_is_frozen_meanwhile_and_its_own_again_after(student, teacher):
    teacher.train()
    distiller = TorchvisionDistiller(student, teacher=teacher, config=FIXED)
    student(*rectangles())
    distiller().loss.backward()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert student.training
    assert not any("body" in name or "transform" in name for name in distiller.state_dict())
    distiller.detach()
    assert all(module.training for module in teacher.modules())
    assert teacher(*rectangles()), "runs as before"
    distiller.detach()


def test_empty_images_and_autocast(student, teacher):
    images, targets = rectangles()
    targets[0] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    with TorchvisionDistiller(student, teacher=teacher, config=FIXED) as distiller:
        with torch.autocast("cpu", torch.bfloat16):
            losses = student(images, targets)
            distilled = distiller(task_loss=sum(losses.values()))
        (sum(losses.values()) + distilled.loss).backward()
        assert distilled.loss.isfinite()
        assert distilled.parts["foreground"] > 0
        assert student.backbone.fpn.layer_blocks[0][0].weight.grad.isfinite().all()


def test_the_default_balance_measures_and_resting_steps_forget_the_batch(student, teacher):
    config = {"balance": {"interval": 2}, "interval": 2, "schedule": {"stop": None}}
    with TorchvisionDistiller(student, teacher=teacher, config=config) as distiller:
        for _ in range(6):
            losses = student(*rectangles())
            distilled = distiller()
            (sum(losses.values()) + distilled.loss).backward()
            assert distilled.resting == (distiller.clock.step % 2 == 0)
            assert distiller._seen.latest is None
        assert distiller.balance.unmeasured == []


def test_check_examines_the_batch_of_its_loss_and_leaves_no_trace(student, teacher):
    images, targets = rectangles()
    with TorchvisionDistiller(student, teacher=teacher, config=FIXED) as distiller:
        optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], 1e-3)
        before = copy.deepcopy(student.state_dict())
        report = diagnose(distiller, loss=lambda: sum(student(images, targets).values()), optimizer=optimizer)
        for name, tensor in student.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert all(parameter.grad is None for parameter in student.parameters())
        assert distiller._seen.latest is None
    lines = {finding.name: finding for finding in report.findings}
    assert lines["masks"].status == "green", report
    assert lines["taps"].status == "green", report
    red = {finding.name for finding in report.findings if finding.status == "red"}
    assert red <= {"loss scale"}, "fixed weights beside a head that has learned nothing"


def test_a_student_in_a_wrapper(student, teacher, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(student)
        distiller = TorchvisionDistiller(wrapped, teacher=teacher, config=FIXED)
        parallel = nn.parallel.DistributedDataParallel(distiller)
        losses = wrapped(*rectangles())
        distilled = parallel()
        (sum(losses.values()) + distilled.loss).backward()
        assert distilled.loss > 0
        assert all(parameter.grad is not None for parameter in distiller.parameters())
        distiller.detach()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "teacher", "strides"),
    [
        ("retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn", [8, 16, 32]),
        ("fcos_resnet50_fpn", "retinanet_resnet50_fpn_v2", [8, 16, 32, 64, 128]),
        ("fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_resnet50_fpn", [32]),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn", [32, 32]),
        ("ssd300_vgg16", "retinanet_resnet50_fpn", [8, 16, 30, 60, 100]),
        ("ssdlite320_mobilenet_v3_large", "fcos_resnet50_fpn", [16, 32, 64, 107]),
        ("retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large", [16, 32, 64, 128]),
        ("retinanet_resnet50_fpn", "ssd300_vgg16", [8, 16, 32, 64]),
    ],
)
def test_torchvisions_own_models_pair_and_step(student, teacher, strides):
    settings = {"weights": None, "weights_backbone": None, "num_classes": 3}
    sizes = {"min_size": 300, "max_size": 400} if teacher == "ssd300_vgg16" else {"min_size": 64, "max_size": 128}
    own, other = (
        getattr(detection, name)(**settings, **({} if name.startswith("ssd") else sizes)) for name in (student, teacher)
    )
    with TorchvisionDistiller(own, teacher=other, config=FIXED) as distiller:
        assert [pair.student.stride for pair in distiller.pairs] == strides
        losses = own(*rectangles())
        distilled = distiller()
        (sum(losses.values()) + distilled.loss).backward()
        assert distilled.loss > 0


def with_statistics(model: nn.Module) -> nn.Module:
    """As if its backbone had been trained: the batch normalisations have seen something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    return model


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("ssd")])
def test_neck_and_head_behind_a_trained_backbone_are_fitted_to_the_teachers(family):
    student, teacher = with_statistics(build(family)), with_statistics(build(family, WIDE, seed=1))
    for parameter in teacher.rpn.parameters() if hasattr(teacher, "rpn") else teacher.head.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3)  # not so small that what it predicts is one number
    parts = detector_parts(student)
    assert parts["neck"] == ["backbone.fpn"]
    assert "backbone" not in " ".join(parts["head"])
    before = copy.deepcopy(student.state_dict())
    images = [torch.rand(3, 96, 128) for _ in range(4)]
    report = initialize(student, teacher=teacher, parts=parts, images=images)
    assert report is not None
    assert {name for name in report.fitted if name.startswith("backbone.fpn.")}
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]) or not name.startswith("backbone.body."), name
    if family == "retinanet":  # its head runs on every level
        assert "head.classification_head.cls_logits" in report.fitted
        assert initialize(student, teacher=teacher, parts=parts, images=images) is None, "now they have weights"
