"""kernels.attention where no block could take it, whatever the machine."""

import dataclasses
from itertools import product

import pytest
import torch

from swamla_titan.config.rules import conflicts
from swamla_titan.config.sections import KEYS, Config, Data, Kernels, Parallel, Training
from swamla_titan.kernels import device as kernel_device
from swamla_titan.kernels.attention import dispatch
from swamla_titan.kernels.attention.dispatch import ATTENTION_BACKENDS
from swamla_titan.model import ModelConfig
from swamla_titan.parallel.kernels import attention_choices

FITS = ModelConfig(dim=1536, num_heads=16, max_seq_len=2048)  # heads of 96, a window of 256


def found(attention: str, model: ModelConfig = FITS, **sections) -> list[set[str]]:
    config = Config(kernels=Kernels(attention), model=model, **sections)
    return [set(each.keys) for each in conflicts(config) if each.keys[0].startswith("kernels.")]


def shape(**changes) -> ModelConfig:
    return dataclasses.replace(FITS, **changes)


WIDTH = {"kernels.attention", "model.dim", "model.num_heads"}
AT, SELECTIVE = "kernels.attention", shape(swa_layers_per_cycle=0, mla_selective=True)
NO_WINDOWS, DOCUMENTS = shape(swa_layers_per_cycle=0), {"data": Data(document_mask=True)}
MASKS = {"kernels.attention", "model.swa_window", "training.seq_len", "data.document_mask"}


@pytest.mark.parametrize(
    "attention, model, sections, expected",
    [
        ("triton", shape(num_heads=12), {"training": Training(compute_dtype="float32")}, []),
        ("triton", shape(num_heads=24), {}, []),
        ("triton", shape(num_heads=32), {}, [WIDTH]),
        ("triton", shape(swa_sink_size=65), {}, [{"kernels.attention", "model.swa_sink_size"}]),
        ("triton", FITS, {"parallel": Parallel(context=2)}, [{"kernels.attention", "parallel.context"}]),
        ("triton", shape(swa_window=2048), {}, [MASKS]),
        ("triton", shape(swa_window=2048), {"data": Data(document_mask=True)}, []),
        ("triton", shape(swa_layers_per_cycle=0), {}, [{"kernels.attention", "data.document_mask"}]),
        ("triton", NO_WINDOWS, DOCUMENTS, []),
        (
            "triton",
            NO_WINDOWS,
            DOCUMENTS | {"parallel": Parallel(context=2)},
            [{"kernels.attention", "parallel.context"}],
        ),
        (
            "triton",
            NO_WINDOWS,
            DOCUMENTS | {"training": Training(compute_dtype="float32")},
            [{"kernels.attention", "training.compute_dtype"}],
        ),
        (
            "triton",
            shape(swa_layers_per_cycle=0, v_head_dim=96, qk_rope_head_dim=96),
            DOCUMENTS,
            [
                {"kernels.attention", "model.qk_nope_head_dim", "model.qk_rope_head_dim"},
                {"kernels.attention", "model.v_head_dim"},
            ],
        ),
        ("triton", SELECTIVE, {}, []),
        ("triton", SELECTIVE, {"parallel": Parallel(context=2)}, []),
        ("triton", shape(mla_selective=True), {"parallel": Parallel(context=2)}, []),
        ("triton", SELECTIVE, {"training": Training(seq_len=1)}, []),
        ("triton", SELECTIVE, {"training": Training(compute_dtype="float32")}, [{AT, "training.compute_dtype"}]),
        ("flex", SELECTIVE, {}, [MASKS]),
        ("flex", SELECTIVE, DOCUMENTS, [{AT, "model.mla_selective"}]),
        ("flex", SELECTIVE, {"parallel": Parallel(context=2)}, [{AT, "model.mla_selective"}]),
        ("flex", shape(mla_selective=True), DOCUMENTS, []),
        ("flex", shape(swa_layers_per_cycle=0), {}, [MASKS]),
        ("flex", shape(swa_layers_per_cycle=0), {"data": Data(document_mask=True)}, []),
        ("flex", shape(swa_layers_per_cycle=0), {"parallel": Parallel(context=2)}, []),
        ("triton", shape(num_heads=32), DOCUMENTS, []),  # MLA by triton, in documents
        (
            "triton",
            shape(num_heads=32),
            DOCUMENTS | {"training": Training(compute_dtype="float32")},
            [WIDTH, {AT, "training.compute_dtype"}],
        ),
        ("flex", shape(num_heads=32, swa_sink_size=65), {"parallel": Parallel(context=2)}, []),
    ],
)
def test_refused_with_the_keys_that_cannot_hold_together(attention, model, sections, expected):
    assert found(attention, model, **sections) == expected


