import copy
import json
import math
import random

import pytest
import torch
from torch import nn

from fgd_hooks import Distiller
from fgd_hooks.diagnostics.doctor import diagnose
from fgd_hooks.diagnostics.report import Finding, Report
from tests.helpers.tiny import TinyDetector, batch, trained

FIXED = {"balance": {"mode": "fixed"}}


@pytest.fixture
def models():
    torch.manual_seed(0)
    student = trained(TinyDetector((8, 12, 16)))
    student.train()
    return student, trained(TinyDetector((8, 16, 24)), seed=1)


def task_loss(student, images):
    return (student(images)["scores"] - 1).square().mean()


def check(student, teacher, config=None, *, boxes=None, distiller=None, optimizer=None, **changes):
    images, own = batch()
    distiller = distiller or Distiller(student, teacher=teacher, config=config)
    if optimizer is None:
        optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], 0.1)
    changes.setdefault("loss", lambda: task_loss(student, images))
    return diagnose(distiller, images, own if boxes is None else boxes, optimizer=optimizer, **changes)


def test_a_sound_distillation_is_green(models):
    report = check(*models)
    assert report.status == "green", str(report)
    names = [finding.name for finding in report.findings]
    expected = "numbers taps levels optimizer masks loss_parts gradient loss_scale weight_0 teacher teacher_frozen"
    assert "cannot be told" in report.of("teacher").found
    assert set(names) == {*(name.replace("_", " ") for name in expected.split()), "teacher's features"}
    assert len(names) == len(set(names))
    assert all(finding.mend == "" for finding in report.findings)


def state(*models):
    """All that a check might leave a trace in, copied."""
    found = []
    for model in models:
        found.append({name: value.clone() for name, value in model.state_dict().items()})
        found.append([module.training for module in model.modules()])
        found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        found.append([p.requires_grad for p in model.parameters()])
        found.append([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()])
        found.append([sorted(vars(module)) for module in model.modules()])
    return found


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def test_numbers_that_are_not_finite_do_not_stay(models):
    _, teacher = models
    student = TinyDetector((8, 12, 16)).train()  # the means of its batch normalisations are still 0
    images, boxes = batch()
    images[0, 0, 0, 0] = math.nan
    distiller = Distiller(student, teacher=teacher)
    before = state(student)
    report = diagnose(distiller, images, boxes, loss=lambda: task_loss(student, images))
    assert report.status == "red"
    assert same(before, state(student))


@pytest.mark.parametrize("outcome", ["well", "an error in loss()", "a red finding"])
def test_leaves_no_trace(models, outcome):
    student, teacher = models
    student.stem[1].eval()  # a mode of its own must come back
    student.dropout = nn.Dropout(0.5)
    distiller = Distiller(student, teacher=teacher)
    images, boxes = batch()
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], 0.1)

    def loss():
        student.cache = torch.rand(1)
        value = student.dropout(student(images)["scores"]).square().mean() * random.random()
        if outcome == "an error in loss()":
            raise ZeroDivisionError
        return value * (math.nan if outcome == "a red finding" else 1)

    for _ in range(2):  # gradients, a measured balance and a clock that have moved
        (task_loss(student, images) + distiller(images, boxes).loss).backward()
    student(images)  # captured for the step that follows
    before = state(student, teacher, distiller)
    balance = copy.deepcopy(distiller.balance.state_dict())
    captured = list(distiller.taps.captured)
    own = {name: value for name, value in vars(distiller).items() if not name.startswith("_modules")}
    step, skipped = distiller.clock.step, distiller.skipped_steps
    torch.manual_seed(3)
    random.seed(3)
    if outcome == "an error in loss()":
        with pytest.raises(ZeroDivisionError):
            diagnose(distiller, images, boxes, loss=loss, optimizer=optimizer)
    else:
        report = diagnose(distiller, images, boxes, loss=loss, optimizer=optimizer)
        assert report.status == ("green" if outcome == "well" else "red")
    drawn = torch.rand(4), random.random()
    torch.manual_seed(3)
    random.seed(3)
    assert torch.equal(drawn[0], torch.rand(4))
    assert drawn[1] == random.random()
    assert same(before, state(student, teacher, distiller))
    assert same(balance, distiller.balance.state_dict())
    assert (distiller.clock.step, distiller.skipped_steps) == (step, skipped)
    assert all(vars(distiller)[name] is value for name, value in own.items())
    assert all(a is b for a, b in zip(captured, distiller.taps.captured, strict=True))
    distiller(images, boxes).loss.backward()


