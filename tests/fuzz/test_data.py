"""Data files made wrong at random; tests/fuzz/harness.py says what is asked and how to go on.

A case is a folder of a few files: text, JSON lines, parquet, whole or changed in bytes, in structure or in encoding,
beside files that are none, under names of all kinds. `train --dry-run` opens them, `check` reads a sequence as well.
"""

import gzip
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.test_compressed_files import COMPRESS
from tests.fuzz.harness import Bench, Case, fuzz
from tests.tiny_config import TINY

WORDS = [
    "the",
    "sea",
    "naïve",
    "漢字",
    "🙂",
    "x",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "---",
    "<|endoftext|>",
    " ",
    "0",
    "aa",
    "aaa",
]
STRANGE = ["\0", "\ufeff", "\ud800", "\u2028", "\x1b[2J", "\ufffd", "\x85", "a" * 5000, " " * 3000, "\n" * 3000]
NAMES = [
    *(
        "a.txt",
        "b.md",
        "c.jsonl",
        "d.json",
        "e.parquet",
        "F.TXT",
        "s.jsonl",
        "t.parquet",
        "u.txt",
        "README.md",
        "LICENSE.txt",
        "dataset_info.json",
    ),
    *("v1.metadata.json", "state.json", "_SUCCESS", ".hidden.txt", "g.csv", "h.jsonl.gz", "i.txt.zst", "sub/j.txt"),
    *("v.jsonl.xz", "w.md.bz2", "x.json.zst", "y.txt.gz", "z.parquet.gz"),
    *("sub/k.jsonl", "sub/deep/l.parquet", "_delta_log/0.json", "line\nend.txt", "no utf-8 \udcff.jsonl", "-m.txt"),
    *("n" * 250 + ".txt", "*.txt", "~.md", "o", "p.txt ", "q..jsonl", "r.txt/", "ümläut.parquet"),
]


def text(rng: random.Random) -> str:
    words = WORDS + STRANGE if rng.random() < 0.2 else WORDS
    return "".join(rng.choices(words, k=rng.choice([0, 1, 5, 50, 400])))


def value(rng: random.Random, depth: int = 0) -> Any:
    """Of JSON, of any type."""
    kind = rng.randrange(9 if depth < 4 else 7)
    if kind == 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {rng.choice(WORDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [None, True, rng.getrandbits(rng.choice([3, 64, 4000])), 1.5, float("nan"), text(rng), ""][kind]


# Contents. Each takes random numbers and gives the bytes of a file.


def plain(rng: random.Random) -> bytes:
    return text(rng).encode(errors="replace")


def json_lines(rng: random.Random) -> bytes:
    lines = []
    for _ in range(rng.choice([0, 1, 3, 40])):
        row = {"text": text(rng), "id": value(rng)}
        change = rng.randrange(25)
        if change == 0:
            row["text"] = value(rng)
        elif change == 1:
            del row["text"]
        elif change == 2:
            row = value(rng)
        line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
        if change == 3:
            line = line[: rng.randrange(len(line) + 1)]
        elif change == 4:
            deep = rng.choice([10, 2000, 100_000])
            line = b'{"text": ' + b"[" * deep + b"]" * rng.choice([0, deep]) + b"}"
        elif change == 5:
            line = rng.choice(
                [b"", b" ", b"\xef\xbb\xbf" + line, line + line, b"9" * 6000, b'{"text": NaN}', b"[", b"{"]
            )
        lines.append(line)
    data = rng.choice([b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n"]).join(lines)
    return data if rng.random() < 0.9 else json.dumps([{"text": text(rng)}], indent=1).encode()


def column(rng: random.Random, rows: int) -> pa.Array:
    texts = [text(rng).encode(errors="replace").decode() for _ in range(rows)]
    kind = rng.randrange(16)
    if kind < 6:
        return pa.array(texts)
    others: list[Callable[[], pa.Array]] = [
        lambda: pa.array(texts, pa.large_string()),
        lambda: pa.array(texts).dictionary_encode(),
        lambda: pa.array([rng.choice([part, None]) for part in texts], pa.string()),
        lambda: pa.nulls(rows),
        lambda: pa.array(range(rows)),
        lambda: pa.array([[part] for part in texts], pa.list_(pa.string())),
        lambda: pa.array([{"text": part} for part in texts], pa.struct([("text", pa.string())])),
        lambda: pa.array([part.encode(rng.choice(["utf-8", "utf-16", "latin-1"]), "replace") for part in texts]),
        lambda: pa.array([rng.randbytes(50) for _ in texts], pa.binary()),
        lambda: pa.array([b"abcd"] * rows, pa.binary(4)),
    ]
    return others[kind - 6]()


def parquet(rng: random.Random) -> bytes:
    rows = rng.choice([0, 1, 7, 100])
    names = rng.choice(
        [["text"]] * 6 + [["text", "id"], ["body"], ["Text", "TEXT"], ["text", "text"], ["meta", "text.en"]]
    )
    table = pa.Table.from_arrays([column(rng, rows) for _ in names], names=names)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=rng.choice([1, 5, 1000]),
        compression=rng.choice(["none", "snappy", "zstd", "gzip"]),
        use_dictionary=rng.random() < 0.5,
        data_page_version=rng.choice(["1.0", "2.0"]),
    )
    return sink.getvalue().to_pybytes()


# Changes of a content. Each takes and gives the whole.


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30]) if data else 0):
        changed[rng.randrange(len(changed))] = rng.choice([0, 10, 34, 123, 127, 128, 255, rng.randrange(256)])
    return bytes(changed)


