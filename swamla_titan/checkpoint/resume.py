"""Resuming: which checkpoint a run continues from, and whether it is a checkpoint of the same run.

The fingerprint has all that must be equal: otherwise a resumed run would silently become another one.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from swamla_titan.checkpoint.records import (
    AnnexRecord,
    TrainState,
    read_annex_record,
    read_data_record,
    read_train_state,
)
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.config import Config
from swamla_titan.config.sections import ALLOWED_DIFFERENCES, RENAMED
from swamla_titan.data import Continued, TrainingData, continued, fingerprint_changes
from swamla_titan.distributed.mesh import World, all_gather_dict, broadcast_from_rank_0
from swamla_titan.errors import Damaged, UserError
from swamla_titan.escaping import one_line
from swamla_titan.fields import given, settings, split_words
from swamla_titan.model import ModelConfig
from swamla_titan.system.console import Lines

logger = logging.getLogger(__name__)

# Fields of the model that change how it is trained, not what it is.
_TRAINING_ONLY = {"dropout", "z_loss", "label_smoothing", "max_seq_len"}
# Values that a fingerprint leaves out, because it had no such names before.
_LEFT_OUT: dict[str, Any] = {"data.packing": "concatenate", "training.stages": []}
# The kind, as checkpoint.allow has it, of a difference in a section of the fingerprint.
_KINDS = {"model": "model", "annexes": "model", "tokenizer": "tokenizer", "training": "batch", "optimizer": "optimizer"}
_LONGEST_STAGES = 2000  # characters of training.stages in a fingerprint; of more it has a digest
_WITHOUT_CURSORS = {"data", "tokenizer"}  # kinds of differences that make the cursors meaningless


@dataclass(frozen=True)
class Origin:
    """What a run begins from: a checkpoint with what it records, or None of them: a new run."""

    path: Path | None = None
    train_state: TrainState | None = None
    data: dict[str, Any] | None = None
    annex_record: AnnexRecord | None = None

    @classmethod
    def of(cls, path: Path) -> "Origin":
        """The checkpoint at `path`; UserError if it is unreadable."""
        return cls(path, read_train_state(path), read_data_record(path), read_annex_record(path))

    @property
    def optimizer(self) -> str | None:
        """optimizer.name of the run that wrote the checkpoint."""
        name = self.train_state.fingerprint.get("optimizer.name") if self.train_state else None
        return name if isinstance(name, str) else None

    def resume(
        self,
        fingerprint: dict[str, Any],
        allow: str = "",
        details: Mapping[str, str] | None = None,
        data: TrainingData | None = None,
    ) -> TrainState:
        """The train state that a run with this fingerprint continues from.

        `allow` names kinds of differences, as checkpoint.allow does; UserError for a difference of another kind. With
        other data or another tokenizer the data start from the beginning, but those sources of a mixture `data` that
        did not change continue; with another batch they all continue. `details` maps names in the fingerprint to more
        about their difference.
        """
        state = self.train_state
        if state is None:
            return TrainState(step=0, tokens=0, sequences=0, cursors={}, fingerprint=fingerprint)
        before = same_names(state.fingerprint, fingerprint)
        changes = fingerprint_changes(_LEFT_OUT | before, _LEFT_OUT | fingerprint, details)
        kinds = {name: _KINDS.get(name.split(".")[0], "data") for name in changes}
        allowed = split_words(allow)
        if refused := [change for name, change in changes.items() if kinds[name] not in allowed]:
            raise self._of_another_run(refused, set(kinds.values()))
        if not changes:
            return state
        starts_over = not _WITHOUT_CURSORS.isdisjoint(kinds.values())
        rest = self._continued(data) if data and starts_over else None
        logger.warning(
            "%s differs from this run, as checkpoint.allow permits%s:\n  %s",
            self.path,
            "; the data start over" if starts_over and not rest else "",
            Lines("\n  ".join(map(one_line, (*changes.values(), *(rest.report if rest else ()))))),
        )
        if rest:
            return replace(state, cursors=rest.cursors, excluded=rest.excluded, source_tokens=rest.source_tokens)
        return replace(state, sequences=0, cursors={}, excluded=[]) if starts_over else state

    def _continued(self, data: TrainingData) -> Continued | None:
        """What the sources of a mixture continue from."""
        state = self.train_state
        if not state or not self.data:
            return None
        tokens = state.source_tokens or {"": state.tokens}
        try:
            return continued(data, self.data, state.cursors, state.excluded, tokens)
        except (LookupError, TypeError, AttributeError) as error:
            raise Damaged(f"{self.path}: its data record is none that this program writes ({error!r})") from error

    def _of_another_run(self, refused: list[str], kinds: set[str]) -> UserError:
        way_out = f". To continue from it all the same: --checkpoint.allow {','.join(sorted(kinds))}"
        if not kinds <= {*ALLOWED_DIFFERENCES}:
            way_out = f", which --checkpoint.initial_load {self.path} begins with these weights"
        return UserError(
            f"{self.path} belongs to another run:",
            *(f"  {line}" for line in refused),
            "  put these back, or give this run its own job.dump_folder" + way_out,
        )


def same_names(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's fingerprint with the names of today, and defaults of the model's keys that came after it.

    They change nothing. Of an annex's keys too, if the checkpoint has the annex.
    """
    saved = {RENAMED.get(name, name): value for name, value in saved.items()}
    defaults = {f"model.{name}": field.default for name, field in settings(ModelConfig).items()}
    for annex, kind in ModelConfig.annex_configs().items():
        if f"model.{annex}.layers" in saved:
            defaults |= {f"model.{annex}.{name}": _as_json(field.default) for name, field in settings(kind).items()}
    return {name: value for name, value in defaults.items() if name in current} | saved


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def find_origin(checkpoints: Checkpoints) -> Origin:
    """The newest intact checkpoint, the same on all ranks; raises UserError if there are some and all are damaged."""
    path = checkpoints.newest_intact()
    if path is None:
        return Origin()
    return broadcast_from_rank_0(checkpoints.world, lambda: Origin.of(path))


