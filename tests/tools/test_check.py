"""`check`: a line for each thing, an exit code for the whole."""

import functools
import json
import shutil
import sys
from collections import namedtuple

import pytest
import torch

from swamla_titan.cli import main
from swamla_titan.data.tokenizer import ByteTokenizer
from swamla_titan.kernels.attention import dispatch as attention
from swamla_titan.kernels.float8 import casts as float8
from swamla_titan.tools import check as module
from swamla_titan.train import setup
from tests.train.runs import checkpoint, snapshot, train

MACHINE = ["python", "torch", "gpu", "tf32", "float8", "attention", "disk"]
INPUT = ["config", "folder", "tokenizer", "data", "sequence", "model", "optimizer", "stability"]

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, dict[str, str]]:
        """Exit code, and subject -> line."""
        capsys.readouterr()
        code = main(["check", *arguments])
        lines = capsys.readouterr().out.splitlines()
        return code, {line.split()[1]: line for line in lines}

    return run


def states(lines: dict[str, str]) -> dict[str, str]:
    return {subject: line.split()[0] for subject, line in lines.items()}


def test_the_machine_alone(report):
    code, lines = report()
    assert list(lines) == [*MACHINE, "tokenizer"]
    assert set(states(lines).values()) <= {"ok", "warning"}
    assert code == 0
    assert torch.__version__ in lines["torch"]
    assert "gradients within" in lines["attention"]
    assert "GiB free under" in lines["disk"]
    assert "checkpoints take" not in lines["disk"]  # nobody said of which model
    assert "gpt2: 50257 tokens" in lines["tokenizer"]
    assert "round trip exact" in lines["tokenizer"]


def test_a_configuration_that_is_fit_and_nothing_is_written(tiny, tmp_path, report):
    before = snapshot(tmp_path)
    code, lines = report(str(tiny))
    assert list(lines) == [*MACHINE, *INPUT]
    assert set(states(lines).values()) <= {"ok", "warning"}
    assert code == 0
    assert "byte: 257 tokens" in lines["tokenizer"]
    assert "228,864 parameters" in lines["model"]
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides", [(), ("--data.path", "/nowhere", "--data.source", "local")])
def test_the_data_are_opened_once_and_everything_is_validated_once(tiny, report, monkeypatch, overrides):
    calls = []

    def count(name, real):
        return lambda *arguments: calls.append(name) or real(*arguments)

    monkeypatch.setattr(setup, "open_corpus", count("corpus", setup.open_corpus))
    for subject, validation in setup.VALIDATIONS.items():
        monkeypatch.setitem(setup.VALIDATIONS, subject, count(subject, validation))
    code, lines = report(str(tiny), *overrides)
    assert (code, states(lines)["data"]) == ((2, "failure") if overrides else (0, "ok"))
    assert sorted(calls) == sorted(["corpus", *setup.VALIDATIONS])


def documents(folder, texts):
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    keys = {"data.source": "local", "data.path": folder, "data.shuffle_documents": 1, "data.streams": 1}
    keys |= {"validation.fraction": 0, "validation.interval": 0}
    return [f"--{key}={value}" for key, value in keys.items()]


def test_the_first_sequence_is_shown(tiny, tmp_path, report):
    texts = ["naïve \x9b\u202e", "two\n", "three" + "." * 99]
    code, lines = report(str(tiny), *documents(tmp_path / "data", texts))
    assert code == 0
    assert lines["sequence"].startswith("ok ")
    shown = "64 tokens of 3 documents, decoded and encoded once more without loss; it begins: "
    assert shown + r'"naïve \x9b\u202e two\n three....' in lines["sequence"]
    assert lines["sequence"].endswith('..."')
    code, lines = report(str(tiny), *documents(tmp_path / "gpt2", texts[::-1]), "--data.tokenizer", "gpt2")
    assert lines["sequence"].startswith("ok ")


def test_a_tokenizer_that_loses_text_of_the_data(tiny, tmp_path, report, monkeypatch):
    arguments = documents(tmp_path / "data", ["one", "zwei", "three" * 20])
    decode = ByteTokenizer.decode
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, tokens: decode(self, tokens).replace("w", "v"))
    monkeypatch.setattr(module, "SAMPLE", "plain")
    code, lines = report(str(tiny), *arguments)
    assert code == 2
    assert lines["sequence"].startswith("failure ")
    assert 'they are others: "zvei"' in lines["sequence"]


