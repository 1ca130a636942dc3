"""The cases of [fault_tolerance], and those of [data] that are about faults: what a run does about them."""

import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest

from swamla_titan.data import retry
from swamla_titan.data.faults import Unreachable
from swamla_titan.data.sources import local as local_source
from swamla_titan.model import SWAMLAModel
from swamla_titan.train.policies import watchdog
from swamla_titan.train.policies.watchdog import Watchdog
from tests.config.runner import Runner, before_every_call_of
from tests.train.faults import Fault
from tests.train.runs import metrics
from tests.waiting import HANG, wait_until


def complaints(run: Runner, *overrides: str, step: int = 0, until: str = "") -> str:
    """What the watchdog says of a run: what it would end the process for, it merely notes.

    Each step takes 0.9 s at least; or step number `step`, counted from 0, as long as `until` has not been said.
    """
    found: list[str] = []
    micro_batches = itertools.count()

    def stand_still(*_: object) -> None:
        if not until:
            time.sleep(0.3)
        elif next(micro_batches) == 3 * step:
            wait_until(lambda: until in found)

    with pytest.MonkeyPatch.context() as patch, before_every_call_of(SWAMLAModel, stand_still):
        patch.setattr(Watchdog, "_end", lambda self, now, headline: found.append(headline))
        patch.setattr(watchdog, "BACKSTOP", 1000.0)  # nor is its timer of C to end this one
        run(*overrides)
    return "\n".join(found)


def step_timeout(run: Runner) -> None:
    expected = "no progress for 0.2 s (step) after step 2"
    assert expected in complaints(run, "--fault_tolerance.step_timeout", "0.2", step=2, until=expected)
    assert complaints(run, "--fault_tolerance.step_timeout", str(2 * HANG)) == ""
    assert complaints(run, "--fault_tolerance.step_timeout", "0") == ""
    off = ("--fault_tolerance.step_timeout", "0", "--fault_tolerance.first_step_timeout", "0.1")
    assert "0.1 has no effect with fault_tolerance.step_timeout = 0.0" in run.refusal(*off)


def first_step_timeout(run: Runner) -> None:
    steps = ("--fault_tolerance.step_timeout", "2.5")  # so often is looked, four times over
    first_step = (*steps, "--fault_tolerance.first_step_timeout")
    expected = "no progress for 0.1 s (first step) after step 0"
    assert expected in complaints(run, *first_step, "0.1", until=expected)
    assert "first step" not in complaints(run, *first_step, str(2 * HANG))


def max_rewinds(run: Runner) -> None:
    row = (Fault(3, "nan gradient"), Fault(4, "nan gradient"))
    policy = ("--fault_tolerance.max_bad_steps", "2", "--checkpoint.interval", "1", "--checkpoint.keep_latest", "0")
    for most, code in (("0", 1), ("1", 0)):
        settings = (*policy, "--training.steps", "7", "--fault_tolerance.max_rewinds", most)
        folder = run.with_faults(row, code, *settings)
        assert metrics(folder, "rewinds") == ({6: 1, 7: 1} if most == "1" else {})
    refused = ("--fault_tolerance.max_rewinds", "2", "--fault_tolerance.skip_bad_steps", "false")
    assert "2 has no effect with fault_tolerance.skip_bad_steps = false" in run.refusal(*refused)
    assert "expected a whole number >= 0" in run.refusal("--fault_tolerance.max_rewinds", "-1")


def on_error(run: Runner) -> None:
    """On a corpus of two files whose second one is damaged."""
    good = "".join(json.dumps({"text": f"{i:03}"}) + "\n" for i in range(150))  # a step takes 80 of them
    local = run.local(a_jsonl=good, b_jsonl="{")
    skipped = run(*local, "--data.on_error", "skip_file")
    assert set(skipped.series("skipped_files")) == {1}
    assert (skipped.folder / "skipped_files.json").exists()
    assert "b.jsonl, line 1: not valid JSON" in run.refusal(*local, "--data.on_error", "stop")
    assert 'one of "stop", "skip_file"' in run.refusal("--data.on_error", "skip")


def retry_seconds(run: Runner) -> None:
    """How long a folder that does not answer is waited for."""
    local = run.local(a_txt="text")
    for value, limit, waited in (("0", "600", 0.0), ("1", "600", 1.0), ("-1", "4", 2.0), ("-1", "600", 300.0)):
        clock = [0.0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_source, "_status", silent)
            patch.setattr(
                retry, "time", SimpleNamespace(monotonic=partial(advance, clock, 0), sleep=partial(advance, clock))
            )
            timeouts = ("--data.retry_seconds", value, "--fault_tolerance.step_timeout", limit)
            run.with_faults((), 1, *local, *timeouts)
        assert waited <= clock[0] <= waited + 0.01
    refusal = run.refusal(*local, "--data.retry_seconds", "2.5", "--fault_tolerance.step_timeout", "4")
    assert "2.5 s of waiting for data are more than half of fault_tolerance.step_timeout = 4" in refusal


def silent(path: str) -> int:
    raise Unreachable(path, "", "no answer")


def advance(clock: list[float], seconds: float) -> float:
    clock[0] += seconds
    return clock[0]


FAULT_CASES: dict[str, Callable[[Runner], None]] = {
    "data.on_error": on_error,
    "data.retry_seconds": retry_seconds,
    "fault_tolerance.step_timeout": step_timeout,
    "fault_tolerance.first_step_timeout": first_step_timeout,
    "fault_tolerance.max_rewinds": max_rewinds,
}
