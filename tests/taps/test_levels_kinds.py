"""Levels are found where the head works on them, however a detector is built; else a word says what to name."""

import copy
import logging

import pytest
import torch
from torch import nn

from fgd_hooks import Distiller
from fgd_hooks.errors import TapError
from fgd_hooks.taps.levels import BEFORE_ENCODER, find_levels
from tests.helpers import kinds
from tests.helpers.kinds import WIDTH

FIXED = {"balance": {"mode": "fixed"}, "schedule": {"stop": None}}
SAME = {**FIXED, "adapter": "identity"}
BOXES = [torch.tensor([[8.0, 8, 90, 90]])] * 2
IMAGES = torch.rand(2, 3, 128, 160, generator=torch.Generator().manual_seed(0))


def found(model, taps=None, **settings):
    return [(level.stride, level.channels, str(level.tap)) for level in find_levels(model, taps, **settings)]


def three(*taps, channels=WIDTH):
    return list(zip((8, 16, 32), (channels,) * 3, taps, strict=True))


HEAD = three("head:input[0]", "head:input[1]", "head:input[2]")
NECK = three("neck[0]", "neck[1]", "neck[2]")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (kinds.Detector, HEAD),
        (kinds.PerLevel, NECK),
        (kinds.ByMethod, NECK),
        (kinds.ByMethodOneBranch, NECK),
        (kinds.FromModuleList, NECK),
        (kinds.CoarsestFirst, three("head:input[2]", "head:input[1]", "head:input[0]")),
        (kinds.ThreeArguments, three("head:input", "head:args[1]", "head:args[2]")),
        (kinds.SecondArgument, HEAD),
        (kinds.PositionsFirst, three("head:args[1][0]", "head:args[1][1]", "head:args[1][2]")),
        (kinds.SameSize, [*HEAD, (32, WIDTH, "head:input[3]")]),
        (kinds.Inline, three("smooth3", "smooth4", "smooth5")),
        (kinds.Recursive, HEAD),
        (kinds.StageByStage, NECK),
        (kinds.HeadsOnTheBackbone, HEAD),
        (kinds.Record, NECK),
        (kinds.LossInside, HEAD),
        (kinds.HeadsByName, three("smooth3", "smoother", "coarsest")),
        (kinds.OneFused, [(8, WIDTH, "fuse")]),
        (kinds.ListOfOne, [(32, WIDTH, "projector[0]")]),
    ],
)
def test_the_levels_are_what_the_head_works_on_and_all_before_it_learns(make, expected):
    student, teacher = make(), make()
    assert found(student) == expected
    state = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        student(IMAGES)
        distiller(IMAGES, BOXES).loss.backward()
        optimizer.step()
    before = [name for name, _ in student.named_parameters() if not name.startswith(("head", "more"))]
    assert [name for name in before if student.get_parameter(name).grad is None] == []
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    distiller.detach()
    for model in (student, teacher):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", kinds.WRAPS)
def test_levels_in_containers(name):
    wrap, taps = kinds.WRAPS[name]
    student = kinds.Unwrapping(wrap)
    assert found(student) == three(*taps)
    assert found(student, ["neck"]) == three(*taps)
    teacher = copy.deepcopy(student)
    with Distiller(student, teacher=teacher, config=SAME) as distiller:
        student(IMAGES)
        assert float(distiller(IMAGES, BOXES).loss) == 0  # equal models


@pytest.mark.parametrize("wrap", [lambda each: (each,), lambda each: {"only": each}, kinds.Features])
def test_one_map_in_a_container(wrap):
    (level,) = find_levels(kinds.ListOfOne(wrap))
    assert (level.stride, level.channels, level.tap.module) == (32, WIDTH, "projector")
    assert len(find_levels(kinds.ListOfOne(wrap), ["projector"])) == 1


def test_a_map_beside_a_list_of_others_belongs_to_it_but_what_a_head_returns_does_not():
    split = kinds.Unwrapping(lambda maps: {"fine": maps[0], "rest": tuple(maps[1:])})
    assert found(split) == three("neck[fine]", "neck[rest][0]", "neck[rest][1]")

    class Prototypes(kinds.Detector):
        """A head that returns its maps and one of another size, as segmentation heads do."""

        class Head(kinds.Towers):
            def forward(self, maps):
                up = nn.functional.interpolate(self.box_tower(maps[0]), scale_factor=2)
                return super().forward(maps), {"feats": maps, "proto": up}

        def __init__(self):
            super().__init__()
            self.head = self.Head()

    assert found(Prototypes()) == HEAD


