"""checkpoint.initial_load: a new run begins with the weights of an exported folder or a checkpoint, or more of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swamla_titan.checkpoint.exported import CONFIG_JSON, DIGESTS, INDEX_OF_FILES, SINGLE_FILE
from swamla_titan.checkpoint.initial_load import find_initial_load
from swamla_titan.cli import main
from swamla_titan.config import Override, load_config, with_vocabulary
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.train.step import GROUPS
from tests.distributed.job import run
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.runs import assert_same_checkpoint, checkpoint, snapshot, tensors, train

# The learning rate must not depend on training.steps, which later legs raise.
QUICK = (
    *("--data.num_workers", "0", "--validation.interval", "0", "--lr_schedule.warmup_steps", "0"),
    *("--lr_schedule.min_lr_ratio", "1", "--model.dropout", "0", "--training.steps", "3"),
)
UNMOVED = (*QUICK, "--training.steps", "1", "--optimizer.lr", "0")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of three steps, an average of its weights, and exported folders."""
    folder = tmp_path_factory.mktemp("base")
    assert train(tiny_config(folder), *QUICK, "--ema.decay", "0.5") == 0
    export(folder / "run", folder / "one-file")
    export(folder / "run", folder / "files", most=300_000)
    assert len(list((folder / "files").glob("*.safetensors"))) > 2
    export(folder / "run", folder / "bfloat16", "--dtype", "bfloat16")
    return folder