def test_numbers_of_the_loss_scale(models):
    """The raw ratio by its definition: norms of the two gradients at the student's feature."""
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config={**FIXED, "adapter": "aligned"})
    images, boxes = batch()
    report = check(student, teacher, distiller=distiller)
    task = task_loss(student, images)
    features = list(distiller.taps.captured)
    taught = distiller.teacher_features(images)
    for level, feature, target in zip(distiller.level_names, features, taught, strict=True):
        result = distiller.losses[level](distiller.adapters[level](feature), target, boxes, (64, 64))
        ours = torch.autograd.grad(result.loss, feature, retain_graph=True)[0].norm()
        theirs = torch.autograd.grad(task, feature, retain_graph=True)[0].norm()
        assert report.of("loss scale").values[f"raw_ratio/{level}"] == pytest.approx(float(ours / theirs), rel=1e-4)


@pytest.mark.parametrize(
    ("config", "status", "knob"),
    [
        ({"weight": 1e5, **FIXED}, "red", "balance.mode=gradient"),
        ({"weight": 1e-5, **FIXED}, "red", "balance.mode=gradient"),
        ({"balance": {"ratio": 30.0}}, "yellow", "balance.ratio=1"),
        ({"weight": 1000}, "red", "weight=1"),
        ({"balance": {"max_scale": 1e-3, "min_scale": 1e-8}}, "red", "balance.max_scale"),
        ({"balance": {"ratio": 2.0}}, "green", ""),
    ],
)
def test_strength_that_is_far_off(models, config, status, knob):
    finding = check(*models, config).of("loss scale")
    assert finding.status == status, finding
    assert knob in finding.mend


def test_the_weight_that_is_proposed_for_fixed_weights_is_right(models):
    torch.manual_seed(5)  # the adapters' initial weights
    finding = check(*models, {"weight": 1e5, **FIXED}).of("loss scale")
    torch.manual_seed(5)
    proposed = float(finding.mend.split("weight=")[1].rstrip("."))
    again = check(*models, {"weight": proposed, **FIXED}).of("loss scale")
    assert again.status == "green"
    ratios = [value for name, value in again.values.items() if name.startswith("ratio/")]
    assert 0.9 < math.prod(ratios) ** (1 / len(ratios)) < 1.1


def test_an_untrained_teacher(models):
    teacher = models[1]
    for parameter in teacher.parameters():
        nn.init.zeros_(parameter)
        parameter.data += 1e-8
    finding = check(*models).of("teacher's features")
    assert finding.status == "red"
    assert "not trained" in finding.mend


@pytest.mark.parametrize("scale", [1 / 64, 640 / 64, 1 / 8])
def test_boxes_in_the_wrong_unit(models, scale):
    """Fractions of the image, pixels of an image ten times as big, and cells of P3."""
    boxes = [of_image * scale for of_image in batch()[1]]
    report = check(*models, boxes=boxes)
    assert report.of("masks").status == ("yellow" if scale == 1 / 8 else "red")
    assert "pixel corners" in report.of("masks").mend


def test_boxes_shifted_out_of_the_image(models):
    boxes = [of_image + 48 for of_image in batch()[1]]
    assert check(*models, boxes=boxes).of("masks").status in ("yellow", "red")


def test_boxes_as_centre_and_size(models):
    boxes = [torch.tensor([[40.0, 40.0, 10.0, 10.0]])] * 2
    finding = check(*models, boxes=boxes).of("masks")
    assert finding.status == "red"
    assert "cx cy w h" in finding.found


