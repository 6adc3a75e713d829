"""One run of a study, in a process of its own.

A process of its own, because Ultralytics and torch keep state per process (thread counts, random numbers, loggers) and
because trainings side by side are the way to keep several cores busy. submitit calls :func:`work` in it. By hand, with
a job file that lies in a run's folder: ``python -m fgd_hooks.study.worker JOB.json``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgd_hooks.errors import StudyError
from fgd_hooks.study.lease import Lease
from fgd_hooks.study.plan import RESULT
from fgd_hooks.study.spec import load_plugins
from fgd_hooks.utils.files import read_json, write_json

PROGRESS = "progress.json"
CPUINFO = Path("/proc/cpuinfo")
_INTEGRATIONS = ("clearml", "comet", "dvc", "mlflow", "raytune", "wandb", "tensorboard")
_REPORT_SECONDS = 0.5


def work(file: str, token: str) -> None:
    """Do the run of a job file under the lease that its study took; without that lease this process ends."""
    folder = Path(file).parent
    lease = Lease.read(folder)
    if lease is None or lease.token != token:
        raise StudyError(f"{folder} is another study's by now; this job is over.")
    lease.end_without()
    job = read_json(Path(file))
    if lease.cluster == "local":  # submitit hides all GPUs from a job that was promised none
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ.update(job["machine"]["variables"])
    os.chdir(folder)
    load_plugins(job["machine"]["plugins"])
    train(job, folder)


def train(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train (unless the weights are given), measure the last weights on val and write ``result.json``."""
    from importlib.metadata import version

    import torch
    from ultralytics import YOLO
    from ultralytics import __version__ as ultralytics_version
    from ultralytics.utils import SETTINGS as HOST
    from ultralytics.utils.torch_utils import get_flops

    # the user's other loggers are switched off in this process alone: past the method that would save it
    dict.update(HOST, dict.fromkeys(_INTEGRATIONS, False))
    machine, settings = job["machine"], job["settings"]
    watch = Watch(job, folder)
    callback = None
    wall = cpu = 0.0
    if job["epochs"]:
        model = YOLO(model_file(machine["model"], job["scale"], folder), task="detect")
        watch.attach(model)
        arguments = {**settings, "data": machine["data_yaml"], "epochs": job["epochs"], "seed": job["seed"]}
        arguments.update(project=str(folder.parent), name=folder.name, exist_ok=True, device=machine["device"])
        if "start" in machine or machine["model"].endswith(".pt"):
            arguments["pretrained"] = machine.get("start", True)
        if job["kind"] == "builtin":
            arguments["distill_model"] = machine["teacher"]
        elif job["kind"] == "fgd":
            from fgd_hooks.integrations.ultralytics.callback import FGDCallback

            callback = FGDCallback(machine["teacher"], config=job["fgd"]).attach(model)
        wall, cpu = time.perf_counter(), time.process_time()
        model.train(**arguments)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    trained = YOLO(machine["weights"]).model
    result = {
        **{key: value for key, value in job.items() if key != "machine"},
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "batches": watch.batches.value,
        "curve": watch.curve,
        "inherited": callback.inherited if callback else "",
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "gflops": round(float(get_flops(trained, settings["imgsz"])), 3),
        "weights": digest(Path(machine["weights"])),
        "device": device_name(machine["device"]),  # whose seconds these are
        "versions": {"fgd_hooks": version("fgd-hooks"), "ultralytics": ultralytics_version, "torch": torch.__version__},
        "results": {"val": measure(job, "val")},
    }
    write_json(folder / RESULT, result)
    return result


def measure(job: dict[str, Any], split: str) -> dict[str, Any]:
    """The COCO metrics of a run's last weights on one split, without the machine's paths."""
    from fgd_hooks.evaluation.evaluate import evaluate

    machine = job["machine"]
    size = job["settings"].get("imgsz")
    found = evaluate(machine["weights"], machine["data_yaml"], split=split, imgsz=size, device=machine["device"])
    return {key: value for key, value in found.to_dict().items() if key not in ("model", "data")}


class BatchChecksum:
    """A checksum, ``value``, of all training batches, pixels and boxes: equal for two runs that saw the same data."""

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


