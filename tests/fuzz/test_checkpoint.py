"""Checkpoints made wrong at random; tests/fuzz/harness.py says what is asked and how to go on.

A case takes a run with two whole checkpoints, changes the newest one, or both, in a few places, mostly with a manifest
whose digests fit the change, and lets `train --dry-run`, `train` or `generate` choose among them.
"""

import copy
import functools
import gzip
import io
import json
import os
import pickle
import pickletools
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata

from swamla_titan.checkpoint.manifest import PIECE, name_of
from swamla_titan.checkpoint.reader import Reader
from swamla_titan.errors import UserError
from tests.fuzz.harness import Bench, Case, fuzz
from tests.fuzz.test_config import change_bytes, shuffle_lines
from tests.text import write_text
from tests.tiny_config import TINY

SETTINGS = (
    *("--model.num_layers", "2", "--model.swa_layers_per_cycle", "1", "--model.dim", "32", "--data.num_workers", "0"),
    *("--checkpoint.interval", "2", "--validation.interval", "0", "--checkpoint.async_mode", "disabled"),
)
FILES = ("manifest.json", "train.json", ".metadata", "__0_0.distcp", "config.toml", "data.json.gz")
OLDER, NEWER = name_of(2), name_of(4)

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.5, 1e308, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**19),
    *("", "4", "x", "\0", "\ud800", "a" * 100_000, "../x", "/etc/passwd", "\x1b[2J", [], {}, [[]], {"": {}}),
]
LITERALS = [
    *("NaN", "-Infinity", "1e999", "-0", "1" * 25, "1" * 5000, "1e-400", "0x10", "01", "tru", "'x'", '"\\ud800"'),
    *("[" * 100_000 + "]" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, '{"a": 1, "a": 2}', " " * 100_000 + "1", ""),
]


@functools.cache
def bomb() -> bytes:
    """Blanks without end, in little."""
    return gzip.compress(b" " * (80 << 20), compresslevel=1)


@pytest.fixture(scope="module")
def whole(bench: Bench) -> Path:
    """A folder with tiny.toml, and in `run` what a run of four steps leaves."""
    folder = bench.folder("whole")
    (folder / "work" / "tiny.toml").write_text(TINY.format(folder="."))
    write_text(folder / "work" / "made-up-text", 60)
    case = Case(["train", "tiny.toml", *SETTINGS, "--training.steps", "4"], may_write=("work/run",), seconds=600)
    outcome = bench.run(case, folder)
    assert outcome.code == 0, outcome
    shutil.rmtree(folder / "work" / "run" / "logs")
    return folder / "work"


# what is changed; each gets the folder of a checkpoint


