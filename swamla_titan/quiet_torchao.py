"""Silences the warnings of torchao and torch at the import of torchao."""

import logging


def quiet_torchao() -> None:
    """Silence them; call this before torchao is first imported.

    It warns that it has no kernels for this Python or CPU, which nothing here uses; torch warns of how torchao
    registers enumerations.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
