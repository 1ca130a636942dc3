"""The order of documents: who owns which, what an epoch is, and going on from a cursor."""

import json

import pytest

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data.changes import fingerprint_changes
from swamla_titan.data.corpus import open_corpus
from swamla_titan.data.document import text_hash
from swamla_titan.data.held_out import HeldOut
from swamla_titan.data.order import permutation
from swamla_titan.data.retry import all_documents
from swamla_titan.data.streams import BLOCK_CHARS, DocumentStream
from swamla_titan.data.tokenizer import with_eot
from swamla_titan.errors import UserError


def pieces(corpus, stream, epoch=0):
    """A stream's documents, and parts of documents, in one epoch."""
    documents = DocumentStream(corpus, stream)
    found = []
    while True:
        document, cursor = next(documents)
        if cursor["epoch"] > epoch:
            return found
        if cursor["epoch"] == epoch:
            found.append(document)


def one_epoch(corpus, stream, epoch=0):
    """A stream's texts in one epoch."""
    return [document.text for document in pieces(corpus, stream, epoch)]


def joined(documents, tokenizer):
    """The texts of documents whose parts are among `documents`, in any order."""
    parts = {}
    for document in sorted(documents, key=lambda document: (document.key, document.begin)):
        tokens = document.cut(with_eot(tokenizer, document.text))
        parts.setdefault(document.key, []).extend(tokens.tolist())
    assert all(tokens[-1] == tokenizer.eot_id for tokens in parts.values())
    return [tokenizer.decode(tokens) for tokens in parts.values()]


@pytest.mark.parametrize("files, shuffle", [(1, 1), (1, 10), (3, 10), (4, 1), (11, 10)])
def test_an_epoch_has_every_training_document_once(maker, files, shuffle):
    texts = maker.texts(100)
    maker.write(texts, files)
    corpus = maker.open(Validation(fraction=0.1), shuffle_documents=shuffle)
    for epoch in (0, 1):
        found = joined([each for stream in range(4) for each in pieces(corpus, stream, epoch)], corpus.tokenizer)
        held_out = [document.text for document in all_documents(corpus.source) if document in corpus.held_out]
        assert len(held_out) == 10
        assert sorted(found + held_out) == sorted(texts)


def test_files_keep_their_order_without_shuffling(maker):
    texts = maker.texts(40)
    maker.write(texts, files=2)
    corpus = maker.open(shuffle_documents=1, streams=1)
    for epoch in (0, 1):
        assert one_epoch(corpus, 0, epoch) == texts[0::2] + texts[1::2]


def test_order_differs_by_epoch_seed_and_stream_only(maker):
    maker.write(maker.texts(60))
    corpus = maker.open(streams=1, shuffle_documents=30)
    first, second = one_epoch(corpus, 0, 0), one_epoch(corpus, 0, 1)
    assert first != second
    assert sorted(first) == sorted(second)
    assert one_epoch(maker.open(streams=1, shuffle_documents=30), 0) == first
    assert one_epoch(maker.open(streams=1, shuffle_documents=30, seed=8), 0) != first


def test_shuffle_stays_within_blocks(maker):
    texts = maker.texts(20)
    maker.write(texts)
    found = one_epoch(maker.open(streams=1, shuffle_documents=5), 0)
    for start in range(0, 20, 5):
        assert sorted(found[start : start + 5]) == sorted(texts[start : start + 5])
    assert found != texts


def test_units_are_shuffled(maker):
    for i in range(12):
        (maker.folder / f"{i:02}.txt").write_text(f"file {i}")
    found = one_epoch(maker.open(streams=1), 0)
    assert found != sorted(found, key=lambda text: int(text.split()[1]))


def test_permutation_never_changes():
    # numpy's own shuffles may change between releases; cursors of old checkpoints may not
    assert permutation(8, 1, 2, 3).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]
    assert permutation(8, 1, 2, 4).tolist() == [2, 5, 4, 6, 0, 3, 1, 7]


def test_blocks_are_bounded_in_size(maker, monkeypatch):
    monkeypatch.setattr("swamla_titan.data.streams.BLOCK_CHARS", 1000)
    texts = [f"{i}" + "x" * 400 for i in range(30)]
    maker.write(texts)
    documents = DocumentStream(maker.open(streams=1), 0)
    next(documents)
    assert len(documents._block) == 3
    assert sorted(one_epoch(maker.open(streams=1), 0)) == sorted(texts)
    assert BLOCK_CHARS <= 64 << 20


@pytest.mark.parametrize("shuffle", [1, 4, 1000])
@pytest.mark.parametrize("files", [1, 5])
def test_resume_from_every_document(maker, files, shuffle):
    maker.write(maker.texts(17), files)
    corpus = maker.open(shuffle_documents=shuffle, streams=2)
    whole = DocumentStream(corpus, 1)
    texts, cursors = [], []
    for _ in range(30):  # more than three epochs
        document, cursor = next(whole)
        texts.append(document.text)
        cursors.append(json.loads(json.dumps(cursor)))
    assert cursors[-1]["epoch"] > 2
    for start, cursor in enumerate(cursors):
        again = DocumentStream(corpus, 1, cursor)
        assert [next(again)[0].text for _ in range(30 - start)] == texts[start:]


