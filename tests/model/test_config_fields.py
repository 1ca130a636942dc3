"""Every field of ModelConfig reaches what it is for.

A new field without a case here fails the test; for the keys of a new kind of block one follows from their declarations,
and those of an annex are tested with it.
"""

import dataclasses
from dataclasses import replace

import pytest
import torch

from swamla_titan.fields import settings
from swamla_titan.model import ModelConfig
from swamla_titan.model.annex_config import EngramConfig
from swamla_titan.model.blocks import BLOCKS
from swamla_titan.model.branch import Attention
from tests.model.tiny import ALL_MLA, ALL_SWA, TINY, build, random_tokens

ENGRAM = EngramConfig(layers=(1,), orders=(2, 3), heads=2, d_mem=16, table_size=31)

# field -> (another value, what it must change). "shapes": names or shapes of the parameters; "logits": the output of
# the same weights; "loss": the training loss of the same weights and logits; "accepts": which lengths are taken.
CASES = {
    "num_layers": (4, "shapes"),
    "dim": (40, "shapes"),
    "num_heads": (2, "shapes"),
    "num_kv_heads": (2, "shapes"),
    "vocab_size": (200, "shapes"),
    "max_seq_len": (24, "accepts"),
    "ffn_hidden_dim": (0, "shapes"),
    "norm": ("dynamic_tanh", "shapes"),
    "tie_embeddings": (False, "shapes"),
    "swa_layers_per_cycle": (1, "shapes"),
    "mla_layers_per_cycle": (0, "shapes"),
    "swa_window": (5, "logits"),
    "swa_sink_size": (2, "logits"),
    "qk_norm": (True, "shapes"),
    "q_lora_rank": (14, "shapes"),
    "kv_lora_rank": (13, "shapes"),
    "qk_nope_head_dim": (11, "shapes"),
    "qk_rope_head_dim": (4, "shapes"),
    "v_head_dim": (8, "shapes"),
    "mla_selective": (True, "logits"),
    "selection_head": (1, "logits"),
    "rope_theta": (50.0, "logits"),
    "swa_rope_theta": (50.0, "logits"),
    "mla_rope_theta": (50.0, "logits"),
    "rope_scaling": (4.0, "logits"),
    "dropout": (0.3, "loss"),
    "z_loss": (0.1, "loss"),
    "label_smoothing": (0.1, "loss"),
    "engram": (ENGRAM, "shapes"),
}
# The same for the fields of `engram`, from ENGRAM on.
ENGRAM_CASES = {
    "layers": ((0,), "shapes"),
    "orders": ((2, 4), "logits"),
    "heads": (1, "shapes"),
    "d_mem": (8, "shapes"),
    "table_size": (50, "shapes"),
    "kernel": (3, "shapes"),
    "sharpen_gate": (True, "logits"),
    "seed": (1, "logits"),
}


NEEDED = {"selection_head": {"mla_selective": True}}  # what else a field wants, to have an effect


