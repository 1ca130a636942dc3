"""A rank's place among the others."""

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from swamla_titan.config import Override, load_config, with_vocabulary
from swamla_titan.config.sections import Parallel
from swamla_titan.data import MicroBatch
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.parallel.model_parts import ParallelModel
from tests.distributed.ranks import on_ranks


def _sum(parallel: Parallel) -> float:
    world = init_distributed(parallel)
    return world.all_reduce_loss(torch.tensor(1.0 + world.rank)).item()


def test_sums_are_over_the_ranks_that_computed_different_tokens():
    assert on_ranks(4, _sum, Parallel(context=2)) == [10.0] * 4
    assert on_ranks(4, _sum, Parallel(tensor=2)) == [4.0, 6.0] * 2  # a tensor-parallel group computes the same ones


def _slices_of_a_step(path: Path, overrides: list[Override]) -> int:
    config = with_vocabulary(load_config(path, overrides), 257)
    model = ParallelModel(config, init_distributed(config.parallel))
    model.init_weights(0)
    tokens = torch.zeros(1, config.training.seq_len, dtype=torch.int64)
    sliced = []
    take = DeviceMesh.__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceMesh, "__getitem__", lambda mesh, name: (sliced.append(name), take(mesh, name))[1])
        model.train_step([MicroBatch(tokens, tokens, None, 1)], 64.0)
        model.gradient_norm()
        model.evaluate([MicroBatch(tokens, tokens, None, 1)])
    return len(sliced)


def test_a_step_slices_no_mesh(tiny):
    """Each slice costs the host a tenth of a millisecond."""
    overrides = [Override("parallel", "tensor", "2")]
    assert on_ranks(4, _slices_of_a_step, tiny, overrides) == [0] * 4
