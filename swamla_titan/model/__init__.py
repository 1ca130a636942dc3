"""The mathematics as single-device PyTorch: nothing distributed, nothing about files."""

from swamla_titan.model.blocks import MLABlock, SWABlock
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.flavors import FLAVORS
from swamla_titan.model.model import SWAMLAModel

__all__ = ["FLAVORS", "MLABlock", "ModelConfig", "SWABlock", "SWAMLAModel"]