def test_data_that_fail_on_the_way(tiny, tmp_path, report):
    arguments = documents(tmp_path / "data", ["one", "two"])
    with (tmp_path / "data/a.jsonl").open("a") as file:
        file.write("{\n")
    (tmp_path / "data/b.txt").symlink_to("nowhere")
    code, lines = report(str(tiny), *arguments)
    assert code == 2
    assert lines["data"].startswith("failure ")
    assert "sequence" not in lines
    (tmp_path / "data/b.txt").unlink()
    code, lines = report(str(tiny), *arguments)
    assert code == 2
    assert lines["data"].startswith("ok ")
    assert lines["sequence"].startswith("failure ")
    assert "line 3: not valid JSON" in lines["sequence"]
    (tmp_path / "data/b.txt").symlink_to("nowhere")
    code, lines = report(str(tiny), *arguments, "--data.on_error", "skip_file")
    assert code == 0
    assert states(lines)["data"] == states(lines)["sequence"] == "warning"
    assert "1 of its files cannot be read and are skipped: " in lines["data"]


def test_overrides_are_checked_too(tiny, tmp_path, report):
    assert report(str(tiny), "--data.source", "local", "--data.path", str(tmp_path / "nowhere"))[0] == 2
    assert "2 files" not in report(str(tiny))[1]["data"]
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    _, lines = report(str(tiny), "--data.source", "local", "--data.path", str(tmp_path))
    assert "2 files" in lines["data"]


def test_overrides_without_a_configuration_are_refused(capsys):
    assert main(["check", "--training.steps", "3"]) == 2
    assert "give a configuration too" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, subject, part",
    [
        (("--data.source", "local", "--data.path", "/nowhere"), "data", "/nowhere does not exist"),
        (("--data.tokenizer", "gpt5"), "tokenizer", 'there is no tokenizer "gpt5"'),
        (("--model.vocab_size", "9"), "model", "smaller than the 257 tokens"),
        (("--job.dump_folder", __file__ + "/run"), "folder", "is a file)  -> choose another job.dump_folder"),
    ],
)
def test_input_that_is_at_fault_gives_2_and_a_line_that_says_so(tiny, report, overrides, subject, part):
    code, lines = report(str(tiny), *overrides)
    assert code == 2
    assert states(lines)[subject] == "failure"
    assert part in lines[subject]
    assert "failure" not in [states(lines)[name] for name in MACHINE]


def test_an_invalid_configuration_shows_every_error_and_the_machine_is_still_checked(tiny, capsys):
    assert main(["check", str(tiny), "--training.steps", "0", "--optimizer.lr", "fast"]) == 2
    output = capsys.readouterr().out
    assert "failure  config" in output
    assert "[training] steps = 0: expected a whole number >= 1" in output
    assert '[optimizer] lr = "fast": expected a number >= 0' in output
    assert "-> `swamla-titan config show debug` explains each key" in output
    assert "ok       attention" in output


def test_a_disk_too_small_for_the_checkpoints_gives_1_and_a_remedy(tiny, report, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 228_864 * 12 * 4 - 1))
    code, lines = report(str(tiny))
    assert code == 1
    assert lines["disk"].startswith("failure  disk")
    assert lines["disk"].endswith("-> free some space, lower checkpoint.keep_latest or move job.dump_folder")
    assert report(str(tiny), "--checkpoint.keep_latest", "2")[0] == 0
    assert report()[0] == 0


