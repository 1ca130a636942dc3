"""Data of other people: what is left out of a folder, what is refused and in which words, and what is read."""

import gzip
import json
import os
import random
import socket
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data.corpus import all_documents, open_corpus
from swamla_titan.data.division import estimated_sizes
from swamla_titan.data.document import MIB
from swamla_titan.data.retry import Retry
from swamla_titan.data.sources import open_source
from swamla_titan.data.sources import text as text_source
from swamla_titan.data.sources.content import other_than_text
from swamla_titan.data.sources.local import open_local
from swamla_titan.data.sources.text import FileRange
from swamla_titan.data.tokenizer import ByteTokenizer
from swamla_titan.errors import UserError

GOOD = pa.table({"text": ["good one", "good two"]})
FRENCH = "Où est passé l'été ? Il a été gâché par la pluie, hélas.\n"


def opened(path, **keys):
    settings = {"source": "local", "path": str(path), "tokenizer": "byte", "streams": 4, "retry_seconds": 0.0}
    return open_corpus(Data(**(settings | keys)), Validation(fraction=0), 0)


def texts(path, **keys):
    corpus = opened(path, **keys)
    faults = [] if corpus.skips_files else None
    return [document.text for document in all_documents(corpus.source, faults=faults) if not document.is_empty]


def refused(path, **keys):
    with pytest.raises(UserError) as error:
        texts(path, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def is_skipped_among_good_files(folder, name, write):
    """`write` makes the file `name`; beside others it is refused, with a way out, and skipped where that is asked for.

    Returns the message.
    """
    folder.mkdir(exist_ok=True)
    write(folder / name)
    for good in ("0.parquet", "z.parquet"):
        pq.write_table(GOOD, folder / good)
    message = refused(folder)
    assert name in message
    assert 'data.on_error = "skip_file"' in message
    assert texts(folder, on_error="skip_file") == ["good one", "good two"] * 2
    assert [os.path.basename(fault.file) for fault in opened(folder, on_error="skip_file").source.unreadable] == [name]
    return message


# parquet

TWO_OF_A_NAME = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])


@pytest.mark.parametrize(
    "table, part",
    [
        (TWO_OF_A_NAME, '2 columns are named "text"'),
        (pa.table({"body": ["x"]}), 'no column "text" among body'),
        (pa.table({"Text": ["x"], "TEXT": ["y"]}), 'no column "text" among Text, TEXT'),
        (pa.table({"meta": [{"text": "x"}]}), 'no column "text" among meta'),
        (pa.table({"text": [1]}), "does not hold strings but int64"),
        (pa.table({"text": [["x"]]}), "does not hold strings but list"),
        (pa.table({"text": [{"text": "x"}]}), "does not hold strings but struct"),
        (pa.table({"text": pa.array([b"abcd"], pa.binary(4))}), "does not hold strings but fixed_size_binary[4]"),
        (pa.table({"text": [None, gzip.compress(b"x")]}), "it holds gzip data"),
        (pa.table({"text": ["wide words".encode("utf-16-le")] * 9}), "NUL or other control bytes"),
        (pa.table({"text": [FRENCH.encode("latin-1")] * 9}), "cannot be decoded"),
    ],
)
def test_a_parquet_file_without_a_column_of_text(tmp_path, table, part):
    """Alone it is a question of the key, beside others of the file."""
    message = is_skipped_among_good_files(tmp_path / "many", "b.parquet", lambda path: pq.write_table(table, path))
    assert part in message
    assert "data.text_key" not in message
    pq.write_table(table, tmp_path / "alone.parquet")
    for on_error in ("stop", "skip_file"):
        message = refused(tmp_path / "alone.parquet", on_error=on_error)
        assert part in message
        if "text" not in table.column_names or "does not hold strings" in part:
            assert "data.text_key" in message or "remove it" in message


def test_where_no_parquet_file_has_the_column_the_key_is_wrong(tmp_path):
    for number in range(3):
        pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / f"{number}.parquet")
    for on_error in ("stop", "skip_file"):
        assert "Set data.text_key to one of the columns there that hold text: body" in refused(
            tmp_path, on_error=on_error
        )
    assert texts(tmp_path, text_key="body") == ["x"] * 3


