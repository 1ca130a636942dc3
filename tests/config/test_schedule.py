"""Where each step begins is a function of the configuration, and stages that cannot be trained are refused at once."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from swamla_titan.config import Config, Override, load_config, to_toml
from swamla_titan.config.schedule import BEGINNING, Position, Schedule, configs_of_stages
from swamla_titan.config.sections import Stage, Training
from swamla_titan.errors import UserError

START = 'data.source = "builtin"\n[model]\nflavor = "debug"\n[training]\nseq_len = 64\nsteps = 100\n'


def of_stages(*stages: Stage, batch: int = 8) -> Config:
    return Config(training=Training(seq_len=64, global_batch_size=batch, local_batch_size=2, stages=stages))


def drawn(rng: random.Random) -> Config:
    """A configuration with up to five stages at any tokens."""
    places = sorted(rng.sample(range(1, 40_000), rng.randrange(6)))
    keys = ("seq_len", "global_batch_size", "swa_window")
    return of_stages(*(Stage(at, **{key: rng.randrange(1, 99) for key in keys if rng.random() < 0.7}) for at in places))


def walked(config: Config, steps: int) -> list[tuple[Position, Training, int]]:
    """Step by step: where each begins, and with what."""
    place, found, configs = BEGINNING, [], configs_of_stages(config)
    for _ in range(steps):
        begun = sum(stage.tokens <= place.tokens for stage in config.training.stages)
        training = configs[begun].training
        found.append((place, training, configs[begun].model.swa_window))
        tokens = training.global_batch_size * training.seq_len
        place = Position(place.step + 1, place.tokens + tokens, place.sequences + training.global_batch_size)
    return found


def test_each_step_is_of_the_last_stage_that_has_begun_by_its_first_token():
    rng = random.Random(1)
    for _ in range(12):
        config = drawn(rng)
        schedule = Schedule.of(config)
        for place, training, window in walked(config, 40):
            stage = schedule.stage(place.step + 1)
            assert schedule.after(place.step) == place
            assert (stage.training, stage.config.model.swa_window) == (training, window)
            assert Schedule.of(config, place) == schedule  # a resumed run's


def test_a_run_that_came_otherwise_to_its_place_goes_on_by_the_tokens_that_it_has_seen():
    """As with checkpoint.allow = "batch"; steps before count as if they had been of the stage that it continues in."""
    schedule = Schedule.of(of_stages(Stage(10_000, seq_len=128), Stage(20_000, seq_len=256)), Position(7, 12_000, 60))
    assert [(stage.number, *stage.begin) for stage in schedule.stages] == [(1, 7, 12_000, 60), (2, 15, 20_192, 124)]
    assert schedule.after(9) == Position(9, 12_000 + 2 * 1024, 60 + 16)
    assert schedule.after(5) == Position(5, 12_000 - 2 * 1024, 60 - 16)


def test_without_stages_the_whole_run_is_one():
    config = of_stages()
    assert [stage.config for stage in Schedule.of(config).stages] == [config]
    assert Schedule.of(config).after(12) == Position(12, 12 * 8 * 64, 12 * 8)
    assert Schedule.of(config).longest.config == config


def test_the_last_of_the_longest_stages_counts():
    schedule = Schedule.of(
        of_stages(Stage(600, seq_len=99), Stage(9000, global_batch_size=3), Stage(20_000, seq_len=7))
    )
    assert schedule.longest.number == 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def test_stages_in_a_file_on_the_command_line_and_written_again(path: Path):
    path.write_text(START + "[[training.stages]]\ntokens = 5000\nseq_len = 128\n")
    config = load_config(path)
    assert config.training.stages == (Stage(5000, seq_len=128),)
    given = Override("training", "stages", "[{tokens = 600, swa_window = 32}, {tokens = 9000, global_batch_size = 4}]")
    other = load_config(path, [given])
    assert other.training.stages == (Stage(600, swa_window=32), Stage(9000, global_batch_size=4))
    for each in (config, other):
        path.write_text(to_toml(each, comments=True))
        assert load_config(path) == each
    assert "#   tokens: Tokens seen before it" in path.read_text()


@pytest.mark.parametrize(
    "stages, part",
    [
        ("[1]", "expected a list of tables with the keys tokens, seq_len, "),
        ("3", "expected a list of tables with the keys tokens, seq_len, "),
        (f"[{'{tokens = 1},' * 65}]", "at most 64 of them"),
        ("[{tokens = 600, seq_lenn = 3}]", "number 1: seq_lenn = 3: unknown key; did you mean `seq_len`?"),
        ("[{seq_len = 3}]", "[[training.stages]] number 1: tokens is missing"),
        ("[{tokens = 0, seq_len = 3}]", "[[training.stages]] number 1: tokens = 0: expected a whole number >= 1"),
        ("[{tokens = 600, seq_len = 32}, {tokens = 9000, seq_len = '8'}]", 'number 2: seq_len = "8": expected a whole'),
        ("[{tokens = 600}]", "[training] stages: number 1 (tokens = 600) changes nothing"),
        ("[{tokens = 600, seq_len = 64}]", "[training] stages: number 1 (tokens = 600) changes nothing"),
        ("[{tokens = 600, seq_len = 32}, {tokens = 600, seq_len = 8}]", "(tokens = 600) must begin later than"),
        ("[{tokens = 600, seq_len = 32}, {tokens = 601, seq_len = 8}]", "number 1 (tokens = 600) has no step"),
        ("[{tokens = 600, seq_len = 1024}]", "training.seq_len: 1024 is longer than model.max_seq_len = 512"),
        ("[{tokens = 99999, seq_len = 32}]", "would begin after step 196, but training.steps = 100"),
        ("[{tokens = 600, local_batch_size = 9}]", "has no effect with training.global_batch_size = 8"),
    ],
)  # fmt: skip
def test_what_no_run_could_do_is_refused_with_the_configuration(path: Path, stages: str, part: str):
    path.write_text(f"{START}stages = {stages}\n")
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert part in str(refused.value)


@pytest.mark.parametrize(
    "keys, part",
    [
        ("parallel.tensor = 2", "number 1 (tokens = 600): training.seq_len: 31 must be a multiple of tensor = 2"),
        ("model.swa_layers_per_cycle = 0", "model.swa_window has no effect with model.swa_layers_per_cycle = 0"),
        ('float8.recipe = "rowwise"', 'number 1 (tokens = 600): training.seq_len: 31: float8.recipe = "rowwise" needs'),
    ],
)
def test_what_a_plan_cannot_shard_is_refused_too(path: Path, keys: str, part: str):
    at, stages = keys.index("."), "stages = [{tokens = 600, seq_len = 31, swa_window = 8}]"
    section, line = keys[:at], keys[at + 1 :]
    text = START + stages if section == "model" else f"{START}{stages}\n[{section}]\n{line}\n"
    path.write_text(text.replace('flavor = "debug"\n', f'flavor = "debug"\n{line}\n') if section == "model" else text)
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert part in str(refused.value)


def test_a_run_cut_short_on_the_command_line_ends_before_its_stages(path: Path):
    path.write_text(f"{START}stages = [{{tokens = 9000, seq_len = 32}}]\n")
    lines: list[str] = []
    config = load_config(path, [Override("training", "steps", "3")], lines.append)
    assert [line.endswith("the run ends before it") for line in lines] == [True]
    assert replace(config.training, steps=100) == load_config(path).training
