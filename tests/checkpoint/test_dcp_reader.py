"""A checkpoint from anybody: its index is a pickle, and none of the code that one may ask for is run."""

import json
import os
import pickle
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata

from swamla_titan.checkpoint.reader import Reader
from swamla_titan.errors import UserError
from tests.train.runs import checkpoint, train


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_an_index_is_read_as_dcp_reads_it(tmp_path):
    tensors = {"model": {"weight": torch.randn(3, 2), "half": torch.ones(2, dtype=torch.bfloat16)}}
    tensors["random"] = {"state": torch.zeros(5, dtype=torch.uint8)}
    dcp.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    ours, theirs = Reader(tmp_path).read_metadata(), dcp.FileSystemReader(tmp_path).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data


def test_an_index_that_python_3_11_2_wrote_is_read_too(tmp_path, monkeypatch):
    """There a member of an enumeration was pickled as getattr(enumeration, name)."""
    monkeypatch.setattr(
        metadata._MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self._name_))
    )
    dcp.save({"model": {"weight": torch.randn(3, 2)}}, checkpoint_id=tmp_path, no_dist=True)
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    ours, theirs = Reader(tmp_path).read_metadata(), dcp.FileSystemReader(tmp_path).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata


class Attribute:
    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize(
    "attribute",
    [(metadata.Metadata, "__init__"), (metadata._MEM_FORMAT_ENCODING, "mro"), (torch.Size, "numel")],
    ids=str,
)
def test_no_other_attribute_is_had_in_that_way(tmp_path, attribute):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attribute(*attribute)))
    with pytest.raises(UserError, match="not the index of a checkpoint"):
        Reader(tmp_path).read_metadata()


def test_the_code_of_a_strangers_checkpoint_is_not_run(tiny, tmp_path, capsys):
    assert train(tiny, "--training.steps", "2") == 0
    path = checkpoint(tmp_path / "run", 2)
    evil = pickle.dumps(Evil(tmp_path / "mark"))
    (path / ".metadata").write_bytes(evil)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][".metadata"] = {"bytes": len(evil), "sha256": sha256(evil).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert train(tiny, "--training.steps", "4") == 2
    assert not (tmp_path / "mark").exists()
    assert "posix.mkdir, which no index needs" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"state_dict_metadata": {}}), pickle.dumps([1])])
def test_what_is_no_index_is_refused(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="not the index of a checkpoint"):
        Reader(tmp_path).read_metadata()
