"""The cases of [checkpoint]: when it is written, what is kept, what may differ."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from swamla_titan.checkpoint import store as checkpoint_module
from swamla_titan.checkpoint.store import Checkpoints
from tests.config.runner import SHORT, Runner
from tests.train.runs import checkpoint, train


def interval(run: Runner) -> None:
    settings = ("--training.steps", "5", "--checkpoint.keep_latest", "0", "--checkpoint.interval")
    assert run(*settings, "2").files("checkpoints/*") == [f"checkpoints/step-0000000{i}" for i in (2, 4, 5)]
    assert run(*settings, "9").files("checkpoints/*") == ["checkpoints/step-00000005"]


def keep_latest(run: Runner) -> None:
    settings = ("--training.steps", "5", "--checkpoint.interval", "1", "--checkpoint.keep_latest")
    assert len(run(*settings, "0").files("checkpoints/*")) == 5
    assert run(*settings, "2").files("checkpoints/*") == [f"checkpoints/step-0000000{i}" for i in (4, 5)]


def keep_every(run: Runner) -> None:
    settings = ("--training.steps", "5", "--checkpoint.interval", "1", "--checkpoint.keep_latest", "1")
    for every, left in (("0", [5]), ("2", [2, 4, 5]), ("5", [5])):
        found = run(*settings, "--checkpoint.keep_every", every).files("checkpoints/*")
        assert found == [f"checkpoints/step-0000000{step}" for step in left]


def async_mode(run: Runner) -> None:
    """Which thread writes: the last one is waited for."""
    writers: dict[int, str] = {}
    save = Checkpoints.save

    def listen(self, tensors, state, files):
        writers[state.step] = threading.current_thread().name
        return save(self, tensors, state, files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", listen)
        for mode, thread in (("async", "checkpoint"), ("disabled", "MainThread")):
            run("--checkpoint.interval", "1", "--checkpoint.async_mode", mode)
            assert writers == {1: thread, 2: thread, 3: "MainThread"}


def max_failures(run: Runner) -> None:
    """The disk takes nothing before step 4."""
    commit = checkpoint_module.commit

    def fail(temporary: Path, final: Path, known):
        if final.name < "step-00000004":
            raise OSError(28, "No space left on device")
        return commit(temporary, final, known)

    settings = ("--training.steps", "5", "--checkpoint.interval", "1", "--checkpoint.max_failures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "commit", fail)
        assert run(*settings, "4").files("checkpoints/*") == [f"checkpoints/step-0000000{i}" for i in (4, 5)]
        folder = run.with_faults((), 1, *settings, "3")
        assert list((folder / "checkpoints").iterdir()) == []


def allow(run: Runner) -> None:
    first = run()
    other = (
        *SHORT,
        "--job.dump_folder",
        str(first.folder),
        "--training.steps",
        "4",
        "--training.global_batch_size",
        "4",
    )
    assert train(run.config, *other) == 2
    assert train(run.config, *other, "--checkpoint.allow", "data") == 2
    assert train(run.config, *other, "--checkpoint.allow", "data, batch") == 0
    assert checkpoint(first.folder, 4).exists()
    refused = run.refusal("--checkpoint.allow", "model, date")
    assert 'allow = "model, date": expected one or more of model, data, tokenizer, batch, separated by' in refused
    assert "did you mean `data`?" in refused


def initial_load(run: Runner) -> None:
    first = run()
    unmoved = ("--optimizer.lr", "0", "--training.steps", "1", "--job.seed", "1")
    drawn, loaded = (run(*unmoved, *more).weights(1) for more in ((), ("--checkpoint.initial_load", str(first.folder))))
    for name, weight in first.weights().items():
        assert torch.equal(weight, loaded[name])
    assert not torch.equal(drawn["model.embedding.weight"], loaded["model.embedding.weight"])


def initial_load_state(run: Runner) -> None:
    first = run()
    source = ("--checkpoint.initial_load", str(first.folder), "--training.steps", "4")
    states = ("weights", "weights_and_optimizer", "all")
    runs = {state: run(*source, "--checkpoint.initial_load_state", state) for state in states}
    assert [len(each.series()) for each in runs.values()] == [4, 4, 1]
    name = "optimizer.state.embedding.weight.step"
    assert [float(each.tensors(4)[name]) for each in runs.values()] == [4, 7, 4]


CHECKPOINT_CASES: dict[str, Callable[[Runner], None]] = {
    "checkpoint.interval": interval,
    "checkpoint.keep_latest": keep_latest,
    "checkpoint.keep_every": keep_every,
    "checkpoint.async_mode": async_mode,
    "checkpoint.max_failures": max_failures,
    "checkpoint.allow": allow,
    "checkpoint.initial_load": initial_load,
    "checkpoint.initial_load_state": initial_load_state,
}
