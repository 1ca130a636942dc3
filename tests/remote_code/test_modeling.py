"""The exported code computes what the model computes: prompts, cached decoding, padding, documents, loss."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swamla_titan.checkpoint.hugging_face import model_settings
from swamla_titan.errors import UserError
from swamla_titan.model.annex import Annex
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.engram import Engram
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


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_prompt_may_be_on_another_device_than_the_model(cache):
    """As with the models of transformers: `generate` moves the tokens, and not the mask."""
    theirs = deepcopy(of_shape("tiny")[1]).float().cuda()
    tokens = random_tokens("tiny", 2, 12)
    inputs = {"input_ids": tokens, "attention_mask": (torch.arange(12) >= torch.tensor([[0], [4]])).long()}
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    expected = theirs.generate(**{name: each.cuda() for name, each in inputs.items()}, **options)
    assert torch.equal(theirs.generate(**inputs, **options), expected)


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


def _kernel(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What serving engines and flash attention are given: a window, padding, heads of one width; here written down."""
    assert key.shape[-1] == value.shape[-1]
    key, value = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value))
    distance = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None] - torch.arange(key.shape[2])
    seen = (distance >= 0) & (distance < (sliding_window or LENGTH))
    if attention_mask is not None:
        seen = seen & (attention_mask[:, None, None] | (distance == 0))
    weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2), None


@pytest.fixture
def kernel(monkeypatch):
    """The name of an implementation of attention that takes no mask with an element for each pair."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "kernel", _kernel)
    return "kernel"


@pytest.mark.parametrize("shape", ["no-sinks", "all-latent"])
@torch.no_grad()
def test_attention_by_a_registered_kernel(kernel, shape):
    ours, _ = of_shape(shape)
    theirs = exported(ours, attn_implementation=kernel)
    tokens, mask = random_tokens(shape, 2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    expected = ours(tokens)
    assert_close(theirs(tokens, use_cache=False).logits, expected)
    mask[0, :11] = 0
    padded = theirs(tokens, attention_mask=mask, use_cache=False).logits
    assert_close(padded[1], expected[1])
    assert_close(padded[0, 11:], ours(tokens[:1, 11:])[0])
    if shape == "all-latent":
        cache = DynamicCache()
        assert_close(theirs(tokens[:, :9], cache=cache).logits, expected[:, :9])
        assert_close(theirs(tokens[:, 9:10], cache=cache).logits, expected[:, 9:10])


@pytest.mark.parametrize(
    "shape, reason",
    [
        ("tiny", "queries see the first 3 tokens beside their window"),
        ("selective", "tokens beside their window and attention is selective"),
        ("no-sinks", "the cache of a window is a ring"),
    ],
)
def test_what_a_registered_kernel_cannot_compute(kernel, shape, reason):
    theirs = exported(of_shape(shape)[0], attn_implementation=kernel)
    with pytest.raises(ValueError, match=f'"kernel" cannot compute this model, because .*{reason}'):
        theirs(random_tokens(shape, 1, 5))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"norm": "layernorm"}, "norm = 'layernorm'"),
        ({"layer_types": ["full_attention", "conv", "conv"]}, r"layer_types\[1\] = 'conv'"),
    ],
)
def test_settings_that_the_code_does_not_implement(changes, words):
    with pytest.raises(ValueError, match=words):
        exported(of_shape("tiny")[0], **changes)


def test_an_annex_declares_how_it_is_exported(monkeypatch):
    ours = of_shape("engram")[0]
    expected = {
        "layers": [0, 2],
        "own": 1,
        "hashes": Engram.record(ours.config),
        "pad_id": ours.annexes.compressed_ids.pad,
    }
    monkeypatch.setattr(Engram, "exported", classmethod(lambda cls, config: {"own": 1}))
    assert model_settings(ours)["engram"] == expected
    monkeypatch.setattr(Engram, "exported", Annex.exported)
    with pytest.raises(UserError, match="the model has engram, which the exported code does not implement"):
        model_settings(ours)


def test_caches_that_are_not_this_model_s():
    theirs = of_shape("tiny")[1]
    tokens, used = random_tokens("tiny", 1, 8), DynamicCache()
    used.update(torch.ones(1, 4, 3, 8), torch.ones(1, 4, 3, 8), 0)
    with pytest.raises(ValueError, match="needs a new DynamicCache or StaticCache"):
        theirs(tokens, cache=used)
    with pytest.raises(ValueError, match="several documents in a sequence cannot be remembered"):
        theirs(tokens, cache=DynamicCache(), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    with pytest.raises(ValueError, match="so it needs input_ids"):
        of_shape("engram")[1](inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))
