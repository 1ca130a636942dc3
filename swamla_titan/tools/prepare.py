"""`data prepare`: tokenize a source into shards (data/shards.py) with all cores; a kill loses seconds and no byte.

    the units of the source   consecutive ones are a piece, some hundred or more in all
       |  each process tokenizes one piece after the other
       v
    OUT/.preparing/000012.*   the piece's tokens, index and counts; the last has its name when all three are complete
       |  when all are there, they are joined in order, without duplicates if that is asked for
       v
    OUT                       shards and index; the manifest last

What a piece holds depends on the source and its number alone, and where shards begin on the documents alone. So the
bytes are the same however often the preparation was interrupted, and by how many processes it was done.
"""

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any, TextIO

import numpy as np

from swamla_titan.config.mixture import data_of_sources
from swamla_titan.config.sections import Data
from swamla_titan.data import load_tokenizer, pinned
from swamla_titan.data.changes import files_by_name
from swamla_titan.data.corpus import retry_of
from swamla_titan.data.document import MIB, Source
from swamla_titan.data.faults import DataFault
from swamla_titan.data.retry import Retry, read_on
from swamla_titan.data.shards import (
    INDEX,
    MANIFEST,
    RECORD,
    WORK,
    Manifest,
    ShardRecord,
    TokenizerRecord,
    checksum,
    dtype_for,
    new_digest,
    read_manifest,
    shard_name,
)
from swamla_titan.data.sources import open_source
from swamla_titan.data.sources.files import version_of
from swamla_titan.data.sources.folder import listed, root_of
from swamla_titan.data.sources.local import REQUESTS, counted, readable_size
from swamla_titan.data.sources.shards import description as shards_in_words
from swamla_titan.data.tokenizer import Tokenizer, with_eot
from swamla_titan.data.worker import fork_server, settle
from swamla_titan.errors import EXIT_DONE, EXIT_STOPPED, RunFailed, UserError
from swamla_titan.escaping import one_line
from swamla_titan.system.bounded import Count, fit, parse_json, read_regular
from swamla_titan.system.machine import cores
from swamla_titan.system.progress import Progress

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30  # of tokens; a document that does not fit begins the next shard
PIECES = 256  # at least, if there is text for so many, so that all processes end together
SMALLEST_PIECE, LARGEST_PIECE = 256 << 10, 64 * MIB  # of text; the larger, the more a kill loses
_TASK, _FILES, _LOCK = "task.json", "files.json", "lock"
_SORTED = 1 << 24  # documents whose hashes are compared at a time
_COPIED = 8 * MIB
_MOST_JSON = 1 << 30  # bytes; a million files have some 100 MB of names