def test_a_backbone_that_returns_its_last_map_alone_is_no_head():
    class Layer(nn.Conv2d):
        def forward(self, x):
            return (super().forward(x),)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layers = nn.Conv2d(3, 16, 16, 16), nn.ModuleList(Layer(16, 16, 1) for _ in range(3))

        def forward(self, images):
            x = self.stem(images)
            for layer in self.layers:
                (x,) = layer(x)
            return {"feature_maps": (x,)}

    assert found(Plain()) == [(16, 16, "layers.2[0]")]


def test_one_map_without_a_container_is_named_in_the_error():
    class Single(kinds.Detector):
        def forward(self, images):
            return self.head.single(self.neck(self.backbone(images))[0])

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 3, 8, 1), nn.Conv2d(8, WIDTH, 3, 4, 1)
            self.head = nn.Conv2d(WIDTH, 9, 1)

        def forward(self, images):
            return self.head(self.body(self.stem(images)).relu())

    assert found(Single()) == [(8, WIDTH, "neck[0]")]  # the head works on this level alone
    with pytest.raises(TapError, match=r"stem \(stride 8, 8 channels\)"):
        find_levels(Plain())


def test_tokens_are_named_in_the_error():
    class Tokens(nn.Module):
        """A vision transformer that does not say how many of its tokens have no place."""

        def __init__(self):
            super().__init__()
            self.patch, self.layer, self.head = nn.Conv2d(3, 16, 16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

        def forward(self, images):
            tokens = self.patch(images).flatten(2).transpose(1, 2)
            return self.head(self.layer(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))[:, 0])

    with pytest.raises(TapError, match=r"'layer@16\+1'"):
        find_levels(Tokens())
    assert found(Tokens(), ["layer@16+1"]) == [(16, 16, "layer@16+1")]


def test_tokens_of_an_encoder_are_levels_and_queries_are_none():
    encoder = [f"encoder[last_hidden_state]@{cells}+0" for cells in ("(8)/16/32", "8/(16)/32", "8/16/(32)")]
    assert found(kinds.QueryDetector()) == three(*encoder)
    before = three("input_proj.0", "input_proj.1", "input_proj.2")
    assert found(kinds.QueryDetector(), [BEFORE_ENCODER]) == before
    student = kinds.QueryDetector()
    teacher = copy.deepcopy(student)
    plain = student(IMAGES)["logits"]
    with Distiller(student, teacher=teacher, config=SAME) as distiller:
        assert torch.equal(student(IMAGES)["logits"], plain)
        taught = distiller.teacher_features(IMAGES)
        assert [tuple(each.shape) for each in taught] == [(2, WIDTH, 16, 20), (2, WIDTH, 8, 10), (2, WIDTH, 4, 5)]
        assert float(distiller(IMAGES, BOXES).loss) == 0
    maps = [proj(each) for proj, each in zip(student.input_proj, student.backbone(IMAGES), strict=True)]
    tokens = student.encoder(torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1))["last_hidden_state"]
    torch.testing.assert_close(taught[1].flatten(2).transpose(1, 2), tokens[:, 320:400])


def test_the_image_and_empty_tensors_are_no_levels():
    class Segmenter(kinds.Detector):
        def __init__(self):
            super().__init__()
            self.head = self.Head()

        class Head(kinds.Towers):
            def forward(self, maps):
                return super().forward(maps[2:])

        def forward(self, images):
            maps = self.neck(self.backbone(images))
            return self.head([images, images.new_zeros(len(images), 0, 64, 64), *maps])

    assert found(Segmenter()) == three("head:input[2]", "head:input[3]", "head:input[4]")


def test_predictions_are_no_levels():
    class Neck(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))

        def forward(self, a, b):
            return self.c[0](a), self.c[1](b)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Conv2d(8, 9, 1)

        def forward(self, a, b):
            return [self.p(a), self.p(b)]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Head()
            self.a, self.b, self.neck = nn.Conv2d(3, 8, 3, 8, 1), nn.Conv2d(8, 8, 3, 2, 1), Neck()
            self.after = nn.Sigmoid()

        def forward(self, x):
            a = self.a(x)
            return [self.after(each) for each in self.head(*self.neck(a, self.b(a)))]

    assert found(Model()) == [(8, 8, "neck[0]"), (16, 8, "neck[1]")]

    class HeadFirst(Model):
        def forward(self, x):
            a = self.a(x)
            return [self.head.p(each) for each in (a, self.b(a))]

    assert found(HeadFirst()) == [(8, 8, "a"), (16, 8, "b")]


