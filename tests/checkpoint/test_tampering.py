"""Checkpoints that somebody has made, with digests that fit: what is wrong with one is named, and an older one is used.

Where a copy stands by another name, where the index leaves a part of a tensor out, where anything is of another type,
size or kind than this program writes.
"""

import gzip
import json
import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata

from swamla_titan.checkpoint.manifest import commit, name_of
from swamla_titan.checkpoint.records import TrainState
from swamla_titan.checkpoint.state import State, StateGroup, declared
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.checkpoint.tensor_index import Window, record_sizes
from swamla_titan.cli import main
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.train.step import GROUPS
from tests.tiny_config import tiny_config
from tests.train.runs import checkpoint, tensors, train

SMALL = ("--model.num_layers", "2", "--model.swa_layers_per_cycle", "1", "--model.dim", "32", "--model.num_heads", "1")
FAST = (*SMALL, "--data.num_workers", "0", "--validation.interval", "0", "--checkpoint.interval", "2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of steps 2 and 4 of a run, in a dump folder beside its configuration."""
    folder = tmp_path_factory.mktemp("saved")
    assert train(tiny_config(folder), *FAST, "--training.steps", "4") == 0
    return folder


@pytest.fixture
def two(saved: Path, tmp_path: Path) -> Path:
    """A copy of the dump folder."""
    shutil.copytree(saved / "run", tmp_path / "run")
    return tmp_path / "run"


def digested(folder: Path) -> None:
    """Make the manifest fit what is there, as somebody would who means it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def passed_over(two: Path, caplog: pytest.LogCaptureFixture) -> str:
    """That the checkpoint of step 2 is used, and what is said of that of step 4."""
    caplog.clear()
    assert Checkpoints(two / "checkpoints", 0, known=GROUPS).newest_intact() == checkpoint(two, 2)
    (line,) = [record.getMessage() for record in caplog.records if "checkpoint skipped" in record.getMessage()]
    assert line.startswith(f"checkpoint skipped: {checkpoint(two, 4)}: ")
    return line


# names


@pytest.mark.parametrize(
    "name", ["step-99999999", "step-00000005", "step-00000001", "step-000000004", "step-4", "step-00000007 a link"]
)
def test_a_checkpoint_by_the_name_of_another_step_is_named_and_neither_used_nor_removed_nor_counted(
    saved, two, tmp_path, capsys, name
):
    other = two / "checkpoints" / name.removesuffix(" a link")
    if name.endswith(" a link"):
        other.symlink_to(checkpoint(two, 4))
    else:
        shutil.copytree(checkpoint(two, 4), other)
    settings = (str(saved / "tiny.toml"), *FAST, "--job.dump_folder", str(two), "--checkpoint.keep_latest", "1")
    assert main(["train", *settings, "--training.steps", "6", "--dry-run"]) == 0
    assert f"continues from {checkpoint(two, 4)}" in capsys.readouterr().out
    assert main(["generate", str(two), "--max-new-tokens", "1"]) == 0
    assert main(["train", *settings, "--training.steps", "8"]) == 0
    out = capsys.readouterr().out
    assert f"resumed from {checkpoint(two, 4)}" in out
    if other.name != "step-00000001":  # older than what was looked for
        assert f"checkpoint skipped: {other}: its name is not that of step 4" in out
    left = sorted(path.name for path in (two / "checkpoints").iterdir())
    assert left == sorted([other.name, name_of(8)])
    if other.exists():  # the link's end was removed, as the checkpoint that it is
        assert main(["generate", str(other), "--prompt", "a"]) == 2
        assert "its name is not that of step" in capsys.readouterr().err


def test_where_only_such_a_one_is_left_the_run_does_not_begin_anew(saved, two, capsys):
    shutil.rmtree(checkpoint(two, 2))
    checkpoint(two, 4).rename(two / "checkpoints" / "step-4")
    assert train(saved / "tiny.toml", *FAST, "--job.dump_folder", str(two)) == 2
    error = capsys.readouterr().err
    assert "step-4: its name is not that of step 4, as train.json has it: step-00000004" in error


def test_a_copy_that_stands_where_a_step_is_saved_is_put_aside(saved, two):
    shutil.copytree(checkpoint(two, 4), checkpoint(two, 6))
    assert train(saved / "tiny.toml", *FAST, "--job.dump_folder", str(two), "--training.steps", "6") == 0
    aside = two / "checkpoints" / "replaced-1-step-00000006"
    assert json.loads((aside / "train.json").read_text())["step"] == 4
    assert json.loads((checkpoint(two, 6) / "train.json").read_text())["step"] == 6


def _save(checkpoints: Checkpoints, step: int) -> Path:
    state = TrainState(step, tokens=0, sequences=0, cursors={}, fingerprint={})
    return checkpoints.save({"model": {"weight": torch.zeros(3)}}, state, {})


@pytest.mark.parametrize("keep_latest, keep_every, left", [(1, 0, [5, 50]), (2, 0, [4, 5, 50]), (1, 2, [2, 4, 5, 50])])
def test_what_was_just_saved_stays_whatever_claims_to_be_newer(tmp_path, keep_latest, keep_every, left):
    _save(Checkpoints(tmp_path, 0), 50)
    checkpoints = Checkpoints(tmp_path, keep_latest, keep_every=keep_every)
    for step in (1, 2, 3, 4, 5):
        path = _save(checkpoints, step)
        os.utime(path, (0, 0))  # nothing goes by clocks
        assert path.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [name_of(step) for step in left]


def test_retention_leaves_a_checkpoint_with_a_folder_of_somebody_in_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    (_save(checkpoints, 1) / "notes").mkdir()
    _save(checkpoints, 2)
    assert (tmp_path / name_of(1) / "notes").exists()


# the index, and what it speaks of


def _index(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = pickle.loads((folder / ".metadata").read_bytes())
        change(index)
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        digested(folder)

    return apply


def _entry(index: Any) -> Any:
    return index.state_dict_metadata["model.embedding.weight"]


def _info(index: Any) -> Any:
    return next(info for key, info in index.storage_data.items() if key.fqn == "model.embedding.weight")


def _halve(index: Any, offset: int = 0) -> None:
    rows, width = _entry(index).size
    _entry(index).chunks[0].sizes = torch.Size([rows // 2, width])


def _two_halves_that_overlap(index: Any) -> None:
    """As many elements as there are, the first rows twice and the last never."""
    rows, width = _entry(index).size
    _halve(index)
    shifted = torch.Size([rows // 4, 0])
    _entry(index).chunks.append(metadata.ChunkStorageMetadata(shifted, torch.Size([rows // 2, width])))
    index.storage_data[metadata.MetadataIndex("model.embedding.weight", shifted)] = _info(index)


def _without(index: Any) -> None:
    del index.state_dict_metadata["optimizer.state.embedding.weight.exp_avg"]


def _deep(index: Any) -> None:
    index.planner_data = ()
    for _ in range(100):
        index.planner_data = (index.planner_data,)


INDICES = {
    "half of a tensor": (_halve, r"model\.embedding\.weight has \d+ elements, and its chunks \d+"),
    "no chunk": (lambda index: _entry(index).chunks.clear(), "elements, and its chunks 0"),
    "twice": (lambda index: _entry(index).chunks.append(_entry(index).chunks[0]), "elements, and its chunks"),
    "overlap": (_two_halves_that_overlap, "chunks that overlap"),
    "beyond": (lambda index: setattr(_entry(index).chunks[0], "offsets", torch.Size([1, 0])), "not within it"),
    "negative": (lambda index: setattr(_entry(index).chunks[0], "offsets", torch.Size([-1, 0])), "without a place"),
    "flat": (lambda index: setattr(_entry(index).chunks[0], "sizes", torch.Size([384 * 32])), "not within it"),
    "list for a shape": (lambda index: setattr(_entry(index), "size", [384, 32]), "no type or shape"),
    "huge": (lambda index: setattr(_entry(index), "size", torch.Size([2**40, 2**40])), "no type or shape"),
    "nowhere": (lambda index: index.storage_data.clear(), "in no file"),
    "elsewhere": (lambda index: setattr(_info(index), "relative_path", "../x.distcp"), "in no file"),
    "in no file of it": (lambda index: setattr(_info(index), "relative_path", "x.distcp"), "no file of the checkpoint"),
    "in the record": (lambda index: setattr(_info(index), "relative_path", "train.json"), "no file of the checkpoint"),
    "short": (lambda index: setattr(_info(index), "length", 100), "longer than what is stored"),
    "behind the end": (lambda index: setattr(_info(index), "offset", 1 << 30), "and the index speaks of"),
    "not at its place": (lambda index: setattr(_info(index), "offset", 64), "does not hold model.embedding.weight"),
    "packed": (lambda index: setattr(_info(index), "transform_descriptors", ["zstd"]), "in no file"),
    "type": (lambda index: setattr(_entry(index).properties, "dtype", torch.int32), "int32 of shape"),
    "longer type": (lambda index: setattr(_entry(index).properties, "dtype", torch.float64), "longer than"),
    "one missing": (_without, r"optimizer\.state\.embedding\.weight\.exp_avg is missing"),
    "no tensors": (lambda index: setattr(index, "state_dict_metadata", None), "lists no tensors"),
    "numbers for names": (
        lambda index: index.state_dict_metadata.update({7: _entry(index)}),
        "keys that no index needs",
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_does_not_cover_its_tensors_is_damage(two, caplog, case):
    change, message = INDICES[case]
    _index(change)(checkpoint(two, 4))
    assert re.search(message, passed_over(two, caplog))


def test_what_dcp_itself_keeps_in_an_index_does_not_matter(two):
    _index(_deep)(checkpoint(two, 4))
    assert Checkpoints(two / "checkpoints", 0, known=GROUPS).newest_intact() == checkpoint(two, 4)


def _program(*parts: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / ".metadata").write_bytes(b"\x80\x04" + b"".join(parts))
        digested(folder)

    return apply


TUPLES = b")" + b"\x85" * 150_000  # nested so deeply that to hash them ends the process
METADATA = b"ctorch.distributed.checkpoint.metadata\n"
PICKLES = {
    "a table of a billion places": _program(b"Nr\xff\xff\xff\x3f."),
    "a terabyte of bytes": _program(b"\x8e" + (2**40).to_bytes(8, "little") + b"."),
    "a number of a gigabyte": _program(b"\x8b" + (2**30).to_bytes(4, "little") + b"."),
    "a deep key": _program(b"}", TUPLES, b"Ns."),
    "a deep argument": _program(METADATA, b"_MEM_FORMAT_ENCODING\n", TUPLES, b"\x85R."),
    "a deep path": _program(b"cpathlib\nPosixPath\n", TUPLES, b"R."),
    "a class that is changed": _program(METADATA, b"Metadata\nN}\x8c\x08__init__Ns\x86b."),
    "half an instruction": _program(b"Nj\x00"),
    "marks without end": _program(b"(" * 100_000),
    "half a pickle": lambda folder: (
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:9000]),
        digested(folder),
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_is_meant_to_hurt_is_damage(two, caplog, case):
    PICKLES[case](checkpoint(two, 4))
    assert "not the index of a checkpoint" in passed_over(two, caplog)
    assert metadata.Metadata({}).storage_meta is None  # the class itself is what it was


def _in_archive(old: bytes, new: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "__0_0.distcp"
        content = path.read_bytes()
        assert old in content
        assert len(old) == len(new)
        path.write_bytes(content.replace(old, new))
        digested(folder)

    return apply


ROWS, ELEMENTS = (number.to_bytes(2, "little") for number in (384, 384 * 32))  # of the embedding
ARCHIVES = {
    "more elements than there are": _in_archive(b"M" + ELEMENTS, b"M\xff\xff"),
    "fewer": _in_archive(b"M" + ELEMENTS, b"M\x01\x00"),
    "another shape": _in_archive(b"M" + ROWS + b"K\x20\x86", b"M\x00\x03K\x10\x86"),
    "another type": _in_archive(b"FloatStorage", b"IntegStorage"),
    "other bytes": _in_archive(b"little", b"middle"),
    "a call": _in_archive(b"_rebuild_tensor_v2", b"_rebuild_parameter"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_what_is_stored_of_a_tensor_must_be_what_the_index_has(two, caplog, case):
    """torch.load trusts the numbers in its archive: it would read what lies behind the memory of a tensor."""
    ARCHIVES[case](checkpoint(two, 4))
    assert "__0_0.distcp does not hold " in passed_over(two, caplog)


def test_the_sizes_of_an_archive_s_records_are_the_same_with_a_torch_that_does_not_tell_them(two):
    index = pickle.loads((checkpoint(two, 4) / ".metadata").read_bytes())
    with (checkpoint(two, 4) / "__0_0.distcp").open("rb") as file:
        for info in index.storage_data.values():
            window = Window(file, info.offset, info.length)
            assert window.read(4) == b"PK\3\4"
            assert window.seek(0) == 0
            archive = torch._C.PyTorchFileReader(window)
            without = SimpleNamespace(get_all_records=archive.get_all_records)
            found = record_sizes(without, window)
            assert found["data/0"] > 0
            if hasattr(archive, "get_record_size"):
                assert found == record_sizes(archive, window)
            else:
                assert found == {name: len(archive.get_record(name)) for name in archive.get_all_records()}


# the record and the other files


def _json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
        if name != "manifest.json":
            digested(folder)

    return apply


def _record(**values: Any) -> Callable[[Path], None]:
    return _json("train.json", lambda record: record.update(values))


def _text(name: str, text: str | bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        if name != "manifest.json":
            digested(folder)

    return apply


def _file_of(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return _json("manifest.json", lambda manifest: change(manifest["files"]))


def _configuration(old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = (folder / "config.toml").read_text()
        assert old in text
        (folder / "config.toml").write_text(text.replace(old, new))
        digested(folder)

    return apply


def _nested(depth: int) -> list[Any]:
    return [_nested(depth - 1)] if depth else []


def _unlisted(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("x")  # type: ignore[return-value]


CONTENTS = {
    **{f"step {value!r}": _record(step=value) for value in ("4", -4, 4.0, 4.5, True, None, [4], 2**60, 5, 10**30)},
    **{f"{name} -1": _record(**{name: -1}) for name in ("tokens", "sequences", "replaced_bytes")},
    "tokens 1e308": _record(tokens=1e308),
    "no step": _json("train.json", lambda record: record.pop("step")),
    "another key": _record(more=1),
    "cursors in a list": _record(cursors=[]),
    "a cursor too few": _json("train.json", lambda record: record["cursors"].pop("3")),
    "a cursor too many": _json("train.json", lambda record: record["cursors"].update({"6": {}})),
    "cursors of no stream": _json("train.json", lambda record: record["cursors"].update({"-1": {}})),
    "a stream by two names": _json("train.json", lambda record: record["cursors"].update({"03": {}})),
    "a cursor that is a number": _json("train.json", lambda record: record["cursors"].update({"3": 7})),
    "an identity that is a string": _record(identity="x"),
    "an identity of a megabyte": _json("train.json", lambda record: record["identity"].update(x="x" * 1_000_000)),
    "versions of numbers": _record(versions={"torch": 2}),
    "NaN": _text("train.json", '{"step": NaN}'),
    "infinity": _text("train.json", '{"step": 1e999}'),
    "digits": _text("train.json", '{"step": ' + "1" * 5000 + "}"),
    "a name twice": _text("train.json", '{"step": 4, "step": 4}'),
    "a list": _text("train.json", "[]"),
    "nested": _text("train.json", "[" * 100_000 + "]" * 100_000),
    "nested in a cursor": _json("train.json", lambda record: record["cursors"].update({"3": {"a": _nested(20)}})),
    "no text": _text("train.json", b"\xff\xfe"),
    "UTF-16": _text("train.json", "{}".encode("utf-16")),
    "empty": _text("train.json", ""),
    "a manifest in depth": _text("manifest.json", "[" * 100_000),
    "a manifest with a name twice": _text("manifest.json", '{"format": "x", "format": "y"}'),
    "bytes of a string": _file_of(lambda files: files["train.json"].update(bytes="2000")),
    "bytes below nothing": _file_of(lambda files: files["train.json"].update(bytes=-1)),
    "a digest that is a number": _file_of(lambda files: files["train.json"].update(sha256=7)),
    "two digests": _file_of(lambda files: files["train.json"].update(sha256_of_16_mib_pieces="x")),
    "more of an entry": _file_of(lambda files: files["train.json"].update(mode=7)),
    **{
        f"a file by the name {name!r}": _file_of(lambda files, name=name: files.update({name: files["train.json"]}))
        for name in ("../x", "/etc/passwd", ".", "..", "", "a/b", "a\0", "\ud800", "a\n", "n" * 256)
    },
    "data that are not packed": _text("data.json.gz", "{}"),
    "data cut short": _text("data.json.gz", gzip.compress(b"{}")[:-4]),
    "data twice": _text("data.json.gz", gzip.compress(b"{}") * 2),
    "data in a list": _text("data.json.gz", gzip.compress(b"[]")),
    "data of blanks without end": _text("data.json.gz", gzip.compress(b" " * (65 << 20), compresslevel=1)),
    "data in depth": _text("data.json.gz", gzip.compress(b"[" * 100_000)),
    "no vocabulary": _configuration("vocab_size = 257\n", ""),
    "another vocabulary": _configuration("vocab_size = 257\n", "vocab_size = 258\n"),
    "another width": _configuration("dim = 32\n", "dim = 10000000\n"),
    "no configuration": _text("config.toml", "x = 1"),
    "a configuration with dates": _configuration("[model]", "[model]\nx = 1979-05-27"),
    "a configuration in depth": _text("config.toml", "[model]\nx = " + "[" * 5000 + "]" * 5000),
    "a configuration that is no text": _text("config.toml", b"\xff"),
    "a vocabulary that is not listed": _unlisted("tokenizer.tiktoken"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_content_of_another_kind_is_damage(two, caplog, case):
    CONTENTS[case](checkpoint(two, 4))
    assert len(passed_over(two, caplog)) < 2000


# files


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def _outside(path: Path) -> None:
    (path.parents[3] / "outside").write_bytes((path.parents[1] / name_of(2) / path.name).read_bytes())
    path.symlink_to(path.parents[3] / "outside")


def _large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)


LARGE = ("manifest.json", "train.json", ".metadata", "config.toml", "data.json.gz")
FILES = {
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a folder": Path.mkdir,
    "a circle": lambda path: path.symlink_to(path.name),
    "a link to zeros": lambda path: path.symlink_to("/dev/zero"),
    "a link to a file outside": _outside,
    "four terabytes": _large,
    "nothing": lambda path: None,
}


@pytest.mark.parametrize(
    "name", ["manifest.json", "train.json", ".metadata", "__0_0.distcp", "config.toml", "data.json.gz"]
)
def test_what_is_no_file_of_its_own_is_damage_and_not_read(two, caplog, name):
    path = checkpoint(two, 4) / name
    for make in FILES.values():
        path.unlink()
        make(path)
        assert name in passed_over(two, caplog)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.touch()


@pytest.mark.parametrize("name", LARGE)
def test_a_file_that_is_larger_than_this_program_writes_is_not_read(two, caplog, name):
    """Not even to digest it: the manifest agrees with its size."""
    path = checkpoint(two, 4) / name
    _large(path)
    if name != "manifest.json":
        _file_of(lambda files: files[name].update(bytes=1 << 42))(checkpoint(two, 4))
    assert name in passed_over(two, caplog)


def test_a_large_file_of_tensors_that_the_index_does_not_speak_of_is_not_read(two, caplog):
    _large(checkpoint(two, 4) / "__0_0.distcp")
    _file_of(lambda files: files["__0_0.distcp"].update(bytes=1 << 42))(checkpoint(two, 4))
    assert "__0_0.distcp has 4398046511104 bytes, and the index speaks of" in passed_over(two, caplog)


# what is found only while it is loaded, and by which command


def put(folder: Path, **changed: torch.Tensor) -> None:
    """Write a checkpoint's tensors anew, with some of them changed."""
    found = tensors(folder) | {name.replace("__", "."): tensor for name, tensor in changed.items()}
    parts = folder.rename(folder.with_name("parts"))
    for path in (parts / ".metadata", parts / "manifest.json", *parts.glob("*.distcp")):
        path.unlink()
    dcp.save(found, checkpoint_id=parts, no_dist=True)
    commit(parts, folder, {})


STATES = {
    "counts of later": {"bad_steps__counts": torch.tensor([5, 0, 0, 0])},
    "counts below nothing": {"bad_steps__counts": torch.tensor([-1, 0, 0, 0])},
    "bad steps that are none": {"bad_steps__recent": torch.full((64, 4), torch.nan, dtype=torch.float64)},
    "norms below nothing": {"bad_steps__norms": torch.full((128,), -7.0, dtype=torch.float64)},
    "no generator": {"random__rank-0__cpu": torch.zeros(5056, dtype=torch.uint8)},
    "half a generator": {"random__rank-0__cpu": torch.zeros(7, dtype=torch.uint8)},
    "a scale of nothing": {"loss_scale__value": torch.tensor(0.0)},
}


@pytest.mark.parametrize("case", STATES)
def test_states_that_no_run_has_are_damage(two, caplog, case):
    put(checkpoint(two, 4), **STATES[case])
    passed_over(two, caplog)


@pytest.mark.parametrize("name", ["table.of.something", "nothing"])
def test_a_group_that_nobody_declares_is_refused_and_named(saved, two, capsys, name):
    """Nobody would check it. A run from the checkpoint before would lose it, and write another one in its place."""
    put(checkpoint(two, 4), **{name: torch.zeros(3)})
    settings = (str(saved / "tiny.toml"), *FAST, "--job.dump_folder", str(two), "--training.steps", "6")
    assert main(["train", *settings]) == 2
    assert f"{name} is of no group of tensors that this version of the program knows" in capsys.readouterr().err
    assert main(["generate", str(two), "--max-new-tokens", "1"]) == 2
    assert f"{name} is of no group of tensors" in capsys.readouterr().err
    assert name in tensors(checkpoint(two, 4))


class Unchecked(StateGroup):
    """State as somebody might add it."""

    group = "unchecked"

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


class Undeclared(Unchecked):
    @staticmethod
    def problem(state: dict[str, torch.Tensor], step: int) -> str | None:
        return None


def test_state_without_a_check_or_undeclared_cannot_be_added():
    with pytest.raises(TypeError, match="problem"):
        Unchecked()
    with pytest.raises(AssertionError, match="no checkpoint may hold"):
        State([Undeclared()], GROUPS, World.alone())
    State([Undeclared()], declared(*GROUPS.values(), Undeclared), World.alone())


def test_weights_that_are_no_numbers_are_passed_over_by_every_command(saved, two, capsys):
    weight = tensors(checkpoint(two, 4))["model.norm.weight"]
    put(checkpoint(two, 4), **{"model.norm.weight": weight * torch.nan})
    settings = (str(saved / "tiny.toml"), *FAST, "--job.dump_folder", str(two), "--training.steps", "6")
    assert main(["generate", str(two), "--max-new-tokens", "1"]) == 0
    assert main(["generate", str(checkpoint(two, 4))]) == 2
    assert "no finite numbers" in capsys.readouterr().err
    assert main(["train", *settings]) == 0
    out = capsys.readouterr().out
    assert f"checkpoint skipped: {checkpoint(two, 4)}: " in out
    assert f"resumed from {checkpoint(two, 2)}" in out


@pytest.mark.parametrize("case", ["half of a tensor", "step '4'", "no vocabulary"])
def test_each_command_passes_over_what_is_damaged_and_refuses_it_if_it_is_asked_for(saved, two, capsys, case):
    newest = checkpoint(two, 4)
    (_index(INDICES[case][0]) if case in INDICES else CONTENTS[case])(newest)
    settings = (str(saved / "tiny.toml"), *FAST, "--job.dump_folder", str(two), "--training.steps", "6")
    assert main(["train", *settings, "--dry-run"]) == 0
    assert f"continues from {checkpoint(two, 2)}" in capsys.readouterr().out
    assert main(["generate", str(two), "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    assert main(["generate", str(newest)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {newest}: ")
    shutil.rmtree(checkpoint(two, 2))
    for command in (["train", *settings], ["train", *settings, "--dry-run"], ["generate", str(two)]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: there is no intact checkpoint; restore one of these, or train again")
        assert f"\n  {newest}: " in error
        assert len(error.strip().splitlines()) == 2


def test_what_is_whole_is_whole_however_it_was_cut(tmp_path):
    """A grid of chunks, uneven ones, an empty one, a scalar, an empty tensor."""
    tensors_of_it = {"a": torch.arange(35.0).view(5, 7), "b": torch.tensor(3), "c": torch.zeros(0, 4)}
    _save_parts(tmp_path, tensors_of_it)
    with pytest.raises(UserError, match="overlap"):
        _save_parts(tmp_path / "again", tensors_of_it, shift=1)


def _save_parts(folder: Path, found: dict[str, torch.Tensor], shift: int = 0) -> None:
    from swamla_titan.checkpoint.reader import Reader

    dcp.save(found, checkpoint_id=folder, no_dist=True)
    index = pickle.loads((folder / ".metadata").read_bytes())
    (info,) = [info for key, info in index.storage_data.items() if key.fqn == "a"]
    blocks = [((0, 0), (3, 4)), ((0, 4), (3, 3)), ((3, 0), (2, 7)), ((5, 0), (0, 7))]
    if shift:
        blocks[1] = (0, 3), (3, 3)
        blocks[2] = (3, 0), (2, 7)
    index.state_dict_metadata["a"].chunks = [
        metadata.ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in blocks
    ]
    for at, _ in blocks:
        index.storage_data[metadata.MetadataIndex("a", torch.Size(at))] = info
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    Reader(folder).read_metadata()