@dataclass
class Piece:
    """What is known of a piece beside its tokens and its index.

    `units`: the documents of each unit. `damaged`: file -> what could not be read; the rest of the file is left out.
    """

    units: list[Count] = field(default_factory=list)
    tokens: Count = 0
    bytes: Count = 0
    replaced: Count = 0
    empty: Count = 0
    damaged: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What is prepared, and how; the processes get a copy.

    `starts`: the first unit of each piece, and behind the last one the number of units.
    """

    source: Source
    data: Data
    folder: Path  # of the pieces
    starts: list[int]

    @property
    def pieces(self) -> range:
        return range(len(self.starts) - 1)

    def units(self, piece: int) -> range:
        return range(self.starts[piece], self.starts[piece + 1])

    def path(self, piece: int, ending: str) -> Path:
        return self.folder / f"{piece:06}.{ending}"

    def is_done(self, piece: int) -> bool:
        """Whether it is tokenized already."""
        return self.path(piece, "json").exists()

    def text_bytes(self, piece: int) -> int:
        """About how much text a piece holds; 1 if that is known only after reading."""
        return sum(self.source.unit_sizes[unit] for unit in self.units(piece)) if self.source.sizes_are_known else 1


def prepare(data: Data, out: str, deduplicate: bool = False, processes: int = 0, only: str | None = None) -> int:
    """Prepare the source that [data] names, of a mixture the one that is called `only`; returns the exit code.

    `processes` 0: one for each core. UserError for data or a folder that cannot be used; a fault of the data ends it
    too, unless data.on_error = "skip_file". What is prepared by then is kept, and the same call continues.
    """
    if processes < 0:
        raise UserError(f"--processes {processes}: expected 0 (one for each core) or more")
    folder, data = Path(os.path.expanduser(out)), pinned(_source_of(data, only))
    _require_outside(folder, data)
    tokenizer = load_tokenizer(data.tokenizer)
    source = open_source(data, retry_of(data))
    if source.index:
        raise UserError(f"{data.path} is prepared already: give its text, to prepare it in another way")
    identity, starts = _identity(data, source, tokenizer, deduplicate), _pieces_of(source)
    with _working_folder(folder, identity, {"pieces": repr(starts)}, _versions(source, data)) as work:
        if work is None:
            print(one_line(f"{folder} is prepared already, from the same source in the same way"))
            return EXIT_DONE
        print(one_line(" ".join(filter(None, (data.source, data.path))) + f": {source.description}"))
        task = Task(source, data, work, starts)
        began = time.monotonic()
        try:
            with _stopped_by_signals():
                _require_unchanged(task, folder)
                _tokenize(task, processes or cores(), tokenizer)
                _require_unchanged(task, folder)
                manifest = _join(task, folder, identity, tokenizer)
        except _Stopped as stop:
            print(f"stopped by {stop}; what is prepared is kept, and the same command continues")
            return EXIT_STOPPED
        except OSError as error:
            raise _unusable(folder, error) from error
    print(_report(manifest, folder, time.monotonic() - began))
    return EXIT_DONE


def _identity(data: Data, source: Source, tokenizer: Tokenizer, deduplicate: bool) -> dict[str, Any]:
    """What the shards are of, and how they are made, as the manifest has it."""
    return {
        "source": {
            "source": data.source,
            "path": data.path,
            **{name: getattr(data, name) for name in source.keys if name != "path"},
            "max_document_mib": data.max_document_mib,
            "fingerprint": source.fingerprint,
        },
        "tokenizer": asdict(_record_of(tokenizer)),
        "deduplicated": deduplicate,
    }


def _source_of(data: Data, only: str | None) -> Data:
    """The section of the source to prepare; UserError if it is not one."""
    sources = {name: section for name, section in data_of_sources(data).items() if name}
    if only in sources or (only is None and not sources):
        # Local files are cut for the streams that read them; pieces must be the same whatever these are.
        return replace(sources[only] if only else data, streams=Data().streams)
    names = ", ".join(sources) or "there are none"
    found = "a mixture is prepared source by source: choose one by --only" if only is None else f"no source {only!r}"
    raise UserError(f"data.sources: {found} ({names})")


def _require_outside(folder: Path, data: Data) -> None:
    """Raise UserError for shards among the files that they are made of, which would be other files then."""
    path = Path(os.path.expanduser(data.path)).resolve() if data.path else None
    if path and path.is_dir() and path in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"{folder} is in the folder that is read, {data.path}: choose one elsewhere for the shards")


def _record_of(tokenizer: Tokenizer) -> TokenizerRecord:
    return TokenizerRecord(tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eot_id)


def _pieces_of(source: Source) -> list[int]:
    """Where pieces begin, by the size of their text; a unit each if sizes are not known. It ends with all units."""
    size = max(SMALLEST_PIECE, min(LARGEST_PIECE, (source.text_bytes or 0) // PIECES))
    starts, held = [0], 0
    for unit, unit_size in enumerate(source.unit_sizes):
        if held and (held >= size or not source.sizes_are_known):
            starts.append(unit)
            held = 0
        held += max(1, unit_size)
    return [*starts, source.num_units]


# The folder of the shards


@contextlib.contextmanager
def _working_folder(
    folder: Path, identity: dict[str, Any], layout: dict[str, Any], versions: dict[str, str]
) -> Iterator[Path | None]:
    """Hold the folder of the pieces; None if the shards are complete already.

    `identity`: what the shards are of; `layout`: beside it what the pieces are of; `versions`: of the files. UserError
    if the folder holds anything else, is used by another process, or cannot be written.
    """
    work = folder / WORK
    try:
        if (folder / MANIFEST).exists():
            found = read_manifest(str(folder), "OUT").to_json()
            _require_same(folder, {name: found[name] for name in identity}, identity, "prepared shards")
            shutil.rmtree(work, ignore_errors=True)  # if a kill left something of it
            yield None
            return
        if folder.exists() and not work.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is not empty: choose another folder for the shards")
        work.mkdir(parents=True, exist_ok=True)
        with (work / _LOCK).open("w") as lock:
            _acquire(lock, folder)
            task = work / _TASK
            if not task.exists() and not {each.name for each in work.iterdir()} <= {_LOCK, f"{_TASK}.new"}:
                raise UserError(f"{work} was not written by this program: choose another folder for the shards")
            if task.exists() and any(work.glob("[0-9]*.json")):
                found = parse_json(read_regular(task, _MOST_JSON))
                changed = _changed_files(work, versions)
                _require_same(folder, found, identity | layout, "an unfinished preparation", changed)
            else:  # of other settings nothing is there yet
                _write(task, json.dumps(identity | layout).encode())
            yield work
            if (folder / MANIFEST).exists():
                shutil.rmtree(work)
    except OSError as error:
        raise _unusable(folder, error) from error


def _acquire(lock: TextIO, folder: Path) -> None:
    """Lock the folder as long as the file is open; UserError if another process has."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process prepares shards there; wait for its end or stop it") from None
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): let no other process prepare shards there", folder, error.strerror)


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{error.filename or folder}: {error.strerror or error}; what is prepared in {folder} is kept")