def digested(folder: Path) -> None:
    """Make the manifest fit what is there."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        for name, entry in manifest["files"].items():
            content = (folder / name).read_bytes()
            assert len(content) <= PIECE
            entry |= {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        path.write_text(json.dumps(manifest))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        pass  # it is changed itself


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything within a JSON value: the keys that lead there."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*at, key)
        yield from places(each, (*at, key))


def change_json(content: bytes, rng: random.Random) -> bytes:
    value = json.loads(content)
    mark = "a place for what is no value"
    for _ in range(rng.choice([1, 1, 1, 3])):
        *path, last = rng.choice(list(places(value)))
        parent = functools.reduce(lambda inside, key: inside[key], path, value)
        kind = rng.randrange(6)
        if kind == 0:
            parent.pop(last)
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(["x", "", "007", "-1", "a/b", "1" * 400, "\ud800", last])] = rng.choice(VALUES)
        elif kind == 2 and isinstance(parent[last], int):
            parent[last] += rng.choice([-1, 1, 2**31, -(2**40), 0.5])
        elif kind == 3:
            parent[last] = mark
        else:
            parent[last] = rng.choice(VALUES)
    return json.dumps(value).replace(f'"{mark}"', rng.choice(LITERALS)).encode()


def change_record(folder: Path, rng: random.Random) -> None:
    path = folder / "train.json"
    path.write_bytes(change_json(path.read_bytes(), rng))
    digested(folder)


def change_manifest(folder: Path, rng: random.Random) -> None:
    path = folder / "manifest.json"
    path.write_bytes(change_json(path.read_bytes(), rng))


def change_data_record(folder: Path, rng: random.Random) -> None:
    path = folder / "data.json.gz"
    kinds: list[Callable[[], bytes]] = [
        lambda: gzip.compress(change_json(gzip.decompress(path.read_bytes()), rng)),
        lambda: gzip.compress(rng.choice(LITERALS).encode()),
        bomb,
        lambda: path.read_bytes() * 2,
        lambda: path.read_bytes()[:-3],
    ]
    path.write_bytes(rng.choice(kinds)())
    digested(folder)


def change_configuration(folder: Path, rng: random.Random) -> None:
    path = folder / "config.toml"
    lines = path.read_text().splitlines(keepends=True)
    kind = rng.randrange(5)
    if kind == 0:
        path.write_text("".join(line for line in lines if not line.startswith("vocab_size")))
    elif kind == 1:
        at = rng.choice([number for number, line in enumerate(lines) if " = " in line])
        values = ("0", "-1", "10000000", str(2**62), '"x"', "1.5", "[" * 3000 + "]" * 3000, "1979-05-27", "inf", "{}")
        lines[at] = f"{lines[at].partition(' = ')[0]} = {rng.choice(values)}\n"
        path.write_text("".join(lines))
    elif kind == 2:
        path.write_text(shuffle_lines("".join(lines), rng))
    elif kind == 3:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
    else:
        path.write_text("")
    digested(folder)


def change_content(folder: Path, rng: random.Random) -> None:
    """Of any file but the tensors', whose values nobody can tell from others."""
    path = folder / rng.choice([name for name in FILES if name != "__0_0.distcp"])
    content = path.read_bytes()
    changed = change_bytes(content, rng) if rng.random() < 0.7 else content[: rng.randrange(len(content))]
    path.write_bytes(changed)
    if rng.random() < 0.7:
        digested(folder)


