"""float8 by our own kernels: modules that hand each other float8 numbers instead of casting for themselves.

Parameters keep their names, shapes and float32 values, so a checkpoint does not know the recipe. A norm whose result
goes to converted products alone gives it as float8, once for all of them; `gate_up` gives SwiGLU's result to `down`
likewise, and makes the gradients of its own product as float8. What else reaches a product (attention's result, any
gradient) is cast by itself. Under tensor parallelism norms give what they always gave, as it is sent before it is used.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from swamla_titan.distributed.dtensor import local
from swamla_titan.kernels.float8.casts import float8_cast, scale_for
from swamla_titan.kernels.float8.linear import (
    VALUES,
    Operand,
    Settings,
    gate_up_product,
    normalize,
    product,
    quantize,
)
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.blocks import Block
from swamla_titan.model.linear import Linear, spec_of
from swamla_titan.model.norms import EPS, DynamicTanh, Norm, RMSNorm

_APART = 4  # float32 numbers from one weight's scale to the next: cuBLASLt reads a scale at multiples of 16 bytes


class NativeLinear(Linear):
    """x W^T in float8, of x that is cast already or will be here.

    `keeps_columns`: W's float8 numbers wait for the backward pass; else W itself does, to be cast anew, where FSDP2
    frees it and gathers it again.
    """

    settings: Settings
    keeps_columns: bool
    cast: tuple[Tensor, Tensor, Tensor] | None  # W's rows, columns and scale, for the micro-batches of a step

    @classmethod
    def of(cls, linear: Linear, settings: Settings) -> "NativeLinear":
        """What takes the place of a linear layer, with its weight."""
        with torch.device("meta"):
            native = cls(linear.in_features, linear.out_features, **vars(linear.spec))
        native.weight = linear.weight
        native.settings, native.keeps_columns, native.cast = settings, True, None
        return native

    def matmul(self, x: Tensor | Operand, weight: Tensor) -> Tensor:
        """As in model/linear.py."""
        return product(*self._operands(x, weight), self.settings)

    def _operands(self, x: Tensor | Operand, weight: Tensor) -> tuple[Operand, Operand]:
        x = x if isinstance(x, Operand) else quantize(x)
        if self.cast is not None:
            return x, Operand(weight, *self.cast)
        # Through the activations' dtype, in which FSDP2 gathers weights: so one process and many cast the same.
        return x, quantize(weight, x.carrier.dtype, self.keeps_columns)


class NativeHead(NativeLinear):
    """The output head; the loss that is one with it is computed in full precision and excluded."""

    def forward(self, x: Tensor | Operand, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features] in x's dtype."""
        assert loss is None, 'kernels.loss = "fused" and float8.output_head contradict each other'
        return super().forward(x)  # type: ignore[arg-type]


class NativeGateUp(NativeLinear):
    """The product before SwiGLU, with it: what comes out is [..., hidden units] in float8."""

    group: int

    def matmul(self, x: Tensor | Operand, weight: Tensor) -> Operand:  # type: ignore[override]
        """As in model/linear.py."""
        return gate_up_product(*self._operands(x, weight), self.group, self.settings)


class NativeRMSNorm(RMSNorm):
    """RMSNorm in float8; under tensor parallelism as ever."""

    def forward(self, x: Tensor) -> Tensor | Operand:  # type: ignore[override]
        """[..., dim] -> [..., dim]."""
        if not self.sharding.is_full:
            return super().forward(x)
        return normalize(x, self.weight, EPS)


class NativeDynamicTanh(DynamicTanh):
    """DynamicTanh cast to float8, once for all linear layers that follow; under tensor parallelism as ever."""

    def forward(self, x: Tensor) -> Tensor | Operand:  # type: ignore[override]
        """[..., dim] -> [..., dim]."""
        squashed = super().forward(x)
        return quantize(squashed) if self.sharding.is_full else squashed


def convert_natively(model: SWAMLAModel, names: Collection[str], settings: Settings) -> None:
    """Make the products of these names native, in place, and the norms before them where all their readers are."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        model.set_submodule(name, (NativeHead if name == "head" else NativeLinear).of(linear, settings))
    for block in model.blocks.values():
        assert isinstance(block, Block)
        forward = block.feed_forward
        block.attention_norm = _fused_norm(block.attention_norm, block.attention)
        block.ffn_norm = _fused_norm(block.ffn_norm, forward)
        if isinstance(forward.gate_up, NativeLinear) and isinstance(forward.down, NativeLinear):
            gate_up = NativeGateUp.of(forward.gate_up, settings)
            gate_up.group = forward.group  # type: ignore[assignment]
            forward.gate_up = gate_up
            forward.activation = nn.Identity()  # gate_up does it


def keep_weights(model: nn.Module, kept: bool) -> None:
    """Whether float8 weights wait for the backward pass; not where the weights that they are made of are freed."""
    for module in model.modules():
        if isinstance(module, NativeLinear):
            module.keeps_columns = kept


@torch.no_grad()
def cast_weights(model: nn.Module, through: torch.dtype) -> None:
    """Cast all weights once, for passes in which they do not change; until `forget_casts`.

    For weights that a process holds itself, in whole, under DDP too, or by tensor parallelism; FSDP2's come and go with
    their blocks.
    """
    linears = [module for module in model.modules() if isinstance(module, NativeLinear)]
    if not linears:
        return
    weights = [local(each.weight) for each in linears]
    largest = torch.stack(torch._foreach_norm(weights, ord=torch.inf))
    scales = scale_for(largest.to(through), VALUES)[:, None].repeat(1, _APART)[:, 0]
    for linear, weight, scale in zip(linears, weights, scales.unbind()):
        linear.cast = *float8_cast(weight.detach(), scale, VALUES, through), scale


def forget_casts(model: nn.Module) -> None:
    """Of `cast_weights`: the weights are about to change."""
    for module in model.modules():
        if isinstance(module, NativeLinear):
            module.cast = None


def settings_of(gradient_dtype: str, fast_accumulation: bool) -> Settings:
    """From the configuration's words."""
    gradients = {"e5m2": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}[gradient_dtype]
    return Settings(gradients, fast_accumulation)


def _fused_norm(norm: Norm, branch: nn.Module) -> Norm:
    """A norm that casts to float8 if all that reads it is native, else the norm given."""
    linears = ((name, module) for name, module in branch.named_modules() if isinstance(module, nn.Linear))
    readers = [linear for name, linear in linears if spec_of(name, linear).role.reads_residual_stream]
    kind = _NATIVE_NORMS.get(type(norm))
    if kind is None or not readers or not all(isinstance(reader, NativeLinear) for reader in readers):
        return norm
    with torch.device("meta"):
        native = kind(len(norm.weight))
    for name, parameter in norm.named_parameters():
        setattr(native, name, parameter)
    return native


_NATIVE_NORMS: dict[type[Norm], type[Norm]] = {RMSNorm: NativeRMSNorm, DynamicTanh: NativeDynamicTanh}
