"""For Python 3.10, which has no PYTHONSAFEPATH: nothing is imported from the current folder just because it is current.

Python imports this file at its start where PYTHONPATH names this folder. `python -m` and `python -c`, which
multiprocessing uses for its processes, put the current folder before all others, a moment later: a random.py of the
user's that lies there would be imported for Python's.
"""

import os
import sys


class _Nothing:
    """Of a folder in which there is nothing to import."""

    def find_spec(self, name: str, target: object = None) -> None:
        return None


def _leave_out_the_current_folder() -> None:
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        return
    if here not in map(os.path.abspath, sys.path):  # or the user named it
        sys.path_importer_cache[here] = _Nothing()


def _import_the_next_of_this_name() -> None:
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != own]
    this = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # type: ignore[import-not-found] # noqa: F401
    except ImportError:
        sys.modules["sitecustomize"] = this


_leave_out_the_current_folder()
_import_the_next_of_this_name()
