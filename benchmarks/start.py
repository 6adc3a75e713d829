"""What a student is worth before its first step: copied from its teacher, and fitted to it; and what the fit costs.

    python -m benchmarks.start yolo26n.yaml teacher.pt data.yaml --images 16 64 200 --imgsz 192

The fit is to so many training images, as they are. Writes results/benchmarks/start.json, or another of the name given.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO

from benchmarks.common import save, show
from fgd_hooks import fit_channels, inherit_channels
from fgd_hooks.evaluation.dataset import load_letterboxed
from fgd_hooks.evaluation.evaluate import evaluate
from fgd_hooks.evaluation.readers import read_data
from fgd_hooks.initialization.report import InitializationReport
from fgd_hooks.integrations.ultralytics.teacher import load_teacher
from fgd_hooks.study.worker import model_file


def student(options: argparse.Namespace, teacher: Any, folder: Path) -> YOLO:
    """An untrained student for the teacher's classes."""
    from ultralytics.nn.tasks import DetectionModel

    result = YOLO(model_file(options.student, options.scale, folder), task="detect")
    torch.manual_seed(0)
    result.model = DetectionModel(result.model.yaml, nc=len(teacher.names), verbose=False)
    result.model.names = teacher.names
    return result


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("data")
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--imgsz", type=int, default=192)
    parser.add_argument("--scale", type=float, nargs=3, help="depth, width, most channels of the student")
    parser.add_argument("--name", default="start", help="of the file in results/benchmarks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher: Any = load_teacher(options.teacher)
    files = sorted(image.file for image in read_data(options.data, "train").images)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in [0, *options.images]:
            model = student(options, teacher, folder)
            inherited = inherit_channels(model.model, teacher=teacher)
            chosen = files[:: max(1, len(files) // max(1, count))][:count]
            fitted, seconds = InitializationReport(), 0.0
            if chosen:
                images = torch.stack([load_letterboxed(file, options.imgsz, options.imgsz)[0] for file in chosen])
                begin = time.process_time()
                fitted = fit_channels(model.model, teacher=teacher, images=images)
                seconds = time.process_time() - begin
            weights = folder / "start.pt"
            model.model.eval()
            model.save(weights)
            found = evaluate(weights, options.data, imgsz=options.imgsz).to_dict()
            rows.append(
                {
                    "images": count,
                    "mAP50-95": round(100 * found["map50_95"], 1),
                    "mAP50": round(100 * found["map50"], 1),
                    "CPU seconds": round(seconds, 1),
                    "start": fitted.summary if chosen else inherited.summary,
                }
            )
    show(
        f"{options.student}, before any training, on val", rows, ("images", "mAP50-95", "mAP50", "CPU seconds", "start")
    )
    save(options.name, rows, student=options.student, scale=options.scale, imgsz=options.imgsz)


if __name__ == "__main__":
    main()
