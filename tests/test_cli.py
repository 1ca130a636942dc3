"""The command line itself; what its commands do is tested in their rooms."""

import subprocess
import sys

import pytest

from swamla_titan.cli import main


def test_help_does_not_wait_for_torch():
    script = """
import sys
from swamla_titan.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.parametrize(
    "command, reader, read",
    [("config show debug", "head -1", "[job]\n"), ("config ls", "true", ""), ("--help", "true", "")],
)
def test_a_reader_that_stops_early_is_no_error(command, reader, read):
    """In the midst of the output, or before its end is written."""
    piped = f"unset PYTHONUNBUFFERED; set -o pipefail; {sys.executable} -m swamla_titan {command} | {reader}"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", read)


def test_an_unknown_command_is_refused_with_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    "command, named",
    [
        ("train small 8 2048", "--training.local_batch_size 8 --training.seq_len 2048"),
        ("train 8 2048", "--training.local_batch_size 8 --training.seq_len 2048"),
        ("plan small 8 --gpus 4", "--training.local_batch_size 8"),
        ("train small --dry-run 8 2048", "--training.local_batch_size 8 --training.seq_len 2048"),
        ("check small --optimizer.lr 1e-3 8 2048 100", "--training.seq_len 2048 --training.steps 100"),
    ],
)
def test_numbers_without_a_name_are_answered_with_names(command, named, capsys):
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert ": settings have names, write --training.local_batch_size 8" in said
    assert said.endswith(f"{named}\n")


def test_overrides_are_refused_where_they_mean_nothing(capsys):
    assert main(["config", "ls", "--training.steps", "5"]) == 2
    assert "takes no configuration keys" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("plan", "debug", "--gpus", "1" * 100_000), ("plan", "debug", "9" * 90_000), ("x" * 90_000,)]
)
def test_a_complaint_about_a_long_argument_is_not_as_long(capsys, arguments):
    try:
        code = main(list(arguments))
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert 0 < len(capsys.readouterr().err) < 8000
