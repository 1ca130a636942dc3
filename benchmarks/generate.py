"""Rates of generation: reading prompts, and tokens a second, of a flavor's shape with weights drawn anew.

    python benchmarks/generate.py --corpus speeches.jsonl --model base --batches 1 64 --prompts 128 2048 --profile

Prompts are texts of the corpus, cut to so many tokens. A row of the table is a batch and a length: `prefill` is tokens
of prompts a second; `tokens/s` is what `stream` gives of all sequences after the prompts, greedy or, with
--temperature, sampled; `step` is one step without choice of the token, `floor` what reading weights, windows and
latents once takes at --bandwidth; `cache` is the memory of a sequence's cache per token of its length, and `plain` that
of multi-head attention of the same width. The first of three runs of a batch compiles and captures, and the best of the
others counts. With --variants the same by other means: "kernels" (as `generate` does), "graph" (no kernels of ours),
"eager" (no CUDA graph either).

--profile prints the kernels of a step, by time, and how long none ran.
"""

import argparse
import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from swamla_titan.data import load_tokenizer
from swamla_titan.model import FLAVORS, SWAMLAModel
from swamla_titan.model import cache as cache_module
from swamla_titan.model.generation import Decoder, Options, stream

STEPS = 3  # profiled


def prompts_of(corpus: Path, tokenizer: str, batch: int, length: int) -> list[list[int]]:
    """The first texts of a JSONL file that are long enough, in pieces."""
    encode, found = load_tokenizer(tokenizer).encode, []
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            tokens = encode(json.loads(line)["text"])
            found += [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
            if len(found) >= batch:
                return found[:batch]
    raise SystemExit(f"{corpus} has {len(found)} prompts of {length} tokens, not {batch}")


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_seconds(decoder: Decoder, tokens: torch.Tensor, steps: int) -> float:
    """One step without the choice of a token, of many in a row."""
    synchronize(tokens.device)
    begin = time.perf_counter()
    for _ in range(steps):
        decoder.decode(tokens)
    synchronize(tokens.device)
    return (time.perf_counter() - begin) / steps


def cache_bytes(decoder: Decoder) -> int:
    """Of what the layers remember."""
    tensors = [each for layer in decoder.cache.layers.values() for each in vars(layer).values()]
    return sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))


def floor_seconds(decoder: Decoder, length: int, bandwidth: float) -> float:
    """To read the weights, and the slots of the caches that a token of such a position sees."""
    weights = sum(each.nbytes for each in decoder.model.parameters())
    if not decoder.model.config.tie_embeddings:
        weights -= decoder.model.embedding.weight.nbytes
    seen = 0
    for layer in decoder.cache.layers.values():
        for each in vars(layer).values():
            if isinstance(each, torch.Tensor):
                seen += each.nbytes * min(1.0, length / each.shape[1])
    return (weights + seen) / bandwidth


def measure(
    model: SWAMLAModel, prompts: list[list[int]], arguments: argparse.Namespace, variant: str
) -> dict[str, Any]:
    """A row of the table."""
    new, device, length = arguments.new_tokens, model.device, len(prompts[0])
    decoder = Decoder(model, len(prompts), length + new + 2 * STEPS + 40)
    if variant == "eager":
        decoder._captures = False
    generator = torch.Generator(device=device).manual_seed(0)
    options = Options(new, arguments.temperature, top_p=arguments.top_p, generator=generator, decoder=decoder)
    rates, prefills = [], []
    for _ in range(3):
        synchronize(device)
        begin = time.perf_counter()
        decoder.prefill(prompts)
        synchronize(device)
        prefills.append(time.perf_counter() - begin)
        given = stream(model, prompts, options)
        next(given)
        begin, count = time.perf_counter(), sum(1 for _ in given)
        rates.append(count * len(prompts) / (time.perf_counter() - begin))
    tokens = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    step = step_seconds(decoder, tokens, 30)
    row = {
        "variant": variant,
        "batch": len(prompts),
        "prompt": length,
        "prefill": len(prompts) * length / min(prefills[1:]),
        "tokens/s": max(rates[1:]),
        "step_ms": 1e3 * step,
        "floor_ms": 1e3 * floor_seconds(decoder, length + new // 2, arguments.bandwidth),
        "cache": cache_bytes(decoder) / len(prompts) / decoder.max_tokens,
        "plain": 2 * model.config.num_layers * model.config.dim * model.activation_dtype.itemsize,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
    }
    if arguments.profile and device.type == "cuda":
        print_profile(decoder, tokens, f"{variant}, batch {len(prompts)}, prompts of {length}")
    return row


def print_profile(decoder: Decoder, tokens: torch.Tensor, title: str) -> None:
    """Kernels by time, of one step."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(STEPS):
            decoder.decode(tokens)
        torch.cuda.synchronize()
    kernels = [each for each in seen.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((each.time_range.start, each.time_range.end) for each in kernels)
    idle, end = 0.0, spans[0][0]
    for start, stop in spans:
        idle, end = idle + max(0.0, start - end), max(end, stop)
    total, calls = Counter[str](), Counter[str]()
    for each in kernels:
        total[each.name] += each.time_range.elapsed_us()
        calls[each.name] += 1
    span = (end - spans[0][0]) / STEPS
    print(f"\n{title}: {span:.0f} us a step, idle {idle / STEPS:.0f} us, {len(kernels) // STEPS} kernels")
    for name, time_us in total.most_common(14):
        print(f"  {time_us / STEPS:8.1f} us  {calls[name] / STEPS:5.0f} x {time_us / calls[name]:7.2f}  {name[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--model", default="base", choices=list(FLAVORS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--bandwidth", type=float, default=4.27e12, help="of the device's memory, bytes a second")
    parser.add_argument("--variants", nargs="+", default=["kernels"], choices=["kernels", "graph", "eager"])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    room = max(arguments.prompts) + arguments.new_tokens + 2 * STEPS + 40
    config = dataclasses.replace(FLAVORS[arguments.model], max_seq_len=room)
    with torch.device("meta"):
        model = SWAMLAModel(config)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    model = model.to(getattr(torch, arguments.dtype)).eval()
    takes_kernels, rows = cache_module.why_no_decode_kernels, []
    for variant in arguments.variants:
        if variant != "kernels":
            cache_module.why_no_decode_kernels = lambda *_: "not asked for"
        for batch in arguments.batches:
            for length in arguments.prompts:
                prompts = prompts_of(arguments.corpus, arguments.tokenizer, batch, length)
                rows.append(measure(model, prompts, arguments, variant))
        cache_module.why_no_decode_kernels = takes_kernels
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))
    print(f"\n{'':8} batch prompt  prefill/s   tokens/s  step ms  floor ms  cache B/token  plain  GiB")
    for row in rows:
        print(
            f"{row['variant']:8} {row['batch']:5} {row['prompt']:6} {row['prefill']:10,.0f} {row['tokens/s']:10,.0f} "
            f"{row['step_ms']:8.3f} {row['floor_ms']:9.3f} {row['cache']:14,.0f} {row['plain']:6,} {row['gib']:4.1f}"
        )


if __name__ == "__main__":
    main()
