"""The default warm-up, and what `check` and the start of a run advise."""

from dataclasses import replace

import pytest

from swamla_titan.cli import main
from swamla_titan.config import Config, Override, load_config, shipped_configs
from swamla_titan.config.sections import LRSchedule, Training
from swamla_titan.config.stability import stability_advice, warmup_steps
from swamla_titan.model import FLAVORS, ModelConfig
from swamla_titan.optim import lr_factor
from tests.train.runs import train


@pytest.mark.parametrize(
    "steps, schedule, expected",
    [
        (100_000, {}, 400),
        (4_000, {}, 400),
        (3_999, {}, 399),
        (100, {}, 10),
        (9, {}, 0),
        (1, {}, 0),
        (100, {"warmup_steps": 0}, 0),
        (100_000, {"warmup_steps": 7}, 7),
        (1_000, {"name": "wsd", "decay_steps": 950}, 50),
        (1_000, {"name": "wsd", "decay_steps": 1_000}, 0),
        (1_000, {"name": "wsd", "decay_steps": 1_200}, 0),  # which is refused for itself
    ],
)
def test_warm_up_is_400_steps_or_what_a_short_run_can_spare(steps, schedule, expected):
    assert warmup_steps(LRSchedule(**schedule), steps) == expected


def test_a_configuration_that_leaves_it_out_has_the_number(tmp_path):
    for steps, expected in ((20_000, 400), (50, 5), (3, 0)):
        (tmp_path / "it.toml").write_text(f"[data]\nsource = 'builtin'\n[training]\nsteps = {steps}\n")
        config = load_config(tmp_path / "it.toml")
        assert config.lr_schedule.warmup_steps == expected
        assert lr_factor(LRSchedule(), 0, steps) == lr_factor(config.lr_schedule, 0, steps)
        assert lr_factor(config.lr_schedule, expected, steps) == pytest.approx(1, abs=0.06 if expected else 1)
    overrides = [Override("training", "steps", "100_000")]
    assert load_config(tmp_path / "it.toml", overrides).lr_schedule.warmup_steps == 400


RUN = Config(model=FLAVORS["base"], training=Training(steps=10_000))


@pytest.mark.parametrize(
    "config, keys",
    [
        (RUN, []),
        (replace(RUN, lr_schedule=LRSchedule(warmup_steps=400)), []),
        (replace(RUN, lr_schedule=LRSchedule(warmup_steps=399)), ["lr_schedule.warmup_steps = 399"]),
        (replace(RUN, lr_schedule=LRSchedule(warmup_steps=0)), ["lr_schedule.warmup_steps = 0"]),
        (Config(training=Training(steps=2_000), lr_schedule=LRSchedule(warmup_steps=200)), []),
        (Config(training=Training(steps=2_000), lr_schedule=LRSchedule(warmup_steps=100)), ["200 or more"]),
        (Config(training=Training(steps=100), lr_schedule=LRSchedule(warmup_steps=0)), []),
        (replace(RUN, training=Training(steps=10_000, max_grad_norm=0.0)), ["training.max_grad_norm = 0"]),
        (replace(RUN, model=replace(FLAVORS["base"], swa_sink_size=0)), ["model.swa_sink_size = 0"]),
        (replace(RUN, model=ModelConfig(swa_sink_size=0, swa_layers_per_cycle=0)), []),  # which has no windows
        (replace(RUN, model=ModelConfig(swa_sink_size=0, swa_window=4096)), []),  # which are never left
        (
            Config(
                model=ModelConfig(swa_sink_size=0),
                training=Training(steps=10_000, max_grad_norm=0.0),
                lr_schedule=LRSchedule(warmup_steps=1),
            ),
            ["lr_schedule.warmup_steps", "model.swa_sink_size", "training.max_grad_norm"],
        ),
    ],
)
def test_advice_where_a_run_does_without(config, keys):
    found = stability_advice(config)
    assert len(found) == len(keys), found
    assert all(key in line for key, line in zip(keys, found))


@pytest.mark.parametrize("name", shipped_configs())
def test_no_shipped_configuration_needs_any(name):
    assert stability_advice(load_config(shipped_configs()[name])) == []


def test_check_the_start_and_a_dry_run_say_it(tiny, tmp_path, capsys):
    without = ("--model.swa_sink_size", "0", "--training.max_grad_norm", "0")
    main(["check", str(tiny), *without])
    [line] = [line for line in capsys.readouterr().out.splitlines() if " stability " in line]
    assert line.startswith("warning  stability   model.swa_sink_size = 0")
    assert "; training.max_grad_norm = 0 clips no gradients" in line
    main(["train", str(tiny), *without, "--dry-run"])
    assert "warning: training.max_grad_norm = 0 clips no gradients" in capsys.readouterr().out
    assert train(tiny, *without, "--training.steps", "1", "--validation.interval", "0") == 0
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    for advice in ("model.swa_sink_size = 0", "training.max_grad_norm = 0"):
        assert log.count(f"startup_summary: {advice}") == 1
