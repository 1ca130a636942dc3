"""A small configuration for jobs that are hurt, and the proof that it left no trace."""

from pathlib import Path

from benchmarks.chaos_job import Job, metrics_lines
from tests.conftest import TINY
from tests.train.runs import assert_same_checkpoint, checkpoint

SAME = ("tokens", "loss", "grad_norm", "lr", "skipped_steps", "val_loss", "val_bits_per_byte")
# A micro-batch a sequence: slow enough that most kills come in time. Saves are most of the time.
SETTINGS = (
    *("--training.local_batch_size", "1", "--checkpoint.interval", "2", "--checkpoint.keep_latest", "2"),
    *("--validation.interval", "20", "--validation.max_tokens", "1024"),
)


def write_config(folder: Path) -> Path:
    """The tests' tiny configuration, in a file of its own."""
    path = folder / "tiny.toml"
    path.write_text(TINY.format(folder=folder))
    return path


def last_values(folder: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value, of the last line that has it, of all that does not tell of the machine's speed."""
    return {(line["step"], name): line[name] for line in metrics_lines(folder) for name in SAME if name in line}


def assert_same_run(one: Path, other: Path, steps: int) -> None:
    """Every step's numbers and the final checkpoint, bit for bit."""
    ours, expected = last_values(one), last_values(other)
    assert {step for step, _ in expected} == set(range(1, steps + 1))
    assert ours == expected
    assert_same_checkpoint(checkpoint(one, steps), checkpoint(other, steps))


def undisturbed(config: Path, folder: Path, temporary: Path, processes: int, *overrides: str) -> Path:
    """Trains to the end in `folder`, which nobody hurts."""
    with Job(config, folder, temporary, processes, *overrides) as job:
        job.start()
        assert job.end() == 0, job.described()
    return folder
