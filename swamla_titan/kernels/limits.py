"""What our kernels take, for whoever asks before torch is imported."""

WINDOW_WIDTHS = (64, 96, 128)  # of heads
WINDOW_SINKS = 64  # at most: beyond, what tiles of queries leave for their far keys takes too much memory
FLOAT8_CAPABILITY = (8, 9)  # of the first CUDA devices that convert to float8 and multiply in it
FLOAT8_MULTIPLE = 16  # the float8 units of a GPU take matrices whose sides are multiples of it
DOCUMENT_WIDTHS = (32, 48, 64, 80, 96, 128, 160, 192)  # of queries and keys: a power of two, or two of them
DOCUMENT_V_WIDTHS = (16, 32, 64, 128)
