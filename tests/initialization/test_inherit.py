import copy

import pytest
import torch
from torch import nn

from fgd_hooks.errors import TeacherError
from fgd_hooks.initialization.inherit import inherit
from tests.helpers.tiny import TinyDetector, block, trained
from tests.initialization.test_neck_head import WithoutNeck


def pair(student=(8, 12, 16), teacher=(8, 12, 16)):
    torch.manual_seed(0)
    return TinyDetector(student), trained(TinyDetector(teacher))


def state(model):
    return copy.deepcopy(model.state_dict())


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


class Blocks(nn.Module):
    """Convolutions with batch normalisations, as a neck; only ever compared, never called."""

    def __init__(self, *widths, name="neck"):
        super().__init__()
        self.add_module(name, nn.Sequential(*(block(a, b, 1) for a, b in zip(widths[:-1], widths[1:], strict=True))))


def test_neck_and_head_become_the_teachers_and_nothing_else():
    student, teacher = pair()
    student.neck.out[0].weight.requires_grad_(False)
    student.head.eval()
    flags = [p.requires_grad for p in student.parameters()], [m.training for m in student.modules()]
    before, teachers = state(student), state(teacher)
    result = inherit(student, teacher=teacher)
    parts = {name for name in before if name.startswith(("neck.", "head."))}
    assert changed(student, before) == parts
    assert all(torch.equal(student.state_dict()[name], teachers[name]) for name in parts)
    assert not changed(teacher, teachers)
    assert result.copied == {name: name for name in parts}
    assert result.kept == {}
    count = sum(p.numel() for part in (student.neck, student.head) for p in part.parameters())
    assert result.parameters == result.of == count
    assert flags == ([p.requires_grad for p in student.parameters()], [m.training for m in student.modules()])


def test_one_part_alone():
    student, teacher = pair()
    before = state(student)
    inherit(student, teacher=teacher, parts="head")
    assert {name.split(".")[0] for name in changed(student, before)} == {"head"}


def test_layers_of_another_shape_are_kept_and_the_report_says_why():
    student, teacher = pair((8, 12, 16), (8, 12, 20))
    before = state(student)
    result = inherit(student, teacher=teacher)
    kept = {f"{layer}.{key}" for layer in ("neck.out.2", "neck.down.1", "head.heads.2") for key in ("weight", "bias")}
    assert set(result.kept) == kept, "a bias goes with its weight, also where its own shape would fit"
    assert not changed(student, before) & kept
    assert changed(student, before) == set(result.copied)
    assert "(16, 12, 3, 3)" in result.kept["neck.down.1.bias"]
    assert "(20, 12, 3, 3)" in result.kept["neck.down.1.bias"]
    copied = sum(p.numel() for name, p in student.named_parameters() if name in result.copied)
    assert result.parameters == copied < result.of
    text = str(result)
    assert f"{copied:,} of {result.of:,} parameters" in text
    assert "neck.down.1.weight and 1 more" in text
    assert "\n" not in result.summary
    assert "10 tensors, 6 kept" in result.summary


def test_a_normalisation_goes_with_the_layer_before_it():
    student, teacher = Blocks(4, 6, 6), Blocks(5, 6, 6)
    teacher = trained_norms(teacher)
    before = state(student)
    result = inherit(student, teacher=teacher, parts={"neck": ["neck"]})
    names = {name for name in before if name.startswith("neck.1.")}
    assert set(result.copied) == names, "the first normalisation has the right shape, but its convolution has not"
    assert "neck.1.1.num_batches_tracked" in result.copied
    assert "neck.0.0.weight" in result.kept["neck.0.1.running_mean"]
    torch.testing.assert_close(student.neck[1][1].running_mean, teacher.neck[1][1].running_mean)


def trained_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            module.num_batches_tracked += 7
    return model


def test_modules_of_other_names_pair_in_order():
    student, teacher = Blocks(4, 6), Blocks(4, 6, name="pyramid")
    result = inherit(student, teacher=teacher, parts={"neck": ["neck"]}, teacher_parts={"neck": ["pyramid"]})
    assert result.copied["neck.0.0.weight"] == "pyramid.0.0.weight"
    assert torch.equal(student.neck[0][0].weight, teacher.pyramid[0][0].weight)
    assert "neck <- pyramid" in str(result)


def test_order_skips_modules_without_weights_and_needs_equal_numbers():
    student, teacher = Blocks(4, 6, 6), Blocks(4, 6, 6)
    teacher.up = nn.Upsample()
    mine, theirs = {"neck": ["neck.0", "neck.1"]}, {"neck": ["neck.0", "up", "neck.1"]}
    result = inherit(student, teacher=teacher, parts=mine, match="order", teacher_parts=theirs)
    assert result.copied["neck.1.0.weight"] == "neck.1.0.weight"
    before = state(student)
    with pytest.raises(ValueError, match="2 modules with weights, the teacher's 1"):
        inherit(student, teacher=Blocks(4, 6), parts=mine, match="order", teacher_parts={"neck": ["neck.0"]})
    result = inherit(student, teacher=Blocks(4, 6), parts=mine, teacher_parts={"neck": ["neck.0"]})
    assert not result.copied
    assert set(result.kept) == set(before), "auto: no error, but every tensor with the reason"
    assert "nothing of the neck was initialised from the teacher" in result.summary
    assert not changed(student, before)


