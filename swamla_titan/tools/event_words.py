"""Events of a run in words, for `watch` and `report`."""

from swamla_titan.errors import EXIT_DONE, EXIT_RE_RENDEZVOUS, EXIT_STOPPED
from swamla_titan.escaping import one_line
from swamla_titan.tools.history import Line, first_line, integer, number

_ENDS = {EXIT_DONE: "finished", EXIT_STOPPED: "stopped on purpose", EXIT_RE_RENDEZVOUS: "stopped for other machines"}
_MOST = 8  # numbers or names that are listed
ROUTINE = ("checkpoint", "pause")
"""Events that every run has many of."""


def in_words(event: Line) -> str:
    """One line; an event that this version does not know is shown with its values."""
    name, get = event["event"], event.get
    match name:
        case "start":
            ranks = f"{get('ranks')} x {get('device')}" if get("ranks") != 1 else get("device")
            machines = f" on {get('machines')} machines" if integer(event, "machines") > 1 else ""
            after = f", {setup:.0f} s after its process" if (setup := number(event, "setup_seconds")) else ""
            text = f"start after step {get('step')}: {ranks}{machines}{after}"
        case "pause":
            text = f"{get('doing')} took {get('seconds')} s after step {get('step')}"
        case "checkpoint":
            text = f"checkpoint of step {get('step')} on the disk ({get('seconds')} s)"
        case "checkpoint_failed":
            text = f"checkpoint of step {get('step')} failed: {first_line(get('error'))}"
        case "stage":
            text = f"stage {get('number')} begins at step {get('step')}: {get('shape')}"
        case "epoch":
            text = f"{get('source')} begins its epoch {get('epoch')} at step {get('step')}"
        case "skipped":
            text = f"skipped as bad: step {_listed(get('steps'))}"
        case "rewind":
            text = f"rewound after step {get('step')} to the weights of step {get('trained')}"
        case "skipped_files":
            text = f"unreadable from step {get('step')} on: {_listed(get('files'))}"
        case "hang":
            text = f"hung after step {get('step')} ({get('doing')}): the watchdog ended it"
        case "end":
            code = next((words for each, words in _ENDS.items() if each == get("code")), f"ended with {get('code')}")
            text = f"ended by {first_line(get('error'))}" if get("error") else f"{code} after step {get('step')}"
        case _:
            values = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))
            text = f"{name}: {values}" if values else str(name)
    return one_line(text)


def _listed(values: object) -> str:
    values = values if isinstance(values, list) else [values]
    more = f" and {len(values) - _MOST} more" if len(values) > _MOST else ""
    return ", ".join(map(str, values[:_MOST])) + more
