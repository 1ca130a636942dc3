"""The model card of an exported folder, README.md, from what a checkpoint and its run recorded."""

import json
from dataclasses import replace
from pathlib import Path

from swamla_titan.checkpoint.records import read_train_state
from swamla_titan.config import Config, to_toml
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.annexes import annexes_of

_METRICS = "metrics.jsonl"  # of the run whose checkpoint it is, two folders above
_OF_LOSSES = ("loss", "val_loss", "val_bits_per_byte")


def model_card(checkpoint: Path, config: Config, model: SWAMLAModel, dtype: str, ema: bool) -> str:
    """The text of README.md, which says nothing where nothing was recorded."""
    config, state, shape = _without_places(config), read_train_state(checkpoint), config.model
    elements = sum(parameter.numel() for parameter in model.parameters())
    kinds = shape.block_kinds
    facts = {
        "parameters": f"{elements:,}, stored in {dtype}" + (", the moving average of the weights" if ema else ""),
        "layers": f"{len(kinds)}: {kinds.count('swa')} with sliding-window attention (window {shape.swa_window}, "
        f"{shape.swa_sink_size} sink tokens), {kinds.count('mla')} with latent attention",
        "width": f"{shape.dim}, {shape.num_heads} heads, feed-forward {shape.ffn_width}",
        **{name: annex.summary(shape) for name, annex in annexes_of(shape).items()},
        "vocabulary": f"{shape.vocab_size:,} ids ({config.data.tokenizer})",
        "longest sequence": f"{shape.max_seq_len:,} tokens; trained on sequences of {config.training.seq_len:,}",
        "documents": "attention stops at document boundaries"
        if config.data.document_mask
        else "a sequence of training may hold several documents, and attention crosses their boundaries",
        "data": _data(config),
        "steps": f"{state.step:,} of {config.training.steps:,}",
        "tokens": f"{state.tokens:,}",
        **_losses(checkpoint, state.step),
        **{f"version of {name}": version for name, version in sorted(state.versions.items())},
    }
    table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in facts.items())
    return _CARD.format(
        head=_head(config),
        name=_cell(Path(config.job.dump_folder).name or "model"),
        table=table,
        config=to_toml(config).strip().replace("```", "` ` `"),
    )


def _cell(text: str) -> str:
    """Text of the run as a cell of a table, or a heading: in one line, and nothing of it is markup."""
    return " ".join("".join(f"\\{each}" if each in "\\|<>`*_[]#" else each for each in text).split())


def _head(config: Config) -> str:
    """The metadata of the Hub, in YAML; JSON strings are YAML strings."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in ("swamla", "custom_code", "sliding-window-attention", "latent-attention")]
    if config.data.source == "huggingface" and not Path(config.data.path).is_absolute():
        lines += ["datasets:", f"- {json.dumps(config.data.path)}"]
    return "\n".join(lines)


def _without_places(config: Config) -> Config:
    """The configuration with names alone instead of paths of the machine on which it ran."""
    job = replace(config.job, dump_folder=Path(config.job.dump_folder).name)
    data = replace(config.data, tokenizer=Path(config.data.tokenizer).name)
    return replace(config, job=job, data=replace(data, path=Path(data.path).name) if data.source == "local" else data)


def _data(config: Config) -> str:
    own = config.data
    return " ".join(
        filter(None, (own.source, own.path, own.name, own.split * (own.source == "huggingface"), own.revision))
    )


def _losses(checkpoint: Path, step: int) -> dict[str, str]:
    """The last of each loss that the run logged up to a step; nothing where the checkpoint has left its run."""
    found: dict[str, str] = {}
    try:
        with (checkpoint.parents[1] / _METRICS).open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                values = _values(line)
                if isinstance(at := values.get("step"), int) and at <= step:
                    found |= {key: f"{values[key]:.4f} (step {at:,})" for key in _OF_LOSSES if key in values}
    except OSError:
        pass
    return found


def _values(line: str) -> dict[str, float]:
    """The numbers of a line of metrics, which a crash may have cut."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    numbers = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in numbers if isinstance(value, int | float)}


_CARD = """---
{head}
---

# {name}

A language model of interleaved sliding-window and multi-head latent attention, trained with SwaMLA-Titan.

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

The model was trained to continue text, and neither to follow instructions nor to refuse any.

## Configuration of the run

```toml
{config}
```
"""
