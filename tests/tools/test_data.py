"""`data prepare`, `data inspect` and `data bench` as users call them."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from swamla_titan.cli import main
from swamla_titan.data.shards import MANIFEST, shard_name
from swamla_titan.system.process import wait_for_end
from tests.waiting import HANG, wait_until

TEXTS = [f"<{number}:{'abc'[number % 3] * (number * 17 % 41)}>" for number in range(200)]
QUIET = ("--training.seq_len", "96", "--training.global_batch_size", "2", "--data.streams", "4")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def prepare(corpus, *options):
    out = corpus.parent / "shards"
    assert main(["data", "prepare", str(corpus), str(out), "--tokenizer", "byte", "--processes", "1", *options]) == 0
    return out


def refused(capsys, *arguments):
    assert main(["data", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_prepare_takes_a_path_or_a_configuration_and_keys(corpus, tmp_path, capsys):
    out = prepare(corpus)
    printed = capsys.readouterr().out
    assert f"{len(TEXTS)} documents" in printed
    assert f'data.source = "shards" and data.path = "{out}"' in printed
    config = tmp_path / "run.toml"
    config.write_text(f'[data]\nsource = "local"\npath = "{corpus}"\ntokenizer = "byte"\n')
    again = tmp_path / "again"
    assert main(["data", "prepare", str(config), str(again), "--processes", "1"]) == 0
    for name in (MANIFEST, shard_name(0)):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    assert main(["data", "prepare", str(config), str(again)]) == 0
    assert "is prepared already" in capsys.readouterr().out
    mixture = tmp_path / "mixture.toml"
    sources = [
        f'[[data.sources]]\nname = "{name}"\nsource = "{source}"\nweight = 0.5\npath = "{path}"\n'
        for name, source, path in (("ours", "local", corpus), ("python", "builtin", ""))
    ]
    mixture.write_text('[data]\ntokenizer = "byte"\n' + "".join(sources))
    of_mixture = tmp_path / "of-mixture"
    command = ["data", "prepare", str(mixture), str(of_mixture), "--processes", "1"]
    assert main([*command, "--only", "ours"]) == 0
    assert (of_mixture / MANIFEST).read_bytes() == (out / MANIFEST).read_bytes()
    assert "choose one by --only (ours, python)" in refused(capsys, *command[1:])
    assert "no source 'our'" in refused(capsys, *command[1:], "--only", "our")
    assert "there are none" in refused(capsys, "prepare", config, again, "--only", "ours")


def test_prepare_refuses_what_cannot_be_prepared(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert "does not exist" in refused(capsys, "prepare", tmp_path / "nowhere", out)
    assert "unknown key" in refused(capsys, "prepare", corpus, out, "--data.txt_key", "a")
    assert 'no field "body"' in refused(
        capsys, "prepare", corpus, out, "--data.text_key", "body", "--tokenizer", "byte", "--processes", "1"
    )
    assert "has no effect" in refused(capsys, "prepare", corpus, out, "--data.revision", "v1")
    assert "--processes -1" in refused(capsys, "prepare", corpus, out, "--processes", "-1")
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(capsys, "prepare", corpus, tmp_path / "file" / "out", "--tokenizer", "byte")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}\n')
    assert "no text" in refused(capsys, "prepare", empty, out, "--tokenizer", "byte", "--processes", "1")


def processes_of(session):
    """The processes that a session has."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(ProcessLookupError):
            found += [int(name)] if os.getsid(int(name)) == session else []
    return found


