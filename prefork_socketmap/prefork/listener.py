"""Endpoints, and the listening sockets that are bound to them.

An endpoint is written as in Postfix's socketmap_table(5): ``inet:host:port`` or ``unix:/path``. A listener is one
bound socket; a host name with several addresses gives several. Only the process that bound a Unix socket removes
its file, and only while the file is still the one it made.

The directory of a Unix socket may be somebody else's, who can exchange what lies at its path at any moment. So mode
and owner of the file are never changed by its path, but by a descriptor of what was compared with what was made.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, Self

from prefork_socketmap import settings
from prefork_socketmap.settings import SettingError, wrong

DEFAULT_HOST = "127.0.0.1"
# Postfix connects as user "postfix", whatever user we run as. Who may reach the socket is the directory's business.
DEFAULT_MODE = 0o666

_RESET_ON_CLOSE = struct.pack("@ii", 1, 0)
_SYNTAX = '"inet:host:port", "inet:[ipv6]:port" or "unix:/path"'
_SOMAXCONN = Path("/proc/sys/net/core/somaxconn")
_SIOCUNIXFILE = 0x89E0  # linux/un.h: a descriptor (O_PATH) of the file that a Unix socket is bound to
_O_PATH: int = getattr(os, "O_PATH", 0o10000000)  # fcntl.h; PyPy does not know it
_HIGHEST_PORT = _LONGEST_BACKLOG = 65535
_ALL_MODES = 0o777
_CLOSED = 0  # the mode of a file that is not ready for anybody

log = logging.getLogger("prefork_socketmap.master")


class ListenError(OSError):
    """An endpoint cannot be bound; the text names it and says why."""

    def __str__(self) -> str:
        return str(self.strerror)


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, or a client connects.

    ``kind`` is ``"inet"`` (``host`` and ``port``; port 0 lets the kernel choose one) or ``"unix"`` (``path``).
    For a listener on a Unix socket: ``mode`` (default 0666), ``owner`` and ``group`` (a name or a number; empty:
    unchanged). ``backlog`` is the length of the accept queue (None: the server's). ``source`` is where in a
    configuration it stands: errors begin with it. Raises SettingError.
    """

    kind: str
    host: str = ""
    port: int = 0
    path: str = ""
    mode: int | None = field(default=None, compare=False)
    owner: str = field(default="", compare=False)
    group: str = field(default="", compare=False)
    backlog: int | None = field(default=None, compare=False)
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        settings.choice("kind", self.kind, ("inet", "unix"))
        name = "path" if self.kind == "unix" else "host"
        if "\0" in settings.text(name, getattr(self, name)):
            raise wrong(name, getattr(self, name), "a text without a NUL")
        settings.count("port", self.port, 0, _HIGHEST_PORT)
        if self.mode is not None:
            settings.count("mode", self.mode, 0, _ALL_MODES)
        for name in ("owner", "group"):
            if getattr(self, name) != "":
                settings.text(name, getattr(self, name))
        if self.backlog is not None:
            settings.count("backlog", self.backlog, 1, _LONGEST_BACKLOG)

    @classmethod
    def parse(cls, text: str, default_port: int = 27823) -> Endpoint:
        """Read ``inet:host:port``, ``inet:host``, ``inet:[ipv6]:port`` or ``unix:/path``. Raises SettingError."""
        kind, colon, rest = _checked(text).partition(":")
        if kind == "unix" and rest:
            return cls("unix", path=rest)
        if kind != "inet" or not colon:
            raise wrong("", text, _SYNTAX)
        return cls.parse_inet(rest, default_port)

    @classmethod
    def parse_inet(cls, text: str, default_port: int = 27823) -> Endpoint:
        """Read ``host:port``, ``host``, ``:port``, ``[ipv6]:port`` or an empty string. Raises SettingError."""
        if _checked(text).startswith("["):
            host, bracket, port = text[1:].partition("]")
            if not bracket or (port and not port.startswith(":")):
                raise wrong("", text, _SYNTAX)
            port = port[1:]
        else:
            host, _, port = text.partition(":")
        if port and not (port.isascii() and port.isdigit() and int(port) <= _HIGHEST_PORT):
            raise wrong(
                "", text, f"a port from 0 to {_HIGHEST_PORT} in {_SYNTAX}; an IPv6 address stands in brackets"
            )
        return cls("inet", host or DEFAULT_HOST, int(port) if port else default_port)

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"inet:{host}:{self.port}"


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise wrong("", text, _SYNTAX)
    return text


