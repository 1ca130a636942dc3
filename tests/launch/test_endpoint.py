"""How machines find each other. Whether they then do is proved with two of them in tests/distributed/test_nodes.py."""

import os
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Iterator

import pytest

from swamla_titan.errors import UserError
from swamla_titan.launch import agent
from swamla_titan.launch import endpoint as endpoint_module
from swamla_titan.launch.endpoint import (
    Endpoint,
    answers,
    local_endpoint,
    resolve_endpoint,
    wait_for_endpoint,
)
from swamla_titan.launch.rendezvous import BACKEND
from tests.waiting import wait_until

OWN, OTHER = "10.1.0.5", "10.1.0.9"
NAMES = {"node0": OTHER, "me": OWN, "debian": "127.0.1.1", "localhost": "127.0.0.1", "two": ["10.9.9.9", OTHER]}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the address OWN, a route to 10.1.0.0/24 and a default route from another address."""

    def getaddrinfo(host: str, port: int, **_: object) -> list:
        found = NAMES.get(host, host)
        if not isinstance(found, list) and not found[0].isdigit() and ":" not in found:
            raise socket.gaierror(-2, "Name or service not known")
        return [(None, None, None, "", (each, port)) for each in (found if isinstance(found, list) else [found])]

    def source(target: str) -> "str | None":
        if target == OWN or target.startswith("127.") or target == "::1":
            return target
        return {OTHER: OWN, "10.1.0.6": OWN, "192.0.2.1": "203.0.113.7"}.get(target)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(endpoint_module, "_source", source)
    addresses = {OWN: "ib0", "10.1.0.6": "ib0", "203.0.113.7": "eth0", "127.0.0.1": "lo"}
    monkeypatch.setattr(endpoint_module, "_addresses", lambda: addresses)


@pytest.mark.parametrize(
    "endpoint, expected",
    [
        ("node0:29400", Endpoint("node0", 29400, False, OWN, "ib0")),
        (f"{OTHER}:1", Endpoint(OTHER, 1, False, OWN, "ib0")),
        ("two:5", Endpoint("two", 5, False, OWN, "ib0")),  # one of its addresses has a route
        ("me:5", Endpoint("me", 5, True, OWN, "ib0")),
        ("10.1.0.6:5", Endpoint("10.1.0.6", 5, True, "10.1.0.6", "ib0")),  # packets to it carry the first address
        # The others must not be told 127.0.1.1, nor gloo look there.
        ("debian:5", Endpoint("debian", 5, True, "203.0.113.7", "eth0")),
        ("localhost:5", Endpoint("localhost", 5, True, "127.0.0.1", "lo")),
        ("127.0.0.1:0", Endpoint("127.0.0.1", 0, True, "127.0.0.1", "lo")),
        ("127.0.0.9:5", Endpoint("127.0.0.9", 5, True, "127.0.0.9", "lo")),
        ("[::1]:5", Endpoint("::1", 5, True, "::1", "lo")),
    ],
)
@pytest.mark.usefixtures("machine")
def test_who_holds_it_and_how_others_reach_this_machine(endpoint: str, expected: Endpoint) -> None:
    assert resolve_endpoint(endpoint) == expected


@pytest.mark.parametrize(
    "endpoint, message", [("nodeO:5", "no address of nodeO is known here"), ("10.7.0.1:5", "has no way to 10.7.0.1")]
)
@pytest.mark.usefixtures("machine")
def test_what_cannot_be_reached_is_refused(endpoint: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_endpoint(endpoint)


def test_this_machines_own_routes_and_interfaces() -> None:
    assert resolve_endpoint("127.0.0.1:5") == Endpoint("127.0.0.1", 5, True, "127.0.0.1", "lo")
    assert local_endpoint() == Endpoint("127.0.0.1", 0, True, "127.0.0.1", "lo")


def test_a_name_that_stands_for_the_loopback_address_and_no_default_route(
    machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = endpoint_module._source
    monkeypatch.setattr(endpoint_module, "_source", lambda target: None if target == "192.0.2.1" else source(target))
    with pytest.raises(UserError, match=r"debian stands for 127.0.1.1, .* in its place: 10.1.0.5 or 10.1.0.6 or 203"):
        resolve_endpoint("debian:5")
    monkeypatch.setattr(endpoint_module, "_addresses", lambda: {OWN: "ib0", "127.0.0.1": "lo"})
    assert resolve_endpoint("debian:5").address == OWN
    monkeypatch.setattr(endpoint_module, "_addresses", lambda: {"127.0.0.1": "lo"})
    assert resolve_endpoint("debian:5").address == "127.0.1.1"  # then there are no others


def test_what_listens_does_so_at_one_address_or_says_why_not() -> None:
    first = endpoint_module.listen("127.0.0.1", 0)
    assert first is not None
    with first:
        port = first.getsockname()[1]
        assert endpoint_module.listen("127.0.0.1", port) is None
        second = endpoint_module.listen("127.0.0.2", port)
        assert second is not None
        second.close()
    with pytest.raises(
        UserError, match=r"no program may listen at 192\.0\.2\.77 port 5 of this machine: Cannot assign"
    ):
        endpoint_module.listen("192.0.2.77", 5)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A port at which nobody listens before `listen`."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield made


def point_at(server: socket.socket) -> Endpoint:
    return Endpoint("127.0.0.1", server.getsockname()[1], False, "127.0.0.1", "lo")


def test_a_machine_that_comes_first_waits_and_says_so_once(server: socket.socket) -> None:
    said: list[str] = []
    threading.Timer(1.3, server.listen).start()
    wait_for_endpoint(point_at(server), 30, said.append)
    assert len(said) == 1
    assert said[0].startswith("waiting for 127.0.0.1:")
    wait_for_endpoint(point_at(server), 30, said.append)
    assert len(said) == 1


def test_it_does_not_wait_for_ever(server: socket.socket) -> None:
    with pytest.raises(UserError, match=r"nobody answered there for 0\.1 s"):
        wait_for_endpoint(point_at(server), 0.1, lambda line: None)


@pytest.fixture
def heartbeats(monkeypatch: pytest.MonkeyPatch) -> list[Endpoint]:
    """Whose silence would end torchrun; the environment is as it was afterwards."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    found: list[Endpoint] = []
    monkeypatch.setattr(agent, "_heartbeat", found.append)
    monkeypatch.setattr(agent, "wait_for_endpoint", lambda point, seconds, say: None)
    return found


