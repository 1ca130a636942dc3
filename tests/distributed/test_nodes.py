"""./run_train.sh on two machines, real torchrun and real trainer: one is cut off, killed, and comes back.

The machines are network namespaces (nodes.py).
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.nodes import PORT, Node, nodes
from tests.train.runs import checkpoint, metrics, train
from tests.waiting import HANG, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 30
# A batch that two ranks do not divide, and five micro-batches a step, slow enough for things to happen meanwhile.
SETTINGS = (
    *("--job.deterministic", "true", "--training.steps", str(STEPS), "--training.seq_len", "256"),
    *("--training.global_batch_size", "5", "--training.local_batch_size", "1", "--data.streams", "6"),
    *("--data.num_workers", "0", "--optimizer.lr", "3e-4", "--lr_schedule.warmup_steps", "4"),
    *("--checkpoint.interval", "4", "--validation.interval", "0", "--validation.fraction", "0"),
    *("--metrics.log_interval", "1", "--metrics.tensorboard", "false", "--fault_tolerance.step_timeout", "20"),
)
Start = Callable[..., "subprocess.Popen[str]"]

pytestmark = pytest.mark.slow  # each starts the program on two machines two or three times over


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a short name, for the launchers' folders."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump folder of one process that nothing befell."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(ROOT / "train_configs/debug.toml", "--job.dump_folder", str(folder), *SETTINGS) == 0
    return folder


class Job:
    """The same command on each of two machines that meet at `host`; the dump folder is `run`, on storage they share."""

    def __init__(self, folder: Path, temporary: Path, host: Node, processes: int = 1) -> None:
        self.run, self.folder, self.temporary = folder / "run", folder, temporary
        self._host, self._processes = host, processes

    def start(self, node: Node, *overrides: str) -> "subprocess.Popen[str]":
        command = [str(ROOT / "run_train.sh"), "debug", "--job.dump_folder", str(self.run), *SETTINGS, *overrides]
        (self.temporary / node.name).mkdir(exist_ok=True)
        return node.start(
            command,
            self.log(node),
            PYTHON=sys.executable,
            NGPU="0",
            NPROC=str(self._processes),
            NNODES="1:2",
            RDZV_ENDPOINT=f"{self._host.address}:{PORT}",
            MAX_RESTARTS="1",  # a machine that joins costs none
            TMPDIR=str(self.temporary / node.name),
            PET_RDZV_CONF="last_call_timeout=10",
            OMP_NUM_THREADS="1",
        )

    def log(self, node: Node) -> Path:
        return self.folder / f"{node.name}.log"

    def sizes(self, node: Node) -> list[int]:
        """With how many processes the run was on, start after start, by what a machine showed of it."""
        text = self.log(node).read_text()
        lines = [line for line in text.splitlines() if " I on " in line]
        return [int(line.partition(" I on ")[2].split()[0].replace("CPU,", "1")) for line in lines]

    def lines(self) -> int:
        file = self.run / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def wait_for(self, what: Callable[[], object], *running: "subprocess.Popen[str]") -> None:
        def there() -> object:
            assert all(process.poll() is None for process in running), self.told()
            return what()

        wait_until(there, self.told, pause=0.05)

    def wait_for_steps(self, count: int, *running: "subprocess.Popen[str]") -> None:
        """Until so many lines more have been written."""
        before = self.lines()
        self.wait_for(lambda: self.lines() >= before + count, *running)

    def told(self) -> str:
        return "\n\n".join(path.read_text()[-20_000:] for path in sorted(self.folder.glob("*.log")))

    def assert_same_as(self, undisturbed: Path) -> None:
        """Every step's loss and gradient norm, of the last line that has it; counters and data cursors exactly.

        Other numbers of ranks add up in another order, and training amplifies that, the gradient norm most of all.
        """
        assert sorted(metrics(self.run)) == list(range(1, STEPS + 1))
        for name, error in (("loss", 1e-6), ("grad_norm", 2e-5)):
            assert metrics(self.run, name) == pytest.approx(metrics(undisturbed, name), rel=error), name
        record, expected = (
            json.loads((checkpoint(folder, STEPS) / "train.json").read_text()) for folder in (self.run, undisturbed)
        )
        assert record == expected
        assert not list((self.run / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("processes, host, lost", [(1, 0, 1), (1, 1, 0), (2, 0, 1)])
def test_one_is_cut_off_and_killed_the_other_goes_on_and_it_comes_back(
    tmp_path: Path, temporary: Path, undisturbed: Path, processes: int, host: int, lost: int
) -> None:
    """Host 1, lost 0: the one that is lost has rank 0, which holds the dump folder, the store and the files."""
    with nodes(2) as machines:
        job = Job(tmp_path, temporary, machines[host], processes)
        stays, goes = machines[1 - lost], machines[lost]
        first = job.start(stays)
        second = job.start(goes)
        job.wait_for_steps(6, first, second)
        goes.cut_off()
        goes.kill()
        seen = job.lines()
        job.wait_for(lambda: job.lines() > seen + 2, first)
        goes.connect()
        back = job.start(goes)
        assert back.wait(HANG) == 0, job.told()
        assert first.wait(HANG) == 0, job.told()
        both = 2 * processes
        # Two machines at once or one after the other, in the beginning.
        sizes = [size for size, _ in itertools.groupby(job.sizes(stays))]
        assert sizes[-3:] == [both, processes, both]
    assert "stopped, since the machines of the run change, after step " in job.told()
    job.assert_same_as(undisturbed)


def test_where_the_machines_meet_is_lost_and_the_other_ends_and_says_so(
    tmp_path: Path, temporary: Path, undisturbed: Path
) -> None:
    with nodes(2) as machines:
        host, other = machines
        job = Job(tmp_path, temporary, host)
        first = job.start(host)
        second = job.start(other)
        job.wait_for_steps(6, first, second)
        host.cut_off()
        host.kill()
        assert second.wait(HANG) == 1, job.told()
        told = job.log(other).read_text()
        assert f"{host.address}:{PORT}, the rendezvous endpoint, does not answer any more" in told
        assert "Traceback" not in told.partition("does not answer any more")[2]
        assert not other.processes()
        # The same command where that machine is gone for good.
        job = Job(tmp_path, temporary, other)
        assert job.start(other).wait(HANG) == 0, job.told()
    job.assert_same_as(undisturbed)


def test_a_signal_while_torchrun_stops_the_workers_for_a_machine_that_joins(
    tmp_path: Path, temporary: Path, undisturbed: Path
) -> None:
    with nodes(2) as machines:
        host, other = machines
        job = Job(tmp_path, temporary, host)
        first = job.start(host)
        job.wait_for_steps(2, first)
        second = job.start(other)
        job.wait_for(lambda: list((temporary / host.name).glob("swamla-titan.*/re-rendezvous")), first, second)
        os.kill(first.pid, signal.SIGTERM)
        assert [first.wait(HANG), second.wait(HANG)] == [75, 75], job.told()
        assert "stopped" in job.told()
        stopped = max(metrics(job.run))
        assert stopped < STEPS
        assert checkpoint(job.run, stopped).is_dir()
        both = [job.start(node) for node in machines]
        assert [process.wait(HANG) for process in both] == [0, 0], job.told()
    job.assert_same_as(undisturbed)