@pytest.mark.slow
def test_a_killed_command_leaves_no_process_and_continues_to_the_same_bytes(tmp_path):
    corpus = tmp_path / "text"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"text of file {number} " * 40_000)
    arguments = ["data", "prepare", str(corpus), "{out}", "--tokenizer", "gpt2", "--processes", "2"]

    def start(out):
        command = [sys.executable, "-m", "swamla_titan", *(each.format(out=out) for each in arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    assert start(tmp_path / "whole").wait(HANG) == 0
    out = tmp_path / "killed"
    for signal_number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        done = len([*out.glob(".preparing/*.json")])
        process = start(out)
        wait_until(lambda done=done: len([*out.glob(".preparing/0*.json")]) >= max(3, done))
        started = processes_of(process.pid)
        assert len(started) >= 3
        process.send_signal(signal_number)
        assert process.wait(HANG) == code
        for each in started:
            wait_for_end(each)
        assert not (out / MANIFEST).exists()
    assert start(out).wait(HANG) == 0
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["text", "shards"])
def test_inspect_shows_documents_lengths_held_out_text_and_sequences(corpus, capsys, kind):
    source = corpus if kind == "text" else prepare(corpus)
    capsys.readouterr()
    keys = ("--data.tokenizer", "byte", *QUIET, "--validation.fraction", "0.1", "--data.shuffle_documents", "1")
    assert main(["data", "inspect", str(source), *keys, "--step", "3", "--sequences", "0"]) == 0
    shown = capsys.readouterr().out
    tokens = sum(map(len, TEXTS)) + len(TEXTS)
    assert f"200 (all), {tokens:,} tokens" in shown
    assert f"the longest {max(map(len, TEXTS)) + 1}" in shown
    assert "1.00 bytes a token" in shown
    assert "10.00% of the documents" in shown
    assert f'"{TEXTS[199]}"' in shown or any(f'"{text}"' in shown for text in TEXTS)
    assert "step       3: sequences 4 to 5" in shown
    sequence = shown.split("==== sequence 4, of stream 0, with ")[1].split("====\n")[1]
    assert "\n---- end of document ----\n" in sequence
    pieces = sequence.split("\n\n====")[0].split("\n---- end of document ----\n")
    assert all(piece in TEXTS for piece in pieces[1:-1])
    assert sum(map(len, pieces)) + len(pieces) - 1 == 96


def test_inspect_verifies_shards(corpus, capsys):
    out = prepare(corpus)
    command = ["data", "inspect", str(out), "--data.tokenizer", "byte", *QUIET, "--verify"]
    assert main(command) == 0
    assert "all 2 files are as they were prepared" in capsys.readouterr().out
    content = (out / shard_name(0)).read_bytes()
    (out / shard_name(0)).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(command) == 2
    assert f"{out / shard_name(0)} is not as it was prepared" in capsys.readouterr().out
    assert "--verify compares prepared shards" in refused(capsys, "inspect", corpus, "--verify")


def test_inspect_of_a_shipped_configuration_and_of_python(capsys):
    assert main(["data", "inspect", "builtin", "--data.tokenizer", "byte", *QUIET, "--documents", "5"]) == 0
    assert "5 (the first, see --documents)" in capsys.readouterr().out
    assert "--step is at least 1" in refused(capsys, "inspect", "builtin", "--step", "0")


def test_shards_train_and_resume(corpus, tiny, tmp_path):
    out = prepare(corpus)
    command = ["train", str(tiny), "--data.source", "shards", "--data.path", str(out), "--data.num_workers", "0"]
    for steps in ("2", "3"):
        assert main([*command, "--training.steps", steps, "--validation.interval", "2"]) == 0
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert f"{len(TEXTS)} documents, " in log
    assert "resumed from" in log


@pytest.mark.parametrize("kind", ["text", "shards"])
def test_bench_measures_reading_tokenizing_and_loading(corpus, capsys, kind):
    source = corpus if kind == "text" else prepare(corpus)
    capsys.readouterr()
    keys = ("--data.tokenizer", "byte", *QUIET)
    assert main(["data", "bench", str(source), *keys, "--seconds", "0.05", "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    subjects = ["open", "read", *(["tokenize"] if kind == "text" else []), "loader"]
    assert [line.split()[0] for line in lines] == subjects
    for line in lines[1:]:
        assert re.search(r"[1-9][\d.]*[kMG]? tokens/s", line), line
    assert "in the training process" in lines[-1]
    assert "--seconds is more than 0" in refused(capsys, "bench", source, "--seconds", "0")
