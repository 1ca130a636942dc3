"""Which of our kernels a model computes with, by `[kernels]` of the configuration."""

from swamla_titan.config import Config
from swamla_titan.kernels.linear_cross_entropy import linear_cross_entropy
from swamla_titan.kernels.rotary_window_attention import rotary_window_attention
from swamla_titan.kernels.swiglu import triton_swiglu
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.feed_forward import FeedForward
from swamla_titan.model.swa import SlidingWindowAttention


def choose_kernels(model: SWAMLAModel, config: Config) -> None:
    """Set them in place, before the model is split or compiled; train/kernels.py refuses what a machine cannot run.

    "auto" takes those that have been timed on a GPU and found faster than what torch.compile makes. Those of the loss
    and between the products have not yet.
    """
    model.attention_backend = config.kernels.attention
    model.linear_loss = linear_cross_entropy if config.kernels.loss == "fused" else None
    if config.kernels.pointwise == "triton":
        use_pointwise_kernels(model, rotation=why_rotation_is_plain(config) is None)


def use_pointwise_kernels(model: SWAMLAModel, rotation: bool = True) -> None:
    """SwiGLU by our kernels, and with `rotation` what lies between the products of SWA blocks in one operator."""
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.activate = triton_swiglu
        elif isinstance(module, SlidingWindowAttention) and rotation:
            module.rotate_and_attend = rotary_window_attention


def why_rotation_is_plain(config: Config) -> str | None:
    """What in the configuration keeps rotation and attention apart, or None."""
    checkpointing = config.activation_checkpoint
    if config.model.qk_norm:
        return "model.qk_norm"  # lies between projection and rotation
    if checkpointing.mode == "selective" and checkpointing.selective == "operators":
        return "activation_checkpoint"  # which would keep rotated queries and keys beside those of the projection
    return None
