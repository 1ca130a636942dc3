"""The command `watch`: follows a run in the terminal, from its dump folder alone, so from any shell that sees it.

On a terminal a panel is drawn again each second; in a pipe each new line of metrics and each event is printed once.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import median

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from swamla_titan.escaping import one_line
from swamla_titan.metrics import clock, step_line, thousands
from swamla_titan.system.console import lost_output
from swamla_titan.system.events import now
from swamla_titan.tools.event_words import ROUTINE, in_words
from swamla_titan.tools.goodput import goodput
from swamla_titan.tools.history import History, Line, holder, number, state

_INTERVAL = 1.0  # seconds between two looks at the files
_EVENTS = 6  # that are shown
_FIRST_LINES = 10  # of what there is already, in a pipe
_RECENT = 20  # log lines by which the time left is estimated
_CURVE = 48  # characters of the loss curve
_BLOCKS = "▁▂▃▄▅▆▇█"
_COLORS = {"running": "green", "finished": "cyan", "failed": "red", "killed": "red", "stopped": "yellow"}


def watch(run: str) -> None:
    """Follow the run in the dump folder `run` until it is finished or Ctrl-C is pressed.

    Raises UserError if the folder is no run's. A run that was killed, or stopped on purpose, may be started again, so
    the wait continues.
    """
    history = History(Path(run))
    # Ctrl-C would end this process without showing the terminal's cursor again, see launch/worker.py.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        console = Console()
        if console.is_terminal and not console.is_dumb_terminal:
            _live(history, console)
        else:
            _lines(history)
    signal.signal(signal.SIGINT, before)


def _looks(history: History) -> Iterator[list[Line]]:
    """What was added to the run's files, each `_INTERVAL`, until it is finished."""
    while True:
        yield history.update()
        if state(history)[0] == "finished":
            return
        time.sleep(_INTERVAL)


# in a pipe


def _lines(history: History) -> None:
    word, most = "", _FIRST_LINES
    for new in _looks(history):
        texts = [text for line in new if (text := _text(history, line))]
        if len(texts) > most:
            print(f"({len(texts) - most} earlier lines are left out)")
        for text in texts[-most:]:
            print(one_line(text))
        most = sys.maxsize
        before, (word, sentence) = word, state(history)
        if word != before:
            print(one_line(f"{word}: {sentence}"))
        if lost_output():  # its reader has gone
            return


def _text(history: History, line: Line) -> str | None:
    """A line of metrics, or an event, as one line of text."""
    if "event" in line:
        return None if line["event"] in ROUTINE else in_words(line)
    needed = ("loss", "grad_norm", "lr", "tokens_per_second", "memory_gib", "step_seconds")
    known = {key: value for key in (*needed, "mfu") if (value := number(line, key)) is not None}
    parts = []
    if all(key in known for key in needed):
        parts.append(step_line(line["step"], history.steps or line["step"], known, _seconds_left(history, line) or 0.0))
    if (loss := number(line, "val_loss")) is not None:
        parts.append(f"validation loss {loss:.4f}")
    return " | ".join(parts) or f"step {line['step']}"


def _seconds_left(history: History, line: Line) -> float | None:
    """The steps after `line` at the median pace of the last lines, without a start's first step, which compiles."""
    steps = history.steps
    if steps is None or not history.starts:
        return None
    recent = history.starts[-1].lines[1:][-_RECENT:] or history.starts[-1].lines
    paces = [pace for each in recent if (pace := number(each, "step_seconds")) is not None]
    return max(0, steps - line["step"]) * median(paces) if paces else None


# on a terminal


def _live(history: History, console: Console) -> None:
    with Live(console=console, auto_refresh=False, screen=False) as live:
        for _ in _looks(history):
            live.update(panel(history, console.width), refresh=True)


