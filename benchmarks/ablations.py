"""Loss of a model with and without Engram and selective attention, at equal tokens, equal time and equal parameters.

    python benchmarks/ablations.py --corpus corpus.parquet --tokens 20e6 --out ablations.json --optimizer.lr 6e-4

On a machine that is lent for ten minutes, from the root of the repository, with the results of earlier loans, if any,
in ablations.json (`--continue` begins from nothing where there are none):

    cp ablations.json $OUT/ 2>/dev/null; python benchmarks/ablations.py --corpus corpus.parquet --tokens 20e6 \\
        --seeds 0 1 2 --out $OUT/ablations.json --continue --minutes 9.5 --optimizer.lr 6e-4

Variants: `plain`; `engram`, by --engram; `selective` attention; `both`; and `wide`, which is plain with an FFN so much
wider that it has as many parameters as `engram`, tables counted. Each variant and seed is a training run of its own
through the command line, with the same batches, validation text and learning rate at each token. All variants of a
seed run before the next seed. Results are written after each run. With --minutes no run begins that would end later,
judged by the longest so far. Other SECTION.KEY overrides are for all runs.

With `--together N` so many runs share the GPU once each variant has run alone, because a run of minutes spends half of
its time on start-up and compilation. Losses are the same; speeds are those of the runs alone.

Equal tokens: the validation loss at the end, mean over seeds and standard deviation. Equal time: the same when each has
trained as long as the fastest variant. Time is that of training at a variant's speed, the median of its runs' logged
intervals after their first third, so start, compilation and validation do not count. Without `--equal-time` that loss
is interpolated between two validations of the same runs, where a slower variant's learning rate has not reached its
end, which is to its disadvantage; with it each slower variant is also trained for fewer steps, so that its schedule
ends then. Differences to plain are in units of the spread: the root of the two variances' mean.

A corpus should have as many tokens as a run reads, because tables memorize what comes twice.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.train_runs import train, write_config
from swamla_titan.config import load_config, split_overrides
from swamla_titan.config.rules import with_vocabulary
from swamla_titan.data import load_tokenizer
from swamla_titan.model import ModelConfig
from swamla_titan.model.counts import parameter_counts

SELECTIVE = ["--model.mla_selective", "true"]
VARIANTS = ("plain", "engram", "selective", "both", "wide")
FFN_STEP = 128  # widths that GPUs multiply fast
VALIDATED = 262_144  # tokens
SETTINGS = ("corpus", "flavor", "sequences", "seq_len", "steps", "validations", "engram", "overrides")

Curve = list[tuple[float, float]]  # (tokens, validation loss)

_WRITING = threading.Lock()


def at_tokens(curve: Curve, tokens: float) -> float:
    """The loss between two validations, by a straight line; NaN outside of the curve."""
    place = bisect_left(curve, tokens, key=lambda point: point[0])
    if place < len(curve) and curve[place][0] == tokens:
        return curve[place][1]
    if not 0 < place < len(curve):
        return math.nan
    (before, higher), (after, lower) = curve[place - 1 : place + 1]
    return higher + (lower - higher) * (tokens - before) / (after - before)


def spread(losses: list[float]) -> float:
    """Standard deviation of a sample; NaN for a single value."""
    return statistics.stdev(losses) if len(losses) > 1 else math.nan


def summary(losses: list[float]) -> str:
    """Mean and spread."""
    mean = f"{statistics.fmean(losses):.4f}"
    return f"{mean} ± {spread(losses):.4f}" if len(losses) > 1 else mean


def difference(losses: list[float], plain: list[float]) -> str:
    """The means' difference, in units of the spread too, where there is one."""
    mean = statistics.fmean(losses) - statistics.fmean(plain)
    unit = math.sqrt((spread(losses) ** 2 + spread(plain) ** 2) / 2)
    return f"{mean:+.4f} ({mean / unit:+.1f} spreads)" if unit > 0 else f"{mean:+.4f}"


def speeds_of(results: dict[str, Any]) -> dict[str, float]:
    """Tokens/s of each variant that has run alone."""
    return {
        name: statistics.median(alone)
        for name, runs in results["runs"].items()
        if (alone := [run["tokens_per_second"] for run in runs.values() if run["is_alone"]])
    }


def at_equal_time(results: dict[str, Any], name: str, share: float) -> list[float]:
    """Losses of a variant's seeds after `share` of its tokens: of runs that end there, or else on the way."""
    runs = results["runs"][name]
    ending = results["timed_runs"].get(name, {})
    if set(ending) == set(runs):
        return [ending[seed]["curve"][-1][1] for seed in runs]
    return [at_tokens(run["curve"], share * run["curve"][-1][0]) for run in runs.values()]


