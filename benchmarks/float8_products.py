"""Where float8 pays: a product's forward and backward pass in bfloat16 and by each recipe, compiled, on a GPU.

    python benchmarks/float8_products.py                                   # the products of base and large
    python benchmarks/float8_products.py --shapes 32768x1536x4608 8192x4096x4096     # tokens x in x out

Weights are float32, activations bfloat16, as in training. `native` casts its input; `native, given` is handed
it in float8, as by a norm. Above 1.00 float8 pays: what `gain` of
swamla_titan/quantization/coverage.py is to say. Times are the GPU's alone: what its host takes to ask is not in them.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.device_time import device_milliseconds
from swamla_titan.config.sections import Float8
from swamla_titan.kernels.float8.linear import quantize
from swamla_titan.model import FLAVORS, SWAMLAModel
from swamla_titan.model.layers import Linear, Role
from swamla_titan.quantization.coverage import gain
from swamla_titan.quantization.float8 import convert_to_float8
from swamla_titan.quantization.native import NativeLinear, settings_of

RECIPES = ("bfloat16", "tensorwise", "rowwise", "rowwise_with_gw_hp", "native", "native, given")


class One(nn.Module):
    """A model of one product."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.product = Linear(inner, out, Role.COLUMN)

    def forward(self, x):
        return self.product(x)


def converted(inner: int, out: int, recipe: str) -> One:
    model = One(inner, out).cuda()
    torch.nn.init.normal_(model.product.weight, std=0.02)
    if recipe == "bfloat16":
        return model
    if recipe.startswith("native"):
        model.product = NativeLinear.of(model.product, settings_of("e5m2", False))
        return model
    convert_to_float8(model, Float8(recipe=recipe, linear_layers="all"), torch.device("cuda"))
    return model


def milliseconds(shape: tuple[int, int, int], recipe: str) -> float:
    """Of forward and backward on the GPU, the input given in float8 where `recipe` says so."""
    tokens, inner, out = shape
    torch._dynamo.reset()
    model = converted(inner, out, recipe)
    x = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(tokens, out, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    given = quantize(x) if recipe.endswith("given") else x

    def step():
        compiled(given).backward(upstream)
        x.grad = model.product.weight.grad = None

    return device_milliseconds(step)


def shapes_of(flavor: str, tokens: int) -> list[tuple[str, tuple[int, int, int]]]:
    with torch.device("meta"):
        model = SWAMLAModel(FLAVORS[flavor])
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[tokens, module.in_features, module.out_features] = f"{flavor} {name.rpartition('.')[2]}"
    return [(name, shape) for shape, name in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flavors", nargs="*", default=["base", "large"])
    parser.add_argument("--tokens", type=int, default=16 * 2048)
    parser.add_argument("--shapes", nargs="*", default=[], metavar="TOKENSxINxOUT")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    arguments = parser.parse_args()
    named = [("", tuple(map(int, text.split("x")))) for text in arguments.shapes]
    if not named:
        named = [each for flavor in arguments.flavors for each in shapes_of(flavor, arguments.tokens)]
    print(torch.cuda.get_device_name(), torch.__version__)
    for name, shape in named:
        exact = milliseconds(shape, "bfloat16")
        tokens, inner, out = shape
        rate = 6 * tokens * inner * out / exact / 1e9
        print(f"{name:16} {tokens} x {inner} x {out}: bfloat16 {exact:.3f} ms ({rate:.0f} TFLOP/s)", flush=True)
        for recipe in arguments.recipes:
            if recipe == "bfloat16":
                continue
            took = milliseconds(shape, recipe)
            pays = "pays" if took < exact else "does not pay"
            expected = gain(recipe.split(",")[0], out, inner, recipe.endswith("given"))
            now = "taken" if expected >= 0 else "left"
            print(f"    {recipe:20} {took:.3f} ms, {exact / took:.2f}: {pays}; {now}", flush=True)


if __name__ == "__main__":
    main()
