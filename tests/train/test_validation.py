"""Loss on held-out text: what it is a mean of, and that looking at it changes nothing."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

from swamla_titan.config import Config, Override, load_config
from swamla_titan.data import HELD_OUT_TEXT, build_validation_set, corpus, load_tokenizer, open_corpus
from swamla_titan.data.document import text_hash
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.distributed.mesh import World
from swamla_titan.model import SWAMLAModel
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.train.validation import Validator
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, tensors, train

EOT = 256
ONE_STEP = ("--training.steps", "1", "--data.num_workers", "0", "--optimizer.lr", "0")
CPU = torch.device("cpu")


def untrained(config: Config) -> SWAMLAModel:
    model = SWAMLAModel(config.model)
    model.init_weights(config.job.seed)
    return model


def alone(config: Config) -> ParallelModel:
    """The same weights, as the trainer holds them."""
    model = ParallelModel(config, World.alone())
    model.init_weights(config.job.seed)
    return model


def held_out_documents(config: Config) -> list[str]:
    """The share of documents with the lowest hashes, in the order of their names."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(config.data.path).iterdir())]
    lowest = sorted({text_hash(text) for text in texts})[: round(config.validation.fraction * len({*texts}))]
    return [text for text in texts if text_hash(text) in lowest]


@torch.no_grad()
def nats(model: SWAMLAModel, row: list[int], seq_len: int) -> float:
    """Sum of the losses of every token but the first, each predicted from its own window of the row."""
    model.eval()
    total = 0.0
    for start in range(0, len(row) - 1, seq_len):
        window = torch.tensor(row[start : start + seq_len + 1])
        logits = model(window[None, :-1])[0].double()
        for position, target in enumerate(window[1:].tolist()):
            total -= F.log_softmax(logits[position], dim=-1)[target].item()
    return total


@pytest.mark.parametrize("max_tokens", [1000, 10**6])
def test_the_loss_is_the_mean_over_every_held_out_target(tiny, tmp_path, max_tokens):
    settings = ("--validation.max_tokens", str(max_tokens), "--validation.fraction", "0.05")
    assert train(tiny, *ONE_STEP, *settings) == 0
    config = load_config(tmp_path / "run" / "config.toml")
    row = [token for text in held_out_documents(config) for token in (*text.encode(), EOT)]
    assert 1000 < len(row) < 10**5
    row = row[: max_tokens + 1]
    model = untrained(config)
    expected = nats(model, row, 64)
    assert metrics(tmp_path / "run", "val_loss")[1] == pytest.approx(expected / (len(row) - 1), rel=1e-5)
    text_bytes = sum(token != EOT for token in row[1:])
    bits = metrics(tmp_path / "run", "val_bits_per_byte")[1]
    assert bits == pytest.approx(expected / math.log(2) / text_bytes, rel=1e-5)


def test_bits_per_byte_are_those_of_the_text_whatever_the_tokenizer(tiny, tmp_path):
    text = tmp_path / "held-out.jsonl"
    texts = [f"naïve café, number {i}: 漢字 🙂 " * 5 for i in range(6)]
    text.write_text("\n".join(json.dumps({"text": each}) for each in texts))
    for name in ("byte", "gpt2"):
        folder = tmp_path / name
        settings = ("--validation.path", str(text), "--validation.max_tokens", "2048", "--data.tokenizer", name)
        settings += ("--job.dump_folder", str(folder))
        assert train(tiny, *ONE_STEP, *settings) == 0
        tokenizer = load_tokenizer(name)
        row = [token for each in texts for token in (*tokenizer.encode(each), tokenizer.eot_id)]
        # The first token is no target: its bytes are not predicted. Here it is an ASCII letter or more of them.
        first = tokenizer.decode(row[:1])
        assert first.isascii()
        size = sum(len(each.encode()) for each in texts) - len(first)
        loss, bits = (metrics(folder, key)[1] for key in ("val_loss", "val_bits_per_byte"))
        assert bits == pytest.approx(loss * (len(row) - 1) / math.log(2) / size, rel=1e-9)
        model = untrained(load_config(folder / "config.toml"))
        assert loss == pytest.approx(nats(model, row, 64) / (len(row) - 1), rel=1e-5)


@pytest.fixture
def held_out(tiny: Path):
    config = load_config(tiny, [Override("model", "vocab_size", "257"), Override("data", "document_mask", "true")])
    opened = open_corpus(config.data, config.validation, config.job.seed)
    return config, build_validation_set(opened, config.validation, config.training.seq_len)


@pytest.mark.parametrize("ranks", [2, 3, 7, 50])
@pytest.mark.parametrize("local_batch_size", [1, 4])
def test_ranks_that_share_the_set_add_up_to_one_that_has_it_all(held_out, ranks, local_batch_size):
    """A model of a process alone gives each rank's own sum over the global counts."""
    config, validation_set = held_out
    model = alone(config)
    whole = Validator(validation_set, World.alone(), 8)(model)
    assert len(validation_set.tokens) == 10  # 640 tokens
    parts = []
    for rank in range(ranks):
        place: Any = SimpleNamespace(get_local_rank={"data": rank}.get)
        world = World(rank, ranks, CPU, Degrees(shard=ranks), activations=place)
        validator = Validator(validation_set, world, local_batch_size)
        parts.append(validator(model))
        # collectives in the model go together
        assert len(validator.micro_batches) == -(-10 // (ranks * local_batch_size))
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-5)
    if ranks > 10:
        assert parts[-1]["val_loss"] == 0  # only fillers


