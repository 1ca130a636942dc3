"""`export` on checkpoints of short runs: the folder that it writes, and what it refuses."""

import ast
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from swamla_titan.checkpoint import hugging_face
from swamla_titan.cli import main
from swamla_titan.config import Config, to_toml
from swamla_titan.config.sections import Data, DataSource
from swamla_titan.tools import export
from swamla_titan.tools.generate import load_model
from tests.tiny_config import tiny_config
from tests.train.runs import checkpoint, metrics, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    settings = "--training.steps", "2", "--validation.interval", "2", "--checkpoint.interval", "2"
    assert train(tiny_config(folder), *settings, "--data.num_workers", "0", "--ema.decay", "0.5") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it is exported to."""
    return exported(trained, tmp_path_factory.mktemp("exported") / "new" / "out")


def exported(trained: Path, out: Path, *options: str) -> Path:
    assert main(["export", str(trained), str(out), *options]) == 0
    return out


def weights(trained: Path, dtype: torch.dtype = torch.float32, ema: bool = False) -> dict[str, torch.Tensor]:
    model = load_model(checkpoint(trained, 2), ema, torch.device("cpu")).model
    return {f"model.{name}": tensor.detach().to(dtype) for name, tensor in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_each_tensor_is_that_of_the_checkpoint(trained, folder):
    assert_same(load_file(folder / "model.safetensors"), weights(trained))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_in_several_files(trained, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(export, "MOST_OF_A_SHARD", 100_000)
    out = exported(trained, tmp_path / "out", "--dtype", dtype)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {name: load_file(out / name) for name in index["weight_map"].values()}
    assert len(files) > 1
    assert {path.name for path in out.glob("*.safetensors")} == files.keys()
    own = weights(trained, getattr(torch, dtype))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in own.values())
    assert_same({name: files[file][name] for name, file in index["weight_map"].items()}, own)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_the_average_of_the_weights(trained, tmp_path):
    average = weights(trained, ema=True)
    assert not torch.equal(average["model.norm.weight"], weights(trained)["model.norm.weight"])
    assert_same(load_file(exported(trained, tmp_path / "out", "--ema") / "model.safetensors"), average)


def test_other_formats_hold_the_same(trained, tmp_path):
    own = weights(trained)
    out = exported(trained, tmp_path / "torch", "--format", "torch")
    assert_same(torch.load(out / "pytorch_model.bin", weights_only=True), own)
    out = exported(trained, tmp_path / "dcp", "--format", "dcp")
    found = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    dcp.load(found, checkpoint_id=out, no_dist=True)
    assert_same(found, own)


def test_the_card_has_what_the_run_recorded(trained, folder):
    card = (folder / "README.md").read_text()
    state = json.loads((checkpoint(trained, 2) / "train.json").read_text())
    loss, val_loss = (metrics(trained, name)[2] for name in ("loss", "val_loss"))
    for line in (
        f"| tokens | {state['tokens']:,} |",
        "| steps | 2 of 2 |",
        "| data | local made-up-text |",
        f"| loss | {loss:.4f} (step 2) |",
        f"| val_loss | {val_loss:.4f} (step 2) |",
        "library_name: transformers",
        'dump_folder = "run"',
        *(f"| version of {name} | " for name in state["versions"]),
    ):
        assert line in card
    assert str(trained) not in card
    if (ROOT / ".git").exists():
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert state["versions"]["commit"].removesuffix("-dirty") == commit


def test_the_exported_code_imports_torch_and_transformers_alone(folder):
    names = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add("." * node.level + (node.module or "").split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch", "transformers", ".configuration_swamla"}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a command that is refused."""
    capsys.readouterr()
    assert main(["export", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_folder_in_use_is_left_alone(trained, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    for out in ("out", "out/mine"):
        assert "exists, and is no empty folder" in refusal(capsys, str(trained), str(tmp_path / out))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_an_empty_folder_may_be_named_in_any_way(trained, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert "config.json" in os.listdir(exported(trained, tmp_path / "link"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    exported(trained, Path("."))
    assert "config.json" in os.listdir(tmp_path / "here")


def test_a_damaged_checkpoint_is_refused(trained, tmp_path, capsys):
    broken = tmp_path / "step-00000002"
    shutil.copytree(checkpoint(trained, 2), broken)
    file = next(broken.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "has changed since it was written" in refusal(capsys, str(broken), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["safetensors", "dcp", "torch"])
def test_a_full_disk_leaves_nothing_behind(trained, tmp_path, capsys, monkeypatch, format):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes of a file; Python ignores the signal
    try:
        message = refusal(capsys, str(trained), str(tmp_path / "new/out"), "--format", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "out: cannot be written" in message
    assert list(tmp_path.iterdir()) == []


def test_a_signal_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    monkeypatch.setattr(export.shutil, "copyfile", lambda *paths: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit):
            export.export(str(trained), str(tmp_path / "out"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert list(tmp_path.iterdir()) == []


def test_a_kind_of_block_that_the_exported_code_lacks(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(hugging_face.LAYER_TYPES, "mla")
    message = refusal(capsys, str(trained), str(tmp_path / "out"))
    assert "the model has mla, which the exported code does not implement" in message
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_float16_cannot_hold(trained, tmp_path, capsys, monkeypatch):
    tensors = export.exported_tensors

    def with_large(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            model.get_parameter("norm.weight").fill_(1e6)
        return tensors(model, dtype)

    monkeypatch.setattr(export, "exported_tensors", with_large)
    message = refusal(capsys, str(trained), str(tmp_path / "out"), "--dtype", "float16")
    assert "model.norm.weight has values that float16 cannot hold" in message
    assert list(tmp_path.iterdir()) == []


class FakeHub:
    """What of huggingface_hub is called."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, []
        self.module = SimpleNamespace(HfApi=lambda: self)

    def create_repo(self, repository: str, exist_ok: bool) -> None:
        self.calls.append(("create", repository, exist_ok))

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.error:
            raise self.error
        self.calls.append(("upload", repo_id, sorted(os.listdir(folder_path))))


def test_push_to_hub(trained, tmp_path, capsys, monkeypatch):
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub.module)
    exported(trained, tmp_path / "kept")
    assert hub.calls == []
    out = exported(trained, tmp_path / "out", "--push-to-hub", "me/mine")
    assert hub.calls == [("create", "me/mine", True), ("upload", "me/mine", sorted(os.listdir(out)))]
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(OSError(errno.ENETDOWN, "no network")).module)
    assert main(["export", str(trained), str(tmp_path / "other"), "--push-to-hub", "me/mine"]) == 1
    message = capsys.readouterr().err
    assert "is complete, and was not uploaded to me/mine" in message
    assert "no network" in message
    assert sorted(os.listdir(tmp_path / "other")) == sorted(os.listdir(out))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["export", str(trained), str(tmp_path / "third"), "--push-to-hub", "me/mine"]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("source", ["local", "shards"])
def test_the_card_has_no_path_of_the_machine(source):
    mixed = (DataSource("ours", path="/secret/ours"), DataSource("hub", source="huggingface", path="someone/texts"))
    for data in (Data(source=source, path="/secret/texts"), Data(source=source, sources=mixed)):
        shown = to_toml(export._without_places(Config(data=data)))
        assert "secret" not in shown
        assert ("someone/texts" in shown) == bool(data.sources)
