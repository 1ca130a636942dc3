"""Ranks share the work of making sure that a checkpoint is whole, and agree on what they find."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from swamla_titan.checkpoint import manifest
from swamla_titan.checkpoint.records import TrainState
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.config.sections import Parallel
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import RunFailed, UserError
from swamla_titan.launch.process_group import init_distributed
from tests.distributed.ranks import on_ranks


def _save(checkpoints: Checkpoints, step: int) -> Path:
    """A checkpoint to which every rank contributes a file."""
    own = {f"weight.{checkpoints.world.rank}": torch.full((3, 5), float(step))}
    state = TrainState(step, tokens=0, sequences=0, cursors={}, fingerprint={})
    return checkpoints.save({"model": own}, state, {"config.toml": b"[job]"})


def _save_and_listen(folder: str) -> list[str]:
    """Names of the files that this rank digested for one checkpoint."""
    seen = []
    digest = manifest._digest

    def listen(path: Path, kind: str) -> str:
        seen.append(path.name)
        return digest(path, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "_digest", listen)
        _save(Checkpoints(Path(folder), 0, init_distributed(Parallel())), 1)
    return seen


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_rank_digests_what_it_wrote_and_the_first_what_nobody_did(tmp_path, size):
    found = on_ranks(size, _save_and_listen, str(tmp_path))
    shared = [".metadata", "config.toml", "train.json"]
    for rank, names in enumerate(found):
        own = {name for name in names if name.startswith(f"__{rank}_") and name.endswith(".distcp")}
        assert own
        assert sorted(names) == sorted([*own, *(shared if rank == 0 else [])])
    path = tmp_path / "step-00000001"
    entries = json.loads((path / "manifest.json").read_text())["files"]
    files = {each.name: each.read_bytes() for each in path.iterdir() if each.name != "manifest.json"}
    assert list(entries) == sorted(files)
    for name, content in files.items():
        assert entries[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _newest(folder: str, world: World | None = None) -> tuple[str, list[str]]:
    """What `newest_intact` says, and the files that this rank read for it."""
    seen = []
    digest = manifest._digest

    def listen(path: Path, kind: str) -> str:
        seen.append(f"{path.parent.name}/{path.name}")
        return digest(path, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "_digest", listen)
        try:
            found = str(Checkpoints(Path(folder), 0, world or init_distributed(Parallel())).newest_intact())
        except UserError as error:
            found = str(error)
    return found, seen


def _flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")


DAMAGES = {
    "none": [],
    "of the first": ["__0_0.distcp"],
    "of the last": ["__2_0.distcp"],
    "of two": ["train.json", "__1_0.distcp"],
}


def _save_two(folder: str) -> None:
    checkpoints = Checkpoints(Path(folder), 0, init_distributed(Parallel()))
    for step in (1, 2):
        _save(checkpoints, step)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "damage",
    ["none", "of two", *(pytest.param(name, marks=pytest.mark.slow) for name in ("of the first", "of the last"))],
)
def test_ranks_share_the_reading_and_find_what_one_process_finds(tmp_path, caplog, size, damage):
    on_ranks(3, _save_two, str(tmp_path))
    older, newer = tmp_path / "step-00000001", tmp_path / "step-00000002"
    for name in DAMAGES[damage]:
        _flip(newer / name)
    expected = older if damage != "none" else newer
    found = on_ranks(size, _newest, str(tmp_path))
    assert {path for path, _ in found} == {str(expected)} == {_newest(str(tmp_path), World.alone())[0]}
    read = [each for _, files in found for each in files if each.startswith(expected.name)]
    assert sorted(read) == sorted(
        f"{expected.name}/{path.name}" for path in expected.iterdir() if path.stem != "manifest"
    )

    (older / "manifest.json").unlink()
    _flip(newer / "__1_0.distcp")
    messages = {message for message, _ in on_ranks(size, _newest, str(tmp_path))}
    assert messages == {_newest(str(tmp_path), World.alone())[0]}
    (message,) = messages
    assert message.count(" has changed since it was written") == 1  # of each checkpoint the first damage
    assert f"{older}: manifest.json is missing" in message


def _end_of_a_second_save(folder: str, fails: str) -> str:
    """How it ends if `fails` does: "digest" on the last rank, "rename" of the checkpoint that is one too many."""
    world = init_distributed(Parallel())
    checkpoints = Checkpoints(Path(folder), 1, world)
    _save(checkpoints, 1)

    rename = Path.rename

    def fail(path: Path, *target: Path) -> Path:
        if fails == "digest" or path.name == "step-00000001":
            raise PermissionError(13, "Permission denied")
        return rename(path, *target)

    with pytest.MonkeyPatch.context() as patch:
        if fails == "digest" and world.rank == world.size - 1:
            patch.setattr(manifest, "_digest", fail)
        elif fails == "rename":
            patch.setattr(Path, "rename", fail)
        try:
            return str(_save(checkpoints, 2))
        except RunFailed as error:
            return str(error)


@pytest.mark.parametrize(
    "fails, message, left",
    [
        ("digest", "step-00000002 could not be written ([Errno 13] Permission denied)", ["step-00000001"]),
        (
            "rename",
            "step-00000002",  # that an old one stays is said, and is no failure
            ["step-00000001", "step-00000002"],
        ),
        ("nothing", "step-00000002", ["step-00000002"]),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_disk_that_fails_one_rank_fails_the_run_on_all(tmp_path, size, fails, message, left):
    messages = set(on_ranks(size, _end_of_a_second_save, str(tmp_path), fails))
    assert len(messages) == 1
    assert message in messages.pop()
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert Checkpoints(tmp_path, 0).newest_intact() == tmp_path / left[-1]
