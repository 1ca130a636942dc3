"""Operation counts of our attention operators, for torch's FlopCounterMode.

The compiler uses it to estimate what recomputing an operator costs, and an operator without a formula costs nothing.
The formulas stand beside the operators and count as model/counts.py does: visible pairs, as if each sequence were one
document, and twice the forward's operations in the backward pass. (torch counts all pairs, and in the backward pass of
attention the recomputed scores too.)
"""

from collections.abc import Sequence

from torch import Size


def causal_pairs(seq_len: int) -> int:
    """Visible (query, key) pairs of a sequence under a causal mask."""
    return seq_len * (seq_len + 1) // 2


def chunk_pairs(queries: int, starts: Sequence[int]) -> int:
    """Visible (query, key) pairs of a sequence's chunks of equal length, `queries` in all, that begin at `starts`."""
    length = queries // len(starts)
    return sum(start * length + causal_pairs(length) for start in starts)


def window_pairs(seq_len: int, window: int, sink: int) -> int:
    """Visible (query, key) pairs of a sequence under a window with sinks; a key in both counts once."""
    window = min(window, seq_len)
    in_window = causal_pairs(window) + (seq_len - window) * window
    late = seq_len - window  # queries whose window no longer reaches the first key: they miss 1, 2, ..., `late` keys
    sink = min(sink, late)
    return in_window + causal_pairs(sink) + (late - sink) * sink


def attention_flops(query: Size, value_dim: int, pairs: int) -> int:
    """Operations of a forward pass, with queries [B, T, H, D] and `pairs` per sequence: scores, and sums of values."""
    batch, _, heads, width = query
    return 2 * batch * heads * pairs * (width + value_dim)