def run_fingerprint(config: Config, corpus: TrainingData, annex_record: AnnexRecord | None = None) -> dict[str, Any]:
    """Flat name -> value: the model's shape, data and tokenizer, and what determines the order of the data.

    `annex_record`: of the model's annexes; None: it has none.
    """
    values = asdict(config.model)
    of_annexes = {name: values.pop(name) for name in config.model.annex_configs()}
    model = {f"model.{name}": value for name, value in values.items() if name not in _TRAINING_ONLY}
    for name in annex_record.hashes if annex_record else ():
        model |= {f"model.{name}.{key}": _as_json(value) for key, value in of_annexes[name].items()}
    model |= annex_record.fingerprint() if annex_record else {}
    training: dict[str, Any] = {
        "data.document_mask": config.data.document_mask,
        "training.seq_len": config.training.seq_len,
        "training.global_batch_size": config.training.global_batch_size,
        "optimizer.name": config.optimizer.name,
    }
    if config.data.packing != _LEFT_OUT["data.packing"]:
        training["data.packing"] = config.data.packing
    if stages := [given(stage) for stage in config.training.stages]:
        text = json.dumps(stages, sort_keys=True)
        long = len(text) > _LONGEST_STAGES
        training["training.stages"] = hashlib.sha256(text.encode()).hexdigest() if long else stages
    return model | corpus.fingerprint() | training


def require_same_data(world: World, corpus: TrainingData) -> None:
    """Raise UserError, on every rank, if ranks see different files, as copies on several machines may be."""
    found = all_gather_dict(world, {world.rank: corpus.fingerprint()})
    for rank, fingerprint in sorted(found.items()):
        for name in fingerprint:
            if fingerprint[name] != found[0][name]:
                raise UserError(
                    f"the processes see different training data; make the copies alike: {name} is {found[0][name]!r} "
                    f"for rank 0 and {fingerprint[name]!r} for rank {rank}"
                )
