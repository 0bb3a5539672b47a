"""A network of its own for tests whose servers need their well-known ports: 53, 443 and 25 of 127.0.0.0/8."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator

from tests.integration.servers.process import unavailable

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1


@contextlib.contextmanager
def private_network() -> Iterator[None]:
    """Move this thread, and all that it starts from now on, into a network that has nothing but a loopback interface.

    network_namespaces(7). It is left when the context is.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(_CLONE_NEWNET):
            unavailable(f"no network namespace: {os.strerror(ctypes.get_errno())}; run the tests as root")
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
            yield
        finally:
            assert libc.setns(before, _CLONE_NEWNET) == 0
    finally:
        os.close(before)
