"""Several losses, several teachers: each level of each of them is a pair with adapter and scale of its own."""

import copy

import pytest
import torch

from fgd_hooks import Distiller, load_config
from fgd_hooks.errors import ConfigError, PairingError, TeacherError
from fgd_hooks.masks import PackedBoxes
from fgd_hooks.pairing import plan_pairs
from fgd_hooks.teacher import PerTeacher
from tests.helpers.tiny import TinyDetector, batch, trained

FIXED = {"mode": "fixed"}


@pytest.fixture
def student():
    torch.manual_seed(0)
    return trained(TinyDetector((8, 12, 16)))


@pytest.fixture
def teachers():
    torch.manual_seed(1)
    return [trained(TinyDetector((8, 16, 24)), seed=1), trained(TinyDetector((8, 10, 12), first=16), seed=2)]


def step(distiller, student, images, boxes):
    """One step; the gradient of the distillation alone at each of the student's parameters."""
    student.zero_grad()
    student(images)
    distilled = distiller(images, boxes)
    if distilled.loss.requires_grad:
        distilled.loss.backward()
    return distilled, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def alone(student, teacher, config, reference, names):
    """A Distiller of one loss and one teacher with the weights that another has for the lessons ``names``."""
    distiller = Distiller(student, teacher=teacher, config=config)
    for level, name in names.items():
        distiller.adapters[level].load_state_dict(reference.adapters[name].state_dict())
        distiller.losses[level].load_state_dict(reference.losses[name].state_dict())
    return distiller


def test_two_losses_are_the_sum_of_each_alone(student, teachers):
    images, boxes = batch()
    config = {"balance": FIXED, "losses": ["fgd", {"name": "cwd", "weight": 0.25, "options": {"temperature": 2.0}}]}
    with Distiller(student, teacher=teachers[0], config=config) as both:
        assert both.level_names == [f"{level}-{loss}" for level in ("P3", "P4", "P5") for loss in ("fgd", "cwd")]
        assert both.part_names == ["foreground", "background", "attention", "global", "channelwise"]
        distilled, gradient = step(both, student, images, boxes)
    expected = None
    total = 0.0
    for loss, weight in ((config["losses"][0], 1.0), ("cwd", 0.25)):
        single = {"balance": FIXED, "loss": {"name": loss, "options": {"temperature": 2.0} if loss == "cwd" else {}}}
        names = {level: f"{level}-{loss}" for level in ("P3", "P4", "P5")}
        with alone(student, teachers[0], single, both, names) as distiller:
            one, its_gradient = step(distiller, student, images, boxes)
        total = total + weight * one.loss.detach()
        for part, value in one.parts.items():
            torch.testing.assert_close(distilled.parts[part], weight * value)
        scaled = {name: weight * value for name, value in its_gradient.items()}
        expected = scaled if expected is None else {name: expected[name] + scaled[name] for name in scaled}
    torch.testing.assert_close(distilled.loss.detach(), total)
    assert gradient.keys() == expected.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(value, expected[name])


def test_two_teachers_are_the_sum_of_each_alone_with_its_own_pairs(student, teachers):
    images, boxes = batch()
    config = {"balance": FIXED, "teachers": [{"weight": 2.0, "levels": ["P4"]}, {}]}
    with Distiller(student, teacher=teachers, config=config) as both:
        assert both.level_names == ["P4-teacher1", "P4-teacher2", "P5-teacher2"]
        assert [pair.teacher.channels for pair in both.pairs] == [16, 8, 10]
        distilled, _ = step(both, student, images, boxes)
    with alone(student, teachers[0], {"balance": FIXED, "levels": ["P4"]}, both, {"P4": "P4-teacher1"}) as first:
        one, _ = step(first, student, images, boxes)
    names = {"P4": "P4-teacher2", "P5": "P5-teacher2"}
    with alone(student, teachers[1], {"balance": FIXED}, both, names) as second:
        other, _ = step(second, student, images, boxes)
    torch.testing.assert_close(distilled.loss.detach(), (2 * one.loss + other.loss).detach())


