"""FGDLoss against the slow reference, its gradients, its numerics and its errors."""

from __future__ import annotations

import itertools

import pytest
import torch

from fgd_hooks.losses import fused
from fgd_hooks.losses.attention import channel_attention, spatial_attention
from fgd_hooks.losses.base import LossResult, create_loss, list_losses
from fgd_hooks.losses.fgd import PRESETS, FGDLoss
from fgd_hooks.masks import PackedBoxes
from tests.helpers.reference import slow_attention, slow_fgd

PARTS = ("foreground", "background", "attention", "global")
CANVAS = [(48, 60), (48, 60), (40, 60)]
BOXES = [
    torch.tensor([[5.0, 6.0, 30.0, 20.0], [10.0, 2.0, 14.0, 7.0]]),
    torch.zeros(0, 4),
    torch.tensor([[0.0, 0.0, 60.0, 40.0]]),
]


def make(channels=6, dtype=torch.float64, **options):
    """A loss of which no parameter is at its initial value, and with weights that make all parts matter."""
    torch.manual_seed(1)
    weights = {"alpha": 0.3, "beta": 0.2, "gamma": 0.1, "lambda_": 0.05}
    loss = FGDLoss(channels, **{**weights, **options}).to(dtype)
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return loss


def features(channels=6, height=5, width=7, images=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, images, channels, height, width, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def gradients(loss, result, student, of=None):
    value = result.loss if of is None else of
    inputs = [student, *loss.parameters()]
    return torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


def assert_same(found, wanted, tolerance=1e-11):
    for a, b in zip(found, wanted, strict=True):
        scale = b.abs().max().item()
        assert (a - b).abs().max().item() <= tolerance * max(scale, 1e-3)


# Elements per group: one group of all images; two images and one; one image a group; a group of 2 channels.
LIMITS = [1 << 18, 2 * 6 * 35, 6 * 35, 2 * 35 + 1]


@pytest.mark.parametrize("limit", LIMITS)
def test_parts_and_gradients_equal_the_reference(monkeypatch, limit):
    monkeypatch.setattr(fused, "_CPU_ELEMENTS", limit)
    loss, (student, teacher) = make(), features()
    wanted = slow_fgd(loss, student, teacher, BOXES, CANVAS)
    result = loss(student, teacher, BOXES, CANVAS)
    assert isinstance(result, LossResult)
    assert tuple(result.parts) == tuple(result.raw) == loss.part_names == PARTS
    for name in PARTS:
        torch.testing.assert_close(result.raw[name], wanted[name], rtol=1e-12, atol=0)
        torch.testing.assert_close(result.parts[name], wanted[name] * loss.weights[name], rtol=1e-12, atol=0)
        assert_same(gradients(loss, result, student, result.raw[name]), gradients(loss, None, student, wanted[name]))
    total = sum(wanted[name] * loss.weights[name] for name in PARTS)
    torch.testing.assert_close(result.loss, total, rtol=1e-12, atol=0)
    assert_same(gradients(loss, result, student), gradients(loss, None, student, total))


@pytest.mark.parametrize("chosen", [c for r in (1, 2, 3, 4) for c in itertools.combinations(PARTS, r)], ids="+".join)
def test_any_combination_of_parts_with_any_factor(chosen):
    loss, (student, teacher) = make(), features()
    wanted = slow_fgd(loss, student, teacher, BOXES, CANVAS)
    result = loss(student, teacher, BOXES, CANVAS)
    factors = {name: 0.5 + number for number, name in enumerate(PARTS)}
    found = sum(result.parts[name] * factors[name] + result.raw[name] * 0.25 for name in chosen)
    slow = sum(wanted[name] * (loss.weights[name] * factors[name] + 0.25) for name in chosen)
    found, slow = (value + 3 * total for value, total in ((found, result.loss), (slow, 0)))
    slow = slow + 3 * sum(wanted[name] * loss.weights[name] for name in PARTS)
    assert_same(gradients(loss, None, student, found), gradients(loss, None, student, slow))


@pytest.mark.parametrize("limit", [1 << 18, 4])
def test_gradcheck(monkeypatch, limit):
    monkeypatch.setattr(fused, "_CPU_ELEMENTS", limit)
    loss, (student, teacher) = make(4, temperature=0.8), features(4, 2, 3, 2)
    names = [name for name, _ in loss.named_parameters()]
    values = [parameter.detach().requires_grad_() for parameter in loss.parameters()]
    packed = PackedBoxes.from_list(BOXES[:2], (20, 30))

    def call(x, *weights):
        state = dict(zip(names, weights, strict=True))
        return tuple(torch.func.functional_call(loss, state, (x, teacher, packed)).raw.values())

    assert torch.autograd.gradcheck(call, (student, *values), atol=1e-6, fast_mode=True)


def test_plain_path_agrees():
    student, teacher = features()
    exact, plain = make(), make(fused=False)
    one, two = (loss(student, teacher, BOXES, CANVAS) for loss in (exact, plain))
    for name in PARTS:
        torch.testing.assert_close(one.raw[name], two.raw[name], rtol=1e-12, atol=0)
    assert_same(gradients(exact, one, student), gradients(plain, two, student))


def test_second_derivative():
    found = []
    for loss in (make(), make(fused=False)):
        student, teacher = features()
        result = loss(student, teacher, BOXES, CANVAS)
        value = result.loss + 2 * result.raw["global"]
        inputs = [student, loss.student_context.attend.weight]
        first = torch.autograd.grad(value, inputs, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        found.append([*first, *torch.autograd.grad(penalty, inputs)])
    assert_same(*found)
    assert all(gradient.abs().max() > 0 for gradient in found[0])


def test_packed_boxes_are_the_same_as_a_list():
    loss, (student, teacher) = make(), features()
    packed = PackedBoxes.from_list(BOXES, CANVAS)
    assert torch.equal(loss(student, teacher, packed).loss, loss(student, teacher, BOXES, CANVAS).loss)


def test_attentions():
    feature, _ = features()
    spatial, channel = slow_attention(feature, 0.3)
    torch.testing.assert_close(spatial_attention(feature, 0.3), spatial)
    torch.testing.assert_close(channel_attention(feature, 0.3), channel)
    assert spatial_attention(feature.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("limit", [1 << 18, 80])
def test_memory_layouts(monkeypatch, layout, limit):
    monkeypatch.setattr(fused, "_CPU_ELEMENTS", limit)
    loss, (student, teacher) = make(), features()
    change = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda x: torch.cat((x, x), 3)[..., : x.shape[3]],
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda x: x[:, :1].expand_as(x),
    }[layout]
    changed = change(student.detach()).requires_grad_()
    wanted = loss(changed.detach().contiguous().requires_grad_(), teacher, BOXES, CANVAS)
    found = loss(changed, change(teacher) if layout != "expanded" else teacher, BOXES, CANVAS)
    torch.testing.assert_close(found.loss, wanted.loss)
    again = changed.detach().contiguous().requires_grad_()
    (slow,) = torch.autograd.grad(loss(again, teacher, BOXES, CANVAS).loss, again)
    (gradient,) = torch.autograd.grad(found.loss, changed)
    torch.testing.assert_close(gradient, slow)


@pytest.mark.parametrize("fused_path", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, fused_path):
    loss, (student, teacher) = make(dtype=torch.float32, fused=fused_path), features(dtype=dtype)
    wide = student.detach().float().requires_grad_()
    wanted = loss(wide, teacher.float(), BOXES, CANVAS)
    (wanted_gradient,) = torch.autograd.grad(wanted.loss, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(student, teacher, BOXES, CANVAS)
        assert all(value.dtype == torch.float32 for value in (*result.raw.values(), result.loss))
        torch.testing.assert_close(result.loss, wanted.loss)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fused_path):  # as some loops call backward
        result.loss.backward()
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad, wanted_gradient.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_activations_stay_finite(dtype):
    loss, (student, teacher) = make(dtype=torch.float32, alpha=1e-9, beta=1e-9, lambda_=1e-12), features()
    student = (student.detach() * 1.5e4).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    result = loss(student, (teacher * -1.5e4).clamp(-6e4, 6e4).to(dtype), BOXES, CANVAS)
    result.loss.backward()
    assert all(value.isfinite() for value in result.raw.values())
    assert student.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())


def test_parameters_of_half_precision():
    loss, (student, teacher) = make(dtype=torch.bfloat16), features(dtype=torch.bfloat16)
    result = loss(student, teacher, BOXES, CANVAS)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in loss.parameters())


