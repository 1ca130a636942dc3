"""Time of the kernels that cast to float8, against the time that memory alone would take; and whether they are right.

    python benchmarks/float8_casts.py                                # base and large, 16 sequences of 2048
    python benchmarks/float8_casts.py --tiles 32 64 128              # which tile is fastest

The floor is the number of bytes that must be read and written, at the speed of a kernel that reads and writes a
gigabyte; and beside it, the time of such a kernel that moves as many bytes, which for small ones is more. `off by` is
the share of numbers that differ from the plain reference: those at the middle between two float8 numbers.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.device_time import device_milliseconds
from swamla_titan.kernels.float8 import casts as float8
from swamla_titan.kernels.float8.casts import scale_for
from swamla_titan.kernels.swiglu import swiglu
from swamla_titan.model import FLAVORS

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16 = torch.bfloat16


def copy_milliseconds(moved: int) -> float:
    """Of a kernel that reads half as many bytes and writes the others."""
    source = torch.zeros(moved // 8, device="cuda")
    target = torch.empty_like(source)
    return device_milliseconds(lambda: torch.neg(source, out=target))  # a copy would be no kernel in a graph


def cases(tokens: int, dim: int, hidden: int, group: int):
    """(name, call, plain result to be cast, scale, type, bytes that must move)."""
    x = torch.randn(tokens, dim, device="cuda", dtype=BF16)
    weight, gain = torch.randn(hidden, dim, device="cuda"), torch.rand(dim, device="cuda")
    gate_up = torch.randn(tokens, 2 * hidden, device="cuda", dtype=BF16)
    grad = torch.randn(tokens, hidden, device="cuda", dtype=BF16)
    rstd = torch.rsqrt(x.float().square().mean(-1) + 1e-6)

    def case(name, call, plain, dtype, moved):
        scale = scale_for(plain.float().abs().amax(), dtype)
        return name, lambda: call(scale, dtype), plain, scale, dtype, moved

    yield case("cast of activations", lambda s, d: float8.float8_cast(x, s, d, BF16), x, E4M3, 4 * x.numel())
    yield case("cast of gradients", lambda s, d: float8.float8_cast(x, s, d, BF16), x, E5M2, 4 * x.numel())
    low = weight.bfloat16()
    yield case("cast of weights", lambda s, d: float8.float8_cast(weight, s, d, BF16), low, E4M3, 6 * weight.numel())
    normed = (x.float() * rstd[:, None] * gain).bfloat16()
    yield case("norm", lambda s, d: float8.cast_rms_norm(x, gain, rstd, s, d, True), normed, E4M3, 4 * x.numel())
    out = swiglu(gate_up.float(), group).bfloat16()
    yield case("swiglu", lambda s, d: float8.cast_swiglu(gate_up, s, group, d, True), out, E4M3, 6 * grad.numel())
    back = float8.swiglu_gradient(grad, gate_up, group).bfloat16()

    def backward(scale, dtype):
        return float8.float8_swiglu_backward(grad, gate_up, scale, group, dtype)

    yield case("swiglu backward", backward, back, E5M2, 10 * grad.numel())


def reductions(tokens: int, hidden: int, group: int):
    """(name, call, bytes that must be read) of the largest numbers that SwiGLU's casts ask for first."""
    gate_up = torch.randn(tokens, 2 * hidden, device="cuda", dtype=BF16)
    grad = torch.randn(tokens, hidden, device="cuda", dtype=BF16)
    yield "swiglu, amax", lambda: float8.swiglu_amax(gate_up, group), 4 * grad.numel()
    yield "backward, amax", lambda: float8.swiglu_gradient_amax(grad, gate_up, group), 6 * grad.numel()
    yield "amax", lambda: float8.tensor_amax(grad), 2 * grad.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flavors", nargs="+", default=["base", "large"])
    parser.add_argument("--tokens", type=int, default=16 * 2048)
    parser.add_argument("--tiles", nargs="+", type=int, default=[float8._TILE])
    arguments = parser.parse_args()
    speed = 2**30 / copy_milliseconds(2**30)  # bytes a millisecond
    print(f"{torch.cuda.get_device_name()}: copies {speed / 1e9:.2f} TB/s")

    def compared(took: float, moved: int) -> str:
        floor = moved / speed
        copy = copy_milliseconds(moved)
        return f"{took:.4f} ms, floor {floor:.4f}, {took / floor:.2f} times; {took / copy:.2f} times a copy"

    for flavor in arguments.flavors:
        model = FLAVORS[flavor]
        for name, call, plain, scale, dtype, moved in cases(
            arguments.tokens, model.dim, model.ffn_width, model.ffn_group
        ):
            rows, columns = call()
            expected = float8.plain_cast(plain, scale, dtype).view(torch.uint8)
            wrong = (rows.view(torch.uint8) != expected).float().mean().item()
            assert torch.equal(columns.view(torch.uint8), rows.view(torch.uint8).t()), name
            for tile in arguments.tiles:
                float8._TILE = tile
                figures = compared(device_milliseconds(call), moved)
                print(f"{flavor:6} {name:20} tile {tile:3}: {figures}; off by {wrong:.1e}", flush=True)
        for name, call, moved in reductions(arguments.tokens, model.ffn_width, model.ffn_group):
            for tile in arguments.tiles:
                float8._TILE = tile
                figures = compared(device_milliseconds(call), moved)
                print(f"{flavor:6} {name:20} tile {tile:3}: {figures}", flush=True)


if __name__ == "__main__":
    main()
