"""benchmarks/ablations.py: what it interpolates and compares, and that it continues."""

import argparse
import json
import math
import threading
from pathlib import Path

import pytest

from benchmarks import ablations
from swamla_titan.model import FLAVORS
from swamla_titan.model.counts import parameter_counts

CURVE = [(100, 5.0), (200, 4.0), (400, 3.0)]


def result(speed: float, *losses: float) -> dict[str, object]:
    """A run with validations after 100, 200, ... tokens."""
    curve = [[100 * number, loss] for number, loss in enumerate(losses, start=1)]
    return {"tokens_per_second": speed, "wall_seconds": 1.0, "curve": curve, "is_alone": True}


def test_losses_lie_on_lines_between_validations():
    found = [ablations.at_tokens(CURVE, tokens) for tokens in (100, 150, 200, 350, 400)]
    assert found == [5.0, 4.5, 4.0, 3.25, 3.0]
    assert math.isnan(ablations.at_tokens(CURVE, 99))
    assert math.isnan(ablations.at_tokens(CURVE, 401))


def test_differences_are_in_units_of_the_spread():
    assert ablations.difference([4.0, 4.2], [5.0, 5.2]) == "-1.0000 (-7.1 spreads)"  # a spread is 0.1 sqrt(2)
    assert ablations.difference([4.0, 4.2], [5.0]) == ablations.difference([4.1, 4.1], [5.0, 5.0])
    assert ablations.difference([4.1], [5.0]) == "-0.9000"
    assert ablations.summary([4.1]) == "4.1000"


def test_slower_variants_are_read_earlier_at_equal_time():
    results = {
        "parameters": {"plain": 1_000_000, "engram": 2_000_000, "wide": 2_000_000},
        "runs": {
            "plain": {"0": result(100, 6, 4.0), "1": result(100, 6, 4.2), "2": result(400, 6, 4.4)},
            "engram": {"0": result(75, 5, 3.0), "1": result(75, 5, 3.2)},
            "wide": {},
        },
        "timed_runs": {"engram": {"0": result(75, 9.0)}},  # not of all seeds
    }
    _, _, plain, engram, _, end = ablations.table(results)
    assert plain == "| plain | 1.0M | 100 | 3 | 4.2000 ± 0.2000 |  | 4.2000 ± 0.2000 |  |"
    # After 2 s `plain` has trained 200 tokens, `engram` 150.
    beside = [" -1.1000 (-6.4 spreads) ", " 4.0500 ± 0.0707 ", " -0.1500 (-1.0 spreads) "]
    assert engram.split("|")[1:-1] == [" engram ", " 2.0M ", " 75 ", " 2 ", " 3.1000 ± 0.1414 ", *beside]
    assert end == "Equal tokens: 200. Equal time: 2.0 s of training, when `plain` ends."
    results["timed_runs"]["engram"] = {"1": result(75, 5, 3.4), "0": result(75, 5, 3.2)}
    assert " 3.3000 ± 0.1414 " in ablations.table(results)[3].split("|"), "of the runs that end then"


