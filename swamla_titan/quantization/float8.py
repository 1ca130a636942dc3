"""Float8 training: converts linear layers of the blocks to compute their matmuls in 8 bits.

By torchao (tensorwise, rowwise, rowwise_with_gw_hp; see torchao.float8.config) or by our own kernels (native.py).
Weights remain float32 parameters of the same names and shapes, so checkpoints of runs with and without float8 are
interchangeable.
"""

import dataclasses
import logging

import torch
from torch import Tensor, nn

from swamla_titan.config.sections import Float8, Recipe
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.layers import FULL, LinearSpec, Sharding, spec_of
from swamla_titan.quantization.coverage import LinearCoverage, Sides, full_sides, survey, table, validate_device
from swamla_titan.quantization.native import convert_natively, settings_of
from swamla_titan.quiet_torchao import quiet_torchao

quiet_torchao()

from torchao.float8 import (  # noqa: E402
    Float8LinearConfig,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args  # noqa: E402
from torchao.float8.float8_training_tensor import Float8TrainingTensor  # noqa: E402

logger = logging.getLogger(__name__)


class Float8MasterLinear(Float8Linear):
    """x W^T in float8, where W is cast to the activations' dtype before it is quantized.

    torchao's Float8Linear would quantize float32 master weights directly and so round differently from FSDP2 with
    bfloat16 parameters, which quantizes the gathered weights. As in model/layers.py, the cast makes both agree; it does
    nothing where the weight has that dtype already, or was gathered in float8.
    """

    sharding: Sharding = FULL
    spec: LinearSpec

    @classmethod
    def of(cls, linear: Float8Linear, spec: LinearSpec) -> "Float8MasterLinear":
        """A layer with the weight of torchao's `linear`, to replace it."""
        with torch.device("meta"):
            master = cls(linear.in_features, linear.out_features, bias=False, config=linear.config)
        master.weight, master.spec = linear.weight, spec
        return master

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in input's dtype."""
        return self.sharding.output(self.matmul(self.sharding.input(input), self.sharding.parameter(self.weight)))

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """As in model/layers.py."""
        if not isinstance(weight, Float8TrainingTensor):
            weight = weight.to(x.dtype)
        out: Tensor = matmul_with_hp_or_float8_args.apply(x, weight.t(), self.linear_mm_config, self.config)
        return out


def convert_to_float8(
    model: SWAMLAModel,
    config: Float8,
    device: torch.device,
    sides: Sides = full_sides,
    norms_cast: bool = True,
    gathered: bool = False,
) -> list[LinearCoverage]:
    """Replace linear layers of the model by float8 ones, in place; none if the recipe is "off".

    Returns and logs which ones, and why not the others (coverage.py). `sides` gives a weight's sides after tensor
    parallelism has sharded it; `norms_cast` is as in `survey`. `gathered`: FSDP2 will gather the weights in float8, so
    the parameters become a subclass of Tensor. Call it on the meta device, before tensor parallelism. A CPU emulates
    the matmuls: it quantizes the operands and multiplies in float32.

    Raises UserError as `validate_device` does. A pipeline stage without layers to convert is no error, because
    `validate_coverage` checks the full model before any rank begins.
    """
    if config.recipe == "off":
        return []
    validate_device(config.recipe, device)
    coverage = survey(model, config, sides, norms_cast)
    names = {each.name for each in coverage if each.why_not is None}
    if config.recipe == "native":
        convert_natively(model, names, settings_of(config.gradient_dtype, config.fast_accumulation))
    else:
        _convert_by_torchao(model, names, config.recipe, device, gathered)
    for line in table(coverage, config.recipe, emulated=device.type != "cuda"):
        logger.info("%s", line)
    return coverage


def _convert_by_torchao(
    model: SWAMLAModel, names: set[str], recipe: Recipe, device: torch.device, gathered: bool
) -> None:
    specs = {name: spec_of(name, model.get_submodule(name)) for name in names}
    plan = Float8LinearConfig.from_recipe_name(recipe)
    plan = dataclasses.replace(plan, emulate=device.type != "cuda")
    # A tied head's weight is the embedding's, which is read in full precision: FSDP2 must not gather it in float8.
    for apart, mine in ((False, names - {"head"}), (True, names & {"head"})):
        convert_to_float8_training(
            model,
            module_filter_fn=lambda module, name, mine=mine: name in mine,
            config=dataclasses.replace(plan, enable_fsdp_float8_all_gather=gathered and not apart),
        )
    for name, spec in specs.items():
        linear = model.get_submodule(name)
        assert type(linear) is Float8Linear
        model.set_submodule(name, Float8MasterLinear.of(linear, spec))


def compute_scales(model: nn.Module) -> None:
    """Compute the scales of all weights that FSDP2 gathers in float8, with one all-reduce.

    All ranks call it after each change of the weights, because otherwise each all-gather would compute and all-reduce a
    scale of its own.
    """
    precompute_float8_dynamic_scale_for_fsdp(model)
