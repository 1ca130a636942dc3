"""What checkpoints and crashes cost a run: time lost to saving, and time from a kill to the next trained step.

    python benchmarks/recovery.py --corpus corpus.jsonl --flavor base --sequences 16 --steps 40 --interval 10

Trains through the real command line, logging every step, which waits for the device. First once for each
checkpoint.async_mode of --modes: a checkpoint costs what the steps after it up to the next but one take longer than the
median of the others, its own pause included. Then a run is killed (SIGKILL) a step after a checkpoint was finished and
the same command started again, with the compiled code of the first run: the time until it has trained a step, and what
the log says of the way there. Prints a table last.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEP_LINE = re.compile(r"step +([0-9]+)/[0-9]+ \| loss ")
AFTER = 3  # steps after a checkpoint that it may slow down


def config_of(arguments: argparse.Namespace, dump: Path) -> str:
    return f"""
[job]
dump_folder = "{dump}"
[model]
flavor = "{arguments.flavor}"
max_seq_len = {arguments.seq_len}
[data]
source = "local"
path = "{arguments.corpus}"
tokenizer = "{arguments.tokenizer}"
num_workers = 2
[training]
seq_len = {arguments.seq_len}
local_batch_size = {arguments.sequences}
global_batch_size = {arguments.sequences}
steps = {arguments.steps}
[lr_schedule]
warmup_steps = 4
[validation]
interval = 0
fraction = 0.02
[checkpoint]
interval = {arguments.interval}
keep_latest = 1
[metrics]
log_interval = 1
tensorboard = false
progress_bar = false
"""


def logged_times(command: list[str]) -> dict[int, float]:
    """Run the program; step -> the time at which the step's line came, in seconds."""
    found: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.monotonic()
            print(line, end="", flush=True)
            if step := STEP_LINE.search(line):
                found[int(step[1])] = now
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}")
    return found


def cost_of_saving(arguments: argparse.Namespace, folder: Path, mode: str) -> dict[str, float]:
    """Seconds that a checkpoint costs a run which saves every `interval` steps."""
    folder.mkdir()
    (folder / "config.toml").write_text(config_of(arguments, folder / "run"))
    command = ["train", str(folder / "config.toml"), "--checkpoint.async_mode", mode, *arguments.overrides]
    times = logged_times([sys.executable, "-m", "swamla_titan", *command])
    took = {step: times[step] - times[step - 1] for step in times if step - 1 in times}
    # The first checkpoint makes the memory for the copies, and the last one is waited for.
    saves = range(arguments.interval, arguments.steps - AFTER, arguments.interval)
    slowed = {step + k for step in saves for k in range(1, AFTER + 1)}
    plain = statistics.median(seconds for step, seconds in took.items() if step not in slowed and step > 3)
    costs = [sum(took[step + k] - plain for k in range(1, AFTER + 1)) for step in saves]
    return {"step_seconds": plain, "first_save_seconds": costs[0], "save_seconds": statistics.median(costs[1:])}


def newest_step(dump: Path) -> int:
    try:
        lines = (dump / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def lines_of(dump: Path) -> int:
    return (dump / "metrics.jsonl").read_bytes().count(b"\n")


def restart(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds from SIGKILL to the next trained step, when the same command is started at once."""
    folder.mkdir()
    (folder / "config.toml").write_text(config_of(arguments, folder / "run"))
    dump = folder / "run"
    command = [sys.executable, "-m", "swamla_titan", "train", str(folder / "config.toml"), *arguments.overrides]
    process = subprocess.Popen(command)
    saved = dump / "checkpoints" / f"step-{arguments.interval:08d}"
    while not (saved.exists() and newest_step(dump) > arguments.interval):
        assert process.poll() is None, "the run ended before it could be killed: give it more steps"
        time.sleep(0.01)
    process.kill()
    process.wait()
    before, killed = lines_of(dump), time.monotonic()
    log = dump / "logs" / "rank-0.log"
    old = len(log.read_text().splitlines())
    process = subprocess.Popen(command)
    while lines_of(dump) == before:
        assert process.poll() is None, "it did not go on"
        time.sleep(0.01)
    found = {"kill_to_step_seconds": time.monotonic() - killed, "log": log.read_text().splitlines()[old:]}
    process.send_signal(signal.SIGKILL)
    process.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, type=Path, help="a .jsonl file or a folder of text")
    parser.add_argument("--flavor", default="base")
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--modes", nargs="+", default=["disabled", "async"], help="of checkpoint.async_mode")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments, arguments.overrides = parser.parse_known_args()
    if arguments.steps < 3 * arguments.interval or arguments.interval < 2 * AFTER:
        parser.error(f"--interval of at least {2 * AFTER}, and --steps of at least three times as many")
    arguments.corpus = arguments.corpus.resolve()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        for mode in arguments.modes:
            rows[f"save, {mode}"] = cost_of_saving(arguments, Path(name) / mode, mode)
            print(rows, flush=True)  # in case what follows takes too long
            shutil.rmtree(Path(name) / mode)
        rows["restart"] = restart(arguments, Path(name) / "restart")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))
    print("\n".join(rows["restart"].pop("log")))
    for name, row in rows.items():
        print(f"{name:<15}", " ".join(f"{key}={value:.4g}" for key, value in row.items()))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "8")
    main()
