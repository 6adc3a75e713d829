import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from fgd_hooks import Distiller, FGDConfig, load_config, register_loss
from fgd_hooks.adapters import FittedConv
from fgd_hooks.errors import ConfigError, NonFiniteError, PairingError, TapError, TeacherError
from fgd_hooks.losses import FGDLoss
from fgd_hooks.losses.base import LOSSES, FeatureLoss, LossResult
from fgd_hooks.teacher import FrozenTeacher
from tests.helpers.tiny import TinyDetector, batch, trained

FIXED = {"balance": {"mode": "fixed"}}


@pytest.fixture
def models():
    torch.manual_seed(0)
    return trained(TinyDetector((8, 12, 16))), trained(TinyDetector((8, 16, 24)), seed=1)


def task_loss(student, images):
    return (student(images)["scores"] - 1).square().mean()


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_loss_equals_the_definition_on_the_captured_features(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    images, boxes = batch()
    seen = {}
    for name, model in (("s", student), ("t", teacher)):
        model.neck.register_forward_hook(lambda m, a, out, name=name: seen.update({name: [o.detach() for o in out]}))
    student(images)
    result = distiller(images, boxes)
    teacher.eval()(images)
    total = 0.0
    for number, (level, loss) in enumerate(distiller.losses.items()):
        assert isinstance(loss, FGDLoss)
        adapted = distiller.adapters[level](seen["s"][number])
        expected = loss(adapted, seen["t"][number], boxes, (64, 64))
        for part, value in expected.parts.items():
            torch.testing.assert_close(result.levels[level][part], value.detach())
            torch.testing.assert_close(result.raw[level][part], expected.raw[part].detach())
        total = total + expected.loss
    torch.testing.assert_close(result.loss, total)
    torch.testing.assert_close(sum(result.parts.values()), result.loss.detach())
    assert list(result.parts) == ["foreground", "background", "attention", "global"]


def test_gradient_reaches_student_and_adapters_and_not_the_teacher(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    images, boxes = batch()
    student(images)
    distiller(images, boxes).loss.backward()
    assert student.stem[0].weight.grad.abs().sum() > 0
    assert distiller.adapters["P4"].weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in student.head.parameters()), "the head lies behind the taps"


def test_the_students_gradient_is_the_tasks_plus_the_distillations(models):
    student, teacher = models
    images, boxes = batch()
    task_loss(student, images).backward()
    alone = gradients(student)
    student.zero_grad()
    for weight in (1.0, 3.0):
        with Distiller(student, teacher=teacher, config={**FIXED, "weight": weight}) as distiller:
            torch.manual_seed(5)
            for adapter in distiller.adapters.values():
                nn.init.dirac_(adapter.weight) if isinstance(adapter, nn.Conv2d) else None
            student(images)
            distiller(images, boxes).loss.backward()
            extra = gradients(student)
            student.zero_grad()
            loss = task_loss(student, images)
            (loss + distiller(images, boxes).loss).backward()
            for name, both, one, other in zip(
                dict(student.named_parameters()), gradients(student), alone, extra, strict=True
            ):
                other = torch.zeros_like(one) if other is None else other
                torch.testing.assert_close(both, one + other, rtol=1e-4, atol=1e-6, msg=name)
            student.zero_grad()


def test_the_weight_scales_the_gradient(models):
    student, teacher = models
    images, boxes = batch()
    found = []
    for weight in (1.0, 3.0):
        torch.manual_seed(7)
        with Distiller(student, teacher=teacher, config={**FIXED, "weight": weight}) as distiller:
            student(images)
            distiller(images, boxes).loss.backward()
        found.append(student.stem[0].weight.grad.clone())
        student.zero_grad()
    torch.testing.assert_close(found[1], 3 * found[0])


def test_balance_reaches_the_target_ratio_at_the_feature(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config={"balance": {"ratio": 0.5, "momentum": 0.0}})
    images, boxes = batch()
    for _ in range(3):  # two steps measure, the third distils
        loss = task_loss(student, images)
        features = list(distiller.taps._features.values())
        task = [g.norm() for g in torch.autograd.grad(loss, features, retain_graph=True)]
        result = distiller(images, boxes)
        if not result.measured:
            break
        (loss + result.loss).backward()
    ours = torch.autograd.grad(result.loss, features)
    # P5 feeds no other level; at P3 and P4 the distillation of the coarser levels arrives as well
    assert float(ours[2].norm() / task[2]) == pytest.approx(0.5, rel=1e-3)
    assert distiller.balance.ratios[2].item() == pytest.approx(0.5, rel=1e-3)


def test_an_image_on_which_the_teacher_runs_wild_does_not_outweigh_the_others():
    torch.manual_seed(0)
    student, teacher = (trained(TinyDetector((8, 12, 16)), seed=seed) for seed in (0, 1))
    teacher.neck.register_forward_hook(lambda module, args, out: [torch.cat([each[:1] * 30, each[1:]]) for each in out])
    images, boxes = batch(count=5)
    norms = {}
    for limit in (None, 2.0):
        with Distiller(student, teacher=teacher, config={"balance": {"image_limit": limit}}) as distiller:
            for _ in range(3):  # two steps measure, the third distils
                loss = task_loss(student, images)
                features = list(distiller.taps._features.values())
                result = distiller(images, boxes)
                (loss + result.loss).backward(retain_graph=True)
            assert not result.measured
        # at P5, which feeds no other level
        norms[limit] = torch.autograd.grad(result.loss, features[2])[0].flatten(1).norm(dim=1)
    assert norms[None].argmax() == norms[2.0].argmax() == 0
    assert norms[None][0] > 5 * norms[None].median()
    assert norms[2.0][0] == pytest.approx(2 * norms[2.0].median().item(), rel=1e-4)


def test_measured_task_norm_is_the_pure_task_gradient(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config={"balance": {"ratio": 1.0}})
    images, boxes = batch()
    seen = []
    distiller.balance.update = lambda task, distillation: seen.append((task, distillation))
    loss = task_loss(student, images)
    features = list(distiller.taps._features.values())
    expected = torch.stack([g.norm() for g in torch.autograd.grad(loss, features, retain_graph=True)])
    result = distiller(images, boxes)
    assert result.measured
    (loss + result.loss).backward()
    task_loss(student, images)
    distiller(images, boxes)
    torch.testing.assert_close(seen[0][0], expected)


def test_a_measuring_step_gives_the_student_the_task_alone(models):
    student, teacher = models
    images, boxes = batch()
    task_loss(student, images).backward()
    alone = gradients(student)
    student.zero_grad()
    distiller = Distiller(student, teacher=teacher)
    loss = task_loss(student, images)
    result = distiller(images, boxes)
    assert result.measured
    assert result.loss > 0
    (loss + result.loss).backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(student), alone, strict=True))
    assert distiller.adapters["P4"].weight.grad.abs().sum() > 0, "the adapters learn all the same"


