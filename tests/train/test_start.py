"""What a start sets going beside itself."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from swamla_titan.errors import UserError
from swamla_titan.train import setup
from tests.train.runs import train

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


def test_helpers_start_before_the_data_are_opened(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    for name in ("prepare_workers", "warm_compiler", "open_data"):
        real = getattr(setup, name)

        def listen(*arguments: Any, name: str = name, real: Any = real) -> Any:
            order.append(name)
            return real(*arguments)

        monkeypatch.setattr(setup, name, listen)
    assert train(tiny, *SETTINGS, "--job.dump_folder", str(tmp_path / "run")) == 0
    assert order == ["prepare_workers", "warm_compiler", "open_data"]


def test_a_finished_run_starts_no_reader(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = (*SETTINGS, "--job.dump_folder", str(tmp_path / "run"))
    assert train(tiny, *settings) == 0
    monkeypatch.setattr(setup.BatchLoader, "start", lambda _: pytest.fail("reads data that nobody asks for"))
    assert train(tiny, *settings) == 0
