"""Configuration: a dataclass for each TOML section, and how a file becomes a validated `Config`."""

from swamla_titan.config.load import Override, load_config, load_source, split_overrides, to_toml
from swamla_titan.config.rules import with_vocabulary
from swamla_titan.config.sections import Config
from swamla_titan.config.shipped import find_config, shipped_configs

__all__ = [
    "Config",
    "Override",
    "find_config",
    "load_config",
    "load_source",
    "shipped_configs",
    "split_overrides",
    "to_toml",
    "with_vocabulary",
]
