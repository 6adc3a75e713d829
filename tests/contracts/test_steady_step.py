"""A step that is under way neither makes the host wait for the device nor launches more work than it must."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fgd_hooks import Distiller, masks
from fgd_hooks.losses.fgd import FGDLoss
from fgd_hooks.losses.fused import _FusedTerms
from fgd_hooks.masks import PackedBoxes, box_masks
from tests.helpers.tiny import TinyDetector, batch, trained

# operations that launch nothing on a GPU: views, and the allocation of memory
FREE = {
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "squeeze", "t", "transpose", "unbind"),
    *(
        "_record_function_enter_new",
        "_record_function_exit",
        "promote_types",
        "split_with_sizes",
        "reshape",
        "_reshape_alias",
    ),
    *("unsqueeze", "view", "_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "split"),
}
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "item"}


class Calls(TorchDispatchMode):
    """Counts the operations that reach a backend, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def launches(self) -> int:
        return sum(count for name, count in self.names.items() if name not in FREE)


def boxes_on(device, images=2, each=5, size=64.0):
    corners = torch.rand(images * each, 2, 2, device=device).sort(1).values * size
    owner = torch.arange(images, device=device).repeat_interleave(each, output_size=images * each)
    return PackedBoxes.from_flat(corners.flatten(1), owner, images, (size, size))


@pytest.mark.skipif(torch.__version__.startswith("2.4"), reason="fake CUDA tensors of torch 2.4 ask for the driver")
def test_the_loss_on_a_gpu_never_asks_for_a_value(monkeypatch):
    """On tensors without values that claim to be on a GPU, whatever would make the host wait is an error."""
    monkeypatch.setattr(masks, "_PINNED_FOR", ())  # fake memory cannot be pinned
    with FakeTensorMode():
        with torch.device("cuda"):
            loss = FGDLoss(16)
            student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 16, 8, 8)
        result = loss(student, teacher, boxes_on("cuda"))
        assert result.loss.device.type == "cuda"
        # autograd's engine needs a real GPU: the fused function's own backward pass is called as it would call it
        with torch.no_grad():
            gradients = _FusedTerms.backward(result.loss.grad_fn, torch.ones((), device="cuda"), None, None)
        assert gradients[0].shape == student.shape
        assert gradients[0].device.type == "cuda"
        with pytest.raises(DataDependentOutputException):  # so the check does see it
            result.loss.item()


@pytest.mark.skipif(torch.__version__.startswith("2.4"), reason="fake CUDA tensors of torch 2.4 ask for the driver")
def test_a_whole_step_on_a_gpu_asks_for_no_value_and_mixes_no_devices(monkeypatch):
    """The Distiller's call on fake CUDA tensors: measuring, closing and plain, with adapters and the teacher's pass."""
    monkeypatch.setattr(masks, "_PINNED_FOR", ())  # fake memory cannot be pinned
    torch.manual_seed(0)
    student, teacher = trained(TinyDetector()), trained(TinyDetector((12, 16, 24)), 1)
    config = {"schedule": {"stop": None}, "max_bad_steps": 1000}
    distiller = Distiller(student, teacher=teacher, config=config)
    for adapter in distiller.adapters.values():
        adapter.fitted.fill_(True)
        assert not adapter.wants_fit
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in (student, teacher, distiller):
            for each in module.modules():
                for kind in (each._parameters, each._buffers):
                    for name, tensor in kind.items():
                        if tensor is not None:
                            fake = mode.from_tensor(tensor.detach()).cuda().requires_grad_(tensor.requires_grad)
                            kind[name] = nn.Parameter(fake, tensor.requires_grad) if kind is each._parameters else fake
        distiller.trained = list(distiller.parameters())
        distiller._health.steps = 5  # the first steps look at the boxes
        measured = []
        for number in range(6):
            images = torch.randn(2, 3, 64, 64, device="cuda")
            student(images)
            if number == 1:  # as if a backward pass had come: it is closed in the second call
                for record in distiller.balance._open._records:
                    record |= {key: torch.ones((), device="cuda") for key in ("task", "distillation", "product")}
            found = distiller(images, boxes_on("cuda"), task_loss=torch.ones((), device="cuda"))
            measured.append(found.measured)
            assert found.loss.device.type == found.parts["global"].device.type == "cuda"
        assert measured[:3] == [True, True, False]
        assert distiller.balance.scales.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):  # so the check does see it
            found.loss.item()