def _require_same(folder: Path, found: Any, identity: dict[str, Any], what: str, changed: Iterable[str] = ()) -> None:
    """Raise UserError if the folder holds what was prepared in another way; it names files that `changed`."""
    if found == identity:
        return
    before, now = (
        {f"{name}.{key}": value for name, part in each.items() for key, value in _items(part)}
        for each in (found if isinstance(found, dict) else {}, identity)
    )
    differing = [name for name in now if before.get(name) != now[name]]
    shown = "; ".join(f"{name} = {before.get(name)!r} there, {now[name]!r} now" for name in differing[:3])
    shown += f"; files that changed: {listed([*changed])}" if changed else ""
    raise UserError(f"{folder} holds {what} of other data or settings: {shown}. Remove it, or choose another folder")


def _items(part: Any) -> Iterable[tuple[str, Any]]:
    return part.items() if isinstance(part, dict) else [("value", part)]


def _require_unchanged(task: Task, folder: Path) -> None:
    """Note the versions of the files; UserError if one changed of which pieces are tokenized.

    Their text would be joined with that of another version. Files of which there is nothing yet may change, for example
    because a damaged one was downloaded again.
    """
    now, files = _versions(task.source, task.data), task.source.unit_files
    tokenized = {files[unit] for piece in filter(task.is_done, task.pieces) for unit in task.units(piece)}
    untouched = {*files} - tokenized
    changed = [name for name in _changed_files(task.folder, now) if name not in untouched]
    if changed and tokenized:  # units of `datasets` do not tell which files they are of
        found = f"{counted(len(changed), 'file')} changed since the preparation of {folder} began ({listed(changed)})"
        raise UserError(f"{found}: the shards would hold text of before and after. Remove {folder}, and prepare again")
    _write(task.folder / _FILES, json.dumps(now).encode())


def _changed_files(work: Path, now: dict[str, str]) -> list[str]:
    """The names of files that are not as they were noted, with those that are gone or new."""
    noted = work / _FILES
    before = parse_json(read_regular(noted, _MOST_JSON)) if noted.exists() else now
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _versions(source: Source, data: Data) -> dict[str, str]:
    """The version of each file of the source, "" if it cannot be read; none if the files are not known."""
    names = [*files_by_name(source.record)]
    if not names:
        return {}
    root = retry_of(data).call(lambda: root_of(data.path))

    def version(name: str) -> str:
        with contextlib.suppress(DataFault):
            return retry_of(data).call(lambda: version_of(os.path.join(root, name)))
        return ""

    with ThreadPoolExecutor(REQUESTS) as threads:
        return dict(zip(names, threads.map(version, names)))