def observe(config):
    torch.manual_seed(0)
    model = build(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    tokens = random_tokens(2, 20)
    logits = model(tokens)
    loss = model.train()(tokens, tokens)
    accepts = []
    for length in (20, 30):
        try:
            model(random_tokens(1, length))
            accepts.append(length)
        except ValueError:
            pass
    return {"shapes": shapes, "logits": logits, "loss": loss, "accepts": accepts}


KEYS = {
    name: setting
    for name, setting in settings(ModelConfig).items()
    if name.endswith("_layers_per_cycle") or hasattr(setting.needs, "kind")
}


def test_every_field_has_a_case():
    known = CASES.keys() | KEYS.keys() | ModelConfig.annex_configs().keys()
    assert known == {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(ENGRAM_CASES) == {field.name for field in dataclasses.fields(EngramConfig)}


@pytest.mark.parametrize("name", sorted(KEYS.keys() - CASES.keys() | {"mla_layers_per_cycle", "num_kv_heads"}))
def test_every_key_of_a_kind_has_an_effect_by_its_declaration(name):
    """With another value that the key allows, in a model of this kind alone, something changes."""
    kind, base = getattr(KEYS[name].needs, "kind", None), replace(TINY, num_layers=8)
    if kind:
        base = replace(base, **{f"{each}_layers_per_cycle": int(each == kind) for each in ModelConfig.kinds()})
    values, given = (*KEYS[name].choices, True, 1, 2, 3, 4, 8, 24, 0.5), dataclasses.asdict(base)
    fitting = [each for each in values if each != given[name] and not ModelConfig.problems(given | {name: each})]
    assert fitting, f"{name}: needs a case in CASES, because no usual value fits"
    before, after = observe(base), observe(replace(base, **{name: fitting[0]}))
    if before["shapes"] == after["shapes"]:
        assert max((before[aspect] - after[aspect]).abs().max() for aspect in ("logits", "loss")) > 1e-3


@pytest.mark.parametrize("field", CASES)
def test_field_reaches_its_consumer(field):
    value, aspect = CASES[field]
    assert value != getattr(TINY, field)
    without = replace(TINY, **NEEDED.get(field, {}))
    compare(without, replace(without, **{field: value}), aspect)


@pytest.mark.parametrize("field", ENGRAM_CASES)
def test_field_of_engram_reaches_its_consumer(field):
    value, aspect = ENGRAM_CASES[field]
    assert value != getattr(ENGRAM, field)
    compare(replace(TINY, engram=ENGRAM), replace(TINY, engram=replace(ENGRAM, **{field: value})), aspect)


def compare(one, other, aspect):
    before, after = observe(one), observe(other)
    if aspect in ("shapes", "accepts"):
        assert after[aspect] != before[aspect]
        return
    assert after["shapes"] == before["shapes"]
    difference = (after[aspect] - before[aspect]).abs().max()
    assert difference > 1e-3
    if aspect == "loss":
        assert torch.equal(after["logits"], before["logits"])


@pytest.mark.parametrize("kind, own, other", [(ALL_SWA, "swa", "mla"), (ALL_MLA, "mla", "swa")])
def test_theta_and_scaling_reach_each_kind(kind, own, other):
    tokens = random_tokens(1, 20)

    def logits(**changes):
        torch.manual_seed(0)
        return build(**kind, **changes)(tokens)

    plain = logits()
    for change in ({"rope_theta": 50.0}, {"rope_scaling": 4.0}, {f"{own}_rope_theta": 50.0}):
        assert (logits(**change) - plain).abs().max() > 1e-3, change
    assert torch.equal(logits(**{f"{other}_rope_theta": 50.0}), plain)
    assert torch.equal(logits(rope_theta=50.0), logits(**{f"{own}_rope_theta": 50.0}))


def test_what_keys_say_of_a_kind_is_what_its_class_declares():
    """Rules of the configuration go by the keys, the dispatcher and the tensor plan by the class."""
    for kind, attention in {kind: mixer for kind, mixer in BLOCKS.items() if issubclass(mixer, Attention)}.items():
        (window, sink), heads = attention.mask(TINY), attention.heads(TINY)
        assert [*TINY.quantities("window", kind).values()] == ([] if window is None else [window])
        assert [*TINY.quantities("sink", kind).values()] == ([] if window is None else [sink])
        for quantity, width in (("qk_width", heads.qk_width), ("v_width", heads.v_width)):
            widths = TINY.quantities(quantity, kind)
            assert (sum(widths.values()) if widths else TINY.head_dim) == width
        assert {heads.queries, heads.keys} <= {*TINY.quantities("heads").values(), TINY.num_heads}
        for name in TINY.quantities("selects", kind):
            selects = [attention.selection_head(replace(TINY, **{name: on})) is not None for on in (False, True)]
            assert selects == [False, True]


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys():
    model = build(qk_norm=True, **ALL_SWA)
    tokens = random_tokens(1, 20)
    before = model(tokens)
    for block in model.blocks.values():
        groups = block.attention.wqkv.weight.data.unflatten(0, (4, 3, 8))  # one query, key and value per head
        groups[:, :2] *= 100
    torch.testing.assert_close(model(tokens), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"num_heads": 5}, "num_heads"),
        ({"dim": 36}, "num_heads"),  # heads of 9 cannot be rotated
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim"),
        ({"selection_head": 4}, "selection_head"),
        ({"swa_layers_per_cycle": 0, "mla_layers_per_cycle": 0}, "swa_layers_per_cycle"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm": "layernorm"}, "norm"),
        ({"engram": None}, "engram"),
        ({"engram": {"layers": [0, 3]}}, "engram.layers"),
        ({"engram": {"layers": [1, 0]}}, "engram.layers"),
        ({"engram": {"layers": [-1]}}, "engram.layers"),
        ({"engram": {"layers": "0"}}, "engram.layers"),
        ({"engram": {"layers": [0], "orders": []}}, "engram.orders"),
        ({"engram": {"orders": [2, 5]}}, "engram.orders"),
        ({"engram": {"layers": [0], "heads": 3}}, "engram.d_mem"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        replace(TINY, **changes)
