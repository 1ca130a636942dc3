"""A worker's side of the launcher, and the check before the workers start, each in this process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swamla_titan.config import find_config
from swamla_titan.config.sections import Parallel
from swamla_titan.errors import UserError
from swamla_titan.launch import worker as launcher
from swamla_titan.launch.preflight import main as preflight
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.launch.ranks import (
    FOLDER,
    RANK_VARIABLES,
    RESTART_COUNT,
    RankInfo,
    foreign_variables,
    logs_to_console,
    rank_info,
)
from swamla_titan.launch.signals import StopRequest
from swamla_titan.launch.worker import (
    FORWARDED,
    acknowledge_stop,
    exit_through_launcher,
    re_rendezvous,
    stop_requested,
)
from tests.train.runs import train


def set_place(monkeypatch: pytest.MonkeyPatch, **numbers: object) -> None:
    """What torchrun gives a worker."""
    given = {RESTART_COUNT: 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29400, "GROUP_WORLD_SIZE": 1}
    for name, value in (given | numbers).items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What scripts/torchrun.sh and torchrun give a worker; the signals are ignored as torchrun's are."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "3")
    before = {number: signal.signal(number, signal.SIG_IGN) for number in FORWARDED}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def raising(code: object) -> int:
    raise SystemExit(code)


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_a_process_alone_ends_with_its_own_code(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    assert exit_through_launcher(lambda: code) == code
    acknowledge_stop()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code, ends_with", [(0, 0), (1, 1), (2, 0), (75, 0)])
def test_what_must_not_be_restarted_ends_with_0_and_leaves_its_code(folder: Path, code: int, ends_with: int) -> None:
    assert exit_through_launcher(lambda: code) == ends_with
    assert (folder / "3.code").read_text() == str(code)
    assert (folder / "3.pid").read_text() == str(os.getpid())
    assert sorted(path.name for path in folder.iterdir()) == ["3.code", "3.pid"]


@pytest.mark.parametrize("code", [None, 0, 2, 75])
def test_a_code_that_is_raised_counts_as_one_returned(folder: Path, code: "int | None") -> None:
    assert exit_through_launcher(lambda: raising(code)) == 0
    assert (folder / "3.code").read_text() == str(code or 0)


def test_a_crash_stays_one_and_leaves_no_code(folder: Path) -> None:
    (folder / "3.code").write_text("75")  # of the worker before a restart
    with pytest.raises(ZeroDivisionError):
        exit_through_launcher(lambda: 1 // 0)
    with pytest.raises(SystemExit, match="a message"):
        exit_through_launcher(lambda: raising("a message"))
    assert not (folder / "3.code").exists()


def test_after_a_signal_to_the_launcher_no_worker_begins(folder: Path) -> None:
    (folder / "stop").write_text("TERM\n")
    assert exit_through_launcher(lambda: pytest.fail("began")) == 0
    assert (folder / "3.code").read_text() == "75"


def test_signals_work_again_in_the_worker_and_are_acknowledged(folder: Path) -> None:
    def main() -> int:
        assert all(signal.getsignal(number) == launcher.early_handler for number in FORWARDED)
        assert not (folder / "3.stopping").exists()  # that was the worker's before
        stop = StopRequest()
        stop.finish_step_first = True
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == signal.SIGUSR1
        stop.forget()
        return 75

    (folder / "3.stopping").touch()
    assert exit_through_launcher(main) == 0
    assert (folder / "3.stopping").exists()


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    set_place(monkeypatch, RANK=1, WORLD_SIZE=8, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4, GROUP_WORLD_SIZE=2)


@pytest.mark.parametrize("text, expected", [("USR1\n", signal.SIGUSR1), ("INT\n", signal.SIGINT), ("", signal.SIGTERM)])
@pytest.mark.usefixtures("two_machines")
def test_after_a_signal_to_the_launcher_a_worker_of_several_machines_begins_to_tell_the_others(
    folder: Path, text: str, expected: signal.Signals
) -> None:
    (folder / "stop").write_text(text)
    told = []

    def main() -> int:
        stop = StopRequest()
        told.append(stop.agreed(lambda own: own))
        stop.forget()
        return told[0].code

    assert exit_through_launcher(main) == 0
    assert told[0].reason == f"stopped by {expected.name}"
    assert (folder / "3.code").read_text() == "75"
    assert (folder / "3.stopping").exists()


@pytest.mark.usefixtures("two_machines")
def test_sigterm_while_torchrun_regroups_is_no_stop_and_leaves_the_users_signals_as_they_are(folder: Path) -> None:
    def main() -> int:
        stop = StopRequest()
        assert stop.agreed(lambda own: own) is None
        with re_rendezvous():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # no second signal
            asked = stop.agreed(lambda own: own)
            assert asked
            assert asked.code == 76
            assert not (folder / "3.stopping").exists()
            os.kill(os.getpid(), signal.SIGUSR1)  # the user's, at the same time
            assert (folder / "3.stopping").exists()
            asked = stop.agreed(lambda own: own)
            assert asked
            assert (asked.code, asked.reason) == (75, "stopped by SIGUSR1")
        stop.forget()
        return 0

    assert exit_through_launcher(main) == 0
    assert not (folder / "re-rendezvous").exists()


@pytest.mark.usefixtures("folder", "two_machines")
def test_where_only_another_rank_was_told_of_the_change_all_stop_for_it() -> None:
    stop = StopRequest()
    asked = stop.agreed(lambda own: max(own, 1.0))
    assert asked
    assert asked.code == 76
    asked = stop.agreed(lambda own: max(own, 1.0, float(signal.SIGINT)))  # a user's signal elsewhere comes first
    assert asked
    assert asked.reason == "stopped by SIGINT"
    stop.forget()


def test_a_worker_stopped_for_a_change_ends_when_its_torchrun_is_there_and_leaves_no_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(launcher.time, "sleep", waited.append)
    assert exit_through_launcher(lambda: 76) == 76
    assert waited == [launcher.AGENT_STOP_TIMEOUT]
    with re_rendezvous():
        assert exit_through_launcher(lambda: 76) == 76
    assert waited == [launcher.AGENT_STOP_TIMEOUT]
    assert sorted(path.name for path in folder.iterdir()) == ["3.pid"]


def test_without_a_launcher_there_is_no_folder_to_look_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    with re_rendezvous():
        assert stop_requested() is None
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "named, speaking",
    [(None, [0]), ("", [0]), ("0", [0]), ("2", [2]), ("1,2", [1, 2]), ("4", "0 to 2"), ("all", "expected numbers")],
)
def test_log_rank_names_those_who_speak(monkeypatch: pytest.MonkeyPatch, named: "str | None", speaking: object) -> None:
    monkeypatch.delenv("LOG_RANK", raising=False)
    if named is not None:
        monkeypatch.setenv("LOG_RANK", named)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert logs_to_console()  # started by hand
    found = []
    for rank in range(3):
        set_place(monkeypatch, RANK=rank, WORLD_SIZE=3, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=3)
        if isinstance(speaking, str):
            with pytest.raises(UserError, match=speaking):
                logs_to_console()
        elif logs_to_console():
            found.append(rank)
    assert isinstance(speaking, str) or found == speaking


@pytest.mark.parametrize("rank", range(3))
def test_too_few_gpus_are_refused_by_every_process_of_the_machine(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Also by those that would have one: they would wait for the others, and may be the ones that speak."""
    set_place(monkeypatch, RANK=rank, WORLD_SIZE=3, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="3 processes on this machine, but 2 GPUs"):
        init_distributed(Parallel())


