"""sd_listen_fds(3): listening sockets that the service manager opened and handed to us."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

_FIRST = 3


def inherited_sockets(environment: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """Take over the sockets that *environment* announces to this process, and remove the announcement.

    Removed, so that no child takes them for its own. What is announced to another process is none of ours.
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    sockets = [socket.socket(fileno=descriptor) for descriptor in range(_FIRST, _FIRST + int(count))]
    for sock in sockets:
        sock.set_inheritable(False)
    return sockets
