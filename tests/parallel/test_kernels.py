"""Which kernels are chosen for a GPU, decided on a CPU."""

from types import SimpleNamespace

import pytest
import torch

from swamla_titan.config import Config
from swamla_titan.config.sections import Kernels
from swamla_titan.errors import UserError
from swamla_titan.kernels.linear_cross_entropy import linear_cross_entropy
from swamla_titan.kernels.rotary_window_attention import rotary_window_attention
from swamla_titan.kernels.swiglu import swiglu, triton_swiglu
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.parallel import kernels
from swamla_titan.parallel.kernels import choose_kernels


def chosen(monkeypatch, own, device="cuda", triton=True, **changes):
    """(loss as one with the head, SwiGLU, rotation with attention) are ours."""
    monkeypatch.setattr(kernels, "has_triton", lambda: triton)
    with torch.device("meta"):
        model = SWAMLAModel(ModelConfig(num_layers=3, dim=128, num_heads=2, vocab_size=100, **changes))
    choose_kernels(model, Config(kernels=own), SimpleNamespace(device=torch.device(device)))
    windows = [getattr(block.attention, "rotate_and_attend", None) for block in model.blocks.values()]
    assert windows[0] is windows[1]
    assert windows[2] is None  # MLA
    activations = {block.feed_forward.activate for block in model.blocks.values()}
    assert len(activations) == 1
    assert activations <= {swiglu, triton_swiglu}
    assert {model.linear_loss, windows[0]} <= {None, linear_cross_entropy, rotary_window_attention}
    return model.linear_loss is not None, activations == {triton_swiglu}, windows[0] is not None


@pytest.mark.parametrize(
    "how, expected",
    [
        ({"own": Kernels()}, (False, False, False)),
        ({"own": Kernels(loss="fused")}, (True, False, False)),
        ({"own": Kernels(loss="fused"), "device": "cpu"}, (True, False, False)),
        ({"own": Kernels(pointwise="triton")}, (False, True, True)),
        ({"own": Kernels(pointwise="triton"), "qk_norm": True}, (False, True, False)),
    ],
    ids=str,
)
def test_what_is_chosen(monkeypatch, how, expected):
    assert chosen(monkeypatch, **how) == expected


@pytest.mark.parametrize("lacks", [{"device": "cpu"}, {"triton": False}], ids=str)
def test_kernels_that_cannot_run_are_refused(monkeypatch, lacks):
    with pytest.raises(UserError, match="needs a GPU, and the package triton"):
        chosen(monkeypatch, Kernels(pointwise="triton"), **lacks)
