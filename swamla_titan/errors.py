"""The two kinds of errors that end a command, and the exit codes that users and launchers see."""

from swamla_titan.escaping import one_line

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on purpose; the same command continues the run
EXIT_RE_RENDEZVOUS = 76  # of a worker stopped for a re-rendezvous; the agent starts it again


_LONGEST_LINE = 3000  # characters


def _brief(line: str) -> str:
    """Cut out the middle of a long line, which may quote a value of megabytes."""
    return line if len(line) <= _LONGEST_LINE else f"{line[:2000]} ... ({len(line)} characters) ... {line[-800:]}"


class Message(Exception):
    """An error for the user; each argument becomes one line, whatever file names and values it quotes."""

    has_safe_lines = True

    def __str__(self) -> str:
        return "\n".join(_brief(one_line(line)) for line in self.args)


class UserError(Message):
    """An input of the user (file, key, data, checkpoint) cannot be used.

    The command line prints the message alone, without a traceback, and exits with 2. The message says what is
    wrong, where, and what to change.
    """


class Damaged(UserError):
    """A checkpoint is not as this program wrote it; the message says how. An older one may be intact."""


class UnknownGroup(UserError):
    """A checkpoint holds tensors that this version of the program does not know; no older one may replace it."""


class RunFailed(Message):
    """The run cannot continue for a reason that is not the user's input; printed alone, exit code 1.

    In a job of several processes all of them raise it, at the same place.
    """


class RankFailed(RunFailed):
    """The same on one rank: the others cannot be notified, and end because the launcher sees this process end."""
