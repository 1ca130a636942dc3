"""Our operators: inlined by torch.compile on a GPU, so that the host launches them fast; and their gradients."""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula

from swamla_titan.kernels.device import has_triton


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a function as torch.library.triton_op without mutated arguments; on a CPU it stays opaque.

    An opaque operator (torch.library.custom_op) takes a hundred microseconds or more of Python for each call from
    compiled code; of an inlined one only the kernels are launched. On a CPU, inlining would let the compiler fuse the
    plain PyTorch that emulates kernels, and save other tensors for the backward pass than on a GPU. torch's caches of
    compiled code know our operators by name only, so compile_model adds the source of this folder to their keys.
    """

    def make(function: Callable[..., Any]) -> CustomOpDef:
        if not has_triton():
            return torch.library.custom_op(name, function, mutates_args=())
        made = cast(CustomOpDef, torch.library.triton_op(name, function, mutates_args=()))
        inline = made._torch_dispatch_fns[FunctionalTensorMode]  # the mode in which torch.compile traces operators

        @made.register_torch_dispatch(FunctionalTensorMode)
        def _(mode: Any, overload: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if any(isinstance(each, Tensor) and each.is_cuda for each in args):
                return inline(mode, overload, types, args, kwargs)
            return mode.__torch_dispatch__(overload, types, args, kwargs)

        return made

    return make


def inlined(kernel: Any) -> Any:
    """A Triton kernel as an `operator` launches it; kernels that read by TensorDescriptor cannot be inlined."""
    from triton.runtime.jit import JITFunction

    # Triton's interpreter has kernels of another type, and never comes here from torch.compile.
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def differentiate(
    forward: CustomOpDef, backward: CustomOpDef, outputs: tuple[str, ...] = (), flops: Callable[..., int] | None = None
) -> None:
    """Let autograd call one operator for the gradients of another.

    `backward` takes the gradient of the first output, then inputs and `outputs` of `forward` by their names, an output
    before an input of the same name, and gives the gradients of the first inputs. Other outputs than the first are for
    it alone, so they have no gradient, or zeros. What `backward` gives is contiguous and takes those inputs too, or it
    has registered what it gives before. `flops` gives the operations of `forward` from its arguments by name, shapes
    for tensors, and half of those of `backward` from its.
    """
    names, kept = (*_names(forward), *outputs), _names(backward)[1:]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # those of other outputs would be tensors of zeros
        found = dict(zip(names, (*inputs, *_in_tuple(output))))
        tensors = [found[name] if isinstance(found[name], Tensor) else None for name in kept]
        ctx.others = [None if isinstance(found[name], Tensor) else found[name] for name in kept]
        ctx.save_for_backward(*tensors)

    def gradients(ctx: Any, grad: Tensor | None, *of_other_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(wanted)
        given = [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others)]
        found = zip_longest(_in_tuple(backward(grad, *given)), wanted)
        return tuple(each if is_wanted else None for each, is_wanted in found)

    def fake(*given: Any) -> Tensor | tuple[Tensor, ...]:
        of_names = dict(zip(_names(backward), given))
        found = tuple(of_names[name].new_empty(of_names[name].shape) for name in names[:number])
        return found if number > 1 else found[0]

    number = len(backward._opoverload._schema.returns)
    if backward._abstract_fn is None:
        backward.register_fake(fake)
    forward.register_autograd(gradients, setup_context=setup)
    if flops is not None:
        _count(forward, 1, flops)
        _count(backward, 2, flops)


def _count(operator: CustomOpDef, times: int, flops: Callable[..., int]) -> None:
    """For torch's FlopCounterMode, by which the compiler estimates what recomputing an operator costs, else nothing.

    The formulas count as model/counts.py does: visible pairs, as if each sequence were one document. (torch counts all
    pairs, and in the backward pass of attention the recomputed scores too.)
    """
    names = _names(operator)

    @register_flop_formula(operator._opoverload.overloadpacket)
    def _(*given: Any, **_out: Any) -> int:
        return times * flops(**dict(zip(names, given)))


def _names(operator: CustomOpDef) -> list[str]:
    return [each.name for each in operator._opoverload._schema.arguments]


def _in_tuple(found: Any) -> tuple[Any, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)