@dataclass(frozen=True)
class ListenerState:
    """What the next program needs of a listener: its descriptor, the endpoint that was asked for, who made it.

    ``file`` is the identity of the file of a Unix socket that we made.
    """

    fd: int
    wanted: str
    created: bool
    file: Sequence[int] | None = None


class Listener:
    """A bound, listening, non-blocking socket.

    ``endpoint`` is its real address, ``wanted`` the one that was asked for: they differ in a port that the kernel
    chose.
    """

    def __init__(
        self,
        sock: socket.socket,
        wanted: Endpoint | None = None,
        *,
        created: bool = False,
        file: tuple[int, int] | None = None,
    ) -> None:
        """Take over *sock*, which is bound.

        *created*: by us, so it ends with us. *file* is the identity of its file, if that is ours.
        """
        sock.setblocking(False)
        _set_options(sock)
        self.sock = sock
        self._created = created
        self.endpoint = _endpoint_of(sock)
        self.wanted = wanted or self.endpoint
        # The socket keeps the file's inode, so nothing else has its number, for as long as we have the socket.
        self._file = file

    def state(self) -> ListenerState:
        """Return what another program needs to go on with this listener."""
        return ListenerState(self.sock.fileno(), str(self.wanted), self._created, self._file)

    @classmethod
    def resume(cls, state: ListenerState) -> Self:
        """Go on with a listener of the program that was here before."""
        file = (state.file[0], state.file[1]) if state.file else None
        return cls(socket.socket(fileno=state.fd), Endpoint.parse(state.wanted), created=state.created, file=file)

    def set_up(self, endpoint: Endpoint, backlog: int) -> None:
        """Apply what may change while the socket stays: the accept queue's length; mode, owner, group.

        Raises OSError when the file is not the one that we made any more: it stays as it is.
        """
        if self._file:
            with _opened(self.endpoint.path, self._file) as file:
                _set_permissions(file, endpoint)
        length = endpoint.backlog or backlog
        self.sock.listen(length)
        _warn_when_cut(length)

    def is_of(self, sock: socket.socket) -> bool:
        """Whether it listens on the socket that *sock* is a descriptor of."""
        return os.path.samestat(os.fstat(self.sock.fileno()), os.fstat(sock.fileno()))

    def is_in_place(self) -> bool:
        """Whether clients still find it: somebody may have removed the file of a Unix socket."""
        if self._file and _identity(self.endpoint.path) != self._file:
            self._file = None  # what is there, or will be, is not ours, even if it gets the same inode
            return False
        return self._file is not None or not self._created or self.endpoint.kind != "unix"

    def shut_down(self) -> None:
        """Stop listening in all processes, unless somebody handed the socket to us."""
        if self._created:
            # A busy worker's duplicate would keep clients waiting in the accept queue.
            with contextlib.suppress(OSError):  # it is closed already
                self.sock.shutdown(socket.SHUT_RDWR)

    def close(self, *, unlink: bool = False) -> None:
        """Stop listening; with *unlink*, remove the file of a Unix socket that we made and that is still ours."""
        self.shut_down()
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


def take_in(sock: socket.socket, backlog: int) -> Listener:
    """Listen on a duplicate of *sock*, which is somebody else's, and bound. Raises ListenError."""
    try:
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.listen(backlog)
        return Listener(sock.dup())
    except OSError as error:
        _refuse(_endpoint_of(sock), error)


def rehearse(endpoint: Endpoint) -> None:
    """Try all that ``open_listener`` would do, and leave nothing behind: no client can connect meanwhile.

    Raises ListenError.
    """
    try:
        if endpoint.kind == "unix":
            _rehearse_unix(endpoint)
        else:
            _bind_inet(endpoint).close()
    except (OSError, SettingError) as error:
        _refuse(endpoint, error)


def _rehearse_unix(endpoint: Endpoint) -> None:
    """Make a socket's file beside the place where it should be, and give it its owner."""
    _require_free(endpoint.path)
    path = Path(endpoint.path)
    # By a descriptor: what is put in front of a name of almost any length may be longer than any that is allowed.
    directory = os.open(path.parent, _O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f".check.{os.getpid()}"
    beside = f"/proc/self/fd/{directory}/{name}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            os.fchmod(sock.fileno(), _CLOSED)
            sock.bind(beside)
            try:
                with _opened(beside, _identity_of_bound(sock, beside)) as file:
                    _set_permissions(file, endpoint)
            finally:
                os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)


