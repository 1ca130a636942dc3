"""The command `report`: one self-contained HTML page on a run, or on several in comparison.

The page needs no network. Tables are HTML, so they can be read without scripts; a script of the page itself draws the
charts as SVG, because a reader wants to read off values, zoom, smooth and choose the axis, which a picture does not let
her do, and plotting libraries that do would add megabytes to each page. Long runs are shown by means over neighbouring
log lines, with the band of what they range over.
"""

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from swamla_titan.errors import UserError
from swamla_titan.escaping import one_line
from swamla_titan.metrics import clock, metric, thousands
from swamla_titan.system.written_aside import written_aside
from swamla_titan.tools.event_words import ROUTINE, in_words
from swamla_titan.tools.goodput import PURPOSES, Goodput, goodput
from swamla_titan.tools.history import History, number, state

_TEMPLATE = Path(__file__).with_name("report.html")
_MARK = '<meta name="generator" content="swamla-titan report">'
_POINTS = 1000  # of a run in the charts
_MOST_EVENTS = 300  # in the table
_BANDED = ("loss", "grad_norm", "tokens_per_second")
_NO_CHART = {"step", "time", "tokens", "epoch", "val_set", "tokens_per_second_per_gpu", "tflops_per_gpu"}


@dataclass
class Run:
    """A run and its name on the page."""

    name: str
    history: History
    goodput: Goodput | None

    def values(self, key: str) -> list[float]:
        """The finite values of a metric, of the steps that count."""
        return [value for line in self.history.lines() if (value := number(line, key)) is not None]

    def last(self, key: str) -> float | None:
        """The last of them."""
        return next(reversed(self.values(key)), None)


def report(runs: Sequence[str], out: str, price: float | None) -> None:
    """Write the page on the dump folders `runs` to the file `out`; `price`: of a GPU-hour.

    Raises UserError for a folder without metrics, and for a file that is no earlier report.
    """
    if not runs:
        raise UserError("no run is given: name its dump folder, as in `swamla-titan report outputs/debug`")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price {price}: expected the price of a GPU-hour")
    _require_report(Path(out))
    found = [_run(name, path) for name, path in zip(_names(runs), map(Path, runs))]
    title = found[0].name if len(found) == 1 else f"{len(found)} runs compared"
    body = "\n".join(_body(title, found, price))
    data = json.dumps(_data(found), separators=(",", ":")).replace("<", "\\u003c")
    page = _TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", html.escape(title))
    try:
        with written_aside(Path(out)) as file:
            file.write(page.replace("{{body}}", body).replace("{{data}}", data))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    print(one_line(f"{out} written ({Path(out).stat().st_size / 1000:.0f} kB)"))


def _require_report(out: Path) -> None:
    """Raise UserError unless `out` is a new file, or an earlier report, which may be replaced."""
    if not out.name or out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, such as {out / 'report.html'}")
    if out.exists() or out.is_symlink():
        try:
            with out.open(encoding="utf-8", errors="replace") as file:
                is_report = out.is_file() and _MARK in file.read(500)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be read ({error.strerror})") from None
        if not is_report:
            raise UserError(f"--out {out}: exists, and is no report; choose another name or remove it")


def _names(runs: Sequence[str]) -> list[str]:
    """The folders' names, with as many parents as tell them apart."""
    parts = [Path(run).resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise UserError("the same run is given twice")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return [one_line(name) for name in names]


def _run(name: str, folder: Path) -> Run:
    history = History(folder)
    history.update()
    if not history.lines():
        raise UserError(f"{folder}: no step was logged yet; `swamla-titan watch {folder}` waits for the first one")
    return Run(name, history, goodput(history))


# the tables


def _body(title: str, runs: list[Run], price: float | None) -> Iterable[str]:
    yield f"<h1>{html.escape(title)}</h1>"
    if len(runs) == 1:
        yield f'<p class="muted">{_state(runs[0])}</p>'
        yield _tiles(_overview(runs, price))
    else:
        yield _table(_overview(runs, price), [run.name for run in runs], swatches=True)
        yield "<h2>What differs in the configuration</h2>"
        differences = config_differences([run.history.config for run in runs])
        yield _table(differences, [run.name for run in runs]) if differences else "<p>Nothing.</p>"
    yield _CONTROLS
    yield "<h2>Where the time went</h2>"
    yield from map(_time, runs)
    if sources := _sources(runs):
        yield "<h2>Data by source</h2>"
        yield _table(sources, [run.name for run in runs] if len(runs) > 1 else [])
    yield "<h2>Events</h2>"
    for run in runs:
        yield from _events(run, with_name=len(runs) > 1)
    for run in runs:
        name = f" of {html.escape(run.name)}" if len(runs) > 1 else ""
        yield f"<details><summary>Configuration{name}</summary><pre>{_config_text(run)}</pre></details>"


_CONTROLS = """<div class="controls">
<label>x axis <select id="axis"><option value="step">step</option><option value="tokens">tokens</option>
<option value="hours">hours</option></select></label>
<label>smooth <input id="smooth" type="range" min="0" max="0.99" step="0.01" value="0"></label>
<label><input id="log" type="checkbox" checked> logarithmic gradient norm</label>
<button id="whole" hidden>whole range</button><button id="theme">light / dark</button>
<span class="muted">drag to zoom, double click to undo</span>
</div>
<noscript><p>The charts are drawn by a script of this page, which is switched off; the tables need none.</p></noscript>
<div class="charts" id="charts"></div>"""


def _tiles(rows: dict[str, list[str]]) -> str:
    tiles = (f"<div><dt>{html.escape(name)}</dt><dd>{cells[0]}</dd></div>" for name, cells in rows.items())
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _table(rows: dict[str, list[str]], columns: Sequence[str], swatches: bool = False) -> str:
    """A row of HTML cells for each name; with column titles if there are any."""
    head = "".join(
        f"<th>{_swatch(index) if swatches else ''}{html.escape(column)}</th>" for index, column in enumerate(columns)
    )
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows.items()
    )
    titles = f"<thead><tr><th></th>{head}</tr></thead>" if columns else ""
    kind = ' class="compared"' if columns else ""
    return f'<div class="scroll"><table{kind}>{titles}<tbody>{body}</tbody></table></div>'