def steady(count=2, each=3, levels=None):
    """The calls of the distiller's forward pass, without the teacher's, and of its backward pass to the features."""
    torch.manual_seed(0)
    student, teacher = trained(TinyDetector()), trained(TinyDetector((12, 16, 24)), 1)
    distiller = Distiller(student, teacher=teacher, config={"schedule": {"stop": None}, "levels": levels})
    for number in range(6):
        images, _ = batch(number, count)
        packed = boxes_on("cpu", count, each)
        task = student(images)["scores"].square().mean()
        features = list(distiller.taps._features.values())
        with Calls() as teaching:
            distiller._teachers[0].features(images)
        with Calls() as forward:
            distilled = distiller(images, packed)
        forward.names -= teaching.names
        if number < 5:
            (task + distilled.loss).backward()
    with Calls() as backward:
        torch.autograd.grad(distilled.loss, [*features, *distiller.parameters()])
    assert not distilled.measured
    return forward, backward


def test_a_steady_step_reads_no_value_but_the_count_of_bad_steps():
    forward, backward = steady()
    assert sum(backward.names[name] for name in WAITS) == 0
    # two numbers of the counter of non-finite steps, which a GPU gives only every max_bad_steps-th step
    assert sum(forward.names[name] for name in WAITS) <= 2
    assert forward.names["nonzero"] == forward.names["masked_select"] == 0


def test_launches_per_level_are_few_and_independent_of_images_and_boxes():
    counts = {}
    for name, arguments in {
        "base": {},
        "images": {"count": 5},
        "boxes": {"each": 40},
        "one level": {"levels": ["P3"]},
        "two levels": {"levels": ["P3", "P4"]},
    }.items():
        forward, backward = steady(**arguments)
        counts[name] = (forward.launches, backward.launches)
    assert counts["images"] == counts["base"] == counts["boxes"]
    forward, backward = (b - a for a, b in zip(counts["one level"], counts["two levels"], strict=True))
    assert forward <= 75
    assert backward <= 65


def test_deterministic_mode_fills_no_memory_of_the_loss():
    counts = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            loss = FGDLoss(8)
            student, teacher = torch.randn(2, 8, 12, 12, requires_grad=True), torch.randn(2, 8, 12, 12)
            boxes = boxes_on("cpu")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                loss(student, teacher, boxes).loss.backward()
            assert torch.utils.deterministic.fill_uninitialized_memory
        finally:
            torch.use_deterministic_algorithms(False)
        counts.append(sum(event.name == "aten::fill_" for event in profile.events()))
    assert counts[1] <= counts[0] + 3, "autograd's own"


def test_the_memory_of_masks_does_not_grow_with_the_boxes():
    pytest.importorskip("numpy")
    from benchmarks.common import peak_bytes

    batches = [boxes_on("cpu", 4, each) for each in (20, 200, 1000)]
    peaks = [peak_bytes(partial(box_masks, packed, 80, 80)) for packed in batches]
    assert peaks[1] == peaks[0]
    assert peaks[2] == peaks[0]
    masks = 2 * 4 * 80 * 80 * 4
    assert peaks[0] < masks + 3 * 2**20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_steady_step_on_a_gpu_does_not_wait():
    torch.manual_seed(0)
    student, teacher = trained(TinyDetector()).cuda(), trained(TinyDetector((12, 16, 24)), 1).cuda()
    distiller = Distiller(student, teacher=teacher, config={"schedule": {"stop": None}})
    inputs = [(batch(n)[0].cuda(), [each.cuda() for each in batch(n)[1]]) for n in range(14)]
    try:
        for number, (images, boxes) in enumerate(inputs):
            # the first steps look at the boxes; from then on also a measuring step and the one after it must not wait
            torch.cuda.set_sync_debug_mode("error" if number >= 4 else "default")
            task = student(images)["scores"].square().mean()
            (task + distiller(images, boxes).loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(distiller.balance.ratios).all())
