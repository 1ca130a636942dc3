"""Log-likelihoods of continuations: equal to those of each text alone, however texts are packed and shared by ranks."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from swamla_titan.config import Config, Override, load_config, with_vocabulary
from swamla_titan.data.batches import MicroBatch
from swamla_titan.distributed.mesh import World
from swamla_titan.launch.process_group import destroy_distributed, init_distributed
from swamla_titan.model import SWAMLAModel
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.train.scoring import Request, Score, Scorer, _packed, _windows
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config

T = 64  # training.seq_len of the configuration


def requests() -> list[Request]:
    draw = random.Random(0)
    lengths = [(1, 1), (5, 3), (40, 24), (41, 24), (100, 7), (3, 64), (1, 65), (70, 150), (9, 0), *[(8, 6)] * 12]
    return [Request(draw.choices(range(257), k=n), draw.choices(range(257), k=m)) for n, m in lengths]


def resolved(config: Path, *overrides: str) -> Config:
    pairs = zip(overrides[::2], overrides[1::2])
    settings = [Override(*key.removeprefix("--").rsplit(".", 1), value) for key, value in pairs]
    return with_vocabulary(load_config(config, settings), 257)


@torch.no_grad()
def alone(model: SWAMLAModel, request: Request) -> Score:
    """By the full forward pass over the text alone, a stretch of at most T targets at a time."""
    total, greedy = 0.0, True
    tokens = request.context + request.continuation
    for start in range(len(request.context), len(tokens), T):
        end = min(start + T, len(tokens))
        seen = tokens[max(0, end - T - 1) : end]
        logits = model(torch.tensor([seen[:-1]]))[0].double().log_softmax(dim=-1)
        for position, target in list(enumerate(seen[1:]))[-(end - start) :]:
            total += logits[position, target].item()
            greedy &= int(logits[position].argmax()) == target
    return Score(total, greedy)


def scores(config: Config, world: World) -> list[Score]:
    model = ParallelModel(config, world)
    model.init_weights(0)
    return Scorer(world, T, 2, model.score)(requests())


def assert_as_alone(config: Config, found: list[Score]) -> None:
    model = SWAMLAModel(config.model).eval()
    expected = [alone(model, request) for request in requests()]
    assert [each.log_likelihood for each in found] == pytest.approx([each.log_likelihood for each in expected], 1e-5)
    assert [each.is_greedy for each in found] == [each.is_greedy for each in expected]
    assert found[8] == Score(0.0, True)  # nothing is predicted


MODELS = {
    "tied": (),
    "untied": ("--model.tie_embeddings", "false", "--model.qk_norm", "true", "--data.document_mask", "true"),
    "engram": ("--model.engram.layers", "1", "--model.engram.table_size", "1000"),
}


@pytest.mark.parametrize("model", ["tied", pytest.param("untied", marks=pytest.mark.slow)])
def test_scores_are_those_of_each_text_alone(tiny, model):
    config = resolved(tiny, *MODELS[model])
    assert_as_alone(config, scores(config, World.alone()))


def test_a_model_trains_again_after_scores_that_nobody_took_or_that_failed(tiny):
    config = resolved(tiny)
    model = ParallelModel(config, World.alone())
    model.init_weights(0)
    tokens = torch.arange(2 * T).view(2, T)
    batch, unknown = (MicroBatch(each, each, None, 2) for each in (tokens, tokens + 10_000))
    taken = model.score([batch, batch])
    next(taken)
    assert not model.parts[0].training
    taken.close()
    assert model.parts[0].training
    with pytest.raises(IndexError):
        list(model.score([unknown]))
    assert model.parts[0].training


def test_a_greedy_continuation_is_known_as_one(tiny):
    config = resolved(tiny)
    model = ParallelModel(config, World.alone())
    model.init_weights(0)
    plain, tokens = SWAMLAModel(config.model).eval(), [1, 2, 3]
    with torch.no_grad():
        for _ in range(5):
            tokens.append(int(plain(torch.tensor([tokens]))[0, -1].argmax()))
    greedy = Request(tokens[:3], tokens[3:])
    other = Request(tokens[:3], [*tokens[3:7], (tokens[7] + 1) % 257])
    assert [each.is_greedy for each in Scorer(World.alone(), T, 2, model.score)([greedy, other])] == [True, False]


def test_windows_cover_each_continuation_once():
    for n, m in itertools.product((1, 2, 7, 8, 9, 20), (0, 1, 7, 8, 9, 16, 17, 30)):
        request = Request(list(range(100, 100 + n)), list(range(m)))
        windows = list(_windows(0, request, 8))
        assert [token for each in windows for token in each.tokens[len(each.tokens) - each.scored :]] == list(range(m))
        assert all(each.scored < len(each.tokens) <= 9 for each in windows)
        assert all(len(each.tokens) == 9 for each in windows[:-1] if n + m > 9 or len(windows) > 2) or n < 9


def test_every_window_is_in_one_row_that_has_room():
    draw = random.Random(1)
    windows = [
        window
        for number in range(200)
        for window in _windows(number, Request([0] * draw.randint(1, 40), [0] * draw.randint(1, 40)), 32)
    ]
    rows = _packed(windows, 32)
    assert sorted(index for row in rows for index in row) == list(range(len(windows)))
    tokens = [sum(len(windows[index].tokens) - 1 for index in row) for row in rows]
    assert max(tokens) <= 32
    assert sum(tokens) > 0.9 * 32 * len(rows)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_scores_on_a_gpu_in_16_bits_are_near_those_in_32(tiny, compiled):
    shape = ("--model.dim", "256", "--model.swa_window", "128", "--training.seq_len", "512")
    config = resolved(tiny, *shape, "--training.compute_dtype", "bfloat16", "--compile.enabled", str(compiled).lower())
    model = ParallelModel(config, World.alone(torch.device("cuda")))
    model.init_weights(0)
    texts = requests() * 20
    found = Scorer(model.world, 512, 4, model.score)(texts)
    exact = ParallelModel(resolved(tiny, *shape, "--kernels.attention", "sdpa"), World.alone())
    exact.init_weights(0)
    expected = Scorer(exact.world, 512, 4, exact.score)(texts)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], rel=5e-3)


def scores_of_rank(config: str, overrides: tuple[str, ...]) -> list[Score]:
    config_of_run = resolved(Path(config), *overrides)
    world = init_distributed(config_of_run.parallel)
    try:
        return scores(config_of_run, world)
    finally:
        destroy_distributed()


PLANS = {
    "fsdp-3": (3, ()),
    "ddp-2": (2, ("--parallel.data_parallel", "ddp")),
    "tp-2": (2, ("--parallel.tensor", "2")),
    "cp-2": (2, ("--parallel.context", "2")),
    "pp-2": (2, ("--parallel.pipeline", "2")),
    "fsdp-2-tp-2": (4, ("--parallel.tensor", "2")),
    "pp-2-cp-2": (4, ("--parallel.pipeline", "2", "--parallel.context", "2")),
    "pp-2-tp-2": (4, ("--parallel.pipeline", "2", "--parallel.tensor", "2")),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tied", "engram"])
@pytest.mark.parametrize("plan", PLANS)
def test_scores_are_the_same_under_every_plan_on_every_rank(tmp_path, plan, model):
    ranks, overrides = PLANS[plan]
    config = tiny_config(tmp_path)
    found = on_ranks(ranks, scores_of_rank, str(config), (*overrides, *MODELS[model]))
    assert all(each == found[0] for each in found)
    if model == "tied":
        assert_as_alone(resolved(config), found[0])
    else:
        expected = scores(resolved(config, *MODELS[model]), World.alone())
        one, other = ([each.log_likelihood for each in every] for every in (found[0], expected))
        assert one == pytest.approx(other, 1e-5)
