"""The shapes and devices that our kernels support, for the configuration, which is read before torch is imported."""

from typing import Literal

# "auto": the fastest that device, dtype and shape allow; "triton": our kernels wherever they run, else as auto;
# "flex": FlexAttention for what is not plainly causal; "sdpa": boolean masks, for any length without compiling again;
# "reference": boolean masks and explicit scores.
AttentionBackend = Literal["auto", "triton", "flex", "sdpa", "reference"]

WINDOW_WIDTHS = (64, 96, 128)  # supported head widths
WINDOW_SINKS = 64  # at most, because tiles of queries write partial gradients of their sinks to memory
FLOAT8_CAPABILITY = (8, 9)  # the lowest compute capability with float8 conversions and matmuls
FLOAT8_MULTIPLE = 16  # float8 tensor cores need matrices with sides that are multiples of it
DOCUMENT_WIDTHS = (32, 48, 64, 80, 96, 128, 160, 192)  # of queries and keys: a power of two, or a sum of two
DOCUMENT_V_WIDTHS = (16, 32, 64, 128)
