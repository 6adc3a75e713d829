"""Fitting a thinned student's layers to its teacher's outputs: least squares by its definition, layer after layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fgd_hooks import fit_channels, inherit_channels
from fgd_hooks.errors import TeacherError
from fgd_hooks.initialization import reconstruction
from fgd_hooks.initialization.initialize import initialize
from fgd_hooks.utils import linalg
from fgd_hooks.utils.linalg import RIDGE, evenly_spaced
from tests.helpers.tiny import TinyDetector, trained
from tests.initialization.test_weight_selection import Net, net, widened


def some_images(count=4, size=12, seed=3):
    """Smooth images: neighbouring cells resemble each other, as in photographs."""
    small = torch.rand(count, 3, size // 2, size // 2, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(small, size=(size, size), mode="bilinear")


def pair(width=4, by=2, seed=0):
    """A student that was thinned, and its teacher, whose channels resemble each other as trained ones do."""
    torch.manual_seed(seed)
    teacher = widened(net(width, seed=seed), by)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * parameter.std(correction=0) * torch.randn_like(parameter))
    trained(teacher, seed)
    student = net(width, seed=seed + 1)
    inherit_channels(student, teacher=teacher)
    return exactly_normalised(student), exactly_normalised(teacher).eval()


def exactly_normalised(model: nn.Module) -> nn.Module:
    """Without the eps of its batch normalisations, which weighs otherwise on features of another size."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12
    return model


def outputs(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What a module gives in eval mode."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad():
        copy_of_flags = model.training
        model.eval()(images)
        model.train(copy_of_flags)
    handle.remove()
    return seen[0]


def reference(layer: nn.Conv2d, start: Tensor, x: Tensor, t: Tensor, centred: bool = True) -> Tensor:
    """Weights that minimise sum |t - W x|² + r |W - W0|² over all cells, x and t less their means; channel by channel.

    W0 is the start times the number that makes |t - W0 x|² least. Not ``centred``: x and t with their means.
    """
    columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    columns = columns.transpose(1, 2).flatten(0, 1).double()  # (cells, inputs * kernel)
    wanted = t.movedim(1, -1).flatten(0, 2).double()
    rows = []
    for channel in range(layer.out_channels):
        inputs = columns
        if layer.groups > 1:
            inputs = columns.unflatten(1, (layer.groups, -1))[:, channel]
        inputs = inputs - inputs.mean(0) * centred
        width = inputs.shape[1]
        ridge = len(inputs) * inputs.square().mean() * max(RIDGE, width / len(inputs))
        first = start[channel].flatten().double()
        aim = wanted[:, channel] - wanted[:, channel].mean() * centred
        first = first * torch.linalg.lstsq((inputs @ first)[:, None], aim[:, None]).solution.clamp(min=0).flatten()
        # least squares with the prior as further rows
        system = torch.cat([inputs, ridge.sqrt() * torch.eye(width)])
        rows.append(torch.linalg.lstsq(system, torch.cat([aim, ridge.sqrt() * first])).solution)
    return torch.stack(rows).view(layer.weight.shape)


SHAPES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "wide and flat": {"kernel_size": (1, 5), "padding": (0, 2), "stride": (2, 1)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 1},
    "few cells": {"kernel_size": 7, "padding": 1, "stride": 3},
}


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_is_the_least_squares_solution(shape, depthwise):
    torch.manual_seed(0)
    groups = (4, 8) if depthwise else (1, 1)
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, groups=groups[0], **SHAPES[shape]), nn.BatchNorm2d(4))
    teacher = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, groups=groups[1], **SHAPES[shape]), nn.BatchNorm2d(8))
    inherit_channels(student, teacher=teacher)
    start = student[1].weight.clone()
    images = some_images()
    result = fit_channels(student, teacher=teacher, images=images)
    assert set(result.fitted) == {"0", "1"}
    taken = evenly_spaced(4, 8)
    expected = reference(student[1], start, outputs(student, "0", images), outputs(teacher, "1", images)[:, taken])
    assert torch.allclose(student[1].weight.double(), as_long_as(start, expected), rtol=1e-3, atol=1e-5)
    if student[1].weight[0].numel() > 1:  # of a single number nothing but the length could change
        assert not torch.allclose(student[1].weight, start, atol=1e-3)


