import math
from itertools import pairwise

import pytest

from swamla_titan.config.sections import LRSchedule
from swamla_titan.optim import lr_factor


def curve(schedule: LRSchedule, steps: int) -> list[float]:
    return [lr_factor(schedule, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_starts_above_zero():
    values = curve(LRSchedule(warmup_steps=10), 100)
    assert values[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_every_schedule_ends_at_the_minimum_and_never_rises_after_warm_up(name):
    values = curve(LRSchedule(name=name, warmup_steps=10, min_lr_ratio=0.2), 100)
    assert values[-1] == pytest.approx(0.2)
    assert max(values) == pytest.approx(1.0)
    assert all(later <= earlier for earlier, later in pairwise(values[10:]))


def test_cosine_follows_its_formula():
    value = lr_factor(LRSchedule(name="cosine", warmup_steps=0, min_lr_ratio=0.1), 49, 100)
    assert value == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))


def test_linear_is_halfway_in_the_middle():
    assert lr_factor(LRSchedule(name="linear", warmup_steps=0, min_lr_ratio=0.0), 49, 100) == pytest.approx(0.5)


def test_wsd_holds_the_peak_then_decays_over_decay_steps():
    values = curve(LRSchedule(name="wsd", warmup_steps=5, decay_steps=20, min_lr_ratio=0.0), 100)
    assert values[5:80] == [1.0] * 75
    assert values[80] == pytest.approx(1 - 1 / 20)
    assert curve(LRSchedule(name="wsd", warmup_steps=5, min_lr_ratio=0.0), 100)[90] == pytest.approx(0.9)


def test_a_run_shorter_than_its_warm_up_stays_on_the_ramp():
    assert curve(LRSchedule(warmup_steps=10), 3) == [pytest.approx(x) for x in (0.1, 0.2, 0.3)]
