"""Optimizers on two GPUs: shards of weights over NCCL, and weights and moments that the host keeps."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.job import run
from tests.distributed.ranks import on_ranks
from tests.distributed.test_ema import COMMON, written
from tests.distributed.test_optimizers import SETTINGS, assert_same_steps, moved_by_each
from tests.train.runs import checkpoint, metrics, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_two_gpus_take_the_steps_of_one():
    [expected] = on_ranks(1, moved_by_each, list(SETTINGS), {})
    assert_same_steps(on_ranks(2, moved_by_each, list(SETTINGS), {}), expected)


OFFLOADED = ("--parallel.cpu_offload", "true")
MOVED_BY = {
    "adamw": (),
    "lion": ("--optimizer.name", "lion"),
    "adamw-bfloat16": ("--optimizer.moments", "bfloat16", "--optimizer.beta2", "0.95"),
}
LR, STEPS = 3e-3, 4  # of COMMON


@pytest.mark.parametrize("settings", MOVED_BY)
def test_what_the_host_keeps_moves_as_on_the_gpus(tmp_path: Path, settings: str):
    """Weights, moments and the average of weights, which validates, over steps of several micro-batches."""
    config, on_gpus = written(tmp_path), tmp_path / "gpus"
    same = (*COMMON, *MOVED_BY[settings], "--training.fp32_precision", "ieee")
    assert on_ranks(2, run, config, *same, "--job.dump_folder", str(on_gpus)) == [0, 0]
    assert on_ranks(2, run, config, *same, *OFFLOADED) == [0, 0]
    for name in ("loss", "grad_norm", "val_loss"):
        assert metrics(tmp_path / "run", name) == pytest.approx(metrics(on_gpus, name), rel=1e-3), name
    found, expected = (tensors(checkpoint(folder, STEPS)) for folder in (tmp_path / "run", on_gpus))
    kept = {name for name in expected if name.startswith(("model.", "ema.", "optimizer."))}
    assert kept <= found.keys()
    assert any(expected[name].dtype == torch.bfloat16 for name in kept) == (settings == "adamw-bfloat16")
    for name in kept:
        assert found[name].dtype == expected[name].dtype
        assert_near(found[name].float(), expected[name].float(), is_moment=name.startswith("optimizer."))


def assert_near(found: Tensor, expected: Tensor, is_moment: bool) -> None:
    """But for the few weights of which a rounding tips the sign of a step."""
    off = (found - expected).abs()
    if is_moment:
        assert off.max() <= 0.01 * expected.abs().max()
    else:
        assert off.max() <= 2 * LR * STEPS
        assert (off > LR / 10).sum() <= 1e-3 * off.numel() + 1
