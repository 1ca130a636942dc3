"""What computes attention, and what lies between the products, in a run."""

import torch

from swamla_titan.config import Config
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.kernels.device import has_triton
from swamla_titan.model.context import attention_path, is_plainly_causal
from swamla_titan.parallel.context import kernel_without_mask
from swamla_titan.parallel.kernels import are_pointwise_ours, is_gpu_with_triton, why_rotation_is_plain
from swamla_titan.parallel.parallelize import float8_products
from swamla_titan.parallel.sequence_layout import SequenceLayout


def attention_of(config: Config, world: World) -> str:
    """What computes the attention of each kind of block, in words; UserError if kernels.attention is not to be had.

    What does not depend on the machine is refused with the configuration.
    """
    asked = config.kernels.attention
    paths = {kind: _path(kind, config, world) for kind in ("swa", "mla") if kind in config.model.block_kinds}
    if asked in ("triton", "flex") and asked not in paths.values():
        if world.device.type != "cuda":
            why = "needs a GPU"
        elif asked == "triton" and not has_triton():
            why = "needs the package triton, which comes with PyTorch for CUDA"
        else:
            why = f"takes no heads as wide as these in {config.training.compute_dtype}"
        raise UserError(f'kernels.attention = "{asked}" {why}; with "auto" what fits is taken')
    return ", ".join(f"{kind.upper()} by {path}" for kind, path in paths.items())


def pointwise_of(config: Config, world: World) -> str | None:
    """What our kernels compute between the products, in words; None: nothing. UserError if they are not to be had."""
    if not are_pointwise_ours(config, world.device):
        return None
    if not is_gpu_with_triton(world.device):
        raise UserError('kernels.pointwise = "triton" needs a GPU, and the package triton; "auto" takes what fits')
    float8 = {each.kind for each in float8_products(config) if each.why_not is None}
    native = config.float8.recipe == "native" and {"feed_forward.gate_up", "feed_forward.down"} <= float8
    swiglu = "SwiGLU with its cast to float8" if native else "SwiGLU by triton"
    words = []
    for kind in ("swa", "mla"):
        if kind in config.model.block_kinds:
            path = _path(kind, config, world)
            why = why_rotation_is_plain(kind, config, world.device)
            if kind == "swa" and path != "triton":
                why = why or f"attention by {path}"
            words.append(f"{kind.upper()} by {f'torch ({why})' if why else 'triton'}")
    return f"{swiglu}, rotation of {' and '.join(words)}"


def _path(kind: str, config: Config, world: World) -> str:
    asked, model, degree = config.kernels.attention, config.model, config.parallel.context
    dtype, seq_len = getattr(torch, config.training.compute_dtype), config.training.seq_len
    if asked != "reference" and is_plainly_causal(kind, model, seq_len, config.data.document_mask):
        if degree == 1:
            return "sdpa, causal"
        widths = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
        layout = SequenceLayout(seq_len, degree, 0)
        if kind == "mla" and asked != "sdpa" and (kernel := kernel_without_mask(world.device, dtype, layout, *widths)):
            return f"{kernel}, causal by chunks"
    return attention_path(kind, model, asked, world.device, dtype, whole_rows=degree == 1)
