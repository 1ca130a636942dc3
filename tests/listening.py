"""Which sockets of a process listen, and at which addresses, by what Linux says of them."""

import ipaddress
import os
import struct
from contextlib import suppress
from pathlib import Path


def listening(pid: int) -> list[str]:
    """The addresses at which this process listens for TCP connections, one for each socket."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    words = bytes.fromhex(fields[1].partition(":")[0])
                    words = struct.pack(f">{len(words) // 4}I", *struct.unpack(f"<{len(words) // 4}I", words))
                    sockets[f"socket:[{fields[9]}]"] = str(ipaddress.ip_address(words))
    found = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found += [sockets[link] for link in [os.readlink(file)] if link in sockets]
    return found
