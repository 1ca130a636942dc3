"""The CUDA C++ kernels of windows for Hopper against a float64 reference, emulated on a CPU with -m slow.

On such a GPU: test_window_attention.py.
"""

import shutil

import pytest
import torch

from swamla_titan.kernels.attention import hopper_window
from swamla_titan.kernels.attention.masks import dense_mask, document_starts
from swamla_titan.kernels.attention.window import window_attention
from tests.kernels.nearness import assert_equals_reference
from tests.kernels.test_hopper_attention import Emulated, deterministic, emulate  # noqa: F401  a fixture

SHAPES = {  # T, H, G, window, sinks, documents
    "one document": (400, 2, 2, 128, 4, 0),
    "window of 256": (640, 1, 1, 256, 4, 0),
    "shorter than the window": (90, 2, 2, 256, 4, 0),
    "a single token": (1, 1, 1, 256, 4, 0),
    "grouped": (300, 4, 2, 100, 4, 6),
    "one key head": (257, 4, 1, 64, 4, 3),
    "a window of 1": (333, 2, 2, 1, 40, 3),
    "more sinks than the window": (300, 1, 1, 16, 64, 2),
    "far sinks in two tiles": (520, 1, 1, 100, 20, 2),
    "no sinks": (257, 2, 1, 64, 0, 4),
    "many documents": (300, 2, 2, 64, 4, 60),
}


class SumFar:
    """window_sum_far of window_triton.py, written down."""

    def __getitem__(self, grid):
        return self.launch

    def launch(self, far, sums, starts, heads, seq_len, tiles, *, GROUP, WINDOW, SINK, DOCUMENTS, D, BN, FAR_BM, STEP):
        assert BN == FAR_BM == STEP == 64
        batch = far.shape[0]
        for b in range(batch):
            own = starts[b].tolist() if DOCUMENTS else [0] * seq_len
            for tile in range(tiles):
                newest = own[min(tile * 64 + 64, seq_len) - 1]
                if newest + SINK <= tile * 64 or tile * 64 + 64 >= seq_len:
                    continue
                later = [
                    i
                    for i in range(tile + 1, tiles)
                    if own[i * 64] == newest and (i * 64 - WINDOW + 1) // 64 * 64 > newest
                ]
                sums[b, :, tile] = far[b, :, later].unflatten(0, (-1, GROUP)).sum(dim=(1, 2))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("width, documents", [(96, True), (96, False), (64, True), (128, True)])
def test_emulated(monkeypatch, tmp_path, deterministic, width, documents):  # noqa: F811
    macros = {"WIDTH": width, "DOCUMENTS": int(documents)}
    emulate(monkeypatch, hopper_window, Emulated(tmp_path / "emulated.so", "hopper_window_emulated.cpp", **macros))
    monkeypatch.setattr(hopper_window.window_triton, "window_sum_far", SumFar())
    for length, heads, key_heads, size, sink, count in SHAPES.values():
        if count and not documents:
            continue
        torch.manual_seed(length)
        together = torch.randn(2, length, heads + 2 * key_heads, width).bfloat16()
        given = [x.requires_grad_() for x in together.split([heads, key_heads, key_heads], dim=2)]
        starts = document_starts((torch.rand(2, length) < count / length).cumsum(dim=1))
        rule = starts.int() if documents else None, size, sink, width**-0.5, "cuda"
        ours = window_attention(*given, *rule)
        assert_equals_reference(ours, given, dense_mask(starts, size, sink), width**-0.5, 5e-3)