def change_without_digest(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    path.write_bytes(change_bytes(path.read_bytes(), rng))


def replace_file(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    content = path.read_bytes()
    path.unlink()
    kind = rng.randrange(9)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(rng.choice([path.name, "nothing", "/dev/zero", "/proc/self/mem", "../../../../beside"]))
    elif kind == 3:
        other = folder.parents[1] / "other"
        other.write_bytes(content)
        path.symlink_to(other)
    elif kind == 4:
        with path.open("wb") as file:
            file.truncate(rng.choice([1 << 30, 1 << 42]))
    elif kind == 5:
        path.touch()
    elif kind == 6:
        made = socket.socket(socket.AF_UNIX)
        here = Path.cwd()
        os.chdir(folder)  # names of sockets are short
        made.bind(path.name)
        os.chdir(here)
        made.close()
    elif kind == 7:
        with path.open("wb") as file:
            file.truncate(len(content))
        digested(folder)
    # else it is gone


def add_file(folder: Path, rng: random.Random) -> None:
    name = rng.choice([b"x", b"\xff\xfe", b"\n", b"tokenizer.tiktoken", b"__9_0.distcp", b"n" * 255, b" "])
    path = os.path.join(os.fsencode(folder), name)
    if rng.random() < 0.5:
        os.mkfifo(path)
    else:
        with open(path, "wb") as file:
            file.write(rng.randbytes(100))


def read_index(folder: Path) -> Any:
    """To be changed; an earlier change may have made it one that nobody should unpickle."""
    return copy.deepcopy(Reader(folder).read_metadata())


def change_index(folder: Path, rng: random.Random) -> None:
    path = folder / ".metadata"
    index = read_index(folder)
    name = rng.choice(list(index.state_dict_metadata))
    entry = index.state_dict_metadata[name]
    (key,) = [each for each in index.storage_data if each.fqn == name]
    info, chunk = index.storage_data[key], entry.chunks[0]
    number = rng.choice([0, -1, 1, 7, 2**31, 2**62, 2**70, True, "x", None, 1.5])
    size = torch.Size([rng.choice([0, 1, 7, 2**31, 2**40]) for _ in entry.size])
    half = torch.Size([(entry.size or [2])[0] // 2, *entry.size[1:]])
    kinds: list[Callable[[], object]] = [
        lambda: index.state_dict_metadata.pop(name),
        lambda: index.storage_data.pop(key),
        lambda: setattr(entry, "chunks", []),
        lambda: setattr(entry, "chunks", entry.chunks * 2),
        lambda: setattr(chunk, "sizes", half),
        lambda: setattr(chunk, "sizes", size),
        lambda: setattr(chunk, "offsets", size),
        lambda: (setattr(chunk, "sizes", size), setattr(entry, "size", size)),
        lambda: setattr(entry, "size", size),
        lambda: setattr(entry, "size", rng.choice([None, (1, 2), "x", torch.Size([2**31] * 3)])),
        lambda: setattr(entry.properties, "dtype", rng.choice([torch.int64, torch.float64, torch.bool, torch.uint8])),
        lambda: setattr(info, rng.choice(["offset", "length"]), number),
        lambda: setattr(info, "relative_path", rng.choice(["../x", "/dev/zero", "", ".", "train.json", "x\0", 7])),
        lambda: setattr(info, "transform_descriptors", ["zstd"]),
        lambda: setattr(index, rng.choice(["state_dict_metadata", "storage_data"]), rng.choice([None, [], {}, 7])),
        lambda: index.state_dict_metadata.update({rng.choice(["x", 7, "\ud800"]): rng.choice([entry, None, info])}),
        lambda: setattr(index, "planner_data", rng.choice([None, 7, {"x": [index]}])),
        lambda: index.state_dict_metadata.update({name: metadata.BytesStorageMetadata()}),
    ]
    rng.choice(kinds)()
    try:
        path.write_bytes(pickle.dumps(index))
    except (OverflowError, TypeError, ValueError, pickle.PicklingError):
        return
    digested(folder)


class Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


def deep_tuple(depth: int) -> bytes:
    return b"\x80\x04)" + b"\x85" * depth


def replace_pickle(folder: Path, rng: random.Random) -> None:
    path = folder / ".metadata"
    content = path.read_bytes()
    opcodes = [each.code.encode("latin-1") for each in pickletools.opcodes]
    kinds: list[Callable[[], bytes]] = [
        lambda: pickle.dumps(Call(os.mkdir, "made")),
        lambda: pickle.dumps(Call(exec, "open('made', 'w')")),
        lambda: pickle.dumps(Call(getattr, metadata.Metadata, "__init__")),
        lambda: pickle.dumps(Call(torch.load, "x")),
        lambda: b"\x80\x04r\xff\xff\xff\x7f.",
        lambda: b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",
        lambda: b"\x80\x04\x8b" + (2**31 - 1).to_bytes(4, "little") + b".",
        lambda: b"(" * 1_000_000,
        lambda: b"\x80\x04]" + b"]a" * 200_000 + b".",
        lambda: b"\x80\x04}" + deep_tuple(200_000)[2:] + b"Ns.",
        lambda: b"\x80\x04cpathlib\nPosixPath\n" + deep_tuple(200_000)[2:] + b"R.",
        lambda: (
            b"\x80\x04ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
            + deep_tuple(200_000)[2:]
            + b"\x85R."
        ),
        lambda: b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}U\x08__init__Ns\x86b.",
        lambda: b"".join(rng.choice(opcodes) + rng.randbytes(rng.randrange(3)) for _ in range(50)),
        lambda: pickle.dumps(rng.choice(VALUES[:-4])),
        lambda: content[: rng.randrange(len(content))],
        lambda: change_bytes(content, rng),
    ]
    path.write_bytes(rng.choice(kinds)())
    digested(folder)


def change_archive(folder: Path, rng: random.Random) -> None:
    """What torch.save has put around the values of one tensor, at the same length."""
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    index = read_index(folder)
    info = rng.choice(list(index.storage_data.values()))
    archive = content[info.offset : info.offset + info.length]
    for _ in range(rng.choice([1, 1, 5])):
        # The values lie between; before and after them stand names, sizes and the description of the tensor.
        at = rng.choice([rng.randrange(min(len(archive), 600)), len(archive) - 1 - rng.randrange(900)])
        archive[at] = rng.choice([archive[at] ^ 1 << rng.randrange(8), 0, 255, ord("0")])
    if rng.random() < 0.4:
        words = (b"FloatStorage", b"_rebuild_tensor_v2", b"torch._utils", b"OrderedDict", b"little", b"storage", b"cpu")
        word = rng.choice(words)
        archive = archive.replace(word, rng.choice([b"x" * len(word), b"\0" * len(word), word[::-1]]))
    if rng.random() < 0.2:
        other = io.BytesIO()
        torch.save(rng.choice([torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), {"a": 1}, [1], None]), other)
        archive = bytearray(other.getvalue()[: info.length].ljust(info.length, b"\0"))
    content[info.offset : info.offset + info.length] = archive
    path.write_bytes(content)
    digested(folder)


def put_another_in_its_place(folder: Path, rng: random.Random) -> None:
    """Names: of copies, of links, of what is no folder."""
    parent = folder.parent
    names = ("step-99999999", "step-4", "step-000000004", "step-00000003", "step-" + "9" * 200, "step-٠٠٠٠٠٠٠٩", "best")
    path = parent / rng.choice(names)
    kind = rng.randrange(7)
    if kind == 0:
        shutil.copytree(folder, path)
    elif kind == 1:
        folder.rename(path)
    elif kind == 2:
        path.symlink_to(folder)
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        os.mkfifo(path)
    elif kind == 5:
        os.mkdir(os.path.join(os.fsencode(parent), rng.choice([b"step-\xff\xff", b"\xff", b"step-0000000\n4"])))
    else:
        shutil.rmtree(folder)
        os.mkfifo(folder) if rng.random() < 0.5 else folder.touch()


CHANGES: list[Callable[[Path, random.Random], None]] = [
    *[change_record] * 4,
    *[change_manifest] * 3,
    *[change_index] * 4,
    *[replace_file] * 4,
    *[change_archive] * 3,
    *[replace_pickle] * 3,
    *[put_another_in_its_place] * 2,
    change_data_record,
    change_configuration,
    change_content,
    change_without_digest,
    add_file,
]


def make_case(whole: Path, rng: random.Random, folder: Path) -> Case:
    work = folder / "work"
    shutil.copytree(whole, work, dirs_exist_ok=True)
    checkpoints = work / "run" / "checkpoints"
    for name in rng.choice([(NEWER,), (NEWER,), (NEWER, OLDER)]):
        for _ in range(rng.choice([1, 1, 1, 2])):
            try:
                rng.choice(CHANGES)(checkpoints / name, rng)
            except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, UserError):
                break  # what an earlier change has made of it, this one cannot change
    steps = ("--training.steps", "5", *rng.choice([(), ("--data.on_error", "skip_file")]))
    write = ["generate", "--max-new-tokens", "2", "--prompt", "a"]
    dry_run = Case(["train", "tiny.toml", "--dry-run", *SETTINGS, *steps])
    return rng.choice(
        [
            *[dry_run] * 5,
            *[Case([*write, "run"])] * 2,
            Case([*write, f"run/checkpoints/{NEWER}"]),
            Case(["train", "tiny.toml", *SETTINGS, *steps], may_write=("work/run",)),
        ]
    )


def test_a_checkpoint_however_wrong_is_handled(bench: Bench, whole: Path):
    fuzz(bench, "checkpoint", functools.partial(make_case, whole))
