"""What computes attention in a run."""

import torch

from swamla_titan.config import Config
from swamla_titan.errors import UserError
from swamla_titan.model.context import attention_path
from swamla_titan.parallel.world import World


def attention_of(config: Config, world: World) -> str:
    """What computes the attention of each kind of block, in words; UserError if kernels.attention is not to be had."""
    asked, model = config.kernels.attention, config.model
    dtype = getattr(torch, config.training.compute_dtype)
    whole_rows = config.parallel.context == 1
    paths = {
        kind: attention_path(kind, model, asked, world.device, dtype, whole_rows)
        for kind in ("swa", "mla")
        if kind in model.block_kinds
    }
    if asked in ("triton", "flex") and asked not in paths.values():
        needs = "16-bit or float32 activations"
        if asked == "triton":
            needs += (
                f" and, in sliding-window blocks, heads of 64, 96 or 128 (here {model.head_dim}), at most 64 sinks "
                f"(here {model.swa_sink_size}) and parallel.context = 1 (here {config.parallel.context})"
            )
        raise UserError(
            f'kernels.attention = "{asked}" needs a GPU, {needs}; this is {world.device.type} and '
            f'{config.training.compute_dtype}. With "auto" what fits is taken'
        )
    if "mla" in paths and not config.data.document_mask and asked != "reference":
        paths["mla"] = "sdpa, causal"
    return ", ".join(f"{kind.upper()} by {path}" for kind, path in paths.items())