@pytest.mark.parametrize(
    "processes, overrides, message",
    [
        ("4", "--parallel.dp_shard=3", "do not fit 4 processes"),
        ("2,4", "--parallel.tensor=3 --model.num_heads=3 --model.dim=96 --training.seq_len=63", "tensor: 3 ranks"),
        ("2,4", "--parallel.context=8 --training.seq_len=64", "do not fit 4 processes"),
        ("2", "--training.steps=0", "expected a whole number >= 1"),
        ("2", "--parallel.cpu_offload=true", "parallel.cpu_offload = true needs GPUs to offload from"),
        (
            "2",
            "--parallel.tensor=2 --parallel.async_tensor=true --compile.enabled=true",
            "parallel.async_tensor = true needs GPUs",
        ),
        ("2", "--help", "--help: not known; overrides are written --section.key value"),
    ],
)
def test_preflight_refuses(tiny: Path, capsys, processes: str, overrides: str, message: str) -> None:
    assert preflight([processes, "0", str(tiny), *overrides.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tiny.parent / "run").exists()


def test_preflight_asks_for_the_gpus(tiny: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert preflight(["4", "4", str(tiny)]) == 2
    assert "NGPU=4: torch sees 2 here; set NGPU=2, or NGPU=0" in capsys.readouterr().err
    assert preflight(["2", "2", str(tiny)]) == 0


def test_preflight_is_silent_where_one_number_of_processes_fits(tiny: Path, capsys) -> None:
    assert preflight(["1,2,3,4", "0", str(tiny), "--parallel.dp_shard", "3"]) == 0
    assert capsys.readouterr() == ("", "")


# variables of other launchers


GENUINE = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "GROUP_WORLD_SIZE": 2}


def test_the_place_that_torchrun_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    set_place(monkeypatch, **GENUINE)
    assert rank_info() == RankInfo(rank=5, size=8, local_rank=1, local_size=4, machines=2)
    assert foreign_variables() == []


@pytest.mark.parametrize(
    "left, named",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["WORLD_SIZE='2'"]),
        ({"WORLD_SIZE": "x\ny", "LOCAL_RANK": "3"}, ["WORLD_SIZE='x\\ny'", "LOCAL_RANK='3'"]),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, []),
        ({"WORLD_SIZE": ""}, []),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "4", "GROUP_RANK": "1"}, []),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, ["WORLD_SIZE='2'"]),
    ],
)
def test_what_another_launcher_left_counts_for_nothing_and_is_named(
    monkeypatch: pytest.MonkeyPatch, left: dict[str, str], named: list[str]
) -> None:
    for name in (RESTART_COUNT, *RANK_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert rank_info() == RankInfo()
    assert logs_to_console()
    assert foreign_variables() == named


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "8"}, "RANK=8, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4 fit no process"),
        ({"LOCAL_RANK": "4"}, "fit no process"),
        ({"LOCAL_WORLD_SIZE": "9"}, "fit no process"),
        ({"WORLD_SIZE": "1_0"}, "WORLD_SIZE is '1_0'"),
        ({"WORLD_SIZE": "\u0668"}, r"WORLD_SIZE is '\\u0668'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "port"}, "MASTER_PORT is 'port'"),
        ({"MASTER_PORT": "999999"}, "MASTER_PORT is '999999'"),
    ],
)
def test_torchruns_variables_that_make_no_sense_are_refused_with_what_to_unset(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, "str | None"], reason: str
) -> None:
    set_place(monkeypatch, **GENUINE)
    for name, value in change.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    for asked in (rank_info, logs_to_console, lambda: init_distributed(Parallel())):
        with pytest.raises(UserError, match=f"{reason}.*take them away with: unset {RESTART_COUNT} ") as refused:
            asked()
        assert len(str(refused.value)) < 500


