"""Train an Ultralytics YOLO student with a teacher: the Python API, whole.

python trainers/yolo.py yolo26n.pt yolo26s.pt coco8.yaml
"""

from __future__ import annotations

import sys

from ultralytics import YOLO

from fgd_hooks import FGDCallback


def main(student: str, teacher: str, data: str, epochs: int = 100) -> None:
    """Train ``student`` on ``data``; the checkpoints are Ultralytics' own."""
    model = YOLO(student)
    FGDCallback(teacher=teacher).attach(model)
    model.train(data=data, epochs=epochs)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:4], *(int(epochs) for epochs in sys.argv[4:]))
