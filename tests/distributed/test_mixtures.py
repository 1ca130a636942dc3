"""A mixture trains under every plan as in one process, with the same loss, tokens and epochs of each source."""

import functools
import json
import tempfile
from pathlib import Path

import pytest

from swamla_titan.cli import main
from tests.distributed.ranks import on_ranks
from tests.distributed.test_plans import BATCHES, COMMON, PLANS, TRIPLES
from tests.tiny_config import tiny_config
from tests.train.runs import metrics

WEIGHTS = {"text": 0.5, "docs": 0.3, "more": 0.2}
NAMES = [f"{key}/{name}" for key in ("loss", "tokens", "epochs", "val_loss", "val_bits_per_byte") for name in WEIGHTS]
SHAPE = (
    *BATCHES["does not"],
    "--model.z_loss",
    "1e-3",
    "--model.label_smoothing",
    "0.1",
    "--data.document_mask",
    "true",
)
FUSED = ("--kernels.loss", "fused")


def configured(folder: Path) -> Path:
    """The tiny configuration, and beside its text a source that is read in a few steps."""
    (folder / "more.txt").write_text("\n".join(f"some more words, line {number}" for number in range(80)))
    return tiny_config(folder)


def run(config: str, *overrides: str) -> int:
    text = Path(config).parent / "made-up-text"
    tables = (
        f'[{{name = "text", path = "{text}", weight = 0.5}}, {{name = "docs", source = "builtin", weight = 0.3}}, '
        f'{{name = "more", path = "{text.parent}/more.txt", text_separator = "\\n", weight = 0.2}}]'
    )
    return main(["train", config, *COMMON, "--data.path", "", "--data.sources", tables, *SHAPE, *overrides])


@functools.cache
def alone(*overrides: str) -> dict[str, dict[int, float]]:
    with tempfile.TemporaryDirectory() as folder:
        assert run(str(configured(Path(folder))), *overrides) == 0
        return curves(Path(folder))


def curves(folder: Path) -> dict[str, dict[int, float]]:
    return {name: metrics(folder / "run", name) for name in ("loss", "grad_norm", "val_loss", "tokens", *NAMES)}


def assert_same_curves(folder: Path) -> None:
    expected, found = alone(), curves(folder)
    for name, values in expected.items():
        assert values, name
        assert found[name] == pytest.approx(values, rel=2e-5), name


@pytest.mark.parametrize("packing", ["concatenate", pytest.param("best_fit", marks=pytest.mark.slow)])
def test_losses_and_tokens_of_the_sources_add_up_to_those_of_the_run(packing):
    found = alone(*(("--data.packing", packing) if packing == "best_fit" else ()))
    for step, loss in found["loss"].items():
        tokens = [{name: found[f"tokens/{name}"][at] if at else 0 for name in WEIGHTS} for at in (step - 1, step)]
        assert sum(tokens[1].values()) == found["tokens"][step]
        own = {name: tokens[1][name] - tokens[0][name] for name in WEIGHTS}  # a line of metrics.jsonl for each step
        assert all((step in found[f"loss/{name}"]) == bool(own[name]) for name in WEIGHTS)
        each = [found[f"loss/{name}"][step] for name, count in own.items() if count]
        assert min(each) <= loss <= max(each)
        if packing == "concatenate":  # where every token is a target
            mean = sum(found[f"loss/{name}"][step] * count for name, count in own.items() if count) / sum(own.values())
            assert mean == pytest.approx(loss, rel=1e-6)
    for step, loss in found["val_loss"].items():
        assert loss == pytest.approx(sum(found[f"val_loss/{name}"][step] * share for name, share in WEIGHTS.items()))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_has_the_losses_of_each_source(tmp_path, plan):
    ranks, overrides = PLANS[plan]
    assert on_ranks(ranks, run, str(configured(tmp_path)), *overrides) == [0] * ranks
    assert_same_curves(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["fsdp-2-every", "cp-2-ddp-2"])
def test_head_and_loss_as_one_have_the_losses_of_each_source(tmp_path, plan):
    ranks, overrides = PLANS[plan]
    assert on_ranks(ranks, run, str(configured(tmp_path)), *overrides, *FUSED) == [0] * ranks
    assert_same_curves(tmp_path)


def test_head_and_loss_as_one_in_one_process(tmp_path):
    assert run(str(configured(tmp_path)), *FUSED, "--training.local_batch_size", "3") == 0
    assert_same_curves(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble", "GPipe", "InterleavedZeroBubble"])
def test_pipelines_of_every_schedule_have_the_losses_of_each_source(tmp_path, schedule):
    overrides = (
        "--parallel.pipeline",
        "2",
        "--parallel.pipeline_schedule",
        schedule,
        "--training.local_batch_size",
        "1",
    )
    config = str(configured(tmp_path))
    model = ("--model.num_layers", "6") if "Interleaved" in schedule or "ZBV" in schedule else ()
    assert on_ranks(2, run, config, *overrides, *model) == [0, 0]
    expected, found = alone(*model), curves(tmp_path)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=2e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("plan", TRIPLES)
def test_a_composition_of_three_has_the_losses_of_each_source(tmp_path, plan):
    assert on_ranks(8, run, str(configured(tmp_path)), *TRIPLES[plan]) == [0] * 8
    assert_same_curves(tmp_path)


@pytest.mark.slow
def test_a_mixture_continues_on_other_numbers_of_ranks(tmp_path):
    """One rank, then four, then three, over epochs: the batches are those of one rank."""
    digests = ("--metrics.batch_digests", "true", "--data.streams", "12", "--training.global_batch_size", "12")
    (tmp_path / "alone").mkdir()
    assert run(str(configured(tmp_path / "alone")), *digests, "--training.steps", "40") == 0
    config = str(configured(tmp_path))
    for ranks, steps in ((1, "10"), (4, "25"), (3, "40")):
        assert on_ranks(ranks, run, config, *digests, "--training.steps", steps) == [0] * ranks
    found, expected = (metrics_of_batches(folder / "run") for folder in (tmp_path, tmp_path / "alone"))
    assert found == expected
    assert len(found) == 40
    for name in WEIGHTS:
        assert (
            metrics(tmp_path / "run", f"tokens/{name}")[40] == metrics(tmp_path / "alone" / "run", f"tokens/{name}")[40]
        )
    assert metrics(tmp_path / "run", "epochs/more")[40] > 1


def metrics_of_batches(folder: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (folder / "batch_digests.jsonl").read_text().splitlines()]
    return {line["step"]: line["digest"] for line in lines}