def test_boxes_of_another_shape(models):
    finding = check(*models, boxes=[torch.zeros(2, 5)] * 2).of("masks")
    assert finding.status == "red"
    assert "(2, 5)" in finding.found


def test_boxes_of_another_number_of_images(models):
    report = check(*models, boxes=[torch.tensor([[4.0, 4.0, 30.0, 30.0]])] * 3)
    assert report.of("step").status == "red"
    assert "3 image(s)" in report.of("step").found


def test_no_boxes(models):
    report = check(*models, boxes=[torch.zeros(0, 4)] * 2)
    assert report.of("masks").status == "yellow"
    assert report.of("loss parts").status == "green", "no foreground without objects"


def test_objects_that_cover_everything(models):
    """There is no background then: its part is 0 by definition, and that is no fault."""
    finding = check(*models, boxes=[torch.tensor([[0.0, 0.0, 40.0, 40.0]])] * 2).of("loss parts")
    assert finding.values["P5/background"] == 0
    assert finding.status == "green"
    assert "P5/background" in finding.found


def test_share_of_the_foreground(models):
    """A box of 0..31 px covers columns 0..4 of 8 (one more than ceil alone), and so the rows."""
    boxes = [torch.tensor([[0.0, 0.0, 31.0, 31.0]])] * 2
    values = check(*models, boxes=boxes).of("masks").values
    assert values["foreground/P3"] == pytest.approx(25 / 64)
    assert values["covering/P3"] == 1


def test_a_frozen_student(models):
    student, teacher = models
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    finding = check(student, teacher).of("gradient")
    assert finding.status == "red"
    assert "frozen" in finding.found


def test_a_student_frozen_up_to_its_neck(models):
    student, teacher = models
    for module in (student.stem, student.stages, student.neck):
        module.requires_grad_(False)
    finding = check(student, teacher).of("gradient")
    assert finding.status == "red"
    assert "P3, P4, P5" in finding.found


def test_adapters_in_no_optimizer(models):
    finding = check(*models, optimizer=torch.optim.SGD(models[0].parameters(), 0.1)).of("optimizer")
    assert finding.status == "red"
    assert "add_param_group" in finding.mend


def test_optimizer_not_given_or_with_the_teacher_or_resting(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher)
    images, boxes = batch()
    report = diagnose(distiller, images, boxes, loss=lambda: task_loss(student, images))
    assert report.of("optimizer").status == "yellow"
    everything = [*student.parameters(), *distiller.parameters(), *teacher.parameters()]
    finding = check(student, teacher, distiller=distiller, optimizer=torch.optim.SGD(everything, 0.1)).of("optimizer")
    assert (finding.status, "teacher" in finding.found) == ("red", True)
    two = [torch.optim.SGD(student.parameters(), 0.1), torch.optim.AdamW(distiller.parameters(), 0.0)]
    finding = check(student, teacher, distiller=distiller, optimizer=two).of("optimizer")
    assert (finding.status, "learning rate 0" in finding.found) == ("yellow", True)


def test_a_teacher_that_goes_back_to_train_mode(models):
    student, teacher = models
    norm = teacher.stem[1]
    teacher.stem.register_forward_pre_hook(lambda *_: norm.train() and None)
    report = check(student, teacher)
    assert report.of("teacher frozen").status == "red"
    assert "running_mean" in report.of("teacher frozen").found


def test_a_teacher_without_running_statistics(models):
    student, teacher = models
    teacher.stem[1] = nn.BatchNorm2d(8, track_running_stats=False)
    assert check(student, teacher).of("teacher frozen").status == "yellow"


def test_a_teacher_that_is_unfrozen_again(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher)
    teacher.neck.requires_grad_(True)
    finding = check(student, teacher, distiller=distiller).of("gradient")
    assert finding.status == "red"
    assert "neck" in finding.found