def test_the_balance_brings_each_loss_and_teacher_to_its_own_share(student, teachers):
    """|gradient of the lesson| / |gradient of the task| at the feature is the ratio times both weights."""
    images, boxes = batch()
    config = {
        "losses": ["fgd", {"name": "cwd", "weight": 0.5}],
        "teachers": [{}, {"weight": 3.0}],
        "levels": ["P4"],
        "balance": {"ratio": 0.2},
    }
    with Distiller(student, teacher=teachers, config=config) as distiller:
        assert [pair.weight for pair in distiller.pairs] == [1.0, 0.5, 3.0, 1.5]
        for _ in range(3):
            student.zero_grad()
            task = (student(images)["scores"] - 1).square().mean()
            (task + distiller(images, boxes).loss).backward()
        distiller.balance.close()
        norms = {}
        features = {}
        handle = student.neck.out[1].register_forward_hook(lambda m, a, out: features.update(P4=out))
        task = (student(images)["scores"] - 1).square().mean()
        norms["task"] = torch.autograd.grad(task, features["P4"])[0].norm()
        handle.remove()
        distiller.taps.clear()
        taught, _ = distiller.teach(images)
        for number, (pair, target) in enumerate(zip(distiller.pairs, taught, strict=True)):
            leaf = features["P4"].detach().requires_grad_()
            loss = distiller.level_loss(pair, leaf, target, PackedBoxes.of_batch(images, boxes, None)).loss
            gradient = torch.autograd.grad(loss * distiller.balance.scales[number], leaf)[0]
            assert float(gradient.norm() / norms["task"]) == pytest.approx(0.2 * pair.weight, rel=1e-3), pair.name


def test_one_scale_for_each_loss_without_per_level(student, teachers):
    images, boxes = batch()
    config = {"losses": ["fgd", "cwd"], "balance": {"per_level": False}}
    with Distiller(student, teacher=teachers[0], config=config) as distiller:
        for _ in range(2):
            task = (student(images)["scores"] - 1).square().mean()
            (task + distiller(images, boxes).loss).backward()
        distiller.balance.close()
        scales = dict(zip(distiller.level_names, distiller.balance.scales.tolist(), strict=True))
    assert scales["P3-fgd"] == scales["P4-fgd"] == scales["P5-fgd"] != scales["P3-cwd"]
    assert scales["P3-cwd"] == scales["P4-cwd"] == scales["P5-cwd"]


def test_the_same_loss_twice_is_numbered(student, teachers):
    losses = [{"name": "fgd", "options": {"beta": 0}}, {"name": "fgd", "options": {"alpha": 0}}]
    with Distiller(student, teacher=teachers[0], config={"losses": losses, "levels": ["P5"]}) as distiller:
        assert distiller.level_names == ["P5-fgd1", "P5-fgd2"]
        assert [loss.alpha > 0 for loss in distiller.losses.values()] == [True, False]


def test_all_teachers_are_frozen_and_given_back(student, teachers):
    for teacher in teachers:
        teacher.train()
    with Distiller(student, teacher=teachers) as distiller:
        assert distiller.teachers == teachers
        images, boxes = batch()
        (student(images)["scores"].mean() + distiller(images, boxes).loss).backward()
        for teacher in teachers:
            assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
        assert all(
            parameter is not p
            for teacher in teachers
            for parameter in teacher.parameters()
            for p in [*distiller.parameters()]
        )
    for teacher in teachers:
        assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_each_teacher_can_have_an_input_of_its_own(student, teachers):
    images, boxes = batch()
    with Distiller(student, teacher=teachers, config={"balance": FIXED}) as distiller:
        plain = distiller.teacher_features(images)
        own = distiller.teacher_features(PerTeacher([images, images * 2]))
        number = [pair.number for pair in distiller.pairs].index(1)
        torch.testing.assert_close(own[0], plain[0])
        assert not torch.equal(own[number], plain[number])
        torch.testing.assert_close(own[number], distiller.teacher_features(images * 2)[number])
        student(images)
        distiller(PerTeacher([images, images * 2]), boxes)  # the canvas is that of the first
        with pytest.raises(ValueError, match="PerTeacher holds 1 inputs for 2"):
            distiller.teacher_features(PerTeacher([images]))