def export(run: Path, folder: Path, *options: str, most: int = 10**9) -> Path:
    """What `export` writes of a run, in files of at most `most` bytes; returns the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swamla_titan.tools.export.MOST_OF_A_SHARD", most)
        assert main(["export", str(run), str(folder), *options]) == 0
    return folder


def begun(base: Path, folder: Path, source: str, *overrides: str) -> Path:
    """A run that begins with `source` in `base`; its dump folder."""
    arguments = ("--job.dump_folder", str(folder), "--checkpoint.initial_load", str(base / source), *overrides)
    assert train(base / "tiny.toml", *arguments) == 0
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: each for name, each in tensors(path).items() if name.startswith("model.")}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return "".join(capsys.readouterr())


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


SOURCES = ["run", "run/checkpoints/step-00000003", "one-file", "files"]


@pytest.mark.parametrize(
    "source", [pytest.param(each, marks=[] if each == "files" else pytest.mark.slow) for each in SOURCES]
)
def test_weights_are_taken_bit_for_bit(base, tmp_path, source):
    after = checkpoint(begun(base, tmp_path / "new", source, *UNMOVED), 1)
    assert_same(weights(after), weights(checkpoint(base / "run", 3)))
    record = json.loads((after / "train.json").read_text())
    assert (record["step"], record["sequences"]) == (1, 5)  # a new run: the data begin anew


@pytest.mark.slow
def test_weights_of_16_bits_are_taken_as_they_are(base, tmp_path):
    found = weights(checkpoint(begun(base, tmp_path / "new", "bfloat16", *UNMOVED), 1))
    assert_same(found, {name: w.bfloat16().float() for name, w in weights(checkpoint(base / "run", 3)).items()})


@pytest.mark.slow
def test_a_run_from_an_exported_folder_equals_one_from_the_checkpoint(base, tmp_path):
    one = begun(base, tmp_path / "one", "run", *QUICK)
    other = begun(base, tmp_path / "other", "files", *QUICK)
    assert_same_checkpoint(checkpoint(one, 3), checkpoint(other, 3))


def test_a_run_that_continues_another_equals_one_that_was_never_interrupted(base, tmp_path):
    before = snapshot(base / "run")
    ema = ("--ema.decay", "0.5", "--training.steps", "6")
    branch = begun(base, tmp_path / "branch", "run", *QUICK, *ema, "--checkpoint.initial_load_state", "all")
    assert snapshot(base / "run") == before
    assert train(base / "tiny.toml", *QUICK, *ema, "--job.dump_folder", str(tmp_path / "whole")) == 0
    assert_same_checkpoint(checkpoint(branch, 6), checkpoint(tmp_path / "whole", 6))


@pytest.mark.slow
def test_a_run_that_continues_another_may_have_other_data(base, tmp_path, capsys):
    other = ("--data.streams", "4", "--checkpoint.initial_load_state", "all", "--training.steps", "4")
    arguments = ("--job.dump_folder", str(tmp_path / "new"), "--checkpoint.initial_load", str(base / "run"))
    assert train(base / "tiny.toml", *arguments, *QUICK, *other) == 2
    assert "data.streams: 6 in the checkpoint, 4 now" in capsys.readouterr().err
    assert train(base / "tiny.toml", *arguments, *QUICK, *other, "--checkpoint.allow", "data") == 0
    record = json.loads((checkpoint(tmp_path / "new", 4) / "train.json").read_text())
    assert (record["step"], record["sequences"]) == (4, 5)


def test_states_of_the_optimizer_and_the_average_come_along_if_asked_for(base, tmp_path):
    def steps(path: Path) -> set[float]:
        return {float(each) for name, each in tensors(path).items() if name.endswith(".step")}

    ema = ("--ema.decay", "0.5", "--checkpoint.initial_load_state", "weights_and_optimizer")
    after = checkpoint(begun(base, tmp_path / "new", "run", *UNMOVED, *ema), 1)
    assert steps(after) == {4.0}
    found, before = tensors(after), tensors(checkpoint(base / "run", 3))
    name = "embedding.weight"
    decay = min(0.5, 2 / 11)  # after the first step of a run
    expected = before[f"ema.{name}"] + (1 - decay) * (before[f"model.{name}"] - before[f"ema.{name}"])
    torch.testing.assert_close(found[f"ema.{name}"], expected)
    anew = checkpoint(begun(base, tmp_path / "anew", "run", *UNMOVED, "--ema.decay", "0.5"), 1)
    assert steps(anew) == {1.0}
    assert torch.equal(tensors(anew)[f"ema.{name}"], before[f"model.{name}"])


def test_an_average_that_is_asked_for_in_vain_or_dropped_is_shown(base, tmp_path, capsys):
    without = begun(base, tmp_path / "without", "run", *UNMOVED)
    states = (
        "--checkpoint.initial_load_state",
        "weights_and_optimizer",
        "--training.steps",
        "2",
        "--optimizer.lr",
        "0",
    )
    for name, source, decay, row in (
        ("begins", without, "0.5", ["ema.decay", "no", "average", "0.5"]),
        ("goes", base / "run", "0", ["ema.decay", "an", "average", "0.0"]),
    ):
        said(capsys)
        begun(base, tmp_path / name, str(source), *QUICK, *states, "--ema.decay", decay)
        log = (tmp_path / name / "logs" / "rank-0.log").read_text()
        assert row in [line.split() for line in log.splitlines()]
        assert ("; it has no average, which begins with these weights\n" in log) == (name == "begins")
        begun(base, tmp_path / f"{name}-weights", str(source), *UNMOVED, "--ema.decay", decay)
        log = (tmp_path / f"{name}-weights" / "logs" / "rank-0.log").read_text()
        assert "ema.decay" not in log
        assert "has no average" not in log, "only weights were asked for"


def test_another_optimizer_begins_anew_on_the_weights(base, tmp_path):
    after = checkpoint(begun(base, tmp_path / "new", "run", *UNMOVED, "--optimizer.name", "lion"), 1)
    assert_same(weights(after), weights(checkpoint(base / "run", 3)))
    lion = ("--optimizer.name", "lion", "--checkpoint.initial_load_state", "weights_and_optimizer")
    message = refusal_of(base, base / "run", *lion)
    assert 'has states of "adamw", and optimizer.name is "lion"' in message


@pytest.mark.slow
def test_the_run_is_resumed_from_its_own_checkpoints(base, tmp_path):
    source = tmp_path / "gone"
    shutil.copytree(base / "files", source)
    arguments = ("--job.dump_folder", str(tmp_path / "new"), "--checkpoint.initial_load", str(source), *QUICK)
    assert train(base / "tiny.toml", *arguments) == 0
    shutil.rmtree(source)
    assert train(base / "tiny.toml", *arguments, "--training.steps", "4") == 0
    assert checkpoint(tmp_path / "new", 4).exists()


def test_differences_are_shown_in_a_table(base, tmp_path, capsys):
    others = ("--model.swa_window", "8", "--data.streams", "4", "--model.rope_theta", "500.0")
    begun(base, tmp_path / "one", "run", *UNMOVED, *others)
    shown = said(capsys)
    assert f"a new run, which begins with the weights of {checkpoint(base / 'run', 3)}" in shown
    assert f"{checkpoint(base / 'run', 3)} differs from this run:" in shown
    table = [line.split() for line in shown.splitlines() if line.startswith("  ")]
    assert ["data.streams", "6", "4"] in table
    assert ["model.swa_window", "16", "8"] in table
    assert ["model.rope_theta", "10000.0", "500.0"] in table
    begun(base, tmp_path / "other", "files", *UNMOVED, *others)
    assert ["model.swa_window", "16", "8"] in [line.split() for line in said(capsys).splitlines()]
    begun(base, tmp_path / "same", "run", *UNMOVED)
    assert "differs from this run" not in said(capsys)


def test_a_dry_run_says_what_a_run_begins_with(base, tmp_path, capsys):
    arguments = (*QUICK, "--job.dump_folder", str(tmp_path / "new"), "--model.swa_window", "8")
    assert (
        main(
            [
                "train",
                str(base / "tiny.toml"),
                "--dry-run",
                *arguments,
                "--checkpoint.initial_load",
                str(base / "files"),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert f"begins at step 1 with the weights of {base / 'files'}" in shown
    assert "  model.swa_window  16     8" in shown.splitlines()


def refusal(base: Path, folder: Path, capsys: pytest.CaptureFixture[str], source: str, *overrides: str) -> str:
    """The one message of a run that is refused before it writes anything."""
    capsys.readouterr()
    arguments = ("--job.dump_folder", str(folder / "refused"), "--checkpoint.initial_load", source)
    assert train(base / "tiny.toml", *QUICK, *arguments, *overrides) == 2
    assert not (folder / "refused").exists()
    message = capsys.readouterr().err
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    return message


def refusal_of(base: Path, source: Path, *overrides: str) -> str:
    """The same message, from what a run asks for before it opens its data."""
    pairs = zip(overrides[::2], overrides[1::2])
    settings = [Override(*key.removeprefix("--").rsplit(".", 1), value) for key, value in pairs]
    initial = Override("checkpoint", "initial_load", str(source))
    config = with_vocabulary(load_config(base / "tiny.toml", [initial, *settings]), 257)
    with pytest.raises(UserError) as error:
        find_initial_load(config, World.alone(), GROUPS).require_fit(config)
    return str(error.value)


def _llama(folder: Path) -> None:
    (folder / CONFIG_JSON).write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


def _no_config(folder: Path) -> None:
    (folder / CONFIG_JSON).unlink()


def _cut(folder: Path) -> None:
    file = folder / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-100])


def _no_header(folder: Path) -> None:
    (folder / SINGLE_FILE).write_bytes(b"\xff" * 200)


def _changed(folder: Path, change) -> None:
    content = load_file(folder / SINGLE_FILE)
    change(content)
    save_file(content, folder / SINGLE_FILE)
    (folder / DIGESTS).unlink()  # as if others had written it


def _flipped(folder: Path) -> None:
    content = bytearray((folder / SINGLE_FILE).read_bytes())
    content[-5] ^= 1
    (folder / SINGLE_FILE).write_bytes(content)


def _no_digests(folder: Path) -> None:
    (folder / DIGESTS).write_text('{"model.safetensors": 1}')


def _other_format(folder: Path) -> None:
    (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin")


def _missing(folder: Path) -> None:
    _changed(folder, lambda content: [content.pop(name) for name in [*content] if "blocks.1." in name])


def _misshapen(folder: Path) -> None:
    _changed(folder, lambda content: content.update({"model.norm.weight": torch.zeros(3)}))


def _deeper(folder: Path) -> None:
    _changed(folder, lambda content: content.update({"model.blocks.3.attention.wo.weight": torch.zeros(3)}))


def _integers(folder: Path) -> None:
    _changed(folder, lambda content: content.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}))


def _not_finite(folder: Path) -> None:
    _changed(folder, lambda content: content["model.norm.weight"].fill_(float("nan")))


@pytest.mark.parametrize(
    "damage, words",
    [
        (_llama, "describes a model of the type 'llama', and not of 'swamla'"),
        (_no_config, "config.json: not the file that `swamla-titan export` writes"),
        (_cut, "model.safetensors is damaged or missing"),
        (_no_header, "model.safetensors is damaged or missing"),
        (
            _flipped,
            "model.safetensors has changed since it was written (SHA-256 differs): it is damaged, or was changed",
        ),
        (_no_digests, "digests.json: not the file that `swamla-titan export` writes"),
        (_other_format, "has its weights in pytorch_model.bin: export with --format safetensors"),
        (_missing, "model.blocks.1.attention_norm.weight is missing"),
        (_misshapen, "model.norm.weight is (3,) there and (64,) here"),
        (_deeper, "model.blocks.3.attention.wo.weight is there, and not in the model here"),
        (_integers, "norm.weight is I32, which no weight is"),
    ],
)
def test_a_folder_that_is_damaged_or_of_another_model_is_refused(base, tmp_path, damage, words):
    folder = tmp_path / "exported"
    shutil.copytree(base / "one-file", folder)
    damage(folder)
    assert words in refusal_of(base, folder)


@pytest.mark.parametrize("damage, words", [(_missing, "is missing"), (_not_finite, "that are no finite numbers")])
def test_a_refused_run_writes_nothing(base, tmp_path, capsys, damage, words):
    folder = tmp_path / "exported"
    shutil.copytree(base / "one-file", folder)
    damage(folder)
    assert words in refusal(base, tmp_path, capsys, str(folder))


def test_an_index_is_not_followed_out_of_the_folder(base, tmp_path):
    folder = tmp_path / "exported"
    shutil.copytree(base / "files", folder)
    index = json.loads((folder / INDEX_OF_FILES).read_text())
    index["weight_map"]["model.norm.weight"] = "../one-file/model.safetensors"
    (folder / INDEX_OF_FILES).write_text(json.dumps(index))
    assert "which is no file of this folder" in refusal_of(base, folder)
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embedding.weight"]
    (folder / INDEX_OF_FILES).write_text(json.dumps(index))
    assert "does not hold model.norm.weight" in refusal_of(base, folder)


def test_a_checkpoint_that_is_damaged_or_absent_is_refused(base, tmp_path):
    broken = tmp_path / "step-00000003"
    shutil.copytree(checkpoint(base / "run", 3), broken)
    file = next(broken.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "has changed since it was written" in refusal_of(base, broken)
    assert "neither a checkpoint nor the dump folder" in refusal_of(base, tmp_path / "none")


def test_an_exported_folder_has_weights_alone(base):
    for state in ("weights_and_optimizer", "all"):
        message = refusal_of(base, base / "files", "--checkpoint.initial_load_state", state)
        assert "is an exported folder, which holds weights alone" in message


@pytest.mark.slow
def test_an_untied_model_with_a_memory_of_n_grams_comes_back(tmp_path, capsys, monkeypatch):
    engram = ("--model.engram.layers", "1", "--model.engram.table_size", "1000", "--model.tie_embeddings", "false")
    config = tiny_config(tmp_path)
    assert train(config, *QUICK, *engram) == 0
    folder = export(tmp_path / "run", tmp_path / "exported", most=300_000)
    new = ("--job.dump_folder", str(tmp_path / "new"), "--checkpoint.initial_load", str(folder))
    assert train(config, *UNMOVED, *engram, *new) == 0
    assert "differs from this run" not in said(capsys)
    assert_same(weights(checkpoint(tmp_path / "new", 1)), weights(checkpoint(tmp_path / "run", 3)))
    settings = json.loads((folder / CONFIG_JSON).read_text())
    settings["engram"]["hashes"] = {}
    (folder / CONFIG_JSON).write_text(json.dumps(settings))
    assert train(config, *UNMOVED, *engram, *new, "--job.dump_folder", str(tmp_path / "other")) == 2
    assert "hashes otherwise than the one that wrote it" in capsys.readouterr().err


PLANS = {
    "fsdp-3": (3, ()),
    "tp-2": (2, ("--parallel.tensor", "2")),
    "pp-2": (2, ("--parallel.pipeline", "2", "--training.local_batch_size", "1")),
    "fsdp-2-tp-2": (4, ("--parallel.tensor", "2")),
    "zbv-2": (
        2,
        ("--parallel.pipeline", "2", "--parallel.pipeline_schedule", "ZBVZeroBubble", "--model.num_layers", "4"),
    ),
    "ddp-2": (2, ("--parallel.data_parallel", "ddp")),
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_each_rank_takes_its_shards_under_every_plan(tmp_path, plan):
    ranks, overrides = PLANS[plan]
    model = overrides[-2:] if "--model.num_layers" in overrides else ()
    config = tiny_config(tmp_path)
    assert train(config, *UNMOVED, *model) == 0
    first = checkpoint(tmp_path / "run", 1)
    folder = export(tmp_path / "run", tmp_path / "exported", most=300_000)
    new = ("--job.dump_folder", str(tmp_path / "new"), "--checkpoint.initial_load", str(folder), "--job.seed", "1")
    assert on_ranks(ranks, run, str(config), *UNMOVED, *overrides, *new) == [0] * ranks
    assert_same(weights(checkpoint(tmp_path / "new", 1)), weights(first))