def _write(path: Path, content: bytes) -> None:
    """Write a file that has its name only when it is complete and on the disk."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(content)
        _flush(file)
    new.replace(path)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


# Pieces


def _tokenize(task: Task, processes: int, tokenizer: Tokenizer) -> None:
    """Tokenize the pieces that are not there yet."""
    done = [*filter(task.is_done, task.pieces)]
    missing = sorted({*task.pieces} - {*done})
    if done:
        print(f"continuing: {len(done)} of {len(task.pieces)} pieces are tokenized already")
    total, unit = sum(map(task.text_bytes, task.pieces)), "B" if task.source.sizes_are_known else " pieces"
    with Progress("tokenizing", total, unit, sum(map(task.text_bytes, done))) as progress:
        for piece, tokens in _tokenized(task, missing, min(processes, len(missing)), tokenizer):
            progress.advance(task.text_bytes(piece), tokens)


def _tokenized(task: Task, missing: list[int], processes: int, tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Tokenize pieces, and yield the number of each with its tokens."""
    if processes <= 1:
        for piece in missing:
            yield piece, _tokenize_piece(task, piece, tokenizer)
        return
    others = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(processes, fork_server(), _begin, (os.getpid(), task)) as pool:
        try:
            running: dict[Future[int], int] = {}
            waiting = iter(missing)
            while True:
                # Two for each process, so that none waits for the next.
                for piece in waiting:
                    running[pool.submit(_work, piece)] = piece
                    if len(running) == 2 * processes:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise RunFailed(
                "A process that tokenizes ended unexpectedly. Mostly the machine is out of memory: look at the "
                "kernel's log, and start the same command again with fewer --processes; it continues."
            ) from error
        except BaseException:
            # Pieces may take minutes, and what these processes leave is written over by the next start.
            for process in {*multiprocessing.active_children()} - others:
                process.kill()
            raise


_of_process: dict[str, Any] = {}  # of a process of the pool: its task and its tokenizer


def _begin(parent: int, task: Task) -> None:
    settle(parent)
    _of_process.update(task=task, tokenizer=load_tokenizer(task.data.tokenizer))


def _work(piece: int) -> int:
    return _tokenize_piece(_of_process["task"], piece, _of_process["tokenizer"])


def _tokenize_piece(task: Task, number: int, tokenizer: Tokenizer) -> int:
    """Write the files of a piece; returns its number of tokens."""
    piece, retry = Piece(), retry_of(task.data)
    paths = [task.path(number, ending) for ending in ("tokens", "index")]
    news = [path.with_suffix(f"{path.suffix}.new") for path in paths]
    with news[0].open("wb") as tokens, news[1].open("wb") as index:
        for unit in task.units(number):
            retry.begin_step()
            piece.units.append(0)
            file = task.source.unit_files[unit]
            if file in piece.damaged:
                continue
            try:
                for content, record in _documents(task.source, unit, tokenizer, retry, piece):
                    tokens.write(content)
                    index.write(record)
                    piece.units[-1] += 1
            except DataFault as fault:
                if task.data.on_error == "stop":
                    raise
                piece.damaged[file] = str(fault)
        _flush(tokens)
        _flush(index)
    for new, path in zip(news, paths):
        new.replace(path)
    _write(task.path(number, "json"), json.dumps(asdict(piece)).encode())
    return piece.tokens


def _documents(
    source: Source, unit: int, tokenizer: Tokenizer, retry: Retry, piece: Piece
) -> Iterator[tuple[bytes, bytes]]:
    """The tokens and the record of each document of a unit, as bytes; counts them in `piece`."""
    dtype = np.dtype(dtype_for(tokenizer.vocab_size)).newbyteorder("<")
    for document in read_on(source, unit, None, 1, 0, retry):
        if document.is_empty:
            piece.empty += 1
            continue
        tokens = with_eot(tokenizer, document.text)
        content, size = tokens.astype(dtype).tobytes(), len(document.text.encode("utf-8", errors="surrogatepass"))
        check = checksum(content, document.hash, size, document.replaced)
        piece.tokens += len(tokens)
        piece.bytes += size
        piece.replaced += document.replaced
        record = (piece.tokens, document.hash, size, document.replaced, check)
        yield content, np.array(record, RECORD).tobytes()


# Joining


@dataclass(frozen=True)
class _Placed:
    """Documents of a piece that stand in a shard, by their numbers in the piece."""

    shard: int
    piece: int
    documents: np.ndarray  # int64 [n], ascending


