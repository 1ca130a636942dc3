"""What "auto" in float8.recipe and optimizer.name is taken to be, and what moments in float8 would save."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swamla_titan.config import Config, load_config, shipped_configs, with_vocabulary
from swamla_titan.config.sections import Compile, Float8, Optimizer, Parallel, Training
from swamla_titan.distributed.degrees import Degrees, fit_degrees
from swamla_titan.distributed.mesh import ELSEWHERE, World
from swamla_titan.errors import UserError
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import FLAVORS
from swamla_titan.parallel import float8
from swamla_titan.parallel.float8 import float8_moments_advice, resolve_auto
from swamla_titan.tools.plan import plan
from swamla_titan.tools.plan_report import report
from tests.distributed.job import run_and_listen
from tests.distributed.ranks import on_ranks
from tests.train.runs import checkpoint, train

GPU = torch.device("cuda", 0)


def base(**sections: Any) -> Config:
    training = Training(seq_len=2048, local_batch_size=16, global_batch_size=16)
    given = {"model": replace(FLAVORS["base"], vocab_size=50257), "training": training, "float8": Float8(recipe="auto")}
    return Config(**given | sections)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def of(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
        monkeypatch.setattr(float8, "has_triton", lambda: True)

    of(9, 0)
    return of


def recipe(config: Config, device: torch.device = GPU) -> tuple[str, str]:
    """What is taken, and the line on it."""
    chosen, lines = resolve_auto(config, World.planned(fit_degrees(config.parallel, 1), device))
    assert len(lines) == 1
    return chosen.float8.recipe, lines[0]


@pytest.mark.parametrize("flavor", ["base", "large", "medium", "xl"])
def test_native_is_taken_where_gpu_and_shapes_gain(gpu, flavor):
    found, line = recipe(base(model=replace(FLAVORS[flavor], vocab_size=50257)))
    assert found == "native"
    assert line.startswith('float8.recipe = "auto" is "native": it takes ')
    gpu(8, 9)
    assert recipe(base())[0] == "native"


@pytest.mark.parametrize(
    "sections, why",
    [
        ({"training": Training(compute_dtype="float32")}, "training.compute_dtype"),
        ({"compile": Compile(enabled=False)}, "compile.enabled = false"),
        ({"training": Training(seq_len=256, local_batch_size=1)}, "256 tokens on a rank at a time"),
        ({"training": Training(seq_len=2040)}, "no multiple of 16"),
        ({"model": replace(FLAVORS["debug"], vocab_size=257)}, "takes 0% of the operations"),
        (
            {"model": replace(FLAVORS["debug"], vocab_size=257), "float8": Float8("auto", linear_layers="all")},
            "takes 0%",
        ),
        ({"parallel": Parallel(async_tensor=True)}, "parallel.async_tensor = true"),
    ],
)
def test_it_is_off_with_the_reason_where_it_would_gain_nothing(gpu, sections, why):
    found, line = recipe(base(**sections))
    assert found == "off"
    assert line.startswith('float8.recipe = "auto" is "off": ')
    assert why in line


def test_it_is_off_where_the_device_has_none_and_plan_supposes_one_that_has(gpu, monkeypatch):
    gpu(8, 0)
    assert recipe(base()) == (
        "off",
        'float8.recipe = "auto" is "off": A GPU has compute capability 8.0, and float8 needs 8.9',
    )
    gpu(9, 0)
    assert recipe(base(), torch.device("cpu")) == ("off", 'float8.recipe = "auto" is "off": there is no GPU')
    monkeypatch.setattr(float8, "has_triton", lambda: False)
    assert "triton is missing" in recipe(base())[1]
    found, line = recipe(base(), ELSEWHERE)
    assert found == "native"
    assert line.endswith("on GPUs of compute capability 8.9 or higher; off on others")


def test_other_keys_of_a_recipe_that_is_off_are_gone_and_those_of_native_stay(gpu, tmp_path):
    keys = Float8("auto", output_head=True, fast_accumulation=True, gradient_dtype="e4m3", loss_scaling=True)
    chosen, _ = resolve_auto(base(float8=keys), World.planned(Degrees(), torch.device("cpu")))
    assert chosen.float8 == Float8()
    chosen, _ = resolve_auto(base(float8=keys), World.planned(Degrees(), GPU))
    assert chosen.float8 == replace(keys, recipe="native")


@pytest.mark.parametrize(
    "sections, begun_with, expected",
    [
        ({"float8": Float8("native")}, None, "adamw_fp8"),
        ({"float8": Float8("tensorwise")}, None, "adamw_fp8"),
        ({"float8": Float8("auto")}, None, "adamw_fp8"),
        ({"float8": Float8()}, None, "adamw"),
        ({"float8": Float8("native"), "parallel": Parallel(cpu_offload=True)}, None, "adamw"),
        ({"float8": Float8("native"), "optimizer": Optimizer("auto", moments="bfloat16")}, None, "adamw"),
        ({"float8": Float8("native")}, "adamw", "adamw"),
        ({"float8": Float8()}, "adamw_fp8", "adamw_fp8"),
        ({"float8": Float8("native")}, "lion", "adamw_fp8"),  # which the checkpoint is then refused for
    ],
)
def test_the_optimizer_is_the_runs_own_or_by_the_recipe(gpu, sections, begun_with, expected):
    config = base(**{"optimizer": Optimizer("auto")} | sections)
    chosen, lines = resolve_auto(config, World.planned(Degrees(), GPU), begun_with)
    assert chosen.optimizer == replace(config.optimizer, name=expected)
    assert lines[-1].startswith(f'optimizer.name = "auto" is "{expected}": ')


def test_what_a_run_began_with_may_not_be_possible_any_more(gpu):
    config = base(optimizer=Optimizer("auto", moments="bfloat16"))
    with pytest.raises(UserError, match=r"optimizer\.moments"):
        resolve_auto(config, World.planned(Degrees(), GPU), "adamw_fp8")


def test_without_auto_nothing_is_chosen_or_said():
    config = base(float8=Float8("rowwise"), optimizer=Optimizer("lion"))
    assert resolve_auto(config, World.planned(Degrees(), ELSEWHERE), "adamw") == (config, [])


def _on_mixed_machines(bad: int) -> tuple[str, str, list[str]]:
    world = init_distributed(Parallel())
    float8.why_no_float8 = lambda *_: "an old GPU" if world.rank == bad else None
    chosen, lines = resolve_auto(base(optimizer=Optimizer("auto")), world, None)
    return chosen.float8.recipe, chosen.optimizer.name, lines


def test_one_rank_without_float8_makes_all_do_without():
    for found in on_ranks(2, _on_mixed_machines, 1):
        assert found[:2] == ("off", "adamw")
        assert found[2][0] == 'float8.recipe = "auto" is "off": an old GPU, on rank 1'


def written(folder: Path) -> Config:
    return load_config(folder / "config.toml")


def test_a_run_writes_what_it_took_and_keeps_its_optimizer(tiny, tmp_path, capsys):
    short = ("--validation.interval", "0", "--data.num_workers", "0", "--optimizer.name", "auto", "--training.steps")
    run = tmp_path / "run"
    assert train(tiny, *short, "1", "--float8.recipe", "tensorwise", "--float8.linear_layers", "all") == 0
    assert written(run).optimizer.name == "adamw_fp8"
    assert json.loads((checkpoint(run, 1) / "train.json").read_text())["identity"]["optimizer.name"] == "adamw_fp8"
    # Another recipe, as on another GPU.
    assert train(tiny, *short, "2", "--float8.recipe", "auto", "--float8.fast_accumulation", "true") == 0
    log = (run / "logs/rank-0.log").read_text()
    assert log.count('optimizer.name = "auto" is "adamw_fp8": float8.recipe = "tensorwise"') == 1
    assert log.count('optimizer.name = "auto" is "adamw_fp8": the run began with it') == 1
    assert log.count('float8.recipe = "auto" is "off": there is no GPU') == 1
    assert (written(run).optimizer.name, written(run).float8) == ("adamw_fp8", Float8())
    ended = run_and_listen(str(tiny), *short, "3", "--optimizer.name", "adamw")
    assert ended.code == 2
    assert "optimizer.name" in ended.err


# What moments in float8 would save


@pytest.mark.parametrize(
    "ranks, parallel, moments",
    [
        (1, {}, "bfloat16"),
        (3, {}, "float32"),
        (2, {"data_parallel": "ddp"}, "float32"),
        (2, {"tensor": 2}, "float32"),
        (2, {"pipeline": 2}, "bfloat16"),
        (4, {"context": 2}, "float32"),
    ],
)
def test_what_is_said_to_be_saved_is_what_plan_counts(ranks, parallel, moments):
    optimizer = Optimizer(moments=moments)
    model = replace(FLAVORS["debug"], vocab_size=512, num_layers=4)
    config = Config(
        model=model,
        training=Training(seq_len=256, global_batch_size=8),
        parallel=Parallel(**parallel),
        float8=Float8("native", linear_layers="all"),
        optimizer=optimizer,
    )
    before, after = (plan(replace(config, optimizer=each), ranks) for each in (optimizer, Optimizer("adamw_fp8")))
    saved = before.worst.memory.optimizer - after.worst.memory.optimizer
    assert saved == before.worst.saved_by_float8_moments > 0
    assert any(float8_moments_advice(saved) in line for line in report(before))
    assert not any("would save" in line for line in report(after))


@pytest.mark.parametrize("sections", [{"float8": Float8()}, {"optimizer": Optimizer("lion")}])
def test_nothing_is_said_where_products_or_optimizer_are_others(sections):
    config = Config(
        model=replace(FLAVORS["debug"], vocab_size=512), training=Training(seq_len=256), float8=Float8("native", "all")
    )
    found = plan(replace(config, **sections), 1)
    assert found.worst.saved_by_float8_moments == 0
    assert not any("would save" in line for line in report(found))


def test_the_start_says_it_and_check_does(tiny, tmp_path, capsys):
    from swamla_titan.cli import main

    float8 = ("--float8.recipe", "native", "--float8.linear_layers", "all")
    assert train(tiny, "--training.steps", "1", "--validation.interval", "0", *float8) == 0
    saved = plan(with_vocabulary(load_config(tmp_path / "run/config.toml"), 257), 1).worst.saved_by_float8_moments
    advice = float8_moments_advice(saved)
    assert (tmp_path / "run/logs/rank-0.log").read_text().count(advice) == 1
    capsys.readouterr()
    main(["check", str(tiny), *float8])
    assert advice in capsys.readouterr().out
    main(["check", str(tiny), "--float8.recipe", "auto", "--optimizer.name", "auto"])
    out = capsys.readouterr().out
    assert 'ok       auto        float8.recipe = "auto" is "off": there is no GPU' in out
    assert 'ok       auto        optimizer.name = "auto" is "adamw": matmuls are not in float8' in out


def test_a_shipped_configuration_has_products_and_moments_in_float8():
    both = [
        name
        for name, path in shipped_configs().items()
        for config in [load_config(path)]
        if config.float8.recipe != "off" and config.optimizer.name in ("adamw_fp8", "auto")
    ]
    assert both


@pytest.mark.gpu
def test_a_gpu_takes_native_for_base():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8")
    chosen, _ = resolve_auto(base(optimizer=Optimizer("auto")), World.planned(Degrees(), GPU))
    assert (chosen.float8.recipe, chosen.optimizer.name) == ("native", "adamw_fp8")
