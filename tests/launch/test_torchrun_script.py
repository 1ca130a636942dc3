"""scripts/torchrun.sh, a small script in place of Python: how torchrun and the workers end, and what comes of it."""

import subprocess
from pathlib import Path

import pytest

from tests.launch.test_launched_workers import assert_gone
from tests.launch.test_launcher import write_script
from tests.waiting import HANG

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/torchrun.sh"


def run(folder: Path, body: str) -> int:
    """torchrun.sh, whose torchrun is `body`; the folder of the launch is the working folder there."""
    stub = write_script(folder / "python", f'#!/bin/bash\ncd "$SWAMLA_TITAN_LAUNCH_FOLDER"\n{body}\n')
    ran = subprocess.run([str(SCRIPT), str(stub)], env={"PATH": "/usr/bin:/bin", "TMPDIR": str(folder)}, timeout=HANG)
    assert not list(folder.glob("swamla-titan.*"))
    return ran.returncode


# What each worker of the last start left; None: it has no code.
@pytest.mark.parametrize(
    "status, codes, expected",
    [
        (0, ["0", "0"], 0),
        (0, ["75", "75"], 75),
        # torchrun could not take leave of the other machines, but the workers were done.
        (1, ["0", "0"], 0),
        (1, ["75", "0"], 75),
        (1, ["1", "1"], 1),
        (1, ["0", None], 1),
        (1, [], 1),
        (1, ["2", None], 2),
        (137, [None, None], 1),
    ],
)
def test_exit_code(tmp_path: Path, status: int, codes: list["str | None"], expected: int) -> None:
    lines = []
    for rank, code in enumerate(codes):
        lines.append(f"true & wait $!; echo $! >{rank}.pid")
        lines += [f"echo {code} >{rank}.code"] if code else []
    assert run(tmp_path, "\n".join([*lines, f"exit {status}"])) == expected


@pytest.mark.parametrize("end", ["exit 1", "kill -KILL $$"])
def test_workers_whose_torchrun_is_gone_are_ended(tmp_path: Path, end: str) -> None:
    pids = tmp_path / "pids"
    pids.touch()
    workers = f"for rank in 0 1; do sleep 100 & echo $! >$rank.pid; echo $! >>{pids}; done"
    assert run(tmp_path, f"{workers}\n{end}") == 1
    for pid in pids.read_text().split():
        assert_gone(int(pid))
