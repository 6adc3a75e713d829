"""One training of the quickstart, in a process of its own: ``python -m fgd_hooks.study.quickstart_train JOB.json``.

A process of its own, because Ultralytics and torch keep state per process (thread counts, random numbers, loggers) and
because two trainings side by side are the way to keep two cores busy. The parent reads ``progress.json`` while it runs
and ``summary.json`` when it is done; everything that Ultralytics prints goes to the parent's log file.
"""

from __future__ import annotations

import sys
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fgd_hooks.study.processes import read_json, write_json

# Settings in which nothing depends on the machine: no worker processes, no mixed precision, no mosaic that would need
# a different last phase. nbs = batch makes every batch one optimizer step.
FIXED: dict[str, Any] = {
    "optimizer": "AdamW",
    "lrf": 0.01,
    "warmup_epochs": 1,
    "weight_decay": 5e-4,
    "amp": False,
    "mosaic": 0.0,
    "close_mosaic": 0,
    "erasing": 0.0,
    "auto_augment": None,
    "flipud": 0.5,
    "translate": 0.1,
    "scale": 0.25,
    "hsv_h": 0.01,
    "hsv_s": 0.3,
    "hsv_v": 0.2,
    "workers": 0,
    "cache": "ram",
    "pretrained": False,
    "deterministic": True,
    "patience": 0,
    "plots": False,
    "verbose": False,
}


_INTEGRATIONS = ("clearml", "comet", "dvc", "mlflow", "raytune", "wandb", "tensorboard")


@dataclass(frozen=True)
class Job:
    """What one process trains.

    Attributes:
        name: of the run, ``teacher``, ``alone-s0`` or ``fgd-s0``; also the name of its folder.
        folder: folder of the run; ``weights/last.pt`` lies in it afterwards.
        model: model yaml.
        data: data yaml.
        truth: COCO json of the validation images.
        epochs: number of epochs.
        seed: of initial weights, order of the images and augmentation.
        imgsz: input size in pixels.
        batch: images per optimizer step.
        lr: learning rate after the warm-up; falls to a hundredth.
        threads: CPU threads.
        device: as in Ultralytics.
        val_every: validate every so many epochs, and after the last.
        teacher: weights of the teacher; None trains without one.
        fgd: settings of the distillation that differ from the library's defaults.
    """

    name: str
    folder: str
    model: str
    data: str
    truth: str
    epochs: int
    seed: int
    imgsz: int
    batch: int
    lr: float
    threads: int
    device: str
    val_every: int
    teacher: str | None = None
    fgd: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What to call the run on the screen: ``teacher``, ``alone, seed 0``."""
        kind = self.name.split("-")[0]
        return kind if kind == "teacher" else f"{kind}, seed {self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


class BatchChecksum:
    """A checksum of all training batches, pixels and boxes: equal for two runs that saw the same data.

    Attributes:
        value: so far.
    """

    def __init__(self) -> None:
        self.value = 0

    def attach(self, trainer: Any) -> None:
        """Look at each batch on its way into the model; an Ultralytics callback for ``on_pretrain_routine_end``."""
        original = trainer.preprocess_batch

        def preprocess(batch: dict[str, Any]) -> Any:
            for key in ("img", "cls", "bboxes"):
                self.value = zlib.crc32(batch[key].contiguous().numpy().tobytes(), self.value)
            return original(batch)

        trainer.preprocess_batch = preprocess


def silence_loggers(settings: Any) -> None:
    """Switch off the user's other loggers (Weights & Biases and so on) in this process, and there only.

    Args:
        settings: Ultralytics' ``SETTINGS``.
    """
    dict.update(settings, dict.fromkeys(_INTEGRATIONS, False))  # past the method that would save it


class Watch:
    """Ultralytics callbacks that report progress, choose the epochs to validate, and note what the model was fed.

    Args:
        job: the job that runs.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.curve: list[tuple[int, float]] = []
        self.batches = BatchChecksum()
        self._progress = Path(job.folder) / "progress.json"
        self._written = 0.0
        self._step = 0
        self._writer: Any = None

    def attach(self, model: Any) -> None:
        """Add the callbacks to a YOLO object."""
        model.add_callback("on_pretrain_routine_end", self.start)
        model.add_callback("on_train_epoch_start", self.epoch_start)
        model.add_callback("on_train_batch_end", self.batch_end)
        model.add_callback("on_fit_epoch_end", self.epoch_end)
        model.add_callback("teardown", self.close)

    def start(self, trainer: Any) -> None:
        """Set the threads, look at each batch on its way into the model, and open TensorBoard.

        With a teacher the distillation writes the same TensorBoard scalars, so nothing is opened here.
        """
        import torch

        torch.set_num_threads(self.job.threads)  # not before: Ultralytics sets them too, when it chooses the device
        self.batches.attach(trainer)
        if self.job.teacher is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.job.folder)  # type: ignore[no-untyped-call]

    def epoch_start(self, trainer: Any) -> None:
        """Ultralytics asks ``args.val`` anew at the end of every epoch."""
        trainer.args.val = (trainer.epoch + 1) % self.job.val_every == 0
        self._step = 0

    def batch_end(self, trainer: Any) -> None:
        """Tell the parent, at most twice a second."""
        self._step += 1
        if time.monotonic() - self._written > 0.5:
            self.report(trainer.epoch + self._step / len(trainer.train_loader))

    def epoch_end(self, trainer: Any) -> None:
        """Note the validation's figure and write the epoch's scalars."""
        if trainer.epoch >= trainer.epochs:
            return  # Ultralytics sends one more event after the last epoch, for the best weights
        if trainer.args.val or trainer.epoch + 1 == trainer.epochs:
            self.curve.append((trainer.epoch + 1, float(trainer.metrics.get("metrics/mAP50-95(B)", 0.0))))
        if self._writer is not None:
            scalars = {**trainer.label_loss_items(trainer.tloss, prefix="train"), **trainer.metrics, **trainer.lr}
            for name, value in scalars.items():
                self._writer.add_scalar(name, float(value), trainer.epoch + 1)
        self.report(trainer.epoch + 1.0)

    def close(self, trainer: Any) -> None:
        """Finish the TensorBoard file; called after a failure too."""
        if self._writer is not None:
            self._writer.close()

    def report(self, epochs: float) -> None:
        """Write how many epochs are done."""
        write_json(self._progress, {"epochs": epochs})
        self._written = time.monotonic()


