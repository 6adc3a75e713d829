"""What a step costs that does not distil, with the callback."""

import pytest
import torch

pytest.importorskip("ultralytics")

from benchmarks.models import yolo, yolo_batch
from benchmarks.step import CallbackStep
from fgd_hooks.config import load_config
from tests.contracts.test_steady_step import Calls


def test_a_step_that_rests_or_is_over_launches_next_to_nothing(teacher_file, tmp_path):
    batch = yolo_batch(64, 2)
    config = load_config(
        {"log_interval": 0, "interval": 2, "schedule": {"stop": "2 epochs"}, "teacher": {"dtype": "bfloat16"}}
    )
    step = CallbackStep(yolo("yolo26n", args={"imgsz": 64}), teacher_file, config, batch, tmp_path)
    session, output = step.run, (torch.ones(3, requires_grad=True), {})
    step()
    counts = []
    for epoch in (0, 2):
        session.distiller.set_epoch(epoch, 4)
        with Calls() as calls:
            loss, items = session.add_loss_of(batch, output)
        counts.append(calls.launches)
        assert loss[-1] == 0
        assert items["fgd"] == 0 or epoch == 0, "a resting step shows the last one's"
    assert max(counts) <= 5 + 2, "two of them sum up what the log shows"
    weights = {kind.weight.dtype for kind in session.distiller.teachers[0].modules() if type(kind) is torch.nn.Conv2d}
    assert weights == {torch.bfloat16}, "cast once and not in every step"
    session.remove()
