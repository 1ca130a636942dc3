"""Kernels where Triton is not installed."""

import runpy
import sys

import pytest

from swamla_titan.kernels import triton as shim


def test_without_triton_kernels_are_defined_and_only_a_launch_raises(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    without = runpy.run_path(shim.__file__)
    tl = without["tl"]

    @without["jit"]
    def kernel(x_ptr, BLOCK: tl.constexpr):
        """One tile of x."""

    assert kernel.__doc__ == "One tile of x."
    assert tl.constexpr(16) == 16
    with pytest.raises(ImportError, match="triton"):
        kernel[(1,)](None, BLOCK=16)
