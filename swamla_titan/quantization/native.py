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
from swamla_titan.model.norms import EPS, DynamicTanh, RMSNorm

_APART = 4  # float32 numbers from one weight's scale to the next: cuBLASLt reads a scale at multiples of 16 bytes


class NativeLinear(Linear):
    """x W^T in float8, of x that is cast already or will be here.

    `keeps_columns`: W's float8 numbers wait for the backward pass; else W itself does, to be cast anew, where FSDP2
    frees it and gathers it again.
    """

    settings: Settings
    keeps_columns: bool
    cast: tuple[Tensor, Tensor, Tensor] | None  # W's rows, columns and scale, for the micro-batches of a step

    def forward(self, x: Tensor | Operand) -> Tensor:
        """[..., in_features] -> [..., out_features] in x's dtype."""
        return self.product(x, self.weight)

    def product(self, x: Tensor | Operand, weight: Tensor) -> Tensor:
        """`forward` with another weight in the place of the module's own, as in model/linear.py."""
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
        return self.product(x, self.weight)


class NativeGateUp(NativeLinear):
    """The product before SwiGLU, with it: what comes out is [..., hidden units] in float8."""

    group: int

    def product(self, x: Tensor | Operand, weight: Tensor) -> Operand:  # type: ignore[override]
        """`forward` with another weight in the place of the module's own."""
        return gate_up_product(*self._operands(x, weight), self.group, self.settings)


class NativeRMSNorm(RMSNorm):
    """RMSNorm in float8."""

    def forward(self, x: Tensor) -> Operand:  # type: ignore[override]
        """[..., dim] -> [..., dim]."""
        return normalize(x, self.weight, EPS)


class NativeDynamicTanh(DynamicTanh):
    """DynamicTanh cast to float8, once for all products that follow."""

    def forward(self, x: Tensor) -> Operand:  # type: ignore[override]
        """[..., dim] -> [..., dim]."""
        return quantize(super().forward(x))


def activated_already(out: Tensor, group: int) -> Tensor:
    """In the place of SwiGLU behind a NativeGateUp."""
    return out


def convert_natively(model: SWAMLAModel, names: Collection[str], settings: Settings) -> None:
    """Make the products of these names native, in place, and the norms before them where all their readers are."""
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, Linear)
        module.__class__ = NativeHead if name == "head" else NativeLinear
        module.settings, module.keeps_columns, module.cast = settings, True, None  # type: ignore[assignment]
    for block in model.blocks.values():
        assert isinstance(block, Block)
        forward = block.feed_forward
        _fuse_norm(block.attention_norm, block.attention)
        _fuse_norm(block.ffn_norm, forward)
        if isinstance(forward.gate_up, NativeLinear) and isinstance(forward.down, NativeLinear):
            forward.gate_up.__class__ = NativeGateUp
            forward.gate_up.group = forward.group  # type: ignore[assignment]
            forward.activate = activated_already


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


def _fuse_norm(norm: nn.Module, branch: nn.Module) -> None:
    linears = ((name, module) for name, module in branch.named_modules() if isinstance(module, nn.Linear))
    readers = [linear for name, linear in linears if spec_of(name, linear).role.reads_residual_stream]
    if not readers or not all(isinstance(reader, NativeLinear) for reader in readers):
        return
    if type(norm) is RMSNorm:
        norm.__class__ = NativeRMSNorm
    elif type(norm) is DynamicTanh:
        norm.__class__ = NativeDynamicTanh
