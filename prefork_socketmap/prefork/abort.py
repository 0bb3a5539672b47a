"""End a connection for good, whoever else has a descriptor of it."""

from __future__ import annotations

import contextlib
import socket
import struct


def abort(sock: socket.socket) -> None:
    """Reset a TCP connection, even when other processes hold duplicates; shut any other connection down.

    To close a descriptor ends a connection only if it is the last one, and shutdown(2) sends an orderly end, after
    which Postfix may fail a lookup. connect(2) to AF_UNSPEC "dissolves the association": TCP sends a reset. Python's
    ``socket`` cannot say that, so libc does.
    """
    if sock.family != socket.AF_UNIX:
        import ctypes  # for the rare case only: it is large

        unspecified = struct.pack("=H14x", socket.AF_UNSPEC)
        ctypes.CDLL(None).connect(sock.fileno(), unspecified, len(unspecified))
    with contextlib.suppress(OSError):  # after a reset it is not connected, which is what we want
        sock.shutdown(socket.SHUT_RDWR)