def met(monkeypatch: pytest.MonkeyPatch, point: Endpoint, **given: object) -> Namespace:
    """torchrun's arguments afterwards."""
    monkeypatch.setattr(agent, "resolve_endpoint", lambda endpoint: point)
    args = Namespace(**{"rdzv_endpoint": "node0:5", "rdzv_id": "run", "local_addr": None, "standalone": False} | given)
    agent._configure_rendezvous(args)
    return args


def test_torchruns_arguments_are_set(heartbeats: list[Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    there = Endpoint("node0", 5, False, OWN, "ib0")
    args = met(monkeypatch, there)
    assert (args.rdzv_backend, args.rdzv_endpoint, args.local_addr) == (BACKEND, "node0:5", OWN)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert "NCCL_SOCKET_IFNAME" not in os.environ  # it knows faster ones
    wait_until(lambda: heartbeats)

    args = met(monkeypatch, Endpoint("node0", 5, True, "10.1.0.6", "eth0"), local_addr="given")
    assert (args.rdzv_endpoint, args.local_addr, args.rdzv_id) == ("node0:5", "given", "run")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"  # what is set stays
    assert heartbeats == [there]


@pytest.mark.usefixtures("heartbeats")
def test_a_run_of_one_machine_is_in_reach_of_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")  # of a cluster's profile
    args = met(monkeypatch, Endpoint("never", 5, True, "never", None), standalone=True, local_addr="127.0.0.1")
    assert (args.standalone, args.rdzv_backend, args.rdzv_endpoint) == (False, BACKEND, "127.0.0.1:0")
    assert args.rdzv_id != "run"
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_torchruns_settings_of_another_start_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PET_STANDALONE", "PET_NO_PYTHON", "PET_RDZV_CONF"):
        monkeypatch.setenv(name, "1")
    agent._drop_foreign_settings()
    assert [name for name in os.environ if name.startswith("PET_")] == ["PET_RDZV_CONF"]
    assert "PET_STANDALONE='1' is left out" in capsys.readouterr().err


def test_an_endpoint_that_falls_silent_ends_torchrun(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    heard: list[float] = []

    def look(host: str, port: int) -> bool:
        if len(heard) == 30:
            server.close()
        elif answers(host, port):
            heard.append(time.monotonic())
            return True
        return False

    monkeypatch.setattr(agent.os, "_exit", end)
    monkeypatch.setattr(agent, "HEARTBEAT_TIMEOUT", 1.0)
    monkeypatch.setattr(agent, "HEARTBEAT_INTERVAL", 0.05)
    monkeypatch.setattr(agent, "answers", look)
    server.listen(512)  # nobody accepts: the queue must hold them all
    point = point_at(server)
    with pytest.raises(Ended, match="1"):
        agent._heartbeat(point)
    assert len(heard) == 30  # so often it answered, over more than the silence that is borne
    assert time.monotonic() - heard[-1] >= 1.0
    assert f"127.0.0.1:{point.port}, the rendezvous endpoint, does not answer any more" in capsys.readouterr().err
