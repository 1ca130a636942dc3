"""The least time that each part of a training step can take on an H100, beside what was measured of it.

    python benchmarks/floors.py --runs base:16 medium:16
    python benchmarks/floors.py --measured steps.json                 # of train_step.py --profile --out steps.json

A part is bound by arithmetic, at what the largest single products reach by themselves, or by the bytes that must be
read and written once, block by block, at the speed of a copy: whichever is longer. It needs no GPU. In bfloat16,
without documents or activation checkpoints, AdamW, on one GPU.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from swamla_titan.model import FLAVORS, ModelConfig, SWAMLAModel
from swamla_titan.model.blocks import attention_kinds
from swamla_titan.model.branch import Attention

FLOPS, BYTES = 793e12, 3.0e12  # a second


def seconds(flops: float, moved: float) -> float:
    return max(flops / FLOPS, moved / BYTES)


def floors(config: ModelConfig, sequences: int, seq_len: int) -> dict[str, float]:
    """Kind of kernel, as train_step.py has them -> milliseconds a step."""
    with torch.device("meta"):
        model = SWAMLAModel(config)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens, attentions = sequences * seq_len, attention_kinds(config)
    kinds = [attentions[kind] for kind in config.block_kinds]
    products = sum(seconds(6 * tokens * each.weight.numel(), 0) for each in linears)
    attention = sum(_attention(config, kind, sequences, seq_len) for kind in kinds)
    between = sum(_between(config, kind, tokens) for kind in kinds)
    # Logits in bfloat16 are exchanged for their gradient.
    between += seconds(0, 2 * 2 * tokens * model.head.weight.shape[0])
    # Weights are read in float32 and written in bfloat16, gradients the other way.
    between += seconds(0, 12 * parameters)
    # Gradients are read for their norm; then weight, gradient and moments, and all but the gradient are written.
    optimizer = seconds(0, (4 + 16 + 12) * parameters)
    found = {"products": products, "attention": attention, "fused": between, "optimizer": optimizer}
    return {f"{kind}_ms": 1e3 * value for kind, value in found.items()}


def _attention(config: ModelConfig, kind: type[Attention], sequences: int, seq_len: int) -> float:
    """Forward and backward: two products and five."""
    tokens, pairs = sequences * seq_len, kind.pairs(config, seq_len)
    heads, key_heads, width, v_width = kind.heads(config)
    flops = 2 * sequences * heads * pairs * ((width + v_width) + (3 * width + 2 * v_width))
    forward = heads * (width + v_width) + key_heads * (width + v_width)  # queries and result, keys and values
    backward = heads * (2 * width + 2 * v_width) + 2 * key_heads * (width + v_width)
    return seconds(flops, 2 * tokens * (forward + backward))


def _between(config: ModelConfig, kind: type[Attention], tokens: int) -> float:
    """What lies between the products of a block, forward and backward, each tensor once."""
    dim, hidden = config.dim, config.ffn_width
    forward = 2 * dim + 4 * dim + 3 * dim + 3 * hidden  # norm; sum and norm; sum; SwiGLU
    backward = 4 * dim + 4 * dim + 5 * hidden  # norm and sum of gradients, twice; SwiGLU
    heads, rotary = kind.heads(config), kind.rotary(config).width
    # Rotary parts of queries. Keys with other parts are put together from these and a rotary part that heads share.
    of_key = heads.qk_width if rotary == heads.qk_width else heads.qk_width - rotary + rotary // 2
    rotated = heads.queries * rotary + heads.keys * of_key
    return seconds(0, 2 * tokens * (forward + backward + 2 * 2 * rotated))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", default=[], metavar="FLAVOR:SEQUENCES")
    parser.add_argument("--measured", type=Path, help="JSON of train_step.py; its runs in bfloat16 are taken")
    parser.add_argument("--seq-len", type=int, default=2048)
    arguments = parser.parse_args()
    measured = json.loads(arguments.measured.read_text()) if arguments.measured else {}
    for run in [*arguments.runs, *(name for name in measured if "," not in name and name not in arguments.runs)]:
        took = measured.get(run, {})
        if run in measured and "step_ms" not in took:
            continue  # it did not fit
        seq_len = took.get("seq_len", arguments.seq_len)  # older files do not say
        flavor, _, sequences = run.partition("/")[0].partition(":")
        config = dataclasses.replace(FLAVORS[flavor], vocab_size=50257, max_seq_len=seq_len)
        found = floors(config, int(sequences), seq_len)
        tokens = int(sequences) * seq_len
        for kind, floor in found.items():
            beside = f"  took {took[kind]:6.1f}, {took[kind] / floor:.2f} times" if kind in took else ""
            print(f"{run:<12} {kind.removesuffix('_ms'):<10} {floor:7.1f} ms{beside}")
        total = sum(found.values())
        beside = f"  took {took['step_ms']:6.1f}, {took['step_ms'] / total:.2f} times" if took else ""
        print(f"{run:<12} {'all':<10} {total:7.1f} ms{beside}  {tokens / total:.0f}K tokens/s at most")


if __name__ == "__main__":
    main()
