"""Signals while run_train.sh looks around and Python imports: none is lost, and none gives a traceback."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.launch.test_launcher import Repository, write_script
from tests.train.runs import kill_groups
from tests.waiting import HANG

ROOT = Path(__file__).resolve().parents[2]

# Python imports this at its start: it stops in the import of $AT, however long that import takes elsewhere.
SITE = """
import os, sys, time

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            sys.meta_path.remove(self)
            open(os.environ["HERE"], "w").close()
            end = time.monotonic() + 600
            while time.monotonic() < end and not os.path.exists(os.environ["HERE"] + ".on"):
                time.sleep(0.01)
            if os.environ.get("IN_A_CALLBACK"):  # where an exception would be printed, and lost
                import weakref
                class Thing: pass
                def back(_):
                    os.kill(os.getpid(), int(os.environ["IN_A_CALLBACK"]))
                    for _ in range(1000): pass
                thing = Thing()
                reference = weakref.ref(thing, back)
                del thing
        return None

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list["subprocess.Popen[str]"]]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    made: list[subprocess.Popen[str]] = []
    yield made
    kill_groups(made)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + HANG
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def standing(
    started: list["subprocess.Popen[str]"],
    here: Path,
    command: list[str],
    env: Mapping[str, str],
    cwd: Path | None = None,
) -> "subprocess.Popen[str]":
    """A process in a session of its own, as soon as it has written the file `here`."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started.append(process)
    wait_for(here, process)
    return process


def importing(started: list["subprocess.Popen[str]"], folder: Path, at: str, *arguments: str, **more: str):
    """A command that stands in the import of a module."""
    here = folder / "here"
    variables = {"AT": at, "HERE": str(here), "PYTHONPATH": f"{ROOT}:{folder / 'site'}", "PYTHONSAFEPATH": "1"}
    return standing(started, here, [sys.executable, "-m", "swamla_titan", *arguments], os.environ | variables | more)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("at", ["swamla_titan.system.console", "tyro", "torch", "swamla_titan.launch.signals"])
def test_a_signal_while_the_trainer_is_imported_ends_it_with_75(started, tmp_path, tiny, at, number):
    if at == "swamla_titan.launch.signals" and number != signal.SIGINT:
        pytest.skip("imports all of the program")
    process = importing(started, tmp_path, at, "train", str(tiny))
    process.send_signal(number)
    if at == "swamla_titan.system.console":  # of the few that come before signals can be handled: they wait until then
        (tmp_path / "here.on").touch()
    out, err = process.communicate(timeout=HANG)
    assert (process.returncode, out) == (75, "")
    assert (
        err == f"stopped by {number.name} before training began: there is nothing to save; the same command starts it\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_signal_in_a_callback_in_which_exceptions_are_lost_is_not_lost(started, tmp_path, tiny):
    process = importing(started, tmp_path, "tyro", "train", str(tiny), IN_A_CALLBACK=str(int(signal.SIGINT)))
    (tmp_path / "here.on").touch()
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 75
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [("check",), ("train", "debug", "--dry-run"), ("generate", "nothing"), ("--help",)]
)
def test_ctrl_c_ends_other_commands_at_once_without_a_traceback(started, tmp_path, arguments):
    process = importing(started, tmp_path, "tyro", *arguments)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


def test_a_worker_remembers_the_signal_and_ends_with_the_others(started, tmp_path, tiny):
    """Its launcher has written `stop` by then, or will have; here it has not, and the worker must not look crashed."""
    folder = tmp_path / "launch"
    folder.mkdir()
    (folder / "launcher").write_text(str(os.getpid()))
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": "1", "TORCHELASTIC_RESTART_COUNT": "0", "SWAMLA_TITAN_LAUNCH_FOLDER": str(folder)}
    process = importing(started, tmp_path, "torch", "train", str(tiny), **place)
    process.send_signal(signal.SIGTERM)
    wait_for(folder / "0.stopping", process)
    assert process.poll() is None
    process.kill()
    process.communicate()

    (folder / "0.stopping").unlink()
    (tmp_path / "here").unlink()
    process = importing(started, tmp_path, "torch", "train", str(tiny), **place)
    (folder / "stop").write_text("TERM\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG) == 0  # or torchrun would start it again
    assert (folder / "0.code").read_text() == "75"


# run_train.sh

# Says that it is there, and waits, where the test wants it to; and obeys signals as Python does.
SLOW_STUB = """#!/bin/bash
trap 'exit 130' INT # bash by itself goes on where what it waits for has ended well
case "$*" in
*check_environment.py*) what=environment ;;
*preflight*) what=preflight ;;
*) what=training ;;
esac
echo "stub $0"
if [[ $what == "$AT" ]]; then
  echo $$ >"$HERE.part"
  mv "$HERE.part" "$HERE"
  for ((turn = 0; turn < 600; turn++)); do
    [[ ! -e $HERE.on ]] || break
    sleep 0.1
  done
fi
exit 0
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("to", ["the script", "all"])
@pytest.mark.parametrize("at", ["environment", "preflight"])
def test_a_signal_before_the_start_ends_run_train_with_75(started, tmp_path, at, to, number):
    repository = Repository(tmp_path / "copy")
    for command in ("sleep", "mv"):
        (repository.bin / command).symlink_to(str(shutil.which(command)))
    here = tmp_path / "here"
    variables = {"PATH": str(repository.bin), "AT": at, "HERE": str(here), "NPROC": "2", "NGPU": "0"}
    variables |= {"PYTHON": str(write_script(tmp_path / "stub", SLOW_STUB))}
    process = standing(started, here, [str(repository.root / "run_train.sh")], variables, repository.caller)
    stub = int(here.read_text())
    (os.kill if to == "the script" else os.killpg)(process.pid, number)
    if at == "environment" and to == "the script":  # of some tenths of a second, which end first
        (tmp_path / "here.on").touch()
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 75, err
    assert "stopped before training began: there is nothing to save" in err
    end = time.monotonic() + HANG
    while Path(f"/proc/{stub}").exists() and "Z" not in Path(f"/proc/{stub}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < end, "it was left behind"
        time.sleep(0.02)


# Holds back in its first moment, before it could handle a signal, as Python's own start does.
STARTING = """#!/bin/bash
case "$*" in
*check_environment.py*) echo "stub"; exit ;;
esac
touch "$HERE"
while [[ ! -e $HERE.on ]]; do sleep 0.05; done
exec "$REAL" "$@"
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_pythons_first_moment_waits_until_it_is_handled(started, tmp_path, tiny, number):
    if subprocess.run(["env", "--block-signal=INT", "true"], capture_output=True).returncode:
        pytest.skip("env cannot hold signals back here")
    here = tmp_path / "here"
    variables = {"PYTHON": str(write_script(tmp_path / "start", STARTING)), "REAL": sys.executable, "HERE": str(here)}
    environment = os.environ | variables | {"NGPU": "0", "NPROC": "1"}
    process = standing(started, here, [str(ROOT / "run_train.sh"), str(tiny)], environment)
    process.send_signal(number)
    (tmp_path / "here.on").touch()
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 75, err
    assert f"stopped by {number.name} before training began" in err
    assert "Traceback" not in err
