"""What must be equal for a checkpoint to be resumed: otherwise the run would quietly become another one."""

from dataclasses import asdict
from typing import Any

from swamla_titan.config import Config

# Of the model's fields these change how it is trained, not what it is.
_TRAINING_ONLY = {"dropout", "z_loss", "label_smoothing", "max_seq_len"}


def run_identity(config: Config, data_fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Flat name -> value: the model's shape, the data and tokenizer, and all that fixes the order of the data."""
    model = {f"model.{name}": value for name, value in asdict(config.model).items() if name not in _TRAINING_ONLY}
    return (
        model
        | data_fingerprint
        | {
            "job.seed": config.job.seed,
            "data.streams": config.data.streams,
            "data.shuffle_documents": config.data.shuffle_documents,
            "data.document_mask": config.data.document_mask,
            "training.seq_len": config.training.seq_len,
            "training.global_batch_size": config.training.global_batch_size,
            "validation.fraction": 0.0 if config.validation.path else config.validation.fraction,
            "optimizer.name": config.optimizer.name,
        }
    )