def test_by_name_a_layer_that_the_teacher_lacks_is_kept():
    student, teacher = Blocks(4, 6, 6, 6), Blocks(4, 6, 6)
    result = inherit(student, teacher=teacher, parts={"neck": ["neck.0", "neck.1", "neck.2"]}, match="name")
    assert {name.split(".")[1] for name in result.copied} == {"0", "1"}
    assert "the teacher has no neck.2.0" in result.kept["neck.2.0.weight"]


def test_a_fused_teacher_gives_nothing_and_the_reason():
    student, teacher = Blocks(4, 6), Blocks(4, 6)
    teacher.neck[0] = nn.Sequential(teacher.neck[0][0])  # its normalisation folded into the convolution
    result = inherit(student, teacher=teacher, parts={"neck": ["neck"]})
    assert not result.copied
    assert "is it fused?" in result.kept["neck.0.0.weight"]


def test_a_transposed_convolution_is_another_layer():
    student, teacher = nn.Module(), nn.Module()
    student.neck, teacher.neck = nn.Conv2d(4, 4, 2), nn.ConvTranspose2d(4, 4, 2)
    assert "ConvTranspose2d" in inherit(student, teacher=teacher, parts={"neck": ["neck"]}).kept["neck.weight"]


def test_other_groups_are_another_layer_though_the_weights_have_one_shape():
    student, teacher = nn.Module(), nn.Module()
    student.neck, teacher.neck = nn.Conv2d(8, 4, 1, groups=2), nn.Conv2d(4, 4, 1)
    assert (
        "neck has 2 groups, the teacher's 1"
        in inherit(student, teacher=teacher, parts={"neck": ["neck"]}).kept["neck.weight"]
    )
    student.neck, teacher.neck = nn.Conv2d(8, 4, 1, groups=2), nn.Conv2d(8, 4, 1, groups=2)
    inherit(student, teacher=teacher, parts={"neck": ["neck"]})
    assert torch.equal(student.neck.weight, teacher.neck.weight)


def test_another_precision_is_converted():
    student, teacher = Blocks(4, 6), Blocks(4, 6).half()
    inherit(student, teacher=teacher, parts={"neck": ["neck"]})
    assert student.neck[0][0].weight.dtype is torch.float32
    assert torch.equal(student.neck[0][0].weight, teacher.neck[0][0].weight.float())


def test_wrappers_are_looked_through():
    student, teacher = pair()
    inherit(nn.DataParallel(student), teacher=nn.DataParallel(teacher), parts="head")
    assert torch.equal(student.head.heads[0].weight, teacher.head.heads[0].weight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parts": "nekc"}, "'nekc'"),
        ({"parts": ""}, "neck\\+head"),
        ({"parts": "neck+neck"}, "neck\\+neck"),
        ({"parts": {"neck": ["nekc"]}}, "'nekc'.*'neck'"),
        ({"parts": ["neck"]}, "the modules of each part"),
        ({"parts": {}}, "the modules of each part"),
        ({"parts": {"neck": "neck"}}, "list"),
        ({"parts": {"neck": []}}, "at least one"),
        ({"match": "nmae"}, "'nmae'.*order"),
        ({"teacher_parts": {"neck": ["neck"]}}, "teacher_parts"),
        ({"parts": {"neck": ["neck"]}, "teacher_parts": {"head": ["head"]}}, "same keys"),
        ({"parts": {"neck": ["neck"]}, "teacher_parts": {"neck": ["neck"]}, "match": "name"}, "order"),
    ],
    ids=str,
)
def test_wrong_arguments_change_nothing(settings, words):
    student, teacher = pair()
    before = state(student)
    with pytest.raises(ValueError, match=words):
        inherit(student, teacher=teacher, **settings)
    assert not changed(student, before)


def test_a_part_that_cannot_be_found():
    _, teacher = pair()
    with pytest.raises(ValueError, match=r"No neck.*student \(WithoutNeck\).*Name the modules"):
        inherit(WithoutNeck(), teacher=teacher)


def test_a_teacher_that_cannot_give():
    student, teacher = pair()
    before = state(student)
    with torch.no_grad():
        teacher.head.heads[2].bias[0] = float("nan")  # the last tensor: all others would have been copied by then
    with pytest.raises(TeacherError, match=r"head\.heads\.2\.bias"):
        inherit(student, teacher=teacher)
    with pytest.raises(TeacherError, match="same object"):
        inherit(student, teacher=student)
    assert not changed(student, before)


def test_a_student_made_in_inference_mode():
    with torch.inference_mode():
        student = Blocks(4, 6)
    with pytest.raises(ValueError, match="inference mode"):
        inherit(student, teacher=Blocks(4, 6), parts={"neck": ["neck"]})
