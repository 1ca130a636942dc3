"""The real command, as a rank of a job runs it: what it ends with, what it says, and what befalls it on the way."""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from swamla_titan.cli import main
from swamla_titan.data import Corpus, StepBatch
from swamla_titan.train import setup
from swamla_titan.train.policies.watchdog import Watchdog
from swamla_titan.train.step import StepOutcome
from swamla_titan.train.trainer import Trainer

OUTCOME = StepOutcome(torch.ones(()), torch.ones(()), 0.1)  # of steps that nobody took


class Ended(NamedTuple):
    """How a process ended, and what a terminal would have shown of it."""

    code: int
    out: str
    err: str


def run(config: str, *overrides: str) -> int:
    """Train; returns the exit code."""
    return main(["train", config, *overrides])


def run_and_listen(config: str, *overrides: str) -> Ended:
    """Train; also returns what was written to standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(config, *overrides)
    return Ended(code, out.getvalue(), err.getvalue())


def run_damaged(path: Path, content: bytes, config: str, *overrides: str) -> Ended:
    """`run_and_listen`, with a file that gets other content as soon as every rank has opened and counted the data."""
    original, ranks = setup.open_corpus, int(os.environ["WORLD_SIZE"])
    marks = path.parent.with_name(f"{path.name}-opened")

    def open_and_damage(*arguments: Any) -> Corpus:
        corpus = original(*arguments)
        corpus = corpus.with_segments(corpus.segments)
        marks.mkdir(exist_ok=True)
        (marks / os.environ["RANK"]).touch()
        while len(list(marks.iterdir())) < ranks:
            time.sleep(0.02)
        path.write_bytes(content)
        return corpus

    setup.open_corpus = open_and_damage  # type: ignore[assignment]
    try:
        return run_and_listen(config, *overrides)
    finally:
        setup.open_corpus = original
        (marks / os.environ["RANK"]).unlink()


def run_without_sockets(config: str, *overrides: str) -> Ended:
    """`run_and_listen` where the second rank's machine has no folder for its loader's sockets."""
    if os.environ["RANK"] == "1":
        tempfile.tempdir = "/nowhere/" + "x" * 80
        multiprocessing.current_process()._config["tempdir"] = None  # type: ignore[attr-defined]
        tempfile.mkdtemp = lambda **options: os.stat("/nowhere")  # type: ignore[assignment]
    return run_and_listen(config, *overrides)


def run_signalled(number: int, at: dict[int, int], config: str, *overrides: str) -> Ended:
    """`run_and_listen`, with signal `number` to this process while it computes step at[rank], if its rank is there."""
    rank = int(os.environ["RANK"])
    if rank in at:
        before_step(at[rank], lambda _: os.kill(os.getpid(), number))
    return run_and_listen(config, *overrides)


def run_killed(step: int, config: str, *overrides: str) -> int:
    """`run`, ended by SIGKILL as step `step` begins."""
    before_step(step, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    return run(config, *overrides)


def before_step(step: int, action: Callable[[Trainer], object]) -> None:
    """From now on this process calls `action(trainer)` just before the trainer computes step `step`, counted from 1."""
    original = Trainer.run

    def run(self: Trainer) -> int:
        take = self.train_step

        def train_step(batch: StepBatch, number: int) -> StepOutcome:
            if number == step:
                action(self)
            return take(batch, number)

        self.train_step = train_step  # type: ignore[assignment]
        return original(self)

    Trainer.run = run  # type: ignore[method-assign]


def limit_of_a_second(trainer: Trainer) -> None:
    """Called by `before_step`: this step, and those after it, may take a second."""
    [watchdog] = [policy for policy in trainer.policies if isinstance(policy, Watchdog)]
    watchdog._config = dataclasses.replace(watchdog._config, step_timeout=1.0)
    watchdog.after_step(trainer.step, OUTCOME)


def run_killed_loader(rank: int, step: int, config: str, *overrides: str) -> Ended:
    """`run_and_listen`, with SIGKILL to rank `rank`'s loader processes as step `step` begins."""

    def kill(trainer: Trainer) -> None:
        for loader in trainer.loader._processes:
            loader.process.kill()

    if int(os.environ["RANK"]) == rank:
        before_step(step, kill)
    return run_and_listen(config, *overrides)
