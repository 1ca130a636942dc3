"""What a new run begins with in place of drawn weights (checkpoint.initial_load), and how that differs from the run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swamla_titan.checkpoint.exported import exported_annexes, exported_model, is_exported, require_as_written
from swamla_titan.checkpoint.reader import require_loadable, stored_groups
from swamla_titan.checkpoint.records import AnnexRecord
from swamla_titan.checkpoint.resume import Origin, same_names
from swamla_titan.checkpoint.state import Average, Declared, OptimizerStates, Weights
from swamla_titan.checkpoint.store import find_checkpoint
from swamla_titan.config import Config
from swamla_titan.data import CompressedVocabulary, fingerprint_changes
from swamla_titan.distributed.mesh import World, broadcast_from_rank_0
from swamla_titan.errors import UserError
from swamla_titan.model import SWAMLAModel

_KEY, _STATE = "checkpoint.initial_load", "checkpoint.initial_load_state"
_LONGEST = 60  # characters of a value in the table


@dataclass(frozen=True)
class InitialLoad:
    """A checkpoint, or a folder that `export` wrote, of which a new run takes the tensors of `groups`.

    `fingerprint`: of the run that wrote it, as far as it is known. `has_average`: it holds an average of the weights.
    """

    path: Path
    groups: tuple[str, ...]
    fingerprint: dict[str, Any]
    annex_record: AnnexRecord | None
    has_average: bool = False

    @property
    def optimizer(self) -> str | None:
        """optimizer.name of the run whose states are taken; None: they start fresh."""
        name = self.fingerprint.get("optimizer.name") if OptimizerStates.group in self.groups else None
        return name if isinstance(name, str) else None

    def summary(self, config: Config) -> str:
        """What a run with this configuration takes, in words, and what it asks for in vain."""
        what = "weights" if self.optimizer is None else "weights and states of the optimizer"
        lacks = Average.group in self.groups and config.ema.decay and not self.has_average
        return f"{what} of {self.path}" + ("; it has no average, which begins with these weights" if lacks else "")

    def require_fit(self, config: Config) -> None:
        """Raise UserError unless it has the tensors of this run's model, no others, and states of its optimizer."""
        with torch.device("meta"):
            model = SWAMLAModel(config.model)
        require_loadable(self.path, {Weights.group: Weights([model]).state_dict()}, no_others=True)
        if self.optimizer not in (None, config.optimizer.name):
            raise UserError(
                f'{_STATE}: {self.path} has states of "{self.optimizer}", and optimizer.name is '
                f'"{config.optimizer.name}": take that, or "weights", with which the optimizer starts fresh'
            )
        if self.annex_record:
            self.annex_record.require_equal(config.model, self.path)
        require_as_written(self.path)

    def differences(self, config: Config, fingerprint: dict[str, Any]) -> str:
        """A table of what differs from a run with this fingerprint, a line each; empty: nothing that is known."""
        then = same_names(self.fingerprint, fingerprint)
        known = {name: value for name, value in fingerprint.items() if name in then}
        changes = fingerprint_changes(then, known)
        rows = [(name, _shown(then[name]), _shown(known[name])) for name in changes if name in known]
        if Average.group in self.groups and bool(config.ema.decay) != self.has_average:
            rows.append(("ema.decay", "an average" if self.has_average else "no average", str(config.ema.decay)))
        if not rows:
            return ""
        rows = [("", "there", "in this run"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"  {name:<{widths[0]}}  {there:<{widths[1]}}  {here}" for name, there, here in rows)


def _shown(value: Any) -> str:
    """A value of a fingerprint; of "source" and "tokenizer" a digest follows the name, and its beginning will do."""
    text = str(value)
    first, _, digest = text.partition(" ")
    text = f"{first} {digest[:8]}" if len(digest) == 32 else text
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def find_initial_load(config: Config, world: World, known: Declared) -> InitialLoad | Origin | None:
    """What checkpoint.initial_load names; an Origin if the run is to continue from it in every respect.

    All ranks call this. `known`: the groups of tensors that checkpoints may hold. Raises UserError if there is nothing,
    or it is damaged, or does not hold what checkpoint.initial_load_state asks for.
    """
    asked, state = config.checkpoint.initial_load, config.checkpoint.initial_load_state
    if not asked:
        return None
    path = Path(asked)
    if broadcast_from_rank_0(world, lambda: is_exported(path)):
        return broadcast_from_rank_0(world, lambda: _exported(path, state))
    path = find_checkpoint(asked, known, world=world)
    origin = broadcast_from_rank_0(world, lambda: Origin.of(path))
    if state == "all":
        return origin
    groups = (Weights.group,) if state == "weights" else (Weights.group, OptimizerStates.group, Average.group)
    assert origin.train_state is not None
    has_average = broadcast_from_rank_0(world, lambda: Average.group in stored_groups(path))
    return InitialLoad(path, groups, origin.train_state.fingerprint, origin.annex_record, has_average)


def _exported(path: Path, state: str) -> InitialLoad:
    if state != "weights":
        raise UserError(
            f'{_STATE} = "{state}": {path} is an exported folder, which holds weights alone; take "weights"'
        )
    fingerprint, record = exported_model(path), None
    if found := exported_annexes(path):
        ids, records = found
        vocabulary = CompressedVocabulary(ids.numpy().astype(np.int32), int(ids.max()) + 1, "not known")
        record = AnnexRecord(vocabulary, records)
        fingerprint |= record.fingerprint()
    return InitialLoad(path, (Weights.group,), fingerprint, record)
