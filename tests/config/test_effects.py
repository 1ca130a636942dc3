"""A key that was set and cannot have an effect is refused; effects.py and the model's keys say when each has one."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from swamla_titan.cli import main
from swamla_titan.config import Override, load_config, shipped_configs, to_toml
from swamla_titan.config.effects import NEEDS, without_effect
from swamla_titan.config.sections import KEYS, SECTIONS, Config
from swamla_titan.config.toml import toml
from swamla_titan.errors import UserError
from swamla_titan.fields import INTEGERS
from swamla_titan.model import FLAVORS, ModelConfig
from swamla_titan.optim import lr_factor
from tests.config.test_every_key_reaches_its_consumer import CASES

CONDITIONAL = list(NEEDS)

# What takes a key its effect, where builtin data and the other defaults do not; a beginning stands for all such names.
OFF: dict[str, dict[str, Any]] = {
    "data.num_workers": {"data.streams": 1},
    "training.local_batch_size": {"training.global_batch_size": 1},
    "optimizer.eps": {"optimizer.name": "lion"},
    "optimizer.decay_embeddings": {"optimizer.weight_decay": 0},
    "optimizer.moments": {"optimizer.name": "adamw8bit"},
    "lr_schedule.warmup_steps": {"training.steps": 1},
    "lr_schedule.decay_steps": {"lr_schedule.name": "linear"},
    "parallel.reshard_after_forward": {"parallel.data_parallel": "ddp"},
    "parallel.cpu_offload": {"parallel.data_parallel": "ddp"},
    "parallel.reduce_every_micro_batch": {"parallel.data_parallel": "ddp"},
    "compile.cache_folder": {"compile.enabled": False},
    "activation_checkpoint.memory_budget": {"activation_checkpoint.mode": "full"},
    "checkpoint.keep_every": {"checkpoint.keep_latest": 0},
    "validation.fraction": {"validation.path": "held-out.txt"},
    "validation.max_tokens": {"validation.interval": 0},
    "fault_tolerance.first_step_timeout": {"fault_tolerance.step_timeout": 0},
    "fault_tolerance.": {"fault_tolerance.skip_bad_steps": False},
    **{f"model.{annex}.": {f"model.{annex}.layers": []} for annex in ModelConfig.annex_configs()},
    "model.mla_layers_per_cycle": {"model.swa_layers_per_cycle": 99},
    "model.selection_head": {"model.mla_selective": False},
    "model.rope_theta": {"model.swa_rope_theta": 5.0, "model.mla_rope_theta": 5.0},
}


def what_takes_its_effect(name: str) -> dict[str, Any]:
    if kind := getattr(NEEDS[name], "kind", None):  # of block
        return {f"model.{kind}_layers_per_cycle": 0}
    return next((values for beginning, values in OFF.items() if name.startswith(beginning)), {})


def another_value(name: str) -> Any:
    """Not the default, in range, and as its rule has it beside the other defaults."""
    setting = KEYS[name]
    default, rule = setting.default, setting.rule or (lambda *_: None)
    others = dataclasses.asdict(SECTIONS[name.rpartition(".")[0]]())
    if setting.choices:
        return next(value for value in setting.choices if value != default)
    candidates = {bool: [not default], str: ["something"], INTEGERS: [[2]]}.get(setting.kind, [2, 3, 4, 0.5, 0.25])
    fitting = (value for value in candidates if value != default and not setting.problem(value))
    return next(value for value in fitting if not rule(value, others))


def as_shown(name: str, value: Any) -> str:
    return toml(float(value) if KEYS[name].kind is float else value)


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text("\n".join(f"{name} = {toml(value)}" for name, value in values.items()) + "\n")
    return path


def refusal(path: Path, *overrides: Override) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_key_without_effect_is_refused_with_what_takes_it_away_and_what_to_set(name: str, tmp_path: Path):
    value = another_value(name)
    off = what_takes_its_effect(name)
    path = write(tmp_path / "run.toml", {"data.source": "builtin"} | off | {name: value})
    section, _, key = name.rpartition(".")
    found = [line for line in refusal(path).splitlines() if f"[{section}] {key}: " in line]
    assert len(found) == 1
    assert f"[{section}] {key}: {as_shown(name, value)} has no effect with " in found[0]
    assert ": leave it out, or set " in found[0]
    for other, value in off.items():
        assert f"{other} = {as_shown(other, value)}" in found[0]
    # The default in its place is nobody's mistake.
    rest = write(tmp_path / "rest.toml", {"data.source": "builtin"} | off)
    try:
        load_config(rest)
    except UserError as error:
        assert f"[{section}] {key}: " not in str(error)  # noqa: PT017 (it may be refused for something else)


def test_every_key_has_a_condition_or_a_proof_that_it_always_counts():
    """The proof is a case of the every-key test, or for a model's key one of tests/model."""
    without = KEYS.keys() - set(CONDITIONAL)
    assert {name for name in without if not name.startswith("model.")} <= CASES.keys()
    layers = {f"model.{kind}_layers_per_cycle" for kind in ModelConfig.kinds()}
    layers |= {f"model.{annex}.layers" for annex in ModelConfig.annex_configs()}
    assert {name for name in without if name.startswith("model.")} == (layers & without) | {
        *("model.num_layers", "model.dim", "model.num_heads", "model.vocab_size", "model.max_seq_len"),
        *("model.ffn_hidden_dim", "model.norm", "model.tie_embeddings"),
        *("model.rope_scaling", "model.dropout", "model.z_loss", "model.label_smoothing"),
    }


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_pass_without_a_warning(name: str):
    lines: list[str] = []
    load_config(shipped_configs()[name], warn=lines.append)
    assert lines == []


