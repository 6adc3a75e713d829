"""What is written to TensorBoard, read back from the event file."""

import re

import pytest

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from fgd_hooks import Distiller, FGDConfig
from fgd_hooks.config import BalanceConfig, LossConfig, ScheduleConfig, TeacherConfig
from fgd_hooks.diagnostics.tensorboard import (
    distillation_scalars,
    hyper_parameters,
    scalar_layout,
    write_hyper_parameters,
    write_layout,
    write_scalars,
)
from tests.helpers.tiny import TinyDetector, batch, trained


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def layout_of(events):
    """Category -> chart -> its tags, as TensorBoard's page reads them."""
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    return {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}


def hparams_of(events):
    """The run's settings, as TensorBoard's table reads them."""
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


@pytest.fixture
def one_step():
    student = trained(TinyDetector())
    with Distiller(
        student, teacher=trained(TinyDetector((8, 16, 24)), seed=1), config={"balance": {"interval": 2}}
    ) as distiller:
        for step in range(2):  # one of the two measures the balance
            images, boxes = batch(step)
            task_loss = student(images)["scores"].square().mean()
            distilled = distiller(images, boxes)
            (task_loss + distilled.loss).backward()
        distiller.balance.close()
        yield distiller, distilled, task_loss.item()


def test_the_scalars_add_up(one_step):
    distiller, distilled, task_loss = one_step
    scalars = distillation_scalars(distiller, distilled, task_loss)
    parts = [scalars[f"fgd/parts/{part}"] for part in distiller.part_names]
    assert scalars["fgd/loss"] == pytest.approx(sum(parts)) == pytest.approx(float(distilled.loss.detach()), rel=1e-4)
    assert scalars["fgd/loss"] > 0
    assert scalars["fgd/task_loss"] == task_loss
    assert "fgd/task_loss" not in distillation_scalars(distiller, distilled)


def test_every_chart_of_the_page_finds_its_scalars_and_no_others(one_step, tmp_path):
    distiller, distilled, task_loss = one_step
    with SummaryWriter(str(tmp_path)) as writer:
        write_layout(writer, distiller.level_names)
        write_scalars(writer, distillation_scalars(distiller, distilled, task_loss), 0)
        others = {"fgd/attention_distance/P3": 0.5, "fgd/mAP50-95": 0.25}
        write_scalars(writer, {**others, "train/box_loss": 1.0}, 0)
    events = read(tmp_path)
    tags = events.Tags()["scalars"]
    shown = {
        title: {tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)}
        for charts in layout_of(events).values()
        for title, patterns in charts.items()
    }
    levels, parts = ["P3", "P4", "P5"], ["foreground", "background", "attention", "global"]
    assert shown == {
        "task against distillation": {"fgd/task_loss", "fgd/loss"},
        "parts of the loss": {f"fgd/parts/{part}" for part in parts},
        "gradient ratio: distillation / task": {f"fgd/balance/ratio/{level}" for level in levels},
        "attention distance, student to teacher (validation)": {"fgd/attention_distance/P3"},
        "mAP50-95 (validation)": {"fgd/mAP50-95"},
        "weight and skipped steps": {"fgd/weight", "fgd/skipped_steps"},
        **{f"{level}: parts of the loss": {f"fgd/levels/{level}/{part}" for part in parts} for level in levels},
        "scale of each level": {f"fgd/balance/scale/{level}" for level in levels},
        "cosine of the gradients: distillation, task": {f"fgd/balance/cosine/{level}" for level in levels},
    }
    assert layout_of(events) == {
        category: {title: patterns for title, (_, patterns) in charts.items()}
        for category, charts in scalar_layout(levels).items()
    }


def test_the_runs_row_lies_in_its_own_file(tmp_path):
    config = FGDConfig(
        weight=0.5,
        interval=2,
        adapter="mlp",
        loss=LossConfig(preset="fcos"),
        balance=BalanceConfig(ratio=1.5),
        schedule=ScheduleConfig(kind="cosine", stop=None),
        teacher=TeacherConfig(name="weights/big.pt"),
    )
    with SummaryWriter(str(tmp_path)) as writer:
        row = hyper_parameters(config, batch=8, lr0=1e-3)
        write_hyper_parameters(writer, row, {"final/mAP50-95": 0.25}, step=12)
    assert len(list(tmp_path.rglob("*"))) == 1, "one event file, no folder of a second run"
    events = read(tmp_path)
    assert hparams_of(events) == {
        "fgd.teacher": "big.pt",
        "fgd.weight": 0.5,
        "fgd.interval": 2,
        "fgd.loss": "fgd",
        "fgd.preset": "fcos",
        "fgd.adapter": "mlp",
        "fgd.balance.mode": "gradient",
        "fgd.balance.ratio": 1.5,
        "fgd.schedule": "cosine",
        "fgd.schedule.stop": "never",
        "batch": 8,
        "lr0": 1e-3,
    }
    assert [(event.step, event.value) for event in events.Scalars("final/mAP50-95")] == [(12, 0.25)]
    ends = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_end_info"])
    assert ends.session_end_info.status == 1, "success"
