"""Tokens a second of the loader alone, from text: what its workers can make, and what a trainer would wait for.

    python benchmarks/loader.py --corpus corpus.jsonl --workers 0 1 2 4

Reads the text, makes GPT-2 tokens of it and cuts them into the batches of a step, as training does, on one rank. The
first batch and a second after it are not counted: workers start, and fill what they may be ahead. CPU only.
"""

import argparse
import tempfile
import time
from pathlib import Path

from swamla_titan.config import Override, load_config, shipped_configs
from swamla_titan.distributed.mesh import World
from swamla_titan.train.setup import set_up_inputs, set_up_resume

WARM_UP = 1.0  # seconds


def rate(arguments: argparse.Namespace, workers: int, folder: Path) -> float:
    """Tokens a second that a loader with so many workers gives; 0: made in the process that asks for them."""
    keys = {
        ("job", "dump_folder"): str(folder),
        ("data", "source"): "local",
        ("data", "path"): str(arguments.corpus.resolve()),
        ("validation", "interval"): "0",
        ("data", "tokenizer"): "gpt2",
        ("data", "num_workers"): str(workers),
        ("training", "seq_len"): str(arguments.seq_len),
        ("model", "max_seq_len"): str(arguments.seq_len),
        ("training", "global_batch_size"): str(arguments.sequences),
    }
    overrides = [Override(section, key, value) for (section, key), value in keys.items()]
    config = load_config(shipped_configs()["debug"], overrides)
    with set_up_resume(set_up_inputs(config, World.alone())).open_loader() as loader:
        next(loader)  # workers have started
        warm = time.perf_counter() + WARM_UP
        while (begin := time.perf_counter()) < warm:
            next(loader)
        tokens, now = 0, begin
        while now < begin + arguments.seconds:
            tokens += next(loader).tokens.numel()
            now = time.perf_counter()
    return tokens / (now - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, type=Path, help="a .jsonl file or a folder of text")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=16, help="of a step")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # without a checkpoint to resume from
        for workers in arguments.workers:
            print(f"{workers} workers: {rate(arguments, workers, Path(folder)) / 1e6:.2f} M tokens/s", flush=True)


if __name__ == "__main__":
    main()