def test_an_override_that_takes_a_key_of_the_file_its_effect_is_worth_a_warning(tmp_path: Path, capsys):
    path = write(tmp_path / "run.toml", {"data.source": "builtin", "optimizer.eps": 1e-6, "data.tokenizer": "byte"})
    lion = Override("optimizer", "name", "lion")
    lines: list[str] = []
    config = load_config(path, [lion], lines.append)
    assert lines == [
        '[optimizer] eps: 1e-06 has no effect with optimizer.name = "lion": leave it out, or set optimizer.name other '
        'than "lion"'
    ]
    assert config.optimizer.eps == 1e-8  # what is ignored does not stand in the resolved configuration
    again = tmp_path / "resolved.toml"
    again.write_text(to_toml(config))
    assert load_config(again, (), pytest.fail) == config
    assert main(["config", "show", str(path), "--optimizer.name", "lion"]) == 0
    assert capsys.readouterr().err == f"warning: {lines[0]}\n"
    # The same on one command line is a mistake, as in one file.
    assert "[optimizer] eps: 1e-05 has no effect" in refusal(path, lion, Override("optimizer", "eps", "1e-5"))
    write(path, {"data.source": "builtin", "optimizer.eps": 1e-6, "optimizer.name": "lion"})
    assert "[optimizer] eps" in refusal(path)
    assert "[optimizer] eps" in refusal(path, Override("training", "steps", "7"))


def test_what_merely_counts_less_keeps_its_value_under_an_override(tmp_path: Path):
    """The warm-up of a run that is cut short for a try is as steep as in the whole one."""
    lines: list[str] = []
    config = load_config(
        shipped_configs()["base"],
        [
            Override("training", "steps", "20"),
            Override("lr_schedule", "name", "cosine"),
            Override("lr_schedule", "decay_steps", "0"),
        ],
        lines.append,
    )
    assert config.lr_schedule.warmup_steps == 1000
    assert len(lines) == 1
    assert "[lr_schedule] warmup_steps: 1000 has no effect with training.steps = 20" in lines[0]


@pytest.mark.parametrize("steps, what", [(20, "warmup_steps"), (2000, "decay_steps"), (7000, None)])
def test_a_shipped_configuration_may_be_cut_short_for_a_try(steps: int, what: str | None, tmp_path: Path):
    """Whatever its schedule is; one line says what becomes of that, also of the resolved configuration."""
    base, lines = shipped_configs()["base"], list[str]()
    config = load_config(base, [Override("training", "steps", str(steps))], lines.append)
    schedule = config.lr_schedule
    assert (schedule.warmup_steps, schedule.decay_steps) == (1000, 6000)
    assert [f"[lr_schedule] {what}: " in line for line in lines] == [True] * (what is not None)
    resolved, again = tmp_path / "config.toml", list[str]()
    resolved.write_text(to_toml(config))
    assert load_config(resolved, (), again.append) == config
    assert again == lines
    if steps == 2000:
        assert "take 7000 steps, more than training.steps = 2000: it decays in the 1000 after the warm-up" in lines[0]
        factors = [lr_factor(schedule, step, steps) for step in (998, 999, 1499, 1999)]
        assert factors == pytest.approx([0.999, 1.0, 0.5, 0.0])
        # Whoever writes the decay means it.
        decay = Override("lr_schedule", "decay_steps", "6000")
        assert "more than training.steps = 2000" in refusal(base, Override("training", "steps", "2000"), decay)


