"""Whatever number of ranks there are, and whenever it changes: the same global batch for a step, and the same loss."""

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from swamla_titan.data import StepBatch
from swamla_titan.train import run as module
from swamla_titan.train.step import StepOutcome, TrainStep
from swamla_titan.train.trainer import Trainer
from tests.distributed.job import run_and_listen, run_signalled
from tests.distributed.ranks import on_ranks
from tests.distributed.test_reshard import COMMON, ODD, assert_close, finished, undisturbed, written
from tests.tiny_config import tiny_config
from tests.train.runs import checkpoint

BATCH = 5  # of COMMON, with 7 streams: no number of ranks divides either
Rows = dict[int, dict[int, str]]


def run_digested(at: dict[int, int], config: str, *overrides: str) -> tuple[int, Rows]:
    """`run_signalled` with SIGTERM; also step -> number of a sequence -> digest of it, of what this rank trained on."""
    rows: Rows = {}
    original = TrainStep.__call__

    def train_step(self: TrainStep, batch: StepBatch, step: int) -> StepOutcome:
        columns = [batch.tokens, batch.targets] + ([] if batch.document_ids is None else [batch.document_ids])
        digests = [hashlib.sha256(b"".join(c[i].numpy().tobytes() for c in columns)) for i in range(len(batch.tokens))]
        rows[step - 1] = {int(n): digest.hexdigest() for n, digest in zip(batch.sequences, digests)}
        return original(self, batch, step)

    TrainStep.__call__ = train_step  # type: ignore[method-assign]
    try:
        return run_signalled(signal.SIGTERM, at, config, *overrides).code, rows
    finally:
        TrainStep.__call__ = original  # type: ignore[method-assign]


def global_batches(ranks: list[Rows], data_ranks: int) -> dict[int, str]:
    """step -> digest of the global batch: every sequence that belongs to it, once, and no other."""
    found = {}
    for step in ranks[0]:
        together: dict[int, str] = {}
        for rank in ranks:
            together |= rank[step]
        assert sorted(together) == list(range(step * BATCH, (step + 1) * BATCH))
        assert sum(len(rank[step]) for rank in ranks) == BATCH * len(ranks) // data_ranks
        found[step] = hashlib.sha256("".join(together[number] for number in sorted(together)).encode()).hexdigest()
    return found


@pytest.mark.parametrize("sizes", [(3,), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_every_number_of_ranks_has_the_same_global_batches(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    plans: dict[str, tuple[int, tuple[str, ...]]] = {"1": (1, ())} | {str(size): (size, ()) for size in sizes}
    plans |= {"workers": (2, ("--data.num_workers", "1"))} if len(sizes) == 1 else {}
    plans |= {"tensor 2": (4, ("--parallel.tensor", "2"))} if len(sizes) > 1 else {}
    steps = ("--training.steps", "5", "--data.document_mask", "true")
    found = {}
    for name, (size, plan) in plans.items():
        folder = ("--job.dump_folder", str(tmp_path / name))
        ended = on_ranks(size, run_digested, {}, written(tmp_path), *COMMON, *steps, *folder, *plan)
        assert [code for code, _ in ended] == [0] * size
        found[name] = global_batches([rows for _, rows in ended], 2 if name == "tensor 2" else size)
    assert len(set(found["1"].values())) == 5
    for name in plans:
        assert found[name] == found["1"], name
    other = on_ranks(1, run_digested, {}, written(tmp_path), *COMMON, *steps, "--job.seed", "1")
    assert set(global_batches([other[0][1]], 1).values()).isdisjoint(found["1"].values())


@pytest.mark.parametrize("sizes", [pytest.param((4, 2, 3), marks=pytest.mark.slow), (3, 2)], ids=str)
def test_stopped_and_resumed_on_other_numbers_of_ranks_it_equals_one_process(tmp_path: Path, sizes: tuple[int, ...]):
    """With dimensions that do not divide either. SIGTERM to the last rank alone stops a leg, after five steps each."""
    settings = (*COMMON, *ODD, "--training.steps", str(5 * len(sizes)))
    batches: dict[int, str] = {}
    for leg, size in enumerate(sizes, 1):
        last = leg == len(sizes)
        at = {} if last else {size - 1: 5 * leg}
        ended = on_ranks(size, run_digested, at, written(tmp_path), *settings)
        assert [code for code, _ in ended] == [0 if last else 75] * size
        assert checkpoint(tmp_path / "run", 5 * leg).is_dir()
        new = global_batches([rows for _, rows in ended], size)
        assert batches.keys().isdisjoint(new)  # nothing twice
        batches |= new
    alone = on_ranks(1, run_digested, {}, written(tmp_path), *settings, "--job.dump_folder", str(tmp_path / "alone"))
    assert batches == global_batches([alone[0][1]], 1)

    curves, state, record = finished(tmp_path, 5 * len(sizes))
    expected_curves, expected_state, expected_record = undisturbed(5 * len(sizes), *ODD)
    for name, values in expected_curves.items():
        # A leg that is stopped validates at its last step, as the others do.
        assert curves[name] == pytest.approx(values, rel=1e-5), name
    assert record == expected_record
    assert_close(state, expected_state, 1e-4)


# signals that come before the first step


def _signalled_in(where: str, config: str, *overrides: str):
    """SIGTERM to rank 1 alone as it comes to `where`; the launcher knows nothing of it."""
    if os.environ["RANK"] == "1":
        original = module.build_trainer

        def build(*arguments: Any) -> Trainer:
            if where == "before":
                os.kill(os.getpid(), signal.SIGTERM)
            trainer = original(*arguments)
            if where == "after":
                os.kill(os.getpid(), signal.SIGTERM)
            return trainer

        module.build_trainer = build
    return run_and_listen(config, *overrides)


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_signal_to_one_rank_during_the_start_ends_all_with_75_and_no_step_is_taken(tmp_path: Path, where: str):
    config = tiny_config(tmp_path)
    ended = on_ranks(2, _signalled_in, where, str(config), "--data.num_workers", "0")
    assert [each.code for each in ended] == [75, 75], ended
    assert not any("Traceback" in each.err for each in ended)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