@pytest.mark.parametrize("selects, others", [(False, 'use "flex" or "auto"'), (True, 'use "auto"')])
def test_what_takes_no_selective_attention_is_not_advised_for_it(selects, others):
    model = shape(swa_layers_per_cycle=0, v_head_dim=96, mla_selective=selects)
    found = conflicts(Config(kernels=Kernels("triton"), model=model, data=Data(document_mask=True)))
    (problem,) = (each.problem for each in found if each.keys[0] == "kernels.attention")
    assert problem == f'"triton" takes v_head_dim of 16, 32, 64, 128, not of 96: {others}'


MODELS = {
    "fits": FITS,
    "narrow": shape(num_heads=48),
    "sinks": shape(swa_sink_size=65),
    "full window": shape(swa_window=2048),
    "no windows": NO_WINDOWS,
    "narrow latent": shape(num_heads=32, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32),
    "odd latent": shape(swa_layers_per_cycle=0, v_head_dim=96, qk_rope_head_dim=96),
    "no latent": shape(mla_layers_per_cycle=0, num_kv_heads=4),
    "selective": SELECTIVE,
    "windows and selective": shape(num_heads=32, mla_selective=True),
}


@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("asked", ["triton", "flex"])
def test_what_is_refused_no_gpu_would_be_chosen_for(monkeypatch, asked, cudnn):
    monkeypatch.setattr(kernel_device, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "why_not_cudnn_heads", lambda *about: None if cudnn else "not by cuDNN")
    for name in ("why_not_hopper_kernel", "why_not_hopper_window"):
        monkeypatch.setattr(dispatch, name, lambda *about: "needs NVRTC")
    refused = set()
    grid = product(MODELS.items(), (False, True), ("bfloat16", "float32"), (1, 2), (1, 256, 2048))
    for (name, model), documents, dtype, context, length in grid:
        if length == 1 and context > 1:
            continue
        sections = {"data": Data(document_mask=documents), "parallel": Parallel(context=context)}
        sections["training"] = Training(seq_len=length, compute_dtype=dtype)
        if found(asked, model, **sections):
            refused.add(name)
            config = Config(kernels=Kernels(asked, elementwise="plain"), model=model, **sections)
            choices = attention_choices(config, torch.device("cuda"))
            assert asked not in [each.implementation.label for each in choices.values()], config
    assert refused == MODELS.keys()


@pytest.mark.parametrize("attention", ["auto", "sdpa", "reference"])
def test_what_any_model_can_have(attention):
    assert found(attention, shape(swa_layers_per_cycle=0, swa_sink_size=100), parallel=Parallel(context=2)) == []


def test_the_key_has_the_models_own_names():
    assert KEYS["kernels.attention"].choices == ATTENTION_BACKENDS


@pytest.mark.parametrize("degree", ["tensor", "pipeline"])
def test_head_and_loss_cannot_be_one_where_ranks_share_them(degree):
    config = Config(kernels=Kernels(loss="fused"), parallel=Parallel(**{degree: 2}))
    refused = [set(each.keys) for each in conflicts(config) if each.keys[0].startswith("kernels.")]
    assert refused == [{"kernels.loss", f"parallel.{degree}"}]
