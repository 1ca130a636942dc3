"""What of a run listens, and what of it reads what others may have written."""

import base64
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

from swamla_titan.errors import RankFailed
from swamla_titan.launch import rendezvous
from swamla_titan.launch.endpoint import Endpoint
from swamla_titan.launch.ranks import FOLDER, RESTART_COUNT, RankInfo
from swamla_titan.launch.rendezvous import CheckedBackend, open_store
from swamla_titan.launch.signals import StopRequest
from tests.listening import listening
from tests.waiting import HANG

ROOT = Path(__file__).resolve().parents[2]

# Joins the others as the trainer does, and writes down who listens: this worker, and the torchrun that started it.
WORKER = r"""
import json, os, sys
from pathlib import Path
from swamla_titan.config.sections import Parallel
from swamla_titan.launch.process_group import init_distributed, destroy_distributed
from swamla_titan.system.process import end_process
from tests.listening import listening
world = init_distributed(Parallel())
assert world.all_reduce_max(float(world.rank)) == world.size - 1
found = {"worker": listening(os.getpid()), "torchrun": listening(os.getppid())}
(Path(sys.argv[1]) / f"rank-{world.rank}").write_text(json.dumps(found))
world.all_reduce_max(0.0)
destroy_distributed()
end_process(0)
"""


def start(folder: Path, *flags: str) -> "subprocess.Popen[str]":
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "swamla_titan.launch.agent", *flags, str(folder / "worker.py"), str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    environment |= {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop(FOLDER, None)
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def who_listens(folder: Path, ranks: int) -> dict[str, set[str]]:
    """The addresses at which torchruns and workers listened; rank 0's worker and one torchrun did hold a store."""
    found = [json.loads((folder / f"rank-{rank}").read_text()) for rank in range(ranks)]
    assert all(each["worker"] for each in found)
    assert any(each["torchrun"] for each in found)
    return {who: {address for each in found for address in each[who]} for who in ("worker", "torchrun")}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_run_of_one_machine_listens_at_the_loopback_address_alone(tmp_path: Path) -> None:
    agent = start(tmp_path, "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    _, err = agent.communicate(timeout=HANG)
    assert agent.returncode == 0, err
    assert who_listens(tmp_path, 2) == {"worker": {"127.0.0.1"}, "torchrun": {"127.0.0.1"}}


@pytest.mark.slow  # two torchruns
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_run_of_two_listens_at_the_address_at_which_they_meet(tmp_path: Path) -> None:
    """Two torchruns of this machine, which meet at one of its addresses that is not the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    flags = ("--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=127.0.0.2:{port}", "--rdzv-id=a")
    both = [start(tmp_path, *flags) for _ in range(2)]
    for agent in both:
        _, err = agent.communicate(timeout=HANG)
        assert agent.returncode == 0, err
    found = who_listens(tmp_path, 2)
    assert found["torchrun"] == {"127.0.0.2"}
    assert found["worker"] == {"127.0.0.2", "127.0.0.1"}  # gloo takes the first address of that interface


def test_the_store_listens_at_one_address(tmp_path: Path) -> None:
    before = listening(os.getpid())
    store = open_store(Endpoint("127.0.0.3", 0, True, "127.0.0.3", "lo"))
    assert sorted(listening(os.getpid())) == sorted([*before, "127.0.0.3"])
    again = open_store(Endpoint("127.0.0.3", store.port, True, "127.0.0.3", "lo"))  # one of them holds it
    store.set("key", "value")
    assert again.get("key") == b"value"


class Harmful:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> object:
        return os.system, ("exit 1",)


def test_a_state_of_the_rendezvous_is_read_and_nothing_else() -> None:
    store = dist.HashStore()
    backend = CheckedBackend(store, "run")
    node = _NodeDesc("10.0.0.1", 5, 0)
    state = _RendezvousState()
    state.participants[node] = 0
    state.wait_list.add(node)
    state.last_heartbeats[node] = state.deadline = datetime.now(timezone.utc)
    assert backend.get_state() is None
    assert backend.set_state(pickle.dumps(state))[2]
    assert pickle.loads(backend.get_state()[0]).participants == {node: 0}
    for harmful in (pickle.dumps(Harmful()), pickle.dumps({"a": [Harmful()]}), b"no pickle", b""):
        store.set("torch.rendezvous.run", base64.b64encode(harmful).decode())
        with pytest.raises(
            RendezvousStateError, match="the rendezvous endpoint has something other than the state of a run"
        ):
            backend.get_state()
        with pytest.raises(RendezvousStateError):
            backend.set_state(pickle.dumps(state), b"another")


# who does not come


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Where the ranks of a run would meet, with nobody there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    monkeypatch.setenv(RESTART_COUNT, "0")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.delenv(FOLDER, raising=False)
    return number


@pytest.mark.parametrize("rank, what", [(0, "all of 2 ranks at 127.0.0.1:"), (1, "rank 0 at 127.0.0.1:")])
@pytest.mark.usefixtures("port")
def test_ranks_that_do_not_come_are_not_waited_for_long_and_named(
    rank: int, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "WORKER_CONNECT_TIMEOUT", 0.5)
    monkeypatch.setattr(rendezvous, "WARN_AFTER", 0.1)
    with pytest.raises(RankFailed, match=rf"rank {rank} waited 0.5 s in vain for {what}"):
        rendezvous.connect_workers(RankInfo(rank=rank, size=2), lambda: None)
    assert f"waiting for {what}" in caplog.text
    assert f"unset {RESTART_COUNT}" in caplog.text


@pytest.mark.usefixtures("port")
def test_ranks_connect_whose_agents_have_restarted_them_unequally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine joined after a crash: torchrun counts each machine's restarts by themselves."""
    waits = threading.Event()
    monkeypatch.setattr(rendezvous, "WORKER_CONNECT_TIMEOUT", HANG)
    monkeypatch.setenv(RESTART_COUNT, "1")
    with ThreadPoolExecutor(1) as other:
        first = other.submit(rendezvous.connect_workers, RankInfo(rank=0, size=2), waits.set)
        assert waits.wait(HANG)
        monkeypatch.setenv(RESTART_COUNT, "0")
        second = rendezvous.connect_workers(RankInfo(rank=1, size=2), lambda: None)
        first.result(HANG).set("key", "value")
        assert second.get("key") == b"value"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.usefixtures("port")
def test_a_signal_is_heard_while_ranks_are_waited_for(
    rank: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    stop = StopRequest()
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            os.kill(os.getpid(), number)
        stop.exit_without_peers()

    try:
        with pytest.raises(SystemExit, match="75"):
            rendezvous.connect_workers(RankInfo(rank=rank, size=2), look)
    finally:
        stop.forget()


@pytest.mark.usefixtures("port")
def test_other_machines_have_some_time_to_come_and_hear_of_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "GROUP_WORLD_SIZE": 2,
    }.items():
        monkeypatch.setenv(name, str(value))
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    stop.exit_without_peers()
    now = time.monotonic()
    monkeypatch.setattr("swamla_titan.launch.signals.time.monotonic", lambda: now + 3600)
    with pytest.raises(SystemExit, match="75"):
        stop.exit_without_peers()
    stop.forget()
