"""Decoding with caches equals the full forward, token by token, for rows of different length."""

import pytest
import torch

from swamla_titan.kernels import decode as kernels
from swamla_titan.kernels.attention.dispatch import ATTENTION_BACKENDS, for_decoding
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.mla import MLACache
from swamla_titan.model.swa import SWACache
from tests.model.tiny import ALL_MLA, ALL_SWA, build, random_tokens

LENGTHS = [1, 2, 5, 14]  # shorter than the sink, between, longer than the window
NEW = 22  # far past window and sink
SHAPES = [
    {},
    ALL_SWA,
    ALL_MLA,
    {"swa_window": 2, "swa_sink_size": 5},  # window smaller than sink
    {"swa_window": 1, "swa_sink_size": 0},
    {"swa_window": 60, "swa_sink_size": 3},  # window larger than the cache
    {"num_kv_heads": 2, "q_lora_rank": 14, "qk_norm": True},
    {"engram": {"layers": [0, 2], "orders": [2, 3], "heads": 2, "d_mem": 16, "table_size": 31}},
    # taps of 12 tokens back, more than most prompts have
    {"engram": {"layers": [1], "orders": [2, 4], "heads": 1, "d_mem": 8, "table_size": 101, "sharpen_gate": True}},
    {"norm": "dynamic_tanh", "tie_embeddings": False, "rope_scaling": 2.0, "swa_rope_theta": 77.0},
    {"mla_selective": True, "selection_head": 3},
    {"mla_selective": True, "engram": {"layers": [2], "orders": [2, 3], "heads": 1, "d_mem": 8, "table_size": 31}},
]


def largest_difference(model, steps=NEW):
    """Decode random texts beside the full forward; the largest difference of logits at any step."""
    longest = max(LENGTHS)
    texts = [random_tokens(length + steps) for length in LENGTHS]
    padded = torch.stack([torch.cat([random_tokens(longest - n), text[:n]]) for n, text in zip(LENGTHS, texts)])
    cache = DecodeCache(model, len(texts), longest + steps)
    logits = model.prefill(padded, cache, torch.tensor(LENGTHS))
    worst = 0.0
    for step in range(steps + 1):
        for row, (length, text) in enumerate(zip(LENGTHS, texts)):
            with torch.no_grad():
                full = model(text[None, : length + step])[0, -1]
            worst = max(worst, (logits[row] - full).abs().max().item())
        if step < steps:
            next_tokens = torch.stack([text[length + step] for length, text in zip(LENGTHS, texts)])
            logits = model.decode(next_tokens[:, None], cache)
    return worst


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("changes", SHAPES)
def test_equals_the_full_forward_in_float64(changes, backend):
    model = build(**changes)
    model.attention_backend = backend
    assert largest_difference(model) < 1e-11


@pytest.mark.parametrize("changes", SHAPES)
def test_equals_the_full_forward_in_float32(changes):
    model = build(torch.float32, **changes)
    model.init_weights(3)
    assert largest_difference(model) < 1e-5


def test_bfloat16_activations_stay_near():
    model = build(torch.float32)
    model.init_weights(3)
    model.compute_dtype = torch.bfloat16
    assert largest_difference(model) < 0.02  # the logits are of size 0.3; bfloat16 has 3 digits


@pytest.mark.parametrize("asked", ATTENTION_BACKENDS)
def test_decoding_is_by_the_implementation_that_the_dispatcher_names(monkeypatch, asked):
    implementation = for_decoding(asked)
    assert implementation.label == ("reference" if asked == "reference" else "sdpa")
    assert implementation.form == "boolean"
    assert asked in implementation.asked_by
    calls, real = [], type(implementation).call

    def call(self, query, key, value, mask, scale):
        calls.append(mask.dtype)
        return real(self, query, key, value, mask, scale)

    monkeypatch.setattr(type(implementation), "call", call)
    model = build(**ALL_SWA)
    model.attention_backend = asked
    cache = DecodeCache(model, 2, 30)
    model.prefill(random_tokens(2, 9), cache)  # longer than the window
    model.decode(random_tokens(2, 1), cache)
    assert calls == [torch.bool] * 2 * len(model.blocks)