def table(results: dict[str, Any]) -> list[str]:
    """Rows of a Markdown table of the variants that have runs, and a line that says what equal time is."""
    runs = {name: list(by_seed.values()) for name, by_seed in results["runs"].items() if by_seed}
    speeds = speeds_of(results)
    tokens = max((run["curve"][-1][0] for each in runs.values() for run in each), default=0)
    fastest = max(speeds, key=lambda name: speeds[name], default=None)
    losses = {
        name: (
            [run["curve"][-1][1] for run in each],
            at_equal_time(results, name, speeds[name] / speeds[fastest]),
        )
        for name, each in runs.items()
    }
    lines = [
        "| variant | parameters | tokens/s | seeds | loss at equal tokens | to plain | loss at equal time | to plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in runs.items():
        cells = [name, f"{results['parameters'][name] / 1e6:.1f}M", f"{speeds[name]:,.0f}", str(len(each))]
        for found, plain in zip(losses[name], losses.get("plain", ([], []))):
            cells += [summary(found), difference(found, plain) if plain and name != "plain" else ""]
        lines.append(f"| {' | '.join(cells)} |")
    if fastest:
        seconds = tokens / speeds[fastest]
        lines += ["", f"Equal tokens: {tokens:,.0f}. Equal time: {seconds:.1f} s of training, when `{fastest}` ends."]
    return lines


def model_of(overrides: list[str], arguments: argparse.Namespace) -> ModelConfig:
    """The shape of a variant's model, with the tokenizer's vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        given, rest = split_overrides([*overrides, *arguments.overrides])
        if rest:
            raise SystemExit(f"unknown: {' '.join(rest)}")
        config = load_config(write_config(arguments.shape, arguments, Path(folder)), given)
    return with_vocabulary(config, load_tokenizer(config.data.tokenizer).vocab_size).model


def widened(plain: ModelConfig, parameters: int) -> int:
    """The width of FFN, in steps from plain's own, at which `plain` comes closest to so many parameters."""
    present, _ = parameter_counts(plain)
    wider, _ = parameter_counts(dataclasses.replace(plain, ffn_hidden_dim=plain.ffn_width + FFN_STEP))
    return plain.ffn_width + FFN_STEP * round((parameters - present) / (wider - present))


def overrides_of(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """What each variant that is asked for sets."""
    engram = [part for setting in arguments.engram for part in (f"--model.engram.{setting}").split("=", 1)]
    sets = {"plain": [], "engram": engram, "selective": SELECTIVE, "both": [*engram, *SELECTIVE]}
    if "wide" in arguments.variants:
        wanted, _ = parameter_counts(model_of(engram, arguments))
        sets["wide"] = ["--model.ffn_hidden_dim", str(widened(model_of([], arguments), wanted))]
    return {name: sets[name] for name in arguments.variants}


def one_run(overrides: list[str], seed: int, steps: int, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Train a variant with a seed; returns its speed and curve, or None if it failed."""
    begun = time.monotonic()
    own = {
        "training.steps": steps,
        "job.seed": seed,
        "checkpoint.interval": steps,  # the last step alone, which is always saved
        "lr_schedule.warmup_steps": -1,
        "validation.interval": steps // arguments.validations,
        "validation.max_tokens": VALIDATED,
    }
    sets = [part for key, value in own.items() for part in (f"--{key}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        try:
            _, lines = train(arguments.shape, [*sets, *overrides, *arguments.overrides], arguments, Path(folder))
        except subprocess.TimeoutExpired:
            return None
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line and line["step"] > steps // 3]
    if not speeds:
        return None
    per_step = arguments.sequences * arguments.seq_len
    return {
        "tokens_per_second": statistics.median(speeds),
        "wall_seconds": time.monotonic() - begun,
        "curve": [(line["step"] * per_step, line["val_loss"]) for line in lines if "val_loss" in line],
    }


def begin(arguments: argparse.Namespace) -> dict[str, Any]:
    """Empty results, or those of earlier runs, which must have had the same settings."""
    values = {**vars(arguments), "corpus": arguments.corpus.name}
    settings = {name: values[name] for name in SETTINGS}
    if arguments.out.exists() and not arguments.continues:
        raise SystemExit(f"{arguments.out} exists: add --continue, or choose another --out")
    if not arguments.out.exists():
        return {"settings": settings, "parameters": {}, "runs": {}, "timed_runs": {}}
    results = json.loads(arguments.out.read_text())
    other = [name for name in SETTINGS if results["settings"][name] != settings[name]]
    if other:
        raise SystemExit(f"{arguments.out} has runs of other settings: {', '.join(other)}")
    return results


def write(results: dict[str, Any], path: Path) -> None:
    """Write the results at once, so that a process that is killed leaves them readable."""
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(results, indent=1))
    os.replace(beside, path)


def run_all(results: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Train what `results` lacks, and add it; returns whether it is complete."""
    begun = time.monotonic()
    variants = overrides_of(arguments)
    for name, overrides in variants.items():
        results["parameters"][name], _ = parameter_counts(model_of(overrides, arguments))
        results["runs"].setdefault(name, {})
        results["timed_runs"].setdefault(name, {})

    def train_one(kind: str, name: str, seed: int, steps: int, together: int) -> bool:
        ended = [run for each in results["runs"].values() for run in each.values()]
        longest = max((run["wall_seconds"] * (together if run["is_alone"] else 1) for run in ended), default=0)
        if arguments.minutes and time.monotonic() - begun + longest > 60 * arguments.minutes:
            return False
        found = one_run(variants[name], seed, steps, arguments)
        if found is None:
            print(f"{name}, seed {seed}: failed", file=sys.stderr)
            return False
        with _WRITING:
            results[kind][name][str(seed)] = {**found, "is_alone": together == 1}
            write(results, arguments.out)
        return True

    def train_missing(kind: str, steps: dict[str, int], together: int) -> bool:
        runs = [(name, seed) for seed in arguments.seeds for name in steps if str(seed) not in results[kind][name]]
        with ThreadPoolExecutor(together) as pool:
            return all(list(pool.map(lambda run: train_one(kind, *run, steps[run[0]], together), runs)))

    is_complete = True
    for name in variants:
        if name not in speeds_of(results):
            seed = next(seed for seed in arguments.seeds if str(seed) not in results["runs"][name])
            is_complete = train_one("runs", name, seed, arguments.steps, 1) and is_complete
    speeds = {name: speed for name, speed in speeds_of(results).items() if name in variants}
    is_complete = train_missing("runs", dict.fromkeys(speeds, arguments.steps), arguments.together) and is_complete
    if arguments.equal_time and is_complete:
        is_complete = train_missing("timed_runs", steps_at_equal_time(speeds, arguments), arguments.together)
    return is_complete


def steps_at_equal_time(speeds: dict[str, float], arguments: argparse.Namespace) -> dict[str, int]:
    """How many steps the variants take that are slower than the fastest, while that takes arguments.steps."""
    fastest, validations = max(speeds.values()), arguments.validations
    return {
        name: validations * round(arguments.steps * speed / fastest / validations)
        for name, speed in speeds.items()
        if speed < fastest
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--corpus", required=True, type=Path, help="a .jsonl or .parquet file, or a folder of text")
    parser.add_argument(
        "--tokens", required=True, type=float, help="tokens of a run, rounded up so that validations divide its steps"
    )
    parser.add_argument("--out", required=True, type=Path, help="write the results here as JSON")
    parser.add_argument("--continue", dest="continues", action="store_true", help="train what is not in --out yet")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--together", type=int, default=1, help="runs that share the GPU, after those for the speeds")
    parser.add_argument(
        "--equal-time", action="store_true", help="train slower variants also for as long as the fastest"
    )
    parser.add_argument("--flavor", default="small")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--engram", nargs="+", default=["preset=design"], metavar="KEY=VALUE", help="of [model.engram]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=32, help="sequences a step, in one micro-batch")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--validations", type=int, default=10, help="validations of a run; the last is at its end")
    parser.add_argument("--timeout", type=float, help="seconds a run may take")
    arguments, arguments.overrides = parser.parse_known_args()
    arguments.corpus = arguments.corpus.resolve()
    arguments.shape = f"{arguments.flavor}:1:{arguments.sequences}"
    per_validation = arguments.sequences * arguments.seq_len * arguments.validations
    arguments.steps = arguments.validations * math.ceil(arguments.tokens / per_validation)
    results = begin(arguments)
    complete = run_all(results, arguments)
    print("\n".join(table(results)))
    if not complete:
        raise SystemExit("not complete: run the same again with --continue")


if __name__ == "__main__":
    main()
