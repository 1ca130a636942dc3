"""Runs commands of `swamla-titan` on inputs made at random, and says whether each was handled.

Handled means: the command ends by itself within its limits of time and memory, with 0, or with 2 and exactly one
message on standard error that is no traceback, and it has touched nothing outside the folders that it may write.

Each case follows from a number, its seed. CI tries some 10 seconds of seeds from 0 on for each kind of input; the time
decides how many are tried, never whether one passes. For hours by hand, from another first seed, or one case again:

    FUZZ_SECONDS=3600 FUZZ_SEED=100000 python -m pytest tests/fuzz/test_config.py
    FUZZ_CASE=100123 python -m pytest tests/fuzz/test_config.py

A case that is not handled prints its seed, the command and where its whole folder was kept (FUZZ_KEEP, or the folder
for temporary files). A new kind of input needs a function that makes a case in a folder; see tests/fuzz/test_config.py.
"""

import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

WHOLE_MESSAGE = 10_000  # characters; twenty errors of a configuration take about three thousand
_READ = 1 << 20  # bytes of a file that count for whether it was touched


@dataclass(frozen=True)
class Case:
    """A command and the limits it must keep to. Its inputs lie in the folder that it was made in."""

    arguments: list[str]
    may_write: tuple[str, ...] = ()  # paths below the case's folder, as in "work/run"
    environment: dict[str, str] = field(default_factory=dict)
    cpu_seconds: int = 40
    seconds: float = 150.0  # only guards against what waits for ever: a busy machine must not fail a case
    memory: int = 3 << 30  # bytes beyond what the interpreter with torch has mapped
    file_size: int = 256 << 20


@dataclass(frozen=True)
class Outcome:
    """How a command ended: `code` is negative for a signal."""

    case: Case
    code: int
    late: bool  # ended from outside
    seconds: float
    out: str
    err: str
    touched: list[str]

    def __str__(self) -> str:
        shown = f"exit code {self.code}{', over its time' if self.late else ''}, {self.seconds:.1f} s"
        arguments = str(self.case.arguments)
        parts = (arguments[:3000], shown, f"touched: {self.touched}", "--- out", self.out[-3000:], "--- err")
        return "\n".join((*parts, self.err[:2000], self.err[2000:][-3000:]))


class Bench:
    """Runs cases, each in a new folder below `root` that holds `work` (the current folder), `home`, `tmp`, `beside`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # CUDA does not survive a fork
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(root / "huggingface"),
            "TIKTOKEN_CACHE_DIR": os.environ.get("TIKTOKEN_CACHE_DIR", str(root / "tiktoken")),
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def folder(self, name: str) -> Path:
        """An empty case's folder; one of the same name is removed."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("work", "home", "tmp", "beside"):
            (folder / part).mkdir(parents=True)
        (folder / "beside" / "precious.txt").write_text("a file of somebody else\n")
        return folder

    def run(self, case: Case, folder: Path) -> Outcome:
        """Run the command in `folder/work`."""
        before = listing(folder, case.may_write)
        out, err = (folder.with_name(f"{folder.name}.{name}") for name in ("out", "err"))
        request = {
            "arguments": case.arguments,
            "cwd": str(folder / "work"),
            "environment": {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")} | case.environment,
            "out": str(out),
            "err": str(err),
            "cpu_seconds": case.cpu_seconds,
            "seconds": case.seconds,
            "memory": case.memory,
            "file_size": case.file_size,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        after = listing(folder, case.may_write)
        return Outcome(
            case=case,
            code=answer["status"],
            late=answer["late"],
            seconds=answer["seconds"],
            out=out.read_bytes().decode(errors="replace"),
            err=err.read_bytes().decode(errors="replace"),
            touched=sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path)),
        )


