"""The batch of a step does not depend on ranks, workers and restarts; workers end as they should."""

import errno
import itertools
import json
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import BatchLoader, Shape, open_corpus
from swamla_titan.data.background import is_done
from swamla_titan.data.batches import document_ids
from swamla_titan.data.loader import StepReader
from swamla_titan.data.retry import all_documents
from swamla_titan.data.worker import PREFETCH_STEPS, LoaderProcess, _make_sockets_where_their_names_fit
from swamla_titan.errors import RunFailed, UserError
from swamla_titan.system.process import wait_for_end
from tests.waiting import HANG, wait_until

SEQ_LEN = 32


def loaders(corpus, size, world_size, workers=0, cursors=None, steps=0, excluded=()):
    """Those of all ranks; with the cursors, and what was excluded, that `steps` steps of this size have left."""
    return [
        BatchLoader(
            corpus,
            [Shape(0, size, SEQ_LEN)],
            rank=rank,
            world_size=world_size,
            num_workers=workers,
            cursors=cursors,
            excluded=excluded,
            first=steps * size,
        )
        for rank in range(world_size)
    ]


def global_batch(ranks):
    """One step of all ranks: {global sequence number: (inputs, targets)}."""
    merged = {}
    for loader in ranks:
        batch = next(loader)
        assert batch.sequences.tolist() == sorted(batch.sequences.tolist())
        for number, tokens, targets in zip(batch.sequences.tolist(), batch.tokens, batch.targets):
            assert number not in merged
            merged[number] = (tokens.tolist(), targets.tolist())
    return merged


def read(loader, steps):
    for _ in range(steps):
        next(loader)


def all_cursors(ranks):
    """What a checkpoint holds: every stream's cursor, through JSON and so under a string."""
    merged = {}
    for loader in ranks:
        assert not loader.cursors.keys() & merged.keys()
        merged |= loader.cursors
    return json.loads(json.dumps(merged))


def all_excluded(ranks):
    """What the loaders of all ranks exclude, in one order."""
    return sorted({each for loader in ranks for each in loader.excluded}, key=lambda each: each.key)


def simulated(corpus, size, world_size, workers, steps):
    """Like the loaders, but with the workers' parts read here, without processes."""
    streams = corpus.data.streams
    cursors = all_cursors(loaders(corpus, size, 1))
    parts = []
    for rank in range(world_size):
        own = list(range(rank, streams, world_size))
        from_start = {stream: cursors[str(stream)] for stream in own}
        parts += [
            iter(StepReader(corpus, own[worker::workers], [Shape(0, size, SEQ_LEN)], 0, from_start))
            for worker in range(workers)
        ]
    result = []
    for _ in range(steps):
        merged = {}
        for part in parts:
            read_part = next(part)
            for number, row in zip(read_part.sequences.tolist(), read_part.tokens.tolist()):
                assert number not in merged
                merged[number] = (row[:-1], row[1:])
        result.append(merged)
    return result


@pytest.fixture
def corpus(maker):
    maker.write(maker.texts(60), files=5)
    return maker.open(streams=6, shuffle_documents=4)


@pytest.mark.parametrize("size", [5, 12])  # 5 sequences a step divide by none of the numbers of ranks
def test_global_batch_is_the_same_for_all_ranks_and_workers(corpus, size):
    one = loaders(corpus, size, 1)
    reference = [global_batch(one) for _ in range(8)]
    for step, batch in enumerate(reference):
        assert sorted(batch) == list(range(step * size, (step + 1) * size))
    for world_size in (2, 3, 4, 8):
        ranks = loaders(corpus, size, world_size)
        assert [global_batch(ranks) for _ in range(8)] == reference
    for world_size, workers in [(1, 1), (1, 3), (2, 3), (3, 1), (4, 3)]:
        assert simulated(corpus, size, world_size, workers, 8) == reference


