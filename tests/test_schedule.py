import math

import pytest

from fgd_hooks.config import ScheduleConfig
from fgd_hooks.schedule import Clock, schedule_factor


def curve(config, epochs=10, **clock):
    return [schedule_factor(config, Clock(step=100, epoch=e, epochs=epochs, **clock)) for e in range(epochs)]


def test_constant():
    assert curve(ScheduleConfig(stop=None)) == [1.0] * 10


def test_linear_goes_from_one_to_end():
    assert curve(ScheduleConfig(kind="linear", end=0.5, stop=None)) == pytest.approx([1 - 0.05 * e for e in range(10)])


def test_cosine():
    expected = [(1 + math.cos(math.pi * e / 10)) / 2 for e in range(10)]
    assert curve(ScheduleConfig(kind="cosine", stop=None)) == pytest.approx(expected)


def test_start_and_stop_in_epochs_and_in_fractions():
    assert curve(ScheduleConfig(start="2 epochs", stop="5 epochs")) == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert curve(ScheduleConfig(start=0.2, stop=0.5)) == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]


def test_a_stop_of_one_is_the_whole_training():
    assert curve(ScheduleConfig(stop=1.0)) == curve(ScheduleConfig(stop=1)) == [1] * 10
    assert curve(ScheduleConfig(kind="linear", stop=1.0)) == pytest.approx([1 - e / 10 for e in range(10)])


def test_decay_ends_at_the_stop():
    factors = curve(ScheduleConfig(kind="linear", start="2 epochs", stop="6 epochs"))
    assert factors == pytest.approx([0, 0, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0])


def test_warm_up_rises_over_the_steps():
    config = ScheduleConfig(warmup_steps=4)
    assert [schedule_factor(config, Clock(step=s)) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_a_decay_needs_the_number_of_epochs():
    with pytest.raises(ValueError, match="set_epoch"):
        schedule_factor(ScheduleConfig(kind="cosine", stop=None), Clock())
    with pytest.raises(ValueError, match="set_epoch"):
        schedule_factor(ScheduleConfig(start=0.5, stop=None), Clock())


def test_a_fraction_to_stop_at_waits_until_the_length_is_known():
    config = ScheduleConfig(stop=0.5)
    assert schedule_factor(config, Clock(epoch=99)) == 1
    assert schedule_factor(config, Clock(epoch=5, epochs=10)) == 0


def test_the_default_stops_after_a_third():
    assert curve(ScheduleConfig()) == [1] * 4 + [0] * 6


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_fraction_to_stop_at_leaves_one_epoch_at_least(epochs):
    factors = [schedule_factor(ScheduleConfig(stop=0.1), Clock(epoch=e, epochs=epochs)) for e in range(epochs)]
    assert factors == [1] + [0] * (epochs - 1)
