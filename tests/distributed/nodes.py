"""Machines that can be cut off: network namespaces joined by a switch, each with its own host name.

Their names stand for no address, as on many rented machines; and a link that is down tells nobody: neither end of a
connection is closed.
"""

import itertools
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PORT = 29400
_SUBNETS = itertools.count(1)


class Node:
    """A network namespace with one interface, `eth0`, and the address `address`."""

    def __init__(self, name: str, namespace: str, switch: str, address: str) -> None:
        self.name, self.namespace, self.address = name, namespace, address
        self._switch = switch
        self._started: list[subprocess.Popen[str]] = []

    def start(self, command: Sequence[str], log: Path, **variables: str) -> "subprocess.Popen[str]":
        """Run a command on this machine, with `variables` beside the environment's; its output is appended to `log`."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c"]
        inside += [f'hostname {self.name} && exec "$@"', "sh", *command]
        with log.open("a") as output:
            process = subprocess.Popen(
                inside,
                env=os.environ | variables,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def cut_off(self) -> None:
        """Take the cable out."""
        _ip("-n", self._switch, "link", "set", self.name, "down")

    def connect(self) -> None:
        """Put it in again."""
        _ip("-n", self._switch, "link", "set", self.name, "up")

    def processes(self) -> list[int]:
        """What runs on this machine."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """SIGKILL to everything that runs on this machine, at once."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait()


@contextmanager
def nodes(count: int) -> Iterator[list[Node]]:
    """`count` machines that reach each other. Skips the test where the system does not permit it."""
    tag = uuid.uuid4().hex[:6]
    switch = f"swamla-{tag}-switch"
    subnet = f"10.213.{next(_SUBNETS)}"
    made: list[Node] = []
    try:
        if not all(shutil.which(tool) for tool in ("ip", "unshare")):
            pytest.skip("network namespaces need the commands ip and unshare")
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for number in range(count):
                made.append(_add_node(f"node{number}", f"swamla-{tag}-{number}", switch, f"{subnet}.{number + 1}"))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield made
    finally:
        for node in made:
            node.kill()
        for namespace in [*(node.namespace for node in made), switch]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _add_node(name: str, namespace: str, switch: str, address: str) -> Node:
    _ip("netns", "add", namespace)
    node = Node(name, namespace, switch, address)
    _ip("-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("-n", switch, "link", "set", name, "master", "bridge", "up")
    _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
    for interface in ("lo", "eth0"):
        _ip("-n", namespace, "link", "set", interface, "up")
    return node


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
