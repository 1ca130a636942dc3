"""Latent attention: positions are relative, and parity with transformers' DeepSeek-V3."""

from dataclasses import replace

import pytest
import torch

from swamla_titan.kernels.attention import dispatch
from swamla_titan.kernels.attention.dispatch import LATENT, REFERENCE
from swamla_titan.model.branch import FusedAttention, SequenceContext
from swamla_titan.model.layers import Rotation, rotate
from tests.model.tiny import ALL_MLA, ALL_SWA, build, random_tokens


@pytest.mark.parametrize("kind", [ALL_SWA, ALL_MLA])
def test_only_relative_positions_matter(kind):
    model = build(**kind)
    context = model.context(12)

    def logits(positions):
        ((name, kind),) = {block.kind: block.attention for block in model.blocks.values()}.items()
        rotation = kind.rotation(model.config, positions, torch.float64)
        moved = SequenceContext({name: replace(context[name], positions=positions, rotation=rotation)})
        x = model.embed(tokens)
        for block in model.blocks.values():
            x = block(x, moved)
        return model.head(model.norm(x))

    tokens = random_tokens(1, 12)
    positions = torch.arange(12)[None]
    before = logits(positions)
    torch.testing.assert_close(logits(positions + 1000), before, rtol=1e-9, atol=1e-9)
    assert (logits(2 * positions) - before).abs().max() > 1e-3  # but they do matter


@pytest.mark.parametrize("q_lora_rank", [0, 14])
def test_rotation_and_attention_as_one_get_what_the_steps_apart_get(monkeypatch, q_lora_rank):
    """The operator's place is taken by those steps, written for its arguments."""
    model = build(q_lora_rank=q_lora_rank, **ALL_MLA)
    attention, calls = model.blocks["0"].attention, []
    alone, documents = model.context(12)["mla"], model.context(12, torch.tensor([[0] * 5 + [1] * 7]))["mla"]

    def steps(query, keys_values, rope_key, cos, sin, scale):
        calls.append(query.shape)
        by, rope = Rotation(cos, sin), rope_key.shape[-1]
        nope = query.shape[-1] - rope
        query = torch.cat([query[..., :nope], rotate(query[..., nope:], by)], dim=-1)
        shared = rotate(rope_key[:, :, None], by).expand(-1, -1, query.shape[2], -1)
        key = torch.cat([keys_values[..., :nope], shared], dim=-1)
        return alone.attend(query, key, keys_values[..., nope:], scale)

    hidden = torch.randn(2, 12, 32, dtype=torch.float64)
    expected, expected_of_documents = attention(hidden, alone), attention(hidden, documents)
    monkeypatch.setattr(dispatch, "latent_attention", steps)
    attention.fused_attention = FusedAttention(LATENT)
    assert torch.equal(attention(hidden, alone), expected)
    assert len(calls) == 1
    assert torch.equal(attention(hidden, documents), expected_of_documents)
    torch.testing.assert_close(attention(hidden, replace(alone, implementation=REFERENCE)), expected)
    assert len(calls) == 1, "under a mask, and by the reference, the steps stay apart"


@pytest.mark.parametrize("q_lora_rank", [0, 14])
def test_all_mla_model_equals_deepseek(q_lora_rank):
    model = build(q_lora_rank=q_lora_rank, rope_theta=500.0, **ALL_MLA)
    theirs = deepseek_of(model)
    tokens = random_tokens(2, 20)
    ours_logits, their_logits = model(tokens), theirs(tokens).logits[..., :50]
    torch.testing.assert_close(ours_logits, their_logits, rtol=1e-5, atol=1e-5)

    upstream = torch.randn_like(ours_logits)
    ours_logits.backward(upstream)
    their_logits.backward(upstream)
    for name, block in model.blocks.items():
        for ours, linear in weights(block, theirs.model.layers[int(name)]):
            expected = linear.weight.grad
            torch.testing.assert_close(ours.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def deepseek_of(model):
    config = model.config
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM  # takes seconds to import

    theirs = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.num_layers,
            first_k_dense_replace=config.num_layers,  # no experts
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            q_lora_rank=config.q_lora_rank or None,
            kv_lora_rank=config.kv_lora_rank,
            qk_rope_head_dim=config.qk_rope_head_dim,
            qk_nope_head_dim=config.qk_nope_head_dim,
            v_head_dim=config.v_head_dim,
            rope_interleave=False,  # the half layout
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=1e-6,
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
            for ours, module in weights(block, other):
                module.weight.copy_(ours)
            gate, up = block.feed_forward.gate_up.spec.split(block.feed_forward.gate_up.weight)
            other.mlp.gate_proj.weight.copy_(gate)
            other.mlp.up_proj.weight.copy_(up)
    return theirs


def weights(block, layer):
    """(our parameter, their module) pairs, gate and up aside."""
    ours, theirs = block.attention, layer.self_attn
    if ours.q_lora_rank:
        query = [
            (ours.wq_a.weight, theirs.q_a_proj),
            (ours.q_norm.weight, theirs.q_a_layernorm),
            (ours.wq_b.weight, theirs.q_b_proj),
        ]
    else:
        query = [(ours.wq.weight, theirs.q_proj)]
    return [
        *query,
        (ours.wkv_a.weight, theirs.kv_a_proj_with_mqa),
        (ours.kv_norm.weight, theirs.kv_a_layernorm),
        (ours.wkv_b.weight, theirs.kv_b_proj),
        (ours.wo.weight, theirs.o_proj),
        (block.feed_forward.down.weight, layer.mlp.down_proj),
        (block.attention_norm.weight, layer.input_layernorm),
        (block.ffn_norm.weight, layer.post_attention_layernorm),
    ]
