"""events.jsonl, and that docs/metrics.md describes what runs write."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

import swamla_titan
from swamla_titan.metrics import METRICS, metric
from swamla_titan.system import events
from swamla_titan.system.events import record_event, seconds_since_start
from swamla_titan.train.trainer import Trainer
from tests.distributed.job import before_step
from tests.tiny_config import tiny_config
from tests.train.runs import train

DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
FAST = ("--data.num_workers", "0", "--training.steps", "4", "--validation.interval", "2", "--checkpoint.interval", "2")


def found(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def documented(columns: int) -> list[list[str]]:
    rows = re.findall(r"^\| (`.*) \|$", DOCS, flags=re.MULTILINE)
    cells = ([cell.strip() for cell in row.split("|")] for row in rows)
    return [each for each in cells if len(each) == columns]


def test_the_page_has_every_metric_and_no_other_under_its_tag_and_in_its_unit():
    rows = {key.strip("`"): (tag.strip("`"), unit) for key, unit, _, _, tag in documented(5)}
    assert {key: (each.tag, each.unit) for key, each in METRICS.items()} == {
        key: value for key, value in rows.items() if key not in ("step", "time")
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run that was resumed after step 2, which tests only read."""
    folder = tmp_path_factory.mktemp("events")
    config = tiny_config(folder)
    assert train(config, *FAST, "--training.steps", "2") == 0
    assert train(config, *FAST) == 0
    return folder / "run"


def test_a_run_writes_no_metric_that_the_page_does_not_have(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    always = {key.strip("`") for key, _, when, _, _ in documented(5) if when == "always"}
    of_validation = {"val_loss", "val_bits_per_byte"}
    for line in lines:
        expected = always | {"skipped_steps"} | (of_validation if line["step"] % 2 == 0 else set())
        assert line.keys() == expected


def test_the_log_file_has_the_lines_of_before_there_was_a_file(run):
    """Such as what the run resumes from, and which differences were allowed."""
    lines = (run / "logs" / "rank-0.log").read_text().splitlines()
    counts = {
        part: sum(part in line for line in lines) for part in ("a new run", "resumed from", " model: ", " data: ")
    }
    assert counts == {"a new run": 1, "resumed from": 1, " model: ": 2, " data: ": 2}


def test_the_page_has_every_event_that_the_program_records():
    sources = (path.read_text() for path in Path(swamla_titan.__file__).parent.rglob("*.py"))
    recorded = {name for source in sources for name in re.findall(r"(?:record|timed)_event\(\s*\"(\w+)\"", source)}
    assert recorded == {row[0].strip("`") for row in documented(3)}


def test_a_run_records_starts_pauses_checkpoints_and_ends_with_the_keys_of_the_page(run):
    seen = found(run)
    assert [each["time"] for each in seen] == sorted(each["time"] for each in seen)
    keys = {name.strip("`"): set(re.findall(r"`(\w+)`", text)) for name, text, _ in documented(3)}
    for each in seen:
        allowed = keys[each["event"]] | {"time", "event"}
        assert each.keys() == allowed - ({"error"} if each["event"] == "end" else set())
    starts = [each for each in seen if each["event"] == "start"]
    assert [each["step"] for each in starts] == [0, 2]
    assert [(each["ranks"], each["machines"], each["device"]) for each in starts] == [(1, 1, "CPU")] * 2
    assert {each["step"] for each in seen if each["event"] == "checkpoint"} == {2, 4}
    assert {(each["step"], each["doing"]) for each in seen if each["event"] == "pause"} >= {
        (step, doing) for step in (2, 4) for doing in ("validation", "checkpoint")
    }
    assert [(each["step"], each["code"]) for each in seen if each["event"] == "end"] == [(2, 0), (4, 0)]
    record_event("start", step=9)  # outside of a run it goes nowhere
    assert found(run) == seen


def test_how_a_run_ended_is_recorded(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert train(tiny, *FAST, "--fault_tolerance.skip_bad_steps", "false", "--optimizer.lr", "1e20") == 1
    assert found(run)[-1]["error"].startswith("RunFailed: step ")
    monkeypatch.setattr(Trainer, "run", Trainer.run)  # restored afterwards
    before_step(3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    assert train(tiny, *FAST, "--job.dump_folder", str(tmp_path / "stopped")) == 75
    *_, saved, end = found(tmp_path / "stopped")
    assert (saved["event"], end["event"], end["step"], end["code"]) == ("pause", "end", 3, 75)


def test_the_age_of_this_process_is_in_seconds_or_unknown(monkeypatch):
    age = seconds_since_start()
    assert age is not None
    assert 0 < age < 1e5
    monkeypatch.setattr(events.time, "clock_gettime", lambda clock: 0.0)
    assert seconds_since_start() is None


def test_keys_that_the_page_cannot_list_have_a_group():
    tags = {"loss/web": "sources/loss/web", "val_loss/web": "sources/val_loss/web", "tokens/web": "sources/tokens/web"}
    tags |= {"arc_easy/acc": "arc_easy/acc", "engram_gate_2": "other/engram_gate_2", "loss": "loss/train"}
    assert {key: metric(key).tag for key in tags} == tags
