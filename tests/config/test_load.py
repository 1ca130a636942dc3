import dataclasses
from pathlib import Path

import pytest

from swamla_titan.config import Config, Override, load_config, shipped_configs, split_overrides, to_toml
from swamla_titan.config.sections import KEYS, SECTIONS
from swamla_titan.errors import UserError
from swamla_titan.model import FLAVORS


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


BUILTIN = '[data]\nsource = "builtin"\n'


def message(path: Path, *overrides: Override) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_precedence_is_command_line_then_file_then_flavor_then_default(toml):
    path = toml(BUILTIN + '[model]\nflavor = "debug"\ndim = 256\nnum_layers = 4\n[training]\nseq_len = 128\n')
    config = load_config(path, [Override("model", "num_layers", "3"), Override("training", "steps", "7")])
    assert config.model.num_layers == 3  # command line over file
    assert config.model.dim == 256  # file over flavor
    assert config.model.kv_lora_rank == FLAVORS["debug"].kv_lora_rank  # flavor over default
    assert config.training.seq_len == 128
    assert config.training.steps == 7
    assert config.optimizer.beta2 == 0.95  # default


def test_a_flavor_on_the_command_line_replaces_the_file_s(toml):
    config = load_config(toml(BUILTIN + '[model]\nflavor = "debug"\n'), [Override("model", "flavor", "base")])
    assert dataclasses.replace(config.model, vocab_size=50257) == FLAVORS["base"]


def test_every_error_of_a_file_is_reported_at_once(toml):
    path = toml(
        """
stray = 1
[trainning]
steps = 3
[training]
steps = "ten"
seq_length = 5
local_batch_size = 0
max_grad_norm = true
[checkpoint]
async_mode = "asynchronous"
[data]
source = "local"
[lr_schedule]
decay_steps = 5
name = 3
[model]
flavor = "smal"
"""
    )
    text = message(path, Override("optimizer", "learning_rate", "1"), Override("job", "deterministic", "yes"))
    assert str(path) in text
    assert "12 errors" in text.splitlines()[0]
    assert len(text.splitlines()) == 13
    for part in (
        "stray = 1: every key belongs in a section",
        "[trainning]: unknown section; did you mean `training`?",
        '[training] steps = "ten": expected a whole number >= 1',
        "[training] seq_length = 5: unknown key; did you mean `seq_len`?",
        "[training] local_batch_size = 0: expected a whole number >= 1",
        "[training] max_grad_norm = true: expected a number >= 0",
        '[checkpoint] async_mode = "asynchronous": expected one of "async", "disabled"',
        '[model] flavor = "smal": unknown flavor; did you mean `small`?',
        "--optimizer.learning_rate 1: unknown key",
        '[job] deterministic = "yes": expected true or false',
        '[data] path: data.source = "local" needs a file or folder',
        "[lr_schedule] name = 3: expected one of",
    ):
        assert part in text, part


def test_a_key_of_another_section_is_pointed_there(toml):
    assert "did you mean it in [optimizer]?" in message(toml(BUILTIN + "[training]\nlr = 1.0\n"))