def test_a_wider_ffn_has_as_many_parameters():
    plain = FLAVORS["debug"]
    step = 3 * plain.num_layers * plain.dim * ablations.FFN_STEP
    present, _ = parameter_counts(plain)
    assert ablations.widened(plain, present) == plain.ffn_width
    assert ablations.widened(plain, present + 5 * step + step // 3) == plain.ffn_width + 5 * ablations.FFN_STEP


def arguments(out: Path, **other: object) -> argparse.Namespace:
    values = dict.fromkeys(ablations.SETTINGS, 1) | {"corpus": Path("text.jsonl"), "seeds": [0, 1]}
    values |= {"minutes": None, "together": 1, "equal_time": False, "steps": 100, "validations": 10}
    return argparse.Namespace(**values | {"out": out, "continues": True} | other)


def test_a_run_that_is_there_is_not_trained_again(tmp_path, monkeypatch):
    trained, out = [], tmp_path / "results.json"
    outcomes = iter([result(100, 5), KeyboardInterrupt(), result(100, 4), None, result(100, 3), result(100, 2)])

    def one_run(overrides, seed, steps, _):
        trained.append((*overrides, seed))
        outcome = next(outcomes)
        if isinstance(outcome, KeyboardInterrupt):
            raise outcome
        return outcome

    def run(**other: object) -> bool:
        return ablations.run_all(ablations.begin(arguments(out)), arguments(out, **other))

    monkeypatch.setattr(ablations, "one_run", one_run)
    monkeypatch.setattr(ablations, "overrides_of", lambda _: {"plain": ["plain"], "selective": ["selective"]})
    monkeypatch.setattr(ablations, "model_of", lambda *_: None)
    monkeypatch.setattr(ablations, "parameter_counts", lambda _: (1, 1))
    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(json.loads(out.read_text())["runs"]["plain"]) == ["0"]
    assert not run(minutes=1e-9), "no time for another run"
    assert not run(), "one failed"
    assert run()
    again = [("selective", 0), ("plain", 1), ("selective", 1), ("plain", 1)]
    assert trained == [("plain", 0), ("selective", 0), *again]
    runs = json.loads(out.read_text())["runs"]
    assert runs["selective"] == {"0": result(100, 4), "1": result(100, 3)}
    assert runs["plain"] == {"0": result(100, 5), "1": result(100, 2)}


def test_runs_share_the_gpu_once_each_variant_has_a_speed(tmp_path, monkeypatch):
    trained, out = [], tmp_path / "results.json"
    both = threading.Barrier(2, timeout=60)

    def one_run(overrides, seed, steps, _):
        trained.append((*overrides, seed))
        if seed:
            both.wait()  # fails unless two run at once
        return result(50 if seed else 100, 5)

    monkeypatch.setattr(ablations, "one_run", one_run)
    monkeypatch.setattr(ablations, "overrides_of", lambda _: {"plain": ["plain"], "selective": ["selective"]})
    monkeypatch.setattr(ablations, "model_of", lambda *_: None)
    monkeypatch.setattr(ablations, "parameter_counts", lambda _: (1, 1))
    given = arguments(out, together=2)
    assert ablations.run_all(ablations.begin(given), given)
    assert trained[:2] == [("plain", 0), ("selective", 0)]
    assert sorted(trained[2:]) == [("plain", 1), ("selective", 1)]
    results = json.loads(out.read_text())
    assert not results["runs"]["plain"]["1"]["is_alone"]
    assert "| plain | 0.0M | 100 | 2 |" in ablations.table(results)[2], "the speed is that of the run alone"


def test_slower_variants_are_trained_for_as_long_as_the_fastest(tmp_path, monkeypatch):
    trained, out = [], tmp_path / "results.json"

    def one_run(overrides, seed, steps, _):
        trained.append((*overrides, seed, steps))
        return result(100 if overrides == ["plain"] else 77, 5)

    monkeypatch.setattr(ablations, "one_run", one_run)
    monkeypatch.setattr(ablations, "overrides_of", lambda _: {"plain": ["plain"], "selective": ["selective"]})
    monkeypatch.setattr(ablations, "model_of", lambda *_: None)
    monkeypatch.setattr(ablations, "parameter_counts", lambda _: (1, 1))
    given = arguments(out, equal_time=True)
    assert ablations.run_all(ablations.begin(given), given)
    assert trained[4:] == [("selective", 0, 80), ("selective", 1, 80)]  # 77, in whole intervals of validation
    results = json.loads(out.read_text())
    assert list(results["timed_runs"]["selective"]) == ["0", "1"]
    assert ablations.run_all(results, given)
    assert len(trained) == 6


def test_results_of_other_settings_are_refused(tmp_path):
    out = tmp_path / "results.json"
    ablations.write(ablations.begin(arguments(out)), out)
    with pytest.raises(SystemExit, match="other settings: steps"):
        ablations.begin(arguments(out, steps=2))
    with pytest.raises(SystemExit, match="--continue"):
        ablations.begin(arguments(out, continues=False))