def test_an_untested_torch_gives_1_and_a_remedy(report, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.3.1+cpu")
    code, lines = report()
    assert code == 1
    assert lines["torch"].startswith("failure  torch")
    assert "-> install a tested version: pip install 'torch>=2.11,<2.14'" in lines["torch"]


def test_a_checkpoint_of_another_run_is_a_failure(tiny, report):
    settings = ("--validation.interval", "0", "--data.num_workers", "0")
    assert train(tiny, *settings, "--training.steps", "2") == 0
    assert report(str(tiny), *settings)[0] == 0
    code, lines = report(str(tiny), *settings, "--model.dim", "96")
    assert code == 2
    assert lines["run"].startswith("failure  run")
    assert "belongs to another run" in lines["run"]
    assert states(lines)["data"] == states(lines)["sequence"] == "ok"
    for file in checkpoint(tiny.parent / "run", 2).glob("*.distcp"):
        file.write_bytes(b"")
    code, lines = report(str(tiny), *settings)
    assert code == 2
    assert lines["run"].startswith("failure  run")
    assert "no intact checkpoint" in lines["run"]


FAULTS = {
    "no gradients of queries and keys": lambda real, q, k, v, mask, scale: real(q.detach(), k.detach(), v, mask, scale),
    "another scale": lambda real, q, k, v, mask, scale: real(q, k, v, mask, 2 * scale),
    "keys of other heads": lambda real, q, k, v, mask, scale: real(q, k.flip(1), v, mask, scale),
    "no sinks": lambda real, q, k, v, mask, scale: real(
        q, k, v, mask if mask is None else mask.tril().triu(-255), scale
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_attention_that_is_wrong_is_found(report, monkeypatch, fault):
    monkeypatch.setattr(attention, "_sdpa", functools.partial(FAULTS[fault], attention._sdpa))
    code, lines = report()
    assert code == 1
    assert lines["attention"].startswith("failure  attention")


@pytest.mark.parametrize("window, kind", [("16", "SWA by sdpa"), ("64", "SWA by sdpa, causal")])
def test_check_and_plan_show_what_computes_the_runs_attention(tiny, monkeypatch, capsys, window, kind):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command in ("check", "plan"):
        assert main([command, str(tiny), "--model.swa_window", window]) == 0
        out = capsys.readouterr().out
        assert f" {kind}, MLA by sdpa, causal" in out
        assert "comes after" not in out
        faster = "attention   SWA not by triton, windows: needs a GPU"
        assert (faster in out) == (command == "check" and window == "16")


@pytest.mark.parametrize("documents", ["true", "false"])
def test_attention_is_tried_under_documents_where_the_run_has_them(tiny, report, monkeypatch, documents):
    real, masks = attention._sdpa, []
    monkeypatch.setattr(
        attention, "_sdpa", lambda q, k, v, mask, scale: masks.append(mask) or real(q, k, v, mask, scale)
    )
    _, lines = report(str(tiny), "--data.document_mask", documents)
    assert lines["attention"].startswith("ok       attention")
    own_of_rows = [mask is not None and len(mask) == 2 for mask in masks if mask is None or mask.shape[-1] == 512]
    assert own_of_rows == [documents == "true"] * 2


def test_a_probe_that_breaks_is_a_line_and_not_the_end(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(module.metadata, "version", lambda name: 1 / 0)
    code, lines = report()
    assert code == 1
    assert lines["torch"].startswith("failure  torch       ZeroDivisionError")
    assert list(lines) == [*MACHINE, "tokenizer"]


def test_float8_that_is_asked_for_is_told_and_what_converts_nothing_is_a_failure(tiny, report):
    code, lines = report(str(tiny), "--float8.recipe", "native")
    assert code == 2
    assert lines["matmuls"].startswith("failure  matmuls")
    assert "would convert none of 14 linear layers" in lines["matmuls"]
    code, lines = report(str(tiny), "--float8.recipe", "native", "--float8.linear_layers", "all")
    assert code == 0
    assert lines["matmuls"].startswith("warning  matmuls     float8 (native): 14 of 15 linear layers")


def _transposed_wrongly(real, quantized, rows, columns):
    out, turned = real(quantized, rows, columns)
    return out, turned.flip(0)


def _not_a_number(real, quantized, rows, columns):
    out, turned = real(quantized, rows, columns)
    return out, torch.full_like(turned.float(), float("nan")).to(turned.dtype)


@pytest.mark.parametrize("recipe", ["native", "tensorwise", "rowwise"])
def test_float8_is_tried_where_it_is_asked_for(tiny, report, recipe):
    code, lines = report(str(tiny), "--float8.recipe", recipe, "--float8.linear_layers", "all")
    assert code == 0
    assert lines["float8"].startswith("ok       float8")
    assert f"{recipe}: gradients within" in lines["float8"]


@pytest.mark.parametrize("fault", [_transposed_wrongly, _not_a_number])
def test_float8_that_is_wrong_is_found(tiny, report, monkeypatch, fault):
    monkeypatch.setattr(float8, "_with_transposed", functools.partial(fault, float8._with_transposed))
    code, lines = report(str(tiny), "--float8.recipe", "native", "--float8.linear_layers", "all")
    assert code == 1
    assert lines["float8"].startswith("failure  float8")


def test_a_gpu_that_cannot_compute_float8_is_a_failure(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    config = module.load_config(
        tiny, [module.Override("float8", "recipe", "native"), module.Override("float8", "linear_layers", "all")]
    )
    (finding,) = module._answers([module._validated], config, torch.device("cuda"))
    assert finding.state == "failure"
    assert "A100 has 8.0" in finding.text
