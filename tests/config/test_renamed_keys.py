"""Keys by the names of the previous version work, with a notice: in files, on the command line, in resumed runs."""

from pathlib import Path

import pytest

from swamla_titan.checkpoint import resume
from swamla_titan.checkpoint.records import TrainState
from swamla_titan.checkpoint.resume import Origin
from swamla_titan.conditions import value_at
from swamla_titan.config import load_config, split_overrides
from swamla_titan.config.sections import KEYS, RENAMED
from swamla_titan.config.toml import toml
from swamla_titan.errors import UserError
from tests.config.test_effects import another_value

BUILTIN = 'data.source = "builtin"\nfloat8.recipe = "native"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_gives_the_key_its_value_and_a_notice(old: str, path: Path):
    new, value = RENAMED[old], another_value(RENAMED[old])
    assert old not in KEYS
    notices: list[str] = []
    path.write_text(f"{BUILTIN}{old} = {toml(value)}\n")
    assert value_at(load_config(path, (), notices.append), new) == value
    path.write_text(BUILTIN)
    overrides, _ = split_overrides([f"--{old}", str(value)])
    assert value_at(load_config(path, overrides, notices.append), new) == value
    section, _, key = old.rpartition(".")
    assert [line.partition(";")[0] for line in notices] == [
        f"[{section}] {key} is now called {new}",
        f"--{old} is now called --{new}",
    ]


def test_the_command_line_beats_the_file_under_either_name(path: Path):
    path.write_text(BUILTIN + 'float8.products = "auto"\n')
    for option in ("--float8.products=all", "--float8.linear_layers=all"):
        assert load_config(path, split_overrides([option])[0]).float8.linear_layers == "all"


def test_both_names_at_once_and_wrong_values_are_refused(path: Path):
    path.write_text(BUILTIN + 'float8.products = "auto"\nfloat8.linear_layers = "all"\nkernels.pointwise = "some"\n')
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert "[float8] products is now called float8.linear_layers, which is given as well: leave products out" in str(
        caught.value
    )
    assert '[kernels] elementwise = "some": expected one of "auto", "triton", "plain"' in str(caught.value)


def test_a_checkpoint_that_recorded_a_key_under_its_old_name_is_continued(monkeypatch):
    monkeypatch.setattr(resume, "RENAMED", {"data.mask": "data.document_mask"})
    state = TrainState(step=1, tokens=1, sequences=1, cursors={}, fingerprint={"data.mask": True})
    assert Origin(Path("run"), state).resume({"data.document_mask": True}) is state
    with pytest.raises(UserError, match=r"data\.document_mask"):
        Origin(Path("run"), state).resume({"data.document_mask": False})
