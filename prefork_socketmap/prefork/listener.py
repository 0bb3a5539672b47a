"""Endpoints, and the listening sockets that are bound to them.

An endpoint is written as in Postfix's socketmap_table(5): ``inet:host:port`` or ``unix:/path``. A listener is one
bound socket; a host name with several addresses gives several. Only the process that bound a Unix socket removes
its file, and only while the file is still the one it made.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import logging
import os
import pwd
import socket
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, Self

from prefork_socketmap.prefork.takeover import ListenerState
from prefork_socketmap.settings import SettingError, wrong

DEFAULT_HOST = "127.0.0.1"
# Postfix connects as user "postfix", whatever user we run as. Who may reach the socket is the directory's business.
DEFAULT_MODE = 0o666

_SYNTAX = '"inet:host:port", "inet:[ipv6]:port" or "unix:/path"'
_SOMAXCONN = Path("/proc/sys/net/core/somaxconn")

log = logging.getLogger("prefork_socketmap.master")


class ListenError(OSError):
    """An endpoint cannot be bound; the text names it and says why."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, or a client connects.

    ``kind`` is ``"inet"`` (``host`` and ``port``; port 0 lets the kernel choose one) or ``"unix"`` (``path``).
    For a listener on a Unix socket: ``mode`` (default 0666), ``owner`` and ``group`` (a name or a number; empty:
    unchanged). ``backlog`` is the length of the accept queue (None: the server's).
    """

    kind: str
    host: str = ""
    port: int = 0
    path: str = ""
    mode: int | None = field(default=None, compare=False)
    owner: str = field(default="", compare=False)
    group: str = field(default="", compare=False)
    backlog: int | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, text: str, default_port: int = 27823) -> Endpoint:
        """Read ``inet:host:port``, ``inet:host``, ``inet:[ipv6]:port`` or ``unix:/path``. Raises SettingError."""
        kind, colon, rest = text.partition(":")
        if kind == "unix" and rest:
            return cls("unix", path=rest)
        if kind != "inet" or not colon:
            raise wrong("", text, _SYNTAX)
        return cls.parse_inet(rest, default_port)

    @classmethod
    def parse_inet(cls, text: str, default_port: int = 27823) -> Endpoint:
        """Read ``host:port``, ``host``, ``:port``, ``[ipv6]:port`` or an empty string. Raises SettingError."""
        if text.startswith("["):
            host, bracket, port = text[1:].partition("]")
            if not bracket or (port and not port.startswith(":")):
                raise wrong("", text, _SYNTAX)
            port = port[1:]
        else:
            host, _, port = text.partition(":")
        if port and not (port.isascii() and port.isdigit() and int(port) <= 65535):
            raise wrong("", text, f"a port from 0 to 65535 in {_SYNTAX}; an IPv6 address stands in brackets")
        return cls("inet", host or DEFAULT_HOST, int(port) if port else default_port)

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"inet:{host}:{self.port}"


class Listener:
    """A bound, listening, non-blocking socket.

    ``endpoint`` is its real address, ``wanted`` the one that was asked for: they differ in a port that the kernel
    chose.
    """

    def __init__(self, sock: socket.socket, wanted: Endpoint | None = None, *, created: bool = False) -> None:
        """Take over *sock*, which is bound. *created*: by us, so it ends with us, and its file is ours to remove."""
        sock.setblocking(False)
        self.sock = sock
        self._created = created
        self.endpoint = _endpoint_of(sock)
        self.wanted = wanted or self.endpoint
        # The file we made, if any: what we may remove. A socket that somebody handed to us stays theirs.
        self._file = _identity(self.endpoint.path) if created and self.endpoint.kind == "unix" else None

    def state(self) -> ListenerState:
        """Return what another program needs to go on with this listener."""
        return ListenerState(self.sock.fileno(), str(self.wanted), self._created)

    @classmethod
    def resume(cls, state: ListenerState) -> Self:
        """Go on with a listener of the program that was here before."""
        return cls(socket.socket(fileno=state.fd), Endpoint.parse(state.wanted), created=state.created)

    def set_up(self, endpoint: Endpoint, backlog: int) -> None:
        """Apply what may change while the socket stays: the accept queue's length; mode, owner, group."""
        if self._file:
            _set_permissions(endpoint)
        length = endpoint.backlog or backlog
        self.sock.listen(length)
        _warn_when_cut(length)

    def close(self, *, unlink: bool = False) -> None:
        """Stop listening; with *unlink*, remove the file of a Unix socket that we made and that is still ours."""
        if self._created:
            # In all processes: a busy worker's duplicate would keep clients waiting in the accept queue.
            with contextlib.suppress(OSError):  # it is closed already
                self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        if unlink and self._file and _identity(self.endpoint.path) == self._file:
            Path(self.endpoint.path).unlink()
            self._file = None  # somebody may bind there next, and be given the same inode


def resolve(endpoint: Endpoint) -> list[Endpoint]:
    """Return one endpoint for each address of *endpoint*'s host. Raises ListenError for a host without any."""
    if endpoint.kind == "unix":
        return [endpoint]
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        _refuse(endpoint, error)
    return [replace(endpoint, host=host) for host in dict.fromkeys(str(address[0]) for *_, address in found)]


def open_listener(endpoint: Endpoint, backlog: int) -> Listener:
    """Bind *endpoint*, whose host is an IP address, and listen. Raises ListenError; then nothing is left behind."""
    try:
        return _open_unix(endpoint, backlog) if endpoint.kind == "unix" else _open_inet(endpoint, backlog)
    except (OSError, SettingError) as error:
        _refuse(endpoint, error)


def _open_inet(endpoint: Endpoint, backlog: int) -> Listener:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # "[::]" and "0.0.0.0" can stand side by side; what listens is what is written.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((endpoint.host, endpoint.port))
        listener = Listener(sock, endpoint, created=True)
        listener.set_up(endpoint, backlog)
    except OSError:
        sock.close()
        raise
    return listener


def _open_unix(endpoint: Endpoint, backlog: int) -> Listener:
    _clear_the_way(endpoint.path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(endpoint.path)
    except OSError:
        sock.close()
        raise
    listener = Listener(sock, endpoint, created=True)
    try:
        # Before listen() nobody can connect, so the file is never open to more users than it should be.
        listener.set_up(endpoint, backlog)
    except (OSError, SettingError):
        listener.close(unlink=True)
        raise
    return listener


def _clear_the_way(path: str) -> None:
    """Remove a socket file that nobody listens on. Raises OSError for one that is in use, and for any other file."""
    try:
        mode = Path(path).lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "the file exists and is not a socket; remove it or choose another path")
    if _somebody_listens(path):
        raise OSError(errno.EADDRINUSE, "another process listens on it")
    Path(path).unlink()


def _somebody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True  # its accept queue is full
    return True


def _set_permissions(endpoint: Endpoint) -> None:
    uid, gid = _user_id(endpoint.owner), _group_id(endpoint.group)
    if (uid, gid) != (-1, -1):
        os.chown(endpoint.path, uid, gid)
    Path(endpoint.path).chmod(DEFAULT_MODE if endpoint.mode is None else endpoint.mode)


def _user_id(name: str) -> int:
    if not name or name.isdigit():
        return int(name or -1)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise SettingError("owner", f"no such user: {name!r}") from None


def _group_id(name: str) -> int:
    if not name or name.isdigit():
        return int(name or -1)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise SettingError("group", f"no such group: {name!r}") from None


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _endpoint_of(sock: socket.socket) -> Endpoint:
    address = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Endpoint("unix", path=address)
    return Endpoint("inet", host=address[0], port=address[1])


def _warn_when_cut(backlog: int) -> None:
    try:
        limit = int(_SOMAXCONN.read_text())
    except (OSError, ValueError):
        return  # not Linux: nothing to compare with
    if limit < backlog:
        # A full queue on a Unix socket fails Postfix at once, so the operator should know.
        log.warning("the kernel cuts the accept queue from %d to %d; raise net.core.somaxconn", backlog, limit)


def _refuse(endpoint: Endpoint, error: Exception) -> NoReturn:
    reason = getattr(error, "strerror", None) or str(error)
    raise ListenError(getattr(error, "errno", None), f"cannot listen on {endpoint}: {reason}") from error
