"""Triton kernel that copies rows of a table, in the memory of the host or of the device, or writes them there."""

import triton
import triton.language as tl


@triton.jit
def copy_rows(
    table_ptr, rows_ptr, values_ptr, flag_ptr, since_ptr, number, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, WHERE: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """table [*, WIDTH] at rows [number] -> values [number, WIDTH]; with WRITES the other way.

                 rows          table                          values
    program 0    ROWS   ->    [ WIDTH ] ... [ WIDTH ]   ->    ROWS of [ WIDTH ]     tile 0
    program 1    ROWS   ->    [ WIDTH ] ... [ WIDTH ]   ->    ROWS of [ WIDTH ]     tile 1
    program 0    ROWS   ->    ...                                                   tile 2, if there are 2 programs

    WHERE: 0: all; 1: where flag [number] is 0; 2: where flag [*] of the row is at least `since`. Of other rows neither
    table nor values are read or written. What is written is rounded to its dtype. COLUMNS is the power of two from
    WIDTH on.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(number, ROWS), tl.num_programs(0)):
        at = tile * ROWS + tl.arange(0, ROWS)
        wanted = at < number
        row = tl.load(rows_ptr + at, mask=wanted, other=0)
        if WHERE == 1:
            wanted = wanted & (tl.load(flag_ptr + at, mask=wanted, other=1) == 0)
        if WHERE == 2:
            wanted = wanted & (tl.load(flag_ptr + row, mask=wanted, other=0) >= tl.load(since_ptr).to(tl.int32))
        inside = wanted[:, None] & (column < WIDTH)
        in_table = table_ptr + row[:, None] * WIDTH + column
        in_values = values_ptr + at.to(tl.int64)[:, None] * WIDTH + column
        if WRITES:
            tl.store(in_table, tl.load(in_values, mask=inside, other=0.0), mask=inside)
        else:
            tl.store(in_values, tl.load(in_table, mask=inside, other=0.0), mask=inside)