def _swatch(index: int) -> str:
    return f'<span class="swatch" style="border-color:var(--c{index % 8})"></span>'


def _state(run: Run) -> str:
    word, text = state(run.history)
    return html.escape(one_line(f"{word}: {text}"))


def _overview(runs: list[Run], price: float | None) -> dict[str, list[str]]:
    """Rows of what a person asks first; rows that apply to no run are left out."""
    rows = {
        "state": [_state(run) if len(runs) > 1 else "" for run in runs],
        "trained on": [_devices(run) for run in runs],
        "steps": [_steps(run) for run in runs],
        "tokens": [_count(run.last("tokens")) for run in runs],
        "epochs completed": [_count(run.last("epoch")) for run in runs],
        "loss, mean of the last tenth": [_mean_of_last_tenth(run.values("loss")) for run in runs],
        "validation loss, last": [_figure(run.last("val_loss")) for run in runs],
        "validation loss, lowest": [_lowest(run) for run in runs],
        "bits per byte, last": [_figure(run.last("val_bits_per_byte")) for run in runs],
        "tokens/s, median": [_rate(run.values("tokens_per_second")[1:]) for run in runs],
        "MFU, median": [_percent(run.values("mfu")[1:]) for run in runs],
        "peak memory": [_gib(run.values("memory_gib")) for run in runs],
        "steps skipped as bad": [_count(run.last("skipped_steps") or None) for run in runs],
        "rewinds": [_count(run.last("rewinds")) for run in runs],
        "starts": [str(len(run.history.starts)) for run in runs],
        "wall time": [clock(run.goodput.total) if run.goodput else "" for run in runs],
        "goodput": [f"{run.goodput.share:.1%}" if run.goodput else "" for run in runs],
        "GPU-hours": [_gpu_hours(run) for run in runs],
        "cost": [_cost(run, price) for run in runs],
    }
    return {name: [cell or "-" for cell in cells] for name, cells in rows.items() if any(cells)}


def _devices(run: Run) -> str:
    worlds = dict.fromkeys(f"{start.ranks} x {start.device}" for start in run.history.starts if start.lines)
    return html.escape(one_line(", then ".join(worlds)))


