"""The formats in which a parameter's moments are kept between steps, and how many bytes they take.

In float32 and bfloat16 a moment is one tensor of the parameter's shape. Quantized moments (torchao's: dynamic 8 bits,
arXiv:2110.02861; 4 bits, arXiv:2309.01507; float8 e4m3fn) are two tensors: codes [rows, columns], or [rows, columns /
2] with two codes of 4 bits in a byte, and float32 scales [rows, columns / block]. torchao's tensor class holds the same
values; but tensors without a class of their own, sharded as the parameter is, can be stored in a checkpoint without
pickled classes and resharded to any number of ranks, because no block is split between ranks (`block_size`).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from swamla_titan.distributed.dtensor import local

Format = Literal["float32", "bfloat16", "adamw8bit", "adamw4bit", "adamw_fp8"]
# Quantized formats, named after their optimizers -> the largest block of elements with one scale; torchao's sizes.
BLOCKS: dict[Format, int] = {"adamw8bit": 256, "adamw4bit": 128, "adamw_fp8": 256}
_SMALLEST_BLOCK = 32  # in smaller ones the scales of both moments take more than a quarter of a byte per element


def layout(names: Sequence[str], form: Format, columns: int, unit: int) -> dict[str, tuple[torch.dtype, int]]:
    """For each tensor by name that keeps moments of these names in a format, its dtype, and how many of a parameter's
    `columns` one of its has; `unit` as in `block_size`."""
    if form not in BLOCKS:
        return {name: (getattr(torch, form), 1) for name in names}
    codes = {f"{name}_codes": (torch.uint8, 2 if form == "adamw4bit" else 1) for name in names}
    return codes | {f"{name}_scale": (torch.float32, block_size(form, columns, unit)) for name in names}


def block_size(name: Format, columns: int, unit: int) -> int:
    """How many consecutive elements of a matrix row share a scale under optimizer `name`; 0: it is not quantized.

    The largest size up to the optimizer's own that divides the row, or `unit`, if ranks may split rows at its
    multiples. So no block is split between ranks, and the quantized values are the same under every plan.
    """
    unsplit = unit or columns
    fitting = [size for size in range(_SMALLEST_BLOCK, BLOCKS[name] + 1, 2) if unsplit % size == 0]
    return max(fitting, default=0)


def moments_in(state: Mapping[str, Tensor], names: Sequence[str], form: Format) -> list[list[Tensor]]:
    """Views of each moment's local shard: [values], flat, or [codes [blocks, codes of one], scales [blocks]]."""
    if form not in BLOCKS:
        return [[local(state[name]).view(-1)] for name in names]
    found = []
    for name in names:
        scales = local(state[f"{name}_scale"]).view(-1)
        found.append([local(state[f"{name}_codes"]).view(len(scales), -1) if len(scales) else scales, scales])
    return found


def code_tables(names: Sequence[str], form: Format, device: torch.device) -> tuple[Tensor | None, ...]:
    """The value of each code, float32, for each moment; None where the moments have no codes, or float8 ones."""
    signed = (True, False)  # the second moment is a mean of squares
    return tuple(_code_table(form, each, device) for each, _ in zip(signed, names))


def dequantize(kept: list[Tensor], name: Format, table: Tensor | None) -> Tensor:
    """A moment in float32: [blocks, block], or in the kept shape if it is not quantized."""
    if len(kept) == 1:
        return kept[0].float()
    codes, scale = kept
    if name == "adamw_fp8":
        return codes.view(torch.float8_e4m3fn).float() * scale.view(-1, 1)
    if name == "adamw4bit":
        codes = torch.stack([codes >> 4, codes & 0b1111], dim=-1).flatten(1)
    assert table is not None
    return table[codes.int()] * scale.view(-1, 1)


def quantize(moment: Tensor, name: Format, table: Tensor | None) -> list[Tensor]:
    """The inverse of `dequantize`: the tensors in which a float32 moment is kept."""
    if name == "float32":
        return [moment]
    if name == "bfloat16":
        return [moment.bfloat16()]
    from torchao.optim import quant_utils, subclass_fp8

    if name == "adamw_fp8":
        codes, scale = subclass_fp8.quantize_fp8(moment, moment.shape[-1])
        return [codes.view(torch.uint8), scale]
    scaled, scale = quant_utils.scale_tensor(moment, moment.shape[-1])
    if name == "adamw8bit":
        return [quant_utils.quantize_8bit_with_qmap(scaled, table), scale]
    codes = quant_utils.quantize_4bit_with_qmap(scaled, table)
    return [(codes[:, ::2] << 4) | codes[:, 1::2], scale]


@functools.cache
def _code_table(name: Format, signed: bool, device: torch.device) -> Tensor | None:
    if name not in ("adamw8bit", "adamw4bit"):
        return None
    from torchao.optim import subclass_4bit, subclass_8bit

    module = subclass_8bit if name == "adamw8bit" else subclass_4bit
    values = module.get_qmap_signed() if signed else module.get_qmap_unsigned()
    return torch.tensor(values, dtype=torch.float32, device=device)
