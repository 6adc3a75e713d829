"""Train an Ultralytics YOLO student with a teacher: the Python API, whole.

python trainers/yolo.py yolo26n.pt yolo26s.pt coco8.yaml
"""

from __future__ import annotations

import argparse

from ultralytics import YOLO

from fgd_hooks import FGDCallback, FGDError


def main(student: str, *, teacher: str, data: str, epochs: int = 100) -> None:
    """Train ``student`` on ``data``; the checkpoints are Ultralytics' own."""
    model = YOLO(student)
    FGDCallback(teacher=teacher).attach(model)
    model.train(data=data, epochs=epochs)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=raw)
    parser.add_argument("student", help="weights or yaml")
    parser.add_argument("teacher", help="weights")
    parser.add_argument("data", help="data yaml")
    parser.add_argument("epochs", type=int, nargs="?", default=100)
    try:
        main(**vars(parser.parse_args()))
    except (FGDError, FileNotFoundError) as error:
        parser.error(str(error))
