"""Functions shared by our attention kernels: a head is two tiles, D1 + D2 wide, because tiles are powers of two.

head of 96   [ D1 = 64 | D2 = 32 ]      head of 128   [ D1 = 128 ], D2 = 0
"""

from swamla_titan.kernels.triton import jit, tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Instead of minus infinity, with which the running maximum of a query that has seen no key yet would give NaN.
NEVER = tl.constexpr(-1.0e30)


@jit
def load_part(base, stride, rows, seq_len, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST ... FIRST + WIDTH of the given rows (tokens): [len(rows), WIDTH], zeros outside of the sequence."""
    columns = FIRST + tl.arange(0, WIDTH)
    inside = (rows >= 0) & (rows < seq_len)
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(base + offsets, mask=inside[:, None], other=0.0)


@jit
def load_parts(wide, narrow, batch, row, head, ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Both parts of ROWS rows from `row` on, by the tensor memory accelerator; zeros after the last row.

    If D2 is 0, the second part is the first one, and unused.
    """
    part1 = wide.load([batch.to(tl.int32), row, head, 0]).reshape(ROWS, D1)
    part2 = part1
    if D2 > 0:
        part2 = narrow.load([batch.to(tl.int32), row, head, D1]).reshape(ROWS, D2)
    return part1, part2


@jit
def load_parts_at(base, stride, rows, seq_len, D1: tl.constexpr, D2: tl.constexpr):
    """Both parts of the given rows; zeros outside of the sequence."""
    part1 = load_part(base, stride, rows, seq_len, 0, D1)
    part2 = part1
    if D2 > 0:
        part2 = load_part(base, stride, rows, seq_len, D1, D2)
    return part1, part2


@jit
def store_part(base, stride, rows, seq_len, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Store columns FIRST ... FIRST + WIDTH of the given rows that are in the sequence."""
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=(rows < seq_len)[:, None])


@jit
def matmul_of_parts(a1, a2, b1, b2, SPLIT: tl.constexpr):
    """a b^T over both parts of the head's width, in float32."""
    out = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if SPLIT:
        out = tl.dot(a2, tl.trans(b2), out, input_precision="ieee")
    return out
