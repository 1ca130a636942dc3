"""The mathematics as single-device PyTorch: nothing distributed, nothing about files.

The modules are imported when they are first asked for: configuration and `--help` need shapes only, and torch takes
seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from swamla_titan.model.config import FLAVORS, ModelConfig

if TYPE_CHECKING:
    from swamla_titan.model.blocks import Block
    from swamla_titan.model.model import SWAMLAModel

__all__ = ["FLAVORS", "Block", "ModelConfig", "SWAMLAModel"]

_MODULES = {"Block": "blocks", "SWAMLAModel": "model"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
