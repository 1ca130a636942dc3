"""torch's count of operations over our operators, against its count over the same written down."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swamla_titan.kernels.attention.causal import chunked_causal_attention
from swamla_titan.kernels.attention.dispatch import reference_attention
from swamla_titan.kernels.attention.document import document_attention
from swamla_titan.kernels.attention.latent import latent_attention
from swamla_titan.kernels.attention.masks import dense_mask
from swamla_titan.kernels.attention.rotary_window import rotary_window_attention
from swamla_titan.kernels.attention.window import window_attention
from swamla_titan.kernels.float8.linear import Settings, float8_linear, float8_linear_swiglu, quantize

BATCH, LENGTH, HEADS, GROUPS, WIDTH, VALUE, ROPE = 2, 40, 4, 2, 64, 32, 16


def counted(compute: Callable[..., Tensor], *inputs: Tensor) -> tuple[int, int]:
    """Operations of the forward pass and of the backward pass for all inputs."""
    for each in inputs:
        each.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        out = compute(*inputs)
    with FlopCounterMode(display=False) as backward:
        out.backward(torch.ones_like(out))
    return forward.get_total_flops(), backward.get_total_flops()


def written_down(queries: int, heads: int, value: int) -> tuple[int, int]:
    """The same of the reference for one row, which makes all scores."""
    with torch.device("meta"):
        mask = torch.ones(queries, LENGTH, dtype=torch.bool)
        parts = [torch.empty(1, heads, *sides) for sides in ((queries, WIDTH), (LENGTH, WIDTH), (LENGTH, value))]
        return counted(lambda *parts: reference_attention(*parts, mask, 1.0), *parts)


def assert_share_of_all_pairs(found: tuple[int, int], mask: Tensor, value: int = WIDTH) -> None:
    """Of the reference's operations, those for pairs that see each other by `mask`."""
    visible = mask.float().mean().item()
    whole = written_down(mask.shape[-2], HEADS, value)
    assert found == tuple(pytest.approx(BATCH * each * visible) for each in whole)


@pytest.mark.parametrize("window, sink", [(8, 3), (8, 0), (100, 2)])
def test_window_attention_counts_the_pairs_that_see_each_other(window, sink):
    mask = dense_mask(torch.zeros(1, LENGTH, dtype=torch.int64), window, sink)
    with torch.device("meta"):
        query, key, value = (torch.empty(BATCH, LENGTH, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS))
        alone = counted(lambda *parts: window_attention(*parts, None, window, sink, 1.0), query, key, value)
        qkv, angles = torch.empty(BATCH, LENGTH, GROUPS, HEADS // GROUPS + 2, WIDTH), torch.empty(1, LENGTH, 1, 32)
        rotated = counted(lambda x: rotary_window_attention(x, angles, angles, None, window, sink, 1.0), qkv)
    assert_share_of_all_pairs(alone, mask)
    assert alone == rotated


def test_latent_attention_counts_the_causal_pairs():
    with torch.device("meta"):
        query = torch.empty(BATCH, LENGTH, HEADS, WIDTH)
        keys_values = torch.empty(BATCH, LENGTH, HEADS, WIDTH - ROPE + VALUE)
        rope_key, angles = torch.empty(BATCH, LENGTH, ROPE), torch.empty(1, LENGTH, 1, ROPE // 2)
        parts = query, keys_values, rope_key
        found = counted(lambda *parts: latent_attention(*parts, angles, angles, 1.0), *parts)
    assert_share_of_all_pairs(found, torch.ones(LENGTH, LENGTH).tril(), value=VALUE)


def test_document_attention_counts_as_if_each_row_were_one_document():
    with torch.device("meta"):
        query, key = (torch.empty(BATCH, LENGTH, HEADS, WIDTH) for _ in range(2))
        value, bounds = torch.empty(BATCH, LENGTH, HEADS, VALUE), torch.empty(BATCH, LENGTH, dtype=torch.int32)
        found = counted(lambda *parts: document_attention(*parts, bounds, bounds, 1.0), query, key, value)
    assert_share_of_all_pairs(found, torch.ones(LENGTH, LENGTH).tril(), value=VALUE)


def test_chunked_attention_counts_the_causal_pairs_of_its_chunks():
    starts, length = [0, 30], 10
    seen = torch.ones(LENGTH, LENGTH).tril()[[*range(10), *range(30, 40)]]
    with torch.device("meta"):
        query = torch.empty(BATCH, 2 * length, HEADS, WIDTH)
        key, value = torch.empty(BATCH, LENGTH, HEADS, WIDTH), torch.empty(BATCH, LENGTH, HEADS, VALUE)
        found = counted(lambda *parts: chunked_causal_attention(*parts, starts, 1.0, "plain"), query, key, value)
    assert_share_of_all_pairs(found, seen, value=VALUE)


@pytest.mark.parametrize("made_by_swiglu", [False, True])
def test_float8_products_count_as_others_do(made_by_swiglu):
    def in_float8(x: Tensor, weight: Tensor) -> Tensor:
        factors = quantize(x), quantize(weight)
        return (
            float8_linear_swiglu(*factors, 32, Settings()).placeholder
            if made_by_swiglu
            else float8_linear(*factors, Settings())
        )

    x, weight = torch.randn(3, 32, 64), torch.randn(128, 64)
    assert counted(in_float8, x, weight) == counted(lambda x, weight: x @ weight.T, x, weight)
