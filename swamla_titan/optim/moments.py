"""How the moments of a parameter are kept between steps, and how many bytes that takes.

float32 and bfloat16 are one tensor of the parameter's shape. Quantized moments (torchao's: dynamic 8 bits of
arXiv:2110.02861, 4 bits of arXiv:2309.01507, float8 e4m3fn) are two plain tensors, codes [rows, columns] or, two of 4
bits in a byte, [rows, columns / 2], and float32 scales [rows, columns / block]. torchao's own tensor class holds the
same numbers; but plain tensors, cut like the parameter, are what checkpoints can store without pickled classes and hand
to any number of ranks, for no rank ever holds a part of a block (groups.block_of).
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from swamla_titan.distributed.dtensor import local, zeros_sharded_like
from swamla_titan.optim.groups import Kind, block_of
from swamla_titan.quiet_torchao import quiet_torchao

_ADAMW = ("exp_avg", "exp_avg_sq")
_NAMES = {"adamw": _ADAMW, "lion": ("exp_avg",), "muon": ("momentum_buffer",)}  # as torch's optimizers name them


def new_state(parameter: nn.Parameter, kind: Kind, unit: int) -> dict[str, Tensor]:
    """Zeros: moments on the parameter's device, cut like the parameter, and AdamW's count of steps."""
    if _is_quantized(kind):
        quiet_torchao()  # which is imported below, and there within compiled code
    state = {
        name: zeros_sharded_like(parameter, parameter.shape[-1] // divisor, dtype)
        for name, (dtype, divisor) in _layout(parameter, kind, unit).items()
    }
    if kind.rule == "adamw":
        state["step"] = torch.zeros((), device=local(parameter).detach().device)
    return state


def bytes_of_state(parameter: nn.Parameter, kind: Kind, unit: int) -> int:
    """Bytes of `new_state` on this rank, whose parameter may have no values."""
    held = local(parameter).numel()
    moments = sum(held // divisor * dtype.itemsize for dtype, divisor in _layout(parameter, kind, unit).values())
    return moments + (4 if kind.rule == "adamw" else 0)


def moments_in(state: Mapping[str, Tensor], kind: Kind) -> list[list[Tensor]]:
    """Views of each moment's part on this rank: [moment], flat, or [codes [blocks, their codes], scales [blocks]]."""
    if not _is_quantized(kind):
        return [[local(state[name]).view(-1)] for name in _NAMES[kind.rule]]
    found = []
    for name in _NAMES[kind.rule]:
        scales = local(state[f"{name}_scale"]).view(-1)
        found.append([local(state[f"{name}_codes"]).view(len(scales), -1) if len(scales) else scales, scales])
    return found


def maps_of(kind: Kind, device: torch.device) -> tuple[Tensor | None, ...]:
    """What the codes of each moment stand for, float32; None where they are numbers themselves."""
    signed = (True, False)  # the second moment is a mean of squares
    return tuple(_map(kind.moments, each, device) for each, _ in zip(signed, _NAMES[kind.rule]))


def restored(kept: list[Tensor], name: str, table: Tensor | None) -> Tensor:
    """A moment in float32, [blocks, block] or of the shape it is kept in."""
    if len(kept) == 1:
        return kept[0].float()
    codes, scale = kept
    if name == "adamw_fp8":
        return codes.view(torch.float8_e4m3fn).float() * scale.view(-1, 1)
    if name == "adamw4bit":
        codes = torch.stack([codes >> 4, codes & 0b1111], dim=-1).flatten(1)
    assert table is not None
    return table[codes.int()] * scale.view(-1, 1)


def condensed(moment: Tensor, name: str, table: Tensor | None) -> list[Tensor]:
    """The tensors in which a moment [blocks, block], float32, is kept; like `restored` for those of 16 or 32 bits."""
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
    """Name of a tensor -> its type, and how many of the parameter's columns one of its own stands for."""
    names = _NAMES[kind.rule]
    if not _is_quantized(kind):
        return {name: (getattr(torch, kind.moments), 1) for name in names}
    codes = {f"{name}_codes": (torch.uint8, 2 if kind.moments == "adamw4bit" else 1) for name in names}
    return codes | {
        f"{name}_scale": (torch.float32, block_of(kind.moments, parameter.shape[-1], unit)) for name in names
    }


def _is_quantized(kind: Kind) -> bool:
    return kind.moments not in ("float32", "bfloat16")


@functools.cache
def _map(name: str, signed: bool, device: torch.device) -> Tensor | None:
    if name not in ("adamw8bit", "adamw4bit"):
        return None
    from torchao.optim import subclass_4bit, subclass_8bit

    module = subclass_8bit if name == "adamw8bit" else subclass_4bit
    values = module.get_qmap_signed() if signed else module.get_qmap_unsigned()
    return torch.tensor(values, dtype=torch.float32, device=device)