@pytest.mark.parametrize("fused_path", [True, False])
@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "lambda_"])
def test_weight_zero(name, fused_path):
    student, teacher = features()
    without, full = make(fused=fused_path, **{name: 0.0}), make()
    part = PARTS[["alpha", "beta", "gamma", "lambda_"].index(name)]
    found, wanted = (loss(student, teacher, BOXES, CANVAS) for loss in (without, full))
    assert found.parts[part].item() == found.raw[part].item() == 0
    rest = sum(wanted.parts[other] for other in PARTS if other != part)
    torch.testing.assert_close(found.loss, rest)
    assert_same(gradients(without, found, student), gradients(full, None, student, rest))


@pytest.mark.parametrize("fused_path", [True, False])
def test_all_weights_zero(fused_path):
    loss, (student, teacher) = make(alpha=0, beta=0, gamma=0, lambda_=0, fused=fused_path), features()
    result = loss(student, teacher, BOXES, CANVAS)
    result.loss.backward()
    assert result.loss.item() == 0 and student.grad.abs().max() == 0


def test_weights_may_change_between_steps():
    loss, (student, teacher) = make(), features()
    before = loss(student, teacher, BOXES, CANVAS)
    loss.alpha *= 2
    after = loss(student, teacher, BOXES, CANVAS)
    torch.testing.assert_close(after.loss - before.loss, before.parts["foreground"])


