"""Which kernels are chosen for a GPU, decided on a CPU."""

from dataclasses import replace

import pytest
import torch

from swamla_titan.config import Config
from swamla_titan.config.sections import ActivationCheckpoint, Float8, Kernels
from swamla_titan.errors import UserError
from swamla_titan.kernels import window_attention
from swamla_titan.kernels.linear_cross_entropy import linear_cross_entropy
from swamla_titan.kernels.rotary_window_attention import rotary_window_attention
from swamla_titan.kernels.swiglu import swiglu, triton_swiglu
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.parallel.kernels import choose_kernels
from swamla_titan.parallel.world import World
from swamla_titan.train import kernels as run_kernels
from swamla_titan.train.kernels import pointwise_of


def chosen(own, checkpointing="none", **changes):
    """(loss as one with the head, SwiGLU, rotation with attention) are ours."""
    config = ModelConfig(num_layers=3, dim=128, num_heads=2, vocab_size=100, **changes)
    with torch.device("meta"):
        model = SWAMLAModel(config)
    choose_kernels(
        model, Config(kernels=own, model=config, activation_checkpoint=ActivationCheckpoint(mode=checkpointing))
    )
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
        ({"own": Kernels(pointwise="triton")}, (False, True, True)),
        ({"own": Kernels(pointwise="triton"), "qk_norm": True}, (False, True, False)),
        ({"own": Kernels(pointwise="triton"), "checkpointing": "selective"}, (False, True, False)),
        ({"own": Kernels(pointwise="triton"), "checkpointing": "full"}, (False, True, True)),
    ],
    ids=str,
)
def test_what_is_chosen(how, expected):
    assert chosen(**how) == expected


WIDE = ModelConfig(dim=1536, num_heads=16, swa_window=8)


@pytest.mark.parametrize(
    "model, attention, said",
    [
        (WIDE, "auto", "SwiGLU by triton, rotation of SWA by triton"),
        (replace(WIDE, qk_norm=True), "auto", "SwiGLU by triton, rotation of SWA by torch (model.qk_norm)"),
        (WIDE, "flex", "SwiGLU by triton, rotation of SWA by torch (attention by flex)"),
        (replace(WIDE, swa_layers_per_cycle=0), "auto", "SwiGLU by triton"),
    ],
)
def test_what_is_said_of_it(monkeypatch, model, attention, said):
    monkeypatch.setattr(window_attention, "has_triton", lambda: True)
    monkeypatch.setattr(run_kernels, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = Config(model=model, kernels=Kernels(pointwise="triton", attention=attention))
    assert pointwise_of(config, World.alone(torch.device("cuda"))) == said
    native = replace(config, float8=Float8(recipe="native"))
    said = said.replace("SwiGLU by triton", "SwiGLU with its cast to float8")
    assert pointwise_of(native, World.alone(torch.device("cuda"))) == said
    assert pointwise_of(replace(config, kernels=Kernels()), World.alone(torch.device("cuda"))) is None


@pytest.mark.parametrize("device, triton", [("cpu", True), ("cuda", False)])
def test_kernels_that_cannot_run_are_refused(monkeypatch, device, triton):
    monkeypatch.setattr(run_kernels, "has_triton", lambda: triton)
    with pytest.raises(UserError, match="needs a GPU, and the package triton"):
        pointwise_of(Config(kernels=Kernels(pointwise="triton")), World.alone(torch.device(device)))
