import sys

from swamla_titan.cli import main
from swamla_titan.parallel.launcher import exit_through_launcher

if __name__ == "__main__":
    sys.exit(exit_through_launcher(main))
