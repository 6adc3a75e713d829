import copy

import pytest
import torch
from torch import Tensor, nn

from fgd_hooks.errors import TeacherError
from fgd_hooks.initialization.initialize import initialize
from fgd_hooks.initialization.weight_selection import inherit_channels
from fgd_hooks.utils.linalg import evenly_spaced
from tests.helpers.tiny import TinyDetector, block, trained


class Net(nn.Module):
    """Two branches that are concatenated, a depthwise layer, and a last layer that nothing normalises."""

    def __init__(self, width: int, outputs: int = 3, kernel: int = 3) -> None:
        super().__init__()
        self.left = block(3, width, 1)
        self.right = block(3, 2 * width, 1)
        self.depthwise = nn.Sequential(
            nn.Conv2d(3 * width, 3 * width, kernel, padding=kernel // 2, groups=3 * width, bias=False),
            nn.BatchNorm2d(3 * width),
        )
        self.mix = block(3 * width, width, 1)
        self.last = nn.Conv2d(width, outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([self.left(images), self.right(images)], 1)
        return self.last(self.mix(self.depthwise(both)))


def net(width, seed=0, **settings):
    torch.manual_seed(seed)
    return Net(width, **settings)


def widened(narrow: Net, by: int) -> Net:
    """A network in which each channel comes ``by`` times and that computes the same."""
    wide = Net(narrow.last.in_channels * by)
    with torch.no_grad():
        for name, module in wide.named_modules():
            source = narrow.get_submodule(name)
            if isinstance(module, nn.BatchNorm2d):
                for key in ("weight", "bias", "running_mean", "running_var"):
                    getattr(module, key).copy_(getattr(source, key).repeat_interleave(by))
            elif isinstance(module, nn.Conv2d):
                weight = source.weight
                outputs = module.out_channels // source.out_channels
                weight = weight.repeat_interleave(outputs, 0)
                inputs = module.weight.shape[1] // weight.shape[1]
                module.weight.copy_(weight.repeat_interleave(inputs, 1) / inputs)
                if module.bias is not None:
                    module.bias.copy_(source.bias.repeat_interleave(outputs))
    return wide


def test_evenly_spaced_channels():
    assert evenly_spaced(4, 8).tolist() == [0, 2, 4, 6]
    assert evenly_spaced(3, 5).tolist() == [0, 1, 3]
    assert evenly_spaced(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_each_layer_takes_evenly_spaced_channels_with_their_statistics():
    student, teacher = net(2), trained(net(4, seed=1))
    result = inherit_channels(student, teacher=teacher)
    mine, theirs = student.state_dict(), teacher.state_dict()
    assert torch.equal(mine["left.0.weight"], theirs["left.0.weight"][[0, 2]])
    assert torch.equal(mine["left.0.bias"], theirs["left.0.bias"][[0, 2]])
    assert torch.equal(mine["depthwise.0.weight"], theirs["depthwise.0.weight"][[0, 2, 4, 6, 8, 10]])
    assert torch.equal(mine["mix.0.weight"], theirs["mix.0.weight"][[0, 2]][:, [0, 2, 4, 6, 8, 10]])
    assert torch.equal(mine["mix.1.running_var"], theirs["mix.1.running_var"][[0, 2]])
    assert torch.equal(mine["last.weight"], 2 * theirs["last.weight"][:, [0, 2]]), "half the terms, twice the weight"
    assert torch.equal(mine["last.bias"], theirs["last.bias"])
    assert set(result.copied) == set(mine)
    assert result.kept == {}
    assert result.parameters == result.of == sum(p.numel() for p in student.parameters())
    assert "of the network were initialised from the teacher" in result.summary


@pytest.mark.parametrize("by", [1, 2, 3])
def test_a_teacher_of_repeated_channels_gives_back_the_network_it_was_made_of(by):
    original = trained(net(4)).double()
    teacher = widened(original, by).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for model in (original, teacher):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-12  # the sums of a thinned layer have another size, which only eps could show
        model.train()
    expected = original(images)
    assert torch.allclose(teacher(images), expected), "the test's own wide network computes the same"
    student = net(4, seed=7).double().train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12
    assert not torch.allclose(student(images), expected)
    inherit_channels(student, teacher=teacher)
    assert torch.allclose(student(images), expected, atol=1e-7)


def test_flags_and_the_teacher_stay_as_they_are():
    student, teacher = net(2), trained(net(4, seed=1))
    student.left[0].weight.requires_grad_(False)
    student.mix.eval()
    flags = [p.requires_grad for p in student.parameters()], [m.training for m in student.modules()]
    before = copy.deepcopy(teacher.state_dict())
    inherit_channels(student, teacher=teacher)
    assert flags == ([p.requires_grad for p in student.parameters()], [m.training for m in student.modules()])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_head_for_other_classes_stays_as_it_was():
    for outputs in (2, 5):
        student, teacher = net(2, outputs=outputs), trained(net(4, seed=1))
        before = student.last.weight.clone()
        result = inherit_channels(student, teacher=teacher)
        assert torch.equal(student.last.weight, before)
        assert set(result.kept) == {"last.weight", "last.bias"}
    assert "last" in result.kept["last.weight"]


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (lambda: net(4, seed=1, kernel=5), "no channels of the teacher's"),
        (lambda: net(1, seed=1), "no channels of the teacher's"),
        (TinyDetector, "the teacher has no left.0"),
    ],
    ids=["kernel", "narrower", "other layers"],
)
def test_layers_that_do_not_fit_are_kept_with_the_reason(teacher, words):
    student = net(2)
    before = student.depthwise[0].weight.clone()
    result = inherit_channels(student, teacher=trained(teacher()))
    assert torch.equal(student.depthwise[0].weight, before)
    assert any(words in reason for reason in result.kept.values())


def test_other_groups_do_not_fit():
    student, teacher = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), nn.Sequential(nn.Conv2d(8, 8, 1, groups=2))
    assert "2 groups" in inherit_channels(student, teacher=teacher).kept["0.weight"]
    # a depthwise layer is the same kind at any width, and one group is
    student, teacher = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4)), nn.Sequential(nn.Conv2d(4, 4, 1))
    assert "groups" in inherit_channels(student, teacher=teacher).kept["0.weight"]


