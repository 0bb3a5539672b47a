"""The type ``http``: an HTTP or HTTPS API that is asked with GET.

The driver is urllib3 rather than httpx, which is several times slower and has had no release since 2024. Of it the
connection class: a worker has one connection, and neither a pool nor redirections are wanted.
"""

from __future__ import annotations

import http
import http.client
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from prefork_socketmap import settings
from prefork_socketmap.maps import host as host_setting
from prefork_socketmap.maps import httpanswer
from prefork_socketmap.maps.base import LookupFailedError, log
from prefork_socketmap.maps.host import Host
from prefork_socketmap.maps.httpanswer import AnswerError
from prefork_socketmap.maps.network import NetworkMap, Trouble
from prefork_socketmap.maps.secret import Secret, secret
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.template import Address, Template
from prefork_socketmap.maps.tls import TlsSettings
from prefork_socketmap.maps.uncut import refuse_cuts
from prefork_socketmap.socketmap.messages import Reply

if not hasattr(urllib3, "BaseHTTPResponse"):
    # Version 1, which Debian 12 has, takes half an answer for a whole one, and keeps no connection.
    raise ImportError("urllib3 2.2 or newer; an older one is installed")

# More than Postfix takes from a table (100000 bytes), so that the reply's own limit speaks first.
_MAX_BODY = 1_000_000
_CHUNK = 65536
# What else in the 400s may be better at the next attempt: RFC 9110, 15.5.9; RFC 8470; RFC 6585.
_NOT_NOW = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_EARLY, http.HTTPStatus.TOO_MANY_REQUESTS)
_MEDIA_TYPE = re.compile(r"\*/\*|[!#$%&'+.^_`|~0-9a-z-]+/(?:\*|[!#$%&'+.^_`|~0-9a-z-]+)")
# RFC 9110, sections 5.1 and 5.5; what is no ASCII has no agreed meaning in a header.
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[!-~](?:[ \t!-~]*[!-~])?")
_ENCODED = re.compile(r"(?<!%)(?:%%)*%[1-9][0-9A-Fa-f]")
# What stands in a query with no part of the key in it: an API's key, perhaps.
_FIXED_VALUE = re.compile(r"=(?:[^&%]|%%)+(?=&|$)")
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def _quoted(part: str) -> str:
    return quote(part, safe="")