def test_holds_what_is_trained_and_nothing_else(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher)
    theirs = {id(p) for model in models for p in model.parameters()}
    assert not theirs & {id(p) for p in distiller.parameters()}
    assert all(key.startswith(("adapters.", "losses.")) for key in distiller.state_dict())
    flags = {f"adapters.{level}.fitted" for level in ("P4", "P5")}
    assert {name for name, _ in distiller.named_parameters()} == set(distiller.state_dict()) - flags
    assert [type(m) for m in distiller.adapters.values()] == [nn.Identity, FittedConv, FittedConv]


def test_the_teacher_stays_frozen_and_in_eval_mode(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher)
    before = copy.deepcopy(teacher.state_dict())
    images, boxes = batch()
    teacher.train()
    distiller.train()
    student(images)
    distiller(images, boxes).loss.backward()
    assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_the_teacher_stops_before_its_head(models):
    student, teacher = models
    calls = []
    teacher.head.register_forward_hook(lambda *_: calls.append(1))
    distiller = Distiller(student, teacher=teacher)
    calls.clear()
    images, boxes = batch()
    student(images)
    distiller(images, boxes)
    assert calls == []


def test_detach_leaves_both_models_as_found(models):
    student, teacher = models
    teacher.train()
    teacher.neck.eval()
    teacher.stem[0].weight.requires_grad_(False)
    modes = [m.training for m in teacher.modules()]
    flags = [p.requires_grad for p in teacher.parameters()]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), Distiller(student, teacher=teacher):
            raise ZeroDivisionError
        assert [m.training for m in teacher.modules()] == modes
        assert [p.requires_grad for p in teacher.parameters()] == flags
        for model in models:
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("option", ["alpha", "beta", "gamma", "lambda_"])
def test_a_part_can_be_switched_off(models, option):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config={**FIXED, "loss": {"options": {option: 0.0}}})
    images, boxes = batch()
    student(images)
    result = distiller(images, boxes)
    result.loss.backward()
    parts = dict(zip(("alpha", "beta", "gamma", "lambda_"), result.parts.values(), strict=True))
    assert [name for name, value in parts.items() if value == 0] == [option]
    assert student.stem[0].weight.grad.abs().sum() > 0