def as_long_as(start: Tensor, weight: Tensor) -> Tensor:
    """Each output channel's weights times what makes them as long as the start's; a normalisation follows."""
    return weight * (start.double().flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1))[:, None, None, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_where_nothing_normalises_the_solution_is_taken_as_it_is(shape):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, **SHAPES[shape]))
    teacher = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, **SHAPES[shape]))
    inherit_channels(student, teacher=teacher)
    start = student[1].weight.clone()
    images = some_images()
    fit_channels(student, teacher=teacher, images=images)
    aim = outputs(teacher, "1", images)
    expected = reference(student[1], start, outputs(student, "0", images), aim)
    assert torch.allclose(student[1].weight.double(), expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(outputs(student, "1", images).mean((0, 2, 3)), aim.mean((0, 2, 3)), atol=1e-5)


def test_the_fitted_student_gives_what_the_teacher_gives_more_nearly():
    student, teacher = pair()
    copied = copy.deepcopy(student)
    images, others = some_images(16), some_images(8, seed=9)
    result = fit_channels(student, teacher=teacher, images=images)
    assert not result.unfitted
    for name in ("mix.1", "last"):
        taken = evenly_spaced(outputs(student, name, others).shape[1], outputs(teacher, name, others).shape[1])
        aim = outputs(teacher, name, others)[:, taken]
        errors = [(outputs(model, name, others) - aim).square().mean() for model in (student, copied)]
        assert errors[0] < 0.3 * errors[1], f"{name}, on images that it was not fitted to"


def test_later_layers_meet_what_the_fitted_ones_give():
    student, teacher = pair()
    start = student.mix[0].weight.clone()
    images = some_images()
    fit_channels(student, teacher=teacher, images=images)
    met = outputs(student, "depthwise", images)
    taken = evenly_spaced(4, 8)
    expected = reference(student.mix[0], start, met, outputs(teacher, "mix.0", images)[:, taken])
    assert torch.allclose(student.mix[0].weight.double(), as_long_as(start, expected), rtol=1e-3, atol=1e-5)


def test_means_and_deviations_are_the_teachers():
    student, teacher = pair()
    images = some_images(8)
    fit_channels(student, teacher=teacher, images=images)
    for name in ("left.1", "depthwise.1", "mix.1"):
        mine, theirs = outputs(student, name, images), outputs(teacher, name, images)
        theirs = theirs[:, evenly_spaced(mine.shape[1], theirs.shape[1])]
        assert torch.allclose(mine.mean((0, 2, 3)), theirs.mean((0, 2, 3)), atol=1e-4), name
        assert torch.allclose(mine.std((0, 2, 3)), theirs.std((0, 2, 3)), rtol=1e-2), name
    assert torch.allclose(
        outputs(student, "last", images).mean((0, 2, 3)), outputs(teacher, "last", images).mean((0, 2, 3)), atol=1e-4
    ), "nothing normalises it: its bias sees to that"


def test_the_share_explained_is_that_of_the_variance():
    student, teacher = pair()
    images = some_images()
    result = fit_channels(student, teacher=teacher, images=images)
    mine, theirs = outputs(student, "left.0", images).double(), outputs(teacher, "left.0", images)[:, ::2].double()
    left = (theirs - mine).var((0, 2, 3)) / theirs.var((0, 2, 3))
    assert result.fitted["left.0"] == pytest.approx(1 - left.mean().item(), abs=1e-4)
    assert "5 of 5 convolutions were fitted" in result.summary
    assert "left.0: 100%" in str(result) or f"left.0: {result.fitted['left.0']:.0%}" in str(result)


def test_weights_that_lead_astray_are_no_worse_than_none():
    student, teacher = pair()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(-100)
    result = fit_channels(student, teacher=teacher, images=some_images())
    assert all(0 <= share <= 1 for share in result.fitted.values())


def test_a_thinned_student_that_repeats_its_teacher_exactly_stays_so():
    teacher = exactly_normalised(widened(trained(net(4)), 2)).eval()
    student = exactly_normalised(net(4, seed=5))
    inherit_channels(student, teacher=teacher)
    images = some_images()
    fit_channels(student, teacher=teacher, images=images)
    with torch.no_grad():
        assert torch.allclose(student.eval()(images), teacher(images), atol=1e-4)


def test_of_many_cells_a_part_is_taken(monkeypatch):
    student, teacher = pair()
    other = copy.deepcopy(student)
    images = some_images(16, 32)
    fit_channels(student, teacher=teacher, images=images)
    monkeypatch.setattr(linalg, "MAX_CELLS", 3000)
    fit_channels(other, teacher=teacher, images=images)
    whole, part = student.left[0].weight, other.left[0].weight
    assert not torch.equal(whole, part)
    assert (whole - part).norm() < 0.05 * whole.norm()


class Odd(nn.Module):
    """Layers that are not fitted: that run twice or never, are grouped or frozen, pad otherwise, have other widths."""

    def __init__(self, width: int, kernel: int = 3, wide: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 1)
        self.twice = nn.Conv2d(width, width, 1)
        self.never = nn.Conv2d(width, width, 1)
        self.grouped = nn.Conv2d(width, width, 1, groups=2)
        self.reflecting = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(width, width, 3, padding="same")
        self.kernel = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.fixed = nn.Conv2d(width, width, 1).requires_grad_(False)
        self.head = nn.Conv2d(width, wide, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(images)))
        return self.head(self.fixed(self.kernel(self.same(self.reflecting(self.grouped(x))))))