def test_streams_share_documents_where_those_are_few(maker):
    texts = ["one document", "another one", "the third"]
    maker.write(texts)
    corpus = maker.open(streams=8)
    total = corpus.segments[0].tokens
    found = []
    for stream in range(8):
        parts = pieces(corpus, stream)
        assert sum(len(part.cut(with_eot(corpus.tokenizer, part.text))) for part in parts) in (
            total // 8,
            -(-total // 8),
        )
        found += parts
        documents = DocumentStream(corpus, stream)
        for _ in range(9):
            last, cursor = next(documents)
        assert next(DocumentStream(corpus, stream, cursor)) == (last, cursor)
    assert sorted(joined(found, corpus.tokenizer)) == sorted(texts)


def test_the_next_epoch_goes_on_where_the_last_one_ended(maker):
    """So a document that two streams share is not torn: the same stream reads on in it."""
    maker.write(maker.texts(50), files=3)
    for shuffle in (1, 10):
        corpus = maker.open(streams=4, shuffle_documents=shuffle)
        for stream in range(4):
            ends = [each[-1] for each in [pieces(corpus, stream, epoch) for epoch in range(3)]]
            begins = [each[0] for each in [pieces(corpus, stream, epoch) for epoch in range(1, 4)]]
            torn = [(end, begin) for end, begin in zip(ends, begins) if end.finish is not None]
            assert torn
            assert all((end.key, end.finish) == (begin.key, begin.begin) for end, begin in torn)


def test_everything_held_out_is_refused(maker):
    maker.write(["one", "two"])
    corpus = maker.open()
    everything = type(corpus)(corpus.data, corpus.source, corpus.tokenizer, HeldOut(2**64), corpus.seed)
    with pytest.raises(UserError, match="every document of the training data is held out"):
        next(DocumentStream(everything, 0))


def test_held_out_share_of_a_small_corpus_is_exact(maker, tmp_path):
    maker.write(maker.texts(50))
    for fraction, count in [(0.001, 1), (0.1, 5), (0.99, 49)]:
        corpus = maker.open(Validation(fraction=fraction))
        assert sum(document in corpus.held_out for document in all_documents(corpus.source)) == count
    assert maker.open(Validation(fraction=0)).held_out == HeldOut(0)
    (tmp_path / "elsewhere.txt").write_text("other text")
    elsewhere = maker.open(Validation(fraction=0.1, path=str(tmp_path / "elsewhere.txt")))
    assert not any(document in elsewhere.held_out for document in all_documents(elsewhere.source))


def test_builtin_holds_out_several_topics():
    corpus = open_corpus(Data(source="builtin", tokenizer="byte"), Validation(fraction=0.1), 0)
    documents = list(all_documents(corpus.source))
    held_out = {document.text for document in documents if document in corpus.held_out}
    assert len(held_out) == round(0.1 * len({document.text for document in documents})) > 3


def test_held_out_share_of_a_large_corpus(maker, monkeypatch):
    monkeypatch.setattr("swamla_titan.data.held_out.SMALL_DOCUMENTS", 20)
    maker.write(maker.texts(1000))
    corpus = maker.open(Validation(fraction=0.1))
    assert corpus.held_out.threshold == int(0.1 * 2**64)
    count = sum(document in corpus.held_out for document in all_documents(corpus.source))
    assert 50 < count < 150


def test_one_document_cannot_be_held_out(maker):
    maker.write(["the only one", "the only one", ""])
    with pytest.raises(UserError, match=r"single document.*data\.text_separator.*validation\.fraction = 0"):
        maker.open(Validation(fraction=0.1))


@pytest.mark.parametrize("separator, text", [("\\n\\n", "one\n\ntwo"), ("\n\n", "one\r\n\r\ntwo")])
def test_a_separator_that_does_not_occur_is_named(maker, separator, text):
    (maker.folder / "a.txt").write_bytes(text.encode())
    with pytest.raises(UserError) as error:
        maker.open(Validation(fraction=0.1), text_separator=separator)
    for part in (f"data.text_separator = {separator!r} does not divide it", r"$'\n\n' in bash", r"(\r\n)"):
        assert part in str(error.value)


def test_the_hash_of_a_text_never_changes():
    assert text_hash("held out") == 7921109290846398415


def test_data_that_changed_under_a_cursor_are_refused(maker):
    maker.write(maker.texts(40))
    documents = DocumentStream(maker.open(streams=1, shuffle_documents=10), 0)
    for _ in range(38):
        _, cursor = next(documents)
    maker.write(maker.texts(5))
    with pytest.raises(UserError, match="data have changed"):
        DocumentStream(maker.open(streams=1, shuffle_documents=10), 0, cursor)


def test_fingerprint(maker):
    maker.write(maker.texts(10))
    saved = json.loads(json.dumps(maker.open().fingerprint()))
    assert fingerprint_changes(saved, maker.open().fingerprint()) == {}
    assert fingerprint_changes(saved, maker.open(streams=5).fingerprint()) == {
        "data.streams": "data.streams: 4 in the checkpoint, 5 now"
    }
    assert len(fingerprint_changes(saved, maker.open(seed=8).fingerprint())) == 1
    maker.write(maker.texts(11))
    (change,) = fingerprint_changes(saved, maker.open().fingerprint()).values()
    assert change.startswith("source:")
