"""scripts/slurm.sbatch, with small scripts in place of SLURM's commands."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.runs import kill_groups
from tests.waiting import HANG, wait_until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/slurm.sbatch"

# Each command writes down how it was called; srun also what it hands to its tasks, and ends as $SRUN says.
COMMANDS = {
    "scontrol": 'case $1 in show) printf "%s\\n" node7 node8 node9 ;; esac',
    "scancel": "touch signalled",
    "sinfo": 'printf "%s" "${DEAD:-}"',
    "srun": """
        echo "$RDZV_ENDPOINT $RDZV_ID $NNODES $PWD" >given
        case $SRUN in
          waits) while [ ! -e signalled ]; do sleep 0.05; done; exit "${THEN:-75}" ;;
          *) exit "$SRUN" ;;
        esac""",
}


class Cluster:
    """A folder to submit from, and a PATH whose first commands are ours."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "repository", folder / "bin"
        self.calls = folder / "calls"
        self.bin.mkdir()
        self.folder.mkdir()
        (self.folder / "run_train.sh").touch(0o755)
        for name, body in COMMANDS.items():
            path = self.bin / name
            path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.calls}\n{body}\n')
            path.chmod(0o755)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, srun: str, **variables: str) -> "subprocess.Popen[str]":
        environment = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SRUN": srun,
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "node[7-9]",
            "SLURM_NNODES": "3",
            "NODE_FAIL_SECONDS": "0",
        }
        environment.pop("MIN_NODES", None)
        process = subprocess.Popen(
            # As slurmd does: a copy elsewhere.
            ["bash", str(shutil.copy(SCRIPT, self.bin.parent / "slurm_script")), "fsdp_node", "--job.seed", "3"],
            env=environment | variables,
            cwd=self.bin.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def wait_for(self, name: str) -> None:
        wait_until((self.folder / name).exists, lambda: f"{name} did not appear")

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()

    @property
    def requeued(self) -> bool:
        return "scontrol requeue 1234567" in self.called()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    kill_groups(made.started)


def test_every_node_runs_the_same_command_and_meets_at_the_first(cluster: Cluster) -> None:
    assert cluster.start("0").wait(HANG) == 0
    assert (cluster.folder / "given").read_text() == f"node7:24567 1234567 3:3 {cluster.folder}\n"
    srun = next(call for call in cluster.called() if call.startswith("srun"))
    assert srun == "srun --no-kill --kill-on-bad-exit=0 --wait=0 ./run_train.sh fsdp_node --job.seed 3"
    assert "scontrol show hostnames node[7-9]" in cluster.called()
    assert cluster.start("0", MIN_NODES="2").wait(HANG) == 0
    assert " 2:3 " in (cluster.folder / "given").read_text()


@pytest.mark.parametrize(
    "code, dead, requeued",
    [
        ("0", "", False),
        ("0", "node8", False),  # done without it
        ("1", "", False),
        ("1", "node8", True),
        ("2", "node8", False),
        ("75", "", True),
        ("137", "", False),
        ("137", "node8", True),
    ],
)
def test_the_job_goes_back_into_the_queue_where_it_can_go_on(
    cluster: Cluster, code: str, dead: str, requeued: bool
) -> None:
    process = cluster.start(code, DEAD=dead)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == int(code)
    assert err == ""
    assert cluster.requeued == requeued
    assert ("put back into the queue" in out) == requeued


@pytest.mark.parametrize("then", ["75", "138", "1"])  # 138: before there were workers that know the signal
def test_slurms_warning_reaches_the_run_and_the_job_goes_on_later(cluster: Cluster, then: str) -> None:
    process = cluster.start("waits", THEN=then)
    cluster.wait_for("given")
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.wait(HANG) == int(then)
    assert "scancel --signal=USR1 1234567" in cluster.called()
    assert cluster.requeued


@pytest.mark.parametrize("then", ["75", "143"])
def test_a_cancelled_job_does_not_come_back(cluster: Cluster, then: str) -> None:
    process = cluster.start("waits", THEN=then, DEAD="node8")
    cluster.wait_for("given")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None  # it waits for the checkpoint
    (cluster.folder / "signalled").touch()  # SLURM tells the tasks
    assert process.wait(HANG) == int(then)
    assert not cluster.requeued


def test_a_job_submitted_from_elsewhere_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    process = cluster.start("0", SLURM_SUBMIT_DIR=str(tmp_path))
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 2
    assert "submit the job from the repository" in err
    assert not cluster.calls.exists()


def test_slurm_is_asked_to_warn_the_script_itself_one_task_a_node() -> None:
    asked = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@120", "--ntasks-per-node=1", "--requeue", "--no-kill", "--open-mode=append"} <= set(asked)


@pytest.mark.parametrize(
    "script", ["run_train.sh", "run_tests.sh", *sorted(p.name for p in SCRIPT.parent.glob("*.s*h*"))]
)
def test_shell_scripts_are_sound(script: str) -> None:
    path = ROOT / script if (ROOT / script).exists() else SCRIPT.parent / script
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "--shell=bash", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