def test_layers_that_cannot_be_fitted_stay_and_the_report_says_why():
    torch.manual_seed(0)
    student, teacher = Odd(4), Odd(4, kernel=5, wide=6)
    before = copy.deepcopy(student.state_dict())
    result = fit_channels(student, teacher=teacher, images=some_images())
    assert set(result.fitted) == {"first", "same"}
    words = {
        "twice": "given before",
        "never": "does not run",
        "grouped": "2 groups",
        "reflecting": "pads",
        "kernel": "kernel_size",
        "fixed": "frozen",
        "head": "no channels",
    }
    for name, word in words.items():
        assert word in result.unfitted[name]
        assert f"{name} kept: " in str(result)
        assert torch.equal(student.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
    nothing = fit_channels(
        nn.Sequential(nn.Linear(3, 3)), teacher=nn.Sequential(nn.Linear(3, 3)), images=torch.zeros(1, 3)
    )
    assert nothing.summary == "no convolution was fitted; the student has none"


def test_no_trace_but_the_weights():
    student, teacher = pair()
    student.left[0].weight.requires_grad_(False)
    student.train()
    student.mix.eval()
    flags = [p.requires_grad for p in student.parameters()], [m.training for m in student.modules()]
    given = copy.deepcopy(teacher.state_dict())
    random = torch.get_rng_state()
    fit_channels(student, teacher=teacher, images=some_images())
    assert torch.equal(random, torch.get_rng_state())
    assert flags == ([p.requires_grad for p in student.parameters()], [m.training for m in student.modules()])
    assert all(torch.equal(value, given[name]) for name, value in teacher.state_dict().items())
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in student.parameters())


def test_features_that_are_not_finite_change_nothing():
    student, teacher = pair()
    before = copy.deepcopy(student.state_dict())
    result = fit_channels(student, teacher=teacher, images=torch.full((1, 3, 8, 8), torch.nan))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not result.fitted
    assert "finite" in result.unfitted["left.0"]


