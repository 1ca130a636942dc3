"""run_train.sh with real torchrun and several processes on the CPU, and a small trainer in place of ours.

The trainer is swamla_titan's own on the side that faces the launcher: `__main__` and most of launch/; what it trains is
a script of a few lines.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.runs import kill_groups
from tests.waiting import HANG, wait_until

ROOT = Path(__file__).resolve().parents[2]
COPIED = [
    *sorted(path.name for path in (ROOT / "swamla_titan").glob("*.py")),
    *sorted(f"system/{path.name}" for path in (ROOT / "swamla_titan/system").glob("*.py")),
    *(f"launch/{name}.py" for name in ("agent", "endpoint", "ranks", "rendezvous", "signals", "worker")),
]

# main(["train", CONFIG, "--what", WHAT, "--folder", FOLDER]): each process appends a line for its start to a file of
# its own.
TRAINER = """
import os, signal, sys, time
from pathlib import Path
from swamla_titan.errors import EXIT_STOPPED

def main():
    what, folder = sys.argv[4], Path(sys.argv[6])
    rank = os.environ["RANK"]
    with open(folder / f"rank-{rank}", "a") as file:
        file.write(" ".join(os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")) + "\\n")
    starts = len((folder / f"rank-{rank}").read_text().splitlines())
    print(f"out of {rank}", flush=True)
    print(f"err of {rank}", file=sys.stderr, flush=True)
    if what.isdigit():
        return int(what)
    if what == "raised":
        raise SystemExit(75)
    if what == "crash" or what == "crash-once" and starts == 1:
        if rank == "1":
            raise ZeroDivisionError("by rank 1")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun waits half a minute, and kills it
        time.sleep(1200)
    if what in ("stop", "deaf"):
        return until_stopped(folder, rank, what)
    if what == "grow":
        return until_all_are_there(folder, rank)
    return 0

def until_all_are_there(folder, rank):
    # A group of fewer than three takes steps until one of them is asked to stop; then all end with the same step.
    from swamla_titan.launch.signals import StopRequest
    size = int(os.environ["WORLD_SIZE"])
    stop = StopRequest()
    stop.finish_step_first = True
    turn, end = 0, time.monotonic() + 600
    def largest(own):  # in place of a collective: what each has, in a file
        nonlocal turn
        turn += 1
        files = [folder / f"turn-{os.environ['MASTER_PORT']}-{turn}-{each}" for each in range(size)]
        files[int(rank)].write_text(f"{own:.0f}.")
        while not all(file.exists() and file.read_text().endswith(".") for file in files):
            time.sleep(0.01)
            assert time.monotonic() < end
        return max(float(file.read_text()) for file in files)
    (folder / f"ready-{size}-{rank}").touch()
    while True:
        asked = stop.agreed(largest)
        if asked or size == 3:
            stop.forget()
            with open(folder / "ended", "a") as file:
                file.write(f"{size} {asked.code if asked else 0}\\n")
            return asked.code if asked else 0
        time.sleep(0.1)

def until_stopped(folder, rank, what):
    from swamla_titan.launch.signals import StopRequest
    stop = StopRequest()
    stop.finish_step_first = True
    (folder / f"ready-{rank}").touch()
    end = time.monotonic() + 600
    while not stop.received or what == "deaf":
        time.sleep(0.01)
        assert time.monotonic() < end, "no signal came"
    time.sleep(2.5)  # a checkpoint
    (folder / f"saved-{rank}").write_text(stop.received.name)
    return EXIT_STOPPED
"""


class Launch:
    """A repository whose package trains as TRAINER does, and the folder that its processes write to."""

    def __init__(self, folder: Path) -> None:
        self.root, self.seen, self.temporary = folder / "repository", folder / "seen", folder / "tmp"
        for made in (self.seen, self.temporary, self.root / "train_configs"):
            made.mkdir(parents=True)
        (self.root / "train_configs/debug.toml").touch()
        for name in ("run_train.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        for name in COPIED:
            (self.root / "swamla_titan" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "swamla_titan" / name, self.root / "swamla_titan" / name)
        (self.root / "swamla_titan/cli.py").write_text(TRAINER)
        (self.root / "swamla_titan/launch/preflight.py").touch()
        self.started: list[subprocess.Popen[str]] = []

    def start(self, what: str, size: int = 2, **variables: str) -> "subprocess.Popen[str]":
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NGPU")}
        environment |= {"PYTHON": sys.executable, "NGPU": "0", "NPROC": str(size), "TMPDIR": str(self.temporary)}
        process = subprocess.Popen(
            [str(self.root / "run_train.sh"), "debug", "--what", what, "--folder", str(self.seen)],
            cwd=self.root,  # `-m` looks there first
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a process group that can be signalled as a terminal does
        )
        self.started.append(process)
        return process

    def run(self, what: str, size: int = 2, **variables: str) -> tuple[int, str, str]:
        process = self.start(what, size, **variables)
        out, err = process.communicate(timeout=HANG)
        return process.returncode, out, err

    def starts(self, rank: int) -> list[str]:
        return (self.seen / f"rank-{rank}").read_text().splitlines()

    def wait_until_ready(self, size: int = 2, prefix: str = "") -> None:
        ready = [self.seen / f"ready-{prefix}{rank}" for rank in range(size)]
        wait_until(lambda: all(file.exists() for file in ready), lambda: "the workers did not start")

    def ended(self) -> list[str]:
        """What the workers of "grow" ended with, in order."""
        return (self.seen / "ended").read_text().splitlines()

    def left_over(self) -> list[Path]:
        return list(self.temporary.glob("swamla-titan.*"))


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    made = Launch(tmp_path)
    yield made
    kill_groups(made.started)


@pytest.mark.parametrize(
    "what, code", [("2", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("0", 0), ("raised", 75)))]
)
def test_the_code_that_all_end_with_arrives_and_nothing_is_restarted(launch: Launch, what: str, code: int) -> None:
    size = 3 if what == "0" else 2
    returned, out, err = launch.run(what, size, OMP_NUM_THREADS="5")
    assert returned == code, err
    for rank in range(size):
        assert launch.starts(rank) == [f"{size} {rank} 5"]
    assert out == "out of 0\n"
    assert "err of 0" in err
    assert "err of 1" not in err
    assert "Traceback" not in err
    assert not launch.left_over()


def test_log_rank_chooses_whose_output_is_shown(launch: Launch) -> None:
    returned, out, err = launch.run("0", 3, LOG_RANK="1,2")
    assert returned == 0
    assert sorted(out.splitlines()) == ["out of 1", "out of 2"]
    assert "err of 0" not in err


def test_a_crash_is_restarted(launch: Launch) -> None:
    returned, _, err = launch.run("crash-once", MAX_RESTARTS="1")
    assert returned == 0, err
    assert len(launch.starts(0)) == len(launch.starts(1)) == 2
    assert not launch.left_over()


def test_a_crash_that_goes_on_is_1_and_names_the_first_cause_in_a_hidden_process(launch: Launch) -> None:
    returned, _, err = launch.run("crash", MAX_RESTARTS="0")
    assert returned == 1
    assert len(launch.starts(1)) == 1
    assert "ZeroDivisionError: by rank 1" in err
    (folder,) = launch.left_over()
    assert f"the errors of the processes not shown (LOG_RANK) are in {folder}/logs" in err
    assert any("by rank 1" in path.read_text() for path in folder.glob("logs/*/attempt_0/1/stderr.log"))


@pytest.mark.parametrize(
    "number, to",
    [
        (signal.SIGINT, "every process"),
        (signal.SIGTERM, "the launcher"),
        pytest.param(signal.SIGUSR1, "the launcher", marks=pytest.mark.slow),
    ],
)
def test_a_signal_makes_all_workers_save_and_ends_with_75(launch: Launch, number: signal.Signals, to: str) -> None:
    process = launch.start("stop")
    launch.wait_until_ready()
    (os.kill if to == "the launcher" else os.killpg)(process.pid, number)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 75, err
    assert [(launch.seen / f"saved-{rank}").read_text() for rank in range(2)] == [number.name] * 2
    assert len(launch.starts(0)) == len(launch.starts(1)) == 1
    assert not launch.left_over()


def test_a_signal_before_the_workers_start_ends_with_75(launch: Launch) -> None:
    process = launch.start("stop")
    wait_until(launch.left_over)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 75, err
    seen = {path.name for path in launch.seen.iterdir()}
    assert not seen or "saved-0" in seen  # the signal came late, if anything is there: torchrun takes seconds to start
    assert not launch.left_over()


def test_a_signal_while_torchrun_waits_for_other_machines_ends_with_75(launch: Launch, endpoint: str) -> None:
    process = launch.start("stop", NNODES="2", RDZV_ENDPOINT=endpoint)
    wait_until(lambda: any(list(folder.glob("logs")) for folder in launch.left_over()))
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 75, err
    assert not launch.left_over()


def test_the_second_signal_ends_all_at_once(launch: Launch) -> None:
    process = launch.start("deaf")
    launch.wait_until_ready()
    process.send_signal(signal.SIGTERM)
    time.sleep(4)
    assert process.poll() is None
    workers = [int(path.read_text()) for path in launch.left_over()[0].glob("*.pid")]
    assert len(workers) == 2
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HANG)
    assert process.returncode == 128 + signal.SIGTERM
    for worker in workers:
        assert_gone(worker)
    assert not launch.left_over()


@pytest.mark.parametrize("victim", ["the launcher", "torchrun"])
def test_workers_do_not_outlive_what_started_them(launch: Launch, victim: str) -> None:
    process = launch.start("deaf")
    launch.wait_until_ready()
    (folder,) = launch.left_over()
    workers = [int(path.read_text()) for path in folder.glob("*.pid")]
    assert len(workers) == 2
    torchrun = int(Path(f"/proc/{workers[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(process.pid if victim == "the launcher" else torchrun, signal.SIGKILL)
    process.wait(timeout=HANG)
    assert process.returncode == (-signal.SIGKILL if victim == "the launcher" else 1)
    for pid in (torchrun, *workers):
        assert_gone(pid)
    assert len(launch.starts(0)) == len(launch.starts(1)) == 1


def assert_gone(pid: int) -> None:
    """A killed worker whose torchrun died too may wait as a zombie for this container's first process."""
    state = Path(f"/proc/{pid}/stat")

    def gone() -> bool:
        try:
            return state.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(gone, lambda: f"{pid} still runs")


@pytest.fixture
def endpoint() -> Iterator[str]:
    """One at which nobody listens yet, and that nobody else is given meanwhile: it is held, but not listened at."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def test_two_machines_end_with_the_same_code(launch: Launch, endpoint: str) -> None:
    """Two launchers on this one, each for a machine of one process."""
    settings = {"NNODES": "2", "RDZV_ENDPOINT": endpoint}
    both = [launch.start("75", 1, **settings) for _ in range(2)]
    assert [process.wait(timeout=HANG) for process in both] == [75, 75]
    assert launch.starts(0)[0].startswith("2 0")
    assert launch.starts(1)[0].startswith("2 0")


@pytest.fixture
def two_of_three(launch: Launch, endpoint: str) -> tuple[dict[str, str], list["subprocess.Popen[str]"]]:
    """Two launchers of an elastic run, their workers training, and the settings with which a third would join.

    The second has joined the first, which trained alone.
    """
    settings = {
        "NNODES": "1:3",
        "RDZV_ENDPOINT": endpoint,
        "MAX_RESTARTS": "0",
        "PET_RDZV_CONF": "last_call_timeout=4",
    }
    first = launch.start("grow", 1, **settings)
    launch.wait_until_ready(1, "1-")  # so that it is the one that holds the meeting point
    second = launch.start("grow", 1, **settings)
    launch.wait_until_ready(2, "2-")
    return settings, [first, second]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_a_machine_that_joins_makes_all_start_again_costs_no_restart_and_ends_nothing(
    launch: Launch, two_of_three: tuple[dict[str, str], list["subprocess.Popen[str]"]]
) -> None:
    """The first worker that torchrun stops takes the other with it, before the other's torchrun knows why."""
    settings, two = two_of_three
    folders = launch.left_over()
    agents = {parent(agent): agent for agent in (parent(int((each / "0.pid").read_text())) for each in folders)}
    three = [*two, launch.start("grow", 1, **settings)]
    wait_until(lambda: any((folder / "logs").exists() for folder in set(launch.left_over()) - set(folders)))
    os.kill(agents[two[1].pid], signal.SIGSTOP)
    wait_until(lambda: launch.ended().count("2 76") == 2)
    time.sleep(2)  # for the second worker to be gone, if it did not wait
    os.kill(agents[two[1].pid], signal.SIGCONT)
    assert [process.wait(timeout=HANG) for process in three] == [0, 0, 0]
    assert launch.ended() == ["1 76"] + ["2 76"] * 2 + ["3 0"] * 3
    assert not launch.left_over()


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGUSR1)]
)
def test_a_signal_to_one_machine_while_another_joins_ends_all_with_75(
    launch: Launch, two_of_three: tuple[dict[str, str], list["subprocess.Popen[str]"]], number: signal.Signals
) -> None:
    settings, two = two_of_three
    three = [*two, launch.start("grow", 1, **settings)]
    wait_until(lambda: any(list(folder.glob("re-rendezvous")) for folder in launch.left_over()))
    two[0].send_signal(number)
    codes = [process.wait(timeout=HANG) for process in three]
    assert codes == [75, 75, 75]
    assert "3 0" not in launch.ended()
