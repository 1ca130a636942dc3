"""Prepared shards: their bytes, their order, what is refused, and what is skipped."""

import base64
import errno
import json
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import build_validation_set
from swamla_titan.data.division import training_tokens
from swamla_titan.data.document import text_hash
from swamla_titan.data.faults import DataFault
from swamla_titan.data.order import Shuffle
from swamla_titan.data.retry import all_documents
from swamla_titan.data.shards import INDEX, MANIFEST, RECORD, WORK, new_digest, read_manifest, shard_name
from swamla_titan.data.sources import open_source
from swamla_titan.data.sources import shards as shards_source
from swamla_titan.data.streams import DocumentStream, PackedStream, TokenCache, indexed_cursor, initial_cursor
from swamla_titan.data.tokenizer import ByteTokenizer, with_eot
from swamla_titan.errors import UserError
from swamla_titan.tools import prepare as prepare_tool
from swamla_titan.tools.prepare import prepare
from tests.data.store import serving
from tests.data.test_loader import SEQ_LEN, all_cursors, all_excluded, global_batch, loaders, read

TOKENIZER = ByteTokenizer()


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Pieces and shards so small that a few documents make several of each."""
    monkeypatch.setattr(prepare_tool, "SMALLEST_PIECE", 400)
    monkeypatch.setattr(prepare_tool, "PIECES", 1 << 40)
    monkeypatch.setattr(prepare_tool, "SHARD_BYTES", 1200)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a killed process, unlike a machine, loses nothing


def text_data(maker, **keys):
    return Data(**({"source": "local", "path": str(maker.folder), "tokenizer": "byte"} | keys))


def prepared(maker, texts, files=3, deduplicate=False, **keys):
    """The folder of the shards of some texts, which are also in maker.folder."""
    maker.write(texts, files)
    out = maker.folder.parent / "shards"
    assert prepare(text_data(maker, **keys), str(out), deduplicate, processes=1) == 0
    return out


def shards(maker, out, validation=None, **keys):
    keys = {"source": "shards", "path": str(out), "streams": 3} | keys
    return maker.open(validation or Validation(fraction=0), **keys)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def epoch_of(corpus, stream, epoch=0):
    """The documents of a stream, and parts of documents, in an epoch."""
    stream = DocumentStream(corpus, stream)
    found = []
    while (entry := next(stream))[1]["epoch"] <= epoch:
        if entry[1]["epoch"] == epoch:
            found.append(entry[0])
    return found


# The files


def test_shards_hold_the_documents_in_their_order_and_say_so(maker):
    texts = [*maker.texts(60), "invalid \ud800", "é" * 9, " \n"]
    out = prepared(maker, texts, files=1)
    source = open_source(Data(source="shards", path=str(out)))
    documents = list(all_documents(source))
    written = [text.replace("\ud800", "\ufffd") for text in texts[:-1]]
    assert [document.prepared.tokens.tolist() for document in documents] == [
        with_eot(TOKENIZER, text).tolist() for text in written
    ]
    assert [document.hash for document in documents] == [text_hash(text) for text in written]
    assert [document.size for document in documents] == [len(text.encode()) for text in written]
    assert [document.replaced for document in documents] == [0] * 60 + [1, 0]
    manifest = read_manifest(str(out), "data.path")
    assert {name: len(content) for name, content in contents(out).items() if name != MANIFEST} == manifest.sizes()
    for name, digest in manifest.digests().items():
        expected = new_digest()
        expected.update((out / name).read_bytes())
        assert expected.hexdigest() == digest
    assert (manifest.documents, manifest.empty, manifest.replaced, manifest.duplicates) == (62, 1, 1, 0)
    assert manifest.tokens == sum(len(text.encode()) + 1 for text in written)
    assert manifest.bytes == manifest.tokens - 62
    assert len(manifest.shards) > 3
    assert all(shard.tokens * 2 <= 1200 for shard in manifest.shards)


def test_tokens_can_be_read_without_this_program(maker):
    texts = maker.texts(40)
    out = prepared(maker, texts, files=1)
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in sorted(out.glob("tokens-*"))])
    text = "".join("|" if token == 256 else chr(token) for token in tokens)
    assert text == "".join(f"{each}|" for each in texts if each)
    assert len(np.fromfile(out / INDEX, RECORD)) == sum(map(bool, texts))


def test_large_vocabularies_have_four_bytes_a_token(tmp_path, monkeypatch):
    class Large(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab_size, self.eot_id, self.fingerprint = 70_000, 69_999, "large"

    (tmp_path / "a.txt").write_text("abc")
    monkeypatch.setattr(prepare_tool, "load_tokenizer", lambda name: Large())
    assert prepare(Data(source="local", path=str(tmp_path / "a.txt")), str(tmp_path / "out"), processes=1) == 0
    assert np.fromfile(tmp_path / "out" / shard_name(0), "<u4").tolist() == [97, 98, 99, 69_999]


@pytest.mark.parametrize("sorted_at_a_time", [7, 1 << 24])
def test_of_equal_texts_the_first_stays(maker, monkeypatch, sorted_at_a_time):
    monkeypatch.setattr(prepare_tool, "_SORTED", sorted_at_a_time)
    texts = [text for number in range(50) for text in (f"once {number}", f"often {number % 7}")]
    out = prepared(maker, texts, files=1, deduplicate=True)
    found = [TOKENIZER.decode(each.prepared.tokens) for each in all_documents(shards(maker, out).source)]
    assert found == list(dict.fromkeys(texts))
    manifest = read_manifest(str(out), "")
    assert (manifest.duplicates, manifest.deduplicated) == (len(texts) - len(found), True)


# Interruptions


def killed(call, number):
    """Run `prepare` in a process that kills itself before (even) or after (odd) a rename; whether it came that far."""
    child = os.fork()
    if child == 0:
        renamed, rename = 0, Path.replace

        def replace(path, target):
            nonlocal renamed
            if renamed == number // 2 and number % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(path, target)
            if renamed == number // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            renamed += 1

        Path.replace = replace
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            call()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of a fork beside threads, which do nothing here
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_preparation_continues_to_the_same_bytes(maker, tmp_path, step):
    texts = [*maker.texts(50), *maker.texts(9)]
    expected = contents(prepared(maker, texts, files=7, deduplicate=True))
    assert len(expected) > 5
    at = 0
    while True:
        out = tmp_path / f"out-{at}"
        came_so_far = killed(lambda out=out: prepare(text_data(maker), str(out), True, 1), at)
        # A second kill, two renames further on than the first, in what is left.
        killed(lambda out=out: prepare(text_data(maker), str(out), True, 1), 4)
        assert prepare(text_data(maker), str(out), True, processes=1) == 0
        assert contents(out) == expected
        if not came_so_far:
            break
        at += step
    assert at > 40


def test_what_was_begun_otherwise_is_not_continued(maker, tmp_path, monkeypatch):
    out = prepared(maker, maker.texts(30))
    assert prepare(text_data(maker), str(out), processes=1) == 0  # the same again
    with pytest.raises(UserError, match=r"prepared shards of other data or settings: deduplicated.*Remove it"):
        prepare(text_data(maker), str(out), True, 1)
    with pytest.raises(UserError, match=r"prepared already"):
        prepare(Data(source="shards", path=str(out), tokenizer="byte"), str(tmp_path / "other"), processes=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and is not empty"):
        prepare(text_data(maker), str(tmp_path / "full"), processes=1)
    monkeypatch.setattr(prepare_tool, "_join", lambda *_: (_ for _ in ()).throw(prepare_tool._Stopped("SIGTERM")))
    unfinished = tmp_path / "unfinished"
    assert prepare(text_data(maker), str(unfinished), processes=1) == 75
    with pytest.raises(UserError, match=r"is not complete: its preparation is running, or was interrupted"):
        shards(maker, unfinished)
    maker.write(maker.texts(31), 3)
    (maker.folder / "part-0.jsonl").rename(maker.folder / "part-3.jsonl")
    settings = r"an unfinished preparation of other data or settings: source.fingerprint"
    with pytest.raises(
        UserError, match=rf"{settings}.*; files that changed: part-0.jsonl, part-1.jsonl, part-2.jsonl, .*Remove"
    ):
        prepare(text_data(maker), str(unfinished), processes=1)


def test_what_a_preparation_depends_on(maker, tmp_path):
    """Not on the streams of the configuration, although local files are cut for them; and not where it would change."""
    maker.write(maker.texts(60), 2)
    for streams in (1, 900):
        assert prepare(text_data(maker, streams=streams), str(tmp_path / "out"), processes=1) == 0  # the same again
    with pytest.raises(UserError, match=r"is in the folder that is read"):
        prepare(text_data(maker), str(maker.folder / "shards"), processes=1)
    rows = [json.loads(line)["text"] for path in sorted(maker.folder.iterdir()) for line in path.open()]
    hub = Data(source="huggingface", path=str(maker.folder), tokenizer="byte")
    assert prepare(hub, str(tmp_path / "hub"), processes=1) == 0
    found = all_documents(open_source(Data(source="shards", path=str(tmp_path / "hub"))))
    assert [TOKENIZER.decode(each.prepared.tokens) for each in found] == [row for row in rows if row]


def edited(file):
    """Write a file again, with other text of the same size."""
    before = file.stat()
    file.write_text(file.read_text().replace("xx", "yy"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # whatever the clock of the file system resolves
    assert file.stat().st_size == before.st_size


def after_pieces(monkeypatch, pieces, then):
    """A preparation runs `then` after so many pieces."""
    tokenize, done = prepare_tool._tokenize_piece, []

    def tokenize_piece(*args):
        if len(done) == pieces:
            then()
        done.append(tokenize(*args))
        return done[-1]

    monkeypatch.setattr(prepare_tool, "_tokenize_piece", tokenize_piece)


def stop():
    raise prepare_tool._Stopped("SIGTERM")


@pytest.fixture(params=["local", "huggingface", "store"])
def of_files(request, maker):
    """Data of three files, a piece each."""
    rows = [json.dumps({"text": f"{number} " + "x" * 90}) for number in range(30)]
    for name in "abc":
        (maker.folder / f"{name}.jsonl").write_text("\n".join(rows))
    if request.param == "store":
        with serving(maker.folder) as url:
            yield text_data(maker, path=url)
    else:
        yield text_data(maker, source=request.param)


def test_files_that_change_before_a_preparation_continues_are_named(of_files, maker, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        after_pieces(patch, 2, stop)
        assert prepare(of_files, str(out), processes=1) == 75
    if of_files.source == "local":
        edited(maker.folder / "c.jsonl")  # nothing of it is there yet
        with monkeypatch.context() as patch:
            after_pieces(patch, 0, stop)
            assert prepare(of_files, str(out), processes=1) == 75
    edited(maker.folder / "a.jsonl")
    with pytest.raises(UserError, match=r"1 file changed since .* began \(a.jsonl\): the shards would.* Remove"):
        prepare(of_files, str(out), processes=1)
    assert not (out / MANIFEST).exists()


def test_a_file_that_changes_while_it_is_prepared_is_named(of_files, maker, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        after_pieces(patch, 1, lambda: edited(maker.folder / "a.jsonl"))
        with pytest.raises(UserError, match=r"1 file changed since .* began \(a.jsonl\): the shards would.* Remove"):
            prepare(of_files, str(tmp_path / "out"), processes=1)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert prepare(of_files, str(tmp_path / "again"), processes=1) == 0


def test_a_full_disk_ends_a_preparation_that_continues(maker, tmp_path, monkeypatch):
    expected = contents(prepared(maker, maker.texts(60), 7))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        written = []

        def fsync(descriptor):
            written.append(descriptor)
            if len(written) > 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"No space left on device; what is prepared in .* is kept"):
            prepare(text_data(maker), str(out), processes=1)
    assert any((out / WORK).glob("0*.json"))
    assert prepare(text_data(maker), str(out), processes=1) == 0
    assert contents(out) == expected


def test_damage_ends_a_preparation_or_is_left_out(maker, tmp_path):
    rows = [json.dumps({"text": f"text {number} " + "x" * 600}) for number in range(200)]
    (maker.folder / "a.jsonl").write_text("\n".join([*rows[:70], "{damaged", *rows[70:]]))
    (maker.folder / "b.jsonl").write_text("\n".join(rows[:5]))
    (maker.folder / "c.parquet").write_bytes(b"PAR1 and no more")
    out = tmp_path / "out"
    with pytest.raises(DataFault, match=r"c.parquet: not a whole parquet file"):
        prepare(text_data(maker), str(out), processes=1)
    lost = tmp_path / "lost"
    assert prepare(text_data(maker, on_error="skip_file"), str(lost), processes=1) == 0
    assert ["c.parquet" in each for each in read_manifest(str(lost), "").skipped] == [True, False]
    (maker.folder / "c.parquet").unlink()
    with pytest.raises(DataFault, match=r"a.jsonl, line 71: not valid JSON"):
        prepare(text_data(maker), str(out), processes=1)
    assert prepare(text_data(maker, on_error="skip_file"), str(out), processes=1) == 0  # it continues
    manifest = read_manifest(str(out), "")
    assert manifest.documents == 70 + 5
    assert "line 71" in manifest.skipped[0]
    assert len(manifest.skipped) == 1


# The order


@pytest.fixture
def corpus(maker):
    return shards(maker, prepared(maker, maker.texts(90)), streams=6)


def test_every_epoch_has_every_document_once_in_another_order(maker):
    texts = [text for text in maker.texts(120) if text]
    out = prepared(maker, texts)
    corpus = shards(maker, out)
    orders = []
    for epoch in range(4):
        pieces = [epoch_of(corpus, stream, epoch) for stream in range(3)]
        sizes = [sum(len(piece.cut(piece.tokens)) for piece in stream) for stream in pieces]
        assert max(sizes) - min(sizes) <= 1
        parts = {}
        for piece in sorted((piece for stream in pieces for piece in stream), key=lambda each: (each.key, each.begin)):
            parts.setdefault(piece.key, []).extend(piece.cut(piece.tokens).tolist())
        assert sorted(TOKENIZER.decode(tokens) for tokens in parts.values()) == sorted(texts)
        orders.append([piece.key for stream in pieces for piece in stream])
    assert all(one != other for at, one in enumerate(orders) for other in orders[:at])
    # Of the whole corpus: the documents of a stream come from all shards.
    assert all(len({unit for _, unit, _ in order[:40]}) > len(corpus.source.units) // 2 for order in orders)
    assert [p.key for p in epoch_of(shards(maker, out, seed=8), 0)] != [p.key for p in epoch_of(corpus, 0)]


def test_without_shuffling_the_order_is_that_of_the_text(maker):
    texts = [text for text in maker.texts(40) if text]
    out = prepared(maker, texts, files=1)
    corpus = shards(maker, out, shuffle_documents=1, streams=1)
    for epoch in (0, 1):
        assert [TOKENIZER.decode(each.tokens) for each in epoch_of(corpus, 0, epoch)] == texts


def test_batches_depend_on_no_rank_and_resume_exactly_twice_and_across_epochs(maker, corpus):
    assert corpus.segments[0].tokens < 60 * 5 * 32 / 2  # 60 steps of 5 sequences are more than two epochs
    one = loaders(corpus, 5, 1)
    expected = [global_batch(one) for _ in range(60)]
    recorded = json.loads(json.dumps(corpus.record()))
    cursors, step, found = None, 0, []
    for world_size, steps in ((1, 7), (4, 20), (3, 33)):
        again = shards(maker, corpus.data.path, streams=6, recorded=recorded)
        assert again.fingerprint() == corpus.fingerprint()
        ranks = loaders(again, 5, world_size, cursors=cursors, steps=step)
        found += [global_batch(ranks) for _ in range(steps)]
        cursors, step = all_cursors(ranks), step + steps
    assert found == expected
    copy = loaders(pickle.loads(pickle.dumps(corpus)), 5, 1)  # as loader processes get it
    assert [global_batch(copy) for _ in range(9)] == expected[:9]


@pytest.mark.parametrize("keys", [{}, {"shuffle_documents": 1}, {"streams": 64}])
def test_the_cursor_after_any_number_of_sequences_is_found_without_reading(maker, keys):
    """Streams of 64 are shorter than a document."""
    corpus = shards(maker, prepared(maker, maker.texts(90)), Validation(fraction=0.1), **keys)
    tokens = training_tokens(corpus.source.index, corpus.held_out)
    for number in range(0, corpus.data.streams, 30):
        stream = PackedStream(corpus, number, TokenCache(TOKENIZER))
        assert indexed_cursor(corpus, number, 0, 0, tokens) == initial_cursor()
        for count in range(1, 60):
            assert stream.next(SEQ_LEN).cursor == indexed_cursor(corpus, number, count, count * SEQ_LEN, tokens)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 7, 10, 1023, 1024, 1025, 5000])
def test_a_shuffle_is_an_order_of_all_and_the_same_place_by_place(size):
    order = Shuffle(size, 3, 1)
    assert sorted(order) == list(range(size))
    assert order.at(np.arange(size)).tolist() == list(order)
    assert size < 5 or list(Shuffle(size, 3, 2)) != list(order)


def test_a_shuffle_is_the_same_in_every_version():
    """The order of the data of runs that continue."""
    assert list(Shuffle(12, 7)) == [1, 0, 10, 3, 11, 5, 6, 4, 8, 7, 9, 2]
    of_many = Shuffle(10**12, 1, 2, 3).at(np.array([0, 1, 10**12 - 1]))
    assert of_many.tolist() == [421597115375, 927143763790, 534338301191]


def test_all_orders_of_few_are_about_equally_frequent():
    counts = {}
    for seed in range(1200):
        order = tuple(Shuffle(4, seed))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert min(counts.values()) > 25
    assert max(counts.values()) < 80


# What is held out


def test_the_same_documents_are_held_out_as_of_text(maker):
    texts = maker.texts(80)
    validation = Validation(fraction=0.1)
    out = prepared(maker, texts, files=1)
    of_text = maker.open(validation, streams=3)
    of_shards = shards(maker, out, validation)
    assert of_shards.held_out == of_text.held_out
    assert of_shards.segments[0].tokens == of_text.segments[0].tokens
    one, other = (build_validation_set(each, validation, 32) for each in (of_text, of_shards))
    assert one.fingerprint == other.fingerprint
    held_out = {text for text in texts if text and text_hash(text) < of_text.held_out.threshold}
    read = {TOKENIZER.decode(each.tokens) for stream in range(3) for each in epoch_of(of_shards, stream)}
    assert len(held_out) == 8
    assert not read & held_out


def test_text_that_validation_path_names_is_left_out_of_shards(maker, tmp_path):
    texts = [f"<text {number}>" for number in range(40)]
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:5]))
    out = prepared(maker, texts)
    corpus = shards(maker, out, Validation(path=str(tmp_path / "held-out.jsonl")))
    assert corpus.segments[0].tokens == sum(len(text) + 1 for text in texts[5:])


# Damage


def refusal(maker, out, **keys):
    with pytest.raises(UserError) as caught:
        shards(maker, out, **keys)
    return str(caught.value)


def test_shards_that_are_not_as_they_were_prepared_are_refused(maker, tmp_path, monkeypatch):
    out = prepared(maker, [text + "!" for text in maker.texts(80)])
    other = tmp_path / "other.tiktoken"
    other.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    assert "was prepared with the tokenizer byte (257 tokens), and data.tokenizer is tiktoken-file" in refusal(
        maker, out, tokenizer=str(other)
    )
    whole = contents(out)
    name = shard_name(1)

    def broken(change):
        change()
        message = refusal(maker, out)
        for each, content in whole.items():
            (out / each).write_bytes(content)
        shards(maker, out)
        return message

    size = len(whole[name])
    assert broken((out / name).unlink) == f"{out / name}: cannot be read: No such file or directory"
    assert f"{name}: it has {size // 2:,} bytes, and was prepared with {size:,}" in broken(
        lambda: os.truncate(out / name, size // 2)
    )
    assert "(1 more of its files are damaged)" in broken(
        lambda: [os.truncate(out / each, 8) for each in (name, shard_name(2))]
    )
    changed = bytes([whole[name][0] ^ 1]) + whole[name][1:]
    assert f"{name}, document 0: it is not what was prepared" in broken(lambda: (out / name).write_bytes(changed))
    assert f"{INDEX}: it has 32 bytes" in broken(lambda: os.truncate(out / INDEX, 32))
    records = np.fromfile(out / INDEX, RECORD)
    records["end"][len(records) // 2] += 1
    with monkeypatch.context() as patch:  # also of a document that is not among those that are verified
        patch.setattr(shards_source, "_VERIFIED", 0)
        assert f"{INDEX}: it is not what was prepared" in broken(lambda: records.tofile(out / INDEX))
    assert "holds no prepared shards" in broken((out / MANIFEST).unlink)
    assert "is no manifest of shards" in broken(lambda: (out / MANIFEST).write_text("{"))
    later = json.loads(whole[MANIFEST]) | {"version": 2}
    assert "version 2, and this program reads 1" in broken(lambda: (out / MANIFEST).write_text(json.dumps(later)))
    unequal = json.loads(whole[MANIFEST]) | {"tokens": 5}
    assert "5 tokens, but" in broken(lambda: (out / MANIFEST).write_text(json.dumps(unequal)))
    assert "does not exist" in refusal(maker, tmp_path / "nowhere")
    assert "is empty" in refusal(maker, "")
    assert "are read from a disk" in refusal(maker, "s3://bucket/shards")


def test_damage_that_is_found_while_training_stops_or_skips_the_shard(maker, monkeypatch):
    monkeypatch.setattr(prepare_tool, "SHARD_BYTES", 4000)
    monkeypatch.setattr(shards_source, "_VERIFIED", 2)
    out = prepared(maker, maker.texts(120), files=1)
    keys = {"streams": 6, "retry_seconds": 0}
    intact = shards(maker, out, on_error="skip_file", **keys)
    recorded = json.loads(json.dumps(intact.record()))
    ranks = loaders(intact, 5, 1)
    expected = [global_batch(ranks) for _ in range(40)]
    content = bytearray((out / shard_name(0)).read_bytes())
    records = np.fromfile(out / INDEX, RECORD)
    content[2 * int(records["end"][3])] ^= 1  # the fifth document's first token
    (out / shard_name(0)).write_bytes(content)

    ranks = loaders(shards(maker, out, **keys), 5, 1)
    with pytest.raises(DataFault, match=r"tokens-00000.bin, document 4: it is not what was prepared") as caught:
        read(ranks[0], 40)
    assert "skip_file" in str(caught.value)

    skipping = shards(maker, out, on_error="skip_file", recorded=recorded, **keys)
    assert not skipping.faults  # of documents that are not verified when shards are opened
    assert skipping.fingerprint() == intact.fingerprint()
    ranks = loaders(skipping, 5, 1)
    found = [global_batch(ranks) for _ in range(40)]
    first = next(step for step, (one, other) in enumerate(zip(found, expected)) if one != other)
    assert 0 < first < 30
    excluded = all_excluded(ranks)
    assert {each.file for each in excluded} == {shard_name(0)}
    # The same by other ranks, and resumed with exclusions that are known from the start.
    ranks = loaders(skipping, 5, 4)
    assert [global_batch(ranks) for _ in range(17)] == found[:17]
    again = shards(maker, out, on_error="skip_file", recorded=recorded, **keys)
    ranks = loaders(again, 5, 3, 0, all_cursors(ranks), 17, excluded)
    assert [global_batch(ranks) for _ in range(23)] == found[17:]


def test_a_shard_that_is_gone_or_cut_while_training_is_a_fault_and_no_crash(maker):
    out = prepared(maker, maker.texts(120), files=1)
    for change in (os.unlink, lambda path: os.truncate(path, 10)):
        before = (out / shard_name(1)).read_bytes()
        corpus = shards(maker, out, retry_seconds=0)
        ranks = loaders(corpus, 5, 1)
        global_batch(ranks)
        change(out / shard_name(1))
        shards_source._opened.cache_clear()  # as in another process
        with pytest.raises(DataFault, match=shard_name(1)):
            read(ranks[0], 60)
        (out / shard_name(1)).write_bytes(before)
