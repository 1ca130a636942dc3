"""What must be equal for a checkpoint to be resumed: otherwise the run would quietly become another one."""

from dataclasses import asdict
from typing import Any

from swamla_titan.config import Config
from swamla_titan.data import Corpus

# Of the model's fields these change how it is trained, not what it is.
_TRAINING_ONLY = {"dropout", "z_loss", "label_smoothing", "max_seq_len"}


def run_identity(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Flat name -> value: the model's shape, the data and tokenizer, and all that fixes the order of the data."""
    model = {f"model.{name}": value for name, value in asdict(config.model).items() if name not in _TRAINING_ONLY}
    training = {
        "data.document_mask": config.data.document_mask,
        "training.seq_len": config.training.seq_len,
        "training.global_batch_size": config.training.global_batch_size,
        "optimizer.name": config.optimizer.name,
    }
    return model | corpus.fingerprint() | training


def kind_of(name: str) -> str:
    """The kind, as checkpoint.allow has it, of a difference in `name` of an identity."""
    section = name.split(".")[0]
    return {"model": "model", "tokenizer": "tokenizer", "training": "batch", "optimizer": "optimizer"}.get(
        section, "data"
    )
