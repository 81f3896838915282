"""Addresses and ports of this host."""

from __future__ import annotations

import fcntl
import random
import socket
import struct

from speechllm.errors import UserError

_SIOCGIFADDR = 0x8915


class NetworkError(UserError):
    """The profile's interface or ports do not fit this host."""


def own_address(interface: str | None) -> str:
    """The IPv4 address by which other hosts reach this one.

    interface: the site's; None: what the host's name stands for, or the first address that is not
    the loopback's (some systems give their own name 127.0.1.1). Raises NetworkError.
    """
    if interface is not None:
        address = _address_of(interface)
        if address is None:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise NetworkError(
                f"network_interface: {interface} has no IPv4 address on {socket.gethostname()}; "
                f"its interfaces: {known}"
            )
        return address
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = "127.0.0.1"
    if not named.startswith("127."):
        return named
    addresses = [_address_of(name) for _, name in socket.if_nameindex()]
    others = [a for a in addresses if a is not None and not a.startswith("127.")]
    return others[0] if others else "127.0.0.1"


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


class HeldPort:
    """A free port that no other run of ours takes before our launcher listens on it.

    The socket is bound, but does not listen, and allows others to bind as long as they ask for
    SO_REUSEADDR, as torch's store does; the search for a free port does not ask for it.
    """

    def __init__(self, ports: tuple[int, int]) -> None:
        """ports: lowest and highest to choose from. Raises NetworkError where none is free."""
        low, high = ports
        for port in random.sample(range(low, high + 1), high + 1 - low):
            held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                held.bind(("", port))
            except OSError:
                held.close()
                continue
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.port, self._socket = port, held
            return
        raise NetworkError(f"ports: none of {low} to {high} is free on {socket.gethostname()}")

    def close(self) -> None:
        self._socket.close()
