"""Selects the data files of a folder by their endings, without files that only describe the data."""

import os
import re
import stat
from dataclasses import dataclass, field, replace

from swamla_titan.data.sources.files import DECOMPRESSORS, compression, files_below, is_folder, is_url, reading, size_of
from swamla_titan.errors import UserError
from swamla_titan.escaping import one_line

TEXT, JSON_LINES, PARQUET = (".txt", ".md"), (".jsonl", ".json"), (".parquet",)
KINDS = (*TEXT, *JSON_LINES, *PARQUET)
PACKED = (*DECOMPRESSORS, ".zip", ".lz4")
# Files of text are read compressed too; parquet compresses its own columns.
KNOWN = (*KINDS, *(kind + ending for kind in (*TEXT, *JSON_LINES) for ending in DECOMPRESSORS))
COMPRESSED = tuple({kind + packed for kind in KINDS for packed in PACKED} - {*KNOWN})  # those that are not read
_KNOWN = f"{', '.join(KINDS)}; text also as {', '.join(DECOMPRESSORS)}"
# Data that is not read here; a README beside such files describes them.
OTHER_DATA = (".csv", ".tsv", ".arrow", ".feather", ".avro", ".orc", ".tar", ".bin", ".npy", ".h5", ".warc", *PACKED)

# Files of these names describe the data or their package.
_ABOUT_TEXT = re.compile(
    r"((read[-_ ]?me|licen[cs]es?|copying|change[-_ ]?log|requirements|third[-_ ]?party)([-_. ][\w.-]{0,24})?"
    r"|copyrights?|notices?|changes|release[-_ ]?notes|authors|contributors|contributing|citations?|maintainers"
    r"|code[-_ ]of[-_ ]conduct|security|(data|dataset|data[-_]set|model)[-_ ]?(card|sheet|statement)|constraints"
    r"|robots|checksums?|(md5|sha1|sha256|sha512)(sums?)?|manifest|top_level|entry_points|dependency_links|requires"
    r"|sources|cmakelists)\.(md|txt)"
)
_ABOUT_JSON = re.compile(
    r"(dataset_infos?|dataset_dict|state|.*[-_.]?metadata|datapackage|croissant|.*[-_.]?schema|manifest|catalog|index"
    r"|.*[-_.]?stat(istic)?s|.*[-_.]?config|package(-lock)?|composer|tokenizer|vocab|special_tokens_map"
    r"|.*\.safetensors\.index|.*\.info)\.json"
)
# So do all files in folders of these names: logs of tables, unfinished output, metadata of packages.
_ABOUT_FOLDER = re.compile(
    r"_temporary|_delta_log|_spark_metadata|_change_data|__macosx|__pycache__|.*\.(egg-info|dist-info)"
)


@dataclass(frozen=True)
class Listing:
    """The files below the folder `root`, as sorted names relative to it."""

    root: str
    names: list[str]  # to be read
    about: list[str]  # that describe the data
    unknown: list[str]  # of other kinds
    sizes: dict[str, int] = field(default_factory=dict)  # of the files of a store, which lists them with their names


def find_files(path: str, setting: str) -> Listing:
    """Find the files at `path`; UserError if there is none to read, or a compressed one that would be left out.

    `setting` names the configuration key that `path` came from.
    """
    if not path:
        raise UserError(f"{setting} is empty: give a file or folder ({_KNOWN}).")
    if is_url(path):
        return _in_store(path, setting)
    path = os.path.expanduser(path)
    mode = _mode(path, setting)
    if stat.S_ISDIR(mode):
        return _selected(path, _below(path, setting), setting)
    if not stat.S_ISREG(mode):
        raise UserError(f"{setting}: {path} is not a regular file but {special_kind(mode)}; give a file or a folder.")
    return _file(path, setting)


def root_of(path: str) -> str:
    """The folder that names of the files at `path` are relative to; Faults if a store does not answer."""
    if is_url(path):
        with reading(path):
            return path if is_folder(path) else os.path.dirname(path)
    path = os.path.expanduser(path)
    return path if os.path.isdir(path) else os.path.dirname(path)


def _in_store(url: str, setting: str) -> Listing:
    with reading(url):
        try:
            sizes = files_below(url)
        except FileNotFoundError as error:
            raise UserError(f"{setting}: {url} does not exist.") from error
        if sizes is None:
            listing = _file(url, setting)
            return replace(listing, sizes={listing.names[0]: size_of(url)})
    if not sizes:
        raise UserError(f"{setting}: {url} does not exist, or holds no files.")
    return replace(_selected(url, list(sizes), setting), sizes=sizes)