def test_space_to_depth_in_front_takes_three_channels():
    class Focus(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.second = nn.Conv2d(12, 16, 3, 4, 1), nn.Conv2d(16, 32, 3, 2, 1)

        def forward(self, x):
            x = self.stem(nn.functional.pixel_unshuffle(x, 2))
            return [x, self.second(x)]

    assert found(Focus()) == [(8, 16, "(model)[0]"), (16, 32, "(model)[1]")]


class OneSize(kinds.Detector):
    """A model for squares of one size, which its configuration may say."""

    def __init__(self, size, says=True):
        super().__init__()
        self.size = size
        self.config = type("Config", (), {"image_size": size})() if says else None

    def forward(self, images):
        maps = self.neck(self.backbone(images))
        if tuple(images.shape[2:]) != (self.size, self.size):  # after the neck: levels were seen, but not all ran
            raise RuntimeError(f"made for {self.size} pixels")
        return self.head(maps)


def test_a_probe_that_fails_is_tried_again_with_the_size_that_the_model_says_and_with_common_ones():
    assert find_levels(OneSize(224))[0].canvas == (224, 224)
    assert find_levels(OneSize(512, says=False))[0].canvas == (512, 512)
    with pytest.raises(TapError, match=r"\(1, 3, 256, 384\).*\(1, 3, 640, 640\) raised RuntimeError: made for 100 pix"):
        find_levels(OneSize(100, says=False))
    with pytest.raises(TapError, match=r"\(1, 3, 64, 64\) raised RuntimeError: made for 100 pixels"):
        find_levels(OneSize(100, says=False), example=torch.zeros(1, 3, 64, 64))


def test_a_teacher_of_one_size_is_paired_with_a_student_of_any():
    with Distiller(kinds.Detector(), teacher=OneSize(224), config=FIXED) as distiller:
        assert [pair.name for pair in distiller.pairs] == ["P3", "P4", "P5"]


class WithTargets(kinds.Detector):
    def forward(self, images, targets):
        assert isinstance(targets, list)
        return super().forward(images)


class Batch(kinds.Detector):
    def forward(self, batch):
        return super().forward(batch["image"])


class Unpacked(kinds.Detector):
    def forward(self, *, image, size=None):
        return super().forward(image)


class Padded:
    """Images and a mask, as DETR's code has them."""

    def __init__(self, tensors):
        self.tensors, self.mask = tensors, None


class Nested(kinds.Detector):
    def forward(self, samples):
        return super().forward(samples.tensors)


@pytest.mark.parametrize(
    ("make", "wrap"),
    [
        (WithTargets, lambda x: (x, [])),
        (WithTargets, lambda x: ((x,), {"targets": []})),
        (WithTargets, lambda x: lambda model: model(x, [])),
        (WithTargets, lambda x: lambda: (x, [])),
        (Batch, lambda x: {"image": x}),
        (Batch, lambda x: (({"image": x},), {})),
        (Unpacked, lambda x: {"image": x}),
        (Nested, Padded),
    ],
)
def test_models_that_are_called_in_another_way(make, wrap):
    student, teacher = make(), make()
    with Distiller(student, teacher=teacher, config=FIXED, example=wrap(IMAGES[:1])) as distiller:
        assert [str(pair.student.tap) for pair in distiller.pairs] == [tap for _, _, tap in HEAD]
        student(**wrap(IMAGES)) if make is Unpacked else _call(student, wrap(IMAGES))
        assert float(distiller(IMAGES, BOXES, teacher_inputs=wrap(IMAGES)).loss) > 0


def _call(model, inputs):
    from fgd_hooks.taps.calls import call_model, resolved

    return call_model(model, resolved(inputs))


def test_a_teacher_that_is_called_in_another_way_than_the_student():
    student, teacher = kinds.Detector(), WithTargets()
    with Distiller(student, teacher=teacher, config=FIXED, teacher_inputs=(IMAGES[:1], [])) as distiller:
        student(IMAGES)
        assert float(distiller(IMAGES, BOXES, teacher_inputs=(IMAGES, [])).loss) > 0


def test_what_is_changed_in_place_behind_a_tap_is_kept_as_it_was():
    student = kinds.InPlace()
    teacher = copy.deepcopy(student)
    taps = ["neck.smooth.*"]
    with Distiller(student, teacher=teacher, config={**SAME, "student_taps": taps, "teacher_taps": taps}) as distiller:
        out = student(IMAGES)
        assert float(distiller(IMAGES, BOXES).loss) == 0
    assert torch.equal(out[0][0], teacher(IMAGES)[0][0])


def test_a_change_in_place_that_begins_later_is_said_and_mended(caplog):
    class Later(kinds.InPlace):
        later = False

        def forward(self, images):
            return super().forward(images) if self.later else kinds.Detector.forward(self, images)

    student = Later()
    teacher = copy.deepcopy(student)
    taps = ["neck.smooth.*"]
    with Distiller(student, teacher=teacher, config={**SAME, "student_taps": taps, "teacher_taps": taps}) as distiller:
        student.later = True
        with caplog.at_level(logging.WARNING, logger="fgd_hooks"):
            for _ in range(3):
                student(IMAGES)
                loss = float(distiller(IMAGES, BOXES).loss)
        assert loss == 0
    assert caplog.text.count("changed in place") == 1


@pytest.mark.parametrize("taps", [None, ["neck"], ["neck#1"], ["neck#0:input"]])
def test_a_module_that_runs_several_times(taps):
    student = kinds.Recursive()
    teacher = copy.deepcopy(student)
    named = {} if taps is None else {"student_taps": taps, "teacher_taps": taps}
    with Distiller(student, teacher=teacher, config={**SAME, **named}) as distiller:
        for _ in range(2):
            student(IMAGES)
            assert float(distiller(IMAGES, BOXES).loss) == 0
    if taps == ["neck"]:
        assert [tap for _, _, tap in found(student, taps)] == ["neck#2[0]", "neck#2[1]", "neck#2[2]"]


def test_a_call_that_there_is_not():
    with pytest.raises(TapError, match=r"neck#7 cannot be used: its module runs 3 time"):
        find_levels(kinds.Recursive(), ["neck#7"])


def test_several_passes_of_the_student_in_one_step_are_said_once(caplog):
    student, teacher = kinds.Detector(), kinds.Detector()
    with (
        Distiller(student, teacher=teacher, config=FIXED) as distiller,
        caplog.at_level(logging.WARNING, logger="fgd_hooks"),
    ):
        for _ in range(2):
            student(IMAGES)
            student(IMAGES)
            distiller(IMAGES, BOXES)
    assert caplog.text.count("several passes of the student") == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    student, teacher = kinds.Detector().to(dtype), kinds.Detector()
    for one, other, images in ((student, teacher, IMAGES.to(dtype)), (kinds.Detector(), student, IMAGES)):
        with Distiller(one, teacher=copy.deepcopy(other), config={"schedule": {"stop": None}}) as distiller:
            for _ in range(2):
                out = one(images)
                (out[0][0].float().square().mean() + distiller(images, BOXES).loss).backward()


def test_a_teacher_whose_forward_is_in_inference_mode():
    class Inference(kinds.Detector):
        forward = torch.inference_mode()(kinds.Detector.forward)

    student = kinds.Detector()
    with Distiller(student, teacher=Inference(), config=FIXED) as distiller:
        student(IMAGES)
        distiller(IMAGES, BOXES).loss.backward()


def test_lazy_modules_are_whole_after_the_probe():
    class Lazy(kinds.Detector):
        def __init__(self):
            super().__init__()
            self.neck.lateral[2] = nn.LazyConv2d(WIDTH, 1)

    model = Lazy()
    assert found(model) == HEAD
    assert model.neck.lateral[2].weight.shape == (WIDTH, 16, 1, 1)
    student = Lazy()
    with Distiller(student, teacher=Lazy(), config=FIXED) as distiller:
        student(IMAGES)
        distiller(IMAGES, BOXES).loss.backward()


def test_a_stride_that_was_rounded_has_its_name():
    levels = find_levels(kinds.Detector(), example=torch.zeros(1, 3, 500, 500))
    assert [level.name for level in levels] == ["P3", "P4", "P5"]
