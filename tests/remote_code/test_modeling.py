"""The exported code computes what the model computes: prompts, cached decoding, padding, documents, loss."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from swamla_titan.model.cache import DecodeCache
from tests.remote_code.models import SHAPES, exported, of_shape, random_tokens

EVERY = pytest.mark.parametrize("shape", SHAPES)
LENGTH = 40  # of tokens: several windows and all sinks of most shapes


def assert_close(found: Tensor, expected: Tensor, within: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=within)


@EVERY
@torch.no_grad()
def test_logits(shape):
    ours, theirs = of_shape(shape)
    tokens = random_tokens(shape, 2, LENGTH)
    assert_close(theirs(tokens).logits, ours(tokens))


@EVERY
@torch.no_grad()
def test_cached_decoding(shape):
    ours, theirs = of_shape(shape)
    tokens = random_tokens(shape, 2, LENGTH)
    expected = ours(tokens)
    cache = DynamicCache()
    assert_close(theirs(tokens[:, :3], cache=cache).logits, expected[:, :3])
    assert_close(theirs(tokens[:, 3:15], cache=cache).logits, expected[:, 3:15])
    for token in range(15, LENGTH):
        assert_close(theirs(tokens[:, token : token + 1], cache=cache).logits[:, 0], expected[:, token])


@EVERY
@torch.no_grad()
def test_padding_changes_nothing(shape):
    """Prompts of different length, padded on the left, in both caches of transformers; ours are the reference."""
    ours, theirs = of_shape(shape)
    lengths, steps = torch.tensor([4, 17, 20]), 5
    tokens = random_tokens(shape, 3, 20 + steps)
    reference = DecodeCache(ours, 3, 20 + steps)
    mask = (torch.arange(20 + steps) >= 20 - lengths[:, None]).long()
    for cache in (DynamicCache(), StaticCache(theirs.config, max_cache_len=20 + steps)):
        expected = ours.prefill(tokens[:, :20], reference, lengths)
        found = theirs(tokens[:, :20], attention_mask=mask[:, :20], cache=cache)
        assert_close(found.logits[:, -1], expected)
        for end in range(21, 20 + steps + 1):
            expected = ours.decode(tokens[:, end - 1 : end], reference)
            found = theirs(tokens[:, end - 1 : end], attention_mask=mask[:, :end], cache=cache)
            assert_close(found.logits[:, 0], expected)


@EVERY
@torch.no_grad()
def test_documents_by_positions(shape):
    """Positions that begin again cut a sequence into documents, as in training with data.document_mask."""
    ours, theirs = of_shape(shape)
    tokens = random_tokens(shape, 1, LENGTH)
    lengths = (1, 13, LENGTH - 14)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    assert_close(theirs(tokens, position_ids=positions).logits, ours(tokens, document_ids=ids))


@pytest.mark.parametrize("shape", ["tiny", "selective-engram", "untied"])
def test_gradients_and_loss(shape):
    ours, theirs = of_shape(shape)
    tokens = random_tokens(shape, 2, LENGTH + 1)
    labels = tokens.clone()
    labels[0, 5:9] = -100
    loss = ours(tokens[:, :-1], labels[:, 1:])
    found = theirs(tokens, labels=labels).loss
    assert_close(found.double(), loss.double(), 1e-6)  # transformers computes the loss in float32
    names = [name for name, parameter in ours.named_parameters() if parameter.dim() < 2 or "table" not in name]
    expected = torch.autograd.grad(loss, [ours.get_parameter(name) for name in names])
    own = [theirs.lm_head if name == "head.weight" else theirs.model for name in names]
    of_theirs = [each.get_parameter("weight" if "head" in name else name) for each, name in zip(own, names)]
    for got, wanted in zip(torch.autograd.grad(found, of_theirs), expected):
        assert_close(got, wanted, 1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_implementations_of_attention(implementation):
    ours, _ = of_shape("tiny")
    theirs = exported(ours, attn_implementation=implementation)
    tokens = random_tokens("tiny", 2, LENGTH)
    asked = {"output_attentions": implementation == "eager", "output_hidden_states": True, "use_cache": False}
    outputs = theirs(tokens, **asked)
    assert_close(outputs.logits, ours(tokens))
    assert len(outputs.hidden_states) == 4
    assert_close(theirs.lm_head(outputs.hidden_states[-1])[..., :50], ours(tokens))
    if implementation == "eager":
        assert [each.shape for each in outputs.attentions] == [(2, 4, LENGTH, LENGTH)] * 3
