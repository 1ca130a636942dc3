"""The start of the command: its import path, and signals during its imports."""

import os
import sys


def leave_out_the_current_folder() -> None:
    """Remove the current folder from the import path, here and in child processes; it may hold a random.py."""
    try:
        current = os.getcwd()
    except OSError as error:
        sys.exit(_refused(f"the current folder cannot be used ({error.strerror}); go to one that is there"))
    package = os.path.dirname(os.path.abspath(__file__))
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
    import signal

    # Signals are blocked for some hundredths of a second, until they can be handled; other imports take seconds.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    from swamla_titan.launch.ranks import RESTART_COUNT
    from swamla_titan.launch.worker import exit_through_launcher, install_early_handlers
    from swamla_titan.system.process import end_process

    install_early_handlers(trains=sys.argv[1:2] == ["train"] and "--dry-run" not in sys.argv)
    from swamla_titan.system.console import open_console

    open_console()  # before anything else is opened
    code = exit_through_launcher(_main)
    if RESTART_COUNT in os.environ:
        end_process(code)
    return code


def _refused(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


def _main() -> int:
    from swamla_titan.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