def test_nan_in_student_or_in_the_teachers_features(models):
    student, teacher = models
    student.head.heads[0].weight.data[0, 0] = math.nan
    assert "head.heads.0.weight" in check(student, teacher).of("numbers").found
    student.head.heads[0].weight.data[0, 0] = 0
    distiller = Distiller(student, teacher=teacher)
    teacher.neck.out[1].weight.data[0, 0] = math.nan  # after the Distiller has looked at it
    report = check(student, teacher, distiller=distiller)
    assert report.of("teacher's features").status == "red"
    assert "P4" in report.of("teacher's features").found
    assert "P4/foreground" in report.of("loss parts").found
    json.dumps(report.to_dict(), allow_nan=False)


def test_another_student_runs_than_the_distillers(models):
    student, teacher = models
    stranger = trained(TinyDetector((8, 12, 16)))
    finding = check(student, teacher, loss=lambda: task_loss(stranger, batch()[0])).of("taps")
    assert finding.status == "red"
    assert "did not fire" in finding.found


def test_a_level_without_partner():
    student, teacher = trained(TinyDetector((8, 12, 16))), trained(TinyDetector((16, 24), first=16))
    finding = check(student, teacher).of("levels")
    assert finding.status == "yellow"
    assert "only the student has P3" in finding.found
    assert check(student, teacher, {"levels": ["P4"]}).of("levels").status == "green", "chosen"
    finding = check(teacher, student).of("levels")
    assert (finding.status, "only the teacher has P3" in finding.found) == ("green", True)


def test_a_part_that_is_switched_off_and_one_that_is_zero(models):
    student, teacher = models
    finding = check(student, teacher, {"loss": {"options": {"lambda_": 0.0}}}).of("loss parts")
    assert (finding.status, "switched off: global" in finding.found) == ("green", True)
    twin = copy.deepcopy(student)
    twin.eval()
    student.eval()
    report = check(student, twin)  # the teacher is the student's copy: nothing to learn
    assert report.of("loss parts").status == "red"
    assert report.of("gradient").status == "red"


def test_something_else_acts_on_the_student(models):
    """What would break the contract of weight 0: a loss() that brings the distillation in itself."""
    student, teacher = models
    images, _ = batch()
    calls = []

    def loss():
        calls.append(1)
        return task_loss(student, images) * (2 if len(calls) == 5 else 1)

    assert check(student, teacher, loss=loss).of("weight 0").status == "red"
    calls.clear()
    noisy = check(student, teacher, loss=lambda: calls.append(1) or task_loss(student, images) * len(calls))
    assert noisy.of("weight 0").status == "green"
    assert "differ already" in noisy.of("weight 0").found


def test_weight_zero_is_said(models):
    report = check(*models, {"weight": 0})
    assert report.of("weight").status == "yellow"
    assert report.of("loss scale").status == "green"


def test_misuse_is_an_error(models):
    student, teacher = models
    with pytest.raises(ValueError, match="one number"):
        check(student, teacher, loss=lambda: student(batch()[0])["scores"])
    with torch.no_grad(), pytest.raises(ValueError, match="no_grad"):
        check(student, teacher)


def test_a_report_as_text_and_as_json():
    findings = [
        Finding("green", "a", "Well."),
        Finding("red", "b", "Bad.", "Do this.", {"x": math.inf}),
        Finding("yellow", "c", "Hm.", "Look."),
    ]
    report = Report(tuple(findings))
    assert report.status == "red"
    assert [finding.name for finding in report.troubles] == ["b", "c"]
    assert str(report).splitlines()[1] == "red: b: Bad. Mend: Do this."
    assert str(report).splitlines()[-1] == "red: 3 checks, 1 green, 1 yellow, 1 red"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["findings"][1]["values"] == {"x": None}
    with pytest.raises(KeyError, match="a, b, c"):
        report.of("d")
    assert Report(()).status == "green"


def test_a_teacher_that_was_never_trained_or_is_smaller():
    assert check(trained(TinyDetector()), TinyDetector((16, 24, 32))).of("teacher").status == "red"
    finding = check(TinyDetector((16, 24, 32)), trained(TinyDetector())).of("teacher")
    assert (finding.status, "swapped" in finding.found) == ("yellow", True)
