"""A process of several ends without taking down what libraries left behind."""

import subprocess
import sys

PROGRAM = """
import atexit, sys
from swamla_titan.system.process import end_process

class LeftBehind:
    def __del__(self):
        sys.__stderr__.write("taken down")

left_behind = LeftBehind()
atexit.register(print, "said at the end")
print("said before", end="; ")
{end}
"""


def ended(end: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True)


def test_exit_functions_run_output_is_flushed_and_no_object_is_taken_down():
    usual, ours = ended("sys.exit(7)"), ended("end_process(7)")
    assert (usual.returncode, usual.stdout, usual.stderr) == (7, "said before; said at the end\n", "taken down")
    assert (ours.returncode, ours.stdout, ours.stderr) == (7, "said before; said at the end\n", "")