def test_a_process_with_left_over_variables_trains_alone_and_says_so(tiny, monkeypatch, capsys) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert train(tiny, "--training.steps", "1", "--data.num_workers", "0", "--validation.interval", "0") == 0
    said = "WORLD_SIZE='2' left out: torchrun did not start this process, and it trains alone"
    assert capsys.readouterr().out.count(said) == 1


def test_the_folder_of_a_launcher_that_has_ended_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "gone"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert exit_through_launcher(lambda: pytest.fail("began")) == 2
    assert "gone' is not the folder of a run_train.sh that started this. Start with" in capsys.readouterr().err


# what is imported


@pytest.mark.parametrize("protection", ["none", "the folder safe_path"])
def test_files_of_the_current_folder_are_not_imported_for_pythons(tmp_path: Path, protection: str) -> None:
    """As Python 3.10 starts, which has no PYTHONSAFEPATH. What Python itself imports before, nothing but that keeps."""
    names = ["random", "logging", "json", "torch", "tomllib", "multiprocessing", "socket", "sitecustomize"]
    if protection != "none":
        names += ["types", "contextlib", "warnings", "importlib"]
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported the {name}.py of the user')")
    root = Path(__file__).resolve().parents[2]
    safe = [] if protection == "none" else [str(root / "swamla_titan/safe_path")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *safe])
    command = [sys.executable, "-m", "swamla_titan", "config", "show", "debug"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    if safe:
        command = [sys.executable, "-c", "import random, types; random.random"]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, "")
        # What is named in PYTHONPATH is meant.
        environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert "imported the " in ran.stderr


def test_a_current_folder_that_was_removed_is_one_message(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "gone").mkdir()
    command = f'rmdir "$PWD" && exec "{sys.executable}" -m swamla_titan check'
    ran = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path / "gone",
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert (
        ran.stderr == "error: the current folder cannot be used (No such file or directory); go to one that is there\n"
    )


def test_a_folder_with_the_name_of_a_shipped_config_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "debug").mkdir()
    assert find_config("debug").name == "debug.toml"
    (tmp_path / "small").write_text("")
    assert find_config("small") == Path("small")
