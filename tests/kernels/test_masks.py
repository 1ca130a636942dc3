"""The mask rule against a loop that spells it out, and its tiles against torch's own."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from swamla_titan.kernels.attention.dispatch import reference_attention
from swamla_titan.kernels.attention.masks import (
    block_mask,
    block_mask_of_one_document,
    dense_mask,
    document_ends,
    document_starts,
)

WINDOWS = [(None, 0), (1, 0), (1, 2), (3, 2), (4, 0), (2, 5), (50, 3)]


def random_ids(batch, seq_len, cut):
    return (torch.rand(batch, seq_len) < cut).cumsum(dim=1)


def spelled_out(ids, window, sink):
    """The rule of the design, one pair at a time."""
    seen = torch.zeros(len(ids), 1, len(ids[0]), len(ids[0]), dtype=torch.bool)
    for b, row in enumerate(ids):
        for t in range(len(row)):
            for s in range(t + 1):
                if any(row[i] != row[t] for i in range(s, t + 1)):
                    continue  # another document
                position = 0
                while s - position - 1 >= 0 and row[s - position - 1] == row[s]:
                    position += 1
                seen[b, 0, t, s] = window is None or t - s < window or position < sink
    return seen


def test_documents_are_runs_of_equal_ids():
    starts = document_starts(torch.tensor([[5, 5, 2, 2, 2, 5, 5, 0], [1, 1, 1, 1, 1, 1, 1, 1]]))
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5, 5, 7], [0] * 8]
    assert document_ends(starts).tolist() == [[2, 2, 5, 5, 5, 7, 7, 8], [8] * 8]
    assert document_ends(starts[:, 7:]).tolist() == [[1], [1]]


@pytest.mark.parametrize("window, sink", WINDOWS)
def test_dense_mask_is_the_rule(window, sink):
    ids = torch.tensor([[0] * 12, [0, 0, 0, 0, 7, 7, 7, 7, 7, 0, 0, 0], [3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4]])
    assert torch.equal(dense_mask(document_starts(ids), window, sink), spelled_out(ids.tolist(), window, sink))


@pytest.mark.parametrize("seq_len", [1, 100, 128, 300, 700])
@pytest.mark.parametrize("window, sink", [(None, 0), (256, 4), (64, 0), (1, 4), (4, 200), (300, 3)])
@pytest.mark.parametrize("cut", [0.0, 0.01])
def test_tiles_equal_those_that_torch_finds_by_trying_all_pairs(seq_len, window, sink, cut):
    starts = document_starts(random_ids(3, seq_len, cut))
    ours = block_mask(starts, window, sink)
    torchs = create_block_mask(ours.mask_mod, 3, 1, seq_len, seq_len, device="cpu")
    assert torch.equal(ours.to_dense(), torchs.to_dense())
    assert ours.seq_lengths == torchs.seq_lengths
    assert ours.full_kv_num_blocks is not None
    if sink < 128:  # a sink of whole tiles may go unnoticed as full
        assert torch.equal(ours.full_kv_num_blocks, torchs.full_kv_num_blocks)
        assert torch.equal(ours.full_q_num_blocks, torchs.full_q_num_blocks)


@pytest.mark.filterwarnings("ignore:.*unfused.*")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window, sink", [(None, 0), (50, 3)])
@pytest.mark.parametrize("documents", [False, True])
def test_flex_under_the_block_mask_equals_the_reference(window, sink, documents):
    query, key, value = torch.randn(3, 2, 2, 150, 16, dtype=torch.float64)
    if documents:
        starts = document_starts(random_ids(2, 150, 0.03))
        mask = block_mask(starts, window, sink)
    else:
        starts = torch.zeros(1, 150, dtype=torch.int64)
        mask = block_mask_of_one_document(150, window, sink, torch.device("cpu"))
    out = flex_attention(query, key, value, block_mask=mask, scale=0.3)
    torch.testing.assert_close(out, reference_attention(query, key, value, dense_mask(starts, window, sink), 0.3))


def test_the_mask_without_documents_is_made_once_and_may_be_trained_with():
    with torch.inference_mode():
        first = block_mask_of_one_document(77, 9, 2, torch.device("cpu"))
    assert first is block_mask_of_one_document(77, 9, 2, torch.device("cpu"))
    assert first is not block_mask_of_one_document(77, 9, 3, torch.device("cpu"))
    assert not first.kv_indices.is_inference()
