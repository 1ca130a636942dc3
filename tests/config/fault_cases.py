"""The cases of [fault_tolerance]: what a run does about faults."""

import time
from collections.abc import Callable

import pytest

from swamla_titan.model import SWAMLAModel
from swamla_titan.train.watchdog import Watchdog
from tests.config.runner import Runner, before_every_call_of
from tests.train.faults import Fault
from tests.train.runs import metrics


def complaints(run: Runner, *overrides: str) -> str:
    """What the watchdog says of a run whose steps take 0.9 s: what it would end the process for, it merely notes."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch, before_every_call_of(SWAMLAModel, lambda *_: time.sleep(0.3)):
        patch.setattr(Watchdog, "_end", lambda self, now, headline: found.append(headline))
        run(*overrides)
    return "\n".join(found)


def step_timeout(run: Runner) -> None:
    assert "no progress for 0.2 s (step) after step 2" in complaints(run, "--fault_tolerance.step_timeout", "0.2")
    assert complaints(run, "--fault_tolerance.step_timeout", "60") == ""
    off = ("--fault_tolerance.step_timeout", "0", "--fault_tolerance.first_step_timeout", "0.1")
    assert complaints(run, *off) == ""


def first_step_timeout(run: Runner) -> None:
    steps = ("--fault_tolerance.step_timeout", "2.5")  # so often is looked, four times over
    short, long = (complaints(run, *steps, "--fault_tolerance.first_step_timeout", limit) for limit in ("0.1", "60"))
    assert "no progress for 0.1 s (first step) after step 0" in short
    assert "first step" not in long


def max_rewinds(run: Runner) -> None:
    row = (Fault(3, "nan gradient"), Fault(4, "nan gradient"))
    policy = ("--fault_tolerance.max_bad_steps", "2", "--checkpoint.interval", "1", "--checkpoint.keep_latest", "0")
    for most, code in (("0", 1), ("1", 0)):
        settings = (*policy, "--training.steps", "7", "--fault_tolerance.max_rewinds", most)
        folder = run.with_faults(row, code, *settings)
        assert metrics(folder, "rewinds") == ({6: 1, 7: 1} if most == "1" else {})
    refused = ("--fault_tolerance.max_rewinds", "2", "--fault_tolerance.skip_bad_steps", "false")
    assert "2 would rewind after bad steps, but skip_bad_steps = false" in run.refusal(*refused)
    assert "expected a whole number >= 0" in run.refusal("--fault_tolerance.max_rewinds", "-1")


FAULT_CASES: dict[str, Callable[[Runner], None]] = {
    "fault_tolerance.step_timeout": step_timeout,
    "fault_tolerance.first_step_timeout": first_step_timeout,
    "fault_tolerance.max_rewinds": max_rewinds,
}