class Url(Template):
    """A URL with parts of the key in its path and query. A percent sign of its own is written twice: ``%%20``."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        try:
            parts = urlsplit(text)
        except ValueError:  # whose text has the host in it, and what stands before the host
            raise ValueError("is no URL") from None
        self.scheme = parts.scheme
        self.host = parts.netloc
        if self.scheme not in ("http", "https") or not self.host:
            raise ValueError(
                f"{settings.shown(text)} is no URL; expected one that begins with http:// or https:// and a host"
            )
        if "%" in self.host or "@" in self.host:
            raise ValueError("the host can have no part of the key and no password in it; see headers and token")
        if _ENCODED.search(text):
            raise ValueError("has a part such as %2 before another digit; write %%20 to get %20")
        target = text.removeprefix(f"{self.scheme}://{self.host}").partition("#")[0] or "/"
        self._target = Template(target)
        path, mark, query = target.partition("?")
        self._shown = Template(path + mark + _FIXED_VALUE.sub("=...", query))

    def shown(self, key: Address) -> str:
        """Return path and query for *key* for a log: without what may be a secret."""
        return self._shown.expand(key, _quoted)

    def target(self, key: Address) -> str | None:
        """Return path and query for *key*; None if a segment ``..`` in the path would lead elsewhere.

        Quoting does not help: many servers decode a path before they resolve it.
        """
        target = self._target.expand(key, _quoted)
        path = unquote(target.partition("?")[0])
        return None if {".", ".."} & set(path.split("/")) else target


def _url(key: str, value: object) -> Url:
    text = settings.text(key, value)
    try:
        return Url(text)
    except ValueError as error:
        raise settings.SettingError(key, str(error)) from error


def _hosts(key: str, value: object) -> tuple[str, ...]:
    return host_setting.hosts(key, value, host_setting.network_host)


def _headers(key: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise settings.SettingError(key, "expected a table")
    for name in value:
        if not _HEADER_NAME.fullmatch(name):
            raise settings.SettingError(f"{key}.{name}", "is no name of a header")
    return {name: _header(f"{key}.{name}", text) for name, text in value.items()}


def _header(key: str, value: object) -> str:
    text = secret(key, value)
    if not _HEADER_VALUE.fullmatch(text):
        raise settings.SettingError(key, "has a character that no header may have")
    return text


def _media_types(key: str, value: object) -> tuple[str, ...]:
    types = tuple(each.lower() for each in settings.texts(key, value))
    for each in types:
        if not _MEDIA_TYPE.fullmatch(each):
            raise settings.wrong(key, each, 'media types such as "text/plain", "text/*" or "*/*"')
    if not types:
        raise settings.wrong(key, value, "a list of at least one media type")
    return types


def _statuses(key: str, value: object) -> frozenset[int]:
    if not isinstance(value, list):
        raise settings.wrong(key, value, "a list of HTTP statuses such as 404")
    return frozenset(settings.count(key, each, minimum=201, maximum=599) for each in value)


class HttpMap(TlsSettings, NetworkMap[HTTPConnection]):
    """Answers with what the body has, if the status is 200 and the content type one that is expected.

    404 is "not found" when the answer says that it speaks of the key: a server that has lost a route says 404 to
    everything. Another 4xx, or a redirection, is a permanent failure, since asking again would not help; everything
    else a temporary one.
    """

    url = setting(_url)
    """What to get. Parts of the key are quoted as RFC 3986 says."""
    hosts = setting(_hosts, ())
    """Hosts to ask instead of the URL's."""
    headers = setting(_headers, _NO_HEADERS)
    """A table of headers to send."""
    content_type = setting(_media_types, ("text/plain", "application/json"))
    """Media types, or ranges of them, of an answer. What else comes with status 200 is no answer."""
    result = setting(httpanswer.path, None)
    """Where in a JSON document the result stands; by default it is the document."""
    not_found_status = setting(_statuses, frozenset[int]())
    """Statuses that mean "not found", whatever else the answer says."""
    token = setting(secret, "")
    """A bearer token (RFC 6750)."""
    token_file = setting(secret, "")
    token_env = setting(secret, "")

    errors = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)
    account = ("scheme", "token", "token_file", "token_env")
    of_the_query = ("url", "headers", "content_type", "result", "not_found_status", *account[1:])

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        self.hosts = self.hosts or _hosts(f"maps.{name}.url", [self.url.host])
        self.scheme = self.url.scheme
        self._token = Secret(self, "token")
        named = {header.lower() for header in self.headers}
        accept = {} if "accept" in named else {"Accept": ", ".join(self.content_type)}
        self._headers = {**accept, **self.headers}
        if self.uses_tls and self.url.scheme != "https":
            raise settings.SettingError(
                f"maps.{name}.url", "does not begin with https://, but there are TLS settings"
            )
        self._tls = self.tls_context() if self.url.scheme == "https" else None
        if self._tls:
            refuse_cuts(self._tls)

    def dial(self, host: str, timeout: float) -> HTTPConnection:
        """Connect to *host*."""
        connection: HTTPConnection
        if self._tls:
            address = Host.parse(host, HTTPSConnection.default_port)
            connection = HTTPSConnection(address.name, address.port, timeout=timeout, ssl_context=self._tls)
        else:
            address = Host.parse(host, HTTPConnection.default_port)
            connection = HTTPConnection(address.name, address.port, timeout=timeout)
        connection.connect()
        return connection

    def ask(self, connection: HTTPConnection, key: str) -> Sequence[str] | None:
        """Get the URL for *key*."""
        address = Address.split(key)
        target = self.url.target(address)
        if target is None:
            return None
        if log.isEnabledFor(logging.DEBUG):
            log.debug("map %s: GET %s", self.name, self.url.shown(address))
        try:
            answer = self._get(connection, target)
        except TimeoutError as error:
            raise _NoAnswerError(str(error)) from error
        if self._is_not_found(answer):
            return None
        if answer.status != http.HTTPStatus.OK:
            raise self._failure(answer)
        kind = httpanswer.media_type(answer.headers.get("Content-Type"))
        if not kind.is_one_of(self.content_type):
            raise self._no_answer(f"the answer has the content type {kind.name[:40] or 'none'!r}")
        try:
            return httpanswer.values(answer.body, kind, self.result)
        except AnswerError as error:
            raise self._no_answer(str(error)) from error

    def blamed(self, error: Exception) -> str:
        """By default the host stands in the URL."""
        found = super().blamed(error)
        return "url" if found == "hosts" and self.hosts == (self.url.host,) else found

    def hang_up(self, connection: HTTPConnection) -> None:
        """Close the connection."""
        connection.close()

    def trouble(self, connection: HTTPConnection, error: Exception) -> Trouble:  # noqa: ARG002
        """Whatever is no answer is a broken connection, or none in time."""
        slow = isinstance(error, _NoAnswerError | urllib3.exceptions.TimeoutError)
        return Trouble.SLOW if slow else Trouble.LOST

    def _get(self, connection: HTTPConnection, target: str) -> _Answer:
        """Return the answer with its body, which is read also if the status is enough: the next one is behind it."""
        deadline = time.monotonic() + self.timeout
        connection.timeout = self.timeout
        connection.request("GET", target, headers=self._request_headers(), preload_content=False)
        response = connection.getresponse()
        body = bytearray()
        while chunk := response.read1(_CHUNK):
            body += chunk
            if len(body) > _MAX_BODY:
                connection.close()
                raise LookupFailedError(Reply.temp_fail(f"map {self.name}: the reply is too large"))
            if time.monotonic() > deadline:
                raise _NoAnswerError("the reply did not end in time")
        return _Answer(response.status, response.headers, bytes(body))

    def _request_headers(self) -> dict[str, str]:
        try:
            token = self._token.read()
        except OSError as error:
            raise self._no_answer(f"the token cannot be read: {error.strerror}") from error
        if not token:
            return self._headers
        if not _HEADER_VALUE.fullmatch(token):
            # http.client would refuse it, and show it.
            raise LookupFailedError(Reply.temp_fail(f"map {self.name}: the token is not printable ASCII"))
        return {**self._headers, "Authorization": f"Bearer {token}"}

    def _is_not_found(self, answer: _Answer) -> bool:
        if answer.status in self.not_found_status:
            return True
        return answer.status == http.HTTPStatus.NOT_FOUND and httpanswer.says_not_found(
            answer.body, answer.headers.get(httpanswer.HEADER)
        )

    def _failure(self, answer: _Answer) -> LookupFailedError:
        status = answer.status
        problem = f"the server answered with HTTP status {status}"
        if status == http.HTTPStatus.NOT_FOUND:
            return self._no_answer(f"{problem}, which does not say that it is the key that is not found")
        if not 300 <= status < 500 or status in _NOT_NOW:
            self.leave_alone(httpanswer.retry_after(answer.headers.get("Retry-After")))
            return self._no_answer(problem)
        self.complaints.log(logging.ERROR, "%s", problem)
        return LookupFailedError(Reply.perm_fail(f"map {self.name}: {problem}"))

    def _no_answer(self, problem: str) -> LookupFailedError:
        self.complaints.log(logging.ERROR, "%s", problem)
        return LookupFailedError(Reply.temp_fail(f"map {self.name}: {problem}"))


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class _NoAnswerError(urllib3.exceptions.HTTPError):
    """The server has not answered in time."""
