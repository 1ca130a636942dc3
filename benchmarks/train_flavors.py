"""Speed, MFU, memory and loss of whole training runs, through the real command line, loader and checkpoints.

    python benchmarks/train_flavors.py --corpus corpus.jsonl --runs debug:64 small:32 base:16 --steps 60

A run is FLAVOR:SEQUENCES, with that many sequences of 2048 GPT-2 tokens a step in one micro-batch. Speed is the median
of the logged intervals after the first quarter of the run. Prints a table last.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def run(flavor: str, batch: int, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train one flavor in its own process; returns the figures of its row."""
    config = folder / f"{flavor}.toml"
    config.write_text(f"""
[job]
dump_folder = "{folder / flavor}"
[model]
flavor = "{flavor}"
max_seq_len = {arguments.seq_len}
[data]
source = "local"
path = "{arguments.corpus}"
num_workers = 2
[training]
seq_len = {arguments.seq_len}
local_batch_size = {batch}
global_batch_size = {batch}
steps = {arguments.steps}
[lr_schedule]
warmup_steps = 20
[validation]
interval = {arguments.steps}
max_tokens = 262144
fraction = 0.02
[metrics]
log_interval = 5
""")
    command = [sys.executable, "-m", "swamla_titan", "train", str(config), *arguments.overrides]
    code = subprocess.run(command).returncode
    if code != 0:
        return {"exit_code": code}
    lines = [json.loads(line) for line in (folder / flavor / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    steady = [line for line in steps if line["step"] > arguments.steps // 4]
    validation = next(line for line in lines if "val_loss" in line)
    median = {
        name: statistics.median(line[name] for line in steady)
        for name in ("tokens_per_second", "mfu", "memory_gib", "step_seconds", "data_seconds")
        if name in steady[0]
    }
    return {
        "first_step_seconds": steps[0]["step_seconds"],
        **median,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "val_loss": validation["val_loss"],
        "val_bits_per_byte": validation["val_bits_per_byte"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, type=Path, help="a .jsonl file or a folder of text")
    parser.add_argument("--runs", nargs="+", default=["debug:64", "small:32", "base:16"], metavar="FLAVOR:SEQUENCES")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments, arguments.overrides = parser.parse_known_args()
    arguments.corpus = arguments.corpus.resolve()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.runs:
            flavor, batch = name.split(":")
            rows[name] = run(flavor, int(batch), arguments, Path(folder))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))
    for name, row in rows.items():
        print(f"{name:<12}", " ".join(f"{key}={value:.4g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