class Watch:
    """Ultralytics callbacks that report progress, choose the epochs to validate, and note what the model was fed.

    With ``val_every`` in the job's machine part it validates every so many epochs and writes TensorBoard events.
    """

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        self.curve: list[tuple[int, float]] = []  # epoch, mAP50-95 by Ultralytics' validator, from 0 to 1
        self.batches = BatchChecksum()
        self._folder, self._threads = folder, int(job["machine"]["threads"])
        self._val_every = int(job["machine"].get("val_every") or 0)
        self._draws = bool(self._val_every) and job["kind"] != "fgd"  # the distillation writes the same scalars
        self._reported, self._step = 0.0, 0
        self._writer: Any = None

    def attach(self, model: Any) -> None:
        """Add the callbacks to a YOLO object."""
        model.add_callback("on_pretrain_routine_end", self._start)
        model.add_callback("on_train_epoch_start", self._epoch_start)
        model.add_callback("on_train_batch_end", self._batch_end)
        model.add_callback("on_fit_epoch_end", self._epoch_end)
        model.add_callback("teardown", self._close)

    def _start(self, trainer: Any) -> None:
        import torch

        torch.set_num_threads(self._threads)  # not before: Ultralytics sets them too, when it chooses the device
        self.batches.attach(trainer)
        if self._draws:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))  # type: ignore[no-untyped-call]

    def _epoch_start(self, trainer: Any) -> None:
        if self._val_every:  # Ultralytics asks ``args.val`` anew at the end of every epoch
            trainer.args.val = (trainer.epoch + 1) % self._val_every == 0
        self._step = 0

    def _batch_end(self, trainer: Any) -> None:
        self._step += 1
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            self._report(trainer.epoch + self._step / len(trainer.train_loader))

    def _epoch_end(self, trainer: Any) -> None:
        if trainer.epoch >= trainer.epochs:
            return  # Ultralytics sends one more event after the last epoch, for the best weights
        if trainer.args.val or trainer.epoch + 1 == trainer.epochs:
            self.curve.append((trainer.epoch + 1, float(trainer.metrics.get("metrics/mAP50-95(B)", 0.0))))
        if self._writer is not None:
            scalars = {**trainer.label_loss_items(trainer.tloss, prefix="train"), **trainer.metrics, **trainer.lr}
            for name, value in scalars.items():
                self._writer.add_scalar(name, float(value), trainer.epoch + 1)
        self._report(trainer.epoch + 1.0)

    def _close(self, trainer: Any) -> None:
        """Finish the TensorBoard file; called after a failure too."""
        if self._writer is not None:
            self._writer.close()

    def _report(self, epochs: float) -> None:
        write_json(self._folder / PROGRESS, {"epochs": epochs})
        self._reported = time.monotonic()


def model_file(model: str, scale: Sequence[float] | None, folder: Path) -> str:
    """The model that YOLO() takes; where depth and width differ from the yaml's, a yaml in the run's folder."""
    if not scale:
        return model
    import yaml

    file = folder / "model.yaml"  # a name that says no scale
    file.write_text(yaml.safe_dump(rescaled(model, scale), sort_keys=False), encoding="utf-8")
    return str(file)


def rescaled(model: str, scale: Sequence[float]) -> dict[str, Any]:
    """A model yaml with one scale, depth, width and most channels, which is the one that counts where none is named."""
    from ultralytics.nn.tasks import yaml_model_load

    content = dict(yaml_model_load(model))
    for key in ("yaml_file", "scale"):
        content.pop(key, None)
    content["scales"] = {"n": [scale[0], scale[1], int(scale[2])]}
    return content


def digest(file: Path) -> str:
    """What tells a file from every other, whatever its name."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The name of what a training runs on; ``device`` as in Ultralytics: "cpu", "0", "0,1", or another of torch's."""
    if device == "cpu":
        return processor()
    import torch

    number = device.split(",")[0].rpartition(":")[2]
    return torch.cuda.get_device_name(int(number)) if number.isdigit() else device


def main() -> None:
    """Do the run of the job file on the command line, unless it is finished or somebody else does it."""
    folder = Path(sys.argv[1]).resolve().parent
    lease = Lease.take(folder)
    if lease is None:
        sys.exit(f"{folder} is finished, or another process has it.")
    job = read_json(Path(sys.argv[1]))
    load_plugins(job["machine"]["plugins"])
    try:
        train(job, folder)
    finally:
        lease.release()


if __name__ == "__main__":
    main()
