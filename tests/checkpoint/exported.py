"""Folders as `export` writes them: a model's weights in safetensors, with config.json."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from swamla_titan.checkpoint.exported import CONFIG_JSON, INDEX_OF_FILES, SINGLE_FILE
from swamla_titan.checkpoint.hugging_face import MODEL_TYPE, OWN_SETTINGS
from swamla_titan.config import load_config
from tests.train.runs import tensors


def export(source: Path, folder: Path, dtype: torch.dtype = torch.float32, files: int = 1) -> Path:
    """The weights of a checkpoint in so many files; returns the folder."""
    found = {name: each.to(dtype) for name, each in tensors(source).items() if name.startswith("model.")}
    weights = {name.removeprefix("model."): each for name, each in found.items()}
    folder.mkdir()
    names = [SINGLE_FILE] if files == 1 else [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    where = {name: names[number % files] for number, name in enumerate(weights)}
    for file in names:
        save_file({name: each for name, each in weights.items() if where[name] == file}, folder / file)
    if files > 1:
        (folder / INDEX_OF_FILES).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    model = vars(load_config(source / "config.toml").model)
    fields = {name: value for name, value in model.items() if isinstance(value, int | float | str)}
    content = {"model_type": MODEL_TYPE, "architectures": ["x"], OWN_SETTINGS: {"model": fields}}
    (folder / CONFIG_JSON).write_text(json.dumps(content))
    return folder
