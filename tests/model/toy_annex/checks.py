"""Tests of the toy annex of toy.patch, run by tests/model/test_toy_annex.py in a copy of the package that has it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swamla_titan.cli import main
from swamla_titan.config import Config, Override, load_config
from swamla_titan.config.sections import ActivationCheckpoint, Compile, Optimizer, Training
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.errors import UserError
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import ANNEXES
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.counts import training_flops
from swamla_titan.optim import group_table
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.compile import compile_model
from swamla_titan.tools.activations import block_bytes
from tests.distributed.ranks import on_ranks
from tests.model.tiny import TINY
from tests.tiny_config import tiny_config
from tests.train.runs import checkpoint, metrics, tensors

MODEL = replace(TINY, toy={"layers": [0, 2], "rows": 31})
CURVES = ("loss", "grad_norm", "val_loss", "toy_size_0", "toy_size_2")
TOY = (
    *("--model.toy.layers", "0,2", "--model.toy.rows", "101", "--model.toy.width", "6", "--data.document_mask", "true"),
    *("--model.dropout", "0", "--optimizer.lr", "1e-3", "--data.num_workers", "0", "--training.steps", "12"),
    *("--checkpoint.interval", "6", "--validation.interval", "6"),
)
PLANS = {
    "fsdp 2, tensor 2": (4, ("--parallel.tensor", "2")),
    "pipeline 3": (3, ("--parallel.pipeline", "3", "--training.local_batch_size", "1")),
    "context 4, recomputed": (4, ("--parallel.context", "4", "--activation_checkpoint.mode", "full")),
}
# On a layer with the toy, and on one without; its rows have another width.
ENGRAM = (
    *("--model.engram.layers", "1,2", "--model.engram.heads", "2", "--model.engram.d_mem", "16"),
    *("--model.engram.table_size", "101"),
)


def run(config: str, *overrides: str) -> int:
    return main(["train", config, *TOY, *overrides])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert run(str(tiny_config(folder))) == 0
    return folder / "run"


def assert_same_curves(found: Path, expected: Path, *more: str) -> None:
    for name in (*CURVES, *more):
        values = metrics(found, name)
        assert len(values) == (2 if name == "val_loss" else 12), name
        assert values == pytest.approx(metrics(expected, name), rel=1e-4), name


@pytest.mark.parametrize("plan", PLANS)
def test_ranks_train_as_one_process(plan, alone, tmp_path):
    ranks, overrides = PLANS[plan]
    assert on_ranks(ranks, run, str(tiny_config(tmp_path)), *overrides) == [0] * ranks
    assert_same_curves(tmp_path / "run", alone)


def test_ranks_train_two_annexes_as_one_process(tmp_path):
    config, one = str(tiny_config(tmp_path)), tmp_path / "one"
    assert run(config, *ENGRAM, "--job.dump_folder", str(one)) == 0
    assert on_ranks(4, run, config, *ENGRAM, "--parallel.tensor", "2") == [0] * 4
    assert_same_curves(tmp_path / "run", one, "engram_gate_1", "engram_gate_2")


def test_a_run_resumes_bit_for_bit_and_its_start_and_plan_know_it(alone, tmp_path, capsys):
    config = str(tiny_config(tmp_path))
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert run(config) == 0
    assert list(metrics(tmp_path / "run", "loss")) == list(range(7, 13))
    whole, resumed = (tensors(checkpoint(folder, 12)) for folder in (alone, tmp_path / "run"))
    assert "model.annexes.2.toy.table.weight" in whole
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    summary = "pairs of tokens before layers [0, 2]: 101 rows"
    assert summary in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert main(["plan", config, *TOY, "--gpus", "2"]) == 0
    assert summary in capsys.readouterr().out
    assert run(config, "--model.toy.rows", "103") == 2
    assert "model.toy.rows: 101 in the checkpoint, 103 now" in capsys.readouterr().err
    assert main(["generate", str(checkpoint(tmp_path / "run", 12)), "--prompt", "The", "--max-new-tokens", "3"]) == 0


def test_it_is_exported_and_loaded_by_what_it_declares(alone, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(["export", str(alone), str(out)]) == 2
    assert "the model has toy, which the exported code does not implement" in capsys.readouterr().err
    monkeypatch.setattr(ANNEXES["toy"], "exported", classmethod(lambda cls, config: {"rows": config.toy.rows}))
    assert main(["export", str(alone), str(out)]) == 0
    settings = json.loads((out / "config.json").read_text())["toy"]
    assert settings == {"layers": [0, 2], "rows": 101, "hashes": {"multiplier": 31}, "pad_id": settings["pad_id"]}
    new = "--checkpoint.initial_load", str(out), "--optimizer.lr", "1e-30", "--training.steps", "1"
    assert run(str(tiny_config(tmp_path)), *new) == 0
    before, after = tensors(checkpoint(alone, 12)), tensors(checkpoint(tmp_path / "run", 1))
    for name in (each for each in before if each.startswith("model.")):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    monkeypatch.setattr(ANNEXES["toy"], "record", classmethod(lambda cls, config: {"multiplier": 33}))
    assert run(str(tiny_config(tmp_path)), *new, "--job.dump_folder", str(tmp_path / "other")) == 2
    assert "this version's toy hashes otherwise" in capsys.readouterr().err


def model() -> SWAMLAModel:
    """In float64 and evaluation mode, with matrices large enough for each part to matter."""
    made = SWAMLAModel(MODEL).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return made


def test_decoding_equals_the_full_forward_pass():
    made, lengths, new = model(), [2, 9], 12
    texts = [torch.randint(0, 50, (length + new,)) for length in lengths]
    padded = torch.zeros(2, 9, dtype=torch.int64)
    for row, (length, text) in enumerate(zip(lengths, texts)):
        padded[row, 9 - length :] = text[:length]
    cache = DecodeCache(made, 2, 9 + new)
    logits = made.prefill(padded, cache, torch.tensor(lengths))
    for step in range(new):
        for row, (length, text) in enumerate(zip(lengths, texts)):
            with torch.no_grad():
                full = made(text[None, : length + step])[0, -1]
            torch.testing.assert_close(logits[row], full, rtol=0, atol=1e-11)
        logits = made.decode(torch.stack([text[n + step] for n, text in zip(lengths, texts)])[:, None], cache)


def test_documents_do_not_see_each_other():
    made, tokens = model(), torch.randint(0, 50, (1, 24))
    documents, other = torch.tensor([[0] * 11 + [1] * 13]), tokens.clone()
    other[0, :11] = 7
    logits = [made(each, None, documents) for each in (tokens, other)]
    assert torch.equal(logits[0][:, 11:], logits[1][:, 11:])
    assert not torch.equal(logits[0][:, :11], logits[1][:, :11])


def test_it_is_recomputed_and_compiled(tmp_path):
    tokens, found = torch.randint(0, 50, (2, 24)), []
    for recomputed, compiled in ((False, False), (True, False), (True, True)):
        torch._dynamo.reset()
        made = SWAMLAModel(MODEL)
        apply_activation_checkpointing(made, ActivationCheckpoint(mode="full" if recomputed else "none"))
        if compiled:
            compile_model(made, Compile(cache_folder=str(tmp_path)), backend="aot_eager")
        made(tokens, tokens).backward()
        found.append([weight.grad for name, weight in made.named_parameters() if "table" not in name])
        assert all(gradient.any() for gradient in found[-1])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-7)


def test_flops_memory_and_optimizers_count_it():
    linear, sum_of_two = 2 * 8 * TINY.dim, 2 * TINY.dim
    assert training_flops(MODEL, 24) - training_flops(TINY, 24) == 3 * 2 * 24 * (linear + sum_of_two)
    held = [
        block_bytes(Config(model=each, training=Training(seq_len=24, compute_dtype="float32")), Degrees(), range(3))
        for each in (TINY, MODEL)
    ]
    assert held[1] - held[0] == 2 * 24 * 4 * (TINY.dim + 8 + TINY.dim)  # the stream before it, the row, the value
    rules = {name: row.kind.rule for row in group_table(MODEL, Optimizer(name="muon")) for name in row.names}
    assert (rules["toy.table"], rules["toy.value"], rules["toy.norm"]) == ("rows", "muon", "adamw")


def test_its_keys_come_from_its_section_and_mistakes_are_refused(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text(
        '[data]\nsource = "builtin"\n[training]\nseq_len = 64\n[model]\nflavor = "debug"\n[model.toy]\nlayers = [1]\n'
    )
    assert load_config(file).model.toy.layers == (1,)
    assert load_config(file, [Override("model.toy", "width", "9")]).model.toy.width == 9
    with pytest.raises(UserError, match=r"model\.toy\.preset a: unknown key"):
        load_config(file, [Override("model.toy", "preset", "a")])
    with pytest.raises(ValueError, match=r"^toy\.layers: \[5\]: there is no layer 5"):
        ModelConfig(num_layers=3, toy={"layers": [5]})
    with pytest.raises(ValueError, match=r"^toy\.rows: 1: expected"):
        ModelConfig(num_layers=3, toy={"layers": [1], "rows": 1})
