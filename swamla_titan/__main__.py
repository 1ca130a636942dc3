import sys

from swamla_titan.console import open_console

open_console()  # before anything else is opened

from swamla_titan.cli import main  # noqa: E402
from swamla_titan.parallel.launcher import exit_through_launcher  # noqa: E402

if __name__ == "__main__":
    sys.exit(exit_through_launcher(main))