def test_a_column_of_nulls_is_so_many_empty_documents(tmp_path):
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    assert "there is no text in it" in refused(tmp_path)
    pq.write_table(GOOD, tmp_path / "b.parquet")
    assert texts(tmp_path) == ["good one", "good two"]
    assert len(list(all_documents(opened(tmp_path).source))) == 5


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view", "dictionary"]
)
def test_all_kinds_of_text_are_read(tmp_path, kind):
    if kind == "dictionary":
        column = pa.array(["x", "y", "x"]).dictionary_encode()
    else:
        column = pa.array(["x", "y", "x"]).cast(pa.large_string()).cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path) == ["x", "y", "x"]


def test_columns_of_similar_names_are_told_apart(tmp_path):
    pq.write_table(pa.table({"meta": [{"text": "no"}], "text": ["yes"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text.en": ["no" * 999], "text": ["yes"]}), tmp_path / "b.parquet")
    assert texts(tmp_path) == ["yes", "yes"]
    assert opened(tmp_path).source.unit_sizes[1] < 999
    assert texts(tmp_path / "b.parquet", text_key="text.en") == ["no" * 999]


def test_row_groups_without_rows(tmp_path):
    with pq.ParquetWriter(tmp_path / "a.parquet", GOOD.schema) as writer:
        for table in (GOOD.slice(0, 0), GOOD, GOOD.slice(0, 0), GOOD):
            writer.write_table(table)
    with pq.ParquetWriter(tmp_path / "b.parquet", GOOD.schema):
        pass
    assert opened(tmp_path).source.num_units == 2
    assert texts(tmp_path) == ["good one", "good two"] * 2


def _cut(path):
    pq.write_table(GOOD, path)
    os.truncate(path, path.stat().st_size // 2)


def _encrypted(plaintext_footer):
    """By a key that nobody has: the library's own way of writing asks for one in the form of a client."""
    encryption = pytest.importorskip("pyarrow.parquet.encryption")
    base64 = pytest.importorskip("base64")

    class Keys(encryption.KmsClient):
        def __init__(self, _):
            super().__init__()

        def wrap_key(self, key, _):
            return base64.b64encode(key)

        def unwrap_key(self, key, _):
            return base64.b64decode(key)

    factory = encryption.CryptoFactory(Keys)
    settings = encryption.EncryptionConfiguration(
        footer_key="one", column_keys={"two": ["text"]}, plaintext_footer=plaintext_footer
    )
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)

    def write(path):
        with pq.ParquetWriter(path, GOOD.schema, encryption_properties=properties) as writer:
            writer.write_table(GOOD)

    return write


@pytest.mark.parametrize(
    "write, part",
    [
        (lambda path: path.write_bytes(b""), "not a whole parquet file: it is empty"),
        (lambda path: path.write_text('{"text": "x"}\n'), "not a whole parquet file: it is text that begins with"),
        (lambda path: path.write_bytes(gzip.compress(b"x")), "not a whole parquet file: it is gzip data"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda path: path.write_bytes(b"PAR1" + bytes(99)), "not a whole parquet file"),
        (_cut, "not a whole parquet file"),
        (lambda path: _encrypted(True)(path), "it is encrypted"),
        (lambda path: _encrypted(False)(path), "it is encrypted"),
    ],
)
def test_what_is_no_parquet_file(tmp_path, write, part):
    assert part in is_skipped_among_good_files(tmp_path / "folder", "b.parquet", write)


# other contents than the name says


def _zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "x" * 99)


WRONG = {
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"some text\n" * 99)), "gzip data"),
    "zstd": (lambda path: path.write_bytes(pa.compress(b"some text\n" * 99, "zstd", asbytes=True)), "Zstandard data"),
    "zip": (_zip, "a zip archive"),
    "pdf": (lambda path: path.write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj"), "a PDF document"),
    "parquet": (lambda path: pq.write_table(GOOD, path), "a parquet file"),
    "utf-16": (lambda path: path.write_bytes(("Words.\n" * 99).encode("utf-16")), "text in UTF-16"),
    "utf-16-be": (lambda path: path.write_bytes(("Words.\n" * 99).encode("utf-16-be")), "control bytes"),
    "utf-16-le": (lambda path: path.write_bytes("Слова и слова.\n".encode("utf-16-le") * 9), "control bytes"),
    "utf-16-le of China": (lambda path: path.write_bytes("漢字仮名交じり文".encode("utf-16-le") * 9), "decoded"),
    "utf-32": (lambda path: path.write_bytes(("Words.\n" * 99).encode("utf-32")), "text in UTF-32"),
    "utf-32-le": (lambda path: path.write_bytes(("Words.\n" * 99).encode("utf-32-le")), "control bytes"),
    "latin-1": (lambda path: path.write_bytes((FRENCH * 99).encode("latin-1")), "cannot be decoded"),
    "windows-1252": (lambda path: path.write_bytes("“Yes”, she said.\n".encode("cp1252") * 99), "cannot be decoded"),
    "gb18030": (lambda path: path.write_bytes("这是一个例子。".encode("gb18030") * 9), "cannot be decoded"),
    "noise": (lambda path: path.write_bytes(random.Random(1).randbytes(5000)), "first bytes"),
    "nothing": (lambda path: path.write_bytes(bytes(5000)), "nothing but NUL bytes"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), "git lfs pull"),
}


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
@pytest.mark.parametrize("kind", WRONG)
def test_bytes_that_are_no_text(tmp_path, kind, ending):
    write, part = WRONG[kind]
    assert part in is_skipped_among_good_files(tmp_path / "folder", f"b.{ending}", write)