def test_channels_that_are_the_same_everywhere_keep_the_copy():
    student, teacher = pair()
    before = copy.deepcopy(student.state_dict())
    result = fit_channels(student, teacher=teacher, images=torch.zeros(1, 3, 4, 4))
    for name in ("left.0", "right.0"):  # they meet nothing but zeros
        assert torch.equal(student.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
        assert "constant" in result.unfitted[name]
    assert all(value.isfinite().all() for value in student.state_dict().values())


def test_a_channel_that_is_dead_on_these_images_keeps_the_copy():
    def build(width):
        depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        first = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU()
        return nn.Sequential(*first, depthwise, nn.BatchNorm2d(width))

    torch.manual_seed(0)
    teacher, student = trained(build(8)).eval(), build(4)
    with torch.no_grad():
        teacher[2].bias[2] = -50.0
    inherit_channels(student, teacher=teacher)
    before = copy.deepcopy(student.state_dict())
    result = fit_channels(student, teacher=teacher, images=some_images(8))
    dead, *living = 1, 0, 2, 3
    for key in ("4.weight", "5.weight", "5.bias", "5.running_mean", "5.running_var"):
        assert torch.equal(student.state_dict()[key][dead], before[key][dead]), key
        assert not torch.allclose(student.state_dict()[key][living], before[key][living]), key
    aim, mine = outputs(teacher, "4", some_images(8))[:, ::2], outputs(student, "4", some_images(8))
    scale = (before["4.weight"].flatten(1).norm(dim=1) > 0).sum()
    assert scale == 4, "the copy's weights are not 0"
    assert aim[:, dead].std() == mine[:, dead].std() == 0
    assert 0 < result.fitted["4"] <= 1, "of the living channels alone"


def test_one_cell_that_is_not_finite_harms_nothing(monkeypatch):
    monkeypatch.setattr(linalg, "MAX_CELLS", 50)
    student, teacher = pair()
    images = some_images(4, 12)
    compared = set(linalg.chosen_cells(4 * 12 * 12).tolist())
    image, cell = divmod(next(row for row in range(4 * 12 * 12) if row not in compared), 12 * 12)
    images[image, :, cell // 12, cell % 12] = torch.nan
    fit_channels(student, teacher=teacher, images=images)
    assert all(value.isfinite().all() for value in student.state_dict().values())


def test_weights_that_overflow_are_an_error_and_nothing_is_changed(monkeypatch):
    student, teacher = pair()
    before = copy.deepcopy(student.state_dict())
    monkeypatch.setattr(reconstruction, "ridge_change", lambda gram, product, rows: product * torch.inf)
    with pytest.raises(ValueError, match=r"fit of .* gave .* values that are not finite"):
        fit_channels(student, teacher=teacher, images=some_images())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_bias_or_statistics_of_its_own_a_layer_is_fitted_with_its_means(shape):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, bias=False, **SHAPES[shape]))
    teacher = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, bias=False, **SHAPES[shape]))
    inherit_channels(student, teacher=teacher)
    start = student[2].weight.clone()
    images = some_images()
    result = fit_channels(student, teacher=teacher, images=images)
    aim = outputs(teacher, "2", images)
    expected = reference(student[2], start, outputs(student, "1", images), aim, centred=False)
    assert torch.allclose(student[2].weight.double(), expected, rtol=1e-3, atol=1e-5)
    left = (aim - outputs(student, "2", images)).square().mean((0, 2, 3)) / aim.square().mean((0, 2, 3))
    assert result.fitted["2"] == pytest.approx(1 - left.mean().item(), abs=1e-4)


def test_large_maps_are_summed_up_in_parts(monkeypatch):
    student, teacher = pair()
    other = copy.deepcopy(student)
    fit_channels(student, teacher=teacher, images=some_images(8))
    monkeypatch.setattr(reconstruction, "MOST_NUMBERS", 1)
    fit_channels(other, teacher=teacher, images=some_images(8))
    for name, value in student.state_dict().items():
        assert torch.allclose(other.state_dict()[name], value, atol=1e-6), name


