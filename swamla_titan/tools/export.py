"""`export`: write the model of a checkpoint as a Hugging Face folder, which loads without this package.

config.json, generation_config.json        what transformers builds the model from
model.safetensors, or shards and an index  the weights
configuration_swamla.py, modeling_swamla.py  the model, for trust_remote_code (remote_code/)
tokenizer.json, tokenizer_config.json      the vocabulary
README.md                                  the model card
"""

import errno
import importlib
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

import swamla_titan
from swamla_titan.checkpoint.exported import DIGESTS
from swamla_titan.checkpoint.hugging_face import (
    COMPRESSED_IDS,
    OWN_SETTINGS,
    model_settings,
    tensor_name,
    tokenizer_files,
)
from swamla_titan.checkpoint.manifest import ANNEX_RECORD, digested
from swamla_titan.checkpoint.records import read_train_state
from swamla_titan.checkpoint.store import find_checkpoint
from swamla_titan.config import Config, to_toml
from swamla_titan.config.mixture import data_of_sources
from swamla_titan.config.sections import Data, DataSource
from swamla_titan.data import Tokenizer, load_tokenizer
from swamla_titan.errors import RunFailed, UserError
from swamla_titan.escaping import one_line
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.annexes import annexes_of
from swamla_titan.tools.generate import LoadedModel, load_model
from swamla_titan.train.step import GROUPS

Dtype = Literal["float32", "bfloat16", "float16"]
Format = Literal["safetensors", "dcp", "torch"]

REMOTE_CODE = Path(swamla_titan.__file__).parent / "remote_code"
MOST_OF_A_SHARD = 5 * 10**9  # bytes, as transformers has it
_METRICS = "metrics.jsonl"  # of the run whose checkpoint it is, two folders above
_OF_LOSSES = ("loss", "val_loss", "val_bits_per_byte")
_CLASSES = {
    "AutoConfig": "configuration_swamla.SwamlaConfig",
    "AutoModel": "modeling_swamla.SwamlaModel",
    "AutoModelForCausalLM": "modeling_swamla.SwamlaForCausalLM",
}


