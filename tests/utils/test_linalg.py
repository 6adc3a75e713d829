"""The fitted adapter: ridge regression by its definition, once, and through the Distiller."""

from __future__ import annotations

import pytest
import torch

from fgd_hooks import Distiller
from fgd_hooks.adapters import create_adapter
from fgd_hooks.utils import linalg
from fgd_hooks.utils.linalg import MAX_CELLS, RIDGE
from tests.helpers.tiny import TinyDetector, batch, trained


def features(student=6, teacher=10, cells=(5, 4), images=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    s = torch.rand(images, student, *cells, generator=random) + 2
    mixed = torch.einsum("ts,nshw->nthw", torch.randn(teacher, student, generator=random), s)
    return s, mixed + 0.1 * torch.randn(mixed.shape, generator=random) - 3


def objective(weight, bias, start, s, t):
    """What the fit is to minimise, term by term."""
    cells, width = s.shape[0] * s.shape[2] * s.shape[3], s.shape[1]
    rest = t - torch.einsum("ts,nshw->nthw", weight, s) - bias[:, None, None]
    variance = s.movedim(1, 0).flatten(1).var(dim=1, unbiased=False).mean()
    ridge = cells * variance * max(RIDGE, width / cells)
    return rest.square().sum() + ridge * (weight - start).square().sum()


@pytest.mark.parametrize(("student", "teacher"), [(6, 10), (10, 6), (4, 4), (24, 30)])
def test_the_fit_is_the_minimum(student, teacher):
    s, t = features(student, teacher, cells=(3, 2))  # 18 cells: fewer than 24 channels
    adapter = create_adapter("fitted", student, teacher)
    start = adapter.weight.detach().flatten(1).double()
    assert torch.equal(adapter(s), create_adapter("aligned", student, teacher)(s))
    adapter.fit(s, t)
    weight = adapter.weight.detach().flatten(1).double().requires_grad_()
    bias = adapter.bias.detach().double().requires_grad_()
    loss = objective(weight, bias, start, s.double(), t.double())
    gradients = torch.autograd.grad(loss, [weight, bias])
    at_start = torch.zeros(teacher, dtype=torch.float64, requires_grad=True)
    moved = start.clone().requires_grad_()
    before = torch.autograd.grad(objective(moved, at_start, start, s.double(), t.double()), [moved, at_start])
    for found, reference in zip(gradients, before, strict=True):
        assert found.norm() < 1e-5 * reference.norm()


def test_more_cells_than_are_taken():
    s, t = features(3, 5, cells=(160, 120), images=1)
    assert s[0, 0].numel() > MAX_CELLS
    adapter = create_adapter("fitted", 3, 5)
    adapter.fit(s, t)
    whole, few = (t - adapter(s)).square().mean().item(), t.var().item()
    assert whole < 0.1 * few


def test_the_cells_that_are_taken_are_of_all_columns(images=40, side=80):
    """Every n-th cell of maps whose width n divides is one of few columns, here every 16th, the border among them."""
    random = torch.Generator().manual_seed(0)
    s = torch.rand(images, 3, side, side, generator=random)
    t = torch.einsum("ts,nshw->nthw", torch.randn(4, 3, generator=random), s)
    t[..., ::16] = 5
    adapter = create_adapter("fitted", 3, 4)
    adapter.fit(s, t)
    assert (t - adapter(s)).square().mean() < t.var(), "worse than the mean"
    _, rows, columns = linalg.cell_places(linalg.chosen_cells(images * side * side), side, side)
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == side


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_leave_the_weights_to_the_next_batch(bad):
    s, t = features()
    broken = t.clone()
    broken[1, 2, 3, 1] = bad
    adapter, expected = create_adapter("fitted", 6, 10), create_adapter("fitted", 6, 10)
    before = adapter.weight.clone()
    adapter.fit(s, broken)
    assert torch.equal(adapter.weight, before)
    assert not adapter.bias.any()
    assert adapter.wants_fit
    adapter.fit(s, t)
    expected.fit(s, t)
    assert torch.equal(adapter.weight, expected.weight)
    assert not adapter.wants_fit


def test_constant_features_leave_finite_weights():
    s, t = torch.ones(2, 4, 3, 3), torch.zeros(2, 8, 3, 3)
    adapter = create_adapter("fitted", 4, 8)
    adapter.fit(s, t)
    assert torch.isfinite(adapter.weight).all()
    assert torch.isfinite(adapter.bias).all()


def test_half_precision_features():
    s, t = features()
    adapter, exact = create_adapter("fitted", 6, 10), create_adapter("fitted", 6, 10)
    exact.fit(s.half().float(), t.half().float())
    adapter.fit(s.half(), t.half())
    assert torch.equal(adapter.weight, exact.weight)


IMAGES, BOXES = batch()


def a_step(distiller, student, images):
    student(images)
    return distiller(images, BOXES)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return TinyDetector(), trained(TinyDetector((12, 24, 32)))


@pytest.mark.parametrize("mode", ["gradient", "fixed"])
def test_the_distiller_fits_before_the_first_loss_and_never_again(pair, mode):
    student, teacher = pair
    with Distiller(student, teacher=teacher, config={"balance": {"mode": mode}}) as distiller:
        taught = distiller.teacher_features(IMAGES)
        first = a_step(distiller, student, IMAGES)
        fitted = {name: tensor.clone() for name, tensor in distiller.adapters.state_dict().items()}
        for name, adapter in distiller.adapters.items():
            level = distiller.level_names.index(name)
            student(IMAGES)
            alone = create_adapter("fitted", adapter.in_channels, adapter.out_channels)
            alone.fit(distiller.taps.captured[level].detach(), taught[level])
            torch.testing.assert_close(alone.weight, adapter.weight)
        distiller.taps.clear()
        assert first.loss > 0
        a_step(distiller, student, torch.rand(2, 3, 64, 64))
        assert all(torch.equal(tensor, fitted[name]) for name, tensor in distiller.adapters.state_dict().items())


def test_loaded_weights_are_not_fitted_again(pair):
    student, teacher = pair
    with Distiller(student, teacher=teacher) as distiller:
        a_step(distiller, student, IMAGES)
        with torch.no_grad():
            for parameter in distiller.parameters():
                parameter.add_(0.5)
        plain, whole = distiller.state_dict(), distiller.training_state()
    for load in (lambda other: other.load_state_dict(plain), lambda other: other.load_training_state(whole)):
        with Distiller(student, teacher=teacher) as other:
            load(other)
            a_step(other, student, IMAGES)
            assert all(torch.equal(tensor, plain[name]) for name, tensor in other.state_dict().items())


def test_a_state_from_before_the_fit_is_fitted_again(pair):
    student, teacher = pair
    with Distiller(student, teacher=teacher) as distiller:
        early = distiller.training_state()
        a_step(distiller, student, IMAGES)
        distiller.load_training_state(early)
        adapters = list(distiller.adapters.values())
        assert all(adapter.wants_fit for adapter in adapters)
        a_step(distiller, student, IMAGES)
        assert all(bool(adapter.fitted) for adapter in adapters)


def test_maps_of_other_sizes_are_resized(pair):
    student, teacher = pair
    with Distiller(student, teacher=teacher, config={"resize": True}) as distiller:
        student(IMAGES[..., :32, :32])
        distiller(IMAGES, BOXES)
        assert all(bool(adapter.fitted) for adapter in distiller.adapters.values())