class Crops(nn.Module):
    """A head on pieces of each image, which are others in another model: proposals."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(torch.stack(images) if isinstance(images, list) else images)
        return self.head(torch.cat([features[..., :2, :2], features[..., 2:4, 2:4]]))


def test_layers_that_run_on_pieces_of_images_stay():
    torch.manual_seed(0)
    for images in (some_images(), list(some_images())):
        student, teacher = Crops(4), Crops(8)
        inherit_channels(student, teacher=teacher)
        before = student.head.weight.clone()
        result = fit_channels(student, teacher=teacher, images=images)
        assert set(result.fitted) == {"backbone.0"}
        assert torch.equal(student.head.weight, before)
        assert "pieces of images" in result.unfitted["head"]


def test_wrong_arguments():
    student, teacher = pair()
    with pytest.raises(TeacherError):
        fit_channels(student, teacher=student, images=some_images())
    for model, role in ((student, "student"), (teacher, "teacher")):
        broken = copy.deepcopy(model)
        broken.mix[0].register_forward_pre_hook(lambda module, args: 1 / 0)
        models = (broken, teacher) if role == "student" else (student, broken)
        before = copy.deepcopy(models[0].state_dict())
        with pytest.raises(ValueError, match=rf"The {role} \(Net\) cannot be run on the images: division by zero"):
            fit_channels(models[0], teacher=models[1], images=some_images())
        assert len(broken.mix[0]._forward_pre_hooks) == 1, "ours are gone"
        assert not any(m._forward_hooks for m in broken.modules())
        assert all(torch.equal(value, before[name]) for name, value in models[0].state_dict().items()), "no half fit"


def test_by_the_setting():
    teacher = trained(net(4, seed=1)).eval()
    by_hand, by_setting = net(2), net(2)
    inherit_channels(by_hand, teacher=teacher)
    fit = fit_channels(by_hand, teacher=teacher, images=some_images())
    result = initialize(by_setting, teacher=teacher, what="fitted", images=some_images)
    assert result is not None
    assert result.fitted == fit.fitted
    assert fit.summary in result.summary
    assert set(str(fit).splitlines()[1:]) <= set(str(result).splitlines())
    for name, value in by_setting.state_dict().items():
        assert torch.equal(value, by_hand.state_dict()[name])
    with pytest.raises(ValueError, match="needs images"):
        initialize(net(2), teacher=teacher, what="fitted")
    automatic = net(2)
    assert initialize(automatic, teacher=teacher, what="auto", images=some_images) is not None
    assert torch.equal(automatic.mix[0].weight, by_hand.mix[0].weight)
    copied = net(2)
    initialize(copied, teacher=teacher, what="channels", images=some_images)
    for images, words in ((None, ""), (lambda: "no images", "cannot be run on the images")):
        automatic = net(2)
        result = initialize(automatic, teacher=teacher, what="auto", images=images)
        assert result is not None
        assert torch.equal(automatic.mix[0].weight, copied.mix[0].weight), "the copy alone"
        assert words in result.summary
    with pytest.raises(ValueError, match="cannot be run on the images"):
        initialize(net(2), teacher=teacher, what="fitted", images=lambda: "no images")
    for broken in (lambda: next(iter([])), lambda: {}["img"]):
        automatic = net(2)
        result = initialize(automatic, teacher=teacher, what="auto", images=broken)
        assert result is not None
        assert "no images to fit" in result.summary
        assert torch.equal(automatic.mix[0].weight, copied.mix[0].weight), "the copy alone"
    with pytest.raises(ValueError, match=r"no images to fit the student's layers to \(KeyError: 'img'\)"):
        initialize(net(2), teacher=teacher, what="fitted", images=lambda: {}["img"])
    other = initialize(TinyDetector(), teacher=nn.Sequential(nn.Linear(2, 2)), what="fitted", images=some_images)
    assert other is not None, "nothing was copied, so that there is nothing to fit"
    assert other.fitted is None


def test_wrappers_are_looked_through():
    student, teacher = pair()
    wrapped = copy.deepcopy(student)
    fit_channels(student, teacher=teacher, images=some_images())
    fit_channels(nn.DataParallel(wrapped), teacher=teacher, images=some_images())
    assert isinstance(wrapped, Net)
    for name, value in wrapped.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])


class Plain(nn.Module):
    """A neck and a head without normalisations; the head is one for all levels."""

    def __init__(self, width: int, classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.neck = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        self.tower = nn.Conv2d(width, width, 3, padding=1)
        self.scores = nn.Conv2d(width, classes, 1)

    def features(self, images: Tensor) -> list[Tensor]:
        maps = [self.backbone(images)]
        maps.append(nn.functional.max_pool2d(maps[0], 2))
        return [layer(each) for layer, each in zip(self.neck, maps, strict=True)]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.predict(self.features(images))

    def predict(self, features: list[Tensor]) -> list[Tensor]:
        return [self.scores(self.tower(each).relu()) for each in features]


def test_a_head_of_all_levels_is_fitted_to_the_cells_of_all():
    torch.manual_seed(0)
    student, teacher = Plain(4), trained(Plain(8)).eval()
    images = some_images(8)
    inherit_channels(student, teacher=teacher)
    start = student.tower.weight.clone()
    result = fit_channels(student, teacher=teacher, images=images)
    assert set(result.fitted) == {"backbone.0", "neck.0", "neck.1", "tower", "scores"}
    with torch.no_grad():
        met = student.eval().features(images)
        wanted = [teacher.tower(each)[:, evenly_spaced(4, 8)] for each in teacher.features(images)]
    columns = [nn.functional.unfold(each, 3, padding=1).transpose(1, 2).flatten(0, 1).double() for each in met]
    inputs, aims = torch.cat(columns), torch.cat([each.movedim(1, -1).flatten(0, 2).double() for each in wanted])
    inputs, aims = inputs - inputs.mean(0), aims - aims.mean(0)
    for channel in range(4):
        first, aim = start[channel].flatten().double(), aims[:, channel]
        first = first * ((inputs @ first) @ aim / (inputs @ first).square().sum()).clamp(min=0)
        ridge = len(inputs) * inputs.square().mean() * max(RIDGE, inputs.shape[1] / len(inputs))
        system = torch.cat([inputs, ridge.sqrt() * torch.eye(inputs.shape[1])])
        expected = torch.linalg.lstsq(system, torch.cat([aim, ridge.sqrt() * first])).solution
        assert torch.allclose(student.tower.weight[channel].flatten().double(), expected, rtol=1e-3, atol=1e-5)


def test_hidden_layers_without_a_normalisation_become_channels_and_predictions_do_not():
    torch.manual_seed(0)
    student, teacher = Plain(4, classes=3), trained(Plain(8, classes=6)).eval()
    start = copy.deepcopy(student.state_dict())
    result = initialize(student, teacher=teacher, what="fitted", images=some_images)
    assert result is not None
    assert {"neck.0", "neck.1", "tower"} <= set(result.fitted)
    assert "scores" in result.unfitted, "three classes are no channels of six"
    assert torch.equal(student.scores.weight, start["scores.weight"])
    assert "neck.0.weight" in result.copied


class SamePadding(nn.Conv2d):
    """Pads as TensorFlow does: more at the right and the bottom where the number is odd."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(images, (0, 1, 0, 1)))


