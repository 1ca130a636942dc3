"""Groups of state: to add one is to write its class and to name it once; checkpoints do the rest."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swamla_titan.checkpoint.manifest import name_of
from swamla_titan.checkpoint.records import TrainState
from swamla_titan.checkpoint.state import Learned, State, StateGroup, declared
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError


class Table(Learned):
    """What is learned, beside the weights."""

    group = "table"
    if_absent = "holds no table: it begins with ones"
    if_dropped = "holds a table, which is dropped"

    def __init__(self, value: float) -> None:
        self.rows = torch.full((3, 2), value)

    def parts(self) -> list[dict[str, Tensor]]:
        return [{"rows": self.rows}]

    def begin(self) -> None:
        self.rows.fill_(1)


class Scores(Table):
    """Likewise, and every checkpoint has it."""

    group = "scores"
    if_absent = if_dropped = ""


class Streak(StateGroup):
    """The state of a policy: a copy, which `loaded` writes back."""

    group = "streak"

    def __init__(self, length: int) -> None:
        self.length, self.step = length, 0

    def state_dict(self) -> dict[str, Tensor]:
        return {"length": torch.tensor(self.length)}

    def loaded(self, state: dict[str, Tensor], step: int) -> None:
        self.length, self.step = int(state["length"]), step

    @staticmethod
    def problem(state: dict[str, Tensor], step: int) -> str | None:
        return "length is longer than the run" if state["length"] > step else None


KNOWN = declared(Table, Scores, Streak)


def state(*groups: StateGroup) -> State:
    return State(groups, KNOWN, World.alone())


def saved(folder: Path, step: int, *groups: StateGroup) -> Path:
    train_state = TrainState(step, tokens=0, sequences=0, cursors={}, fingerprint={})
    return Checkpoints(folder, 0, known=KNOWN).save(state(*groups).tensors(), train_state, {})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_group_is_saved_checked_and_loaded_without_a_word_about_it_elsewhere(tmp_path):
    path = saved(tmp_path, 7, Table(2.0), Scores(3.0), Streak(4))
    assert Checkpoints(tmp_path, 0, known=KNOWN).newest_intact() == path
    table, scores, streak = Table(0.0), Scores(0.0), Streak(0)
    state(table, scores, streak).load(path, 7)
    assert (table.rows == 2).all()
    assert (scores.rows == 3).all()
    assert (streak.length, streak.step) == (4, 7)
    assert state(table, scores, streak).size() == 3 * 64


class Tied(Scores):
    """A weight whose two ends are on different stages of one rank."""

    def __init__(self, first: float, last: float) -> None:
        self.ends = torch.full((2,), first), torch.full((2,), last)

    def parts(self) -> list[dict[str, Tensor]]:
        return [{"rows": end} for end in self.ends]


def test_of_a_tied_weight_the_first_end_is_saved_and_both_are_loaded(tmp_path):
    path = saved(tmp_path, 7, Tied(3.0, 4.0))
    tied = Tied(0.0, 0.0)
    state(tied).load(path, 7)
    assert [end.tolist() for end in tied.ends] == [[3, 3], [3, 3]]


def test_what_its_check_finds_is_damage(tmp_path):
    saved(tmp_path, 3, Scores(0.0), Streak(4))
    with pytest.raises(UserError, match=r"step-00000003: streak\.length is longer than the run"):
        Checkpoints(tmp_path, 0, known=KNOWN).newest_intact()


def test_a_rewind_loads_what_was_learned_and_leaves_policies(tmp_path):
    path = saved(tmp_path, 7, Scores(3.0), Streak(4))
    scores, streak = Scores(0.0), Streak(1)
    window = {"length": torch.tensor(0)}
    state(scores, streak).load_learned(path, {"streak": window})
    assert (scores.rows == 3).all()
    assert window["length"] == 4
    assert (streak.length, streak.step) == (1, 0)


def test_what_a_checkpoint_lacks_begins_stays_or_is_refused_by_its_group(tmp_path, caplog):
    path = saved(tmp_path, 7, Scores(3.0))
    table, streak = Table(0.0), Streak(1)
    state(table, Scores(0.0), streak).load(path, 7)
    assert warnings(caplog) == [f"{path} holds no table: it begins with ones"]
    assert (table.rows == 1).all()
    assert streak.length == 1
    other = saved(tmp_path, 8, Table(2.0))
    with pytest.raises(UserError, match=rf"(?s){name_of(8)} holds another model:.*scores\.rows is missing"):
        state(Scores(0.0)).load(other, 8)


def test_what_a_run_drops_is_logged(tmp_path, caplog):
    path = saved(tmp_path, 7, Table(2.0), Scores(3.0))
    state(Scores(0.0)).load(path, 7)
    assert warnings(caplog) == [f"{path} holds a table, which is dropped"]


def test_values_that_are_not_finite_are_damage_of_what_was_learned(tmp_path):
    path = saved(tmp_path, 7, Scores(float("nan")))
    with pytest.raises(UserError, match="no finite numbers"):
        state(Scores(0.0)).load(path, 7)
