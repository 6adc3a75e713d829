"""What a card has to show: right, no waiting, few launches, fast, small; see run.sh.

Each section stands alone: one that fails or finds no time left is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import save, show
from benchmarks.models import save_yolo, yolo, yolo_batch
from benchmarks.step import CallbackStep, adamw
from fgd_hooks import Distiller, fit_channels, inherit_channels
from fgd_hooks.config import load_config
from fgd_hooks.losses.fgd import FGDLoss
from fgd_hooks.masks import PackedBoxes

LIMIT = 480.0  # seconds in all
Row = dict[str, Any]


class Proof:
    """The device, the size of everything, and the clock."""

    def __init__(self, smoke: bool) -> None:
        self.smoke = smoke
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.end = time.monotonic() + LIMIT

    def wait(self) -> None:
        """Until the device has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ms(self, run: Callable[[], object], repeats: int = 10) -> float:
        """Median milliseconds of a call, to the end of its work on the device."""
        times = []
        for number in range(repeats + 2):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            if number > 1:
                times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def peak_mib(self, run: Callable[[], object]) -> float | None:
        """The most memory that a call holds above what was there; None on a CPU."""
        if self.device.type == "cpu":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def boxes(images: int, size: float, device: torch.device) -> PackedBoxes:
    """Ten boxes an image."""
    corners = torch.rand(images * 10, 2, 2, generator=torch.Generator().manual_seed(0)).sort(1).values * size
    owner = torch.arange(images).repeat_interleave(10)
    return PackedBoxes.from_flat(corners.flatten(1), owner, images, (size, size)).to(device)