@pytest.mark.parametrize("changes", [{}, SHAPES[7], {"mla_selective": True, "tie_embeddings": False}])
def test_layers_on_several_devices_give_the_same(changes):
    """Each has its clock and contexts; a test with -m gpu has two that do not see each other's memory."""
    model = build(num_layers=5, **changes)
    with torch.device("meta"):
        spread = SWAMLAModel(model.config).double()
    spread.spread([torch.device("cpu")] * 3)
    spread.load_state_dict(model.state_dict())
    caches = [DecodeCache(each, 2, 30) for each in (model, spread)]
    assert [len(each.clocks) for each in caches] == [1, 3]
    assert set(caches[1].device_number.values()) == {0, 1, 2}
    tokens, lengths = random_tokens(2, 20), torch.tensor([9, 5])
    logits = [each.prefill(tokens[:, :9], cache, lengths) for each, cache in zip((model, spread.eval()), caches)]
    for at in range(9, 20):
        assert torch.equal(*logits)
        logits = [each.decode(tokens[:, [at]], cache) for each, cache in zip((model, spread), caches)]


def test_a_cache_can_be_used_again():
    model = build()
    cache = DecodeCache(model, 2, 30)
    long, short = random_tokens(2, 20), random_tokens(2, 4)
    model.prefill(long, cache)
    model.decode(random_tokens(2, 1), cache)
    with torch.no_grad():
        torch.testing.assert_close(model.prefill(short, cache), model(short)[:, -1])
        token = random_tokens(2, 1)
        torch.testing.assert_close(model.decode(token, cache), model(torch.cat([short, token], dim=1))[:, -1])


def test_sizes_are_what_the_design_says_and_do_not_grow():
    model = build(num_kv_heads=2)
    cache = DecodeCache(model, 2, 40)
    swa, mla = cache.layers["0"], cache.layers["2"]
    assert isinstance(swa, SWACache)
    assert isinstance(mla, MLACache)
    assert swa.keys.shape == swa.values.shape == (2, 6 + 3, 2, 8)  # window + sink, kv heads, head_dim
    assert mla.latents.shape == (2, 40, 12)
    assert mla.rope_keys.shape == (2, 40, 6)
    storage = [t.data_ptr() for t in (swa.keys, swa.values, mla.latents, mla.rope_keys)]
    model.prefill(random_tokens(2, 20), cache)
    for _ in range(10):
        model.decode(random_tokens(2, 1), cache)
    assert storage == [t.data_ptr() for t in (swa.keys, swa.values, mla.latents, mla.rope_keys)]


def test_misuse_is_refused():
    model = build()
    with pytest.raises(ValueError, match="max_seq_len = 64"):
        DecodeCache(model, 1, 65)
    cache = DecodeCache(model, 2, 5)
    with pytest.raises(ValueError, match="call prefill"):
        model.decode(random_tokens(2, 1), cache)
    for prompts in (random_tokens(2, 6), random_tokens(3, 5), random_tokens(2, 0)):
        with pytest.raises(ValueError, match="do not fit a cache of 2 x"):
            model.prefill(prompts, cache)
    for lengths in ([0, 1], [1, 6], [1]):
        with pytest.raises(ValueError, match="lengths"):
            model.prefill(random_tokens(2, 5), cache, torch.tensor(lengths))
    model.prefill(random_tokens(2, 5), cache)
    with pytest.raises(ValueError, match="one per sequence"):
        model.decode(random_tokens(2, 2), cache)
    with pytest.raises(ValueError, match="full: 5 tokens"):
        model.decode(random_tokens(2, 1), cache)


@pytest.mark.parametrize(
    "changes",
    [ALL_SWA | {"dim": 1152, "num_heads": 4, "num_kv_heads": 2}, ALL_MLA | {"kv_lora_rank": 640}],
    ids=["heads of 288", "latents of 640"],
)
def test_what_is_too_wide_for_the_kernels_is_left_to_the_plain_form(changes):
    block = build(**changes).blocks["0"]
    assert block.attention.fused_decode(block.attention_norm, None, None) is None


def test_weights_that_the_kernels_tiles_cannot_hold_are_left_to_the_plain_form():
    half = torch.empty(4, 24, dtype=torch.bfloat16)
    assert kernels.fits(half)
    assert kernels.fits(half, group=16)
    assert not kernels.fits(half, group=8)
    assert not kernels.fits(half, half[:, :20])
