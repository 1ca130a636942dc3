"""Checkpoints in the background of a job: what befalls the disk of one rank is decided by all, and training goes on."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from swamla_titan.checkpoint import manifest
from swamla_titan.checkpoint.async_save import Staging
from tests.distributed.job import Ended, before_step, run, run_and_listen, run_killed
from tests.distributed.ranks import init_gloo, on_ranks
from tests.tiny_config import tiny_config
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics

SETTINGS = (
    *("--training.steps", "10", "--data.num_workers", "0", "--validation.interval", "0"),
    *("--checkpoint.interval", "2", "--checkpoint.keep_latest", "0", "--checkpoint.max_failures", "2"),
)


def _run_with_a_full_disk(steps: tuple[int, ...], config: str, *overrides: str) -> Ended:
    """Train; the last rank cannot read back what it wrote for the checkpoints of these steps."""
    digest = manifest._digest

    def full(path: Path, kind: str) -> str:
        if path.parent.name in {f".tmp-step-{step:08d}" for step in steps} and path.suffix == ".distcp":
            raise OSError(5, "Input/output error")
        return digest(path, kind)

    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            patch.setattr(manifest, "_digest", full)
        return run_and_listen(config, *overrides)


@pytest.mark.parametrize(
    "plan",
    [
        (),
        pytest.param(("--parallel.tensor", "2"), marks=pytest.mark.slow),
        pytest.param(("--parallel.data_parallel", "ddp"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_disk_that_fails_one_rank_for_a_while_costs_a_job_only_those_checkpoints(tmp_path, plan):
    config = tiny_config(tmp_path)
    whole = ("--job.dump_folder", str(tmp_path / "whole"))
    for ended in on_ranks(2, _run_with_a_full_disk, (), str(config), *SETTINGS, *plan, *whole):
        assert ended.code == 0, ended.err
    ended = on_ranks(2, _run_with_a_full_disk, (4,), str(config), *SETTINGS, *plan)
    assert [each.code for each in ended] == [0, 0], ended[0].err
    assert (ended[0].out + ended[0].err).count("step-00000004 could not be written ([Errno 5] Input/output error)") == 1
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == [f"step-{step:08d}" for step in (2, 6, 8, 10)]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    for step in (6, 10):
        assert_same_checkpoint(checkpoint(tmp_path / "run", step), checkpoint(tmp_path / "whole", step))


def test_a_disk_that_goes_on_failing_one_rank_ends_all_with_1(tmp_path):
    config = tiny_config(tmp_path)
    ended = on_ranks(2, _run_with_a_full_disk, (4, 6, 8, 10), str(config), *SETTINGS)
    assert [each.code for each in ended] == [1, 1]
    assert "step-00000006 could not be written" in ended[0].err
    assert "consecutive failure 2" in ended[0].err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def _staged() -> list[bool]:
    """Of a sharded tensor: is its copy sharded likewise, on the host, of the moment, and apart from it?"""
    _, size = init_gloo()
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(14.0).view(7, 2)  # does not divide
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    copy = Staging(torch.device("cpu")).copy({"model": {"weight": sharded}})["model"]["weight"]
    sharded.to_local().add_(1)
    return [
        isinstance(copy, DTensor),
        copy.placements == sharded.placements,
        copy.device_mesh == mesh,
        copy.shape == whole.shape,
        torch.equal(copy.full_tensor(), whole),
        torch.equal(sharded.full_tensor(), whole + 1),
    ]


@pytest.mark.parametrize("size", [2, 3])
def test_a_copy_is_sharded_as_its_tensor_is(size):
    assert on_ranks(size, _staged) == [[True] * 6] * size


# A step of this model takes as long as the copy of its tensors from a GPU.
ON_GPUS = (
    *("--model.dim", "1024", "--model.num_heads", "8", "--compile.enabled", "true"),
    *("--training.compute_dtype", "bfloat16", "--training.steps", "10", "--data.num_workers", "0"),
    *("--validation.interval", "0", "--checkpoint.interval", "2", "--checkpoint.keep_latest", "0"),
)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "plan",
    [(), ("--parallel.data_parallel", "ddp"), ("--parallel.tensor", "2"), ("--parallel.cpu_offload", "true")],
    ids=str,
)
def test_on_gpus_checkpoints_beside_the_next_steps_hold_the_moment_and_a_killed_job_goes_on_as_if_undisturbed(
    tmp_path, plan
):
    config = tiny_config(tmp_path)
    whole = ("--job.dump_folder", str(tmp_path / "whole"), "--checkpoint.async_mode", "disabled")
    assert on_ranks(2, run, str(config), *ON_GPUS, *plan, *whole) == [0, 0]
    with pytest.raises(AssertionError, match="died"):
        on_ranks(2, run_killed, 8, str(config), *ON_GPUS, *plan)
    assert on_ranks(2, run, str(config), *ON_GPUS, *plan) == [0, 0]
    assert "resumed from" in (tmp_path / "run/logs/rank-0.log").read_text()
    for step in (2, 4, 6, 8, 10):
        assert_same_checkpoint(checkpoint(tmp_path / "run", step), checkpoint(tmp_path / "whole", step))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def _run_and_lose_the_folder(step: int, run_folder: str, config: str, *overrides: str) -> Ended:
    if os.environ["RANK"] == "0":
        before_step(step, lambda _: shutil.rmtree(run_folder))
    return run_and_listen(config, *overrides)


@pytest.mark.parametrize("interval", ["1", pytest.param("1000", marks=pytest.mark.slow)])
def test_a_job_whose_folder_is_removed_ends_on_all_ranks_with_one_message(tmp_path, interval):
    config = tiny_config(tmp_path)
    logged = ("--metrics.log_interval", interval, "--checkpoint.async_mode", "disabled")
    ended = on_ranks(2, _run_and_lose_the_folder, 4, str(tmp_path / "run"), str(config), *SETTINGS, *logged)
    assert [each.code for each in ended] == [1, 1], ended[0].out + ended[0].err
    assert [each.err.count("was removed, moved or taken by another run") for each in ended] == [1, 0]
    assert not (tmp_path / "run").exists()