class _Pieces:
    """All pieces of a task when they are tokenized, and which of their documents are kept."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.all: list[Piece] = []
        self.damaged: dict[str, str] = {}
        for number in task.pieces:
            path = task.path(number, "json")
            try:
                self.all.append(fit(Piece, parse_json(read_regular(path, _MOST_JSON))))
            except ValueError as error:
                raise UserError(f"{path}: {error}. Remove it; the same command makes it again") from None
        counts = [sum(piece.units) for piece in self.all]
        self.starts = np.cumsum([0, *counts])
        self.kept = np.ones(int(self.starts[-1]), dtype=bool)
        self._leave_out_damaged()

    def _leave_out_damaged(self) -> None:
        """Leave out what follows the damage in a file, readable or not, as training does."""
        for number, piece in enumerate(self.all):
            document = int(self.starts[number])
            for unit, count in zip(self._task.units(number), piece.units):
                if self._task.source.unit_files[unit] in self.damaged:
                    self.kept[document : document + count] = False
                document += count
            self.damaged |= piece.damaged

    def leave_out_duplicates(self) -> int:
        """Keep only the first of documents of equal text; returns how many were left out."""
        total, duplicates = len(self.kept), 0
        passes = -(-total // _SORTED)  # each reads the index and compares some of the documents, to bound memory
        for chosen in range(passes):
            found = []
            for number in range(len(self.all)):
                records = self.records(number)
                of_pass = np.flatnonzero(
                    (records["hash"] % np.uint64(passes) == chosen) & self.kept[self.starts[number] :][: len(records)]
                )
                found.append((records["hash"][of_pass], records["checksum"][of_pass], self.starts[number] + of_pass))
            hashes, checksums, numbers = (np.concatenate(part) for part in zip(*found))
            order = np.lexsort((checksums, hashes))  # stable, so the first of equal documents stays the first
            hashes, checksums = hashes[order], checksums[order]
            again = (hashes[1:] == hashes[:-1]) & (checksums[1:] == checksums[:-1])
            self.kept[numbers[order][1:][again]] = False
            duplicates += int(again.sum())
        return duplicates

    def records(self, number: int) -> np.ndarray:
        """The index of a piece, of RECORD."""
        path, count = self._task.path(number, "index"), int(self.starts[number + 1] - self.starts[number])
        records = np.fromfile(path, RECORD)
        if len(records) != count:
            raise UserError(f"{path} was changed: remove the folder {path.parent}, and prepare again")
        return records

    def placed(self, most: int) -> Iterator[tuple[_Placed, np.ndarray]]:
        """Where the kept documents stand in shards of at most `most` tokens, in order; each with the piece's index."""
        shard = filled = 0
        for number in range(len(self.all)):
            records = self.records(number)
            documents = np.flatnonzero(self.kept[self.starts[number] : self.starts[number + 1]])
            lengths = np.diff(records["end"].astype(np.int64), prepend=0)[documents]
            while len(documents):
                ends = filled + np.cumsum(lengths)
                count = int(np.searchsorted(ends, most, side="right"))
                if count == 0 and filled:
                    shard, filled = shard + 1, 0
                    continue
                count = max(1, count)  # a document longer than a shard has one of its own
                yield _Placed(shard, number, documents[:count]), records
                filled = int(ends[count - 1])
                documents, lengths = documents[count:], lengths[count:]


