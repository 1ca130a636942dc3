"""A GPU whose memory is full: what the user reads, and what to change."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from swamla_titan.config import Config
from swamla_titan.console import one_line
from swamla_titan.errors import RankFailed
from swamla_titan.parallel.world import World

logger = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is torch's allocator, or CUDA beside it, that found no memory on the device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "CUDA error: out of memory" in str(error)


@contextmanager
def explained_out_of_memory(config: Config, world: World, traces: Path) -> Iterator[None]:
    """Makes a RankFailed, with what to change, of running out of the device's memory inside.

    The allocator's whole table goes to traces/oom-rank-R.txt. The other ranks do not know of it and wait for this one;
    its end makes the launcher end them.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        text = message(error, config, world)
        path = traces / f"oom-rank-{world.rank}.txt"
        try:
            traces.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{error}\n\n{_table(world.device)}\n", encoding="utf-8", errors="backslashreplace")
            text += f"\nThe whole table of its memory is in {one_line(path)}"
        except OSError as other:
            text += f"\n{one_line(path)} could not be written ({other.strerror})"
        failure = RankFailed(*text.split("\n"))
        logger.error("%s", failure)  # for this rank's log file
        raise failure from error


def message(error: BaseException, config: Config, world: World) -> str:
    """What happened, how full the device is, and which keys to change: those that are not yet at their best."""
    first_line = str(error).strip().splitlines()[0]
    what = ". ".join(first_line.split(". ")[:3]).rstrip(".")  # the rest is on torch's environment variables
    advice = "\n".join(f"  - {line}" for line in suggestions(config, world))
    return f"rank {world.rank} ran out of memory: {what}.\n{_essentials(world.device)}What helps, best first:\n{advice}"


def suggestions(config: Config, world: World) -> list[str]:
    """Changes that save memory on a device, those that cost least first; the numbers of the training stay as they are
    but for the last ones."""
    training, parallel, mode = config.training, config.parallel, config.activation_checkpoint.mode
    lines = []
    if training.local_batch_size > 1:
        smaller = training.local_batch_size // 2
        lines.append(f"training.local_batch_size = {smaller}: the global batch stays what it is, in more micro-batches")
    if mode == "none":
        lines.append('activation_checkpoint.mode = "selective", or "full": recompute activations in the backward pass')
    elif mode == "selective":
        lines.append('activation_checkpoint.mode = "full": recompute all activations in the backward pass')
    if world.size > 1 and parallel.data_parallel == "ddp":
        lines.append('parallel.data_parallel = "fsdp": ranks share the weights and the optimizer state')
    elif world.size > 1 and parallel.reshard_after_forward != "always" and parallel.pipeline == 1:
        lines.append('parallel.reshard_after_forward = "always": free gathered weights after each forward pass')
    if training.compute_dtype == "float32":
        lines.append('training.compute_dtype = "bfloat16": activations of half the size')
    lines.append(
        f"parallel.context = {2 * parallel.context}, on more GPUs: each holds less of a sequence of "
        f"{training.seq_len} tokens; or parallel.tensor"
    )
    if world.device.type == "cuda" and world.size > 1 and not parallel.cpu_offload and parallel.data_parallel != "ddp":
        lines.append("parallel.cpu_offload = true: weights and optimizer state in the host's memory; slow")
    lines.append("a smaller model, or shorter sequences; `swamla-titan plan CONFIG` estimates the memory beforehand")
    return lines


def _essentials(device: torch.device) -> str:
    """One line on the device's memory; empty where there is no device to ask."""
    if device.type != "cuda":
        return ""
    gib = 2**30
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    peak = torch.cuda.max_memory_allocated(device)
    line = (
        f"{torch.cuda.get_device_name(device)}: {total / gib:.1f} GiB, {free / gib:.1f} free; tensors take "
        f"{allocated / gib:.1f} (peak {peak / gib:.1f}), torch keeps {(reserved - allocated) / gib:.1f} more.\n"
    )
    if reserved - allocated > 0.1 * total:
        line += "That much in pieces too small: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may help.\n"
    return line


def _table(device: torch.device) -> str:
    return torch.cuda.memory_summary(device) if device.type == "cuda" else "no GPU"
