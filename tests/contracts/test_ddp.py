"""Two processes on the CPU: a loop of one's own, the Distiller in a DDP of its own, as docs/several-gpus.md says."""

import pytest
import torch
import torch.multiprocessing as mp

from fgd_hooks.utils.distributed import all_reduce, broadcast, on_any_process

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def work(rank, folder):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from fgd_hooks import Distiller
    from tests.contracts.test_steady_step import Calls
    from tests.helpers.tiny import TinyDetector, batch, trained

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)  # adapters differ at first; DDP makes them equal
    student = DistributedDataParallel(trained(TinyDetector()))
    config = {"balance": {"interval": 2}, "schedule": {"stop": "2 epochs"}}
    distiller = Distiller(student, teacher=trained(TinyDetector((8, 16, 24)), seed=1), config=config)
    parallel = DistributedDataParallel(distiller)
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], 1e-3)
    losses, counts = [], []
    for step in range(9):
        distiller.set_epoch(step // 3, 3)
        if step == 6:  # stopped: what a parameter holds can no longer matter
            next(distiller.parameters()).data.fill_(torch.inf)
        images, boxes = batch(10 * rank + step)
        task_loss = (student(images)["scores"] - 1).square().mean()
        with Calls() as calls:
            distilled = parallel(images, boxes)
        (task_loss + distilled.loss).backward()
        if step > 5:
            counts.append(calls.launches)
            assert all(parameter.grad is None for parameter in distiller.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(distilled.loss.item())
        if step == 2:  # the third step measures: one rank saves alone, and the other does not wait for it
            distiller.balance.close()
            if rank == 0:
                distiller.training_state()
    state = {"modules": distiller.state_dict(), "scales": distiller.balance.scales, "losses": losses, "counts": counts}
    torch.save({**state, "student": student.module.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_adapters_scales_and_student_stay_equal_on_all_ranks(tmp_path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for key, tensor in one["modules"].items():
        assert torch.equal(tensor, other["modules"][key]), key
    assert torch.equal(one["scales"], other["scales"])
    for name, parameter in one["student"].items():
        if "running" not in name and "batches" not in name:
            assert torch.equal(parameter, other["student"][name]), name
    for losses in (one["losses"], other["losses"]):
        assert all(loss > 0 for loss in losses[:6])
        assert losses[6:] == [0, 0, 0], "the schedule has stopped; the ranks go on together"
    assert max(one["counts"] + other["counts"]) <= 5, "two buffers that DDP sends by default among them"
    assert one["losses"] != other["losses"], "each rank saw images of its own"


def alone(rank, folder):
    """A process group is at work, and one of its processes distils, by itself."""
    import torch.distributed as dist

    from fgd_hooks import Distiller
    from tests.helpers.tiny import batch

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if rank == 0:
        student, teacher = two_models()
        distiller = Distiller(student, teacher=teacher, process_group=None)
        for step in range(3):
            images, boxes = batch(step)
            ((student(images)["scores"] - 1).square().mean() + distiller(images, boxes).loss).backward()
        distiller.balance.close()
        torch.save({"measured": distiller.balance._measured, **distiller.state_dict()}, f"{folder}/0.pt")
        assert distiller.training_state()["balance"]
    else:
        mine = dist.new_group([1], use_local_synchronization=True)
        flag = torch.tensor([2.0])
        all_reduce(flag, mine)
        broadcast(flag, mine)
        assert flag == 2
        assert on_any_process(True, flag.device, mine)
    dist.destroy_process_group()


def test_one_process_of_several_distils_alone(tmp_path):
    mp.spawn(alone, args=(str(tmp_path),), nprocs=2)
    state = torch.load(tmp_path / "0.pt", weights_only=True)
    assert bool(state["adapters.P4.fitted"])
    assert state["measured"].tolist() == [2.0] * 3


FIXED = {"balance": {"mode": "fixed"}, "schedule": {"stop": None}}


def gradients_of(student, distiller):
    named = [*student.named_parameters(), *distiller.named_parameters()]
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def two_models():
    from tests.helpers.tiny import TinyDetector, trained

    torch.manual_seed(0)
    # the student in eval mode: its batch normalisations then see each image alone, whatever the batch
    return trained(TinyDetector()).eval(), trained(TinyDetector((8, 16, 24)), seed=1)


def accumulate(rank, folder):
    """Two backward passes, the first without exchange, then the gradients and the bytes that were exchanged."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    from fgd_hooks import Distiller
    from tests.helpers.tiny import batch

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    student, teacher = two_models()
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    ddp_student, ddp_distiller = DistributedDataParallel(student), DistributedDataParallel(distiller)
    exchanged = []

    def counting(group, bucket):
        exchanged.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    ddp_distiller.register_comm_hook(dist.group.WORLD, counting)

    def backward(step):
        images, boxes = batch(10 * rank + step)
        task_loss = (ddp_student(images)["scores"] - 1).square().mean()
        (task_loss + ddp_distiller(images, boxes).loss).backward()

    with ddp_student.no_sync(), ddp_distiller.no_sync():
        backward(0)
    silent = len(exchanged)
    backward(1)
    torch.save(
        {"gradients": gradients_of(student, distiller), "exchanged": exchanged, "silent": silent}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_those_of_one_process_with_the_whole_batch(tmp_path):
    from fgd_hooks import Distiller
    from tests.helpers.tiny import batch

    mp.spawn(accumulate, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    student, teacher = two_models()
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    for step in (0, 1):
        (images, boxes), (more, further) = batch(step), batch(10 + step)
        images, boxes = torch.cat([images, more]), [*boxes, *further]
        ((student(images)["scores"] - 1).square().mean() + distiller(images, boxes).loss).backward()
    wanted = gradients_of(student, distiller)
    assert wanted.keys() == one["gradients"].keys() == other["gradients"].keys()
    assert any(name.startswith("adapters") and bool(gradient.any()) for name, gradient in wanted.items())
    for name, gradient in wanted.items():
        assert torch.equal(one["gradients"][name], other["gradients"][name]), name
        close = {"rtol": 1e-4, "atol": 1e-5 * float(gradient.abs().max())}
        torch.testing.assert_close(one["gradients"][name], gradient, **close, msg=lambda m, name=name: f"{name}: {m}")
    assert one["silent"] == 0
    # what a step exchanges for the distillation: each of its parameters once, in float32
    assert sum(one["exchanged"]) == 4 * sum(parameter.numel() for parameter in distiller.parameters())


def test_synchronised_batch_normalisation_is_converted_before():
    """In one process, where it is the plain one; several need GPUs."""
    from torch import nn

    from fgd_hooks import Distiller
    from fgd_hooks.errors import TapError
    from tests.helpers.tiny import batch

    images, boxes = batch()
    student, teacher = two_models()
    student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    with Distiller(student, teacher=teacher, config=FIXED) as distiller:
        student(images)
        assert distiller(images, boxes).loss > 0
    student, teacher = two_models()
    taps = ["stem.1", "stages.0.1", "stages.1.1"]  # the batch normalisations themselves
    with Distiller(student, teacher=teacher, config={**FIXED, "student_taps": taps}) as distiller:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
        student(images)
        with pytest.raises(TapError, match="did not fire"):
            distiller(images, boxes)


def fit(rank, folder):
    """Fit with a failure of the second process, in the models and in the images, and once without any."""
    import torch.distributed as dist

    from fgd_hooks.initialization.initialize import initialize
    from tests.helpers.tiny import trained
    from tests.initialization.test_reconstruction import some_images
    from tests.initialization.test_weight_selection import net

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for failing in ("teacher", "images", "nothing"):
        teacher, student = trained(net(4, seed=1)).eval(), net(2)
        if failing == "teacher" and rank == 1:
            teacher.mix[0].register_forward_pre_hook(lambda module, args: 1 / 0)

        def images(broken=failing == "images" and rank == 1):
            return 1 / 0 if broken else some_images(seed=rank)

        result = initialize(student, teacher=teacher, what="auto", images=images)
        found[failing] = {"words": result.summary, "weights": dict(student.state_dict())}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_where_one_process_cannot_fit_none_does_and_none_waits(tmp_path):
    from fgd_hooks import inherit_channels
    from tests.helpers.tiny import trained
    from tests.initialization.test_weight_selection import net

    mp.spawn(fit, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    copied = net(2)
    inherit_channels(copied, teacher=trained(net(4, seed=1)).eval())
    for failing in ("teacher", "images"):
        assert "another process" in one[failing]["words"]
        assert "division by zero" in other[failing]["words"]
        for name, value in copied.state_dict().items():
            assert torch.equal(one[failing]["weights"][name], value), (failing, name)
            assert torch.equal(other[failing]["weights"][name], value), (failing, name)
    assert not torch.equal(one["nothing"]["weights"]["mix.0.weight"], copied.state_dict()["mix.0.weight"])
    for name, value in one["nothing"]["weights"].items():
        assert torch.equal(other["nothing"]["weights"][name], value), name
