"""Text that drives no terminal, and streams that end no command."""

import io
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from swamla_titan.cli import main
from swamla_titan.errors import UserError
from swamla_titan.escaping import one_line, several_lines
from swamla_titan.system.console import Lines, LogFormatter, Stream
from tests.waiting import HANG

NASTY = "a\n\x1b[31m\r\x00\x7f\x9b\u2028\u202e漢\udcff"
SAFE = "a\\n\\x1b[31m\\r\\x00\\x7f\\x9b\\u2028\\u202e漢\\udcff"


def test_one_line_escapes_what_a_terminal_obeys_and_nothing_that_it_shows():
    assert one_line(NASTY) == SAFE
    assert one_line(Path("naïve → 🙂")) == "naïve → 🙂"
    assert several_lines("a\n\tb\x1b\r\n") == "a\n\tb\\x1b\\r\n"


def test_an_error_has_the_lines_that_its_author_gave_it():
    assert str(UserError(f"{NASTY}: wrong", "  and more")) == f"{SAFE}: wrong\n  and more"


@pytest.mark.parametrize(
    "message, arguments, expected",
    [
        ("read %s: %d", (NASTY, 3), f"read {SAFE}: 3"),
        ("read %s", (Path("a\nb"),), "read a\\nb"),
        ("read %s", (ValueError("a\nb"),), "read a\\nb"),
        (f"read {NASTY}", (), f"read {SAFE}"),
        ("two:\n%s", ("x\ny",), "two:\nx\\ny"),
        ("%s", (Lines("x\ny\x1b"),), "x\ny\\x1b"),
        ("%s", (UserError("x\x1b", "y"),), "x\\x1b\ny"),
        ("%.1f %5s", (1.25, "a"), "1.2     a"),
        ("100%", (), "100%"),
    ],
)
def test_a_message_of_the_log_stays_as_many_lines_as_it_was_written(message, arguments, expected):
    record = logging.LogRecord("swamla_titan", logging.INFO, "file", 1, message, arguments, None)
    assert LogFormatter("%(levelname)s %(message)s").format(record) == f"INFO {expected}"
    assert record.args == arguments  # other handlers get it as it was


# streams

WRITER = """
import sys
from swamla_titan.system.console import open_console
open_console()
with open("data", "w") as file:
    print("\\u6f22 \\udcff \\xe9")
    print("\\u6f22 \\udcff \\xe9", file=sys.stderr)
    sys.stdout.flush()
    file.write("mine")
sys.exit(3)
"""


def write(tmp_path: Path, redirection: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """Runs WRITER under a shell's redirection."""
    python_path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$1" {redirection}', "bash", WRITER],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
        | python_path
        | environment,
        capture_output=True,
    )


@pytest.mark.parametrize(
    "redirection",
    [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "> >(exit)"],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stream_that_is_gone_or_full_changes_neither_exit_code_nor_files(tmp_path, redirection, unbuffered):
    done = write(tmp_path, redirection, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 3
    assert (tmp_path / "data").read_text() == "mine"
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"PYTHONIOENCODING": "ascii"}, b"\\u6f22 \\udcff \\xe9\n"),
        ({"PYTHONIOENCODING": "ascii:strict"}, b"\\u6f22 \\udcff \\xe9\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"\\u6f22 \\udcff \xe9\n"),
        ({"PYTHONIOENCODING": "utf-8"}, "漢 \\udcff é\n".encode()),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, b"\\u6f22 \\udcff \\xe9\n"),
    ],
)
def test_characters_that_a_stream_lacks_are_escaped(tmp_path, environment, expected):
    done = write(tmp_path, "", **environment)
    assert (done.returncode, done.stdout, done.stderr) == (3, expected, expected)


def test_a_terminal_that_hung_up(tmp_path):
    near, far = os.openpty()
    command = [sys.executable, "-c", "import os\nos.read(0, 1)\n" + WRITER]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=far, stderr=far, cwd=tmp_path, env=environment, start_new_session=True
    )
    os.close(far)
    os.close(near)
    process.communicate(b"x", timeout=HANG)
    assert process.returncode == 3


def test_a_descriptor_that_somebody_made_non_blocking_gets_all_the_same(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    found: list[bytes] = []

    def read() -> None:
        while chunk := os.read(reader, 1 << 16):
            found.append(chunk)

    thread = threading.Thread(target=read)
    stream = io.TextIOWrapper(io.BufferedWriter(Stream(writer, "w")))
    thread.start()
    stream.write("x" * (1 << 20))
    stream.close()
    thread.join()
    os.close(reader)
    assert sum(map(len, found)) == 1 << 20


def test_what_is_lost_is_remembered():
    reader, writer = os.pipe()
    os.close(reader)
    with Stream(writer, "w") as stream:
        assert stream.write(b"text") == 4
        assert isinstance(stream.lost, BrokenPipeError)


# commands


def run(redirection: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = f'"{sys.executable}" -m swamla_titan "$@" {redirection}'
    return subprocess.run(["bash", "-c", command, "bash", *arguments], capture_output=True, text=True)


def test_output_that_the_disk_does_not_take_is_a_failure_of_a_command_that_only_prints():
    done = run(">/dev/full", "config", "show", "debug")
    message = "failed: standard output could not be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_a_refusal_has_its_code_where_nobody_can_read_it():
    assert run(">&- 2>&-", "config", "show", "no such").returncode == 2


def test_arguments_are_quoted_escaped(capsys):
    assert main(["config", "show", "a\n\x1b[31mb"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "no such file" in error
    assert "\x1b" not in error
    assert error.count("\n") == 1
    for arguments in (["\x1b[31mtrain"], ["generate", "x", "--seed", "\x1b]0;title\x07"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert "\x1b" not in captured.err + captured.out
        assert "\\x1b" in captured.err
