"""`watch` in a pipe and on a terminal: what it shows of a run, that it follows restarts, and that it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from swamla_titan.cli import main
from swamla_titan.tools import watch
from swamla_titan.tools.history import History
from tests.tools.histories import append, event, killed_and_resumed, line, start, write
from tests.train.runs import terminal
from tests.waiting import wait_until


def shown(folder: Path, width: int = 100) -> str:
    history = History(folder)
    history.update()
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(watch.panel(history, width))
    return console.export_text()


def test_a_pipe_gets_the_last_lines_then_each_new_one_and_the_end(tmp_path, capsys, monkeypatch):
    """The run is killed and started again while it is watched."""
    folder = write(tmp_path / "run", [line(step, 10 + step) for step in range(1, 16)], [start(0, 10)], steps=20)
    (folder / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    added = [
        lambda: append(folder / "metrics.jsonl", [line(16, 26)]),
        lambda: (folder / ".lock").write_text(f"process {2**22 + 1} on {os.uname().nodename}"),
        lambda: append(folder / "events.jsonl", [start(15, 50)]),
        lambda: append(folder / "metrics.jsonl", [line(16, 60), line(20, 64, val_loss=0.5)]),
        lambda: append(folder / "events.jsonl", [event("end", 65, step=20, code=0)]),
    ]
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: added.pop(0)())
    assert main(["watch", str(folder)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "(6 earlier lines are left out)"
    assert told[1] == "step  6/20 | loss 1.6667 | grad norm 1.000 | lr 1.00e-03 | 100 tokens/s | 2.00 GiB | ETA 0:00:14"
    assert told[11] == "running: at step 15"
    assert told[12].startswith("step 16/20 | loss 0.6250 |")
    assert told[13] == "killed: at step 16: its process ended without a word; the same command continues it"
    assert told[14] == "start after step 15: CPU, 5 s after its process"
    assert told[15].startswith("step 16/20 |")
    assert told[16].endswith("| ETA 0:00:00 | validation loss 0.5000")
    assert told[17:] == ["finished after step 20", "finished: all 20 steps were taken"]
    assert added == []


def test_a_pipe_whose_reader_has_gone_ends_it(tmp_path):
    folder = write(tmp_path / "run", [line(1, 11)], [start(0, 10)])
    command = [sys.executable, "-m", "swamla_titan", "watch", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == 0


def test_the_panel_shows_state_progress_figures_and_the_last_events(tmp_path):
    folder = killed_and_resumed(tmp_path / "run")
    text = shown(folder)
    for part in (
        "finished  all 10 steps were taken",
        "7 x H200  start 2  goodput 12.1% of 0:01:06",
        "10/10 ETA 0:00:00",
        "loss 1.0000",
        "validation 2.5000 at 4",
        "lr 1.00e-03",
        "tokens/s 100",
        "loss █",
        "rewound after step 8 to the weights of step 6",
        "checkpoint of step 4 on the disk",
        "ago  finished after step 10",
    ):
        assert part in text, part
    narrow = shown(folder, 60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert "loss 1.0000" in narrow


def test_a_run_that_is_at_work_shows_its_process(tmp_path):
    folder = write(tmp_path / "run", [line(1, 11), line(2, 12)], [start(0, 10, 8, "H200")])
    (folder / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}\nrun")
    text = shown(folder)
    assert "running  at step 2" in text
    assert f"8 x H200  process {os.getpid()} on {os.uname().nodename}  last sign" in text
    assert "ETA 0:00:08" in text


def test_before_the_first_step_it_waits(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()  # the first thing that a run writes
    assert "waiting  no step was taken yet" in shown(folder)


def test_what_is_no_run_is_refused(tmp_path, capsys):
    killed_and_resumed(tmp_path / "run")
    assert main(["watch", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == (f"error: {tmp_path}/other: no such folder; there is {tmp_path}/run\n")
    assert main(["watch", str(tmp_path)]) == 2
    assert f"{tmp_path} is no run: it has no metrics.jsonl; there is {tmp_path}/run\n" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_ctrl_c_quits_at_once(tmp_path, is_terminal):
    folder = write(tmp_path / "run", [line(1, 11)], [start(0, 10)])
    command = [sys.executable, "-m", "swamla_titan", "watch", str(folder)]
    with terminal() as (screen, read), (tmp_path / "out").open("w+") as file:
        out = screen if is_terminal else file
        environment = os.environ | {"TERM": "xterm"}
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment)
        text = ""

        def is_shown() -> bool:
            nonlocal text
            text += read() if is_terminal else (tmp_path / "out").read_text()
            return "at step 1" in text

        wait_until(is_shown, lambda: "nothing was shown", pause=0.02)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
        text += read()
    assert (process.returncode, error) == (0, "")
    assert not is_terminal or text.endswith("\x1b[?25h")  # the cursor is shown again
