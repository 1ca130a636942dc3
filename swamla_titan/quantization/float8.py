"""float8 training by torchao: the products of the blocks in 8 bits, everything else as it was.

Weights stay what they were, float32 parameters of the same names and shapes, so checkpoints of runs with and without
float8 are interchangeable. What is quantized, and with how many scales, is the recipe's: see torchao.float8.config.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from swamla_titan.config.rules import FLOAT8_MULTIPLE as MULTIPLE
from swamla_titan.config.sections import Float8
from swamla_titan.errors import UserError
from swamla_titan.model import SWAMLAModel

# torchao warns at its import that it has no kernels of its own for this Python or CPU; float8 training uses torch's.
# torch warns of how torchao registers its enumerations.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # noqa: E402
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args  # noqa: E402

logger = logging.getLogger(__name__)

_FIRST_CAPABILITY = (8, 9)  # of CUDA devices with such units


class Float8MasterLinear(Float8Linear):
    """x W^T in float8, from activations in their dtype and W cast to that same dtype first.

    Float8Linear by itself would quantize float32 master weights directly and so round differently from FSDP2 with
    bfloat16 parameters, which quantizes what it gathered. As in model/linear.py, the cast makes both the same, and it
    does nothing where the weight has the dtype already.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in input's dtype."""
        return self.product(input, self.weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` with another weight in the place of the module's own, as in model/linear.py."""
        weight = weight.to(x.dtype)
        out: Tensor = matmul_with_hp_or_float8_args.apply(x, weight.t(), self.linear_mm_config, self.config)
        return out


Sides = Callable[[str, nn.Linear], tuple[int, int]]
"""(name, product) -> [out, in] of the weight that a rank multiplies with."""


def whole_sides(name: str, linear: nn.Linear) -> tuple[int, int]:
    """Of a product that is not shared by ranks."""
    return linear.out_features, linear.in_features


def convert_to_float8(model: SWAMLAModel, config: Float8, device: torch.device, sides: Sides = whole_sides) -> None:
    """Exchange the `Linear`s of `model.blocks` for Float8MasterLinear, in place; nothing if the recipe is "off".

    A product is left as it is where a side of its weight is no multiple of 16, or will not be when tensor parallelism
    has divided it (`sides`); the log says which. The output head is
    not converted. Comes first of all, on the meta device, before tensor parallelism. On a CPU the products are
    emulated: quantized and multiplied in float32.

    Raises UserError for a GPU without float8 units (compute capability below 8.9) and where nothing can be converted.
    """
    if config.recipe == "off":
        return
    if device.type == "cuda":
        _require_float8_units(device)
    recipe = Float8LinearConfig.from_recipe_name(config.recipe)
    recipe = dataclasses.replace(recipe, emulate=device.type != "cuda")

    blocks = model.blocks
    linears = {name: module for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    left = {name: sides(name, module) for name, module in linears.items() if not _fits(sides(name, module))}
    if len(left) == len(linears):
        raise UserError(
            f'float8.recipe = "{config.recipe}" would convert none of {len(linears)} products: the sides of their '
            f"weights are no multiples of {MULTIPLE} ({_summary(left)}). Choose other widths, or set it to off"
        )
    convert_to_float8_training(
        blocks, module_filter_fn=lambda module, name: name in linears and name not in left, config=recipe
    )
    for module in blocks.modules():
        if type(module) is Float8Linear:
            module.__class__ = Float8MasterLinear
    converted = len(linears) - len(left)
    rest = f"; left as they are, for a side that is no multiple of {MULTIPLE}: {_summary(left)}" if left else ""
    how = "emulated " if recipe.emulate else ""
    logger.info("%sfloat8 (%s): %d of %d products converted%s", how, config.recipe, converted, len(linears), rest)


def _require_float8_units(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _FIRST_CAPABILITY:
        raise UserError(
            f"float8.recipe needs a GPU of compute capability 8.9 or higher (Ada, Hopper, ...); "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}. Set it to off"
        )


def _fits(sides: tuple[int, int]) -> bool:
    return all(side % MULTIPLE == 0 for side in sides)


def _summary(left: dict[str, tuple[int, int]]) -> str:
    """`2 x attention.wkv_a 64 -> 72`: kinds of products by their names within a block."""
    kinds = Counter(f"{name.partition('.')[2]} {inner} -> {outer}" for name, (outer, inner) in left.items())
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
