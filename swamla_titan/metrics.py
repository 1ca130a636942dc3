"""The metrics of a run: what each is, in which unit, the group in which TensorBoard shows it, and a step's line.

Without torch, because `watch` and `report` start at once.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """The name in TensorBoard, GROUP/NAME, the axis' unit ("" for pure numbers), and what it is."""

    tag: str
    unit: str
    meaning: str


METRICS = {
    "loss": Metric("loss/train", "nats/token", "what is minimized, mean over the targets of the global batch"),
    "val_loss": Metric("loss/validation", "nats/token", "cross-entropy on held-out text"),
    "val_set": Metric("loss/validation_set", "", "number of the held-out text, if not the first of the run"),
    "val_bits_per_byte": Metric("loss/validation_bits_per_byte", "bits/byte", "the same per byte of text"),
    "grad_norm": Metric("optimizer/grad_norm", "", "of the global gradient, before clipping"),
    "lr": Metric("optimizer/lr", "", "learning rate"),
    "loss_scale": Metric("optimizer/loss_scale", "", "factor of the loss, with float8.loss_scaling"),
    "tokens_per_second": Metric("speed/tokens_per_second", "tokens/s", "of the whole job"),
    "tokens_per_second_per_gpu": Metric("speed/tokens_per_second_per_gpu", "tokens/s", "of one GPU"),
    "tflops_per_gpu": Metric("speed/tflops_per_gpu", "TFLOP/s", "model FLOPs of one GPU"),
    "mfu": Metric("speed/mfu", "", "model FLOPs utilization: share of the dense bf16 peak"),
    "step_seconds": Metric("speed/step_seconds", "s", "a step, without validation and checkpoints"),
    "data_seconds": Metric("speed/data_seconds", "s", "of a step in which its host waited for data"),
    "memory_gib": Metric("memory/peak_gib", "GiB", "peak of the rank that needs most"),
    "tokens": Metric("progress/tokens", "tokens", "trained on in all"),
    "epoch": Metric("progress/epoch", "", "passes over the data that are complete"),
    "padding": Metric("data/padding", "", 'share of positions without a target, with data.packing = "best_fit"'),
    "skipped_steps": Metric("events/skipped_steps", "steps", "skipped as bad in all"),
    "rewinds": Metric("events/rewinds", "", "returns to older weights in all"),
    "skipped_files": Metric("events/skipped_files", "files", "of which a part could not be read"),
    "table_rows_touched": Metric("tables/rows_touched", "", "share of the rows that were looked up"),
    "table_rows_touched_since_last_log": Metric(
        "tables/rows_touched_since_last_log", "", "the same since the line before"
    ),
}
"""By key of metrics.jsonl. Keys with a slash name their group themselves; others are of the group `other`."""
OF_SOURCES = {
    "loss": Metric("sources/loss", "nats/token", "of a source of the mixture, since the line before"),
    "tokens": Metric("sources/tokens", "tokens", "of a source, trained on in all"),
    "epochs": Metric("sources/epochs", "", "of a source: how often its streams have read their data, on average"),
    "val_loss": Metric("sources/val_loss", "nats/token", "cross-entropy on held-out text of a source"),
    "val_bits_per_byte": Metric("sources/val_bits_per_byte", "bits/byte", "the same per byte of text"),
}
"""By the part of a key before the slash, where the other part names a source of a mixture."""


def metric(key: str) -> Metric:
    """The metric of a key of metrics.jsonl."""
    group, _, source = key.partition("/")
    if source and group in OF_SOURCES:
        return OF_SOURCES[group]._replace(tag=f"{OF_SOURCES[group].tag}/{source}")
    return METRICS.get(key) or Metric(key if "/" in key else f"other/{key}", "", "")


def step_line(step: int, steps: int, values: Mapping[str, float], eta_seconds: float) -> str:
    """The console's line for a step; parts that do not apply are left out."""
    width = len(str(steps))
    parts = [
        f"step {step:>{width}}/{steps}",
        f"loss {values['loss']:.4f}",
        f"grad norm {values['grad_norm']:.3f}",
        f"lr {values['lr']:.2e}",
        f"{thousands(values['tokens_per_second'])} tokens/s",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    parts.append(f"{values['memory_gib']:.2f} GiB")
    parts.append(f"ETA {clock(eta_seconds)}")
    return " | ".join(parts)


def thousands(rate: float) -> str:
    """A rate in a few characters, such as 181.2K."""
    return f"{rate / 1000:.1f}K" if rate >= 1000 else f"{rate:.0f}"


def clock(seconds: float) -> str:
    """Seconds as H:MM:SS."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