def _steps(run: Run) -> str:
    taken, steps = run.history.lines()[-1]["step"], run.history.steps
    return f"{taken:,} of {steps:,}" if steps else f"{taken:,}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{round(value):,}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _mean_of_last_tenth(losses: list[float]) -> str:
    return _figure(fmean(losses[-max(1, len(losses) // 10) :])) if losses else ""


def _lowest(run: Run) -> str:
    found = [(value, line["step"]) for line in run.history.lines() if (value := number(line, "val_loss")) is not None]
    return "{:.4f} (step {:,})".format(*min(found)) if found else ""


def _rate(values: list[float]) -> str:
    return thousands(median(values)) if values else ""


def _percent(values: list[float]) -> str:
    return f"{median(values):.1%}" if values else ""


def _gib(values: list[float]) -> str:
    return f"{max(values):.2f} GiB" if values else ""


def _gpu_hours(run: Run) -> str:
    return f"{run.goodput.gpu_hours:,.2f}" if run.goodput and run.goodput.gpu_hours else ""


def _cost(run: Run, price: float | None) -> str:
    hours = run.goodput.gpu_hours if run.goodput else 0.0
    if price is None or not hours:
        return ""
    tokens = run.last("tokens")
    per_token = f", {hours * price / tokens * 1e9:,.2f} per billion tokens" if tokens else ""
    return f"{hours * price:,.2f} at {price:g} per GPU-hour{per_token}"


def config_differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """section.key -> its value in each configuration, in HTML, for keys with more than one; not the dump folder."""
    flat = [dict(_flat(config)) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config if key != "job.dump_folder")
    rows = {key: [html.escape(config.get(key, "")) for config in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flat(table: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, one_line(json.dumps(value, default=str, ensure_ascii=False))


def _time(run: Run) -> str:
    name = f"<p><b>{html.escape(run.name)}</b></p>"
    if run.goodput is None:
        return f"{name}<p>Unknown: the version that trained it recorded no wall time.</p>"
    found = run.goodput
    parts = {each: found.seconds[each] for each in PURPOSES if found.seconds[each] >= 0.0005 * found.total}
    colors = {each: f"var(--c{index % 8})" for index, each in enumerate(PURPOSES)}
    bar = "".join(
        f'<i style="flex:{seconds:.3f};background:{colors[each]}" title="{PURPOSES[each]}: {clock(seconds)}"></i>'
        for each, seconds in parts.items()
    )
    rows = "".join(
        f'<tr><th><span class="block" style="background:{colors[each]}"></span>{PURPOSES[each]}</th>'
        f'<td class="n">{clock(seconds)}</td><td class="n">{seconds / found.total:.1%}</td></tr>'
        for each, seconds in parts.items()
    )
    notes = [f"{found.waiting_for_data / found.total:.1%} of the time steps waited for data"] if found.total else []
    if found.stopped:
        notes.append(f"stopped on purpose for {clock(found.stopped)} more, which does not count")
    return (
        f'{name}<div class="bar">{bar}</div><div class="scroll"><table><tbody>{rows}</tbody></table></div>'
        f'<p class="muted">{"; ".join(notes)}.</p>'
    )


def _sources(runs: list[Run]) -> dict[str, list[str]]:
    """A row for each source of a mixture: tokens with their share, epochs and loss."""
    keys = dict.fromkeys(key for run in runs for line in run.history.lines() for key in line)
    names = [key.partition("/")[2] for key in keys if key.startswith("tokens/")]
    return {name: [_source(run, name, names) for run in runs] for name in names}


def _source(run: Run, name: str, names: list[str]) -> str:
    tokens, whole = run.last(f"tokens/{name}"), sum(run.last(f"tokens/{each}") or 0.0 for each in names)
    if tokens is None:
        return ""
    parts = [f"{round(tokens):,} tokens ({tokens / whole:.1%})" if whole else f"{round(tokens):,} tokens"]
    for key, words in (("epochs", "epochs"), ("loss", "loss"), ("val_loss", "validation loss")):
        if (value := run.last(f"{key}/{name}")) is not None:
            parts.append(f"{words} {value:.4g}")
    return ", ".join(parts)


def _events(run: Run, with_name: bool) -> Iterable[str]:
    if with_name:
        yield f"<p><b>{html.escape(run.name)}</b></p>"
    events = run.history.events
    told = [each for each in events if each["event"] not in ROUTINE]
    counts = {name: sum(each["event"] == name for each in events) for name in ("checkpoint", "skipped", "rewind")}
    words = [f"{count} x {name}" for name, count in counts.items() if count]
    yield f'<p class="muted">{html.escape(", ".join(words) or "no checkpoint")}</p>'
    begin = next((start.begin for start in run.history.starts if start.begin is not None), 0.0)
    rows = "".join(
        f'<tr><td class="n">{clock(max(0.0, each["time"] - begin))}</td><td>{html.escape(in_words(each))}</td></tr>'
        for each in told[-_MOST_EVENTS:]
    )
    head = '<thead><tr><th class="n">after</th><th>event</th></tr></thead>'
    yield f'<div class="scroll"><table class="events">{head}<tbody>{rows}</tbody></table></div>'


def _config_text(run: Run) -> str:
    try:
        return html.escape((run.history.folder / "config.toml").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "config.toml cannot be read"


# the charts


def _data(runs: list[Run]) -> dict[str, Any]:
    """What the page's script draws."""
    return {"runs": [_columns(run) for run in runs], "charts": list(_charts(runs))}


def _columns(run: Run) -> dict[str, Any]:
    """Columns of at most _POINTS rows: means of neighbouring lines, and the least and greatest of banded metrics."""
    lines, elapsed = run.history.lines(), run.history.elapsed()
    keys = dict.fromkeys(key for line in lines for key in line if key != "time")
    size = -(-len(lines) // _POINTS)
    groups = [lines[i : i + size] for i in range(0, len(lines), size)]
    columns: dict[str, list[float | None]] = {key: [_mean(_numbers(group, key)) for group in groups] for key in keys}
    columns["step"] = [group[-1]["step"] for group in groups]
    columns["tokens"] = [number(group[-1], "tokens") for group in groups]
    columns["hours"] = [_rounded(elapsed[min(i + size, len(lines)) - 1] / 3600) for i in range(0, len(lines), size)]
    bands = {}
    for key in _BANDED if size > 1 else ():
        ranges = [_numbers(group, key) for group in groups]
        bands[key] = [[_rounded(end(each)) if each else None for each in ranges] for end in (min, max)]
    firsts = {start.lines[0]["step"] for start in run.history.starts[1:] if start.lines}
    restarts = [index for index, group in enumerate(groups) if firsts & {line["step"] for line in group}]
    return {"name": run.name, "columns": columns, "bands": bands, "restarts": restarts}


def _numbers(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [value for line in lines if (value := number(line, key)) is not None]


def _mean(values: list[float]) -> float | None:
    return _rounded(fmean(values)) if values else None


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


_NATS, _BITS = metric("val_loss").unit, metric("val_bits_per_byte").unit
_LOSSES = {"loss": "training", "val_loss": "validation"}
# Title, unit of the y axis, names of the metrics by their keys, and what the script draws otherwise.
_CHARTS: tuple[tuple[str, str, dict[str, str], dict[str, Any]], ...] = (
    ("Loss", _NATS, _LOSSES, {"wide": True, "height": 330, "robust": True}),
    ("Difference in loss", _NATS, _LOSSES, {"wide": True, "difference": True, "zero": True}),
    ("Bits per byte of held-out text", _BITS, {"val_bits_per_byte": "validation"}, {}),
    ("Learning rate", "learning rate", {"lr": "learning rate"}, {"zero": True, "exact": True}),
    ("Gradient norm", "norm", {"grad_norm": "before clipping"}, {"log": True}),
    ("Throughput", "tokens/s", {"tokens_per_second": "whole job"}, {"zero": True}),
    ("MFU", "% of the bf16 peak", {"mfu": "MFU"}, {"scale": 100, "zero": True}),
    (
        "Time of a step",
        "s",
        {"step_seconds": "step", "data_seconds": "waiting for data"},
        {"zero": True, "robust": True},
    ),
    ("Peak memory", "GiB", {"memory_gib": "peak"}, {"zero": True}),
)
_OF_SOURCES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("Loss by source", _NATS, "loss", {"robust": True}),
    ("Validation loss by source", _NATS, "val_loss", {}),
    ("Bits per byte by source", _BITS, "val_bits_per_byte", {}),
    ("Tokens by source", "tokens", "tokens", {"zero": True, "exact": True}),
    ("Epochs by source", "epochs", "epochs", {"zero": True, "exact": True}),
)
_COUNTS = {"skipped_steps": "skipped steps", "rewinds": "rewinds", "skipped_files": "skipped files"}


def _charts(runs: list[Run]) -> Iterable[dict[str, Any]]:
    """The charts, in order, with the metrics that any of the runs has; every metric has one, but for a few."""
    has = dict.fromkeys(key for run in runs for line in run.history.lines() for key in line)
    sources = [key.partition("/")[2] for key in has if key.startswith("tokens/")]
    known = [each for each in _CHARTS if len(runs) > 1 or "difference" not in each[3]]
    known += [(title, unit, {f"{key}/{name}": name for name in sources}, how) for title, unit, key, how in _OF_SOURCES]
    if any(run.last(key) for run in runs for key in _COUNTS):
        known.append(("Skipped as bad", "count", _COUNTS, {"zero": True, "exact": True}))
    drawn = _NO_CHART | set(_COUNTS) | {key for _, _, keys, _ in known for key in keys}
    families = dict.fromkeys(_family(key) for key in has if key not in drawn)
    known += [
        (name, "value", {key: key for key in has if key not in drawn and _family(key) == name}, {}) for name in families
    ]
    note = f"minus that of {runs[0].name}, at the same place of the x axis; smoothed"
    for title, unit, keys, how in known:
        if found := [_drawn(key, name) for key, name in keys.items() if key in has]:
            chart = {"title": title, "unit": unit, "keys": found} | how
            yield chart | ({"note": note} if "difference" in how else {})


def _drawn(key: str, name: str) -> dict[str, Any]:
    """`points`: it is so sparse that each value is marked."""
    return {"key": key, "name": name, "points": key.startswith("val_")}


def _family(key: str) -> str:
    """Keys of one family differ in their last number alone, such as that of a layer."""
    return key.rstrip("0123456789").rstrip("_")
