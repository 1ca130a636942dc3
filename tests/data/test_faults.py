"""Data that cannot be read: retried from the exact place, reported by file and place, excluded alike everywhere."""

import errno
import gzip
import hashlib
import json
import os
import pickle
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from swamla_titan.checkpoint.records import read_train_state
from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import retry as retry_module
from swamla_titan.data.corpus import open_corpus
from swamla_titan.data.exclusions import Exclusion, first_excluded, taken_from_cursors
from swamla_titan.data.faults import DataFault, MachineFault, SetupFault, Unreachable, network_fault, readable
from swamla_titan.data.retry import Retry, all_documents, read_on
from swamla_titan.data.sources import files, open_source, parquet
from swamla_titan.data.streams import DocumentStream, initial_cursor
from swamla_titan.errors import RunFailed, UserError
from swamla_titan.system.machine import PERMANENT, REMEDIES
from tests.data.faulty import ALWAYS, Fails, flaky, truncate, write_parquet
from tests.data.test_loader import all_cursors, all_excluded, global_batch, loaders, read, simulated
from tests.waiting import HANG, wait_until

SKIP = {"on_error": "skip_file"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(retry_module, "FIRST_DELAY", 0.001)


def text_of(batches, streams=3):
    """All training text, a stream after the other, `|` between documents."""
    rows = sorted((number % streams, number, row) for batch in batches for number, (row, _) in batch.items())
    return "".join("|" if token == 256 else chr(token) for *_, row in rows for token in row)


# what kind of fault it is


def test_a_fault_says_file_and_place_and_travels_between_processes():
    fault = DataFault("a.jsonl", "line 21", "not valid JSON", "Correct it", may_pass=True)
    fault.tried = "given up after 2 more tries"
    for each in (fault, pickle.loads(pickle.dumps(fault))):
        assert str(each) == "a.jsonl, line 21: not valid JSON (given up after 2 more tries). Correct it"
        assert isinstance(each, UserError)
        assert each.may_pass
    other = pickle.loads(pickle.dumps(Unreachable("a.txt", "", "did not answer")))
    assert (str(other), other.may_pass, isinstance(other, RunFailed)) == ("a.txt: did not answer", True, True)


@pytest.mark.parametrize(
    "number, kind",
    [
        (errno.ENOENT, DataFault),
        (errno.EACCES, DataFault),
        (errno.EISDIR, DataFault),
        (errno.EIO, Unreachable),
        (errno.ESTALE, Unreachable),
        (errno.ETIMEDOUT, Unreachable),
    ],
)
def test_what_the_operating_system_says(number, kind):
    with pytest.raises(kind) as fault, readable("a.txt"):
        raise OSError(number, "the reason", "a.txt")
    assert str(fault.value) == "a.txt: cannot be read: the reason"
    assert fault.value.may_pass == (kind is Unreachable)


@pytest.mark.parametrize("number", [*REMEDIES])
def test_what_this_machine_lacks_is_told_with_the_way_out(number):
    with pytest.raises(SetupFault if number in PERMANENT else MachineFault) as fault, readable("a.txt", "row 3"):
        raise OSError(number, os.strerror(number), "a.txt")
    assert str(fault.value) == f"a.txt, row 3: cannot be read: {os.strerror(number)}. {REMEDIES[number]}"
    other = pickle.loads(pickle.dumps(fault.value))
    assert (other.of_machine, isinstance(other, DataFault)) == (True, False)


class _Answer(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.response = type("Response", (), {"status_code": status})


def _of_httpx(message: str) -> Exception:
    return type("ReadTimeout", (Exception,), {"__module__": "httpx"})(message)


def _caused_by(cause: Exception) -> Exception:
    error = ValueError("could not be parsed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, kind, may_pass",
    [
        (ConnectionError("reset by peer"), Unreachable, True),
        (TimeoutError(), Unreachable, True),
        (OSError(errno.EIO, "Input/output error"), Unreachable, True),
        (_of_httpx("no answer"), Unreachable, True),
        (_caused_by(ConnectionResetError("gone")), Unreachable, True),
        (type("OfflineModeIsEnabled", (ConnectionError,), {})("offline"), DataFault, False),
        (FileNotFoundError("no such file"), DataFault, False),
        (OSError(errno.EMFILE, "Too many open files"), SetupFault, True),
        (_caused_by(OSError(errno.ENOMEM, "Cannot allocate memory")), MachineFault, True),
        (pa.ArrowMemoryError("malloc of size 9 failed"), MachineFault, True),
        (PermissionError(errno.EACCES, "no"), DataFault, False),
        (gzip.BadGzipFile("not gzip"), DataFault, True),
        (OSError("Corrupt snappy compressed data"), DataFault, True),
        (pa.ArrowInvalid("no parquet"), DataFault, True),
        (EOFError("ended before the marker"), DataFault, True),
    ],
)
def test_what_a_library_for_remote_files_raises(error, kind, may_pass):
    fault = network_fault("hub, shard 3", "row 5", error)
    assert type(fault) is kind
    assert fault.may_pass == may_pass
    assert str(fault).startswith("hub, shard 3, row 5: ")


@pytest.mark.parametrize("status, kind", [(404, DataFault), (403, DataFault), (429, Unreachable), (503, Unreachable)])
def test_what_a_server_answers(status, kind):
    error = type("HTTPStatusError", (_Answer,), {"__module__": "httpx"})(status)
    assert type(network_fault("hub", "", error)) is kind


# trying again


@pytest.mark.parametrize("every, offset", [(1, 0), (3, 1)])
def test_reading_goes_on_behind_the_last_document(maker, tmp_path, every, offset):
    maker.write(maker.texts(30), files=2)
    corpus = maker.open()
    expected = [list(corpus.source.read(unit, None, every, offset)) for unit in range(2)]
    fails = [Fails(0, 1, 1), Fails(0, 4, 5), Fails(0, 7, 2), Fails(1, 13, 3)]
    faulty = flaky(corpus, fails, tmp_path / "counts")
    retry = Retry(10)
    assert [list(read_on(faulty.source, unit, None, every, offset, retry)) for unit in range(2)] == expected
    seen = [fail for fail in fails if fail.ordinal % every == offset]
    assert len(seen) >= 3
    assert [faulty.source.failed(fail) for fail in seen] == [fail.times for fail in seen]
    notes = retry.notes()
    assert len(notes) == len(seen)
    assert "part-0.jsonl" in notes[0]
    assert "read on after 1 more try in " in notes[0]
    assert retry.notes() == []


def test_the_place_of_a_failure_is_told_in_bytes_or_documents(maker, tmp_path):
    maker.write(maker.texts(30))
    write_parquet(maker.folder / "rows.parquet", maker.texts(10))
    corpus = maker.open(retry_seconds=0)
    faulty = flaky(corpus, [Fails(0, 2), Fails(1, 4)], tmp_path / "counts")
    start = [json.dumps({"text": text}) + "\n" for text in maker.texts(2)]
    for unit, place in ((0, f"part-0.jsonl, byte {len(''.join(start))}: "), (1, "rows.parquet, document 4: ")):
        with pytest.raises(Unreachable) as fault:
            list(read_on(faulty.source, unit, None, 1, 0, corpus.new_retry()))
        assert str(fault.value) == f"{place}did not answer"


@pytest.mark.parametrize("world_size, workers", [(1, 0), (1, 1), (1, 2), (3, 0), (2, 1)])
def test_a_reader_that_fails_for_a_while_gives_the_same_batches_and_cursors(
    maker, tmp_path, world_size, workers, caplog
):
    maker.write(maker.texts(60), files=5)
    corpus = maker.open(streams=6, shuffle_documents=4)
    reference = loaders(corpus, 5, 1)
    expected = [global_batch(reference) for _ in range(20)]
    fails = [Fails(0, 0, 1), Fails(1, 3, 2), Fails(2, 5, 7), Fails(3, 11, 3), Fails(4, 1, 4)]
    faulty = flaky(corpus, fails, tmp_path / "counts")
    ranks = loaders(faulty, 5, world_size, workers)
    try:
        assert [global_batch(ranks) for _ in range(20)] == expected
        assert all_cursors(ranks) == all_cursors(reference)
    finally:
        for loader in ranks:
            loader.close()
    assert [faulty.source.failed(fail) for fail in fails] == [fail.times for fail in fails]
    assert caplog.text.count("read on after") >= len(fails)


def test_retrying_ends(maker, tmp_path):
    maker.write(maker.texts(30))
    for seconds in (0.4, 0.0):
        corpus = flaky(maker.open(streams=1, retry_seconds=seconds), [Fails(0, 5)], tmp_path / f"counts-{seconds}")
        start = time.monotonic()
        with pytest.raises(Unreachable) as fault:
            next(DocumentStream(corpus, 0))
        assert time.monotonic() - start >= seconds
        tries = (tmp_path / f"counts-{seconds}" / "0-5").stat().st_size
        assert tries >= 2 if seconds else tries == 1
        assert 'data.on_error = "skip_file" skips the rest of the file' in str(fault.value)
        assert ("given up after" in str(fault.value)) == (seconds > 0)


def test_a_pause_while_an_outage_is_waited_for_is_no_part_of_it(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds + 3600))  # Ctrl-Z
    retry = Retry(200)
    fault = Unreachable("a", "line 1", "no answer")
    for _ in range(8):  # more than are tried whatever the time
        assert retry.wait(fault)


def test_the_time_is_for_a_step_whatever_the_number_of_files(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(retry_module, "FIRST_DELAY", 0.5)
    retry = Retry(100)
    delays = []
    retry.begin_step()
    for _ in range(3):
        fault = Unreachable("a", "", "silent")
        before = clock[0]
        while retry.wait(fault):
            delays.append(clock[0] - before)
            before = clock[0]
        retry.failed(fault)
        retry.success()
    assert 100 <= clock[0] < 103  # the second and the third file get two quick tries each
    assert delays[0] <= 0.5
    assert max(delays) <= 30
    assert len({round(delay, 6) for delay in delays}) > 5  # by chance
    retry.begin_step()
    assert retry.wait(Unreachable("a", "", "silent"))


def test_damage_is_looked_at_a_second_time_and_a_missing_file_is_not(monkeypatch):
    sleeps = []
    monkeypatch.setattr(time, "sleep", sleeps.append)
    retry = Retry()
    assert retry.seconds == 300
    missing, damaged = DataFault("a", "", "no such file"), DataFault("a", "", "no parquet", may_pass=True)
    assert not retry.wait(missing)
    assert [retry.wait(damaged) for _ in range(3)] == [True, True, False]
    assert len(sleeps) == 2


# exclusions


def exclusion(file, unit, ordinal, since, stream=0, place="", reason=""):
    return Exclusion(stream, file, unit, ordinal, *since, place, reason)


def test_first_excluded():
    exclusions = [exclusion("a", 3, 7, (0, 1, 2)), exclusion("b", 9, 0, (0, 0, 0))]
    later, before = (0, 1, 3), (0, 1, 1)
    assert first_excluded(exclusions, "a", 2, later) is None  # it lies before in the file
    assert first_excluded(exclusions, "a", 3, later) == 7
    assert first_excluded(exclusions, "a", 4, later) == 0
    assert first_excluded(exclusions, "a", 4, before) is None
    assert first_excluded(exclusions, "a", 4, (1, 0, 0)) is None  # another edition numbers its units otherwise
    assert first_excluded([exclusion("a", 3, 7, (1, 0, 0))], "a", 4, (0, 9, 9)) is None
    assert first_excluded(exclusions, "c", 4, later) is None
    lower = exclusion("a", 1, 0, (0, 2, 0))
    assert first_excluded([*exclusions, lower], "a", 2, (0, 2, 0)) == 0
    assert first_excluded([*exclusions, lower], "a", 2, later) is None


def test_exclusions_that_older_checkpoints_have_in_their_cursors():
    entry = {"file": "a", "unit": 3, "ordinal": 7, "since": [0, 1, 2], "place": "line 3", "reason": "no"}
    cursors = {9: {"token": 1}, 4: {"token": 2, "skipped": [dict(entry)]}}
    assert taken_from_cursors(cursors) == [exclusion("a", 3, 7, (0, 1, 2), 4, "line 3", "no")]
    assert cursors == {9: {"token": 1}, 4: {"token": 2}}
    wrong = [{"since": [0, 1]}, {"since": [0, 1, -1]}, {"unit": "3"}, {"unit": -1}, {"more": 1}, {"since": None}]
    for each in wrong:
        with pytest.raises(ValueError):
            taken_from_cursors({4: {"skipped": [entry | each]}})
    for each in (7, {}, [7]):
        with pytest.raises(ValueError):
            taken_from_cursors({4: {"skipped": each}})


KINDS = ["truncated parquet", "damaged page", "bad line", "line cut", "vanished", "text cut"]


def write_and_open(maker, kind, **keys):
    """Five files of 30 documents; the corpus of before damage `kind` befalls the third, and its path."""
    for number in range(5):
        texts = [f"<{number}.{i}{'abc'[i % 3] * (i * 7 % 23)}>" for i in range(30)]
        if kind in ("truncated parquet", "damaged page"):
            write_parquet(maker.folder / f"{number}.parquet", texts)
        elif kind == "text cut":
            (maker.folder / f"{number}.txt").write_text("##".join(texts))
        else:
            lines = [json.dumps({"text": text}) for text in texts]
            (maker.folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    separator = {"text_separator": "##"} if kind == "text cut" else {}
    corpus = maker.open(streams=3, shuffle_documents=4, **({"retry_seconds": 0} | separator | keys))
    return corpus, next(maker.folder.glob("2.*"))


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    match kind:
        case "vanished":
            path.unlink()
        case "damaged page":
            at = content.index(b"<2.12")
            path.write_bytes(content[: at - 80] + b"\xff" * 80 + content[at:])
        case "bad line":
            path.write_bytes(content.replace(b'{"text": "<2.17', b'("text": "<2.17'))
        case _:
            truncate(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_stops_by_file_and_place(maker, kind):
    corpus, path = write_and_open(maker, kind)
    damage(path, kind)
    place = {
        "truncated parquet": r", row 0 of row group \d: not a whole parquet file",
        "damaged page": ", row 0 of row group 1: not a whole parquet file",
        "bad line": ", line 18: not valid JSON",
        "line cut": r", line 1\d: the file ends here, at \d+ bytes",
        "vanished": ": cannot be read: No such file",
        "text cut": r", from byte \d+: the file ends here, at \d+ bytes",
    }[kind]
    with pytest.raises(UserError, match=f"2.{path.suffix[1:]}{place}") as fault:
        read(loaders(corpus, 5, 1)[0], 60)
    assert "given up after" not in str(fault.value)  # nothing was waited for
    assert 'data.on_error = "skip_file" skips the rest of the file' in str(fault.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_skipped_alike_by_any_ranks_and_workers_and_after_a_resume(maker, kind):
    corpus, path = write_and_open(maker, kind, **SKIP)
    whole = path.read_bytes()
    recorded = json.loads(json.dumps(corpus.record()))
    damage(path, kind)
    reference = loaders(corpus, 5, 1)
    batches = [global_batch(reference) for _ in range(70)]
    cursors = all_cursors(reference)
    assert min(cursor["epoch"] for cursor in cursors.values()) >= 1

    text = text_of(batches)
    assert all(f"<{number}.{i}" in text for number in (0, 1, 3, 4) for i in range(30))
    if kind == "bad line":
        assert "<2.16" in text
        assert not any(f"<2.{i}" in text for i in range(17, 30))
    if kind == "damaged page":  # of its row group nothing can be read, and what other streams own is theirs
        assert not any(f"<2.{i}" in text for i in range(10, 20))
    else:
        assert "<2.29" not in text
    excluded = all_excluded(reference)
    assert {each.file for each in excluded} == {path.name}

    for world_size in (2, 3):
        assert [global_batch(ranks) for ranks in [loaders(corpus, 5, world_size)] for _ in range(70)] == batches
    assert simulated(corpus, 5, 2, 2, 70) == batches

    # Wherever it is resumed, the file whole again or not: what is on the record stays excluded.
    straight = loaders(corpus, 5, 1)
    found = [global_batch(straight) for _ in range(50)]
    middle, known = all_cursors(straight), all_excluded(straight)
    assert known
    assert found == batches[:50]
    for healed in (False, True):
        if healed:
            # Each stream has been around: it will not come upon more of the file.
            assert known == excluded
            path.write_bytes(whole)
        again = maker.open(
            streams=3, shuffle_documents=4, retry_seconds=0, recorded=recorded, **SKIP, **_separator(kind)
        )
        assert again.fingerprint() == corpus.fingerprint()
        for world_size in (1, 2):
            # What was found later than the cursors changes nothing of what is read from there on.
            for given in (known, excluded):
                ranks = loaders(again, 5, world_size, 0, middle, 50, given)
                assert [global_batch(ranks) for _ in range(20)] == batches[50:]
                assert all_cursors(ranks) == cursors
                assert all_excluded(ranks) == excluded


def _separator(kind):
    return {"text_separator": "##"} if kind == "text cut" else {}


def test_in_loader_processes_it_is_the_same(maker):
    corpus, path = write_and_open(maker, "truncated parquet", **SKIP)
    damage(path, "truncated parquet")
    reference = loaders(corpus, 5, 1)
    expected = [next(reference[0]) for _ in range(30)]
    assert any(batch.excluded for batch in expected)
    for workers in (1, 2):
        with loaders(corpus, 5, 1, workers)[0] as loader:
            for batch in expected:
                found = next(loader)
                assert found.tokens.equal(batch.tokens)
                assert sorted(each.key for each in found.excluded) == sorted(each.key for each in batch.excluded)
            assert all_cursors([loader]) == all_cursors(reference)


def test_a_run_resumes_from_a_checkpoint_of_before_the_list(maker, tmp_path):
    """Version 0.1 kept what a stream excludes in its cursor. It wrote this file after 50 steps with a bad line."""
    corpus, _ = write_and_open(maker, "bad line", **SKIP)  # the file is whole again
    (tmp_path / "train.json").write_bytes((Path(__file__).parent / "stored" / "train-0.1.json").read_bytes())
    state = read_train_state(tmp_path)
    assert [(each.stream, each.file, each.ordinal) for each in state.excluded] == [(i, "2.jsonl", 17) for i in range(3)]
    for given, same in ((state.excluded, True), ([], False)):
        for world_size in (1, 2):
            ranks = loaders(corpus, 5, world_size, 0, state.cursors, 50, given)
            batches = [sorted(global_batch(ranks).items()) for _ in range(20)]
            digest = hashlib.sha256(json.dumps(batches).encode()).hexdigest()
            assert (digest[:16] == "cd3a5b9fd8198f7d") == same  # of the 20 steps that version 0.1 read then
    (tmp_path / "train.json").write_text(state.to_json())
    again = read_train_state(tmp_path)
    assert (again.cursors, again.excluded) == (state.cursors, state.excluded)


@pytest.mark.parametrize("kind", ["vanished", "truncated parquet"])
def test_a_block_that_is_gone_when_a_run_is_resumed_is_left_alike_everywhere(maker, kind):
    """Its documents were in memory; in which order they came, only all of them together would tell."""
    corpus, path = write_and_open(maker, kind, **SKIP)
    straight = loaders(corpus, 5, 1)
    batches, found = [], None
    for step in range(60):
        batches.append(global_batch(straight))
        if "<2." in text_of(batches[-1:]):
            found = step + 1
            break
    assert found
    middle = all_cursors(straight)
    damage(path, kind)
    recorded = json.loads(json.dumps(corpus.record()))
    again = maker.open(streams=3, shuffle_documents=4, retry_seconds=0, recorded=recorded, **SKIP)
    results = []
    for world_size in (1, 2, 3):
        ranks = loaders(again, 5, world_size, 0, middle, found)
        results.append(([global_batch(ranks) for _ in range(40)], all_cursors(ranks)))
    assert results[0] == results[1] == results[2]
    assert "<4.29" in text_of(results[0][0])
    # and from there once more
    ranks = loaders(again, 5, 2, 0, middle, found)
    first = [global_batch(ranks) for _ in range(7)]
    ranks = loaders(again, 5, 1, 0, all_cursors(ranks), found + 7, all_excluded(ranks))
    assert first + [global_batch(ranks) for _ in range(33)] == results[0][0]


def test_every_stream_of_a_shared_file_skips_from_where_it_finds_the_damage(maker):
    lines = [json.dumps({"text": f"<{i}>"}) for i in range(100)]
    (maker.folder / "a.jsonl").write_text("\n".join(lines))
    (maker.folder / "b.jsonl").write_text("\n".join(json.dumps({"text": f"[{i}]"}) for i in range(20)))
    corpus = maker.open(streams=5, shuffle_documents=1, **SKIP)
    (maker.folder / "a.jsonl").write_text("\n".join([*lines[:60], lines[60].replace("{", "("), *lines[61:]]))
    ranks = loaders(corpus, 5, 2)
    text = text_of([global_batch(ranks) for _ in range(40)], 5)
    assert all(f"<{i}>" in text for i in range(57))
    assert not any(f"<{i}>" in text for i in range(61, 100) if i % 4 == 60 % 4)


def test_restart_with_what_another_rank_could_not_read(maker, tmp_path):
    maker.write(maker.texts(60), files=5)
    corpus = maker.open(streams=3, shuffle_documents=4, retry_seconds=0, **SKIP)
    faulty = flaky(corpus, [Fails(2, 5, damaged=True)], tmp_path / "counts")
    there, here = loaders(faulty, 5, 1)[0], loaders(corpus, 5, 1)[0]
    restarted = 0
    for step in range(40):
        batch, other = next(there), next(here)
        if batch.excluded:
            assert not other.excluded
            here.restart(batch.excluded)
            other = next(here)
            restarted += 1
        assert other.tokens.equal(batch.tokens)
        assert other.first == batch.first == 5 * step
    assert 1 <= restarted <= 3  # each stream comes upon it by itself
    assert all_cursors([here]) == all_cursors([there])
    here.close()


def test_a_file_that_does_not_answer_is_skipped_but_not_all_that_there_are(maker, tmp_path, caplog):
    maker.write(maker.texts(60), files=6)
    corpus = maker.open(streams=1, retry_seconds=0.05, **SKIP)
    one = flaky(corpus, [Fails(2, 5)], tmp_path / "one")
    documents = DocumentStream(one, 0)
    for _ in range(60):
        next(documents)
    (found,) = documents.excluded
    assert (found.file, found.unit, found.ordinal) == ("part-2.jsonl", 2, 5)
    assert found.reason.startswith("did not answer (given up after ")
    every = flaky(corpus, [Fails(unit, 0, ALWAYS) for unit in range(6)], tmp_path / "every")
    with pytest.raises(Unreachable, match="Nothing else answers either, so it is not the file"):
        next(DocumentStream(every, 0))


@pytest.mark.parametrize("number, kind", [(errno.EMFILE, UserError), (errno.ENOMEM, RunFailed)])
@pytest.mark.parametrize("form", ["parquet", "jsonl", "txt"])
def test_no_file_is_skipped_for_a_fault_of_this_machine(tmp_path, monkeypatch, maker, form, number, kind):
    """Too many open files looked like a source that does not answer, and so all files were skipped."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(5):
        if form == "parquet":
            write_parquet(folder / f"{index}.parquet", [f"text {index} {i}" for i in range(5)])
        else:
            text = f"text {index} " * 20
            (folder / f"{index}.{form}").write_text(json.dumps({"text": text}) if form == "jsonl" else text)
    corpus = maker.open(path=str(folder), streams=1, retry_seconds=0.05, **SKIP)
    documents = DocumentStream(corpus, 0)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), "file")

    monkeypatch.setattr(files, "open", refuse, raising=False)
    monkeypatch.setattr(parquet.pq, "ParquetFile", refuse)
    with pytest.raises(kind, match=os.strerror(number)):
        next(documents)
    assert documents.excluded == []


@pytest.mark.parametrize("below", ["", "hub/x"])
def test_a_home_folder_that_cannot_be_written_is_no_fault_of_the_data(tmp_path, monkeypatch, below):
    """datasets keeps things there even where it only streams files of a folder."""
    import datasets

    write_parquet(tmp_path / "a.parquet", ["text"])
    cache = tmp_path / "home" / "huggingface"
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(cache))

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(cache / below))

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SetupFault, match=r"cannot be used \(Permission denied\). Set HF_HOME to a folder"):
        open_source(Data(source="huggingface", path=str(tmp_path), streams=1))


def test_where_nothing_is_left_the_run_ends(maker, tmp_path):
    maker.write(maker.texts(20), files=2)
    corpus = flaky(
        maker.open(streams=2, **SKIP), [Fails(unit, 0, damaged=True) for unit in range(2)], tmp_path / "counts"
    )
    with pytest.raises(UserError, match=r"every file was skipped .* part-[01]\.jsonl, because: made no sense"):
        next(DocumentStream(corpus, 0))


# at the start of a run


def test_a_file_damaged_from_the_start_stays_skipped_when_it_is_mended(maker):
    for number in range(3):
        write_parquet(maker.folder / f"{number}.parquet", [f"<{number}.{i}>" for i in range(30)])
    path = maker.folder / "1.parquet"
    whole = path.read_bytes()
    truncate(path)
    with pytest.raises(UserError, match=r"1\.parquet: not a whole parquet file .*given up after 2 more tries"):
        maker.open()
    corpus = maker.open(**SKIP)
    (fault,) = corpus.source.unreadable
    assert fault.file == str(path)
    assert corpus.source.description.startswith("2 files")
    expected = [global_batch(ranks) for ranks in [loaders(corpus, 4, 1)] for _ in range(20)]
    assert "<1." not in text_of(expected, 4)
    path.write_bytes(whole)
    again = maker.open(recorded=json.loads(json.dumps(corpus.record())), **SKIP)
    assert again.fingerprint() == corpus.fingerprint()
    assert [fault.file for fault in again.source.unreadable] == ["1.parquet"]
    assert [global_batch(ranks) for ranks in [loaders(again, 4, 1)] for _ in range(20)] == expected
    assert maker.open(**SKIP).fingerprint() != corpus.fingerprint()  # of a run that begins now


def test_other_files_are_not_taken_for_damaged_ones(maker):
    maker.write(maker.texts(30), files=3)
    recorded = maker.open().record()
    (maker.folder / "part-1.jsonl").unlink()
    before, after = maker.open(recorded=recorded), maker.open(recorded=recorded, **SKIP)
    assert before.fingerprint() != after.fingerprint()  # with "stop" the data have changed
    assert before.change == "part-1.jsonl is gone"
    (maker.folder / "new.jsonl").write_text('{"text": "new"}\n')
    grown = maker.open(recorded=recorded, **SKIP)
    assert grown.fingerprint() == after.fingerprint()
    assert grown.added_files == ("new.jsonl",)
    assert maker.open(recorded=recorded).change == "part-1.jsonl is gone; new.jsonl is new"
    for path in maker.folder.iterdir():
        path.unlink()
    (maker.folder / "part-1.jsonl").write_text('{"text": "all are other files"}\n')
    assert maker.open(recorded=recorded, **SKIP).fingerprint() == maker.open(**SKIP).fingerprint()


def test_what_is_held_out_does_not_change_with_what_can_be_read(maker):
    maker.write(maker.texts(60), files=3)
    validation = Validation(fraction=0.25)
    corpus = maker.open(validation, **SKIP)
    recorded = json.loads(json.dumps(corpus.record()))
    (maker.folder / "part-1.jsonl").unlink()
    again = maker.open(validation, recorded=recorded, **SKIP)
    assert again.held_out == corpus.held_out
    assert again.fingerprint() == corpus.fingerprint()
    other = maker.open(Validation(fraction=0.5), recorded=recorded, **SKIP)
    assert other.held_out == corpus.held_out  # of training, whatever validation reads
    assert other.read_by_validation.threshold > other.held_out.threshold
    assert other.validates_on_training_text
    # a run that begins with a damaged file holds out a share of what it can read
    lines = (maker.folder / "part-2.jsonl").read_text().splitlines()
    (maker.folder / "part-2.jsonl").write_text("\n".join([*lines[:10], "{", *lines[11:]]))
    found = maker.open(validation, **SKIP)
    assert [fault.place for fault in found.faults] == ["line 11"]
    readable_documents = list(all_documents(found.source, faults=[]))
    assert len(readable_documents) == 30
    assert sum(document in found.held_out for document in readable_documents) == round(0.25 * 30)


def test_validation_text_is_never_skipped(maker, tmp_path):
    maker.write(maker.texts(20))
    path = tmp_path / "validation.jsonl"
    path.write_text('{"text": "good"}\n{\n')
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        maker.open(Validation(path=str(path)), **SKIP)


# Hugging Face


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for number in range(4):
        lines = [json.dumps({"text": f"<{number}.{i}>"}) + "\n" for i in range(30)]
        with gzip.open(folder / f"{number}.jsonl.gz", "wt") as file:
            file.writelines(lines)
    return folder


def test_a_truncated_shard_of_hugging_face(hub):
    data = Data(
        source="huggingface", path=str(hub), tokenizer="byte", streams=2, shuffle_documents=3, retry_seconds=0, **SKIP
    )
    corpus = open_corpus(data, Validation(fraction=0), 0)
    recorded = json.loads(json.dumps(corpus.record()))
    truncate(hub / "1.jsonl.gz")
    batches = [global_batch(ranks) for ranks in [loaders(corpus, 3, 1)] for _ in range(30)]
    for world_size in (2, 3):
        ranks = loaders(corpus, 3, world_size)
        assert [global_batch(ranks) for _ in range(30)] == batches
    text = text_of(batches, 2)
    assert all(f"<{number}.29>" in text for number in (0, 2, 3))
    assert "<1.29>" not in text
    excluded = all_excluded(ranks)
    assert excluded
    assert all(each.file.endswith("[train], shard 1") for each in excluded)
    again = open_corpus(data, Validation(fraction=0), 0, recorded=recorded)
    assert again.fingerprint() == corpus.fingerprint()
    ranks = loaders(corpus, 3, 1)
    first = [global_batch(ranks) for _ in range(15)]
    ranks = loaders(again, 3, 2, 0, all_cursors(ranks), 15, all_excluded(ranks))
    assert first + [global_batch(ranks) for _ in range(15)] == batches


def test_a_server_that_does_not_answer_for_a_while(hub, monkeypatch):
    """At the start as well as in the middle; `datasets` itself is not to wait."""
    import datasets

    load, failures = datasets.load_dataset, [3]

    def load_when_it_answers(*args, **keys):
        if failures[0]:
            failures[0] -= 1
            raise ConnectionError("no route to host")
        return load(*args, **keys)

    monkeypatch.setattr(datasets, "load_dataset", load_when_it_answers)
    data = Data(source="huggingface", path=str(hub), tokenizer="byte", streams=2)
    corpus = open_corpus(data, Validation(fraction=0), 0)
    assert failures == [0]
    assert datasets.config.STREAMING_READ_MAX_RETRIES == datasets.config.STREAMING_OPEN_MAX_RETRIES == 1
    assert datasets.config.STREAMING_READ_RETRY_INTERVAL == 0

    expected = [global_batch(ranks) for ranks in [loaders(corpus, 3, 1)] for _ in range(10)]
    shard, broken = type(corpus.source.units[0].dataset).shard, [0]

    class Breaks:
        def __init__(self, rows):
            self._rows = rows

        def __iter__(self):
            for count, row in enumerate(self._rows):
                if count == 4 and broken[0] < 9:
                    broken[0] += 1
                    raise ConnectionError("reset by peer")
                yield row

        def __getattr__(self, name):
            return getattr(self._rows, name)

    monkeypatch.setattr(
        type(corpus.source.units[0].dataset), "shard", lambda *args, **keys: Breaks(shard(*args, **keys))
    )
    assert [global_batch(ranks) for ranks in [loaders(corpus, 3, 1)] for _ in range(10)] == expected
    assert broken == [9]

    failures[0] = 10**9
    with pytest.raises(UserError, match=r"no route to host \(given up after .*Check the three keys and the network"):
        open_corpus(Data(source="huggingface", path=str(hub), tokenizer="byte", retry_seconds=0.2), Validation(), 0)
    failures[0] = 0
    with pytest.raises(UserError, match="cannot be loaded"):  # at once: another name does not come by waiting
        open_corpus(Data(source="huggingface", path=str(hub / "other"), tokenizer="byte"), Validation(), 0)


def test_waiting_hears_nothing_from_a_closed_loader(maker, tmp_path):
    """Neither does closing wait for a reader that waits."""
    maker.write(maker.texts(30))
    corpus = flaky(maker.open(streams=1, retry_seconds=2 * HANG), [Fails(0, 5)], tmp_path / "counts", delay=2 * HANG)
    tries = tmp_path / "counts" / "0-5"
    for workers in (0, 1):
        (loader,) = loaders(corpus, 4, 1, workers)
        assert not loader.wait(0.1)  # which starts the reader
        wait_until(lambda number=workers + 1: tries.exists() and tries.stat().st_size == number)
        assert not loader.wait(0.1)
        assert loader.cursors == {0: initial_cursor()}
        start = time.monotonic()
        loader.close()
        assert time.monotonic() - start < HANG  # of the two that the reader waits
        if workers == 0:
            wait_until(lambda: "data" not in {thread.name for thread in threading.enumerate()}, lambda: "it goes on")
    assert tries.stat().st_size == 2, "a reader tried again after its loader was closed"
