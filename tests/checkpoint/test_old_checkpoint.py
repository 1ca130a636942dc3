"""A checkpoint that an earlier version wrote on two ranks: this version resumes it, and generates from it.

fixtures/run-0ddd00a.zip holds run/config.toml and run/checkpoints/step-00000013, written by the commit of that name
under Python 3.11 and torch 2.13 on an x86 CPU: AdamW, dropout, an average of the weights, 17 steps. It is not to be
written again: versions to come must read it. It was made in an empty folder, with a checkout of the commit, after
`write_text(Path("text"), 30)` of its tests/text.py, with a config.toml that says what run/config.toml says:

    NPROC=2 NGPU=0 CHECKOUT/run_train.sh ./config.toml
    zip -r -9 run-0ddd00a.zip run/config.toml run/checkpoints/step-00000013

LOSSES and GRAD_NORMS are those that the same commit logged when it then resumed the archive on one rank and on two. On
two they are also those of the run that wrote it and was not interrupted.
"""

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from torch.nn.functional import dropout

from swamla_titan.checkpoint.records import TrainState
from swamla_titan.checkpoint.resume import Origin
from swamla_titan.cli import main
from swamla_titan.errors import UserError
from tests.distributed.ranks import on_ranks
from tests.text import documents, write_text
from tests.train.runs import metrics

WRITTEN = Path(__file__).parent / "fixtures" / "run-0ddd00a.zip"
# By ranks and step. Each rank has dropout masks of its own.
LOSSES = {
    1: {14: 2.977017402648926, 15: 2.986839771270752, 16: 3.0292813777923584, 17: 2.94144344329834},
    2: {14: 2.9757580757141113, 15: 2.9860310554504395, 16: 3.0235435962677, 17: 2.9474430084228516},
}
GRAD_NORMS = {
    1: {14: 0.34657299518585205, 15: 0.2507363259792328, 16: 0.3233392834663391, 17: 0.28375598788261414},
    2: {14: 0.34468400478363037, 15: 0.24846623837947845, 16: 0.32577404379844666, 17: 0.2856409251689911},
}
TEXT = "f7b2d6a91eae2d96874025f5f39bb820305aabd97fd957300921d92b19a4fa65"  # SHA-256
MASK = "b0d414c9c94077f745e90afe365fbd49aa8fca9af0bc06b6f16b21a2105ae125"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dump folder, with the text that it was trained on beside it: its paths are relative to the current folder."""
    with zipfile.ZipFile(WRITTEN) as archive:
        archive.extractall(tmp_path)
    write_text(tmp_path / "text", 30)
    monkeypatch.chdir(tmp_path)
    return Path("run")


@pytest.fixture
def masks() -> None:
    """Skips the test where torch does not draw the dropout masks of the version that wrote the checkpoint."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = dropout(torch.ones(2, 32, 8, device=device), 0.1).eq(0)
    if hashlib.sha256(bytes(dropped.flatten().tolist())).hexdigest() != MASK:
        pytest.skip("torch draws other dropout masks here than where the checkpoint was written")


def resume() -> int:
    return main(["train", "run/config.toml"])


def test_the_text_is_the_one_that_it_was_trained_on():
    """Else the other tests fail because tests/text.py changed, and not the program."""
    assert hashlib.sha256("\0".join(documents(30)).encode()).hexdigest() == TEXT


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_resumed_to_the_losses_of_the_version_that_wrote_it(run: Path, ranks: int):
    assert on_ranks(ranks, resume) == [0] * ranks
    # Vectors of another width sum in another order: float32 rounds by 1e-7, which four steps of so small a model
    # amplify to some 1e-6. Other dropout masks, or no moments of AdamW, change the losses by 1e-3 and more.
    assert metrics(run) == pytest.approx(LOSSES[ranks], rel=1e-5)
    assert metrics(run, "grad_norm") == pytest.approx(GRAD_NORMS[ranks], rel=1e-4)


@pytest.mark.parametrize("weights, letter", [((), " "), (("--ema",), "e")])
def test_it_generates(run: Path, capsys: pytest.CaptureFixture[str], weights: tuple[str, ...], letter: str):
    """The weights have just learned that a space is more frequent than an e, and their average has not."""
    options = ("--prompt", "ba", "--max-new-tokens", "12", "--temperature", "0")
    assert main(["generate", str(run), *options, *weights]) == 0
    assert capsys.readouterr().out == f"ba{letter * 12}\n"


@pytest.mark.parametrize(
    "key, default, other", [("qk_norm", False, True), ("engram.kernel", 4, 3), ("engram.orders", [2, 3], [2])]
)
def test_a_key_of_the_model_that_came_after_the_checkpoint_had_its_default(key: str, default: object, other: object):
    written = {"model.dim": 64, "model.engram.layers": [1]}
    origin = Origin(Path("old"), TrainState(step=3, tokens=0, sequences=0, cursors={}, fingerprint=written))
    assert origin.resume(written | {f"model.{key}": default}).step == 3
    with pytest.raises(UserError) as refused:
        origin.resume(written | {f"model.{key}": other})
    assert f"model.{key}: {default!r} in the checkpoint, {other!r} now" in str(refused.value)


@pytest.mark.parametrize(
    "key, default, other", [("data.packing", "concatenate", "best_fit"), ("training.stages", [], [{"tokens": 1280}])]
)
def test_what_a_fingerprint_leaves_out_is_named_as_its_default(key: str, default: object, other: object):
    written = {"model.dim": 64}
    for before, now, found in (
        (written, written | {key: other}, (default, other)),
        (written | {key: other}, written, (other, default)),
    ):
        origin = Origin(Path("run"), TrainState(step=3, tokens=0, sequences=0, cursors={}, fingerprint=before))
        assert origin.resume(before).step == 3
        with pytest.raises(UserError) as refused:
            origin.resume(now)
        assert f"{key}: {found[0]!r} in the checkpoint, {found[1]!r} now" in str(refused.value)
