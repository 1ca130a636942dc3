"""Sliding-window attention: which keys matter, one by one, and parity with transformers' Mistral."""

from dataclasses import replace

import pytest
import torch

from swamla_titan.kernels.attention import dispatch
from swamla_titan.kernels.attention.dispatch import ROTARY_WINDOW, WINDOW
from swamla_titan.kernels.attention.masks import WindowRule
from swamla_titan.model.branch import FusedAttention
from swamla_titan.model.layers import Rotation, rotate
from tests.model.tiny import ALL_SWA, build, random_tokens

T = 14


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("window, sink", [(4, 2), (1, 0), (5, 0), (2, 6), (30, 3)])
@pytest.mark.parametrize("documents", [None, [0] * 5 + [1] * 9])
def test_exactly_the_keys_of_window_and_sink_matter(window, sink, documents, backend):
    model = build(swa_window=window, swa_sink_size=sink, **ALL_SWA)
    model.attention_backend = backend
    context = model.context(T, None if documents is None else torch.tensor([documents]))["swa"]
    attention = model.blocks["0"].attention
    hidden = torch.randn(1, T, 32, dtype=torch.float64)
    before = attention(hidden, context)
    for s in range(T):
        changed = hidden.clone()
        changed[0, s] += torch.randn(32, dtype=torch.float64)
        moved = (attention(changed, context) - before)[0].abs().amax(dim=-1)
        for t in range(T):
            start = 0 if documents is None or documents[t] == 0 else 5
            same = documents is None or documents[s] == documents[t]
            seen = s <= t and same and (t - s < window or s - start < sink)
            assert (moved[t] > 1e-6) if seen else (moved[t] == 0), f"key {s}, query {t}: moved by {moved[t]}"


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_all_swa_model_equals_mistral(kv_heads):
    model = build(num_kv_heads=kv_heads, swa_sink_size=0, swa_window=5, rope_theta=500.0, **ALL_SWA)
    theirs = mistral_of(model)
    tokens = random_tokens(2, 20)
    ours_logits, their_logits = model(tokens), theirs(tokens).logits[..., :50]
    # Mistral computes its norms and angles in float32.
    torch.testing.assert_close(ours_logits, their_logits, rtol=1e-5, atol=1e-5)

    upstream = torch.randn_like(ours_logits)
    ours_logits.backward(upstream)
    their_logits.backward(upstream)
    for name, block in model.blocks.items():
        other = theirs.model.layers[int(name)]
        pairs = gradient_pairs(block, other)
        for key, (a, b) in pairs.items():
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item(), msg=lambda m, k=key: f"{k}: {m}"
            )
    embedding = theirs.model.embed_tokens.weight.grad
    torch.testing.assert_close(model.embedding.weight.grad, embedding, rtol=1e-4, atol=1e-4)


def mistral_of(model):
    config = model.config
    from transformers import MistralConfig, MistralForCausalLM  # takes seconds to import

    theirs = MistralForCausalLM(
        MistralConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=1e-6,
            sliding_window=config.swa_window,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            attn_implementation="eager",
            pad_token_id=None,
        )
    )
    theirs = theirs.double().eval()
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(model.embedding.weight)
        theirs.model.norm.weight.copy_(model.norm.weight)
        for name, block in model.blocks.items():
            other = theirs.model.layers[int(name)]
            other.input_layernorm.weight.copy_(block.attention_norm.weight)
            other.post_attention_layernorm.weight.copy_(block.ffn_norm.weight)
            for ours, linear in zip(matrices(block.attention.wqkv), projections(other)):
                linear.weight.copy_(ours)
            other.self_attn.o_proj.weight.copy_(block.attention.wo.weight)
            gate, up = matrices(block.feed_forward.gate_up)
            other.mlp.gate_proj.weight.copy_(gate)
            other.mlp.up_proj.weight.copy_(up)
            other.mlp.down_proj.weight.copy_(block.feed_forward.down.weight)
    return theirs


def matrices(linear):
    return linear.spec.split(linear.weight)


def projections(layer):
    return layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj


def gradient_pairs(block, layer):
    q, k, v = block.attention.wqkv.spec.split(block.attention.wqkv.weight.grad)
    gate, up = block.feed_forward.gate_up.spec.split(block.feed_forward.gate_up.weight.grad)
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "q": (q, attention.q_proj.weight.grad),
        "k": (k, attention.k_proj.weight.grad),
        "v": (v, attention.v_proj.weight.grad),
        "o": (block.attention.wo.weight.grad, attention.o_proj.weight.grad),
        "gate": (gate, mlp.gate_proj.weight.grad),
        "up": (up, mlp.up_proj.weight.grad),
        "down": (block.feed_forward.down.weight.grad, mlp.down_proj.weight.grad),
        "attention_norm": (block.attention_norm.weight.grad, layer.input_layernorm.weight.grad),
        "ffn_norm": (block.ffn_norm.weight.grad, layer.post_attention_layernorm.weight.grad),
    }


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_rotation_and_attention_as_one_get_what_the_steps_apart_get(monkeypatch, kv_heads):
    """The operator's place is taken by those steps, written for its arguments."""
    model = build(swa_window=4, swa_sink_size=2, num_kv_heads=kv_heads, **ALL_SWA)
    attention, calls = model.blocks["0"].attention, []
    plain = model.context(T, torch.tensor([[0] * 5 + [1] * 9]))["swa"]
    starts = torch.tensor([[0] * 5 + [5] * 9], dtype=torch.int32)
    ruled = replace(plain, mask=WindowRule(starts, 4, 2), implementation=WINDOW)

    def steps(qkv, cos, sin, starts, window, sink, scale, kernel):
        calls.append((starts, window, sink))
        query, key, value = qkv.split([qkv.shape[3] - 2, 1, 1], dim=3)
        query, key = rotate(query.flatten(2, 3), (by := Rotation(cos, sin))), rotate(key.squeeze(3), by)
        return plain.attend(query, key, value.squeeze(3), scale)

    hidden = torch.randn(1, T, 32, dtype=torch.float64)
    expected = attention(hidden, plain)
    monkeypatch.setattr(dispatch, "rotary_window_attention", steps)
    attention.fused_attention = FusedAttention(ROTARY_WINDOW)
    assert torch.equal(attention(hidden, ruled), expected)
    assert calls == [(starts, 4, 2)]
    assert torch.equal(attention(hidden, plain), expected), "under another mask the steps stay apart"
    assert len(calls) == 1
