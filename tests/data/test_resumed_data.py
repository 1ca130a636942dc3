"""What a resumed run says of data that are others than before: the key or the file, and no two hashes."""

import base64
import json

import pytest

from swamla_titan.config.sections import Validation
from swamla_titan.data import fingerprint_changes
from swamla_titan.data.streams import PackedStream, TokenCache

SKIP = {"on_error": "skip_file", "retry_seconds": 0}


def resumed(maker, before, now, change=lambda: None, fraction=0.0):
    """(differences as they are shown, the corpus of the run that is resumed)."""
    validation = Validation(fraction=fraction)
    corpus = maker.open(validation, **before)
    recorded = json.loads(json.dumps(corpus.record()))
    change()
    again = maker.open(validation, recorded=recorded, **now)
    return fingerprint_changes(corpus.fingerprint(), again.fingerprint(), {"source": again.change}), again


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ({}, {"text_key": "b"}, "data.text_key = 'text' in the checkpoint, 'b' now"),
        ({}, {"text_separator": "\n\n"}, "data.text_separator = '' in the checkpoint, '\\n\\n' now"),
        ({}, {"source": "builtin"}, "data.source = 'local' in the checkpoint, 'builtin' now"),
        ({"source": "builtin"}, {}, "data.source = 'builtin' in the checkpoint, 'local' now"),
        ({"source": "huggingface"}, {"source": "huggingface", "text_key": "b"}, "data.text_key = 'text' in"),
        ({}, {"source": "huggingface"}, "data.source = 'local' in the checkpoint, 'huggingface' now"),
    ],
)
@pytest.mark.parametrize("fraction", [0, 0.2])
def test_keys_that_make_the_data_others_are_named(maker, before, now, found, fraction):
    rows = [json.dumps({"text": f"text {number}", "b": f"other {number}"}) for number in range(30)]
    (maker.folder / "rows.jsonl").write_text("\n".join(rows))
    changes, _ = resumed(maker, before, now, fraction=fraction)
    assert list(changes) == ["source"]
    assert found in changes["source"]


def test_files_of_a_folder_of_hugging_face_are_named(maker):
    keys = {"source": "huggingface"}
    maker.write(maker.texts(9), files=2)

    def grow():
        (maker.folder / "part-2.jsonl").write_text('{"text": "new"}\n')

    assert resumed(maker, keys, keys)[0] == {}
    assert resumed(maker, keys, keys, grow)[0] == {"source": "source: part-2.jsonl is new"}
    assert resumed(maker, keys, keys, (maker.folder / "part-1.jsonl").unlink)[0] == {
        "source": "source: part-1.jsonl is gone"
    }


@pytest.mark.parametrize("before", ["stop", "skip_file"])
def test_a_run_on_a_folder_of_hugging_face_continues_whatever_on_error_says(maker, before):
    """Version 0.1 had two fingerprints for the same folder; a run that began with the wrong one keeps it."""
    for number in range(2):
        lines = [json.dumps({"text": f"<{number}.{i}>"}) + "\n" for i in range(20)]
        (maker.folder / f"{number}.jsonl").write_text("".join(lines))
    keys = {"source": "huggingface", "streams": 2}
    corpus = maker.open(**keys, on_error=before)
    of_version_0_1 = {"stop": "2e1fce62738657c1da6f6b7c11bdca9e", "skip_file": "b981a11cc5d970ac9f1bcd28f335c000"}
    recorded = json.loads(json.dumps(corpus.record()))
    for fingerprint in (corpus.source.fingerprint, of_version_0_1[before]):
        recorded["fingerprint"]["source"] = f"huggingface {fingerprint}"
        for now in ("stop", "skip_file"):
            again = maker.open(**keys, on_error=now, recorded=recorded)
            assert fingerprint_changes(recorded["fingerprint"], again.fingerprint(), {"source": again.change}) == {}
            assert again.segments == corpus.segments


def test_another_vocabulary_is_told_by_its_key(maker, tmp_path):
    maker.write(maker.texts(9))
    path = tmp_path / "v.tiktoken"

    def write(*more):
        tokens = [*(bytes([byte]) for byte in range(256)), *more]
        path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)))

    write()
    changes, _ = resumed(maker, {"tokenizer": str(path)}, {"tokenizer": str(path)}, lambda: write(b"ab"))
    assert changes == {"tokenizer": "data.tokenizer: its vocabulary is another than when the run began"}


def test_another_documentation_of_python_is_told_so():
    changes = fingerprint_changes({"source": "builtin 1"}, {"source": "builtin 2"}, {"source": ""})
    assert changes == {"source": "data.source: this Python's documentation is another than when the run began"}


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize(
    ("name", "content"),
    [("d.parquet", b"PAR1 and no more"), ("d.jsonl", b""), ("d.jsonl", b"\n\n"), ("d.txt", b" "), ("d.jsonl", b"{")],
)
def test_added_files_without_text_end_nothing(maker, streams, name, content):
    maker.write(maker.texts(9))
    keys = {**SKIP, "streams": streams}
    changes, corpus = resumed(maker, keys, keys, lambda: (maker.folder / name).write_bytes(content))
    assert not changes
    assert corpus.added_files == (name,)
    stream = PackedStream(corpus, 0, TokenCache(corpus.tokenizer))
    for _ in range(200):
        packed = stream.next(8)
    assert packed.cursor["edition"] == 2
