"""What a resumed run does otherwise than its checkpoint's run did: optimizer and schedule may change freely."""

import json
import sys
from dataclasses import fields
from pathlib import Path

from swamla_titan.config import Config
from swamla_titan.config.sections import LRSchedule, Optimizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What was so before there was a key for it.
_BEFORE_THE_KEY = {("optimizer", "decay_embeddings"): True}


def changed_settings(checkpoint_config: Path, config: Config) -> list[str]:
    """A line for each key of [optimizer] and [lr_schedule] with another value in the checkpoint's config.toml."""
    try:
        stored = tomllib.loads(checkpoint_config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the checkpoint is whole, so it was written so; nothing depends on it here
        return []
    lines = []
    for section, cls in (("optimizer", Optimizer), ("lr_schedule", LRSchedule)):
        table = stored.get(section)
        for field in fields(cls) if isinstance(table, dict) else ():
            now = getattr(getattr(config, section), field.name)
            before = table.get(field.name, _BEFORE_THE_KEY.get((section, field.name), now))
            if before != now and not (field.name == "decay_embeddings" and not config.optimizer.weight_decay):
                lines.append(f"{section}.{field.name} was {json.dumps(before)} and is {json.dumps(now)}")
    return lines
