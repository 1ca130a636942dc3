"""What tests/data/test_toy_source.py checks in a copy of the package that the patch was applied to.

Usage: python checks.py FOLDER CONFIG
"""

import contextlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import swamla_titan
from swamla_titan.cli import main
from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import open_corpus
from tests.data.test_loader import all_cursors, all_excluded, global_batch, loaders

TEXTS = [f"<{number}:{'abc'[number % 3] * (number * 17 % 41)}>" for number in range(40)]


def write(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for number, text in enumerate(TEXTS):
            member = tarfile.TarInfo(f"texts/{number:02}.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


def text_of(batches: list[dict[int, tuple[list[int], list[int]]]]) -> str:
    rows = [row for batch in batches for _, (row, _) in sorted(batch.items())]
    return "".join("|" if token == 256 else chr(token) for row in rows for token in row)


def check_loaders(path: Path) -> None:
    """The same batches by any ranks and after a resume, and without what is damaged."""
    data = Data(source="tar", path=str(path), tokenizer="byte", streams=1, on_error="skip_file", retry_seconds=0)
    corpus = open_corpus(data, Validation(fraction=0), 0)
    recorded = json.loads(json.dumps(corpus.record()))
    expected = [global_batch(ranks) for ranks in [loaders(corpus, 2, 1)] for _ in range(30)]
    assert sum(text in text_of(expected) for text in TEXTS) > len(TEXTS) // 2  # the others are cut by sequences
    os.truncate(path, path.stat().st_size // 2)
    ranks = loaders(corpus, 2, 1)
    damaged = [global_batch(ranks) for _ in range(30)]
    assert damaged != expected
    found = all_excluded(ranks)
    assert {each.file for each in found} == {path.name}
    ranks = loaders(corpus, 2, 2)
    assert [global_batch(ranks) for _ in range(12)] == damaged[:12]
    write(path)
    again = open_corpus(data, Validation(fraction=0), 0, recorded=recorded)
    assert again.fingerprint() == corpus.fingerprint()
    ranks = loaders(again, 2, 3, 0, all_cursors(ranks), 12, found)
    assert [global_batch(ranks) for _ in range(18)] == damaged[12:]


def check_run(config: str, path: Path, folder: Path) -> None:
    """The real command trains on it and resumes; what is wrong with its keys is refused as of every source."""
    quiet = (
        "--validation.interval",
        "0",
        "--validation.fraction",
        "0",
        "--data.streams",
        "2",
        "--data.num_workers",
        "0",
    )
    command = ["train", config, "--data.source", "tar", "--data.path", str(path), *quiet]
    for steps in ("2", "3"):
        assert main([*command, "--training.steps", steps, "--job.dump_folder", str(folder)]) == 0
    log = (folder / "logs" / "rank-0.log").read_text()
    assert f"{len(TEXTS)} texts in {path}" in log
    assert "resumed from" in log
    for overrides, message in (
        (["--data.path", ""], 'data.source = "tar" needs a file or folder here'),
        (["--data.text_key", "body"], "has no effect"),
        (["--data.source", "tarr"], '"tar"'),
        (["--data.path", str(folder / "config.toml")], "config.toml: it is no tar archive"),
    ):
        with contextlib.redirect_stderr(io.StringIO()) as error:
            assert main([*command, *overrides, "--job.dump_folder", str(folder / "other")]) == 2
        assert message in error.getvalue(), error.getvalue()


if __name__ == "__main__":
    folder, config = Path(sys.argv[1]), sys.argv[2]
    assert (folder / "copy") in Path(swamla_titan.__file__).parents
    archive = folder / "texts.tar"
    write(archive)
    check_loaders(archive)
    check_run(config, archive, folder / "run")