class Tilted(nn.Conv2d):
    """Pads at the left and the top alone."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(images, (1, 0, 1, 0)))


def test_a_layer_that_pads_for_itself_is_fitted_where_its_padding_is_known():
    torch.manual_seed(0)
    models = [nn.Sequential(SamePadding(3, width, 3, 2), nn.BatchNorm2d(width)) for width in (4, 8)]
    result = fit_channels(models[0], teacher=models[1], images=some_images(8))
    assert result.fitted["0"] > 0.9, "three colours are enough for all of the teacher's channels"
    models = [nn.Sequential(Tilted(3, width, 3, 2), nn.BatchNorm2d(width)) for width in (4, 8)]
    assert "0" in fit_channels(models[0], teacher=models[1], images=some_images(8)).unfitted


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def test_of_a_deeper_teacher_the_last_block_is_fitted_to_the_last():
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Sequential(*(Residual(4) for _ in range(count))))
        for count in (2, 4)
    )
    trained(teacher).eval()
    copied = inherit_channels(student, teacher=teacher)
    assert copied.copied["1.1.conv.weight"] == "1.3.conv.weight"
    assert torch.equal(student[1][1].conv.weight, teacher[1][3].conv.weight)
    assert "1.1.conv <- 1.3.conv" in str(copied) or "1.1 <- 1.3" in str(copied)
    assert set(fit_channels(student, teacher=teacher, images=some_images()).fitted) == {"0.0", "1.0.conv", "1.1.conv"}


def test_auto_takes_an_untrained_neck_and_head_and_leaves_a_trained_backbone():
    torch.manual_seed(0)
    teacher = trained(TinyDetector((32, 48, 64))).eval()
    student = trained(TinyDetector((16, 24, 32)), seed=1)
    before = copy.deepcopy(student.state_dict())
    images = torch.rand(4, 3, 64, 64)
    result = initialize(student, teacher=teacher, images=images)
    assert result is not None
    assert set(result.modules) == {"neck", "head"}
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(("neck.", "head."))}
    assert min(result.fitted.values()) > 0.05
    assert initialize(student, teacher=teacher, images=images) is None, "now all of it has weights of its own"
    with torch.no_grad():
        student.head.heads[0].bias[0] += 1
    neck = TinyDetector((16, 24, 32))
    neck.load_state_dict({**before, **{key: value for key, value in student.state_dict().items() if "head" in key}})
    result = initialize(neck, teacher=teacher, images=images)
    assert result is not None
    assert set(result.modules) == {"neck"}, "the head was trained"
