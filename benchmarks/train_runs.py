"""Speed, MFU, memory and loss of whole training runs, through the real command line, loader and checkpoints.

    python benchmarks/train_runs.py --corpus corpus.jsonl --runs small:1:32 base:1:16 --steps 60
    python benchmarks/train_runs.py --corpus corpus.jsonl --gpus 2 --runs base:1:16 base:2:32/16,fsdp base:2:32,tensor=2

    python benchmarks/train_runs.py --corpus corpus.jsonl --steps 1000 --curves optimizers.json --runs small:1:32 \\
        small:1:32,optimizer.name=muon small:1:32,optimizer.name=lion,optimizer.lr=1e-4,optimizer.beta2=0.99

A run is FLAVOR:GPUS:SEQUENCES[/ROWS][,PLAN...]: that many sequences of GPT-2 tokens a step over all GPUs, at most ROWS
of them (default: all) in a micro-batch of a rank. PLAN is fsdp, hsdp, ddp, KEY=VALUE of [parallel], or
SECTION.KEY=VALUE. Speed is the median of the logged intervals after the first third of the run. Prints a table last.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

FIGURES = ("tokens_per_second", "tokens_per_second_per_gpu", "mfu", "memory_gib", "step_seconds", "data_seconds")


def train(shape: str, overrides: list[str], arguments: argparse.Namespace, folder: Path) -> tuple[int, list[dict]]:
    """Train FLAVOR:GPUS:SEQUENCES[/ROWS] in processes of its own; returns the exit code and the run's metrics."""
    _, gpus, _ = shape.split(":")
    command = ["-m", "swamla_titan", "train", str(write_config(shape, arguments, folder)), *overrides]
    if int(gpus) > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = ["-m", "torch.distributed.run", "--nproc-per-node", gpus, "--master-port", str(port), *command]
    environment = {"OMP_NUM_THREADS": "8"} | os.environ
    code = subprocess.run([sys.executable, *command], env=environment, timeout=arguments.timeout).returncode
    if code != 0:
        return code, []
    return code, [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def write_config(shape: str, arguments: argparse.Namespace, folder: Path) -> Path:
    """Write the configuration of FLAVOR:GPUS:SEQUENCES[/ROWS]; returns its path."""
    flavor, _, sequences = shape.split(":")
    batch, _, rows = sequences.partition("/")
    config = folder / "config.toml"
    config.write_text(f"""
[job]
dump_folder = "{folder / "run"}"
[model]
flavor = "{flavor}"
max_seq_len = {arguments.seq_len}
[data]
source = "local"
path = "{arguments.corpus}"
num_workers = 2
[training]
seq_len = {arguments.seq_len}
local_batch_size = {rows or batch}
global_batch_size = {batch}
steps = {arguments.steps}
[lr_schedule]
warmup_steps = {min(20, arguments.steps)}
[validation]
interval = {arguments.steps}
max_tokens = 65536
fraction = 0.02
[metrics]
log_interval = 5
tensorboard = false
""")
    return config


def run(name: str, arguments: argparse.Namespace, folder: Path, curves: dict[str, list[tuple[int, float]]]) -> dict:
    """Train one run; returns the figures of its row, and puts its losses into `curves`."""
    shape, *plan = name.split(",")
    overrides = list(arguments.overrides)
    for part in plan:
        key, _, value = part.partition("=")
        if part in ("fsdp", "hsdp", "ddp"):
            overrides += ["--parallel.data_parallel", part]
        else:
            overrides += [f"--{key}" if "." in key else f"--parallel.{key}", value]
    code, lines = train(shape, overrides, arguments, folder)
    if code != 0:
        return {"exit_code": code}
    steps = [line for line in lines if "loss" in line]
    curves[name] = [(line["step"], line["loss"]) for line in steps]
    steady = [line for line in steps if line["step"] > arguments.steps // 3]
    validation = next((line for line in lines if "val_loss" in line), {})
    return {
        "first_step_seconds": steps[0]["step_seconds"],
        **{name: statistics.median(line[name] for line in steady) for name in FIGURES if name in steady[0]},
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        **{name: validation[name] for name in ("val_loss",) if name in validation},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, type=Path, help="a .jsonl file or a folder of text")
    parser.add_argument("--runs", nargs="+", required=True, metavar="FLAVOR:GPUS:SEQUENCES[,PLAN...]")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--timeout", type=float, help="seconds a run may take")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument(
        "--curves", type=Path, help="write the losses of all runs here as JSON, for benchmarks/curves.py"
    )
    arguments, arguments.overrides = parser.parse_known_args()
    arguments.corpus = arguments.corpus.resolve()
    rows: dict[str, dict[str, float]] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in arguments.runs:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows[name] = run(name, arguments, Path(folder), curves)
            except subprocess.TimeoutExpired:
                rows[name] = {"timed_out_after": arguments.timeout}
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=1))
        if arguments.curves:
            arguments.curves.write_text(json.dumps(curves))
    width = max(map(len, rows))
    for name, row in rows.items():
        print(f"{name:<{width}}", " ".join(f"{key}={value:.5g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