def test_dropout_and_regularisers_are_off_and_training_mode_comes_back(held_out):
    config, validation_set = held_out
    plain, model = (
        alone(dataclasses.replace(config, model=dataclasses.replace(config.model, **changes)))
        for changes in ({"dropout": 0.0}, {"dropout": 0.3, "z_loss": 0.3, "label_smoothing": 0.3})
    )
    (whole,) = model.parts
    modes = []
    handle = register_module_forward_pre_hook(lambda module, arguments: modes.append(module.training))
    try:
        validator = Validator(validation_set, World.alone(), 4)
        whole.train()
        found = validator(model)
    finally:
        handle.remove()
    assert set(modes) == {False}
    assert all(module.training for module in whole.modules())
    assert found == validator(model) == validator(plain)
    assert all(parameter.grad is None for parameter in whole.parameters())


def test_validation_changes_nothing_in_training(tiny, tmp_path):
    """With dropout on: a random number drawn by validation would show. The fraction held out is the same."""
    settings = ("--training.steps", "5", "--data.num_workers", "0", "--model.dropout", "0.2")
    for interval in ("0", "1", "3"):
        folder = str(tmp_path / interval)
        assert train(tiny, *settings, "--validation.interval", interval, "--job.dump_folder", folder) == 0
    assert metrics(tmp_path / "0", "val_loss") == {}
    assert list(metrics(tmp_path / "1", "val_loss")) == [1, 2, 3, 4, 5]
    assert list(metrics(tmp_path / "3", "val_loss")) == [3, 5]
    for interval in ("1", "3"):
        assert metrics(tmp_path / interval) == metrics(tmp_path / "0")
        assert metrics(tmp_path / interval, "grad_norm") == metrics(tmp_path / "0", "grad_norm")
        assert_same_checkpoint(checkpoint(tmp_path / interval, 5), checkpoint(tmp_path / "0", 5))


def test_a_resumed_run_does_not_look_for_held_out_text_again(tiny, tmp_path, monkeypatch):
    settings = ("--data.num_workers", "0", "--validation.interval", "1", "--training.steps")
    assert train(tiny, *settings, "2", "--optimizer.lr", "0") == 0
    assert (tmp_path / "run" / HELD_OUT_TEXT).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_up_to", lambda *arguments: pytest.fail("held-out text was chosen again"))
        assert train(tiny, *settings, "3", "--optimizer.lr", "0") == 0
    assert len(set(metrics(tmp_path / "run", "val_loss").values())) == 1
    assert metrics(tmp_path / "run", "val_set") == {}


def test_the_loss_falls_when_the_model_learns(tiny, tmp_path):
    assert train(tiny, "--data.num_workers", "0", "--validation.interval", "10", "--optimizer.lr", "0.01") == 0
    found = metrics(tmp_path / "run", "val_loss")
    assert found[30] < found[10] < math.log(257)


def test_with_document_masks_each_document_is_validated_alone(tiny, tmp_path):
    text = tmp_path / "held-out.jsonl"
    texts = [f"document {i}, " * (i % 4 + 1) for i in range(12)]
    text.write_text("\n".join(json.dumps({"text": each}) for each in texts))
    # At the start attention is an even mean of nearly nothing, whatever its mask: the weights must have grown.
    settings = ("--training.steps", "5", "--data.num_workers", "0", "--optimizer.lr", "0.05")
    assert train(tiny, *settings, "--validation.path", str(text), "--data.document_mask", "true") == 0
    trained = tensors(checkpoint(tmp_path / "run", 5))
    model = SWAMLAModel(load_config(tmp_path / "run" / "config.toml").model)
    weights = {name.removeprefix("model."): t for name, t in trained.items() if name.startswith("model.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["head.weight"], [])  # tied: the embedding's
    row = [token for each in texts for token in (*each.encode(), EOT)]
    total = 0.0
    for start in range(0, len(row) - 1, 64):
        window = row[start : start + 65]
        inputs, begin = window[:-1], 0
        ends = [i + 1 for i, token in enumerate(inputs) if token == EOT and i + 1 < len(inputs)] + [len(inputs)]
        for end in ends:  # the end-of-text token belongs to the document that it ends
            total += nats(model, window[begin : end + 1], 64)
            begin = end
    loss = metrics(tmp_path / "run", "val_loss")[5] * (len(row) - 1)
    assert loss == pytest.approx(total, rel=1e-5)
    assert loss != pytest.approx(nats(model, row, 64), rel=1e-4)  # one document reading on from another


def test_validation_text_of_one_token_is_refused_at_the_start(tiny, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("a")
    assert train(tiny, *ONE_STEP, "--validation.path", str(text)) == 2
    assert "nothing to predict" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