def _file(path: str, setting: str) -> Listing:
    if path.lower().endswith(COMPRESSED):
        raise _compressed(setting, path, 1)
    if not path.lower().endswith(KNOWN):
        raise UserError(f"{setting}: {path} is of an unknown kind. Known: {_KNOWN}.")
    return Listing(os.path.dirname(path), [os.path.basename(path)], [], [])


def _selected(path: str, found: list[str], setting: str) -> Listing:
    """Of the files found below a folder those to be read, and the others."""
    readable = [name for name in found if name.lower().endswith(KNOWN)]
    about = _about(readable, found)
    names = [name for name in readable if name not in about]
    unknown = [name for name in found if not name.lower().endswith(KNOWN)]
    compressed = [
        name
        for name in unknown
        if name.lower().endswith(COMPRESSED) and not (names and _is_about(name.rpartition(".")[0]))
    ]
    if compressed:
        raise _compressed(setting, os.path.join(path, compressed[0]), len(compressed))
    if not names:
        there = sorted({os.path.splitext(name)[1].lower() for name in unknown} & {*OTHER_DATA})
        advice = f' data.source = "huggingface" reads {", ".join(there)}.' if {".csv", ".arrow"} & {*there} else ""
        only = f" but files about the data ({listed(sorted(about))})" if about else ""
        raise UserError(f"{setting}: {path} holds no file of a known kind{only}. Known: {_KNOWN}.{advice}")
    return Listing(path, names, sorted(about), unknown)


def kind(name: str) -> str:
    """The ending by which a file's name says what it holds, whether it is compressed or not."""
    return os.path.splitext(name.lower().removesuffix(compression(name)))[1]


def listed(names: list[str], most: int = 3) -> str:
    """The first of some names, for a message."""
    return ", ".join(one_line(name[:100]) for name in names[:most]) + (", ..." if len(names) > most else "")


def special_kind(mode: int) -> str:
    """The kind of a file that is not regular, in words."""
    kinds = [(stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a folder")]
    return next((words for test, words in kinds if test(mode)), "a device")


def _mode(path: str, setting: str) -> int:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{setting}: {path} does not exist.{_hint(path)}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{setting}: {path} cannot be read: {reason}") from error


def _hint(path: str) -> str:
    """A hint on what may be meant by a path that does not exist."""
    if os.path.islink(path):
        return f" It is a link to {os.readlink(path)}."
    if "://" in path:
        return ' Only disks and object stores are read; data.source = "huggingface" streams a dataset of the Hub.'
    if re.search(r"[*?\[{]", path):
        return " Patterns are not expanded: give the folder; it is read with all that is below it."
    if any(os.path.exists(part.strip()) for part in re.split("[,;:]", path) if part.strip()):
        return " Give one file or folder: lay the files, or links to them, in one folder."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return ' If it is a dataset of the Hub, set data.source = "huggingface".'
    return ""


def _below(path: str, setting: str) -> list[str]:
    """Sorted names of all files below a folder, except hidden ones and those in hidden folders."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{setting}: {error.filename} cannot be read: {error.strerror}") from error

    found: list[str] = []
    seen: set[str] = set()  # folders, because links may lead to one twice, or in a circle
    for folder, folders, files in os.walk(path, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        found += [os.path.relpath(os.path.join(folder, name), path) for name in files if not name.startswith(".")]
    return sorted(found)


def _about(readable: list[str], found: list[str]) -> set[str]:
    """The readable files that describe the data: JSON files beside any others, text files beside records or other data.

    In a folder of text alone all files are data, a README included.
    """
    suspects = {name for name in readable if _is_about(name)}
    data = [name for name in readable if name not in suspects]
    records = any(kind(name) in (*JSON_LINES, *PARQUET) for name in data)
    if records or any(name.lower().endswith(OTHER_DATA) for name in found if name not in readable):
        return suspects
    of_json = {name for name in suspects if kind(name) in JSON_LINES}
    return of_json if len(of_json) < len(readable) else set()


def _is_about(name: str) -> bool:
    *folders, file = name.lower().removesuffix(compression(name)).split(os.sep)
    if any(_ABOUT_FOLDER.fullmatch(folder) for folder in folders):
        return True
    return bool(_ABOUT_TEXT.fullmatch(file) or _ABOUT_JSON.fullmatch(file))


def _compressed(setting: str, file: str, count: int) -> UserError:
    also = f" and {count - 1} more" if count > 1 else ""
    return UserError(
        f"{setting}: {file}{also}: files compressed in this way are not read. Decompress them, compress them as "
        f"{', '.join(DECOMPRESSORS)}, or move them elsewhere."
    )
