"""How machines find each other. Whether they then do is proved with two of them in tests/distributed/test_nodes.py."""

import os
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Iterator

import pytest

from swamla_titan.errors import UserError
from swamla_titan.parallel import agent, meeting_point
from swamla_titan.parallel.meeting_point import MeetingPoint, answers, find_meeting_point, wait_for_meeting_point

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
        return {OTHER: OWN, "192.0.2.1": "203.0.113.7"}.get(target)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(meeting_point, "_source", source)
    monkeypatch.setattr(meeting_point, "_interface", {OWN: "ib0", "203.0.113.7": "eth0", "127.0.0.1": "lo"}.get)


@pytest.mark.parametrize(
    "endpoint, expected",
    [
        ("node0:29400", MeetingPoint("node0", 29400, False, OWN, "ib0")),
        (f"{OTHER}:1", MeetingPoint(OTHER, 1, False, OWN, "ib0")),
        ("two:5", MeetingPoint("two", 5, False, OWN, "ib0")),  # one of its addresses has a route
        ("me:5", MeetingPoint("me", 5, True, "me", "ib0")),
        # The others must not be told 127.0.1.1, nor gloo look there.
        ("debian:5", MeetingPoint("debian", 5, True, "debian", "eth0")),
        ("localhost:5", MeetingPoint("localhost", 5, True, "localhost", "lo")),
        ("127.0.0.1:0", MeetingPoint("127.0.0.1", 0, True, "127.0.0.1", "lo")),
        ("[::1]:5", MeetingPoint("::1", 5, True, "::1", None)),
    ],
)
@pytest.mark.usefixtures("machine")
def test_who_holds_it_and_how_others_reach_this_machine(endpoint: str, expected: MeetingPoint) -> None:
    assert find_meeting_point(endpoint) == expected


@pytest.mark.parametrize(
    "endpoint, message", [("nodeO:5", "no address of nodeO is known here"), ("10.7.0.1:5", "has no way to 10.7.0.1")]
)
@pytest.mark.usefixtures("machine")
def test_what_cannot_be_reached_is_refused(endpoint: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_meeting_point(endpoint)


def test_this_machines_own_routes_and_interfaces() -> None:
    assert find_meeting_point("127.0.0.1:5") == MeetingPoint("127.0.0.1", 5, True, "127.0.0.1", "lo")


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A port at which nobody listens before `listen`."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield made


def point_at(server: socket.socket) -> MeetingPoint:
    return MeetingPoint("127.0.0.1", server.getsockname()[1], False, "127.0.0.1", "lo")


def test_a_machine_that_comes_first_waits_and_says_so_once(server: socket.socket) -> None:
    said: list[str] = []
    threading.Timer(1.3, server.listen).start()
    wait_for_meeting_point(point_at(server), 30, said.append)
    assert len(said) == 1
    assert said[0].startswith("waiting for 127.0.0.1:")
    wait_for_meeting_point(point_at(server), 30, said.append)
    assert len(said) == 1


def test_it_does_not_wait_for_ever(server: socket.socket) -> None:
    with pytest.raises(UserError, match=r"nobody answered there for 0\.1 s"):
        wait_for_meeting_point(point_at(server), 0.1, lambda line: None)


def test_torchrun_is_told(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set meanwhile is taken back
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    vigils: list[MeetingPoint] = []
    monkeypatch.setattr(agent, "_end_in_silence", vigils.append)
    server.listen()
    there = MeetingPoint("node0", point_at(server).port, False, OWN, "ib0")
    monkeypatch.setattr(agent, "find_meeting_point", lambda endpoint: there)
    monkeypatch.setattr(agent, "wait_for_meeting_point", lambda point, seconds, say: None)
    args = Namespace(rdzv_endpoint="node0:5", rdzv_conf="last_call_timeout=5", local_addr=None)
    assert agent._meet(args) == there
    # Without is_host torchrun would ask for the address of its own name, which may have none.
    assert args == Namespace(rdzv_endpoint="node0:5", rdzv_conf="last_call_timeout=5,is_host=0", local_addr=OWN)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    end = time.monotonic() + 5
    while not vigils:
        assert time.monotonic() < end

    here = MeetingPoint("node0", 5, True, "node0", "eth0")
    monkeypatch.setattr(agent, "find_meeting_point", lambda endpoint: here)
    args = Namespace(rdzv_endpoint="node0:5", rdzv_conf="", local_addr="given")
    agent._meet(args)
    assert args == Namespace(rdzv_endpoint="127.0.0.1:5", rdzv_conf="", local_addr="given")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"  # what is set stays
    assert vigils == [there]


def test_a_meeting_point_that_falls_silent_ends_torchrun(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(agent.os, "_exit", end)
    monkeypatch.setattr(agent, "SILENCE", 1.0)
    monkeypatch.setattr(agent, "LOOK", 0.05)
    server.listen(512)  # nobody accepts: the queue must hold them all
    point = point_at(server)
    assert answers(point)
    threading.Timer(2.0, server.close).start()
    begin = time.monotonic()
    with pytest.raises(Ended, match="1"):
        agent._end_in_silence(point)
    assert time.monotonic() - begin > 2.5
    assert f"127.0.0.1:{point.port}, where the machines meet, does not answer any more" in capsys.readouterr().err