def train(job: Job) -> dict[str, Any]:
    """Train one model, measure it with pycocotools and write ``summary.json``; returns the summary."""
    from ultralytics import YOLO
    from ultralytics.utils import SETTINGS
    from ultralytics.utils.torch_utils import get_flops

    from fgd_hooks.evaluation.evaluate import evaluate

    silence_loggers(SETTINGS)
    model = YOLO(job.model, task="detect")
    watch = Watch(job)
    watch.attach(model)
    callback = None
    if job.teacher is not None:
        from fgd_hooks.integrations.ultralytics.callback import FGDCallback

        callback = FGDCallback(job.teacher, **job.fgd).attach(model)
    folder = Path(job.folder)
    wall, cpu = time.perf_counter(), time.process_time()
    model.train(
        data=job.data,
        epochs=job.epochs,
        seed=job.seed,
        imgsz=job.imgsz,
        batch=job.batch,
        nbs=job.batch,
        lr0=job.lr,
        device=job.device,
        project=str(folder.parent),
        name=folder.name,
        exist_ok=True,
        **FIXED,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    last = YOLO(str(folder / "weights" / "last.pt"))
    metrics = evaluate(last, job.truth, imgsz=job.imgsz, batch=job.batch, device=job.device)
    summary = {
        "job": job.to_dict(),
        "metrics": metrics.to_dict(),
        "parameters": sum(p.numel() for p in last.model.parameters()),
        "gflops": float(get_flops(last.model, job.imgsz)),
        "seconds": wall,
        "cpu_seconds": cpu,
        "curve": watch.curve,
        "batches": watch.batches.value,
        "start": callback.inherited if callback else "",
    }
    write_json(folder / "summary.json", summary)
    return summary


def main() -> None:
    """Run the job file named on the command line."""
    train(Job(**read_json(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
