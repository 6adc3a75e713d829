"""One run of a study, in a process of its own: ``python -m fgd_hooks.study.worker JOB.json``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgd_hooks.study.plan import RESULT, Run
from fgd_hooks.study.processes import end_with_parent, read_json, write_json

JOB = "job.json"


def job_of(run: Run, device: str) -> dict[str, Any]:
    """What the process has to know, as plain values."""
    return {
        "key": run.key,
        "name": run.name,
        "data": run.data,
        "student": run.student,
        "arm": run.arm,
        "kind": run.kind,
        "seed": run.seed,
        "epochs": run.epochs,
        "model": run.model,
        "scale": list(run.scale) if run.scale else None,
        "settings": run.settings,
        "fgd": run.fgd,
        "images": run.prepared.counts,
        "data_yaml": str(run.prepared.yaml),
        "weights": str(run.weights),
        "teacher": str(run.teacher.weights) if run.teacher else None,
        "start": str(run.start.weights) if run.start else None,
        "needs": [need.name for need in run.needs],
        "device": device,
    }


PATHS = ("model", "data_yaml", "weights", "teacher", "start", "device")
"""Entries of a job that belong to the machine, not to the result."""


def train(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train (unless the weights are given), measure the last weights on val and write ``result.json``."""
    from importlib.metadata import version

    import torch
    from ultralytics import YOLO
    from ultralytics import __version__ as ultralytics_version
    from ultralytics.utils import SETTINGS as HOST

    from fgd_hooks.evaluation.evaluate import evaluate
    from fgd_hooks.study.processes import device_name
    from fgd_hooks.study.quickstart_train import BatchChecksum, silence_loggers

    silence_loggers(HOST)
    checksum = BatchChecksum()
    wall = cpu = 0.0
    if job["epochs"]:
        model = YOLO(model_file(job, folder), task="detect")
        # not before: Ultralytics sets the threads, too, when it chooses the device
        model.add_callback("on_pretrain_routine_end", lambda trainer: torch.set_num_threads(1))
        model.add_callback("on_pretrain_routine_end", checksum.attach)
        settings = {**job["settings"], "data": job["data_yaml"], "epochs": job["epochs"], "seed": job["seed"]}
        settings.update(project=str(folder.parent), name=folder.name, exist_ok=True, device=job["device"])
        if job["start"]:
            settings["pretrained"] = job["start"]
        elif str(job["model"]).endswith(".pt"):
            settings["pretrained"] = True
        if job["kind"] == "builtin":
            settings["distill_model"] = job["teacher"]
        elif job["kind"] == "fgd":
            from fgd_hooks.integrations.ultralytics.callback import FGDCallback

            FGDCallback(job["teacher"], job["fgd"]).attach(model)
        wall, cpu = time.perf_counter(), time.process_time()
        model.train(**settings)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    metrics = measure(job, "val", evaluate)
    result = {
        **{key: value for key, value in job.items() if key not in PATHS},
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "batches": checksum.value,
        "device": device_name(job["device"]),  # whose seconds these are
        "versions": {"fgd_hooks": version("fgd-hooks"), "ultralytics": ultralytics_version, "torch": torch.__version__},
        "results": {"val": metrics},
    }
    write_json(folder / RESULT, result)
    return result


def measure(job: dict[str, Any], split: str, evaluate: Any) -> dict[str, Any]:
    """The COCO metrics of a run's last weights on one split, without the machine's paths."""
    found = evaluate(
        job["weights"], job["data_yaml"], split=split, imgsz=job["settings"].get("imgsz"), device=job["device"]
    )
    return {key: value for key, value in found.to_dict().items() if key not in ("model", "data")}


def model_file(job: dict[str, Any], folder: Path) -> str:
    """The model that YOLO() takes; where depth and width differ from the yaml's, a yaml in the run's folder."""
    if not job["scale"]:
        return str(job["model"])
    import yaml

    file = folder / "model.yaml"  # a name that says no scale
    file.write_text(yaml.safe_dump(rescaled(job["model"], job["scale"]), sort_keys=False), encoding="utf-8")
    return str(file)


def rescaled(model: str, scale: Sequence[float]) -> dict[str, Any]:
    """A model yaml with one scale, depth, width and most channels, which is the one that counts where none is named."""
    from ultralytics.nn.tasks import yaml_model_load

    content = dict(yaml_model_load(model))
    for key in ("yaml_file", "scale"):
        content.pop(key, None)
    content["scales"] = {"n": [scale[0], scale[1], int(scale[2])]}
    return content


def main() -> None:
    """Run the job file named on the command line."""
    end_with_parent()
    file = Path(sys.argv[1]).resolve()
    train(read_json(file), file.parent)


if __name__ == "__main__":
    main()
