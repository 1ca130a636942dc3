"""Whether a run that was hurt ended like one that nobody hurt."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos_job import metrics_lines, steps_of_checkpoints
from swamla_titan.checkpoint.manifest import damage_of
from tests.train.runs import checkpoint, tensors

# Of a line of metrics.jsonl, what does not tell of the machine's speed.
TOLD = ("tokens", "loss", "grad_norm", "lr", "skipped_steps", "val_loss", "val_bits_per_byte")


def last_values(folder: Path) -> dict[tuple[int, str], float | None]:
    """(step, name) -> value, of the last line that has it."""
    return {(line["step"], name): line[name] for line in metrics_lines(folder) for name in TOLD if name in line}


def differences(
    run: Path, reference: Path, steps: int, tolerance: float = 0.0, damaged: Collection[int] = ()
) -> list[str]:
    """What is not the same in two dump folders of `steps` steps; empty: nothing.

    `tolerance` 0: metrics of each step and tensors of the last checkpoint bit for bit; else relative, and without the
    random states, of which each rank has its own. What counts steps, tokens and data must be equal in any case. All
    checkpoints must be whole but those of the steps `damaged`, the last one in any case.
    """
    found = _of_metrics(last_values(run), last_values(reference), steps, tolerance)
    for step in steps_of_checkpoints(run):
        if (step == steps or step not in damaged) and (damage := damage_of(checkpoint(run, step))):
            found.append(f"checkpoint of step {step}: {damage}")
    if found or not checkpoint(run, steps).is_dir():
        return found or [f"no checkpoint of step {steps}"]
    one, other = (json.loads((checkpoint(folder, steps) / "train.json").read_text()) for folder in (run, reference))
    found += [f"train.json: {name}" for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
    return found + _of_tensors(tensors(checkpoint(run, steps)), tensors(checkpoint(reference, steps)), tolerance)


def _of_metrics(
    one: dict[tuple[int, str], Any], other: dict[tuple[int, str], Any], steps: int, tolerance: float
) -> list[str]:
    missing = set(range(1, steps + 1)) - {step for step, name in one if name == "loss"}
    found = [f"no metrics of step {step}" for step in sorted(missing)]
    for step, name in sorted(one.keys() | other.keys()):
        ours, expected = one.get((step, name), "absent"), other.get((step, name), "absent")
        if ours == expected:
            continue
        numbers = isinstance(ours, float) and isinstance(expected, float)
        if not numbers or abs(ours - expected) > tolerance * abs(expected):
            found.append(f"step {step}: {name} is {ours}, not {expected}")
    return found


def _of_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> list[str]:
    if tolerance:
        one, other = ({k: v for k, v in each.items() if not k.startswith("random.")} for each in (one, other))
    found = [f"tensor {name} is there only once" for name in one.keys() ^ other.keys()]
    for name in one.keys() & other.keys():
        if not torch.equal(_bytes(one[name]), _bytes(other[name])) and not _close(one[name], other[name], tolerance):
            found.append(f"tensor {name} differs")
    return sorted(found)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """For comparison bit for bit; a NaN, as the history of bad steps has, is not equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Whether the difference, as a vector, is small beside the expected one; elements near zero may differ by more.

    What is not finite must be so in both.
    """
    ours, expected = (each.double().nan_to_num(0.0, 0.0, 0.0) for each in (one, other))
    same = torch.equal(one.isnan(), other.isnan()) and torch.equal(one.isinf(), other.isinf())
    return tolerance > 0 and same and bool((ours - expected).norm() <= tolerance * expected.norm())