def export(
    checkpoint: str,
    out: str,
    dtype: Dtype = "float32",
    ema: bool = False,
    format: Format = "safetensors",
    push_to_hub: str | None = None,
) -> None:
    """Write a checkpoint's model to the folder `out`, which must be empty or not exist; the module lists the files.

    `dtype`: of the weights. `ema`: the average of the weights. `format`: of the file with the weights; transformers
    loads "safetensors" and "torch". `push_to_hub`: a repository's name, to which the folder is uploaded as well.

    The folder gets its name by a rename at the end, so that it is complete or not there. Raises UserError for a
    checkpoint that cannot be used, and for a folder that is in use or cannot be written; RunFailed for a failed upload.
    """
    target = Path(out)
    _require_unused(target)
    if push_to_hub is not None:
        _require_hub()
    path = find_checkpoint(checkpoint, GROUPS)
    loaded = load_model(path, ema, torch.device("cpu"))
    tokenizer = loaded.tokenizer or load_tokenizer(loaded.config.data.tokenizer)
    tensors = exported_tensors(loaded.model, getattr(torch, dtype))
    with _signals_raised(), _written_aside(target) as folder:
        _WRITERS[format](tensors, folder)
        digests = digested(folder, sorted(file for file in folder.iterdir() if file.is_file()))
        texts = {
            DIGESTS: _json(digests),
            "config.json": _json(_config(loaded, tokenizer, dtype)),
            "generation_config.json": _json(_generation(loaded, tokenizer)),
            "README.md": model_card(path, loaded.config, loaded.model, dtype, ema),
            **tokenizer_files(tokenizer, _pad_id(loaded, tokenizer), loaded.config.model.max_seq_len),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for source in sorted(REMOTE_CODE.glob("*_swamla.py")):
            shutil.copyfile(source, folder / source.name)
        if (path / ANNEX_RECORD).exists():  # with which a run that begins with this folder looks up as this one
            shutil.copyfile(path / ANNEX_RECORD, folder / ANNEX_RECORD)
        for file in folder.iterdir():  # writers of weights may leave them to the owner alone
            shutil.copymode(folder / "config.json", file)
    elements = sum(tensor.numel() for tensor in loaded.model.parameters())
    print(one_line(f"{target} written: the model of {path}, {elements:,} parameters in {dtype}"))
    if push_to_hub is not None:
        _push(target, push_to_hub)


def exported_tensors(model: SWAMLAModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an exported folder by their names there, of `dtype`; a tied head is left out.

    Raises UserError if a value is too large for the dtype.
    """
    found = {tensor_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    if dtype != torch.float32:
        found = {name: tensor.to(dtype) for name, tensor in found.items()}
        if wide := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
            raise UserError(f"{wide[0]} has values that {str(dtype).removeprefix('torch.')} cannot hold; use bfloat16")
    if len(model.annexes):
        found[COMPRESSED_IDS] = model.annexes.compressed_ids(torch.arange(model.config.padded_vocab_size))
    return found


def _config(loaded: LoadedModel, tokenizer: Tokenizer, dtype: Dtype) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["SwamlaForCausalLM"],
        "auto_map": _CLASSES,
        **model_settings(loaded.model),
        "residual_dropout": loaded.config.model.dropout,
        "dtype": dtype,
        "bos_token_id": _begin_id(loaded, tokenizer),
        "eos_token_id": tokenizer.eot_id,
        OWN_SETTINGS: {"model": asdict(loaded.config.model)},
    }


def _generation(loaded: LoadedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of generation_config.json. The padding is here alone: it lies beyond vocab_size."""
    begin = _begin_id(loaded, tokenizer)
    return {"bos_token_id": begin, "eos_token_id": tokenizer.eot_id, "pad_token_id": _pad_id(loaded, tokenizer)}


def _begin_id(loaded: LoadedModel, tokenizer: Tokenizer) -> int | None:
    """What a text may begin with: the end of the one before, unless attention stops there."""
    return None if loaded.config.data.document_mask else tokenizer.eot_id


def _pad_id(loaded: LoadedModel, tokenizer: Tokenizer) -> int:
    """An id of the padded vocabulary, which no text has; end of text where there is none."""
    return tokenizer.vocab_size if tokenizer.vocab_size < loaded.config.model.padded_vocab_size else tokenizer.eot_id


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def model_card(checkpoint: Path, config: Config, model: SWAMLAModel, dtype: str, ema: bool) -> str:
    """The text of README.md, from what checkpoint and run recorded; nothing where nothing was."""
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
        **{f"data{name and f', {name}'}": _data(own) for name, own in data_of_sources(config.data).items()},
        **{f"tokens of {name}": f"{tokens:,}" for name, tokens in state.source_tokens.items()},
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
    sources = data_of_sources(config.data).values()
    hub = {each.path for each in sources if each.source == "huggingface" and not Path(each.path).is_absolute()}
    lines += ["datasets:", *(f"- {json.dumps(path)}" for path in sorted(hub))] if hub else []
    return "\n".join(lines)


Place = TypeVar("Place", Data, DataSource)


def _without_places(config: Config) -> Config:
    """The configuration with names alone instead of paths of the machine on which it ran."""
    job = replace(config.job, dump_folder=Path(config.job.dump_folder).name)
    data = replace(config.data, tokenizer=Path(config.data.tokenizer).name)
    sources = tuple(_without_place(source, source.source or data.source) for source in data.sources)
    return replace(config, job=job, data=replace(_without_place(data, data.source), sources=sources))


def _without_place(source: Place, kind: str) -> Place:
    return replace(source, path=Path(source.path).name) if kind in ("local", "shards") else source


def _data(own: Data) -> str:
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


def _write_safetensors(tensors: dict[str, Tensor], folder: Path) -> None:
    shards = _shards(tensors)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards):
        save_file({key: tensor.contiguous() for key, tensor in shard.items()}, folder / name, {"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards) for key in shard},
        }
        (folder / "model.safetensors.index.json").write_text(_json(index))


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in their order, cut into shards of at most MOST_OF_A_SHARD bytes unless one tensor has more."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MOST_OF_A_SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_dcp(tensors: dict[str, Tensor], folder: Path) -> None:
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)


def _write_torch(tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        torch.save(tensors, folder / "pytorch_model.bin")
    except RuntimeError:  # without the system's reason
        raise OSError(errno.EIO, "torch could not write all of the weights; is the disk full?") from None


_WRITERS = {"safetensors": _write_safetensors, "dcp": _write_dcp, "torch": _write_torch}
assert set(_WRITERS) == set(get_args(Format))


def _require_unused(target: Path) -> None:
    """Raise UserError unless `target` is an empty folder, or nothing at all."""
    try:
        if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} exists, and is no empty folder; choose another name or remove it")
    except (OSError, ValueError) as error:
        raise UserError(f"{target}: cannot be used ({getattr(error, 'strerror', None) or error})") from None


class _Stopped(SystemExit):
    """A signal that ends a command."""


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Let signals that would end the process at once end what is within by an exception first."""

    def stop(number: int, frame: object) -> None:
        raise _Stopped(number)

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if current_thread() is main_thread() else ()
    before = {number: signal.signal(number, stop) for number in ends if signal.getsignal(number) is not signal.SIG_IGN}
    number = None
    try:
        yield
    except _Stopped as stopped:
        number = stopped.code
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        if number is not None:
            os.kill(os.getpid(), int(number))


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A folder beside `target` that gets its name at the end; removed if anything fails, or the process is stopped.

    Raises UserError if the disk fails.
    """
    final = target.resolve()
    made = [parent for parent in final.parents if not parent.exists()]
    aside = final.parent / f".tmp-{os.getpid()}-{final.name}"
    try:
        aside.mkdir(parents=True)
        yield aside
        os.rename(aside, final)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError | SafetensorError | CheckpointException):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(f"{target}: cannot be written ({reason})") from None
        raise


def _require_hub() -> None:
    try:
        importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError("--push-to-hub needs the package huggingface_hub: pip install huggingface_hub") from None


def _push(folder: Path, repository: str) -> None:
    """Upload a folder to a repository of the Hugging Face Hub, which is created if it is not there."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Export of {folder.name}")
    except Exception as error:  # of many packages below it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunFailed(f"{folder} is complete, and was not uploaded to {repository}: {reason}") from error
    print(one_line(f"uploaded to {repository}"))
