"""Where the machines of a run meet, seen from one of them: who holds the meeting point, and how others reach this one.

torchrun guesses both from this machine's host name. On rented machines that name often stands for 127.0.1.1, or for
nothing: then nobody holds the meeting point, or the others are sent to an address of their own. The route to the
meeting point knows better. Standard library only.
"""

import fcntl
import ipaddress
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from swamla_titan.errors import UserError

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_SOMEWHERE = "192.0.2.1"  # set aside for documentation (RFC 5737): its route is the default one; nothing is sent


@dataclass(frozen=True)
class MeetingPoint:
    """`here`: on this machine. `address`: by which the other machines reach this one. `interface`: has that address."""

    host: str
    port: int
    here: bool
    address: str
    interface: str | None


def find_meeting_point(endpoint: str) -> MeetingPoint:
    """The meeting point `HOST:PORT`. Raises UserError if HOST has no address, or none that there is a route to."""
    host, port = _split(endpoint)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise UserError(f"RDZV_ENDPOINT={endpoint}: no address of {host} is known here ({error.strerror})") from None
    targets = list(dict.fromkeys(str(address[0]) for *_, address in found))
    sources = {target: source for target in targets if (source := _source(target))}
    if not sources:
        raise UserError(f"RDZV_ENDPOINT={endpoint}: this machine has no way to {', '.join(targets)}")
    own = [target for target, source in sources.items() if target == source]
    if own:
        # By the name that the others use. Here it may stand for 127.0.1.1, whose interface would lead nowhere.
        source = own[0] if not _is_loopback(own[0]) or _is_loopback(host) else _source(_SOMEWHERE)
        return MeetingPoint(host, port, True, host, source and _interface(source))
    source = next(iter(sources.values()))
    return MeetingPoint(host, port, False, source, _interface(source))


def wait_for_meeting_point(point: MeetingPoint, seconds: float, say: Callable[[str], None]) -> None:
    """Return once something listens there; `say` a line if it does not yet. UserError after so many seconds."""
    end = time.monotonic() + seconds
    said = False
    while not answers(point):
        if time.monotonic() > end:
            raise UserError(
                f"RDZV_ENDPOINT={point.host}:{point.port}: nobody answered there for {seconds:g} s. Start the same "
                f"command on {point.host} too, and let its firewall pass that port"
            )
        if not said:
            say(f"waiting for {point.host}:{point.port}, where the machines of this run meet")
            said = True
        time.sleep(0.5)


def answers(point: MeetingPoint) -> bool:
    """Whether something listens at the meeting point."""
    try:
        socket.create_connection((point.host, point.port), timeout=5).close()
    except OSError:
        return False
    return True


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _source(target: str) -> str | None:
    """The address of this machine that its packets to `target` carry; None without a route."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # UDP: to connect is to look the route up
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _interface(address: str) -> str | None:
    """The network interface that has an IPv4 address; None where that cannot be found."""
    if ":" in address:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none, or this is no Linux
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