def listing(folder: Path, leaving_out: tuple[str, ...] = ()) -> dict[str, tuple[object, ...]]:
    """What tells whether anything below a folder was made, changed or removed; special files are not opened."""
    found: dict[str, tuple[object, ...]] = {}
    skipped = {folder / name for name in leaving_out}
    for at, folders, files in os.walk(folder):
        here = Path(at)
        folders[:] = [name for name in folders if here / name not in skipped]
        for name in (*folders, *files):
            path = here / name
            if path in skipped:
                continue
            about = path.lstat()
            content: object = None
            if stat.S_ISREG(about.st_mode) and about.st_mode & stat.S_IRUSR:
                with path.open("rb") as file:
                    content = sha256(file.read(_READ)).hexdigest()
            elif stat.S_ISLNK(about.st_mode):
                content = os.readlink(path)
            size = None if stat.S_ISDIR(about.st_mode) else about.st_size
            found[os.fsdecode(path.relative_to(folder))] = (about.st_mode, size, content)
    return found


def assert_handled(outcome: Outcome) -> None:
    """The one assertion of all fuzz tests; see the module's text."""
    problems = []
    if outcome.late or outcome.code < 0:
        problems.append("it did not end by itself")
    elif outcome.code not in (0, 2):
        problems.append(f"it ended with {outcome.code}")
    if "Traceback (most recent call last)" in outcome.out + outcome.err:
        problems.append("a traceback")
    if outcome.code == 2:
        problems += _problems_of_refusal(outcome)
    elif outcome.code == 0 and re.search(r"^(error|failed):", outcome.err, re.MULTILINE):
        problems.append("an error, and exit code 0")
    if outcome.touched:
        problems.append("it touched what it may not")
    assert not problems, f"{'; '.join(problems)}\n{outcome}"


def _problems_of_refusal(outcome: Outcome) -> list[str]:
    err = outcome.err
    if outcome.case.arguments[:1] == ["check"] and not err:
        return (
            [] if re.search(r"^failure ", outcome.out, re.MULTILINE) else ["check ends with 2 and reports no failure"]
        )
    if "For full helptext" in err:  # tyro's own complaint about the command line
        return [] if len(err) < WHOLE_MESSAGE else ["a message without end"]
    problems = []
    if not err.startswith("error: ") or len(re.findall(r"^(?:error|failed):", err, re.MULTILINE)) != 1:
        problems.append("not exactly one message")
    elif any(line and not line.startswith("  ") for line in err.split("\n")[1:]):
        problems.append("more on standard error than one message")
    if len(err) > WHOLE_MESSAGE:
        problems.append(f"a message of {len(err)} characters")
    if not err.removeprefix("error:").strip():
        problems.append("an empty message")
    return problems


def fuzz(bench: Bench, kind: str, make_case: Callable[[random.Random, Path], Case]) -> int:
    """Try one seed after the other while there is time, at least one; returns how many.

    `make_case(random, folder)` writes the inputs into `folder/work` and returns the command, by the given source of
    random numbers alone. Raises AssertionError at the first case that is not handled.
    """
    only = os.environ.get("FUZZ_CASE")
    seconds = 0.0 if only else float(os.environ.get("FUZZ_SECONDS", "10"))
    seed = int(only or os.environ.get("FUZZ_SEED", "0"))
    end, tried = time.monotonic() + seconds, 0
    while tried == 0 or time.monotonic() < end:
        folder = bench.folder(f"{kind}-{seed}")
        case = make_case(random.Random(f"{kind} {seed}"), folder)
        outcome = bench.run(case, folder)
        try:
            assert_handled(outcome)
        except AssertionError as error:
            kept = Path(os.environ.get("FUZZ_KEEP") or tempfile.mkdtemp(prefix="fuzz-")) / folder.name
            shutil.copytree(folder, kept, symlinks=True, dirs_exist_ok=True, copy_function=_copy)
            raise AssertionError(f"{kind}, case {seed} (again: FUZZ_CASE={seed}), kept in {kept}: {error}") from None
        shutil.rmtree(folder, ignore_errors=True)
        seed, tried = seed + 1, tried + 1
    print(f"{kind}: {tried} cases, the last is {seed - 1}")
    return tried


def _copy(source: str, target: str) -> None:
    """Fifos, sockets and devices are named in the message already, and are not opened."""
    if stat.S_ISREG(os.lstat(source).st_mode):
        shutil.copy2(source, target)
