"""Running out of a device's memory: what the user reads, and what is written."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swamla_titan.config import Config
from swamla_titan.config.sections import ActivationCheckpoint, Parallel, Training
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import RankFailed
from swamla_titan.train.run import explained_out_of_memory, is_out_of_memory, out_of_memory_message
from tests.distributed.job import before_step
from tests.train.runs import train

TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is "
    "free. Including non-PyTorch memory, this process has 78.11 GiB memory in use. See documentation"
)
BEST = Config(
    training=Training(local_batch_size=1),
    activation_checkpoint=ActivationCheckpoint(mode="full"),
    parallel=Parallel(reshard_after_forward="always", cpu_offload=True),
)
ADVISED = lambda config, world: ['optimizer.name = "lion": saves 1 GiB']  # noqa: E731
TWO_GPUS = dataclasses.replace(World.alone(torch.device("cuda", 0)), size=2)


def test_the_message_has_what_torch_said_and_how_full_the_device_is(monkeypatch):
    gib = 2**30
    for name, value in {
        "mem_get_info": (gib, 79 * gib),
        "memory_allocated": 60 * gib,
        "memory_reserved": 77 * gib,
        "max_memory_allocated": 65 * gib,
        "get_device_name": "a GPU",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    text = out_of_memory_message(torch.OutOfMemoryError(TORCH_SAYS), BEST, TWO_GPUS, ADVISED)
    lines = text.splitlines()
    assert lines[0].startswith("rank 0 ran out of memory: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
    assert "documentation" not in text
    assert lines[1] == "a GPU: 79.0 GiB, 1.0 free; tensors take 60.0 (peak 65.0), torch keeps 17.0 more."
    assert "expandable_segments" in lines[2]
    assert lines[4] == '  - optimizer.name = "lion": saves 1 GiB'
    assert lines[5].startswith("  - a smaller model")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 61 * gib)
    assert "expandable_segments" not in out_of_memory_message(
        torch.OutOfMemoryError(TORCH_SAYS), BEST, TWO_GPUS, ADVISED
    )


def test_where_nothing_can_be_counted_the_message_comes_all_the_same():
    def broken(*_: object) -> list[str]:
        raise OSError("no process")

    text = out_of_memory_message(torch.OutOfMemoryError(TORCH_SAYS), BEST, World.alone(), broken)
    assert text.startswith("rank 0 ran out of memory: CUDA out of memory.")
    assert "  - a smaller training.local_batch_size, activation_checkpoint.mode" in text


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError(TORCH_SAYS), True),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
    ids=["allocator", "CUDA", "other", "no runtime error"],
)
def test_only_want_of_memory_is_explained(tmp_path, error, expected):
    assert is_out_of_memory(error) == expected
    with (
        pytest.raises(RankFailed if expected else type(error)) as raised,
        explained_out_of_memory(lambda: BEST, World.alone(), tmp_path / "traces", ADVISED),
    ):
        raise error
    assert (tmp_path / "traces/oom-rank-0.txt").exists() == expected
    assert (raised.value is error) == (not expected)


def test_the_table_of_the_allocator_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda device: f"the table of {device}")
    monkeypatch.setattr("swamla_titan.train.run._essentials", lambda device: "")
    with (
        pytest.raises(RankFailed, match=r"oom-rank-0\.txt"),
        explained_out_of_memory(lambda: BEST, TWO_GPUS, tmp_path, ADVISED),
    ):
        raise torch.OutOfMemoryError(TORCH_SAYS)
    assert (tmp_path / "oom-rank-0.txt").read_text() == f"{TORCH_SAYS}\n\nthe table of cuda:0\n"


def test_where_the_table_cannot_be_written_the_message_says_so(tmp_path):
    (tmp_path / "traces").touch()
    with (
        pytest.raises(RankFailed, match=r"oom-rank-0.txt could not be written \(File exists\)"),
        explained_out_of_memory(lambda: BEST, World.alone(), tmp_path / "traces", ADVISED),
    ):
        raise torch.OutOfMemoryError(TORCH_SAYS)


def test_a_run_out_of_memory_ends_with_1_and_a_message(tiny: Path, tmp_path: Path, capsys, monkeypatch):
    from swamla_titan.train.trainer import Trainer

    monkeypatch.setattr(Trainer, "run", Trainer.run)  # put back afterwards

    def fail(_: object) -> None:
        raise torch.OutOfMemoryError(TORCH_SAYS)

    before_step(2, fail)
    assert train(tiny, "--data.num_workers", "0", "--validation.interval", "0") == 1
    err = capsys.readouterr().err
    assert err.startswith("failed: rank 0 ran out of memory: CUDA out of memory. Tried to allocate 20.00 GiB. ")
    assert "  - training.local_batch_size = 1: saves " in err
    assert '  - activation_checkpoint.mode = "selective": saves ' in err
    assert "Traceback" not in err
    assert (tmp_path / "run/traces/oom-rank-0.txt").read_text().startswith(TORCH_SAYS)


@pytest.mark.gpu
def test_a_gpu_that_is_full_ends_the_run_with_what_each_change_saves(tiny: Path):
    large = ("--model.dim", "1024", "--model.num_heads", "8", "--model.max_seq_len", "2048", "--model.dropout", "0")
    batch = ("--training.seq_len", "2048", "--training.local_batch_size", "64", "--training.global_batch_size", "64")
    arguments = ["train", str(tiny), *large, *batch, "--job.deterministic", "false", "--validation.interval", "0"]
    # In a process of its own: cuDNN, refused memory, leaves its process unable to launch anything.
    program = (
        "import sys, torch; from swamla_titan.cli import main; "
        f"torch.cuda.set_per_process_memory_fraction(0.02); sys.exit(main({arguments!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert "failed: rank 0 ran out of memory: CUDA out of memory." in ended.stderr
    assert re.search(r"  - training\.local_batch_size = 32: saves [0-9.]+ GiB; ", ended.stderr)
