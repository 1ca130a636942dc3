"""[model.engram]: a section within a section, with presets, overrides, and errors that give the numbers."""

from pathlib import Path

import pytest

from swamla_titan.cli import main
from swamla_titan.config import load_config, split_overrides, to_toml
from swamla_titan.errors import UserError
from swamla_titan.model import ModelConfig
from swamla_titan.model.annex_config import EngramConfig

START = 'data.source = "builtin"\ntraining.seq_len = 64\n[model]\nflavor = "debug"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def loaded(path: Path, text: str, *overrides: str) -> EngramConfig:
    path.write_text(START + text)
    config = load_config(path, split_overrides(overrides)[0], pytest.fail)
    again = path.with_name("again.toml")
    again.write_text(to_toml(config))
    assert load_config(again, (), pytest.fail) == config
    return config.model.engram


def refusal(path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        loaded(path, text, *overrides)
    return str(caught.value)


def test_it_is_off_by_default(path: Path):
    assert loaded(path, "") == EngramConfig()
    assert EngramConfig().layers == ()


def test_keys_come_from_the_section_and_from_the_command_line(path: Path):
    text = "[model.engram]\nlayers = [1, 4]\nd_mem = 64\n"
    assert loaded(path, text) == EngramConfig(layers=(1, 4), d_mem=64)
    for value in ("0,3", "[0, 3]"):
        assert loaded(path, text, "--model.engram.layers", value).layers == (0, 3)
    assert loaded(path, "", "--model.engram.layers=5", "--model.engram.sharpen_gate", "true").sharpen_gate
    assert loaded(path, text.replace("[model.engram]\n", "engram.").replace("d_mem", "engram.d_mem")).d_mem == 64
    assert loaded(path, "[model.engram]\nlayers = [1]\n", "--model.engram.layers", "") == EngramConfig()


def test_presets_give_what_is_not_given(path: Path):
    preset = '[model.engram]\npreset = "design"\n'
    design = loaded(path, preset, "--model.num_layers", "7")
    assert design == EngramConfig((2, 6), (2, 3), heads=4, d_mem=512, kernel=4)
    assert loaded(path, preset, "--model.engram.layers", "0") == EngramConfig((0,))
    large = loaded(path, preset, "--model.num_layers", "15", "--model.engram.preset", "deepseek-v4.1-flash")
    assert (large.layers, large.orders, large.heads, large.row_width) == ((1, 14), (2, 3, 4), 8, 256)
    for kind in EngramConfig.presets.values():
        assert ModelConfig(num_layers=15, engram=kind).engram == kind


@pytest.mark.parametrize(
    "text, parts",
    [
        ("layers = [2, 6]", ["[model.engram] layers: [2, 6]: there is no layer 6: the 6 layers are 0 to 5"]),
        ("layers = [0]\nheads = 3", ["d_mem: 512 cannot be divided", "3 x 2 = 6 tables: use 510 or 516"]),
        ("layers = [0, 0]", ["layers: [0, 0]: expected different numbers, the smallest first"]),
        ("layers = [0]\norders = [3, 2]", ["orders: [3, 2]: expected one or more different numbers"]),
        ("layers = 2", ["[model.engram] layers = 2: expected a list of whole numbers >= 0"]),
        ('layers = ["a"]', ['[model.engram] layers = ["a"]: expected a list of whole numbers']),
        ("layers = [true]", ["expected a list of whole numbers"]),
        ("layers = [0]\norders = [5]", ["orders = [5]: expected a list of whole numbers >= 2 and <= 4"]),
        ("layer = [0]", ["[model.engram] layer = [0]: unknown key; did you mean `layers`?"]),
        ('preset = "desing"', ['preset = "desing": unknown preset; did you mean `design`?']),
        ("d_mem = 64", ["d_mem: 64 has no effect with model.engram.layers = []"]),
    ],
)
def test_mistakes_are_refused_with_the_numbers(path: Path, text: str, parts: list[str]):
    message = refusal(path, f"[model.engram]\n{text}\n")
    for part in parts:
        assert part in message


def test_a_section_that_is_none_is_refused_with_the_nearest(path: Path):
    assert "[model.engramm]: unknown section; did you mean `model.engram`?" in refusal(path, "[model.engramm]\nx = 1\n")
    assert "[model.engram] is a section, with keys of its own" in refusal(path, "engram = 3\n")
    assert "--model.engram 2: unknown key; [model.engram] is a section" in refusal(path, "", "--model.engram", "2")
    assert "--model.engram.layerz 2: unknown key; did you mean `layers`?" in refusal(
        path, "", "--model.engram.layerz", "2"
    )
    assert "--model.engrim.layers 2: unknown section; did you mean `model.engram`?" in refusal(
        path, "", "--model.engrim.layers", "2"
    )


def test_the_command_ends_with_the_code_of_wrong_input(path: Path, capsys: pytest.CaptureFixture[str]):
    path.write_text(START)
    assert main(["train", str(path), "--model.engram.layers", "2,6"]) == 2
    assert "there is no layer 6" in capsys.readouterr().err
