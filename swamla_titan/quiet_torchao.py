"""Keeps to itself what torchao and torch say when torchao is imported."""

import logging


def quiet_torchao() -> None:
    """Call before torchao is first imported.

    It warns that it has no kernels of its own for this Python or CPU, of which nothing here uses any; torch warns of
    how it registers its enumerations.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