def test_teacher_takes_no_gradient_and_both_blocks_do():
    loss, (student, teacher) = make(), features()
    teacher.requires_grad_()
    loss(student, teacher, BOXES, CANVAS).loss.backward()
    assert teacher.grad is None
    assert all(parameter.grad.abs().max() > 0 for parameter in loss.parameters())


def test_frozen_student_still_trains_the_blocks():
    loss, (student, teacher) = make(), features()
    loss(student.detach(), teacher, BOXES, CANVAS).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in loss.parameters())


def test_no_grad():
    loss, (student, teacher) = make(), features()
    with torch.no_grad():
        silent = loss(student, teacher, BOXES, CANVAS).loss
    assert not silent.requires_grad
    assert torch.equal(silent, loss(student, teacher, BOXES, CANVAS).loss.detach())


def test_backward_twice_with_retained_graph():
    loss, (student, teacher) = make(), features()
    result = loss(student, teacher, BOXES, CANVAS)
    (one,) = torch.autograd.grad(result.loss, student, retain_graph=True)
    (two,) = torch.autograd.grad(result.loss, student)
    assert torch.equal(one, two)


def test_keeps_no_feature_sized_tensor_but_the_inputs():
    loss, (student, teacher) = make(), features(height=40, width=40)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(student, teacher, BOXES, CANVAS)
    large = [tensor for tensor in kept if tensor.numel() >= student.numel() // 2]
    assert {tensor.data_ptr() for tensor in large} == {student.data_ptr(), teacher.data_ptr()}


def test_same_features_give_no_sign_noise():
    loss, (student, _) = make(alpha=0, beta=0, lambda_=0, gamma=1), features()
    result = loss(student, student.detach().clone(), BOXES, CANVAS)
    result.loss.backward()
    assert result.loss.item() == 0 and student.grad.abs().max() == 0


def test_offset_that_cancels_in_float32():
    """A large offset that the context blocks remove: an expanded square would leave nothing but rounding."""
    loss = make(8, dtype=torch.float32)
    student, teacher = features(8, 8, 8, 2, dtype=torch.float32)
    with torch.no_grad():
        for block in (loss.student_context, loss.teacher_context):
            block.expand.weight.zero_()
        loss.teacher_context.expand.bias.zero_()
        loss.student_context.expand.bias.copy_(300 + torch.arange(8.0))
    offset = loss.student_context.expand.bias.detach().view(1, 8, 1, 1)
    student = (teacher + 0.01 * student.detach() - offset).requires_grad_()
    found = loss(student, teacher, BOXES[:2], (48, 60)).raw["global"]
    wanted = (teacher.double() - student.detach().double() - offset.double()).square().sum() / 2
    assert found.item() == pytest.approx(wanted.item(), rel=1e-3)


def test_presets():
    assert PRESETS == {
        "two_stage": {"temperature": 0.5, "alpha": 5e-5, "beta": 2.5e-5, "gamma": 5e-5, "lambda_": 5e-7},
        "anchor_based": {"temperature": 0.5, "alpha": 1e-3, "beta": 5e-4, "gamma": 5e-4, "lambda_": 5e-6},
        "anchor_free": {"temperature": 0.5, "alpha": 1.6e-3, "beta": 8e-4, "gamma": 8e-4, "lambda_": 8e-6},
        "fcos": {"temperature": 0.8, "alpha": 1.6e-3, "beta": 8e-4, "gamma": 8e-4, "lambda_": 8e-6},
    }
    loss = FGDLoss.from_preset("fcos", 8, beta=1.0)
    assert (loss.temperature, loss.alpha, loss.beta) == (0.8, 1.6e-3, 1.0)
    with pytest.raises(ValueError, match="'two_stage'"):
        FGDLoss.from_preset("two_stages", 8)


def test_registered():
    assert isinstance(create_loss("fgd", channels=8), FGDLoss)
    assert {"fgd", "imitation"} <= set(list_losses())
    with pytest.raises(KeyError, match="fgd"):
        create_loss("fdg", channels=8)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"alpha": -1}, "alpha"),
        ({"beta": float("inf")}, "beta"),
        ({"gamma": float("nan")}, "gamma"),
        ({"lambda_": -1e-9}, "lambda_"),
        ({"channels": 1}, "channels"),
    ],
)
def test_wrong_arguments(options, name):
    with pytest.raises(ValueError, match=name):
        FGDLoss(**{"channels": 8, **options})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 6, 4, 4), (2, 6, 4, 5)), r"\(2, 6, 4, 4\) and \(2, 6, 4, 5\)"),
        (((2, 5, 4, 4), (2, 5, 4, 4)), "built for 6 channels, the features have 5"),
        (((2, 6, 16), (2, 6, 16)), r"student feature must be \(N, C, H, W\)"),
        (((3, 6, 4, 4), (3, 6, 4, 4)), "hold 3 images, the boxes are those of 2"),
    ],
)
def test_features_that_do_not_fit(shapes, message):
    student, teacher = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        FGDLoss(6)(student, teacher, BOXES[:2], (48, 60))


def test_missing_canvas():
    student, teacher = features(dtype=torch.float32)
    with pytest.raises(ValueError, match="canvas is missing"):
        FGDLoss(6)(student, teacher, BOXES)


def test_official_state_of_another_kind():
    with pytest.raises(ValueError, match="conv_mask_s"):
        FGDLoss(6).load_official({"weight": torch.zeros(1)})
    names = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    state = {f"channel_add_conv_{k}.{name}": torch.zeros(3) for k in "st" for name in names}
    state |= {f"conv_mask_{k}.weight": torch.zeros(1, 8, 1, 1) for k in "st"}
    with pytest.raises(ValueError, match="6 channels"):
        FGDLoss(6).load_official(state)


@pytest.mark.slow
def test_under_torch_compile():
    loss, (student, teacher) = make(dtype=torch.float32), features(dtype=torch.float32)
    packed = PackedBoxes.from_list(BOXES, CANVAS)
    wanted = loss(student, teacher, packed)
    found = torch.compile(lambda s, t: loss(s, t, packed).loss, backend="aot_eager")(student, teacher)
    torch.testing.assert_close(found, wanted.loss)
    assert_same(gradients(loss, None, student, found), gradients(loss, wanted, student), 1e-4)
