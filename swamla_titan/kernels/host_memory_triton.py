"""Triton kernel that copies rows of a table from the memory of the host to the device."""

import triton
import triton.language as tl


@triton.jit
def copy_rows(
    table_ptr, rows_ptr, touched_ptr, since_ptr, out_ptr, number, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """table [*, WIDTH] at rows [number] -> out [number, WIDTH]; unless ALL, of rows with touched [*] >= since alone.

                 rows        table, on the host            out
    program 0    ROWS   ->   [ WIDTH ] ... [ WIDTH ]  ->   ROWS of [ WIDTH ]     tile 0
    program 1    ROWS   ->   [ WIDTH ] ... [ WIDTH ]  ->   ROWS of [ WIDTH ]     tile 1
    program 0    ROWS   ->                                                       tile 2, if there are 2 programs

    A row that is not copied is not read either. COLUMNS is the power of two from WIDTH on.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(number, ROWS), tl.num_programs(0)):
        at = tile * ROWS + tl.arange(0, ROWS)
        wanted = at < number
        row = tl.load(rows_ptr + at, mask=wanted, other=0)
        if not ALL:
            wanted = wanted & (tl.load(touched_ptr + row, mask=wanted, other=0) >= tl.load(since_ptr).to(tl.int32))
        inside = wanted[:, None] & (column < WIDTH)
        values = tl.load(table_ptr + row[:, None] * WIDTH + column, mask=inside, other=0.0)
        tl.store(out_ptr + at.to(tl.int64)[:, None] * WIDTH + column, values, mask=inside)
