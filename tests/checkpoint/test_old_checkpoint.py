"""A checkpoint that an earlier version wrote on two ranks: this version resumes it, and generates from it.

fixtures/run-0ddd00a.zip holds the config.toml and the first checkpoint of a dump folder, written by the commit of that
name under torch 2.13 with `NPROC=2 NGPU=0 ./run_train.sh CONFIG`: AdamW, an average of the weights, a checkpoint every
4 of 8 steps. It is not to be written again: versions to come must read it.
"""

import zipfile
from pathlib import Path

import pytest

from swamla_titan.cli import main
from tests.distributed.ranks import on_ranks
from tests.text import write_text
from tests.train.runs import metrics

WRITTEN = Path(__file__).parent / "fixtures" / "run-0ddd00a.zip"
# Of the steps after the checkpoint, by the version that wrote it.
LOSSES = {5: 4.396263599395752, 6: 4.104466915130615, 7: 3.9140384197235107, 8: 3.6498396396636963}
GRAD_NORMS = {5: 0.8131806254386902, 6: 0.7883725166320801, 7: 0.6871700882911682, 8: 0.6601450443267822}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dump folder, with the text that it was trained on beside it: its paths are relative to the current folder."""
    with zipfile.ZipFile(WRITTEN) as archive:
        archive.extractall(tmp_path)
    write_text(tmp_path / "text", 30)
    monkeypatch.chdir(tmp_path)
    return Path("run")


def resume() -> int:
    return main(["train", "run/config.toml"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_resumed_to_the_losses_of_the_version_that_wrote_it(run: Path, ranks: int):
    assert on_ranks(ranks, resume) == [0] * ranks
    # Vectors of another width, or other ranks, sum in another order: float32 rounds by 1e-7, which four steps of so
    # small a model amplify to some 1e-6. Without AdamW's moments the losses would be off by 4e-2.
    assert metrics(run) == pytest.approx(LOSSES, rel=1e-5)
    assert metrics(run, "grad_norm") == pytest.approx(GRAD_NORMS, rel=1e-4)


@pytest.mark.parametrize("weights", [(), ("--ema",)])
def test_it_generates(run: Path, capsys: pytest.CaptureFixture[str], weights: tuple[str, ...]):
    options = ("--prompt", "ba", "--max-new-tokens", "12", "--temperature", "0")
    assert main(["generate", str(run), *options, *weights]) == 0
    assert capsys.readouterr().out == "baeeeeeeeeeeee\n"  # after so few steps, the most frequent letter
