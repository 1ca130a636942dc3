"""A corpus of over 100 MB: prepared, mixed with another, trained on, killed and resumed.

It is the documentation of Debian packages, unpacked below the repository's `.text`, which git ignores:

    apt-get download linux-doc-6.1 python3.11-doc
    for package in *.deb; do dpkg-deb -x "$package" .text/"${package%%_*}"; done
"""

import gzip
import html
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swamla_titan.data.shards import MANIFEST, read_manifest
from tests.waiting import HANG, wait_until

ROOT = Path(__file__).parents[2]
UNPACKED = ROOT / ".text"
LEAST = 100_000_000  # bytes of text
_NO_TEXT = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", flags=re.DOTALL)

CONFIG = """
[job]
deterministic = true
[model]
flavor = "debug"
num_layers = 3
dim = 64
num_heads = 2
swa_window = 16
[data]
tokenizer = "gpt2"
streams = 6
num_workers = 1
[[data.sources]]
name = "manuals"
source = "shards"
path = "{folder}/shards"
weight = 0.75
[[data.sources]]
name = "pages"
source = "local"
path = "{folder}/pages.jsonl"
weight = 0.25
[training]
seq_len = 64
local_batch_size = 4
global_batch_size = 4
steps = 24
compute_dtype = "float32"
[compile]
enabled = false
[checkpoint]
interval = 6
[validation]
interval = 12
max_tokens = 2000
[metrics]
log_interval = 1
tensorboard = false
batch_digests = true
"""


def text_of(path: Path) -> str:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode(errors="replace")
    return html.unescape(_NO_TEXT.sub(" ", text)) if ".html" in path.suffixes else text


def write_rows(path: Path, files: list[Path]) -> int:
    """Write a text of each file; returns how many bytes."""
    size = 0
    with path.open("w") as rows:
        for file in files:
            size += rows.write(json.dumps({"text": text_of(file)}, ensure_ascii=False) + "\n")
    return size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With manuals.jsonl of over 100 MB, and pages.jsonl, which is smaller."""
    path = tmp_path_factory.mktemp("documentation")
    files = [
        each
        for each in sorted(UNPACKED.rglob("*"))
        if each.name.endswith((".html", ".txt", ".rst.gz", ".txt.gz")) and each.is_file() and not each.is_symlink()
    ]
    pages = files[::10]
    size = write_rows(path / "manuals.jsonl", [each for at, each in enumerate(files) if at % 10])
    if size < LEAST:
        pytest.skip(f"{UNPACKED} holds {size / 1e6:.0f} MB of text, and 100 are needed: {__doc__.split('ignores:')[1]}")
    write_rows(path / "pages.jsonl", pages)
    (path / "run.toml").write_text(CONFIG.format(folder=path))
    return path


def start(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "swamla_titan", *map(str, arguments)], cwd=ROOT)


def killed_when(condition, *arguments: object) -> None:
    """Run a command until a condition holds; then kill it."""
    process = start(*arguments)
    wait_until(lambda: condition() or process.poll() is not None)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def steps(run: Path, name: str, key: str) -> dict[int, object]:
    """A value of each step; of those that were done again after a kill the last."""
    lines = (run / name).read_text().splitlines() if (run / name).exists() else []
    return {entry["step"]: entry[key] for entry in map(json.loads, lines) if key in entry}


@pytest.mark.slow
def test_documentation_is_prepared_mixed_trained_on_killed_and_resumed(folder):
    shards = folder / "shards"
    prepare = ("data", "prepare", folder / "manuals.jsonl", shards, "--tokenizer", "gpt2", "--deduplicate")
    for pieces in (5, 40):
        killed_when(lambda pieces=pieces: len([*shards.glob(".preparing/0*.json")]) >= pieces, *prepare)
    assert start(*prepare).wait(HANG) == 0
    manifest = read_manifest(str(shards), "")
    assert manifest.bytes + manifest.duplicates > LEAST * 0.8
    assert manifest.tokens > manifest.bytes / 6
    assert start("data", "inspect", shards, "--verify", "--step", "1000").wait(HANG) == 0

    def train(run, *overrides):
        return ("train", folder / "run.toml", "--job.dump_folder", folder / run, *overrides)

    assert start(*train("whole")).wait(HANG) == 0
    for step in (7, 16):
        killed_when(
            lambda step=step: max(steps(folder / "killed", "metrics.jsonl", "loss"), default=0) >= step,
            *train("killed"),
        )
    assert start(*train("killed")).wait(HANG) == 0
    for name, key in (("metrics.jsonl", "loss"), ("metrics.jsonl", "val_loss"), ("batch_digests.jsonl", "digest")):
        whole = steps(folder / "whole", name, key)
        assert len(whole) in (24, 2)
        assert steps(folder / "killed", name, key) == whole
    assert (shards / MANIFEST).exists()
