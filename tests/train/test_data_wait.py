"""A run whose steps wait for data says so, once, and what helps; by numbers that are put in, not by the clock."""

import dataclasses

import pytest
import torch

from swamla_titan.config.sections import Data
from swamla_titan.train import throughput as module
from swamla_titan.train.throughput import DataWait, Interval, Throughput, data_wait_advice
from tests.train.runs import train

FIRST = Interval(1, 100.0, 99.0)  # of readers that start up


def verdicts(*intervals):
    watch = DataWait("Do this.")
    return [watch.warning(interval) for interval in (FIRST, *intervals)]


def told(found):
    return [warning and warning.split("data ")[1].split(" of")[0] for warning in found]


@pytest.mark.parametrize("share, warned", [(0.0, False), (0.05, False), (0.06, True), (0.9, True)])
def test_more_than_a_twentieth_of_the_time_is_warned_of(share, warned):
    none, found = verdicts(Interval(10, 20.0, 20.0 * share))
    assert none is None
    if warned:
        assert found == f"steps wait for data {share:.0%} of their time. Do this."
    else:
        assert found is None


def test_short_intervals_are_taken_together():
    """As with metrics.log_interval = 1, or where a checkpoint cuts an interval."""
    found = told(verdicts(*[Interval(1, 1.0, 0.0)] * 9, Interval(1, 1.0, 1.0), Interval(9, 9.0, 9.0)))
    assert found == [None] * 10 + ["10%", None]


def test_it_is_said_again_only_where_it_is_worse_or_after_long():
    intervals = [Interval(10, 10.0, 10.0 * share) for share in (0.1, 0.14, 0.08, 0.2, 0.25, 0.0)]
    assert told(verdicts(*intervals)) == [None, "10%", None, None, "20%", None, None]
    assert told(verdicts(*[Interval(500, 1.0, 0.1)] * 9)) == [None, *["10%", None, None, None] * 2, "10%"]


LOCAL = Data(source="local", path="x", streams=8)


@pytest.mark.parametrize(
    "data, streams, cores, parts",
    [
        ({"num_workers": 0}, 8, 4, ["data.num_workers = 0", "set it to 1 or more"]),
        ({"num_workers": 1}, 8, 4, ["Raise data.num_workers from 1, up to 4: there are 4 cores per rank"]),
        ({"num_workers": 1}, 2, 4, ["Raise data.num_workers from 1, up to 2: a rank owns 2 streams"]),
        ({"num_workers": 2}, 2, 4, ["has a loader process already", "raise data.streams (8)"]),
        ({"num_workers": 4}, 8, 4, ["4 loader processes share 4 cores"]),
        ({"source": "huggingface", "path": "some/data"}, 8, 4, ["A copy on a local disk needs no network"]),
        ({"source": "huggingface", "path": "/"}, 8, 4, ["the storage is slow"]),
        ({}, 8, 4, ["the storage is slow"]),
    ],
)
def test_what_helps(data, streams, cores, parts):
    text = data_wait_advice(dataclasses.replace(LOCAL, **data), 100, streams, cores)
    for part in parts:
        assert part.lower() in text.lower()
    assert "row groups" not in text
    assert "2 units, which 8 streams share" in data_wait_advice(dataclasses.replace(LOCAL, **data), 2, streams, cores)


def test_a_run_says_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Throughput, "_stalled", lambda self: 1e9)
    assert train(tiny, "--training.steps", "12", "--validation.interval", "0", "--data.num_workers", "0") == 0
    lines = [line for path in (tmp_path / "run/logs").iterdir() for line in path.read_text().splitlines()]
    found = [line for line in lines if "wait for data" in line]
    assert len(found) == 1
    assert "data.num_workers = 0" in found[0]


class _Event:
    """Of a GPU that has done all its work `done` seconds after the test began."""

    done = 0.0

    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = max(_Event.done, _clock[0])

    def elapsed_time(self, later):
        return 1000 * (later.at - self.at)


_clock = [0.0]


def test_a_gpu_that_is_busy_meanwhile_does_not_wait(monkeypatch):
    _clock[0] = 0.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: _clock[0])
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "none")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    clock = Throughput(torch.device("cuda", 0), 1, 1.0, 1)
    for busy_until, arrives in ((0.0, 1.0), (5.0, 3.0), (6.0, 7.5)):
        _Event.done = busy_until
        with clock.data_wait():
            _clock[0] = arrives
    values = clock.metrics()
    assert values["data_seconds"] == pytest.approx(7.5 / 3)
    assert clock.interval == Interval(3, 7.5, pytest.approx(1.0 + 0.0 + 1.5))