def test_training_state_comes_back_and_does_not_fit_others(student, teachers):
    images, boxes = batch()
    config = {"losses": ["fgd", "cwd"], "balance": {"interval": 2}}
    with Distiller(student, teacher=teachers, config=config) as distiller:
        for _ in range(2):
            (student(images)["scores"].mean() + distiller(images, boxes).loss).backward()
        state = copy.deepcopy(distiller.training_state())
    with Distiller(student, teacher=teachers, config=config) as again:
        again.load_training_state(state)
        assert torch.equal(again.balance.scales, distiller.balance.scales)
        for name, value in again.state_dict().items():
            assert torch.equal(value, distiller.state_dict()[name])
    with (
        Distiller(student, teacher=teachers[0], config=config) as other,
        pytest.raises(ValueError, match="another distillation"),
    ):
        other.load_training_state(state)


def test_scores_of_the_teacher_reach_a_loss_that_needs_them(student, teachers):
    images, boxes = batch()
    taps = ["head.heads.0", "head.heads.1", "head.heads.2"]
    config = {"balance": FIXED, "loss": {"name": "scored"}, "score_taps": taps, "levels": ["P4", "P5"]}
    seen = {}
    for number, head in enumerate(teachers[0].head.heads):
        head.register_forward_hook(lambda m, a, out, number=number: seen.update({number: out.detach()}))
    with Distiller(student, teacher=teachers[0], config=config) as distiller:
        student(images)
        levels = distiller.taps.captured
        distilled = distiller(images, boxes)
        taught = distiller.teacher_features(images)
        for number, (level, scores) in enumerate((("P4", seen[1]), ("P5", seen[2]))):
            adapted = distiller.adapt(distiller.pairs[number], levels[number], taught[number].shape[2:])
            expected = distiller.losses[level](adapted, taught[number], [], scores=scores)
            torch.testing.assert_close(distilled.levels[level]["scored"], expected.loss.detach())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss": {"name": "scored"}}, "Name the modules that return them as score_taps"),
        ({"loss": {"name": "scored"}, "score_taps": ["head.heads.0"]}, "names 1 modules, but the teacher has 3 levels"),
        ({"teachers": [{}, {}]}, "teachers has 2 entries, but there are 1 teachers"),
        ({"teachers": [{"levels": ["P9"]}]}, "levels names 'P9'"),
        ({"losses": ["fgd", "cdw"]}, r"losses\[1\].name is 'cdw'. Did you mean 'cwd'"),
        ({"losses": [{"name": "fgd", "wieght": 2}]}, r"losses\[0\]: there is no key wieght. Did you mean 'weight'"),
        (
            {"losses": [{"name": "fgd", "weight": 0}]},
            r"losses\[0\]: loss.weight is 0.0; expected a finite number above 0",
        ),
        ({"losses": [3]}, r"losses\[0\] is 3; expected keys and values"),
        ({"losses": ["fgd"], "loss": {"name": "cwd"}}, "Both loss and losses are given"),
        ({"teachers": [{"weight": "much"}]}, r"teachers\[0\]: weight is 'much'; expected float"),
    ],
)
def test_mistakes_are_named(student, teachers, config, message):
    with pytest.raises(ConfigError, match=message):
        Distiller(student, teacher=teachers[0], config=config)


def test_wrong_teachers(student, teachers):
    with pytest.raises(TeacherError, match="same teacher is given twice"):
        Distiller(student, teacher=[teachers[0], teachers[0]])
    with pytest.raises(TeacherError, match="list of teachers is empty"):
        Distiller(student, teacher=[])
    with pytest.raises(TeacherError, match="same object"):
        Distiller(student, teacher=[teachers[0], student])
    with pytest.raises(PairingError):
        plan_pairs(student, [TinyDetector((8, 8), first=64)], load_config())


def test_lists_from_texts_and_files(tmp_path):
    from fgd_hooks.config import save_config

    config = load_config(None, ["losses=[fgd, {name: cwd, weight: 0.5}]", "teachers=[a.pt, {name: b.pt, weight: 2}]"])
    assert [(loss.name, loss.weight) for loss in config.losses] == [("fgd", 1.0), ("cwd", 0.5)]
    assert [(share.name, share.weight) for share in config.teachers] == [("a.pt", 1.0), ("b.pt", 2)]
    save_config(config, tmp_path / "fgd.yaml")
    assert load_config(tmp_path / "fgd.yaml") == config