def test_a_transposed_convolution_has_its_inputs_first():
    def model(width):
        layers = nn.ConvTranspose2d(width, 2 * width, 2, bias=False), nn.BatchNorm2d(2 * width)
        return nn.Sequential(*layers, nn.ConvTranspose2d(2 * width, 3, 2))

    student, teacher = model(2), model(4)
    assert not inherit_channels(student, teacher=teacher).kept
    assert torch.equal(student[0].weight, teacher[0].weight[[0, 2]][:, [0, 2, 4, 6]])
    assert torch.equal(student[2].weight, 2 * teacher[2].weight[[0, 2, 4, 6]])


def test_too_little_that_fits_changes_nothing():
    student, teacher = net(2, outputs=5), trained(net(4, seed=1))
    before = copy.deepcopy(student.state_dict())
    result = inherit_channels(student, teacher=teacher, least=0.99)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert result.parameters == 0
    assert set(result.kept) == set(before)
    assert "parameters fit" in result.summary
    assert inherit_channels(student, teacher=teacher, least=0.5).parameters > 0


def test_what_the_setting_says():
    teacher = trained(TinyDetector((8, 12, 16)))
    assert initialize(TinyDetector((4, 6, 8)), teacher=teacher, what="") is None
    kept = initialize(TinyDetector((4, 6, 8)), teacher=teacher, what="auto")
    assert kept is not None
    assert kept.parameters == 0, "most of its layers have no normalisation, so that less than nine tenths fit"
    some = initialize(TinyDetector((4, 6, 8)), teacher=teacher, what="channels")
    assert some is not None
    assert 0 < some.parameters < some.of
    seen = trained(net(2))
    assert initialize(seen, teacher=trained(net(4, seed=1)), what="auto") is None, (
        "a student with weights of its own keeps them"
    )
    assert initialize(seen, teacher=trained(net(4, seed=1)), what="channels")
    fresh = initialize(net(2), teacher=trained(net(4, seed=1)), what="auto")
    assert fresh is not None
    assert fresh.parameters == fresh.of
    neck = initialize(TinyDetector((8, 12, 16)), teacher=teacher, what="neck")
    assert neck is not None
    assert set(neck.modules) == {"neck"}


def test_a_fused_teacher_gives_nothing_and_the_reason():
    teacher = trained(net(4, seed=1)).eval()
    teacher.left = nn.Sequential(torch.nn.utils.fuse_conv_bn_eval(teacher.left[0], teacher.left[1]))
    assert "fused" in inherit_channels(net(2), teacher=teacher).kept["left.0.weight"]


def test_errors_change_nothing():
    student = net(2)
    with pytest.raises(TeacherError):
        inherit_channels(student, teacher=student)
    broken = trained(net(4, seed=1))
    broken.last.weight.data[0] = float("nan")
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(TeacherError, match="NaN"):
        inherit_channels(student, teacher=broken)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    with torch.inference_mode():
        fixed = net(2)
    with pytest.raises(ValueError, match="inference mode"):
        inherit_channels(fixed, teacher=trained(net(4, seed=1)))
