"""Native float8: modules that compute by our own kernels and pass float8 values to each other.

Parameters keep their names, shapes and float32 values, so a checkpoint does not depend on the recipe. A norm casts its
output once for all linear layers that read it, if all are native; `gate_up` passes SwiGLU's output to `down` in float8,
and has its own output's gradients in float8 too. A linear layer casts its other inputs (attention's output, any
gradient) itself. Under tensor parallelism norms do not cast, because ranks exchange their output before it is used.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from swamla_titan.config.sections import GradientDtype
from swamla_titan.distributed.dtensor import local
from swamla_titan.kernels.float8.casts import float8_cast, scale_for
from swamla_titan.kernels.float8.linear import (
    VALUES,
    Operand,
    Settings,
    float8_linear,
    float8_linear_swiglu,
    quantize,
    rms_norm,
)
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.blocks import Block
from swamla_titan.model.branch import Branch
from swamla_titan.model.layers import EPS, DynamicTanh, Linear, Norm, RMSNorm

_STRIDE = 4  # elements from one weight's scale to the next: cuBLASLt reads scales at multiples of 16 bytes


class NativeLinear(Linear):
    """x W^T in float8; casts x if it is not an Operand.

    `saves_transposed`: W^T is saved in float8 for the backward pass; otherwise W is cast again there, after FSDP2 has
    freed it and gathered it again.
    """

    settings: Settings
    saves_transposed: bool
    cast: tuple[Tensor, Tensor, Tensor] | None  # W and W^T in float8 and their scale, for the micro-batches of a step

    @classmethod
    def of(cls, linear: Linear, settings: Settings) -> "NativeLinear":
        """A native layer with the weight and spec of `linear`, to replace it."""
        with torch.device("meta"):
            native = cls(linear.in_features, linear.out_features, **vars(linear.spec))
        native.weight = linear.weight
        native.settings, native.saves_transposed, native.cast = settings, True, None
        return native

    def matmul(self, x: Tensor | Operand, weight: Tensor) -> Tensor:
        """As in model/layers.py."""
        return float8_linear(*self._operands(x, weight), self.settings)

    def _operands(self, x: Tensor | Operand, weight: Tensor) -> tuple[Operand, Operand]:
        x = x if isinstance(x, Operand) else quantize(x)
        if self.cast is not None:
            return x, Operand(weight, *self.cast)
        # Rounded to the activations' dtype first, because FSDP2 gathers weights in it: one process and many agree.
        return x, quantize(weight, x.placeholder.dtype, self.saves_transposed)


class NativeHead(NativeLinear):
    """The output head, without the fused loss, which would compute it in full precision."""

    def forward(self, x: Tensor | Operand, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features] in x's dtype."""
        assert loss is None, 'kernels.loss = "fused" and float8.output_head contradict each other'
        return super().forward(x)  # type: ignore[arg-type]


class NativeGateUp(NativeLinear):
    """The linear layer before SwiGLU, and SwiGLU: the output is [..., hidden units] in float8."""

    group: int

    def matmul(self, x: Tensor | Operand, weight: Tensor) -> Operand:  # type: ignore[override]
        """As in model/layers.py."""
        return float8_linear_swiglu(*self._operands(x, weight), self.group, self.settings)


class NativeRMSNorm(RMSNorm):
    """RMSNorm that casts its output once for all linear layers that read it; not under tensor parallelism."""

    def forward(self, x: Tensor) -> Tensor | Operand:  # type: ignore[override]
        """[..., dim] -> [..., dim]."""
        if not self.sharding.is_full:
            return super().forward(x)
        return rms_norm(x, self.weight, EPS)


class NativeDynamicTanh(DynamicTanh):
    """DynamicTanh that casts its output, as NativeRMSNorm."""

    def forward(self, x: Tensor) -> Tensor | Operand:  # type: ignore[override]
        """[..., dim] -> [..., dim]."""
        squashed = super().forward(x)
        return quantize(squashed) if self.sharding.is_full else squashed


def convert_natively(model: SWAMLAModel, names: Collection[str], settings: Settings) -> None:
    """Replace the linear layers of these names by native ones, and each norm whose readers are all native."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        model.set_submodule(name, (NativeHead if name == "head" else NativeLinear).of(linear, settings))
    for name, block in model.blocks.items():
        assert isinstance(block, Block)
        for branch, norm in block.branches.items():
            setattr(block, norm, _fused_norm(getattr(block, norm), getattr(block, branch)))
        forward = block.feed_forward
        if fuses_activation(names, f"blocks.{name}.feed_forward"):
            assert isinstance(forward.gate_up, Linear)
            gate_up = NativeGateUp.of(forward.gate_up, settings)
            gate_up.group = forward.group  # type: ignore[assignment]
            forward.gate_up = gate_up
            forward.activation = nn.Identity()  # gate_up applies it


def fuses_activation(converted: Collection[str], feed_forward: str) -> bool:
    """Whether `gate_up` computes the activation too: where both linear layers of the branch are converted."""
    return {f"{feed_forward}.gate_up", f"{feed_forward}.down"} <= set(converted)


def save_transposed_weights(model: nn.Module, saved: bool) -> None:
    """Set whether float8 weights are saved for the backward pass: not where FSDP2 frees what they are cast from."""
    for module in model.modules():
        if isinstance(module, NativeLinear):
            module.saves_transposed = saved


@torch.no_grad()
def cast_weights(model: nn.Module, through: torch.dtype) -> None:
    """Cast all weights once for the micro-batches of a step, until `forget_casts`.

    For weights that stay in a rank's memory: full ones, under DDP too, or tensor-parallel shards. Not for those that
    FSDP2 shards, because it gathers and frees them.
    """
    linears = [module for module in model.modules() if isinstance(module, NativeLinear)]
    if not linears:
        return
    weights = [local(each.weight) for each in linears]
    amax = torch.stack(torch._foreach_norm(weights, ord=torch.inf))
    scales = scale_for(amax.to(through), VALUES)[:, None].repeat(1, _STRIDE)[:, 0]
    for linear, weight, scale in zip(linears, weights, scales.unbind()):
        linear.cast = *float8_cast(weight.detach(), scale, VALUES, through), scale


def forget_casts(model: nn.Module) -> None:
    """Drop the casts of `cast_weights`, because the weights are about to change."""
    for module in model.modules():
        if isinstance(module, NativeLinear):
            module.cast = None


def settings_of(gradient_dtype: GradientDtype, fast_accumulation: bool) -> Settings:
    """The kernels' settings from the configuration's choices."""
    gradients = {"e5m2": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}[gradient_dtype]
    return Settings(gradients, fast_accumulation)


def _fused_norm(norm: Norm, branch: Branch) -> Norm:
    """A norm that casts its output to float8 if all its readers in `branch` are native, else `norm`."""
    readers = branch.input_readers().values()
    kind = _NATIVE_NORMS.get(type(norm))
    if kind is None or not readers or not all(isinstance(reader, NativeLinear) for reader in readers):
        return norm
    with torch.device("meta"):
        native = kind(len(norm.weight))
    for name, parameter in norm.named_parameters():
        setattr(native, name, parameter)
    return native


_NATIVE_NORMS: dict[type[Norm], type[NativeRMSNorm | NativeDynamicTanh]] = {
    RMSNorm: NativeRMSNorm,
    DynamicTanh: NativeDynamicTanh,
}
