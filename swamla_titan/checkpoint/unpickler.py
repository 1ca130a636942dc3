"""Unpickling untrusted files: an allow list of the instructions, names and calls of a pickle.

A pickle is a program. Python's own unpickler can be kept from importing, but not from growing a memo of a billion
entries for five bytes, from setting attributes of the classes that it may name, or from hashing a tuple nested so
deeply that the process dies. So this one knows only the few instructions that data need, and calls only what it is
given.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

_NEEDED = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2),
    *(pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
)


class StrictUnpickler(pickle._Unpickler):
    """Reads a pickle that uses only `names`: (module, name) -> the object for it.

    `called`: those that may be called. `classes`: those that may be instantiated, each with a check of the instance's
    state. `persistent`: gives the object for data outside of the pickle. UnpicklingError for anything else.
    """

    stack: list[Any]
    metastack: list[list[Any]]

    def __init__(
        self,
        content: bytes,
        names: Mapping[tuple[str, str], Any],
        called: tuple[Any, ...] = (),
        classes: Mapping[type, Callable[[Any], bool]] | None = None,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(io.BytesIO(content))
        self._names, self._called, self._classes, self._persistent = names, called, classes or {}, persistent

    def value(self) -> Any:
        """Load the object in the pickle; UnpicklingError whatever is wrong with it."""
        try:
            return self.load()
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # depending on the instruction: IndexError, struct.error, MemoryError, ...
            raise pickle.UnpicklingError(str(error) or type(error).__name__) from None

    def find_class(self, module: str, name: str) -> Any:
        """The object for a name."""
        try:
            return self._names[module, name]
        except (KeyError, TypeError):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs") from None

    def persistent_load(self, pid: Any) -> Any:
        """The object for data outside of the pickle."""
        if self._persistent is None or not _is_flat(pid, 1):
            raise pickle.UnpicklingError("it refers to something outside of it")
        return self._persistent(pid)

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not any(function is each for each in self._called):
            raise pickle.UnpicklingError("it calls what no index needs")
        if type(arguments) is not tuple or not _is_flat(arguments, 2):
            raise pickle.UnpicklingError("it calls with tuples in tuples")
        self.stack[-1] = function(*arguments)

    def _load_newobj(self) -> None:
        arguments = self.stack.pop()
        cls = self.stack.pop()
        if arguments != () or not any(cls is each for each in self._classes):
            raise pickle.UnpicklingError("it makes what no index needs")
        self.stack.append(cls.__new__(cls))

    def _load_build(self) -> None:
        state = self.stack[-1]
        instance = self.stack[-2]
        allowed = self._classes.get(type(instance))
        if allowed is None or not allowed(state):
            raise pickle.UnpicklingError("it gives something a state that it cannot have")
        super().load_build()  # type: ignore[misc]

    def _load_setitem(self) -> None:
        _require_keys(self.stack[-3], [self.stack[-2]], self._classes)
        super().load_setitem()  # type: ignore[misc]

    def _load_setitems(self) -> None:
        _require_keys(self.metastack[-1][-1], self.stack[::2], self._classes)
        super().load_setitems()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _NEEDED},
        pickle.REDUCE[0]: _load_reduce,
        pickle.NEWOBJ[0]: _load_newobj,
        pickle.BUILD[0]: _load_build,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
    }


def _require_keys(target: Any, keys: list[Any], classes: Mapping[type, Any]) -> None:
    # No tuples, because hashing one recurses as deeply as it is nested, without a limit.
    if type(target) is not dict or not all(type(key) is str or type(key) in classes for key in keys):
        raise pickle.UnpicklingError("it has keys that no index needs")


def _is_flat(value: Any, depth: int) -> bool:
    """Whether tuples are nested at most `depth` deep."""
    return type(value) is not tuple or (depth > 0 and all(_is_flat(each, depth - 1) for each in value))
