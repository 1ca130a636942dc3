"""The formats in which a parameter's moments are kept between steps, and how many bytes they take.

In float32 and bfloat16 a moment is one tensor of the parameter's shape. Quantized moments (torchao's: dynamic 8 bits,
arXiv:2110.02861; 4 bits, arXiv:2309.01507; float8 e4m3fn) are two tensors: codes [rows, columns], or [rows, columns /
2] with two codes of 4 bits in a byte, and float32 scales [rows, columns / block]. torchao's tensor class holds the same
values; but tensors without a class of their own, sharded as the parameter is, can be stored in a checkpoint without
pickled classes and resharded to any number of ranks, because no block is split between ranks (groups.block_size).
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from swamla_titan.distributed.dtensor import local, zeros_sharded_like
from swamla_titan.model.row_table import RowTable
from swamla_titan.optim.groups import Kind, block_size
from swamla_titan.quiet_torchao import quiet_torchao

_ADAMW = ("exp_avg", "exp_avg_sq")
_BY_ROWS = ("rows", "all_rows")
_COUNTS_STEPS = ("adamw", *_BY_ROWS)
# As torch's optimizers name them.
_NAMES = {"adamw": _ADAMW, "lion": ("exp_avg",), "muon": ("momentum_buffer",)} | dict.fromkeys(_BY_ROWS, _ADAMW)


def new_state(parameter: nn.Parameter, kind: Kind, unit: int, table: RowTable | None = None) -> dict[str, Tensor]:
    """Zeroed moments in the parameter's memory, sharded as the parameter is, and AdamW's step count.

    Of a `table` also `touched` [rows, 1], int32: the step count at which a row was last looked up; on the device.
    """
    zeros = table.zeros if table else functools.partial(zeros_sharded_like, parameter)
    if _is_quantized(kind):
        quiet_torchao()  # before it is imported, which happens below and within compiled code
    state = {
        name: zeros(parameter.shape[-1] // divisor, dtype)
        for name, (dtype, divisor) in _layout(parameter, kind, unit).items()
    }
    if kind.rule in _BY_ROWS:
        state["touched"] = zeros_sharded_like(parameter, 1, torch.int32)
    if kind.rule in _COUNTS_STEPS:
        state["step"] = torch.zeros((), device=local(parameter).detach().device)
    return state


def bytes_of_state(parameter: nn.Parameter, kind: Kind, unit: int) -> int:
    """Bytes of `new_state` on this rank; the parameter may be on the meta device."""
    held = local(parameter).numel()
    moments = sum(held // divisor * dtype.itemsize for dtype, divisor in _layout(parameter, kind, unit).values())
    touched = 4 * len(local(parameter)) if kind.rule in _BY_ROWS else 0
    return moments + touched + (4 if kind.rule in _COUNTS_STEPS else 0)


def moments_in(state: Mapping[str, Tensor], kind: Kind) -> list[list[Tensor]]:
    """Views of each moment's local shard: [values], flat, or [codes [blocks, codes of one], scales [blocks]]."""
    if not _is_quantized(kind):
        return [[local(state[name]).view(-1)] for name in _NAMES[kind.rule]]
    found = []
    for name in _NAMES[kind.rule]:
        scales = local(state[f"{name}_scale"]).view(-1)
        found.append([local(state[f"{name}_codes"]).view(len(scales), -1) if len(scales) else scales, scales])
    return found


def code_tables(kind: Kind, device: torch.device) -> tuple[Tensor | None, ...]:
    """The value of each code, float32, for each moment; None where the moments have no codes, or float8 ones."""
    signed = (True, False)  # the second moment is a mean of squares
    return tuple(_code_table(kind.moments, each, device) for each, _ in zip(signed, _NAMES[kind.rule]))


def dequantize(kept: list[Tensor], name: str, table: Tensor | None) -> Tensor:
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


def quantize(moment: Tensor, name: str, table: Tensor | None) -> list[Tensor]:
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


def _layout(parameter: nn.Parameter, kind: Kind, unit: int) -> dict[str, tuple[torch.dtype, int]]:
    """For each tensor of the state by name, its dtype, and how many of the parameter's columns one of its has."""
    names = _NAMES[kind.rule]
    if not _is_quantized(kind):
        return {name: (getattr(torch, kind.moments), 1) for name in names}
    codes = {f"{name}_codes": (torch.uint8, 2 if kind.moments == "adamw4bit" else 1) for name in names}
    return codes | {
        f"{name}_scale": (torch.float32, block_size(kind.moments, parameter.shape[-1], unit)) for name in names
    }


def _is_quantized(kind: Kind) -> bool:
    return kind.moments not in ("float32", "bfloat16")


@functools.cache
def _code_table(name: str, signed: bool, device: torch.device) -> Tensor | None:
    if name not in ("adamw8bit", "adamw4bit"):
        return None
    from torchao.optim import subclass_4bit, subclass_8bit

    module = subclass_8bit if name == "adamw8bit" else subclass_4bit
    values = module.get_qmap_signed() if signed else module.get_qmap_unsigned()
    return torch.tensor(values, dtype=torch.float32, device=device)
