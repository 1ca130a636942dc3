"""The two ways in which a command ends early, and the exit codes users and launchers see."""

from swamla_titan.escaping import one_line

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on purpose, start the same command again to continue
EXIT_RE_RENDEZVOUS = 76  # of a worker stopped for a re-rendezvous; the agent starts it again


_LONGEST_LINE = 3000  # characters


def _brief(line: str) -> str:
    """The line without the middle of what is long: it may quote a value of megabytes."""
    return line if len(line) <= _LONGEST_LINE else f"{line[:2000]} ... ({len(line)} characters) ... {line[-800:]}"


class Message(Exception):
    """An error whose text is for the user. Each argument is one line, whatever file names and values it quotes."""

    has_safe_lines = True

    def __str__(self) -> str:
        return "\n".join(_brief(one_line(line)) for line in self.args)


class UserError(Message):
    """Something the user gave (file, key, data, checkpoint) cannot be used.

    The command line prints the message alone, without a traceback, and exits with 2. The message says what is
    wrong, where, and what to change.
    """


class Damaged(UserError):
    """A checkpoint is not what this program wrote. The message says what of it; an older one may do."""


class UnknownGroup(UserError):
    """A checkpoint holds tensors that this version of the program does not know. No older one may take its place."""


class RunFailed(Message):
    """The run cannot continue for a reason that is not the user's input; printed alone, exit code 1.

    In a job of several processes all of them raise it, at the same place.
    """


class RankFailed(RunFailed):
    """Likewise, of this process alone: the others cannot be notified, and end because the launcher sees it end."""
