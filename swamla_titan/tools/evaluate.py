"""`evaluate`: score the model of a checkpoint by tasks of lm-evaluation-harness, and by the loss on local text.

Started by torchrun, each rank holds the model and computes its share.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from swamla_titan.checkpoint.records import read_train_state
from swamla_titan.checkpoint.store import find_checkpoint
from swamla_titan.config.sections import Parallel
from swamla_titan.data import IGNORED, MicroBatch, load_tokenizer, text_sequences
from swamla_titan.distributed.mesh import World, all_ranks_or_raise, broadcast_from_rank_0
from swamla_titan.errors import UserError
from swamla_titan.escaping import one_line
from swamla_titan.launch.process_group import destroy_distributed, init_distributed
from swamla_titan.model.loss_head import target_scores
from swamla_titan.system.written_aside import output_file, write_output
from swamla_titan.tools.generate import LoadedModel, Sampling, Writer, load_model
from swamla_titan.train.scoring import Scorer
from swamla_titan.train.step import GROUPS
from swamla_titan.train.validation import require_harness, task_names

Dtype = Literal["float32", "bfloat16", "float16"]
_BOOTSTRAPS = 1000  # samples behind each standard error


class Evaluated:
    """An unsharded model, of which each rank has a copy, in evaluation mode."""

    def __init__(self, loaded: LoadedModel, world: World) -> None:
        self.config, tokenizer, self.model = self.loaded = loaded
        self.tokenizer, self.world = tokenizer or load_tokenizer(self.config.data.tokenizer), world
        self.micro_batch_size = self.config.training.local_batch_size

    @torch.no_grad()
    def score(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """Of each micro-batch `target_scores` of its targets, [B, T, 2]."""
        for batch in (each.to(self.model.device) for each in micro_batches):
            yield target_scores(self.model(batch.tokens, document_ids=batch.document_ids), batch.targets)

    def generate(self, prompts: Sequence[Any]) -> list[str]:
        """Continue each `Prompt` (train/harness.py); those that are asked for alike together."""
        found: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda index: prompts[index][1:])
        for (most, temperature, top_k, top_p, stop), alike in itertools.groupby(
            order, lambda index: prompts[index][1:]
        ):
            indices = list(alike)
            writer = Writer(self.loaded, Sampling(most, temperature, top_k, top_p, stop=stop))
            texts = writer.complete([prompts[index].tokens for index in indices], self.micro_batch_size)
            found |= {index: each.text for index, each in zip(indices, texts)}
        return [found[index] for index in range(len(prompts))]

    def on_tasks(self, names: Sequence[str], limit: int) -> dict[str, float]:
        """The metrics of tasks, TASK/METRIC, on rank 0."""
        from swamla_titan.train.harness import Tasks  # needs lm_eval

        scorer = Scorer(self.world, self.config.training.seq_len, self.micro_batch_size, self.score)
        longest, tasks = self.model.config.max_seq_len, Tasks(names, self.world, generates=True)
        return tasks.run(self.tokenizer, scorer, self.generate, longest, limit, _BOOTSTRAPS)

    def on_text(self, file: str, limit: int) -> dict[str, float]:
        """Loss, perplexity and bits per byte on a text file or a folder of them, read as validation.path is.

        The same sequences as in validation: the end of each document is predicted too, and adds no bytes.
        """
        seq_len, data = self.config.training.seq_len, self.config.data
        text = all_ranks_or_raise(self.world, lambda: text_sequences(data, file, self.tokenizer, seq_len, limit))
        targets, size = int((text.targets != IGNORED).sum()), int(text.target_bytes.sum())
        if not size:
            raise UserError(f"--text {file}: is too short, no byte of it is predicted")
        batches = text.micro_batches(self.world.data_rank, self.world.degrees.data, self.micro_batch_size)
        nats = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for scores in self.score(list(batches)):
            nats -= scores[..., 0].double().sum()
        total = self.world.all_reduce_loss(nats).item()
        loss = total / targets
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": total / math.log(2) / size,
            "tokens": targets,
            "bytes": size,
        }


def evaluate_checkpoint(
    checkpoint: str,
    tasks: Sequence[str] = (),
    text: Sequence[str] = (),
    ema: bool = False,
    dtype: Dtype | None = None,
    limit: int = 0,
    output: str | None = None,
) -> None:
    """Print the metrics of a checkpoint's model on tasks and on text files, and write them to the file `output`.

    `tasks`: names that lm-evaluation-harness knows, or paths of YAML files. `ema`: by the average of the weights.
    `dtype`: of weights and activations; None: on GPUs the one of training, on a CPU float32. `limit`: documents of each
    task and of each text, 0: all. UserError for a checkpoint, a task or a file that cannot be used.
    """
    names = [name for each in tasks for name in task_names(each)]
    if not names and not text:
        raise UserError("nothing to evaluate: give --tasks, as in --tasks hellaswag,arc_easy, or --text FILE")
    if limit < 0:
        raise UserError(f"--limit {limit}: expected 0 (all) or more")
    if names:
        require_harness("--tasks")
    with ExitStack() as stack:
        stack.callback(destroy_distributed)
        world = init_distributed(Parallel(data_parallel="ddp"))
        file = broadcast_from_rank_0(world, lambda: output_file(output) if output is not None else None)
        path = find_checkpoint(checkpoint, GROUPS, world=world)
        loaded = all_ranks_or_raise(world, lambda: _loaded(path, ema, dtype, world))
        found: dict[str, Any] = {
            "checkpoint": str(path),
            "step": broadcast_from_rank_0(world, lambda: read_train_state(path).step),
            "ema": ema,
            "dtype": str(loaded.model.activation_dtype).removeprefix("torch."),
            "seq_len": loaded.config.training.seq_len,
            "limit": limit,
            "tasks": loaded.on_tasks(names, limit) if names else {},
            "text": {file: loaded.on_text(file, limit) for file in text},
        }
        broadcast_from_rank_0(world, lambda: _report(found, file))


def _loaded(path: Path, ema: bool, dtype: Dtype | None, world: World) -> Evaluated:
    return Evaluated(load_model(path, ema, dtype=getattr(torch, dtype) if dtype else None), world)


def _report(found: dict[str, Any], file: Path | None) -> None:
    average = ", the average of the weights" if found["ema"] else ""
    print(one_line(f"{found['checkpoint']}, {found['dtype']}{average}"))
    rows = dict(found["tasks"])
    rows |= {f"{file}/{name}": value for file, values in found["text"].items() for name, value in values.items()}
    width = max(map(len, rows))
    for name, value in rows.items():
        print(
            one_line(f"  {name:<{width}}  {value:,}" if isinstance(value, int) else f"  {name:<{width}}  {value:.4f}")
        )
    if file:
        write_output(file, json.dumps(found, indent=1) + "\n")
