"""How many operations our attention operators count as, for torch's FlopCounterMode.

The compiler asks it what it costs to recompute an operator, and an operator without a formula costs nothing. The
formulas stand beside the operators and count as model/flops.py does: pairs that see each other, as if each row were one
document, and in the backward pass twice the forward's. (torch counts whole squares, and that backward passes of
attention make the scores again.)
"""

from torch import Size


def causal_pairs(seq_len: int) -> int:
    """Pairs of a query and a key that see each other in a sequence, by a causal mask alone."""
    return seq_len * (seq_len + 1) // 2


def window_pairs(seq_len: int, window: int, sink: int) -> int:
    """Pairs of a query and a key that see each other under a window with sinks; a key in both counts once."""
    window = min(window, seq_len)
    in_window = causal_pairs(window) + (seq_len - window) * window
    late = seq_len - window  # queries whose window no longer reaches the first key: they miss 1, 2, ..., `late` keys
    sink = min(sink, late)
    return in_window + causal_pairs(sink) + (late - sink) * sink


def attention_flops(query: Size, value_dim: int, pairs: int) -> int:
    """Of a forward pass of queries [B, T, H, D] over so many pairs a row: scores, and the average of the values."""
    batch, _, heads, width = query
    return 2 * batch * heads * pairs * (width + value_dim)