@pytest.mark.parametrize(
    "data",
    [
        "naïve “text” — ünïcödé 漢字 🙂\n".encode() * 99,
        b"caf\xe9, and that is all of it",
        b"a long text with three slips: \xe9 \xe8 \xff" + b" and much else" * 99,
        b"\x1b[1mbold\x1b[0m words of a terminal\r\n\f\b" * 9,
        b"an odd \x00 in it" * 3,
        b"a file system's tail" + bytes(4096),
        b"ORC and PKZIP and BZh are words as well",
        b"\xef\xbf\xbd" * 50,  # replaced by somebody else
        b"",
    ],
)
def test_bytes_that_are_text_or_nearly_so(data):
    assert other_than_text(data) is None


def test_a_character_that_the_sample_cuts_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("swamla_titan.data.sources.files.HEAD_BYTES", 4)
    (tmp_path / "a.txt").write_text("a漢字漢字")
    assert texts(tmp_path) == ["a漢字漢字"]


# what is in a folder

ABOUT = [
    "README.md", "readme.txt", "README_zh-CN.md", "LICENSE.txt", "LICENCE.md", "COPYING.txt", "CHANGELOG.md",
    "CONTRIBUTING.md", "CITATION.md", "dataset_card.md", "requirements.txt", "sha256sums.txt", "dataset_info.json",
    "dataset_infos.json", "dataset_dict.json", "state.json", "v1.metadata.json", "metadata.json", "package.json",
    "datapackage.json", "data/README.md", "_delta_log/0001.json", "x.egg-info/top_level.txt", "_temporary/0/part.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("shard", ["data/train.jsonl", "train.parquet", "train.json"])
def test_files_about_the_data_are_left_out_beside_them(tmp_path, shard):
    for name in [*ABOUT, ".gitattributes", "_SUCCESS", "data/notes.txt", "LICENSE.txt.gz", shard]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{\n about")
    (tmp_path / "data/notes.txt").write_text("is data")
    if shard.endswith(".parquet"):
        pq.write_table(GOOD, tmp_path / shard)
    else:
        (tmp_path / shard).write_text('{"text": "good one"}\n{"text": "good two"}\n')
    assert sorted(texts(tmp_path)) == ["good one", "good two", "is data"]
    described = opened(tmp_path).source.description
    assert f"{len(ABOUT) + 1} files about the data (CHANGELOG.md, " in described
    assert "1 file of unknown kind (_SUCCESS)" in described


def test_a_folder_of_text_is_read_whole(tmp_path):
    for name in ("README.md", "LICENSE.txt", "a.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert texts(tmp_path) == ["text of LICENSE.txt", "text of README.md", "text of a.txt"]
    assert texts(tmp_path / "README.md") == ["text of README.md"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "data.csv").write_text("text\nx\n")  # which the README is about
    message = refused(tmp_path)
    for part in ("files about the data (LICENSE.txt, README.md", 'data.source = "huggingface" reads .csv'):
        assert part in message


def test_pipes_sockets_and_devices_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    os.mkfifo("pipe.txt")
    os.symlink("pipe.txt", "link.jsonl")
    os.symlink("/dev/zero", "zero.parquet")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.md")
        assert "there is no regular file (link.jsonl: a pipe, pipe.txt: a pipe, socket.md: a socket" in refused(".")
        (tmp_path / "good.txt").write_text("good")
        assert texts(".") == ["good"]
        assert "4 files not regular (link.jsonl: a pipe, " in opened(".").source.description
        for path, what in [("pipe.txt", "a pipe"), ("socket.md", "a socket"), ("zero.parquet", "a device")]:
            assert f"data.path: {path} is not a regular file but {what}" in refused(path)
    with pytest.raises(UserError, match=r"validation\.path: pipe\.txt is not a regular file"):
        open_corpus(Data(source="local", path=".", tokenizer="byte"), Validation(path="pipe.txt"), 0)
    with pytest.raises(UserError, match=r"link\.jsonl is not a regular file but a pipe"):
        open_source(Data(source="huggingface", path="."))


def test_empty_files_are_not_opened(tmp_path):
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")  # says it is empty, and reading it is an error of its disk
    (tmp_path / "b.txt").touch()
    (tmp_path / "c.txt").write_text("good")
    assert texts(tmp_path) == ["good"]
    assert opened(tmp_path).source.num_units == 1


def test_links_that_lead_nowhere_or_in_a_circle(tmp_path):
    for name, target in [("gone.txt", "nowhere"), ("circle.txt", "circle.txt")]:
        folder = tmp_path / name
        is_skipped_among_good_files(folder, name, lambda path, target=target: path.symlink_to(target))
    assert "It is a link to nowhere." in refused(tmp_path / "gone.txt/gone.txt")
    assert "circle.txt cannot be read: " in refused(tmp_path / "circle.txt/circle.txt")


def test_names_of_all_kinds(tmp_path):
    names = [b"a b.TXT", b"A B.txt", b"line\nend.txt", b"no utf-8 \xff.txt", "ümläut.txt".encode()]
    for name in names:
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(b"text")
    corpus = opened(tmp_path)
    assert texts(tmp_path) == ["text"] * len(names)
    json.dumps(corpus.record())
    assert opened(tmp_path).fingerprint() == corpus.fingerprint()
    with open(os.fsencode(tmp_path) + b"/line\nend.txt", "wb") as file:
        file.write(gzip.compress(b"x"))
    assert r"line\nend.txt: it is gzip data" in refused(tmp_path)


def test_a_file_that_goes_while_the_folder_is_read(tmp_path, monkeypatch):
    from swamla_titan.data.sources import local

    def list_and_remove(path, setting):
        listing = find_files(path, setting)
        (tmp_path / "folder/b.txt").unlink()
        return listing

    find_files = local.find_files
    monkeypatch.setattr(local, "find_files", list_and_remove)

    def write(path):
        path.write_text("soon gone")

    (tmp_path / "folder").mkdir()
    for on_error in ("stop", "skip_file"):
        write(tmp_path / "folder/b.txt")
        pq.write_table(GOOD, tmp_path / "folder/a.parquet")
        if on_error == "stop":
            assert "b.txt: cannot be read: No such file" in refused(tmp_path / "folder")
        else:
            assert [fault.reason for fault in opened(tmp_path / "folder", on_error=on_error).source.unreadable] == [
                "cannot be read: No such file or directory"
            ]


def test_each_lost_file_has_its_own_reason(tmp_path):
    (tmp_path / "a.txt").symlink_to("nowhere")
    (tmp_path / "b.txt").symlink_to("b.txt")
    (tmp_path / "c.txt").write_text("good")
    reasons = {
        entry["name"]: entry.get("lost") for entry in opened(tmp_path, on_error="skip_file").source.record["files"]
    }
    assert "No such file" in reasons["a.txt"]
    assert "symbolic links" in reasons["b.txt"]
    assert reasons["c.txt"] is None


@pytest.mark.parametrize(
    "path, part",
    [
        ("*.jsonl", "Patterns are not expanded: give the folder"),
        ("a.txt,b.txt", "Give one file or folder"),
        ("a.txt b.txt", "does not exist."),
        ("https://example.org/a.txt", 'data.source = "huggingface"'),
        ("owner/dataset", 'If it is a dataset of the Hub, set data.source = "huggingface"'),
        ("a.txt/", "does not exist"),
        ("a.txt/b", "does not exist"),
        ("x" * 300, "File name too long"),
        ("\0", "cannot be read: "),
        ("a.png", "is of an unknown kind"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, monkeypatch, path, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.png").write_text("x")
    assert part in refused(path)


def test_home_and_trailing_slash(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("x")
    source = opened("~/corpus").source
    again = open_local(Data(), "~/corpus", "data.path", entries=source.record["files"])
    assert [document.text for document in again.read(0)] == ["x"]
    assert texts("~/corpus") == texts(f"{tmp_path}/corpus/") == texts("~/corpus/a.txt") == ["x"]
    assert opened("~/corpus").fingerprint() == opened(tmp_path / "corpus").fingerprint()


# borders between documents


def by_borders(data, separator):
    """The documents between the stretches that separators, which may overlap, cover: the rule for a whole file."""
    stretches = []
    for at in range(len(data)):
        if data.startswith(separator, at):
            if stretches and at < stretches[-1][1]:
                stretches[-1][1] = at + len(separator)
            else:
                stretches.append([at, at + len(separator)])
    starts = [0, *(end for _, end in stretches)]
    ends = [*(start for start, _ in stretches), len(data)]
    documents = [data[start:end].decode() for start, end in zip(starts, ends)]
    return [document for document in documents if document and not document.isspace()]


def test_any_ranges_cut_any_text_by_any_separator_alike(tmp_path, monkeypatch):
    path = str(tmp_path / "a.txt")
    chance = random.Random(5)
    overlapped = 0
    for _ in range(600):
        letters = chance.choice(["ab", "a", "abc", "a\n", "\n"])
        separator, data = ("".join(chance.choices(letters, k=chance.randint(1, most))).encode() for most in (6, 60))
        monkeypatch.setattr(text_source, "CHUNK", chance.choice([1, 2, 3, 7, 1 << 18]))
        monkeypatch.setattr(text_source, "BEYOND", chance.choice([1, 2, 5, 1 << 14]))
        with open(path, "wb") as file:
            file.write(data)
        step = chance.randint(1, len(data) + 1)
        ranges = [
            FileRange(path, len(data), start, min(len(data), start + step), separator, MIB)
            for start in range(0, len(data), step)
        ]
        expected = by_borders(data, separator)
        overlapped += expected != [part for part in data.decode().split(separator.decode()) if part.strip()]
        found = [list(part.read(None, 1, 0)) for part in ranges]
        assert [document.text for documents in found for document in documents] == expected, (data, separator, step)
        for part, documents in zip(ranges, found):
            for number, document in enumerate(documents):
                assert list(part.read(document.position, 1, 0)) == documents[number + 1 :]
    assert overlapped > 50


def test_separators_that_overlap_are_one_border(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\n\n\n\nthree\nfour")
    assert texts(tmp_path, text_separator="\n\n") == ["one", "two", "three\nfour"]
    (tmp_path / "a.txt").write_text("oneabababtwo")
    assert texts(tmp_path, text_separator="abab") == ["one", "two"]
    (tmp_path / "a.txt").write_text("\n" * 999)
    assert "there is no text in it" in refused(tmp_path, text_separator="\n\n")


def test_a_file_that_is_damaged_everywhere_is_sampled_once(tmp_path, monkeypatch):
    """Each of its ranges would be searched for a document's start, up to the size of the largest document."""
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b"[" * 99)
        file.truncate(64 << 20)  # sparse
    (tmp_path / "b.txt").write_text("good")
    source = open_source(Data(source="local", path=str(tmp_path), streams=4, max_document_mib=1))
    assert source.num_units > 16
    read, units = source.read, []
    monkeypatch.setattr(source, "read", lambda unit, *place: units.append(unit) or read(unit, *place))
    sizes = estimated_sizes(source, ByteTokenizer(), Retry(0))
    assert units == [0, source.num_units - 1]
    assert len(sizes) == source.num_units


# JSON lines


def test_json_lines_of_all_kinds(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"text": "mark"}\r',
        b"",
        b" \t\r",
        b'\xef\xbb\xbf{"text": "joined files have marks inside"}',
        b'{"text": "first", "text": "last of two"}',
        b'{"n": NaN, "m": -Infinity, "text": "numbers"}',
        b'{"n": ' + b"9" * 5000 + b', "text": "long number"}',
        b'{"text": null}',
        b'{"text": "half \\ud83d pair"}',
        b'{"deep": ' + b"[" * 300 + b"]" * 300 + b', "text": "deep"}',
        '{"text": "line\u2028separator"}'.encode(),
    ]
    (tmp_path / "a.JSONL").write_bytes(b"\n".join(lines))
    assert texts(tmp_path) == [
        "mark", "joined files have marks inside", "last of two", "numbers", "long number", "half \ufffd pair", "deep",
        "line\u2028separator",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content, parts",
    [
        ('[{"text": "a"}, {"text": "b"}]', ["expected a JSON object, found a list", "jq -c '.[]'"]),
        ('[\n {"text": "a"}\n]\n', ["line 1: not valid JSON", "jq -c '.[]'"]),
        ('{\n "text": "a"\n}\n', ["line 1: not valid JSON", "jq -c . FILE"]),
        ('{"text": ' + "[" * 100_000 + "}", ["nested too deeply"]),
        ('{"text": ' + "[" * 500 + "]" * 500 + "}", ["not a string but a list"]),
        ('{"text": {"a": "x"}}', ["not a string but an object"]),
        ('{"text": ' + "9" * 5000 + "}", ["not a string but Infinity"]),
        ('{"text": NaN}', ["not a string but NaN"]),
        ("7", ["expected a JSON object, found 7"]),
        ("{" + ", ".join(f'"key {i}": 1' for i in range(5000)) + "}", ['"key 19", ...']),
        ('{"a\\nb": 1}', [r'fields there: "a\nb"']),
        ('{"text": "a"}{"text": "b"}', ["not valid JSON (Extra data)"]),
    ],
)
def test_what_is_no_json_line(tmp_path, content, parts):
    (tmp_path / "a.json").write_text(content)
    message = refused(tmp_path)
    assert len(message) < 1000
    for part in parts:
        assert part in message


# Hugging Face


def _write_gz(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


HUB = {"source": "huggingface"}


def test_other_columns_may_differ_from_file_to_file(tmp_path):
    for folder, write in (
        ("lines", _write_gz),
        ("tables", lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path)),
    ):
        (tmp_path / folder).mkdir()
        ending = "jsonl.gz" if folder == "lines" else "parquet"
        rows = [
            [{"id": 1, "text": None}],
            [{"id": 2, "text": "a"}, {"id": 3, "text": "b"}],
            [{"id": "x", "text": "c", "more": {"k": [1]}}],
            [{"id": {"k": 1}, "text": "d"}],
        ]
        for number, part in enumerate(rows):
            write(tmp_path / folder / f"{number}.{ending}", part)
        corpus = opened(tmp_path / folder, **HUB)
        documents = list(all_documents(corpus.source))
        assert [document.text for document in documents] == ["", "a", "b", "c", "d"]
        rest = corpus.source.read(1, documents[1].position)
        assert [document.text for document in rest] == ["b"]


def test_a_shard_of_hugging_face_without_the_column(tmp_path):
    _write_gz(tmp_path / "0.jsonl.gz", [{"text": "a"}])
    _write_gz(tmp_path / "1.jsonl.gz", [{"body": "x"}])
    _write_gz(tmp_path / "2.jsonl.gz", [{"text": 5}])
    assert 'shard 1, row 0: no column "text" among body' in refused(tmp_path, **HUB)
    _write_gz(tmp_path / "1.jsonl.gz", [{"text": "b"}])
    assert 'shard 2, row 0: the column "text" is not a string but 5' in refused(tmp_path, **HUB)
    assert texts(tmp_path, **HUB, on_error="skip_file") == ["a", "b"]


@pytest.mark.parametrize("lacking", [0, 1])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_shard_of_hugging_face_without_the_column_first_or_not(tmp_path, kind, lacking):
    """The columns of the first one are taken for those of all."""
    tables = [pa.table({"body": ["x"]}) if number == lacking else GOOD for number in range(3)]
    for number, table in enumerate(tables):
        if kind == "parquet":
            pq.write_table(table, tmp_path / f"{number}.parquet")
        else:
            _write_gz(tmp_path / f"{number}.jsonl.gz", table.to_pylist())
    assert 'no column "text"' in refused(tmp_path, **HUB)
    assert texts(tmp_path, **HUB, on_error="skip_file") == ["good one", "good two"] * 2
    for path in tmp_path.iterdir():
        path.unlink()
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "0.parquet")
    for on_error in ("stop", "skip_file"):
        assert "set data.text_key to" in refused(tmp_path, **HUB, on_error=on_error).replace("Set", "set")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("damaged", [0, 1])
def test_a_damaged_shard_of_hugging_face_first_or_not(tmp_path, kind, damaged):
    """The first one is opened to see what there is, and with few shards all of them are."""
    for number in range(3):
        if kind == "parquet":
            path = tmp_path / f"{number}.parquet"
            pq.write_table(GOOD, path)
        else:
            path = tmp_path / f"{number}.jsonl.gz"
            _write_gz(path, GOOD.to_pylist())
        if number == damaged:
            path.write_bytes(b"no " + path.read_bytes()[:40])
    refused(tmp_path, **HUB)
    assert texts(tmp_path, **HUB, on_error="skip_file") == ["good one", "good two"] * 2


def test_what_hugging_face_leaves_out_and_what_there_is_to_choose(tmp_path):
    (tmp_path / "mixed").mkdir()
    for name in ("x.jsonl", "y.jsonl"):
        (tmp_path / "mixed" / name).write_text(f'{{"text": "{name[0]}"}}\n')
    (tmp_path / "mixed/c.csv").write_text("text\ny\n")
    assert "left out: 1 of the folder's files (c.csv)" in opened(tmp_path / "mixed", **HUB).source.description
    (tmp_path / "mixed/README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: x.jsonl\n- config_name: two\n  data_files: y.jsonl\n---\n"
    )
    assert "['one', 'two']" in refused(tmp_path / "mixed", **HUB)
    assert "['one', 'two']" in refused(tmp_path / "mixed", **HUB, name="three")
    assert "['train']" in refused(tmp_path / "mixed", **HUB, name="one", split="test")
    assert texts(tmp_path / "mixed", **HUB, name="two") == ["y"]
    assert "is a file: give the folder" in refused(tmp_path / "mixed/x.jsonl", **HUB)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.jsonl").write_text("")
    assert "its files hold no data" in refused(tmp_path / "empty", **HUB)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("hello there, all of you".encode("utf-16-le"), "not text in UTF-8"),
        (gzip.compress(b"hello " * 500), "it is gzip data"),
    ],
    ids=["utf-16", "gzip"],  # which holds the time of day
)
def test_what_is_no_text_in_a_folder_of_hugging_face_is_named(tmp_path, content, found):
    (tmp_path / "a.txt").write_text("hello " * 100)
    (tmp_path / "b.txt").write_bytes(content)
    data = Data(source="huggingface", path=str(tmp_path), tokenizer="byte", streams=2)
    with pytest.raises(UserError, match=f"b.txt: it is {found.removeprefix('it is ')}"):
        open_corpus(data, Validation(fraction=0), 0)