def panel(history: History, width: int) -> RenderableType:
    """What the terminal shows, for `width` columns."""
    word, sentence = state(history)
    head = Text.assemble((word, f"bold {_COLORS.get(word, 'white')}"), f"  {one_line(sentence)}")
    lines = history.lines()
    parts: list[RenderableType] = [head, *_ranks(history)]
    if lines:
        parts += [_progress(history, lines[-1]), _figures(history, lines), *_curve(lines, width)]
    told = [each for each in history.events if each["event"] not in ROUTINE]
    saved = [each for each in history.events if each["event"] == "checkpoint"][-1:]
    if told := sorted(told[-_EVENTS:] + saved, key=lambda each: float(each["time"])):
        parts += [Text(), *map(_event, told)]
    return Panel(Group(*parts), title=one_line(history.folder), title_align="left", border_style="dim")


def _ranks(history: History) -> Iterator[Text]:
    """How many processes there are, and since when nothing was heard of them."""
    if not history.starts:
        return
    start = history.starts[-1]
    words = [f"{start.ranks} x {start.device}"]
    if start.end is None and (process := holder(history.folder)):
        words.append(process)
    if len(history.starts) > 1:
        words.append(f"start {len(history.starts)}")
    quiet = now() - start.last if start.last is not None else 0.0
    if start.end is None and quiet > 10:
        words.append(f"last sign {clock(quiet)} ago")
    if found := goodput(history):
        words.append(f"goodput {found.share:.1%} of {clock(found.total)}")
    yield Text(one_line("  ".join(words)), style="dim")


def _progress(history: History, line: Line) -> Table:
    row = Table.grid(padding=(0, 1))
    row.add_column(ratio=1)
    row.expand = True
    steps = history.steps
    left = _seconds_left(history, line)
    bar = ProgressBar(total=steps or line["step"], completed=line["step"])
    done = f"{line['step']:,}/{steps:,}" if steps else f"{line['step']:,}"
    row.add_row(bar, done, f"ETA {clock(left)}" if left is not None else "")
    return row


def _figures(history: History, lines: list[Line]) -> Table:
    """Label and value, as many pairs as there are."""
    last = lines[-1]
    validated = next((each for each in reversed(lines) if number(each, "val_loss") is not None), {})
    start = history.starts[-1].lines[-1] if history.starts[-1].lines else last
    pairs = {
        "loss": _number(last, "loss", "{:.4f}"),
        "validation": f"{_number(validated, 'val_loss', '{:.4f}')} at {validated['step']:,}" if validated else "",
        "lr": _number(last, "lr", "{:.2e}"),
        "grad norm": _number(last, "grad_norm", "{:.3f}"),
        "tokens/s": thousands(rate) if (rate := number(start, "tokens_per_second")) else "",
        "MFU": _number(start, "mfu", "{:.1%}"),
        "memory": _number(start, "memory_gib", "{:.2f} GiB"),
        "tokens": _number(last, "tokens", "{:,}"),
        "epochs": _number(last, "epoch", "{:g}"),
        "skipped": _number(last, "skipped_steps", "{:g} steps") if number(last, "skipped_steps") else "",
    }
    table = Table.grid(padding=(0, 2))
    shown = iter([(name, value) for name, value in pairs.items() if value])
    while row := list(islice(shown, 4)):
        table.add_row(*(Text.assemble((f"{name} ", "dim"), value) for name, value in row))
    return table


def _number(line: Line, key: str, form: str) -> str:
    value = number(line, key)
    return "" if value is None else form.format(value)


def _curve(lines: list[Line], width: int) -> Iterator[Text]:
    """The loss of all steps as a row of blocks, the means of stretches of lines."""
    losses = [value for line in lines if (value := number(line, "loss")) is not None]
    count = min(_CURVE, len(losses), max(8, width - 30))
    if count < 8:
        return
    means = [
        sum(part) / len(part)
        for part in (losses[i * len(losses) // count : (i + 1) * len(losses) // count] for i in range(count))
    ]
    low, high = min(means), max(means)
    blocks = "".join(_BLOCKS[round((each - low) / ((high - low) or 1) * (len(_BLOCKS) - 1))] for each in means)
    yield Text.assemble(("loss ", "dim"), blocks, (f" {high:.3f} to {low:.3f}", "dim"))


def _event(event: Line) -> Text:
    return Text.assemble((f"{clock(max(0.0, now() - event['time']))} ago  ", "dim"), in_words(event))
