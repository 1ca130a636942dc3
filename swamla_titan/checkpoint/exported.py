"""Reads the weights of folders that `export` writes: safetensors and config.json, see hugging_face.py.

Such a folder may come from anybody. safetensors holds no code, and its reader validates a file's header against its
size; names, shapes and dtypes are validated here.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swamla_titan.checkpoint.hugging_face import COMPRESSED_IDS, MODEL_TYPE, OWN_SETTINGS, PAD_ID, RECORD, own_name
from swamla_titan.checkpoint.manifest import first_changed, read_digests
from swamla_titan.distributed.dtensor import local, local_slices
from swamla_titan.errors import UserError
from swamla_titan.fields import settings
from swamla_titan.model import ModelConfig
from swamla_titan.model.annexes import ANNEXES
from swamla_titan.system.bounded import fit, parse_json, read_regular, regular_size

CONFIG_JSON = "config.json"
DIGESTS = "digests.json"  # of the files with weights
SINGLE_FILE, INDEX_OF_FILES = "model.safetensors", "model.safetensors.index.json"
_MOST_JSON = 64 << 20  # bytes
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Entry(NamedTuple):
    """Where a tensor is, under which name, and what it is."""

    file: str
    name: str
    shape: torch.Size
    dtype: torch.dtype


def is_exported(path: Path) -> bool:
    """Whether a folder is meant as one that `export` wrote, and not as a checkpoint."""
    return any(os.path.lexists(path / name) for name in (CONFIG_JSON, SINGLE_FILE, INDEX_OF_FILES))


def exported_model(path: Path) -> dict[str, Any]:
    """What config.json has of the fields of ModelConfig, by their names in a fingerprint (JSON types).

    Raises UserError for the file of another architecture.
    """
    content = _json(path / CONFIG_JSON)
    if (found := content.get("model_type")) != MODEL_TYPE:
        raise UserError(
            f"{path / CONFIG_JSON} describes a model of the type {str(found)[:80]!r}, and not of {MODEL_TYPE!r}, as "
            "`swamla-titan export` writes it: no other architecture can be loaded"
        )
    annexes = ModelConfig.annex_configs()
    own = _table(_table(content, OWN_SETTINGS), "model")
    fields = {f"model.{name}": own[name] for name in settings(ModelConfig) if name in own}
    for name, kind in annexes.items():
        inner = _table(own, name)
        fields |= {f"model.{name}.{key}": inner[key] for key in settings(kind) if key in inner}
    return fields


def exported_annexes(path: Path) -> tuple[Tensor, dict[str, Any]] | None:
    """Of a model with annexes: the ids that they look tokens up by, [vocabulary] int64, and the record of each annex.

    None for other models. UserError where config.json has the one and the weights lack the other.
    """
    content = _json(path / CONFIG_JSON)
    annexes = {name: own for name in ANNEXES if (own := _table(content, name))}
    if not annexes:
        return None
    ids, pad = ExportedWeights(path).compressed_ids, next(iter(annexes.values())).get(PAD_ID)
    if ids is None or type(pad) is not int or not (found := ids[ids < pad]).numel():
        raise UserError(f"{path} lacks {COMPRESSED_IDS}, which its {CONFIG_JSON} needs")
    return found, {name: _table(own, RECORD) for name, own in annexes.items()}


def _table(content: dict[str, Any], name: str) -> dict[str, Any]:
    return found if isinstance(found := content.get(name), dict) else {}


def require_as_written(path: Path) -> None:
    """Raise UserError if weights are not those that `export` wrote. Folders that others wrote have no digests."""
    if not os.path.lexists(path / DIGESTS):
        return
    try:
        changed = first_changed(path, read_digests((path / DIGESTS).resolve()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path / DIGESTS}: not the file that `swamla-titan export` writes ({_reason(error)})"
        ) from None
    if changed:
        raise UserError(f"{path}: {changed[1]}: it is damaged, or was changed on purpose; then remove its {DIGESTS}")


class ExportedWeights:
    """The weights in an exported folder, by their names in the model; headers are read at once.

    UserError for a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[str, _Entry] = {}
        self.compressed_ids: Tensor | None = None  # of a model with annexes, see hugging_face.py
        listed = _files_of_names(path)
        for file in sorted({*listed.values()}) if listed else [SINGLE_FILE]:
            self.entries |= self._entries_of(file)
        for name, file in listed.items():
            if name != COMPRESSED_IDS and (
                own_name(name) not in self.entries or self.entries[own_name(name)].file != file
            ):
                raise UserError(f"{path / file} does not hold {name[:200]}, as {INDEX_OF_FILES} has it")

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each tensor."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors by name, each rank its shard of each; of a file no more is read than that."""
        by_file = sorted(tensors, key=lambda name: self.entries[name].file)
        for file, names in itertools.groupby(by_file, lambda name: self.entries[name].file):
            with _opened(self._path / file) as content, torch.no_grad():
                for name in names:
                    shard = local(tensors[name])
                    if shard.numel():
                        read = content.get_tensor if shard.ndim == 0 else content.get_slice
                        stored = read(self.entries[name].name)
                        shard.copy_(stored if shard.ndim == 0 else stored[local_slices(tensors[name])])

    def _entries_of(self, file: str) -> Iterator[tuple[str, _Entry]]:
        with _opened(self._path / file) as content:
            for name in content.keys():  # noqa: SIM118 (no mapping)
                if name == COMPRESSED_IDS:
                    self.compressed_ids = content.get_tensor(name).long().flatten()
                    continue
                stored = content.get_slice(name)
                if (dtype := _DTYPES.get(stored.get_dtype())) is None:
                    raise UserError(f"{self._path / file}: {name[:200]} is {stored.get_dtype()}, which no weight is")
                yield own_name(name), _Entry(file, name, torch.Size(stored.get_shape()), dtype)


def _files_of_names(path: Path) -> dict[str, str]:
    """Name of a tensor -> file, as the index has it; empty where all tensors are in one file."""
    index = path / INDEX_OF_FILES
    if not os.path.lexists(index):
        return {}
    found = _json(index).get("weight_map")
    names: dict[str, str] = found if isinstance(found, dict) else {}
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index} has {str(file)[:200]!r} for {name[:200]}, which is no file of this folder")
    if not names:
        raise UserError(f"{index} lists no tensors")
    return names


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = fit(dict[str, Any], parse_json(read_regular(path.resolve(), _MOST_JSON)))
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the file that `swamla-titan export` writes ({_reason(error)})") from None


def _opened(path: Path) -> Any:
    """A safetensors file, as a context; UserError unless it has the bytes that its header lists."""
    others = [name for name in ("pytorch_model.bin", ".metadata") if os.path.lexists(path.with_name(name))]
    if others and not os.path.lexists(path):
        raise UserError(
            f"{path.parent} has its weights in {others[0]}: export with --format safetensors to begin with it"
        )
    try:
        regular_size(path.resolve())  # the cache of a hub holds links
        return safe_open(path, framework="pt")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or missing ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