def test_a_student_under_autocast(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    images, boxes = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = task_loss(student, images)
    result = distiller(images, boxes)
    (loss + result.loss).backward()
    assert torch.isfinite(student.stem[0].weight.grad).all()
    assert result.loss > 0


def test_a_list_of_images_needs_the_canvas(models):
    student, _ = models

    class TakesList(TinyDetector):
        def forward(self, images):
            return super().forward(torch.stack(list(images)))

    distiller = Distiller(student, teacher=trained(TakesList()), config=FIXED)
    images, boxes = batch()
    student(images)
    with pytest.raises(ValueError, match=r"canvas=\(h, w\)"):
        distiller(list(images), boxes)
    student(images)
    assert distiller(list(images), boxes, canvas=(64, 64)).loss > 0


def test_validation_does_not_count(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    images, boxes = batch()
    with torch.no_grad():
        student(images)
        assert distiller(images, boxes).loss == 0
    assert distiller.clock.step == 0


def test_levels_that_are_never_measured_are_said(models, caplog):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config={"balance": {"interval": 2}})
    images, boxes = batch()
    for _ in range(4):
        loss = task_loss(student, images)
        loss.backward(retain_graph=True)  # before the distiller was called: it cannot see this gradient
        distiller(images, boxes).loss.backward()
    assert "could not measure P3, P4, P5" in caplog.text


def test_a_schedule_without_any_epoch_is_said(models, caplog):
    distiller = Distiller(models[0], teacher=models[1], config={"schedule": {"start": "5 epochs", "stop": 0.7}})
    distiller.set_epoch(0, 6)
    assert "No epoch of 6 distils" in caplog.text


def test_the_teacher_is_freed_with_the_distiller(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher)
    images, boxes = batch()
    student(images)
    distiller(images, boxes)
    distiller.detach()
    alive = weakref.ref(distiller._teachers[0])
    del distiller
    gc.collect()
    assert alive() is None
    assert not any(isinstance(each, FrozenTeacher) for each in gc.get_referrers(teacher))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_student_is_clean(models, how):
    student, teacher = models
    Distiller(student, teacher=teacher)
    images, _ = batch()
    student(images)
    twin = copy.deepcopy(student) if how == "deepcopy" else pickle.loads(pickle.dumps(student))
    assert len(pickle.dumps(twin)) < len(pickle.dumps(student.state_dict())) * 3, "no feature and no teacher inside"
    assert list(twin.state_dict()) == list(student.state_dict())
    with torch.no_grad():
        twin(images)


def test_other_sizes_from_batch_to_batch(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    for size, count in ((64, 2), (96, 1), (128, 3)):
        images, boxes = batch(size=size, count=count)
        student(images)
        assert torch.isfinite(distiller(images, boxes).loss)


def test_images_without_boxes(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    images, _ = batch()
    student(images)
    result = distiller(images, [torch.zeros(0, 4)] * 2)
    assert result.parts["foreground"] == 0
    assert result.parts["background"] > 0
    assert torch.isfinite(result.loss)


def test_weight_zero_distils_nothing(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config={"weight": 0.0})
    images, boxes = batch()
    student(images)
    result = distiller(images, boxes)
    assert result.loss == 0
    assert not result.loss.requires_grad
    assert distiller.taps._features == {}


def test_the_schedule_is_applied(models):
    student, teacher = models
    distiller = Distiller(
        student, teacher=teacher, config={**FIXED, "schedule": {"stop": "2 epochs", "warmup_steps": 2}}
    )
    images, boxes = batch()
    losses = []
    for epoch in (0, 0, 2):
        distiller.set_epoch(epoch, 3)
        student(images)
        losses.append(distiller(images, boxes).loss.item())
    assert losses[0] == pytest.approx(losses[1] / 2, rel=1e-2)
    assert losses[2] == 0


def test_the_total_is_told_at_the_start(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config=FIXED, epochs=10)  # distils in the first 35 %
    images, boxes = batch()
    losses = []
    for epoch in (3, 4):
        distiller.set_epoch(epoch)
        student(images)
        losses.append(distiller(images, boxes).loss)
    assert losses[0] > 0
    assert losses[1] == 0
    assert not losses[1].requires_grad


def test_an_optimizer_with_its_groups_keeps_its_scheduler(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    optimizer = torch.optim.AdamW([{"params": student.parameters()}, *distiller.param_groups()], 1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=5)
    optimizer.step()
    scheduler.step()
    (group,) = distiller.param_groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in distiller.parameters()}
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"]
    plain = Distiller(student, teacher=copy.deepcopy(student), config={"loss": {"name": "pkd"}})
    assert plain.param_groups() == []


def test_an_epoch_without_a_total_keeps_the_one_that_is_known(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config=FIXED)  # distils in the first 35 %
    images, boxes = batch()
    distiller.set_epoch(0, 10)
    distiller.set_epoch(9)
    student(images)
    assert distiller(images, boxes).weight == 0


def test_every_other_step_rests(models):
    student, teacher = models
    calls = []
    teacher.stem.register_forward_hook(lambda *_: calls.append(1))
    distiller = Distiller(student, teacher=teacher, config={**FIXED, "interval": 2})
    calls.clear()
    images, boxes = batch()
    results = []
    for _ in range(4):
        student(images)
        results.append(distiller(images, boxes))
    assert [result.resting for result in results] == [False, True, False, True]
    assert [result.loss.item() > 0 for result in results] == [True, False, True, False]
    assert len(calls) == 2, "the teacher rests as well"


def test_levels_can_be_chosen(models):
    student, teacher = models
    assert Distiller(student, teacher=teacher, config={"levels": ["P4", "P3"]}).level_names == ["P3", "P4"]
    with pytest.raises(ConfigError, match=r"'P7'.*P3, P4, P5"):
        Distiller(student, teacher=teacher, config={"levels": ["P7"]})


def test_named_taps(models):
    student, teacher = models
    distiller = Distiller(
        student, teacher=teacher, config={"student_taps": ["neck.out.*"], "teacher_taps": ["neck"], **FIXED}
    )
    images, boxes = batch()
    student(images)
    assert distiller(images, boxes).loss > 0


def test_resize_only_when_asked():
    class Odd(TinyDetector):
        """Maps one cell larger than stride 8 would give: same stride when rounded, other size."""

        def forward(self, images):
            return super().forward(nn.functional.pad(images, (0, 16, 0, 16)))

    student, teacher = TinyDetector(), trained(Odd())
    with pytest.raises(ConfigError, match="resize=true"):
        Distiller(student, teacher=teacher, config={"levels": ["P3"]})
    distiller = Distiller(student, teacher=teacher, config={"levels": ["P3"], "resize": True, **FIXED})
    images, boxes = batch()
    student(images)
    assert distiller(images, boxes).loss > 0


def test_its_text_says_what_it_does(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config={"levels": ["P3", "P4"], "losses": ["fgd", "cwd"]})
    assert str(distiller).splitlines() == [
        "Distiller(",
        "  TinyDetector <- TinyDetector",
        "  fgd + cwd, weight 1, gradient ratio 1",
        "  P3-fgd (stride 8): student 8 -> teacher 8 channels, Identity",
        "  P3-cwd (stride 8): student 8 -> teacher 8 channels, Identity",
        "  P4-fgd (stride 16): student 12 -> teacher 16 channels, FittedConv",
        "  P4-cwd (stride 16): student 12 -> teacher 16 channels, FittedConv",
        "  1,224 parameters of adapters and loss are trained beside the student",
        ")",
    ]
    assert "(distiller): Distiller(\n    TinyDetector <- TinyDetector\n" in str(nn.ModuleDict({"distiller": distiller}))
    alone = Distiller(TinyDetector(), teacher=teacher)
    gc.collect()
    assert "(deleted) <- TinyDetector" in str(alone)


# mistakes


def test_student_and_teacher_are_one(models):
    with pytest.raises(TeacherError, match="same object"):
        Distiller(models[0], teacher=models[0])
    with pytest.raises(TeacherError, match="same object"):
        Distiller(nn.DataParallel(models[0]), teacher=models[0])


def test_shared_weights(models):
    student, teacher = models
    teacher.stem = student.stem
    with pytest.raises(TeacherError, match=r"share 4 parameter.*stem\.0\.weight"):
        Distiller(student, teacher=teacher)


def test_nan_in_the_teachers_weights(models):
    student, teacher = models
    with torch.no_grad():
        teacher.neck.out[1].weight[0, 0] = float("nan")
    with pytest.raises(TeacherError, match=r"neck\.out\.1\.weight holds 9 NaN"):
        Distiller(student, teacher=teacher)


def test_a_teacher_that_is_refused_leaves_the_others_as_they_were(models):
    student, teacher = models
    damaged = trained(TinyDetector((8, 16, 24)), seed=2)
    with torch.no_grad():
        damaged.neck.out[1].weight[0, 0] = float("nan")
    teacher.train()
    with pytest.raises(TeacherError, match="NaN"):
        Distiller(student, teacher=[teacher, damaged])
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*teacher.modules(), *student.modules()])


def test_copies_that_share_their_hooks(models):
    student, teacher = models
    replicated = nn.DataParallel(student)
    replicated.device_ids = [0, 1]  # as on a machine with two
    with pytest.raises(ValueError, match="DataParallel over 2 devices.*DistributedDataParallel"):
        Distiller(replicated, teacher=teacher)


def test_no_common_level():
    with pytest.raises(PairingError, match="stride 64"):
        Distiller(TinyDetector((8, 8), first=4), teacher=TinyDetector((8, 8), first=32))


def test_a_tap_with_a_typo(models):
    with pytest.raises(TapError, match=r"nek\.out\.0.*neck\.out\.0"):
        Distiller(models[0], teacher=models[1], config={"student_taps": ["nek.out.0"]})


def test_the_student_did_not_run(models):
    distiller = Distiller(models[0], teacher=models[1])
    with pytest.raises(TapError, match="did not fire"):
        distiller(*batch())


def test_a_student_feature_without_gradient(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    images, boxes = batch()
    student(images)
    with pytest.raises(TapError, match=r"takes no gradient.*schedule\.start"):
        distiller(images, boxes)


def test_boxes_in_the_wrong_form(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher)
    images, boxes = batch()
    for wrong, words in (
        ([b / 64 for b in boxes], "normalised"),
        ([b[:, [2, 3, 0, 1]] for b in boxes], "x2 < x1"),
        ([b * 100 for b in boxes], "outside"),
        (boxes[:1], "1 image"),
        ([b.clone().fill_(float("nan")) for b in boxes], "NaN"),
    ):
        student(images)
        with pytest.raises(ValueError, match=words):
            distiller(images, wrong)


def test_options_of_the_loss(models):
    with pytest.raises(ConfigError, match="alhpa"):
        Distiller(models[0], teacher=models[1], config={"loss": {"options": {"alhpa": 1.0}}})
    with pytest.raises(ConfigError, match="temperature"):
        Distiller(models[0], teacher=models[1], config={"loss": {"options": {"temperature": -1.0}}})
    with pytest.raises(ConfigError, match="anchor_based"):
        Distiller(models[0], teacher=models[1], config={"loss": {"preset": "anchor_bsed"}})
    with pytest.raises(ConfigError, match="imitation"):
        Distiller(models[0], teacher=models[1], config={"loss": {"name": "imitatoin"}})
    with pytest.raises(ConfigError, match="conv1x1"):
        Distiller(models[0], teacher=models[1], config={"adapter": "conv1"})


def test_presets_reach_the_loss(models):
    distiller = Distiller(models[0], teacher=models[1], config={"loss": {"preset": "fcos", "options": {"gamma": 0.25}}})
    loss = distiller.losses["P3"]
    assert (loss.temperature, loss.alpha, loss.beta, loss.gamma, loss.lambda_) == (0.8, 1.6e-3, 8e-4, 0.25, 8e-6)


def test_a_registered_loss_of_ones_own(models):
    @register_loss("test_mean")
    class Mean(FeatureLoss):
        part_names = ("mean",)

        def __init__(self, channels):
            super().__init__()

        def forward(self, student, teacher, boxes, canvas=None):
            value = (student - teacher).abs().mean()
            return LossResult({"mean": value}, {"mean": value}, value)

    try:
        student, teacher = models
        distiller = Distiller(student, teacher=teacher, config={"loss": {"name": "test_mean"}, **FIXED})
        images, boxes = batch()
        student(images)
        assert list(distiller(images, boxes).parts) == ["mean"]
    finally:
        del LOSSES._factories["test_mean"]


def test_imitation_is_one_word_away(models):
    student, teacher = models
    distiller = Distiller(
        student, teacher=teacher, config={"loss": {"name": "imitation", "options": {"mode": "split"}}}
    )
    images, boxes = batch()
    student(images)
    assert set(distiller(images, boxes).parts) == {"foreground", "background"}


# faults


def test_a_loss_that_is_not_finite_is_left_out(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config={**FIXED, "max_bad_steps": 3})
    images, boxes = batch()
    task_loss(student, images).backward()
    alone = gradients(student)
    poison = torch.full_like(images, float("nan"))
    for _ in range(2):
        student.zero_grad()
        distiller.zero_grad()
        loss = task_loss(student, images)
        result = distiller(poison, boxes)
        (loss + result.loss).backward()
        assert result.loss == 0
        assert all(torch.equal(a, b) for a, b in zip(gradients(student), alone, strict=True))
        assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p)) for p in distiller.parameters())
    assert distiller.skipped_steps == 2
    task_loss(student, images)
    assert distiller(images, boxes).loss > 0, "a good step resets the count"
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        for _ in range(3):
            student(images)
            distiller(poison, boxes)