def test_a_file_that_states_every_key_is_warned_of(tmp_path: Path):
    config = load_config(shipped_configs()["debug"])
    text = to_toml(config).replace('moments = "float32"', 'moments = "bfloat16"').replace('"adamw"', '"adamw8bit"')
    path = tmp_path / "all.toml"
    path.write_text(text)
    lines: list[str] = []
    assert load_config(path, (), lines.append).optimizer.moments == "float32"
    assert len(lines) == 1
    assert '"bfloat16" has no effect with optimizer.name = "adamw8bit"' in lines[0]


def test_a_resolved_model_of_one_kind_of_block_keeps_what_its_flavor_has_of_the_other(tmp_path: Path):
    """A checkpoint has it as well, and a resumed run is held against that."""
    path = write(
        tmp_path / "run.toml",
        {"data.source": "builtin", "training.seq_len": 64, "model.flavor": "debug", "model.mla_layers_per_cycle": 0},
    )
    config = load_config(path, (), pytest.fail)
    path.write_text(to_toml(config))
    lines: list[str] = []
    assert load_config(path, (), lines.append).model == config.model
    assert config.model.kv_lora_rank == FLAVORS["debug"].kv_lora_rank
    write(
        path,
        {"data.source": "builtin", "model.flavor": "debug", "model.mla_layers_per_cycle": 0, "model.kv_lora_rank": 32},
    )
    assert "[model] kv_lora_rank: 32 has no effect with model.mla_layers_per_cycle = 0" in refusal(path)


@pytest.mark.parametrize(
    "values, counts",
    [
        ({"data.source": "local", "data.path": "a.parquet", "data.text_separator": "#"}, False),
        ({"data.source": "local", "data.path": "a.jsonl", "data.text_separator": "#"}, False),
        ({"data.source": "local", "data.path": "a", "data.text_separator": "#"}, True),
        ({"data.source": "local", "data.path": "a.txt", "data.text_separator": "#"}, True),
        ({"data.source": "local", "data.path": "a.txt", "data.text_key": "body"}, False),
        ({"data.source": "local", "data.path": "a", "data.text_key": "body"}, True),
        ({"data.source": "builtin", "validation.path": "a.jsonl", "data.text_key": "body"}, True),
        ({"data.source": "builtin", "validation.path": "a.txt", "data.text_key": "body"}, False),
        ({"data.source": "builtin", "validation.path": "a.txt", "data.retry_seconds": 5}, True),
        (
            {"data.source": "builtin", "validation.interval": 0, "validation.path": "a", "validation.max_tokens": 5},
            True,
        ),
        ({"data.source": "builtin", "float8.recipe": "rowwise", "float8.fsdp_all_gather": "never"}, True),
        ({"data.source": "builtin", "float8.recipe": "rowwise", "float8.fast_accumulation": True}, False),
        ({"data.source": "builtin", "model.swa_rope_theta": 5.0, "model.rope_theta": 7.0}, True),
        ({"data.source": "builtin", "model.mla_layers_per_cycle": 3, "model.num_layers": 2}, False),
        ({"data.source": "builtin", "lr_schedule.warmup_steps": 1000, "training.steps": 1000}, True),
        ({"data.source": "builtin", "data.num_workers": 64}, True),
        ({"data.source": "builtin", "data.num_workers": 65}, False),
        ({"data.source": "builtin", "validation.path": "a.txt", "validation.fraction": 0}, True),
        ({"data.source": "builtin", "validation.path": "a.txt", "validation.fraction": 0.1}, False),
        (
            {"data.source": "builtin", "parallel.tensor": 2, "parallel.async_tensor": True, "float8.recipe": "native"},
            False,
        ),
    ],
)
def test_conditions_look_at_all_that_decides(values: dict[str, Any], counts: bool, tmp_path: Path):
    path = write(tmp_path / "run.toml", values)
    if counts:
        load_config(path)
    else:
        assert "has no effect with" in refusal(path)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_defaults_alone_are_never_without_effect(flavor: str):
    assert list(without_effect(Config(model=FLAVORS[flavor]), flavor)) == []