def _join(task: Task, folder: Path, identity: dict[str, Any], tokenizer: Tokenizer) -> Manifest:
    """Join the pieces to shards, and write the manifest."""
    pieces = _Pieces(task)
    duplicates = pieces.leave_out_duplicates() if identity["deduplicated"] else 0
    if not pieces.kept.any():
        raise UserError(
            "there is no text in the source, only empty documents"
            if not pieces.damaged
            else f"nothing of the source can be read: {next(iter(pieces.damaged.values()))}"
        )
    dtype = dtype_for(tokenizer.vocab_size)
    joined = _Joined(task, folder, np.dtype(dtype).itemsize)
    with Progress("joining", int(pieces.kept.sum()), " documents") as progress:
        for placed, records in pieces.placed(SHARD_BYTES // np.dtype(dtype).itemsize):
            joined.add(placed, records)
            progress.advance(len(placed.documents))
        joined.close()
    shards = joined.shards
    manifest = Manifest(
        tokenizer=_record_of(tokenizer),
        dtype=dtype,
        source=identity["source"],
        deduplicated=identity["deduplicated"],
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        replaced=joined.replaced,
        empty=sum(piece.empty for piece in pieces.all),
        duplicates=duplicates,
        skipped=[*map(str, task.source.unreadable), *pieces.damaged.values()],
        index=joined.index_digest,
        shards=shards,
    )
    _write(folder / MANIFEST, json.dumps(manifest.to_json(), indent=1).encode() + b"\n")
    return manifest


class _Joined:
    """The shards and their index, as they are written.

    A shard is complete when its tokens have their name. Pieces are removed behind it, so that there is never much more
    than one copy of the tokens; their indices stay until all is done, and from these an interrupted join continues.
    """

    def __init__(self, task: Task, folder: Path, width: int) -> None:
        self._task, self._folder, self._width = task, folder, width  # bytes of a token
        self._index_path = task.folder / f"{INDEX}.new"
        self._index = self._index_path.open("wb")
        self._index_digest = new_digest()
        self._tokens: IO[bytes] | None = None  # None: the shard is complete already
        self._digest = new_digest()
        self._first_piece = 0  # that was not removed
        self._open = ShardRecord(0, 0, 0, "")
        self.shards: list[ShardRecord] = []
        self.replaced = 0

    @property
    def index_digest(self) -> str:
        return self._index_digest.hexdigest()

    def add(self, placed: _Placed, records: np.ndarray) -> None:
        """Append documents of a piece, whose index is `records`."""
        if placed.shard > len(self.shards):
            self._complete()
        if not self._open.documents:
            self._begin(placed.piece)
        ends = records["end"].astype(np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        documents = placed.documents
        chosen = records[documents]
        chosen["end"] = self._open.tokens + np.cumsum((ends - starts)[documents])
        self._write_index(chosen.tobytes())
        if self._tokens:
            runs = np.split(documents, np.flatnonzero(np.diff(documents) > 1) + 1)
            self._copy(self._task.path(placed.piece, "tokens"), [(starts[run[0]], ends[run[-1]]) for run in runs])
        size, before = int(chosen["bytes"].sum()), self._open
        self._open = ShardRecord(before.documents + len(documents), int(chosen["end"][-1]), before.bytes + size, "")
        self.replaced += int(chosen["replaced"].sum())

    def close(self) -> None:
        """Complete the last shard and the index."""
        self._complete()
        _flush(self._index)
        self._index.close()
        self._index_path.replace(self._folder / INDEX)

    def _write_index(self, content: bytes) -> None:
        self._index.write(content)
        self._index_digest.update(content)

    def _path(self, ending: str = "") -> Path:
        """The current shard among the pieces."""
        return self._task.folder / f"{shard_name(len(self.shards))}{ending}"

    def _begin(self, piece: int) -> None:
        for done in range(self._first_piece, piece):
            self._task.path(done, "tokens").unlink(missing_ok=True)
        self._first_piece = piece
        self._digest = new_digest()
        is_complete = (self._folder / shard_name(len(self.shards))).exists()
        self._tokens = None if is_complete else self._path(".new").open("wb")

    def _copy(self, path: Path, parts: Iterable[tuple[int, int]]) -> None:
        """Append tokens [start, end) of a piece, for each of `parts`."""
        assert self._tokens
        with path.open("rb") as file:
            for start, end in parts:
                file.seek(int(start) * self._width)
                left = int(end - start) * self._width
                while left:
                    content = file.read(min(left, _COPIED))
                    if not content:
                        raise UserError(f"{path} was changed: remove the folder {path.parent}, and prepare again")
                    self._tokens.write(content)
                    self._digest.update(content)
                    left -= len(content)

    def _complete(self) -> None:
        """Give the current shard its name; its digest is written before, because a later start needs it."""
        digest = self._path(".digest")
        if self._tokens:
            _flush(self._tokens)
            self._tokens.close()
            _write(digest, self._digest.hexdigest().encode())
            self._path(".new").replace(self._folder / shard_name(len(self.shards)))
        self.shards.append(replace(self._open, digest=digest.read_text()))
        self._open = ShardRecord(0, 0, 0, "")


def _report(manifest: Manifest, folder: Path, seconds: float) -> str:
    """What was prepared, in some lines."""
    left_out = {
        "only white space": manifest.empty,
        "a text that was there before": manifest.duplicates,
    }
    lines = [
        f"{folder}: {shards_in_words(manifest)}, from {readable_size(manifest.bytes)} of text in {seconds:.1f} s",
        *(f"left out: {counted(number, 'document')} of {what}" for what, number in left_out.items() if number),
        *([f"{counted(manifest.replaced, 'invalid UTF-8 byte sequence')} replaced"] if manifest.replaced else []),
        *(f"skipped, it could not be read: {reason}" for reason in manifest.skipped),
        f'train on it with data.source = "shards" and data.path = "{folder}"',
    ]
    return "\n".join(map(one_line, lines))


# Stopping


class _Stopped(BaseException):
    """A signal asked to stop."""


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise _Stopped inside at the first SIGTERM, SIGINT or SIGUSR1; a second one ends the process."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        restore()
        raise _Stopped(signal.Signals(number).name)

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()
