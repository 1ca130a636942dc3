"""Runs with Engram: resumed bit for bit, from checkpoints that say how they look up, and generation from these."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from swamla_titan.checkpoint.manifest import ANNEX_RECORD, MANIFEST
from swamla_titan.checkpoint.records import compressed_vocabulary, read_annex_record
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.cli import main
from swamla_titan.config import Config
from swamla_titan.config.sections import Training
from swamla_titan.data import CompressedVocabulary, compress, load_tokenizer
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.model import FLAVORS
from swamla_titan.model.annexes import ModelAnnexes
from swamla_titan.model.row_table import row_tables
from swamla_titan.tools import check
from swamla_titan.tools.generate import load_model
from swamla_titan.tools.plan import plan
from swamla_titan.tools.plan_report import report
from tests.train.runs import checkpoint, metrics, tensors, train

ENGRAM = (
    *("--model.engram.layers", "0,2", "--model.engram.heads", "2", "--model.engram.d_mem", "16"),
    *("--model.engram.table_size", "101", "--data.num_workers", "0", "--validation.interval", "0"),
)


def run(tiny: Path, folder: Path, steps: int, *more: str) -> None:
    common = ("--job.dump_folder", str(folder), "--checkpoint.interval", "4", "--lr_schedule.name", "wsd")
    assert train(tiny, *common, "--training.steps", str(steps), *ENGRAM, *more) == 0


def test_a_run_resumes_bit_for_bit_and_logs_the_gates(tiny: Path, tmp_path: Path):
    """Beside selective attention, the average of the weights and a schedule with a decay."""
    settings = ("--lr_schedule.decay_steps", "1", "--ema.decay", "0.9", "--model.mla_selective", "true")
    run(tiny, tmp_path / "whole", 8, *settings)
    run(tiny, tmp_path / "cut", 8, *settings)
    for path in (tmp_path / "cut" / "checkpoints" / "step-00000008").iterdir():
        path.unlink()
    (tmp_path / "cut" / "checkpoints" / "step-00000008").rmdir()
    run(tiny, tmp_path / "cut", 8, *settings)
    whole, cut = (tensors(checkpoint(tmp_path / name, 8)) for name in ("whole", "cut"))
    assert any("annexes.0.engram.table.weight" in name for name in whole)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    for layer in (0, 2):
        gates = metrics(tmp_path / "whole", f"engram_gate_{layer}")
        assert len(gates) == 8
        assert all(0 < gate < 1 for gate in gates.values())
    log = (tmp_path / "whole" / "logs" / "rank-0.log").read_text()
    assert "engram before layers 0, 2: 8 tables of about 101 rows of 4 for n-grams of 2, 3 tokens" in log


@pytest.mark.parametrize("of", ["any device", pytest.param("a GPU", marks=pytest.mark.gpu)])
def test_a_run_may_keep_tables_on_the_host_or_not_from_one_start_to_the_next(tiny: Path, tmp_path: Path, of: str):
    assert of == "any device" or torch.cuda.is_available()
    settings = ("--ema.decay", "0.9", "--lr_schedule.warmup_steps", "0", "--lr_schedule.min_lr_ratio", "1")
    run(tiny, tmp_path / "whole", 20, *settings)
    for steps, on_host in ((12, "true"), (16, "false"), (20, "true")):
        run(tiny, tmp_path / "moved", steps, *settings, "--parallel.tables_on_host", on_host)
    whole, moved = (tensors(checkpoint(tmp_path / name, 20)) for name in ("whole", "moved"))
    assert whole.keys() == moved.keys()
    assert all(torch.equal(whole[name], moved[name]) for name in whole)
    assert main(["generate", str(tmp_path / "moved"), "--ema", "--prompt", "The", "--max-new-tokens", "2"]) == 0


def test_plan_and_check_say_what_it_comes_to():
    engram = {"layers": [1, 4], "table_size": 1009}
    model = replace(FLAVORS["debug"], vocab_size=50257, engram=engram)  # type: ignore[arg-type]
    config = Config(model=model, training=Training(seq_len=64))
    text = "engram before layers 1, 4: 16 tables of about 1,009 rows of 64 for n-grams of 2, 3 tokens"
    assert text in check._model(config, torch.device("cpu")).text
    assert any(text in line for line in report(plan(config, 1)))


def test_another_hash_is_another_run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tiny, tmp_path / "run", 4)
    common = ("--job.dump_folder", str(tmp_path / "run"), "--training.steps", "8")
    assert train(tiny, *common, *ENGRAM, "--model.engram.seed", "1") == 2
    message = capsys.readouterr().err
    assert "belongs to another run" in message
    assert "model.engram.seed: 0 in the checkpoint, 1 now" in message
    assert train(tiny, *common, "--data.num_workers", "0") == 2
    assert "model.engram.layers: [0, 2] in the checkpoint, None now" in capsys.readouterr().err


def test_generation_keeps_tables_on_the_host_where_they_do_not_fit_on_a_gpu(
    tiny: Path, tmp_path: Path, monkeypatch, capsys
):
    run(tiny, tmp_path / "run", 2)
    capsys.readouterr()
    models, texts = [], []
    for fits in (True, False):
        monkeypatch.setattr("swamla_titan.tools.generate._fits", lambda model, device, fits=fits: fits)
        models.append(load_model(checkpoint(tmp_path / "run", 2), ema=False).model)
        assert main(["generate", str(tmp_path / "run"), "--prompt", "The", "--max-new-tokens", "9"]) == 0
        texts.append(capsys.readouterr().out)
    of_gpu, of_host = (list(row_tables(model).values()) for model in models)
    assert [table._host_of is None for table in (*of_gpu, *of_host)] == [True, True, False, False]
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(of_gpu, of_host, strict=True))
    assert texts[0] == texts[1]


def rewritten(path: Path, **changes: object) -> None:
    content = json.loads(gzip.decompress((path / ANNEX_RECORD).read_bytes()))
    content["vocabulary"] |= changes
    (path / ANNEX_RECORD).write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


def test_a_checkpoint_keeps_the_ids_and_generation_uses_them(tiny: Path, tmp_path: Path, capsys):
    run(tiny, tmp_path / "run", 4)
    path = checkpoint(tmp_path / "run", 4)
    tokenizer = load_tokenizer("byte")
    record = read_annex_record(path)
    assert record is not None
    assert record.vocabulary.ids.tolist() == compress(tokenizer).ids.tolist()
    assert compressed_vocabulary(tokenizer, record) is record.vocabulary
    model = load_model(path, ema=False).model
    assert model.annexes.compressed_ids(torch.tensor([[65, 97]])).unique().numel() == 1
    assert main(["generate", str(path), "--prompt", "The", "--max-new-tokens", "3"]) == 0

    # As by another Python's tables of Unicode: "A" and "a" unlike each other.
    own = record.vocabulary
    ids = own.ids.tolist()
    ids[65] = own.size
    other = CompressedVocabulary(own.ids.copy(), own.size + 1, own.tokenizer)
    other.ids[65] = own.size
    rewritten(path, ids=ids, size=own.size + 1, digest=other.digest)
    found = read_annex_record(path)
    assert found is not None
    kept = compressed_vocabulary(tokenizer, found)
    assert kept.ids[65] != kept.ids[97]
    assert "the run keeps the" in capsys.readouterr().out
    assert compressed_vocabulary(load_tokenizer("gpt2"), found).size > 30_000  # of another tokenizer


def test_a_run_looks_up_by_compressed_ids_and_a_resumed_one_by_those_that_it_began_with(tiny, tmp_path, monkeypatch):
    built: list[ModelAnnexes] = []
    real = ModelAnnexes.use

    def use(self: ModelAnnexes, ids: np.ndarray, size: int) -> None:
        real(self, ids, size)
        if size < len(ids):  # not those of a model that has just been built, where tokens stand for themselves
            built.append(self)

    monkeypatch.setattr(ModelAnnexes, "use", use)

    def ids_of_a() -> int:
        """How many ids "A" and "a" have in the model that was trained last."""
        return built[-1].compressed_ids(torch.tensor([[65, 97]])).unique().numel()

    run(tiny, tmp_path / "run", 4)
    assert ids_of_a() == 1

    own = compress(load_tokenizer("byte"))
    ids = own.ids.copy()
    ids[65] = own.size
    other = CompressedVocabulary(ids, own.size + 1, own.tokenizer)
    with monkeypatch.context() as another_python:
        another_python.setattr("swamla_titan.checkpoint.records.compress", lambda tokenizer: other)
        run(tiny, tmp_path / "other", 4)
    run(tiny, tmp_path / "other", 8)
    assert ids_of_a() == 2
    record = read_annex_record(checkpoint(tmp_path / "other", 8))
    assert record is not None
    assert record.vocabulary.digest == other.digest


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"digest": "0"}, "do not have its digest"),
        ({"size": 3}, "not those of a vocabulary of 3"),
        ({"ids": []}, "expected 1 to"),
        ({"ids": "x"}, "not a record of this program's checkpoints"),
        ({"more": 1}, "which is not known"),
    ],
)
def test_a_record_that_is_none_is_refused(tiny: Path, tmp_path: Path, changes: dict[str, object], part: str):
    run(tiny, tmp_path / "run", 4)
    path = checkpoint(tmp_path / "run", 4)
    rewritten(path, **changes)
    with pytest.raises(UserError, match=part):
        read_annex_record(path)


def test_a_checkpoint_without_its_record_is_damaged(tiny: Path, tmp_path: Path):
    run(tiny, tmp_path / "run", 4)
    path = checkpoint(tmp_path / "run", 4)
    (path / ANNEX_RECORD).unlink()
    with pytest.raises(UserError, match=f"{ANNEX_RECORD}"):
        Checkpoints(path.parent, 0, World.alone()).newest_intact()
    assert (path / MANIFEST).exists()