@pytest.mark.parametrize(
    "text, part",
    [
        ("[model]\ndim = 100\nnum_heads = 16\n", "[model] num_heads: 16 does not divide dim = 100"),
        ("[model]\nqk_rope_head_dim = 63\n", "[model] qk_rope_head_dim: 63 must be even"),
        ("[training]\nseq_len = 4096\n", "longer than model.max_seq_len = 2048"),
        (
            "[lr_schedule]\ndecay_steps = 5\n",
            '5 has no effect with lr_schedule.name = "cosine": leave it out, or set lr_schedule.name = "wsd"',
        ),
        ('[lr_schedule]\nname = "wsd"\nwarmup_steps = 100\ndecay_steps = 950\n', "more than training.steps = 1000"),
        ("[validation]\nfraction = 0\n", "0 holds nothing out"),
        ("[optimizer]\nlr = nan\n", "expected a number >= 0"),
        ('[float8]\nrecipe = "nativ"\n', "; did you mean `native`?"),
        (
            '[checkpoint]\nallow = "model,dta"\n',
            "model, data, tokenizer, batch, separated by commas, or nothing; did you",
        ),
        ("[training]\nmax_grad_norm = inf\n", "expected a number >= 0"),
        ("[profiling]\nenabled = true\nstart_step = 1001\n", "after the last step, training.steps = 1000"),
        ("[parallel]\ntensor = 3\n", "[parallel] tensor: 3 ranks cannot share model.num_heads = 16"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(toml, text, part):
    assert part in message(toml(BUILTIN + text))


@pytest.mark.parametrize(
    "text, part",
    [
        ('[data]\nsource = "local"\n', 'data.source = "local" needs a file or folder'),
        ('[data]\nsource = "huggingface"\n', "needs the name of a dataset"),
        ('[data]\nsource = "builtin"\npath = "x"\n', '[data] path: "x" has no effect with data.source = "builtin"'),
        (
            '[data]\nsource = "builtin"\nname = "x"\n',
            '[data] name: "x" has no effect with data.source = "builtin": leave it out, or set data.source = "hug',
        ),
        (
            '[data]\nsource = "builtin"\ntext_separator = "x"\n',
            '[data] text_separator: "x" has no effect with data.source = "builtin"',
        ),
    ],
)
def test_a_source_and_its_path_must_agree(toml, text, part):
    assert part in message(toml(text))


@pytest.mark.parametrize("text", ["", '[model]\nflavor = "small"\n', "[training]\nsteps = 5\n"])
def test_a_file_without_data_is_answered_with_lines_to_paste(toml, text):
    lines = message(toml(text)).splitlines()
    assert lines[0].endswith("1 error in the configuration")
    assert lines[1].startswith("  [data] is missing: what is to be read? For FineWeb-Edu")
    pasted = "\n".join(lines[2:])
    config, shipped = load_config(toml(f"{text}\n{pasted}\n")).data, load_config(shipped_configs()["small"]).data
    assert [line.strip().split(" = ")[0] for line in lines[2:]] == ["[data]", "source", "path", "name"]
    assert (config.source, config.path, config.name) == (shipped.source, shipped.path, shipped.name)


def test_so_is_one_of_whose_data_the_command_line_says_no_more_than_the_tokenizer(toml):
    file = toml("[training]\nsteps = 5\n")
    assert "[data] is missing" in message(file, Override("data", "tokenizer", "byte"))
    assert "[data] path: " in message(file, Override("data", "source", "local"))


def test_data_may_come_from_the_command_line_alone(toml):
    assert load_config(toml("[training]\nsteps = 5\n"), [Override("data", "source", "builtin")]).training.steps == 5


def test_a_missing_file_and_a_file_that_is_no_toml(toml, tmp_path):
    assert "cannot be read" in message(tmp_path / "none.toml")
    assert "not a TOML file" in message(toml("[training\nsteps = 1"))


def test_overrides_are_taken_out_of_a_command_line():
    overrides, rest = split_overrides(["train", "--training.steps", "5", "x.toml", "--model.dim=-1", "--help"])
    assert overrides == [Override("training", "steps", "5"), Override("model", "dim", "-1")]
    assert rest == ["train", "x.toml", "--help"]
    assert split_overrides(["--prompt", "--hello. world"]) == ([], ["--prompt", "--hello. world"])
    with pytest.raises(UserError, match="a value must follow"):
        split_overrides(["--training.steps"])
    with pytest.raises(UserError, match="a value must follow"):
        split_overrides(["--training.steps", "--model.dim", "3"])


def test_every_section_and_key_survives_writing_and_reading(toml):
    path = toml(BUILTIN + '[job]\ndump_folder = "a \\"b\\" \\\\ ü"\n[model]\nrope_theta = 5e5\n')
    config = load_config(path)
    for comments in (False, True):
        assert load_config(toml(to_toml(config, comments))) == config
    assert [section for section in SECTIONS if f"[{section}]" not in to_toml(config)] == []


def test_a_table_comes_from_a_section_of_its_own_or_a_line_and_survives_writing_and_reading(toml):
    own = toml(BUILTIN + '[optimizer.lr_multipliers]\n"*.wo.weight" = 2\n"norm.*" = 0.5\n')
    config = load_config(own)
    assert list(config.optimizer.lr_multipliers.items()) == [("*.wo.weight", 2.0), ("norm.*", 0.5)]
    assert list(load_config(toml(to_toml(config))).optimizer.lr_multipliers) == ["*.wo.weight", "norm.*"]
    line = Override("optimizer", "lr_multipliers", '{"embedding.weight" = 3}')
    assert load_config(own, [line]).optimizer.lr_multipliers == {"embedding.weight": 3.0}
    for text in ("3", '{"norm.weight" = true}', "{norm.weight = 1}", '{"norm.weight" = nan}', "{"):
        error = message(own, Override("optimizer", "lr_multipliers", text))
        assert "[optimizer] lr_multipliers = " in error
        assert "expected a table of numbers >= 0" in error


def test_every_shipped_configuration_loads():
    assert "debug" in shipped_configs()
    for path in shipped_configs().values():
        assert isinstance(load_config(path), Config)


def test_every_key_has_a_meaning():
    for name, setting in KEYS.items():
        assert setting.doc.endswith("."), name
