"""The judge of the fuzz tests finds what it is there for."""

import dataclasses
import random
from pathlib import Path

import pytest

from tests.fuzz.harness import Bench, Case, Outcome, assert_handled, fuzz

REFUSED = Outcome(Case(["plan", "x"]), 2, False, 0.1, "", "error: x: 1 error in the configuration\n  [job] seed\n", [])
DONE = dataclasses.replace(REFUSED, code=0, out="fine\n", err="")


def test_what_is_handled():
    assert_handled(REFUSED)
    assert_handled(DONE)
    assert_handled(dataclasses.replace(REFUSED, case=Case(["check", "x"]), out="failure  config  no\n", err=""))


@pytest.mark.parametrize(
    "outcome, problem",
    [
        (dataclasses.replace(DONE, code=1), "ended with 1"),
        (dataclasses.replace(DONE, code=75), "ended with 75"),
        (dataclasses.replace(DONE, code=-11), "did not end by itself"),
        (dataclasses.replace(REFUSED, late=True), "did not end by itself"),
        (dataclasses.replace(DONE, out="Traceback (most recent call last)"), "traceback"),
        (dataclasses.replace(DONE, err="error: but done"), "exit code 0"),
        (dataclasses.replace(REFUSED, err=""), "not exactly one message"),
        (dataclasses.replace(REFUSED, err="error: \n"), "an empty message"),
        (dataclasses.replace(REFUSED, err="error: a\nerror: b\n"), "not exactly one message"),
        (dataclasses.replace(REFUSED, err="error: a\n/lib/x.py:3: UserWarning: b\n"), "more on standard error"),
        (dataclasses.replace(REFUSED, err="error: " + "a" * 20_000), "a message of 20007 characters"),
        (dataclasses.replace(REFUSED, touched=["home/x"]), "touched"),
    ],
)
def test_what_is_not(outcome: Outcome, problem: str):
    with pytest.raises(AssertionError, match=problem):
        assert_handled(outcome)


def test_a_command_is_run_and_what_it_touches_is_seen(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = bench.folder("seen")
    listed = bench.run(Case(["config", "ls"]), folder)
    assert_handled(listed)
    assert "debug" in listed.out
    refused = bench.run(Case(["plan", "nowhere.toml"]), folder)
    assert refused.code == 2
    assert_handled(refused)
    copy = ["config", "cp", "debug", "../beside/mine.toml"]
    assert bench.run(Case(copy), folder).touched == ["beside/mine.toml"]
    (folder / "beside" / "mine.toml").unlink()
    assert bench.run(Case(copy, may_write=("beside",)), folder).touched == []

    monkeypatch.setenv("FUZZ_CASE", "7")
    monkeypatch.setenv("FUZZ_KEEP", str(tmp_path))
    with pytest.raises(AssertionError, match="FUZZ_CASE=7"):
        fuzz(bench, "copies", lambda rng, folder: Case(copy))
    assert (tmp_path / "copies-7" / "beside" / "mine.toml").exists()


def test_a_case_follows_from_its_seed_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    drawn = []

    def make_case(rng: random.Random, folder: Path) -> Case:
        drawn.append(rng.random())
        return Case(["config", "ls"])

    monkeypatch.setenv("FUZZ_SECONDS", "0")
    for seed in ("3", "4", "3"):
        monkeypatch.setenv("FUZZ_SEED", seed)
        assert fuzz(bench, "seeds", make_case) == 1
    assert drawn[0] == drawn[2] != drawn[1]
