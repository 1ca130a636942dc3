"""What a start sets going beside itself."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swamla_titan.errors import UserError
from swamla_titan.train import setup
from tests.train.runs import train
from tests.waiting import HANG

SETTINGS = ("--data.num_workers", "1", "--validation.interval", "0", "--training.steps", "1")


def readers() -> list[int | None]:
    return [process.pid for process in multiprocessing.active_children()]


def test_data_is_read_while_the_model_is_made_and_a_refused_start_leaves_no_reader(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = []

    def refuse(*_: Any) -> None:
        found.extend(readers())
        raise UserError("no model today")

    monkeypatch.setattr(setup, "RunState", refuse)
    before = readers()
    assert train(tiny, *SETTINGS, "--job.dump_folder", str(tmp_path / "run")) == 2
    assert len(found) == len(before) + 1
    assert readers() == before
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_compiler_starts_first_and_readers_before_the_data_are_opened(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    for name in ("prepare_workers", "warm_compiler", "validate", "open_data"):
        real = getattr(setup, name)

        def listen(*arguments: Any, name: str = name, real: Any = real) -> Any:
            order.append(name)
            return real(*arguments)

        monkeypatch.setattr(setup, name, listen)
    assert train(tiny, *SETTINGS, "--job.dump_folder", str(tmp_path / "run")) == 0
    assert order == ["warm_compiler", "validate", "prepare_workers", "open_data"]


# As on a GPU, and then what a machine refuses. torch's own start of the pool looks for a GPU's compiler.
REFUSED = """
import sys
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile, _pool_set
from swamla_titan.cli import main
from swamla_titan.system.process import end_process
from swamla_titan.train import setup

def start_pool(*_):
    config.compile_threads = 2
    AsyncCompile.warm_pool()
    AsyncCompile.wakeup()
    print("pools", len(_pool_set))

setup.warm_compiler = start_pool
end_process(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_refused_start_leaves_none_of_the_compilers_processes(tiny: Path, tmp_path: Path):
    command = (
        "train",
        str(tiny),
        *SETTINGS,
        "--kernels.elementwise",
        "triton",
        "--job.dump_folder",
        str(tmp_path / "run"),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", REFUSED, *command],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said, complaint = process.communicate(timeout=HANG)
    assert process.returncode == 2, complaint
    assert "pools 1\n" in said
    assert 'kernels.elementwise = "triton" needs a GPU' in complaint
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_finished_run_starts_no_reader(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = (*SETTINGS, "--job.dump_folder", str(tmp_path / "run"))
    assert train(tiny, *settings) == 0
    monkeypatch.setattr(setup.BatchLoader, "start", lambda _: pytest.fail("reads data that nobody asks for"))
    assert train(tiny, *settings) == 0
