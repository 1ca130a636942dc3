import sys

from swamla_titan.cli import main

if __name__ == "__main__":
    sys.exit(main())