def correct(proof: Proof) -> Iterator[Row]:
    """Loss and gradient on the device against plain operations in float64 on the CPU."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 32, 20, 28), torch.randn(3, 32, 20, 28)
    packed = boxes(3, 160.0, torch.device("cpu"))
    plain = FGDLoss(32, fused=False)
    nn.init.normal_(plain.student_context.expand.weight, std=0.1)
    exact = student.double().requires_grad_()
    wanted = plain.double()(exact, teacher.double(), packed).loss
    (gradient,) = torch.autograd.grad(wanted, exact)
    for way, options in (("plain", {"fused": False}), ("fused", {}), ("compiled", {"compiled": True})):
        for memory in (torch.contiguous_format, torch.channels_last):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                if proof.smoke and way == "compiled":
                    continue  # minutes on a CPU
                loss = FGDLoss(32, **options).to(proof.device)  # type: ignore[arg-type]
                loss.load_state_dict(plain.state_dict())
                mine = student.to(proof.device, dtype).contiguous(memory_format=memory).requires_grad_()
                other = teacher.to(proof.device, dtype).contiguous(memory_format=memory)
                found = loss(mine, other, packed.to(proof.device)).loss
                (back,) = torch.autograd.grad(found, mine)
                error = (back.double().cpu() - gradient).norm() / gradient.norm()
                off = abs(found.item() / wanted.item() - 1)
                good = max(off, float(error)) < (2e-5 if dtype is torch.float32 else 3e-2)
                row = {"what": f"{way}, {str(memory)[6:]}, {str(dtype)[6:]}", "loss_off": off}
                yield row | {"gradient_off": float(error), "good": good}


def no_waiting(proof: Proof) -> Iterator[Row]:
    """30 steps in which waiting for the device is an error."""
    student, teacher = (nn.Sequential(nn.Conv2d(3, c, 3, 8, 1), nn.Conv2d(c, c, 3, 2, 1)) for c in (8, 16))
    student, teacher = student.to(proof.device), teacher.to(proof.device)
    taps = ["0", "1"]
    config = {"student_taps": taps, "teacher_taps": taps, "schedule": {"stop": None}, "max_bad_steps": 1000}
    distiller = Distiller(student, teacher=teacher, config=config)
    optimizer = torch.optim.AdamW([{"params": student.parameters()}, *distiller.param_groups()])
    images, packed = torch.rand(4, 3, 128, 128, device=proof.device), boxes(4, 128.0, proof.device)
    try:
        for number in range(34):
            if proof.device.type == "cuda" and number == 4:  # the first look at the boxes
                torch.cuda.set_sync_debug_mode("error")
            (student(images).square().mean() + distiller(images, packed).loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        if proof.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    yield {"what": "30 steps without a wait", "good": True}


def loss_alone(proof: Proof) -> Iterator[Row]:
    """The loss of one level, forward and backward, against the time that a copy of the least bytes takes."""
    sizes = [(8, 16, 2)] if proof.smoke else [(s, c, n) for s in (80, 40, 20) for c in (64, 256, 512) for n in (16, 64)]
    for side, channels, images in sizes:
        for memory in (torch.contiguous_format, torch.channels_last):
            shape = (images, channels, side, side)
            mine = torch.randn(shape, device=proof.device).contiguous(memory_format=memory).requires_grad_()
            other = torch.randn(shape, device=proof.device).contiguous(memory_format=memory)
            loss, target = FGDLoss(channels).to(proof.device), torch.empty_like(other)
            packed = boxes(images, 8.0 * side, proof.device)

            def step(loss: Any = loss, mine: Tensor = mine, other: Tensor = other, packed: Any = packed) -> None:
                torch.autograd.grad(loss(mine, other, packed.for_maps([mine.shape[2:]])).loss, mine)

            took, copy = proof.ms(step), proof.ms(functools.partial(target.copy_, other))
            row = {"what": f"{'x'.join(map(str, shape))}, {str(memory)[6:]}", "ms": took}
            yield row | {"of_copy_bandwidth": 2.5 * copy / took, "peak_features": _features(proof.peak_mib(step), mine)}


def _features(mib: float | None, feature: Tensor) -> float | None:
    return None if mib is None else round(mib * 2**20 / (feature.numel() * feature.element_size()), 2)


class Host:
    """One arm of a training step as Ultralytics runs it: autocast, scaler, clipping, channels last."""

    def __init__(self, proof: Proof, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model = model.to(proof.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.amp, self.kind, self.batch = proof.device.type == "cuda", proof.device.type, batch
        self.scaler = torch.amp.GradScaler(self.kind, enabled=self.amp)
        self.optimizer = adamw(model)

    def __call__(self) -> None:
        """One step."""
        with torch.autocast(self.kind, enabled=self.amp):
            loss = self.model(self.batch)[0].sum()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def steps(proof: Proof) -> Iterator[Row]:
    """Whole steps: the student alone, the built-in distillation, ours; milliseconds, launches and memory of each."""
    from ultralytics.nn.distill_model import DistillationModel

    from fgd_hooks.integrations.ultralytics.teacher import load_teacher

    pairs = [("yolo26n", "yolo26s")] if proof.smoke else [("yolo26n", "yolo26s"), ("yolo11m", "yolo11l")]
    for student, teacher in pairs:
        for size, count in [(64, 2)] if proof.smoke else [(640, 16), (640, 64)]:
            with tempfile.TemporaryDirectory() as name:
                args, folder = {"imgsz": size}, Path(name)
                batch = {key: value.to(proof.device) for key, value in yolo_batch(size, count).items()}
                file = save_yolo(yolo(teacher, args=args), folder / f"{teacher}.pt")
                config = load_config(None, ["log_interval=0", "schedule.stop=null"])
                hosts = {"alone": Host(proof, yolo(student, args=args), batch)}
                built_in = DistillationModel(load_teacher(file).to(proof.device), yolo(student, args=args)).train()
                hosts["built-in"] = Host(proof, built_in, batch)
                hosts["ours"] = Host(proof, yolo(student, args=args), batch)
                ours = hosts["ours"]
                callback = CallbackStep(ours.model, file, config, batch, folder, proof.device, ours)
                times: dict[str, list[float]] = {arm: [] for arm in hosts}
                for number in range(3 if proof.smoke else 24):
                    for arm, host in hosts.items():
                        took = proof.ms(host, 1) if number else proof.ms(host, 3)
                        times[arm].append(took)
                base = statistics.median(times["built-in"])
                for arm, host in hosts.items():
                    took = statistics.median(times[arm])
                    row = {"what": f"{student} <- {teacher}, {size} px, batch {count}: {arm}", "ms": took}
                    yield row | {
                        "of_builtin": took / base,
                        "launches": _launches(host),
                        "peak_mib": proof.peak_mib(host),
                    }
                callback.run.remove()


def _launches(run: Callable[[], object]) -> int:
    """Kernels of a call; on a CPU the operators that do something."""
    activities = torch.profiler.ProfilerActivity
    on_gpu = torch.cuda.is_available()
    with torch.profiler.profile(activities=[activities.CUDA if on_gpu else activities.CPU]) as profile:
        run()
    return sum(1 for event in profile.events() if on_gpu or event.name.startswith("aten::"))


def fitting(proof: Proof) -> Iterator[Row]:
    """Seconds and memory that the start of a student takes."""
    pairs = [("yolo26n", "yolo26s", 64, 2)] if proof.smoke else [("yolo26n", "yolo26s", 640, 16)]
    for one, other, size, count in pairs:
        student, teacher = (yolo(name).to(proof.device) for name in (one, other))
        inherit_channels(student, teacher=teacher)
        images = yolo_batch(size, count)["img"].to(proof.device)
        start = time.perf_counter()
        peak = proof.peak_mib(lambda: fit_channels(student, teacher=teacher, images=images))  # noqa: B023
        if peak is None:
            fit_channels(student, teacher=teacher, images=images)
        proof.wait()
        yield {
            "what": f"fit {one} <- {other}, {count} images",
            "seconds": time.perf_counter() - start,
            "peak_mib": peak,
        }


def one_rank(proof: Proof) -> Iterator[Row]:
    """20 steps of the Distiller in DDP, of one process."""
    from torch.nn.parallel import DistributedDataParallel

    backend = "nccl" if proof.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            student, teacher = (nn.Sequential(nn.Conv2d(3, c, 3, 8, 1)).to(proof.device) for c in (8, 16))
            config = {"student_taps": ["0"], "teacher_taps": ["0"], "schedule": {"stop": 0.5}}
            distiller = Distiller(student, teacher=teacher, config=config)
            parallel = DistributedDataParallel(distiller)
            images, packed = torch.rand(4, 3, 128, 128, device=proof.device), boxes(4, 128.0, proof.device)
            for number in range(20):
                distiller.set_epoch(number // 10, 3)
                (student(images).square().mean() + parallel(images, packed).loss).backward()
            yield {"what": f"20 steps in DDP over {backend}", "good": bool(distiller.balance.scales.isfinite().all())}
        finally:
            torch.distributed.destroy_process_group()


SECTIONS: dict[str, Callable[[Proof], Iterator[Row]]] = {
    "correct": correct,
    "no waiting": no_waiting,
    "loss alone": loss_alone,
    "one rank": one_rank,
    "steps": steps,
    "fit": fitting,
}


def main(arguments: list[str] | None = None) -> int:
    """Run all sections, print a table and write results/benchmarks/gpu.json; the number of sections that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small; on a CPU if there is no card; nothing is written")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    options = parser.parse_args(arguments)
    proof = Proof(options.smoke)
    if proof.device.type == "cpu" and not options.smoke:
        print("No CUDA device is at hand; --smoke runs on a CPU.", file=sys.stderr)
        return 1
    rows: list[Row] = []
    for name in options.only:
        try:
            for row in SECTIONS[name](proof):
                rows.append({"section": name, **row})
                if time.monotonic() > proof.end:
                    raise TimeoutError("no time left")
        except Exception as error:  # the next section may still tell something
            rows.append({"section": name, "what": f"{type(error).__name__}: {error}"[:300], "good": False})
        with contextlib.suppress(AttributeError):
            torch.cuda.empty_cache()
    rows = [{key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    show(
        "On a card" if proof.device.type == "cuda" else "On a CPU",
        rows,
        list(dict.fromkeys(k for r in rows for k in r)),
    )
    if not options.smoke:
        print(save("gpu", rows))
    return sum(row.get("good") is False for row in rows)


if __name__ == "__main__":
    sys.exit(main())
