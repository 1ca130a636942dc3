"""What `report` and `watch` make of the files of runs that were killed, resumed, and written by older versions."""

import os
import platform
from pathlib import Path

import pytest

from swamla_titan.tools.goodput import goodput
from swamla_titan.tools.history import History, Tail, state
from tests.tools.histories import append, event, killed_and_resumed, line, start, write


def read(folder: Path) -> History:
    history = History(folder)
    history.update()
    return history


def steps(history: History) -> list[int]:
    return [each["step"] for each in history.lines()]


def test_a_file_is_read_as_it_grows_and_without_what_is_no_object(tmp_path):
    path = tmp_path / "lines"
    tail = Tail(path)
    assert tail.read() == []
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert tail.read() == [{"a": 1}]
    with path.open("ab") as file:
        file.write(b'0}\n{"cut\n[]\n\xff\n{"a": 3}\n')
    assert tail.read() == [{"a": 20}, {"a": 3}]
    assert tail.read() == []
    (tmp_path / "new").write_text('{"a": 4}\n')
    (tmp_path / "new").replace(path)
    assert tail.read() == [{"a": 4}]


def test_steps_after_which_a_later_start_continued_do_not_count(tmp_path):
    history = read(killed_and_resumed(tmp_path / "run"))
    assert [(each.step, each.ranks, len(each.lines)) for each in history.starts] == [(0, 8, 6), (4, 7, 6)]
    assert steps(history) == list(range(1, 11))
    assert history.lines()[4]["time"] == 1056  # not that of the first start
    assert history.lines()[3]["val_loss"] == 2.5
    append(tmp_path / "run" / "events.jsonl", [start(2, 2000)])  # from an older checkpoint, as the newer were damaged
    history.update()
    assert steps(history) == [1, 2]


def test_reading_at_once_and_piece_by_piece_give_the_same(tmp_path):
    whole = read(killed_and_resumed(tmp_path / "run"))
    folder = write(tmp_path / "growing", [], [])
    history = History(folder)
    told = []
    sources = {
        name: (tmp_path / "run" / name).read_text().splitlines(True) for name in ("events.jsonl", "metrics.jsonl")
    }
    while any(sources.values()):
        for name, lines in sources.items():
            with (folder / name).open("a") as file:
                file.writelines(lines[:2])
            del lines[:2]
        told += history.update()
    assert steps(history) == steps(whole)
    assert len(told) == 12 + 9


def test_a_run_of_a_version_without_events_wall_time_and_joined_validation(tmp_path):
    def old(step: int, **values: float) -> dict:
        of_gpus = {"tokens_per_second": 400.0, "tokens_per_second_per_gpu": 100.0, "tflops_per_gpu": 1.0}
        return {"step": step, "loss": 10 / step, "step_seconds": 2.0} | of_gpus | values

    lines = [old(1), old(5), {"step": 5, "val_loss": 3.0}, old(10), old(6), old(10), {"step": 10, "val_loss": 2.0}]
    folder = write(tmp_path / "run", lines, [])
    (folder / "events.jsonl").unlink()
    history = read(folder)
    assert [(each.step, each.ranks, each.device) for each in history.starts] == [(0, 4, "GPU"), (5, 4, "GPU")]
    assert [(each["step"], each.get("val_loss")) for each in history.lines()] == [
        (1, None),
        (5, 3.0),
        (6, None),
        (10, 2.0),
    ]
    assert goodput(history) is None
    assert history.elapsed() == [2, 10, 22, 30]
    assert state(history) == ("finished", "all 10 steps were taken")


def test_goodput_counts_each_second_once(tmp_path):
    """By hand: 1000 to 1026, killed, 1040 to 1066."""
    found = goodput(read(killed_and_resumed(tmp_path / "run")))
    assert found is not None
    expected = {
        "counted": 4 + 2 + 2,  # 1 to 4, 5 and 6, 9 and 10
        "repeated": 2,  # 5 and 6 of the first start
        "skipped": 1,  # 7
        "rewound": 1,  # 8
        "first": 10 + 10,
        "starting": 5 + 5,
        "validation": 2,
        "checkpoint": 3,
        "rewind": 4,
        "down": 14,
        "other": 1,  # after the last step
    }
    assert found.seconds == pytest.approx(expected)
    assert sum(found.seconds.values()) == pytest.approx(66)
    assert found.share == pytest.approx(8 / 66)
    assert found.stopped == 0
    assert found.gpu_hours == pytest.approx((8 * (26 + 14) + 7 * 26) / 3600)
    assert found.waiting_for_data == pytest.approx(0.1 * (16 + 16))


def test_time_after_a_stop_on_purpose_is_nobody_s_loss(tmp_path):
    first = [line(1, 1006), line(2, 1007)]
    second = [line(3, 9006), line(4, 9007)]
    events = [start(0, 1005), event("end", 1008, step=2, code=75), start(2, 9005), event("end", 9008, step=4, code=0)]
    history = read(write(tmp_path / "run", first + second, events, steps=4))
    found = goodput(history)
    assert found is not None
    assert found.stopped == 9000 - 1008
    assert found.total == pytest.approx(8 + 8)
    assert found.seconds["down"] == 0
    assert found.gpu_hours == 0  # on a CPU
    assert history.elapsed() == [6, 7, 14, 15]


def test_a_start_whose_event_is_lost_and_clocks_that_jump(tmp_path):
    lines = [line(1, 1006), line(2, 1007), line(3, 100), line(4, 101), line(3, 200), line(4, 201)]
    history = read(write(tmp_path / "run", lines, [start(0, 1005)]))
    assert [(each.step, len(each.lines)) for each in history.starts] == [(0, 4), (2, 2)]
    assert steps(history) == [1, 2, 3, 4]
    found = goodput(history)
    assert found is not None
    assert min(found.seconds.values()) >= 0
    assert history.elapsed() == sorted(history.elapsed())


def ended(**how: object) -> list[dict]:
    return [start(0, 5), event("end", 6, **how)]


@pytest.mark.parametrize(
    "events, lock, word, sentence",
    [
        ([], "", "waiting", "no step was taken yet"),
        ([start(0, 5)], "here", "running", "starting"),
        ([start(0, 5)], "gone", "killed", "starting: its process ended without a word; the same command continues it"),
        ([start(0, 5)], "another machine", "running", "starting"),
        (ended(step=0, error="RunFailed: full\nmore"), "gone", "failed", "RunFailed: full"),
        (ended(step=3, code=75), "gone", "stopped", "on purpose after step 3; the same command continues it"),
        (ended(step=3, code=76), "gone", "stopped", "after step 3, to continue with other machines"),
        (ended(step=10, code=0), "here", "finished", "all 10 steps were taken"),
    ],
)
def test_what_a_run_is_doing(tmp_path, events, lock, word, sentence):
    folder = write(tmp_path / "run", [], events)
    here, gone = platform.node(), 2**22 + 1  # more than the system gives
    holders = {"here": (os.getpid(), here), "gone": (gone, here), "another machine": (1, "elsewhere")}
    if lock:
        (folder / ".lock").write_text("process {} on {}\nrun".format(*holders[lock]))
    assert state(read(folder)) == (word, sentence)
