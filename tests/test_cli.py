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


def test_overrides_are_refused_where_they_mean_nothing(capsys):
    assert main(["config", "ls", "--training.steps", "5"]) == 2
    assert "takes no configuration keys" in capsys.readouterr().err