def test_one_bad_step_of_two_before_a_backward_pass(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    images, boxes = batch()
    poison = torch.full_like(images, float("nan"))
    student(images)
    distiller(images, boxes).loss.backward()
    good = student.stem[0].weight.grad.clone()
    for order in ((images, poison), (poison, images)):
        student.zero_grad()
        losses = []
        for seen in order:
            student(images)
            losses.append(distiller(seen, boxes).loss)
        sum(losses).backward()
        torch.testing.assert_close(student.stem[0].weight.grad, good)


def test_parts_of_a_bad_step_are_zero(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    images, boxes = batch()
    student(images)
    result = distiller(torch.full_like(images, float("nan")), boxes)
    assert all(value == 0 for value in result.parts.values())


# state


def test_training_state_restores_everything(models):
    student, teacher = models
    images, boxes = batch()

    def train(distiller, steps):
        optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], 1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            (task_loss(student, images) + distiller(images, boxes).loss).backward()
            optimizer.step()

    first = Distiller(student, teacher=teacher)
    train(first, 4)
    state = pickle.loads(pickle.dumps(first.training_state()))
    at_that_time = copy.deepcopy(student.state_dict())
    train(first, 3)
    expected = copy.deepcopy(student.state_dict())
    first.detach()
    student.load_state_dict(at_that_time)
    second = Distiller(student, teacher=teacher)
    second.load_training_state(state)
    train(second, 3)
    assert all(torch.equal(value, expected[key]) for key, value in student.state_dict().items())
    assert second.clock.step == 7


def test_a_state_of_another_architecture_is_refused_and_changes_nothing(models):
    student, teacher = models
    distiller = Distiller(student, teacher=teacher)
    before = copy.deepcopy(distiller.training_state())
    other = Distiller(TinyDetector((8, 12, 20)), teacher=teacher).training_state()
    with pytest.raises(ValueError, match=r"levels is .*20 channels"):
        distiller.load_training_state(other)
    for damage in (
        lambda s: s["modules"].popitem(),
        lambda s: s.update(modules=None),
        lambda s: s.update(adapter="mlp"),
        lambda s: s.pop("step"),
        lambda s: s["balance"].pop("ratios"),
    ):
        state = copy.deepcopy(before)
        damage(state)
        with pytest.raises(ValueError):
            distiller.load_training_state(state)
    for key, tensor in distiller.state_dict().items():
        assert torch.equal(tensor, before["modules"][key])


def test_configuration_is_not_shared(models):
    config = FGDConfig()
    distiller = Distiller(models[0], teacher=models[1], config=config)
    config.balance.ratio = 99.0
    assert distiller.config.balance.ratio == load_config(None).balance.ratio


def test_the_loop_of_the_readme():
    """Three lines in a loop of one's own bring the student's features nearer to the teacher's than training alone."""

    def distance(distils):
        torch.manual_seed(0)
        student, teacher = trained(TinyDetector((8, 12, 16))), trained(TinyDetector((8, 16, 24)), seed=1)
        optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
        distiller = Distiller(student, teacher=teacher)
        optimizer.add_param_group({"params": distiller.parameters()})
        for step in range(40):
            images, boxes = batch(step % 4)
            loss = task_loss(student, images)
            distilled = distiller(images, boxes)
            (loss + distilled.loss * distils).backward()
            optimizer.step()
            optimizer.zero_grad()
        return sum(float(level["foreground"]) for level in distilled.raw.values())

    assert distance(1.0) < 0.8 * distance(0.0)


def test_a_second_distiller_of_a_pair_replaces_the_first(models, caplog):
    """A notebook's cell that runs again; a Distiller of another teacher stays."""
    student, teacher = models
    images, boxes = batch()
    other = Distiller(student, teacher=trained(TinyDetector((8, 12, 20)), seed=3), config=FIXED)
    first = Distiller(student, teacher=teacher, config=FIXED)
    hooks = sum(len(module._forward_hooks) for module in student.modules())
    assert "replaces" not in caplog.text
    second = Distiller(student, teacher=teacher, config=FIXED)
    assert caplog.text.count("the new one replaces it") == 1
    assert sum(len(module._forward_hooks) for module in student.modules()) == hooks
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    student(images)
    assert second(images, boxes).loss > 0
    assert other(images, boxes).loss > 0
    with pytest.raises(TapError):
        first(images, boxes)
    first.detach()
    student(images)
    assert second(images, boxes).loss > 0, "the first one's end leaves the second alone"
    second.detach()
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    Distiller(student, teacher=teacher).detach()
    assert caplog.text.count("the new one replaces it") == 1
