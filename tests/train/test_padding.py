"""Runs whose sequences have padding (data.packing = "best_fit")."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from swamla_titan.config import load_config
from swamla_titan.data import IGNORED, BatchLoader, Shape, open_corpus
from swamla_titan.model import SWAMLAModel
from tests.distributed.job import run
from tests.distributed.ranks import on_ranks
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, train

BEST_FIT = (
    *("--data.packing", "best_fit", "--data.document_mask", "true", "--data.num_workers", "0"),
    *("--lr_schedule.warmup_steps", "0", "--lr_schedule.min_lr_ratio", "1", "--validation.interval", "0"),
)


def test_the_loss_is_the_mean_over_the_targets_of_the_global_batch(tiny: Path, tmp_path: Path):
    """Recomputed from the initial weights and the first batch; nor does it depend on how micro-batches cut it."""
    one = (*BEST_FIT, "--model.dropout", "0", "--training.steps", "1")
    for size in ("1", "2", "5"):
        assert train(tiny, *one, "--training.local_batch_size", size, "--job.dump_folder", str(tmp_path / size)) == 0
    config = load_config(tmp_path / "5" / "config.toml")
    model = SWAMLAModel(config.model)
    model.init_weights(config.job.seed)
    corpus = open_corpus(config.data, config.validation, config.job.seed)
    with BatchLoader(corpus, [Shape(0, 5, 64)]) as loader:
        batch = next(loader)
    assert (batch.targets == IGNORED).any()
    logits = model(batch.tokens, document_ids=batch.document_ids).flatten(0, 1)
    expected = cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED).item()
    for size in ("1", "2", "5"):
        assert metrics(tmp_path / size) == {1: pytest.approx(expected, rel=1e-6)}
        assert metrics(tmp_path / size, "padding") == {1: int((batch.targets == IGNORED).sum()) / (5 * 64)}


@pytest.mark.slow
def test_a_run_resumed_twice_is_the_same_bit_for_bit(tiny: Path, tmp_path: Path):
    def trained(name: str, steps: int) -> Path:
        where = ("--job.dump_folder", str(tmp_path / name), "--training.steps", str(steps))
        assert train(tiny, *BEST_FIT, *where) == 0
        return tmp_path / name

    whole = trained("whole", 9)
    for steps in (3, 7, 9):
        resumed = trained("resumed", steps)
    assert_same_checkpoint(checkpoint(resumed, 9), checkpoint(whole, 9))
    assert metrics(resumed) == metrics(whole)
    assert metrics(resumed, "padding") == metrics(whole, "padding")


@pytest.mark.parametrize(
    "ranks, plan",
    [
        pytest.param(3, (), marks=pytest.mark.slow),
        pytest.param(2, ("--parallel.context", "2"), marks=pytest.mark.slow),
        pytest.param(2, ("--parallel.tensor", "2"), marks=pytest.mark.slow),
        pytest.param(2, ("--parallel.pipeline", "2"), marks=pytest.mark.slow),
    ],
)
def test_several_ranks_count_the_targets_of_all(tiny: Path, tmp_path: Path, ranks: int, plan: tuple[str, ...]):
    few = (*BEST_FIT, "--model.dropout", "0", "--training.steps", "4", *plan)
    assert set(on_ranks(ranks, run, str(tiny), *few)) == {0}
    alone = (*few[: len(few) - len(plan)], "--job.dump_folder", str(tmp_path / "alone"))
    assert train(tiny, *alone) == 0
    assert metrics(tmp_path / "run") == pytest.approx(metrics(tmp_path / "alone"), rel=1e-5)
    assert metrics(tmp_path / "run", "padding") == metrics(tmp_path / "alone", "padding")
    assert torch.tensor(list(metrics(tmp_path / "run", "grad_norm").values())).isfinite().all()
