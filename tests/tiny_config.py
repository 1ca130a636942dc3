"""The configuration of most runs in these tests."""

from pathlib import Path

from tests.text import write_text

TINY = """
[job]
dump_folder = "{folder}/run"
deterministic = true
[model]
flavor = "debug"
num_layers = 3
dim = 64
num_heads = 2
swa_window = 16
dropout = 0.1
[data]
source = "local"
path = "{folder}/made-up-text"
tokenizer = "byte"
streams = 6
shuffle_documents = 8
num_workers = 1
[training]
seq_len = 64
local_batch_size = 2
global_batch_size = 5
steps = 30
compute_dtype = "float32"
[lr_schedule]
warmup_steps = 4
[compile]
enabled = false
[checkpoint]
interval = 15
[validation]
interval = 10
fraction = 0.1
max_tokens = 640
[metrics]
log_interval = 1
tensorboard = false
"""


def tiny_config(folder: Path) -> Path:
    """A configuration that trains 30 steps in two seconds, with dropout and a batch that its streams do not divide.

    It trains on text of our own (tests/text.py), in folder/run.
    """
    write_text(folder / "made-up-text", 60)
    path = folder / "tiny.toml"
    path.write_text(TINY.format(folder=folder))
    return path
