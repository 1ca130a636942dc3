"""Whatever is damaged in the newest checkpoint is noticed and named, and the one before is used."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swamla_titan.checkpoint import store as checkpoint_module
from swamla_titan.checkpoint.manifest import FORMAT, damage_of, digested
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.errors import UserError
from swamla_titan.train.step import GROUPS
from tests.train.runs import assert_same_checkpoint, checkpoint, snapshot, train

FILES = (".metadata", "__0_0.distcp", "train.json", "config.toml", "manifest.json")
FAST = ("--data.num_workers", "0", "--validation.interval", "0", "--checkpoint.interval", "2", "--training.steps", "4")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def _other_of_same_size(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _lose(path: Path) -> None:
    path.unlink()


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


OF_A_FILE = (_flip, _other_of_same_size, _cut, _grow, _empty, _lose, _replace_by_folder, _replace_by_link_to_nothing)


@pytest.fixture
def two(tiny: Path, tmp_path: Path) -> Path:
    """A dump folder with the checkpoints of steps 2 and 4."""
    assert train(tiny, *FAST) == 0
    return tmp_path / "run"


def test_every_damage_of_every_file_is_named_and_passed_over_by_the_real_command(tiny, two, tmp_path, capsys):
    """Each time the step is trained again, from the one before, and saved as it was: what the next damage befalls."""
    newest = checkpoint(two, 4)
    shutil.copytree(newest, tmp_path / "kept")
    damages = [(damage, name) for damage in (_flip, _cut, _lose) for name in FILES]
    for damage, name in damages:
        damage(newest / name)
        assert train(tiny, *FAST) == 0
        out = capsys.readouterr().out
        (line,) = [line for line in out.splitlines() if "checkpoint skipped" in line]
        assert f"{newest}: {name} " in line or f"{newest}: {name}: " in line, line
        assert f"resumed from {checkpoint(two, 2)}" in out
        assert_same_checkpoint(newest, tmp_path / "kept")
    # Whose manifest says nothing may be anybody's, and is put aside; the others are replaced.
    left = sorted(path.name for path in newest.parent.iterdir())
    aside = [f"replaced-{number}-step-00000004" for number in (1, 2, 3)]
    assert left == [*aside, "step-00000002", "step-00000004"]


def _edit(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _changes_of_the_manifest() -> Iterator[Callable[[dict], object]]:
    yield lambda manifest: manifest.update(format="swamla-titan checkpoint 0")
    yield lambda manifest: manifest.update(files={})
    yield lambda manifest: manifest.update(files=[])
    yield lambda manifest: manifest["files"].pop("train.json")
    yield lambda manifest: manifest["files"].pop(".metadata")
    yield lambda manifest: manifest["files"]["train.json"].pop("bytes")
    yield lambda manifest: manifest["files"]["train.json"].pop("sha256")
    yield lambda manifest: manifest["files"].update({"train.json": 7})
    yield lambda manifest: manifest["files"].update({"../x": manifest["files"]["train.json"]})
    yield lambda manifest: manifest["files"].update({"/etc/passwd": manifest["files"]["train.json"]})
    yield lambda manifest: manifest["files"].update({"a\0": manifest["files"]["train.json"]})


def _becomes(folder: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(folder)
    make(folder)


def _damages() -> Iterator[Callable[[Path], object]]:
    for name in FILES:
        for damage in OF_A_FILE:
            yield lambda folder, name=name, damage=damage: damage(folder / name)
    for change in _changes_of_the_manifest():
        yield lambda folder, change=change: _edit(folder, change)
    yield lambda folder: (folder / "manifest.json").write_text("[]")
    yield lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe")
    yield lambda folder: _becomes(folder, Path.touch)
    yield lambda folder: _becomes(folder, lambda path: path.symlink_to("nothing"))
    yield lambda folder: _becomes(folder, Path.mkdir)


def test_no_damage_goes_unnoticed(two, tmp_path, caplog):
    checkpoints, newest = Checkpoints(two / "checkpoints", 0, known=GROUPS), checkpoint(two, 4)
    shutil.copytree(newest, tmp_path / "kept", symlinks=True)
    (checkpoint(two, 2) / "manifest.json").rename(tmp_path / "manifest.json")
    assert checkpoints.newest_intact() == newest
    for number, damage in enumerate(_damages()):
        damage(newest)
        with pytest.raises(UserError, match="there is no intact checkpoint") as refused:
            checkpoints.newest_intact()
        assert f"{newest}: " in str(refused.value), number
        (newest.unlink if newest.is_symlink() or newest.is_file() else lambda: shutil.rmtree(newest))()
        shutil.copytree(tmp_path / "kept", newest)
        assert checkpoints.newest_intact() == newest, number
    (tmp_path / "manifest.json").rename(checkpoint(two, 2) / "manifest.json")
    _lose(newest / "train.json")
    assert checkpoints.newest_intact() == checkpoint(two, 2)


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nothing")])
def test_what_is_no_folder_is_named_and_put_aside_when_the_step_is_saved_again(tiny, two, capsys, make):
    _becomes(checkpoint(two, 4), make)
    assert train(tiny, *FAST) == 0
    assert f"checkpoint skipped: {checkpoint(two, 4)}: " in capsys.readouterr().out
    assert Checkpoints(two / "checkpoints", 0, known=GROUPS).newest_intact() == checkpoint(two, 4)
    left = sorted(path.name for path in (two / "checkpoints").iterdir())
    assert left == ["replaced-1-step-00000004", "step-00000002", "step-00000004"]


def test_what_is_cut_does_not_count_among_those_kept_and_is_not_removed(tiny, two):
    (victim, *_) = sorted(checkpoint(two, 4).glob("*.distcp"))
    save = Checkpoints.save

    def cut_first(self, *arguments):
        _cut(victim)
        return save(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", cut_first)
        assert train(tiny, *FAST, "--training.steps", "6", "--checkpoint.keep_latest", "2") == 0
    assert [checkpoint(two, step).exists() for step in (2, 4, 6)] == [True] * 3


def test_a_folder_of_somebody_else_at_a_checkpoint_s_name_is_put_aside(tiny, tmp_path):
    notes = checkpoint(tmp_path / "run", 2) / "notes.txt"
    commit = checkpoint_module.commit

    def after_somebody(temporary, final, known):
        notes.parent.mkdir(exist_ok=True)
        notes.write_text("mine")
        commit(temporary, final, known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "commit", after_somebody)
        assert train(tiny, *FAST, "--training.steps", "2") == 0
    assert not notes.exists()
    aside = notes.parent.with_name("replaced-1-step-00000002")
    assert (aside / "notes.txt").read_text() == "mine"


def test_if_the_only_one_is_a_file_the_run_is_refused_and_does_not_begin_anew(tiny, two, capsys):
    shutil.rmtree(checkpoint(two, 2))
    _becomes(checkpoint(two, 4), Path.touch)
    before = snapshot(two)
    assert train(tiny, *FAST) == 2
    assert "there is no intact checkpoint" in capsys.readouterr().err
    assert snapshot(two) == before


def test_what_is_left_of_a_crash_is_cleared_away_whatever_it_is(tiny, two):
    folder = two / "checkpoints"
    (folder / ".tmp-step-00000006").touch()
    (folder / ".tmp-step-00000001").symlink_to(checkpoint(two, 2))
    (folder / ".tmp-replaced-step-00000004").mkdir()
    assert train(tiny, *FAST, "--training.steps", "6") == 0
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in (2, 4, 6)]
    assert Checkpoints(folder, 0, known=GROUPS).newest_intact() == checkpoint(two, 6)
    assert (checkpoint(two, 2) / "train.json").exists()


def test_a_checkpoint_that_may_not_be_read_is_named_and_a_folder_of_them_refused(two, monkeypatch):
    """Permissions do not stop the superuser, as whom containers run: the answers are given here."""
    folder, newest = two / "checkpoints", checkpoint(two, 4)
    open_file = os.open

    def refuse(path: Path, *arguments) -> int:
        if Path(path).is_relative_to(newest):
            raise PermissionError(13, "Permission denied")
        return open_file(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    assert Checkpoints(folder, 0, known=GROUPS).newest_intact() == checkpoint(two, 2)
    monkeypatch.setattr(Path, "iterdir", lambda path: refuse(newest / "x"))
    with pytest.raises(UserError, match=r"checkpoints cannot be read .Permission denied., so nothing can be resumed"):
        Checkpoints(folder, 0, known=GROUPS).newest_intact()


def test_retention_leaves_a_checkpoint_with_a_file_that_is_not_of_it_and_one_that_is_a_link(tiny, two, tmp_path):
    (checkpoint(two, 2) / "notes.txt").write_text("the best one")
    checkpoint(two, 4).rename(tmp_path / "elsewhere")
    checkpoint(two, 4).symlink_to(tmp_path / "elsewhere")
    more = ("--training.steps", "10", "--checkpoint.keep_latest", "1")
    assert train(tiny, *FAST, *more) == 0
    left = sorted(path.name for path in (two / "checkpoints").iterdir())
    assert left == [f"step-{step:08d}" for step in (2, 4, 10)]
    assert (checkpoint(two, 4) / "train.json").exists()


def test_a_large_file_is_digested_by_pieces_and_damage_to_any_of_them_is_noticed(tmp_path):
    path, piece = tmp_path / "__0_0.distcp", 16 << 20
    content = random.Random(0).randbytes(2 * piece + 5)
    path.write_bytes(content)
    (entry,) = digested(tmp_path, [path]).values()
    pieces = [content[:piece], content[piece : 2 * piece], content[2 * piece :]]
    digest = hashlib.sha256(b"".join(hashlib.sha256(each).digest() for each in pieces)).hexdigest()
    assert entry == {"bytes": len(content), "sha256_of_16_mib_pieces": digest}
    for name in (".metadata", "train.json"):
        (tmp_path / name).touch()
    entries = digested(tmp_path, sorted(tmp_path.iterdir()))
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": entries}))
    assert damage_of(tmp_path) is None
    for place in (0, piece - 1, piece, 2 * piece + 4):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert damage_of(tmp_path) == "__0_0.distcp has changed since it was written (SHA-256 differs)"
