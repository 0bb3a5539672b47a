"""A socketmap client that behaves as Postfix does: the same limits, the same single retry.

For programs and monitoring that want a server's answer as Postfix would get it. What Postfix does is noted from its
source (dict_sockmap.c, auto_clnt.c) and was measured with Postfix 3.7; where its behaviour is a weakness (it takes
stray bytes for the next answer, and asks on over a connection that it can no longer read) this client is stricter.
"""

from __future__ import annotations

import select
import socket
from types import TracebackType

from prefork_socketmap import settings
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.socketmap import netstring
from prefork_socketmap.socketmap.messages import Reply, Request, Status

# dict_sockmap.c: DICT_SOCKMAP_DEF_TIMEOUT and DICT_SOCKMAP_DEF_MAX_REPLY.
TIMEOUT = 100.0
MAX_REPLY_SIZE = 100_000

_READ_SIZE = 65536


class LookupFailed(Exception):  # noqa: N818 - named, as its kinds are, after the protocol's words
    """There is no answer: neither "found" nor "not found". The text is the reason."""


class TempFail(LookupFailed):
    """The server answered TEMP, cannot be reached, hung up twice, or does not keep to the protocol."""


class PermFail(LookupFailed):
    """The server answered PERM."""


class LookupTimeout(LookupFailed):
    """The server answered TIMEOUT, or one wait for it took longer than the client's timeout."""


def value_of(reply: Reply) -> str | None:
    """Return the value in *reply*; None is "not found". Raises TempFail, PermFail or LookupTimeout."""
    match reply.status:
        case Status.OK:
            return reply.text
        case Status.NOT_FOUND:
            return None
        case Status.TEMP:
            raise TempFail(reply.text)
        case Status.PERM:
            raise PermFail(reply.text)
        case Status.TIMEOUT:
            raise LookupTimeout(reply.text)


class SocketmapClient:
    """Asks one socketmap server, over one connection that is opened at the first lookup and then kept.

    *endpoint*: an ``Endpoint``, or its text as it stands after ``socketmap:`` in main.cf: ``"inet:host:port"`` or
    ``"unix:/path"``. *timeout*: the seconds that each wait may take, to connect, to write and to read, but not all of
    them together; 0 means no limit. *max_reply_size*: the longest reply payload that is accepted, in bytes, the
    status included. A wrong value raises ``settings.SettingError``, a ValueError.

    A client belongs to one thread. It is a context manager that closes the connection; after ``close()`` a lookup
    opens a new one.
    """

    def __init__(
        self, endpoint: Endpoint | str, *, timeout: float | str = TIMEOUT, max_reply_size: int = MAX_REPLY_SIZE
    ) -> None:
        if not isinstance(endpoint, str | Endpoint):
            raise TypeError(
                f"endpoint: {settings.shown(endpoint)} is not accepted here; expected an Endpoint or its text"
            )
        self._endpoint = Endpoint.parse(endpoint) if isinstance(endpoint, str) else endpoint
        # A socket's timeout of 0 would mean "never wait".
        self._timeout = settings.seconds("timeout", timeout) or None
        self._max_reply_size = settings.count("max_reply_size", max_reply_size, 1)
        self._sock: socket.socket | None = None

    def __repr__(self) -> str:
        return f"<SocketmapClient: {self._endpoint}, {'connected' if self._sock else 'not connected'}>"

    @property
    def endpoint(self) -> Endpoint:
        """Where the server is that it asks."""
        return self._endpoint

    def lookup(self, name: str, key: str) -> str | None:
        """Return the value of *key* in the map *name*, or None when it is not found.

        Bytes that are not UTF-8 stand as lone surrogates, in keys and in values (PEP 383). Raises TempFail, PermFail
        or LookupTimeout, which are all LookupFailed; a ValueError for a map name with a space, which no request can
        carry.
        """
        return value_of(self._ask(netstring.encode(Request(name, key).encode())))

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._sock:
            self._sock.close()
            self._sock = None

    def __enter__(self) -> SocketmapClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: bytes) -> Reply:
        """Return the answer to *request*; a server that hangs up is asked once more, over a new connection."""
        try:
            return self._ask_once(request)
        except ConnectionError:
            pass
        try:
            return self._ask_once(request)
        except ConnectionError as error:
            raise self._failed("the server hung up twice before its reply") from error

    def _ask_once(self, request: bytes) -> Reply:
        """Return the answer to *request*. Raises ConnectionError when the server hung up before it was complete."""
        sock = self._sock or self._connect()
        # Whatever goes wrong, the connection is gone: a late reply must not answer the next request.
        self._sock = None
        try:
            reply = self._exchange(sock, request)
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        return reply

    def _exchange(self, sock: socket.socket, request: bytes) -> Reply:
        try:
            self._expect_silence(sock)
            sock.sendall(request)
            return self._receive(sock)
        except TimeoutError as error:
            raise LookupTimeout(f"{self._endpoint}: no reply within {self._timeout} s") from error
        except ValueError as error:
            raise self._failed(f"protocol error: {error}") from error
        except ConnectionError:
            raise
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from error

    def _connect(self) -> socket.socket:
        """Open a connection. One that is refused is not tried again, as in Postfix."""
        try:
            return _open(self._endpoint, self._timeout)
        except TimeoutError as error:
            raise LookupTimeout(f"{self._endpoint}: no connection within {self._timeout} s") from error
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from error

    def _expect_silence(self, sock: socket.socket) -> None:
        """Check that nothing came from the server, which must not speak first: it would answer the next request."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if poll.poll(0):
            if sock.recv(1):
                raise netstring.FramingError("bytes that answer no request")
            raise ConnectionResetError

    def _receive(self, sock: socket.socket) -> Reply:
        decoder = netstring.Decoder(self._max_reply_size)
        while (payload := decoder.next()) is None:
            received = sock.recv(_READ_SIZE)
            if not received:
                raise ConnectionResetError
            decoder.feed(received)
        if decoder.pending:
            raise netstring.FramingError("bytes after the reply")
        return Reply.decode(payload)

    def _failed(self, reason: str) -> TempFail:
        return TempFail(f"{self._endpoint}: {reason}")


def _open(endpoint: Endpoint, timeout: float | None) -> socket.socket:
    if endpoint.kind == "inet":
        return socket.create_connection((endpoint.host, endpoint.port), timeout)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(endpoint.path)
    except BaseException:
        sock.close()
        raise
    return sock
