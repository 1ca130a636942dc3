"""Operators around Triton kernels that torch.compile inlines on a GPU, so that the host launches them fast."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.library import CustomOpDef

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
