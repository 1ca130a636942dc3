"""Which of our kernels a model computes with, by `[kernels]` of the configuration, the device and the plan."""

from swamla_titan.config import Config
from swamla_titan.errors import UserError
from swamla_titan.kernels.linear_cross_entropy import linear_cross_entropy
from swamla_titan.kernels.rotary_window_attention import rotary_window_attention
from swamla_titan.kernels.swiglu import triton_swiglu
from swamla_titan.kernels.window_attention import has_triton
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.feed_forward import FeedForward
from swamla_titan.model.swa import SlidingWindowAttention
from swamla_titan.parallel.world import World


def choose_kernels(model: SWAMLAModel, config: Config, world: World) -> None:
    """Set them in place, before the model is split or compiled. Raises UserError for what this machine cannot do.

    "auto" takes those that have been timed on a GPU and found faster than what torch.compile makes. Those of the loss
    and between the products have not yet.
    """
    model.attention_backend = config.kernels.attention
    model.linear_loss = linear_cross_entropy if config.kernels.loss == "fused" else None
    if config.kernels.pointwise == "triton":
        if world.device.type != "cuda" or not has_triton():
            raise UserError('kernels.pointwise = "triton" needs a GPU, and the package triton; "auto" takes what fits')
        use_pointwise_kernels(model)


def use_pointwise_kernels(model: SWAMLAModel) -> None:
    """SwiGLU by our kernels, and what lies between the products of SWA blocks in one operator where no norm does."""
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.activate = triton_swiglu
        elif isinstance(module, SlidingWindowAttention) and not model.config.qk_norm:
            module.rotate_and_attend = rotary_window_attention
