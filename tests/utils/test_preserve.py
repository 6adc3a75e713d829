"""Nothing that is tried on a model inside ``preserve`` can be seen on it afterwards, whatever the model is."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fgd_hooks.taps.levels import find_levels
from fgd_hooks.utils.preserve import preserve
from tests.helpers.tiny import TinyDetector

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Forgetful(TinyDetector):
    """Draws random numbers, and writes into attributes, containers and buffers in each pass, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))
        self.scratch, self.cache, self.log = torch.zeros(1), {"size": None}, ["made"]
        self.dropped = "there until the first pass"
        self.stem[1].eval()
        self.stem[0].weight.requires_grad_(False)

    def forward(self, images):
        self.seen += 1
        self.scratch += random.random() + np.random.rand() + torch.rand(1)
        self.cache.update(size=images.shape, extra=1)
        self.log.append("pass")
        self.anchors, self.dropped = self.seen * 2, None
        del self.dropped
        self.register_buffer("grid", torch.rand(1))
        self.offset = nn.Parameter(torch.zeros(1))
        return super().forward(images + 0 * self.grid)

    def __getattr__(self, name):
        return "" if name == "dropped" else super().__getattr__(name)


def quantisation_aware():
    from torch.ao import quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = TinyDetector().train()
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        return quantization.prepare_qat(model)  # its observers measure in eval mode, too, and their buffers grow


def depth_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        image_size=64,
        neck_hidden_sizes=[4, 6, 8, 8],
        fusion_hidden_size=8,
    )
    return transformers.DPTForDepthEstimation(config)  # the first pass installs hooks, and a flag that says so


def detector_of_torchvision():
    pytest.importorskip("torchvision")
    from fgd_hooks.integrations.torchvision import OnBatch
    from tests.helpers.tiny_detectors import build

    return OnBatch(build("retinanet"))


def backbone_of_timm():
    return pytest.importorskip("timm").create_model("test_efficientnet", features_only=True)


def yolo(student_yaml):
    return pytest.importorskip("ultralytics").YOLO(str(student_yaml)).model


ZOO = [Forgetful, TinyDetector, quantisation_aware, depth_of_transformers, detector_of_torchvision, backbone_of_timm]


@pytest.fixture(params=[*ZOO, yolo], ids=lambda make: make.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param(*([request.getfixturevalue("student_yaml")] if request.param is yolo else []))


def bits(tensor):
    return tensor.shape, tensor.dtype, hash(tensor.detach().clone().flatten().view(torch.uint8).numpy().tobytes())


def contents(value):
    """A value as it can be compared later: tensors by identity, bits and gradient, containers by what is in them."""
    if isinstance(value, Tensor):
        grad = None if value.grad_fn else value.grad
        return id(value), bits(value), value.requires_grad, grad if grad is None else (id(grad), bits(grad))
    if isinstance(value, dict):
        return id(value), [(key, contents(each)) for key, each in value.items()]
    return (id(value), [id(each) for each in value]) if isinstance(value, (list, set)) else id(value)


def everything(model):
    """All that can be seen of a model and of the random generators."""
    seen = {"python": random.getstate(), "numpy": bits(torch.tensor(np.random.get_state()[1].astype("int64")))}
    seen["torch"] = bits(torch.get_rng_state())
    for name, module in model.named_modules():
        seen[name, "mode"] = type(module), module.training
        seen.update(((name, key), contents(value)) for key, value in vars(module).items())
    return {**seen, **{("state_dict", name): bits(value) for name, value in model.state_dict().items()}}


def differences(model, before):
    after = everything(model)
    return [key for key in before | after if before.get(key) != after.get(key)]


def tensors(value):
    """All tensors in what a model returns."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if hasattr(value, "values") else value if isinstance(value, (list, tuple)) else []
    return [each for inner in values for each in tensors(inner)]


def run(model):
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    with torch.no_grad():
        return tensors(model(IMAGES))


def train_a_step_and_hook(model):
    """A step of training, and a hook of each kind that stays."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    sum(each.float().square().mean() for each in tensors(model(IMAGES)) if each.requires_grad).backward()
    optimizer.step()
    for module in list(model.modules()):
        module.register_forward_hook(lambda *_: None, always_call=True)
        module.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
        module.register_full_backward_hook(lambda *_: None)
        module.register_full_backward_pre_hook(lambda *_: None)
        module.register_state_dict_pre_hook(lambda *_: None)
        module.register_state_dict_post_hook(lambda *_: None)
        module.register_load_state_dict_pre_hook(lambda *_: None)
        module.register_load_state_dict_post_hook(lambda *_: None)
        module._forward_hooks.popitem(last=False)
    for parameter in trained:
        parameter.requires_grad_(False)
    with torch.no_grad():
        next(model.parameters()).data.fill_(float("nan"))
    model.half().extra = nn.ReLU()


@pytest.mark.parametrize("way", ["a probe", "an examination", "an error"])
def test_models_are_as_before(model, way):
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    model.register_forward_hook(lambda *_: None)
    before = everything(model)
    if way == "a probe":
        find_levels(model, example=IMAGES)
    elif way == "an examination":
        with preserve(model):
            assert all(parameter.grad is None for parameter in model.parameters())
            train_a_step_and_hook(model)
            assert len(differences(model, before)) > 10
    else:
        with pytest.raises(ZeroDivisionError), preserve(model, probe=True):
            assert not torch.is_grad_enabled() and not any(module.training for module in model.modules())
            model(IMAGES)
            raise ZeroDivisionError
    assert differences(model, before) == []
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(run(model), run(twin), strict=True))


def test_models_that_share_modules_and_are_given_twice():
    one = TinyDetector()
    other = nn.Sequential(one.stem, nn.Flatten())
    before = everything(one), everything(other)
    with preserve(one, other, one, probe=True):
        one(IMAGES), other(IMAGES)
        other.append(nn.ReLU())
    assert differences(one, before[0]) == differences(other, before[1]) == []


def test_a_lazy_module_stays_what_its_first_pass_makes_of_it():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)).train()
    with preserve(model, probe=True):
        model(IMAGES)
    assert type(model[0]) is nn.Conv2d and model[0].in_channels == 3 and model[0].training
    assert not model[0]._forward_pre_hooks
    model(IMAGES)


def test_what_is_changed_on_purpose_stays():
    model = TinyDetector().train()
    with preserve(model, probe=True, but=[model.stem[1].running_mean]):
        model.stem[1].running_mean.fill_(2)
        model.stem[1].running_var.fill_(2)
    assert model.stem[1].running_mean.tolist() == [2] * 8
    assert model.stem[1].running_var.tolist() == [1] * 8


def test_a_graph_that_waits_for_its_backward_stays_valid():
    model = TinyDetector().train()
    loss = model(IMAGES)["scores"].mean()
    with preserve(model):
        for parameter in model.parameters():
            parameter.data.zero_()
    loss.backward()
    assert model.stem[0].weight.grad.abs().sum() > 0
