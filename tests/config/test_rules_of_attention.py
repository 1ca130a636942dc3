"""kernels.attention where no block could take it, whatever the machine."""

import dataclasses

import pytest

from swamla_titan.config.rules import contradictions
from swamla_titan.config.sections import Config, Data, Kernels, Parallel, Training
from swamla_titan.kernels.attention.dispatch import ATTENTION_BACKENDS
from swamla_titan.model import ModelConfig

FITS = ModelConfig(dim=1536, num_heads=16, max_seq_len=2048)  # heads of 96, a window of 256


def found(attention: str, model: ModelConfig = FITS, **sections) -> list[set[str]]:
    config = Config(kernels=Kernels(attention), model=model, **sections)
    return [set(each.keys) for each in contradictions(config) if each.keys[0].startswith("kernels.")]


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
        ("triton", shape(mla_selective=True), {"parallel": Parallel(context=2)}, [{AT, "parallel.context"}]),
        ("triton", SELECTIVE, {"training": Training(compute_dtype="float32")}, [{AT, "training.compute_dtype"}]),
        ("flex", SELECTIVE, {}, [MASKS]),
        ("flex", shape(swa_layers_per_cycle=0), {}, [MASKS]),
        ("flex", shape(swa_layers_per_cycle=0), {"data": Data(document_mask=True)}, []),
        ("flex", shape(num_heads=32, swa_sink_size=65), {"parallel": Parallel(context=2)}, []),
    ],
)
def test_refused_with_the_keys_that_cannot_hold_together(attention, model, sections, expected):
    assert found(attention, model, **sections) == expected


@pytest.mark.parametrize("attention", ["auto", "sdpa", "reference"])
def test_what_any_model_can_have(attention):
    assert found(attention, shape(swa_layers_per_cycle=0, swa_sink_size=100), parallel=Parallel(context=2)) == []


def test_the_key_has_the_models_own_names():
    keys = {key.name: key for key in dataclasses.fields(Kernels)}
    assert keys["attention"].metadata["choices"] == ATTENTION_BACKENDS


@pytest.mark.parametrize("degree", ["tensor", "pipeline"])
def test_head_and_loss_cannot_be_one_where_ranks_share_them(degree):
    config = Config(kernels=Kernels(loss="fused"), parallel=Parallel(**{degree: 2}))
    refused = [set(each.keys) for each in contradictions(config) if each.keys[0].startswith("kernels.")]
    assert refused == [{"kernels.loss", f"parallel.{degree}"}]
