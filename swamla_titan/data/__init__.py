"""Text -> documents -> tokens -> packed sequences, in an order that is a function of the step.

corpus = open_corpus(config.data, config.validation, config.job.seed)
with BatchLoader(corpus, [Shape(first=0, global_batch_size=64, seq_len=2048)], rank=0, world_size=1) as loader:
    for batch in loader: ...
"""

from swamla_titan.data.batches import (
    IGNORED,
    MicroBatch,
    Shape,
    StepBatch,
    distinct_steps,
    micro_batch_count,
    micro_batch_size,
    micro_batches,
    sequences_per_rank,
    shapes_of,
    waits_for_streams,
)
from swamla_titan.data.changes import fingerprint_changes
from swamla_titan.data.corpora import (
    Continued,
    Mixture,
    TrainingData,
    continued,
    labelled,
    open_mixture,
    weights_by_stage,
    with_segments,
)
from swamla_titan.data.corpus import Corpus, build_validation_set, open_corpus, text_sequences, validation_text
from swamla_titan.data.division import described, uneven
from swamla_titan.data.exclusions import Exclusion, taken_from_cursors
from swamla_titan.data.held_out import HELD_OUT_TEXT, ValidationSet, ValidationText, pack
from swamla_titan.data.loader import BatchLoader
from swamla_titan.data.mixture import SequenceOrder, sequence_order
from swamla_titan.data.sources import pinned
from swamla_titan.data.streams import completed_epochs
from swamla_titan.data.tokenizer import CompressedVocabulary, Tokenizer, compress, load_tokenizer
from swamla_titan.data.worker import prepare_workers

__all__ = [
    "HELD_OUT_TEXT",
    "IGNORED",
    "BatchLoader",
    "CompressedVocabulary",
    "Continued",
    "Corpus",
    "Exclusion",
    "MicroBatch",
    "Mixture",
    "SequenceOrder",
    "Shape",
    "StepBatch",
    "Tokenizer",
    "TrainingData",
    "ValidationSet",
    "ValidationText",
    "build_validation_set",
    "completed_epochs",
    "compress",
    "continued",
    "described",
    "distinct_steps",
    "fingerprint_changes",
    "labelled",
    "load_tokenizer",
    "micro_batch_count",
    "micro_batch_size",
    "micro_batches",
    "open_corpus",
    "open_mixture",
    "pack",
    "pinned",
    "prepare_workers",
    "sequence_order",
    "sequences_per_rank",
    "shapes_of",
    "taken_from_cursors",
    "text_sequences",
    "uneven",
    "validation_text",
    "waits_for_streams",
    "weights_by_stage",
    "with_segments",
]
