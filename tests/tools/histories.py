"""Dump folders made by hand: what runs leave for `report` and `watch`."""

import json
from pathlib import Path
from typing import Any

Object = dict[str, Any]


def append(path: Path, objects: list[Object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in objects)


def line(step: int, time: float, seconds: float = 1.0, **values: float) -> Object:
    """A step's line of metrics; the loss is 10 / step."""
    usual = {"tokens": 100 * step, "epoch": 0, "loss": 10 / step, "grad_norm": 1.0, "lr": 1e-3, "memory_gib": 2.0}
    speed = {"tokens_per_second": 100 / seconds, "data_seconds": 0.1 * seconds, "step_seconds": seconds}
    return {"step": step, "time": time} | usual | speed | values


def event(name: str, time: float, **values: Any) -> Object:
    return {"time": time, "event": name} | values


def start(step: int, time: float, ranks: int = 1, device: str = "CPU") -> Object:
    common = {"machines": 1, "device": device, "setup_seconds": 5.0, "version": "0"}
    return event("start", time, step=step, ranks=ranks) | common


def write(folder: Path, lines: list[Object], events: list[Object], steps: int = 10, more: str = "") -> Path:
    append(folder / "metrics.jsonl", lines)
    append(folder / "events.jsonl", events)
    (folder / "config.toml").write_text(f'[job]\ndump_folder = "{folder}"\n[training]\nsteps = {steps}\n{more}')
    return folder


def killed_and_resumed(folder: Path) -> Path:
    """Eight GPUs take steps 1 to 6 and are killed; seven continue after step 4, skip 7, rewind from 8 to 6, and finish.

    Begins at 1000. Usual steps take 1 s, the first of each start 11 s, a validation 2 s, a checkpoint 3 s.
    """
    gpus = {"device": "H200"}
    first = [line(1, 1016, 11), *(line(step, 1015 + step) for step in (2, 3))]
    first += [line(4, 1019, val_loss=2.5, val_bits_per_byte=1.5), line(5, 1025), line(6, 1026)]
    second = [line(5, 1056, 11), *(line(step, 1051 + step) for step in (6, 7, 8)), line(9, 1064), line(10, 1065)]
    events = [
        start(0, 1005, 8) | gpus,
        event("pause", 1021, step=4, doing="validation", seconds=2.0),
        event("pause", 1024, step=4, doing="checkpoint", seconds=3.0),
        event("checkpoint", 1025, step=4, seconds=3.5),
        start(4, 1045, 7) | gpus,
        event("skipped", 1058, steps=[7]),
        event("pause", 1063, step=8, doing="rewind", seconds=4.0),
        event("rewind", 1063, step=8, trained=6),
        event("end", 1066, step=10, code=0),
    ]
    return write(folder, first + second, events)