def _open_inet(endpoint: Endpoint, backlog: int) -> Listener:
    sock = _bind_inet(endpoint)
    try:
        listener = Listener(sock, endpoint, created=True)
        listener.set_up(endpoint, backlog)
    except OSError:
        sock.close()
        raise
    return listener


def _bind_inet(endpoint: Endpoint) -> socket.socket:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # "[::]" and "0.0.0.0" can stand side by side; what listens is what is written.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((endpoint.host, endpoint.port))
    except OSError:
        sock.close()
        raise
    return sock


def _open_unix(endpoint: Endpoint, backlog: int) -> Listener:
    _clear_the_way(endpoint.path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # bind(2) gives the file the socket's mode, less the umask: until it has its owner, it is closed to all.
        os.fchmod(sock.fileno(), _CLOSED)
        sock.bind(endpoint.path)
        file = _identity_of_bound(sock, endpoint.path)
    except OSError:
        sock.close()
        raise
    listener = Listener(sock, endpoint, created=True, file=file)
    try:
        # Before listen() nobody can connect, so the file is never open to more users than it should be.
        listener.set_up(endpoint, backlog)
    except (OSError, SettingError):
        listener.close(unlink=True)
        raise
    return listener


def _set_options(sock: socket.socket) -> None:
    """Set the options that all connections of a listener inherit from it, on Linux."""
    if sock.family != socket.AF_UNIX:
        # Whatever ends a connection, a crash included, reaches Postfix as a reset: the one kind of close of a TCP
        # connection that it always retries. An orderly close can make it defer mail (a stale errno).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _clear_the_way(path: str) -> None:
    """Remove a socket file that nobody listens on. Raises OSError for one that is in use, and for any other file."""
    if _require_free(path):
        Path(path).unlink()


def _require_free(path: str) -> bool:
    """Return whether there is a socket file that nobody listens on. Raises OSError for any other file."""
    try:
        mode = Path(path).lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "the file exists and is not a socket; remove it or choose another path")
    if _somebody_listens(path):
        raise OSError(errno.EADDRINUSE, "another process listens on it")
    return True


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


def _identity_of_bound(sock: socket.socket, path: str) -> tuple[int, int]:
    """Return the identity of the file that *sock* was bound to just now. Raises OSError if it has been exchanged."""
    try:
        file = fcntl.ioctl(sock, _SIOCUNIXFILE)
    except OSError:  # it needs CAP_NET_ADMIN
        file = os.open(path, _O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
    finally:
        os.close(file)
    # Nobody else can make such a file: another user's has another owner, and none of ours is closed to ourselves.
    if not stat.S_ISSOCK(found.st_mode) or stat.S_IMODE(found.st_mode) != _CLOSED or found.st_uid != os.geteuid():
        raise _exchanged()
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _opened(path: str, identity: tuple[int, int]) -> Iterator[int]:
    """Open (O_PATH) the file at *path*, without following a link. Raises OSError if it has not that *identity*."""
    file = os.open(path, _O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
        if (found.st_dev, found.st_ino) != identity:
            raise _exchanged()
        yield file
    finally:
        os.close(file)


def _exchanged() -> OSError:
    return FileExistsError(errno.EEXIST, "somebody has put another file in the place of the socket")


def _set_permissions(file: int, endpoint: Endpoint) -> None:
    """Give *file* (O_PATH) its owner, and then its mode: in between it is open to nobody new."""
    path = f"/proc/self/fd/{file}"  # fchown(2) and fchmod(2) refuse such a descriptor; this leads nowhere else
    uid, gid = _user_id(endpoint.owner), _group_id(endpoint.group)
    if (uid, gid) != (-1, -1):
        os.chown(path, uid, gid)
    Path(path).chmod(DEFAULT_MODE if endpoint.mode is None else endpoint.mode)


def _user_id(name: str) -> int:
    if not name or name.isdigit():
        return int(name or -1)
    import pwd  # here, since clients use this file where there is none

    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise SettingError("owner", f"no such user: {name!r}") from None


def _group_id(name: str) -> int:
    if not name or name.isdigit():
        return int(name or -1)
    import grp

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
        # A name that is no path (unix(7), "abstract") begins with a NUL, and is written with this.
        return Endpoint("unix", path=address if isinstance(address, str) else "@" + os.fsdecode(address[1:]))
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
    begin = f"{endpoint.source}: " if endpoint.source else ""
    reason = getattr(error, "strerror", None) or str(error)
    raise ListenError(getattr(error, "errno", None), f"{begin}cannot listen on {endpoint}: {reason}") from error
