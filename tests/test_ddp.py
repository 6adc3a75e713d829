"""Two processes on the CPU: a loop of one's own, the Distiller in a DDP of its own."""

import pytest
import torch
import torch.multiprocessing as mp

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def work(rank, folder):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from fgd_hooks import Distiller
    from tests.tiny import TinyDetector, batch, trained

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)  # adapters differ at first; DDP makes them equal
    student = DistributedDataParallel(trained(TinyDetector()))
    config = {"balance": {"interval": 2}, "schedule": {"stop_epoch": 2}}
    distiller = Distiller(student, trained(TinyDetector((8, 16, 24)), seed=1), config)
    parallel = DistributedDataParallel(distiller)
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], 1e-3)
    losses = []
    for step in range(9):
        distiller.set_epoch(step // 3, 3)
        images, boxes = batch(10 * rank + step)
        task_loss = (student(images)["scores"] - 1).square().mean()
        distilled = parallel(images, boxes)
        (task_loss + distilled.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(distilled.loss.item())
        if step == 2:  # the third step measures: one rank saves alone, and the other does not wait for it
            distiller.balance.close()
            if rank == 0:
                distiller.training_state()
    state = {"modules": distiller.state_dict(), "scales": distiller.balance.scales, "losses": losses}
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
    assert one["losses"] != other["losses"], "each rank saw images of its own"
