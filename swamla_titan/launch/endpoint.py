"""The rendezvous endpoint: whether this machine hosts it, and at which address other machines reach this one.

torchrun guesses both from this machine's host name. On rented machines that name often resolves to 127.0.1.1, or not at
all. Then nobody hosts the endpoint, or the other machines connect to themselves. So both are derived from the route to
the endpoint instead.

Whoever can connect to a port of a run can end the run, or run code in it. So no port is open at all addresses of a
machine: a run of one machine listens at the loopback address, a run of several at the address by which the others reach
this machine. Standard library only.
"""

import ctypes
import errno
import fcntl
import ipaddress
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swamla_titan.errors import UserError
from swamla_titan.system.process import RunningTime

LOOPBACK = "127.0.0.1"
_SIOCGIFCONF = 0x8912  # Linux: the IPv4 addresses of all interfaces
_IFREQ = 40  # bytes of each: 16 of the name, then a struct sockaddr_in
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
_DOCUMENTATION_ADDRESS = "192.0.2.1"  # RFC 5737: its route is the default one; nothing is sent


@dataclass(frozen=True)
class Endpoint:
    """`here`: on this machine. `address`: numeric, by which others reach this machine. `interface`: that has it."""

    host: str
    port: int
    here: bool
    address: str
    interface: str | None


def local_endpoint() -> Endpoint:
    """The endpoint of a run on this machine alone, at any free port, which other machines cannot reach."""
    return Endpoint(LOOPBACK, 0, True, LOOPBACK, _interface(LOOPBACK))


def resolve_endpoint(endpoint: str) -> Endpoint:
    """The endpoint `HOST:PORT`. Raises UserError if HOST has no address, or none that there is a route to."""
    host, port = _split(endpoint)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no name of a host"
        raise UserError(f"RDZV_ENDPOINT={endpoint}: no address of {host} is known here ({reason})") from None
    targets = list(dict.fromkeys(str(address[0]) for *_, address in found))
    sources = {target: source for target in targets if (source := _source(target))}
    if not sources:
        raise UserError(f"RDZV_ENDPOINT={endpoint}: this machine has no way to {', '.join(targets)}")
    mine = _addresses()  # packets to a second address of this machine carry the first
    own = [target for target, source in sources.items() if target == source or is_loopback(target) or target in mine]
    if not own:
        source = next(iter(sources.values()))
        return Endpoint(host, port, False, source, _interface(source))
    address = next((each for each in own if not is_loopback(each)), own[0])
    if is_loopback(address) and not is_loopback(host):
        # The name that the others use resolves to 127.0.1.1 here, as on Debian, which they could not reach.
        address = _address_for_others(endpoint, host, address)
    return Endpoint(host, port, True, address, _interface(address))


def listen(address: str, port: int) -> socket.socket | None:
    """A socket that listens at this one address; None if another program listens there already."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise UserError(f"no program may listen at {address} port {port} of this machine: {error.strerror}") from None
    return listener


def wait_for_endpoint(endpoint: Endpoint, timeout: float, log: Callable[[str], None]) -> None:
    """Wait until something listens there; `log` a line if it does not yet. UserError after `timeout` seconds."""
    running = RunningTime(10.0)
    logged = False
    while not answers(endpoint.host, endpoint.port):
        if running.update() > timeout:
            raise UserError(
                f"RDZV_ENDPOINT={endpoint.host}:{endpoint.port}: nobody answered there for {timeout:g} s. Start the "
                f"same command on {endpoint.host} too, and let its firewall pass that port"
            )
        if not logged:
            log(f"waiting for {endpoint.host}:{endpoint.port}, the rendezvous endpoint of this run")
            logged = True
        time.sleep(0.5)


def answers(host: str, port: int, timeout: float = 5.0) -> bool:
    """Whether something listens at this port; False after `timeout` seconds."""
    try:
        socket.create_connection((host, port), timeout=timeout).close()
    except OSError:
        return False
    return True


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether a host is the loopback address, or a name for it by convention."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.split(".")[0] in ("localhost", "ip6-localhost", "ip6-loopback")


def is_address(host: str) -> bool:
    """Whether this is a numeric address and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _address_for_others(endpoint: str, host: str, loopback: str) -> str:
    """This machine's address for others, if its name gives none; UserError if there are several."""
    if (default := _source(_DOCUMENTATION_ADDRESS)) and not is_loopback(default):
        return default
    others = [address for address in _addresses() if not is_loopback(address)]
    if len(others) > 1:
        raise UserError(
            f"RDZV_ENDPOINT={endpoint}: on this machine {host} stands for {loopback}, which others cannot reach. Give "
            f"the address that they know in its place: {' or '.join(others)}"
        )
    return others[0] if others else loopback


def _source(target: str) -> str | None:
    """The address of this machine that its packets to `target` carry; None without a route."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # UDP: connect only looks the route up
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _interface(address: str) -> str | None:
    """The network interface of an address; None if it is unknown."""
    interfaces = _addresses()
    if address not in interfaces and is_loopback(address):  # all of 127.0.0.0/8 are the one that has 127.0.0.1
        address = LOOPBACK
    return interfaces.get(address)


def _addresses() -> dict[str, str]:
    """This machine's addresses, each with its interface; empty if they are unknown (not Linux)."""
    found = {}
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            room = bytearray(_IFREQ * 1024)
            held = (ctypes.c_char * len(room)).from_buffer(room)
            answer = fcntl.ioctl(probe, _SIOCGIFCONF, struct.pack("iP", len(room), ctypes.addressof(held)))
            for start in range(0, struct.unpack("iP", answer)[0], _IFREQ):
                name = bytes(room[start : start + 16]).partition(b"\0")[0].decode(errors="replace")
                found[socket.inet_ntoa(bytes(room[start + 20 : start + 24]))] = name
        for line in _IPV6_ADDRESSES.read_text().splitlines():
            number, *_, name = line.split()
            found[str(ipaddress.IPv6Address(int(number, 16)))] = name
    except (OSError, ValueError):  # no Linux, or no IPv6
        pass
    return found
