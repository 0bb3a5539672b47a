"""The policy of a domain, from its policy host over HTTPS: RFC 8461, 3.3.

The host is a stranger's. It gets one request, a bounded time, and room for a policy; its certificate has to be valid
for its name; a redirection, another status or another type is no policy.

For one request, without a redirection or a connection that is kept, Python's own ``http.client`` is enough.
"""

from __future__ import annotations

import http
import http.client
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any

from prefork_socketmap.maps import httpanswer, mtasts
from prefork_socketmap.maps.mtasts import Policy, PolicyError
from prefork_socketmap.maps.tls import verifying_context
from prefork_socketmap.maps.uncut import UncutSocket, refuse_cuts

PORT = 443
LARGEST_POLICY = 65536
"""Bytes; 3.3 suggests it."""
_LARGEST_ANSWER = 2 * LARGEST_POLICY  # with the headers
_PATH = "/.well-known/mta-sts.txt"
_LEAST_SHARE = 0.1


class FetchError(Exception):
    """There is no policy to be had; the text says why, without what a stranger wrote."""


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Return the context for ``fetch``; *ca_file* is in place of the system's authorities. Raises OSError."""
    context = verifying_context(ca_file)
    context.hostname_checks_common_name = False  # RFC 8461, 3.3: a DNS-ID of subjectAltName
    refuse_cuts(context, _BoundedSocket)
    return context


def fetch(host: str, addresses: Sequence[str], context: ssl.SSLContext, deadline: float) -> Policy:
    """Get the policy from *host* at one of *addresses*, until *deadline* of ``time.monotonic``.

    Raises FetchError, or PolicyError when what comes is no policy.
    """
    problem = "it has no address"
    for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        share = max((deadline - time.monotonic()) / left, _LEAST_SHARE)
        connection = _Connection(address, host, context, share)
        try:
            connection.connect()
        except OSError as error:
            problem = _connect_problem(error)
        else:
            return _get(connection, host, deadline)
        finally:
            connection.close()
    raise FetchError(f"https://{host}{_PATH}: {problem}")


def _connect_problem(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    if isinstance(error, ssl.SSLError):
        return "it does not speak TLS with us"
    return f"it cannot be reached: {error.strerror or 'the connection is closed'}"


def _get(connection: _Connection, host: str, deadline: float) -> Policy:
    where = f"https://{host}{_PATH}"
    sock: Any = connection.sock
    sock.bound(deadline, _LARGEST_ANSWER)
    try:
        connection.request("GET", _PATH, headers={"Host": host, "Accept": "text/plain"})
        response = connection.getresponse()
        _require(where, response)
        body = _body(where, response)
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"{where}: the answer does not come, not in time, or is too large") from error
    try:
        return mtasts.policy(body)
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None


def _require(where: str, response: http.client.HTTPResponse) -> None:
    if response.status != http.HTTPStatus.OK:
        raise FetchError(f"{where}: HTTP status {response.status}")
    kind = httpanswer.media_type(response.headers.get("Content-Type"))
    if kind.name != "text/plain":
        raise FetchError(f"{where}: the content type is not text/plain")
    if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise FetchError(f"{where}: the answer is compressed, which it was not asked for")


def _body(where: str, response: http.client.HTTPResponse) -> bytes:
    body = response.read()  # all of it: only then is half an answer told from a whole one
    if len(body) > LARGEST_POLICY:
        raise FetchError(f"{where}: the policy has more than {LARGEST_POLICY} bytes")
    return body


class _Connection(http.client.HTTPConnection):
    """A connection to *address* for one request to *host*; *share*: the seconds in which it has to be there."""

    def __init__(self, address: str, host: str, context: ssl.SSLContext, share: float) -> None:
        super().__init__(address, PORT, timeout=share)
        self._host = host
        self._context = context
        self._share = share

    def connect(self) -> None:
        """Connect, and shake hands."""
        end = time.monotonic() + self._share
        super().connect()
        sock: socket.socket = self.sock
        sock.settimeout(max(end - time.monotonic(), _LEAST_SHARE))
        self.sock = self._context.wrap_socket(sock, server_hostname=self._host)


class _BoundedSocket(UncutSocket):
    """Receives until a moment, and so much: http.client has a limit for each line, but who sends slowly has time."""

    _deadline = float("inf")
    _room = float("inf")

    def bound(self, deadline: float, room: int) -> None:
        """Receive until *deadline* of ``time.monotonic``, *room* bytes in all."""
        self._deadline = deadline
        self._room = room

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Receive, or raise TimeoutError when it is too late, OSError when it is too much."""
        if self._deadline != float("inf"):
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self.settimeout(left)
        count = super().recv_into(buffer, nbytes, flags)
        self._room -= count
        if self._room < 0:
            raise OSError("too large")
        return count
