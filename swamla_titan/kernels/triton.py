"""Triton's `jit` and `tl`, or, where it is not installed, stand-ins: kernels are defined, and only a launch raises.

So a kernel stands beside its launcher, or is imported as any other module. No process imports Triton because of this
alone: torch.utils.flop_counter, with which our operators register their FLOPs, imports it where it is installed.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Arguments of Triton's programs are pointers and numbers of its own, so the type checker passes kernels by.
    from typing import no_type_check as jit

    tl: Any = None
else:
    try:
        import triton.language as tl
        from triton import jit
    except ImportError:

        class jit:
            """A kernel that cannot be launched."""

            def __init__(self, function: Callable[..., None]) -> None:
                self.__doc__ = function.__doc__

            def __getitem__(self, grid: tuple[int, ...]) -> None:
                """Raises ImportError, which names what is missing."""
                import triton  # noqa: F401

        tl = SimpleNamespace(constexpr=lambda value: value)
