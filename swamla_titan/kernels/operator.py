"""Operators of Triton kernels that torch.compile sees through on a GPU, so that the host launches them fast."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.library import CustomOpDef

from swamla_titan.kernels.device import has_triton


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """torch.library.triton_op without arguments that it writes to; on a CPU, where no kernel is in it, opaque.

    An opaque operator (torch.library.custom_op) takes a hundred microseconds or more of Python each time compiled code
    calls it; of one that is seen through, its kernels alone are launched. On a CPU a compiler would fuse what emulates
    kernels, and keep other tensors for the backward pass than a GPU does. torch's caches of compiled code know our
    operators by their names alone: compile_model puts the code of this folder into its keys.
    """

    def make(function: Callable[..., Any]) -> CustomOpDef:
        if not has_triton():
            return torch.library.custom_op(name, function, mutates_args=())
        made = cast(CustomOpDef, torch.library.triton_op(name, function, mutates_args=()))
        take_apart = made._torch_dispatch_fns[FunctionalTensorMode]  # where torch.compile sees what operators do

        @made.register_torch_dispatch(FunctionalTensorMode)
        def _(mode: Any, overload: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if any(isinstance(each, Tensor) and each.is_cuda for each in args):
                return take_apart(mode, overload, types, args, kwargs)
            return mode.__torch_dispatch__(overload, types, args, kwargs)

        return made

    return make


def seen_through(kernel: Any) -> Any:
    """A Triton kernel as an `operator` launches it. Those that read by TensorDescriptor cannot be seen through."""
    from triton.runtime.jit import JITFunction

    # Triton's interpreter has kernels of another type, and never comes here from torch.compile.
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