def change_the_end(data: bytes, rng: random.Random) -> bytes:
    """Where parquet keeps what it knows of itself."""
    start = max(0, len(data) - rng.choice([4, 8, 12, 200]))
    return data[:start] + change_bytes(data[start:], rng)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice([rng.randbytes(20), bytes(9000), b"\n" * 9, b"\xff\xfe", data[:100]]) + data[at:]


def encode_otherwise(data: bytes, rng: random.Random) -> bytes:
    name = rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp1252", "gb18030"])
    return data.decode(errors="replace").encode(name, errors="replace")


def pack(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return gzip.compress(data, mtime=0)
    packed: bytes = pa.compress(data, "zstd", asbytes=True)
    return packed


CHANGES = [change_bytes, change_bytes, change_the_end, cut, cut, insert, encode_otherwise, pack]


def a_content(rng: random.Random, name: str) -> bytes:
    """Mostly what the name says."""
    own = json_lines if ".json" in name else parquet if name.endswith(".parquet") else plain
    data = rng.choice([own] * 8 + [plain, json_lines, parquet])(rng)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        data = rng.choice(CHANGES)(data, rng)
    ending = name.rpartition(".")[2]
    if ending not in COMPRESS or rng.random() < 0.1:
        return data
    packed = COMPRESS[ending](data)
    return rng.choice([change_bytes, cut, insert])(packed, rng) if rng.random() < 0.3 else packed


def something_else(path: Path, rng: random.Random) -> None:
    """What is no file of data."""
    kind = rng.randrange(8)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(rng.choice(["nowhere", path.name, "/dev/zero", "/dev/tty", "/proc/self/mem", ".", ".."]))
    elif kind == 3 and len(path.name) < 90:
        here = Path.cwd()
        os.chdir(path.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif kind == 4:
        with path.open("wb") as file:
            file.write(rng.choice([b"", b"text ", b'{"text": "', b"PAR1"]))
            file.truncate(rng.choice([1 << 20, 5 << 30]))
    elif kind == 5:
        path.write_bytes(rng.randbytes(rng.choice([1, 100, 100_000])))
    elif kind == 6:
        path.write_text("text")
        path.chmod(0)
    else:
        path.touch()


def a_file(folder: Path, rng: random.Random) -> str:
    """Makes one below the folder, if it can have its name; returns the name."""
    name = rng.choice(NAMES[:9] if rng.random() < 0.7 else NAMES)
    path = folder / name
    if path.is_symlink() or path.exists() or any(each.is_symlink() for each in path.parents if each != folder.parent):
        return name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if rng.random() < 0.12:
            something_else(path, rng)
        else:
            path.write_bytes(a_content(rng, name))
    except (FileExistsError, NotADirectoryError):  # another file has the name of this one's folder
        pass
    return name


def make_case(rng: random.Random, folder: Path) -> Case:
    work = folder / "work"
    (work / "run.toml").write_text(TINY.format(folder="."))
    (work / "data").mkdir()
    names = [a_file(work / "data", rng) for _ in range(rng.choice([1, 1, 2, 3, 6]))]
    others = [*[f"data/{names[0]}"] * 3, "./data/../data/", "data/*.txt", "data,data", "nowhere"]
    path = rng.choice(["data"] * 24 + others)
    if rng.random() < 0.4:  # whatever the others are, there is something to read
        pq.write_table(pa.table({"text": ["good one", "good two", "good three"]}), work / "data/0.parquet")
    keys = {
        "data.source": "local",
        "data.path": path,
        "data.num_workers": "0",
        "data.retry_seconds": "0",
        "data.on_error": rng.choice(["stop", "skip_file"]),
        "data.text_key": rng.choice(["text"] * 12 + ["id", "body", "meta.text"]),
        "data.shuffle_documents": rng.choice(["1", "8"]),
        "data.max_document_mib": rng.choice(["1", "64"]),
    }
    if rng.random() < 0.06:
        keys |= {"data.source": "huggingface", "data.streams": rng.choice(["1", "6"])}
    else:
        separators = ["", "", "\n", "\n\n", "---", "aa", "aba", "<|endoftext|>", " "]
        keys["data.text_separator"] = rng.choice(separators)
    held_out = rng.random()
    if held_out < 0.1:
        keys["validation.path"] = f"data/{names[-1]}"
    elif held_out < 0.4:
        keys["validation.fraction"] = rng.choice(["0.1", "0.5"])
    else:
        keys |= {"validation.fraction": "0", "validation.interval": "0"}
    command = rng.choice([["train", "--dry-run"], ["train", "--dry-run"], ["check"]])
    return Case([*command, "run.toml", *(f"--{name}={value}" for name, value in keys.items())])


def test_data_however_wrong_are_handled(bench: Bench):
    fuzz(bench, "data", make_case)