def test_worker_processes_give_the_same_batches_and_cursors(corpus):
    reference = loaders(corpus, 5, 1)
    for workers in (1, 3):
        with loaders(corpus, 5, 1, workers)[0] as loader:
            assert loader.cursors == loaders(corpus, 5, 1)[0].cursors
            for step in range(6):
                batch, expected = next(loader), next(reference[0])
                assert batch.first == expected.first == 5 * step
                assert torch.equal(batch.sequences, expected.sequences)
                assert torch.equal(batch.tokens, expected.tokens)
                assert torch.equal(batch.targets, expected.targets)
                assert batch.tokens.dtype == batch.targets.dtype == torch.int64
                # the workers are steps ahead of this cursor
                assert loader.cursors == batch.cursors == reference[0].cursors
        reference = loaders(corpus, 5, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_place_before_the_last_step_is_remembered_too(corpus, workers):
    """A rank that could read its part goes back there, if another could not."""
    with loaders(corpus, 5, 1, workers)[0] as loader:
        places = [loader.cursors]
        for step in range(1, 5):
            batch = next(loader)
            places.append(loader.cursors)
            assert places[-1] == batch.cursors != places[-2]
            loader.restart([])
            assert loader.cursors == places[-2]
            again = next(loader)
            assert (again.first, again.cursors) == (5 * step - 5, batch.cursors)
            assert torch.equal(again.tokens, batch.tokens)


def test_resume_twice_over_epochs_with_other_ranks_and_workers(corpus):
    straight = loaders(corpus, 5, 1)
    expected = [global_batch(straight) for _ in range(60)]
    assert max(cursor["epoch"] for cursor in straight[0].cursors.values()) >= 2
    ranks = loaders(corpus, 5, 2)
    found = [global_batch(ranks) for _ in range(7)]
    ranks = loaders(corpus, 5, 3, 0, all_cursors(ranks), 7)
    found += [global_batch(ranks) for _ in range(30)]
    with loaders(corpus, 5, 1, 2, all_cursors(ranks), 37)[0] as loader:
        found += [global_batch([loader]) for _ in range(13)]
        cursors = all_cursors([loader])
    ranks = loaders(corpus, 5, 4, 0, cursors, 50)
    found += [global_batch(ranks) for _ in range(10)]
    assert found == expected
    assert all_cursors(ranks) == all_cursors(straight)


def test_resume_before_the_first_step_and_before_a_stream_was_read(corpus):
    fresh = loaders(corpus, 2, 1)
    again = loaders(corpus, 2, 2, 0, all_cursors(fresh), 0)
    assert [global_batch(again) for _ in range(2)] == [global_batch(fresh) for _ in range(2)]
    again = loaders(corpus, 2, 2, 0, all_cursors(fresh), 2)  # streams 4 and 5 come next, for the first time
    assert [global_batch(again) for _ in range(5)] == [global_batch(fresh) for _ in range(5)]


def test_seeds_differ(maker, corpus):
    assert global_batch(loaders(corpus, 6, 1)) != global_batch(loaders(maker.open(streams=6, seed=8), 6, 1))


def test_fewer_documents_than_streams(maker):
    maker.write(["only one document", "and another"])
    corpus = maker.open(streams=8)
    reference = loaders(corpus, 8, 1)
    expected = [global_batch(reference) for _ in range(10)]
    ranks = loaders(corpus, 8, 3)
    assert [global_batch(ranks) for _ in range(10)] == expected
    ranks = loaders(corpus, 8, 5, 0, all_cursors(ranks), 10)
    assert global_batch(ranks) == global_batch(reference)


def test_more_ranks_than_streams_leaves_some_empty(corpus):
    ranks = loaders(corpus, 4, 8)
    batches = [next(loader) for loader in ranks]
    assert [len(batch.tokens) for batch in batches] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert batches[7].tokens.shape == batches[7].targets.shape == (0, SEQ_LEN)
    assert ranks[7].cursors == batches[7].cursors == {}


def test_no_held_out_text_is_trained_on(maker):
    texts = maker.texts(40)
    maker.write(texts)
    corpus = maker.open(Validation(fraction=0.25))
    (loader,) = loaders(corpus, 8, 1)
    text = "".join(corpus.tokenizer.decode(row.tolist()) + "|" for _ in range(40) for row in next(loader).tokens)
    held_out = [document.text for document in all_documents(corpus.source) if document in corpus.held_out]
    assert len(held_out) == 10
    assert not any(document.split(":")[0] + ":" in text for document in held_out)
    assert all(document.split(":")[0] + ":" in text for document in texts if document not in held_out)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_next_batch_is_made_ready_beside_the_step_and_counts_when_it_is_taken(corpus, workers):
    (reference,) = loaders(corpus, 4, 1)
    with loaders(corpus, 4, 1, workers)[0] as loader:
        for _ in range(3):
            batch, expected = next(loader), next(reference)
            assert torch.equal(batch.tokens, expected.tokens)
            assert is_done(loader._coming, HANG)  # nobody asked for it
            assert loader.cursors == reference.cursors == batch.cursors
        assert loader._coming.result()[0].first == 12


def test_document_mask_gives_ids(maker, corpus):
    assert next(loaders(corpus, 4, 1)[0]).document_ids is None
    (loader,) = loaders(maker.open(streams=6, document_mask=True), 4, 1)
    batch = next(loader)
    assert torch.equal(batch.document_ids, document_ids(batch.tokens, 256))
    assert batch.document_ids.max() > 0


def test_replaced_bytes_reach_the_trainer(maker):
    (maker.folder / "a.txt").write_bytes(b"\xff" * 3 + b"x" * 117)
    (maker.folder / "b.txt").write_bytes(b"good" * 30)
    (loader,) = loaders(maker.open(streams=2, shuffle_documents=1), 2, 1)
    assert [next(loader).replaced for _ in range(2)] == [3, 0]


def test_random_state_of_the_trainer_is_left_alone(corpus):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with loaders(corpus, 4, 1, 1)[0] as loader:
        next(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_cursors_that_do_not_fit_are_refused(corpus, maker):
    ranks = loaders(corpus, 6, 1)
    for _ in range(4):
        global_batch(ranks)
    cursors = all_cursors(ranks)
    with pytest.raises(UserError, match=r"sequence 12 of the data, but its streams stand at 24"):
        loaders(corpus, 3, 1, 0, cursors, 4)
    with pytest.raises(UserError, match=r"data\.streams = 7, but .* 6 streams\. Set data\.streams = 6"):
        loaders(maker.open(streams=7), 6, 1, 0, cursors, 4)
    del cursors["0"]
    with pytest.raises(UserError, match="5 streams"):
        loaders(corpus, 6, 1, 0, cursors, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_the_users_message(maker, workers):
    maker.write(maker.texts(30))
    corpus = maker.open(streams=2, shuffle_documents=2)
    path = maker.folder / "part-0.jsonl"
    lines = path.read_text().splitlines()
    lines[20] = "{" + "x" * (len(lines[20]) - 1)
    path.write_text("\n".join(lines) + "\n")
    with loaders(corpus, 4, 1, workers)[0] as loader, pytest.raises(UserError) as error:
        read(loader, 100)
    assert str(error.value).startswith(f"{path}, line 21: not valid JSON")
    assert "Traceback" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_killed_worker_ends_the_run_with_a_message(corpus):
    with loaders(corpus, 4, 1, 1)[0] as loader:
        next(loader)
        os.kill(loader._processes[0].process.pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match=r"data loader process ended unexpectedly.*out of memory.*num_workers"):
            read(loader, 100)


def test_workers_outlive_the_schedulers_signals_and_end_with_close(corpus):
    loader = loaders(corpus, 4, 1, 1)[0]
    next(loader)
    worker = loader._processes[0].process
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    for _ in range(20):
        next(loader)
    assert worker.is_alive()
    pid = worker.pid
    loader.close()
    loader.close()
    wait_for_end(pid)


def test_close_does_not_wait_for_a_worker_that_is_stopped(corpus):
    loader = loaders(corpus, 4, 1, 2)[0]
    next(loader)
    os.kill(loader._processes[0].process.pid, signal.SIGSTOP)
    for _ in range(3 * PREFETCH_STEPS):
        if loader.wait(0.01):
            next(loader)
    closing = threading.Thread(target=loader.close, daemon=True)
    closing.start()
    closing.join(HANG)
    assert not closing.is_alive()


def test_workers_need_no_shared_memory(corpus, monkeypatch):
    """Containers often have little of it, and multiprocessing's queues and locks take semaphores from there."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", refuse)
    with loaders(corpus, 4, 1, 1)[0] as loader:
        assert torch.equal(next(loader).tokens, next(loaders(corpus, 4, 1)[0]).tokens)


class _Endless:
    """Parts that are their numbers; a file has as many bytes as were made."""

    def __init__(self, path, size, last=None):
        self.path, self.size, self.last = path, size, last

    def __iter__(self):
        for number in itertools.count():
            if number == self.last:
                raise ZeroDivisionError("a fault of the program")
            with self.path.open("a") as file:
                file.write("x")
            yield np.full(self.size, number, dtype=np.uint8)


@pytest.mark.parametrize("size", [1, 1 << 20])  # the pipe takes up hundreds of the one, and nothing of the other
def test_a_worker_is_a_few_steps_ahead_and_no_more(tmp_path, size):
    process = LoaderProcess(_Endless(tmp_path / "made", size))
    try:
        for taken in range(1, 4):
            assert process.receive()[0] == taken - 1
            most = taken + PREFETCH_STEPS
            wait_until(lambda most=most: (tmp_path / "made").stat().st_size == most)
            time.sleep(0.05)
            assert (tmp_path / "made").stat().st_size == most
    finally:
        process.kill()
        process.close()


class _Unsendable:
    def __iter__(self):
        yield lambda: None  # which pickle refuses


def test_a_part_that_cannot_be_sent_ends_the_worker_and_not_in_a_hang():
    process = LoaderProcess(_Unsendable())
    with pytest.raises(RunFailed, match=r"ended unexpectedly \(exit code 1\)"):
        process.receive()
    process.kill()
    process.close()


def test_a_fault_of_the_program_in_a_worker_is_told_with_its_traceback(tmp_path):
    process = LoaderProcess(_Endless(tmp_path / "made", 1, last=1))
    try:
        process.receive()
        with pytest.raises(RuntimeError, match=r"(?s)in a data loader process:.*in __iter__.*ZeroDivisionError: a fau"):
            process.receive()
    finally:
        process.kill()
        process.close()


SCRIPT = """
import os, signal, sys, time
from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import BatchLoader, Shape, open_corpus

if __name__ == "__main__":
    corpus = open_corpus(Data(source="builtin", tokenizer="byte"), Validation(), 0)
    loader = BatchLoader(corpus, [Shape(0, 8, 64)], num_workers=2)
    next(loader)
    if sys.argv[1] == "ctrl-c":
        os.killpg(0, signal.SIGINT)
        time.sleep(1000)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["ctrl-c", "no close"])
def test_a_script_that_ends_leaves_no_worker_and_no_workers_traceback(tmp_path, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), how],
        capture_output=True,
        check=False,
        text=True,
        start_new_session=True,
        timeout=HANG,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stderr.count("Traceback") == (1 if how == "ctrl-c" else 0), done.stderr
    assert ("KeyboardInterrupt" in done.stderr) == (how == "ctrl-c")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the processes in /proc")
def test_a_trainer_that_is_killed_leaves_no_process_behind(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "script.py"), "kill"]
    # What is left behind would hold a pipe open: nothing is captured.
    trainer = subprocess.Popen(command, start_new_session=True, env=env)
    assert trainer.wait(timeout=HANG) == -signal.SIGKILL
    try:
        wait_until(lambda: not in_session(trainer.pid), lambda: f"still alive: {in_session(trainer.pid)}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)


def in_session(session):
    """The processes of a session that are alive: {pid: state}."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, _, _, owner = file.read().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(owner) == session and state != "Z":
            found[int(pid)] = state
    return found


@pytest.mark.parametrize("pidfd", [True, False])
def test_the_end_of_a_process_is_seen(monkeypatch, pidfd):
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    watch = threading.Thread(target=wait_for_end, args=(child.pid,), daemon=True)
    watch.start()
    time.sleep(0.2)
    assert watch.is_alive()
    child.communicate()
    watch.join(HANG)
    assert not watch.is_alive()
    wait_for_end(child.pid)  # gone before


def test_parquet_and_huggingface_through_workers(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(2):
        rows = [f"file {number} row {i} " * 3 for i in range(20)]
        pq.write_table(pa.table({"text": rows}), folder / f"{number}.parquet", row_group_size=4)
    keys = {"path": str(folder), "tokenizer": "byte", "streams": 4, "shuffle_documents": 3}
    for source in ("local", "huggingface"):
        corpus = open_corpus(Data(source=source, **keys), Validation(fraction=0), 0)
        straight = loaders(corpus, 4, 1)
        expected = [global_batch(straight) for _ in range(30)]
        # Two workers: in those of torch, `datasets` would by itself split the shards of every unit among them.
        with loaders(corpus, 4, 1, 2)[0] as loader:
            found = [global_batch([loader]) for _ in range(11)]
            cursors = all_cursors([loader])
        ranks = loaders(corpus, 4, 2, 0, cursors, 11)
        found += [global_batch(ranks) for _ in range(19)]
        assert found == expected
        text = "".join(
            bytes(tokens[:-1]).decode("latin1") if max(tokens) < 256 else "" for b in found for tokens, _ in b.values()
        )
        assert "file 0" in text
        assert "file 1" in text


# Temporary folders


@pytest.fixture
def new_sockets(monkeypatch):
    """multiprocessing has chosen no folder for its sockets yet."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)


@pytest.mark.parametrize("length, folder", [(75, None), (76, "/tmp")])
def test_sockets_lie_where_their_names_fit(monkeypatch, new_sockets, length, folder):
    usual = "/" + "x" * (length - 1)
    monkeypatch.setattr(tempfile, "tempdir", usual)
    _make_sockets_where_their_names_fit()
    chosen = multiprocessing.current_process()._config["tempdir"]
    assert (chosen and os.path.dirname(chosen)) == folder
    assert tempfile.gettempdir() == usual


@pytest.mark.parametrize("length", [75, 76])
def test_75_bytes_is_what_fits(monkeypatch, length):
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short + "/" + "x" * (length - len(short) - 1), "pymp-abcdefgh")
        folder.mkdir(parents=True)
        monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(folder))
        with nullcontext() if length == 75 else pytest.raises(OSError, match="too long"):
            multiprocessing.connection.Listener(family="AF_UNIX").close()


def test_workers_start_under_a_long_tmpdir(tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    program = """
from swamla_titan.config.sections import Data, Validation
from swamla_titan.data import BatchLoader, Shape, open_corpus
if __name__ == "__main__":
    corpus = open_corpus(Data(source="builtin", tokenizer="byte", num_workers=1), Validation(), 0)
    with BatchLoader(corpus, [Shape(0, 2, 16)]) as loader:
        print(next(loader).tokens.shape)
"""
    script = tmp_path / "script.py"
    script.write_text(program)
    out = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True
    )
    assert out.stdout == "torch.Size([2, 16])\n", out.stderr


def test_without_any_folder_for_sockets_the_message_names_tmpdir(monkeypatch, new_sockets):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 90)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(
        UserError, match=r"none in /tmp \(Permission denied\). Set TMPDIR to a folder of at most 75 bytes"
    ):
        _make_sockets_where_their_names_fit()
