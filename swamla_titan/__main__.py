"""The command, from its first moment on: what it may import, and signals that come while it imports."""

import os
import sys


def leave_out_the_current_folder() -> None:
    """`python -m` looks for modules in the current folder first, which may hold a random.py; its children do too."""
    package = os.path.dirname(os.path.abspath(__file__))
    try:
        current = os.getcwd()
    except OSError:  # it was removed, and the command says so
        return
    if (
        not getattr(sys.flags, "safe_path", False)
        and sys.path[0] in ("", current)
        and current != os.path.dirname(package)
    ):
        del sys.path[0]
    if sys.version_info >= (3, 11):
        os.environ["PYTHONSAFEPATH"] = "1"
    else:
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        safe = os.path.join(package, "safe_path")
        os.environ["PYTHONPATH"] = os.pathsep.join([path for path in paths if path and path != safe] + [safe])


def run() -> int:
    """Run the command in `sys.argv`; returns the exit code."""
    leave_out_the_current_folder()
    # What is imported here takes a hundredth of a second, the rest of the program some.
    from swamla_titan.parallel.launcher import exit_through_launcher, listen_to_signals

    listen_to_signals(trains=sys.argv[1:2] == ["train"] and "--dry-run" not in sys.argv)
    from swamla_titan.console import open_console

    open_console()  # before anything else is opened
    return exit_through_launcher(_main)


def _main() -> int:
    from swamla_titan.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
