"""The type ``ldap``: an LDAP directory, in the terms of ldap_table(5).

The driver is python-ldap, which wraps OpenLDAP's library, the one that Postfix uses: the same URLs, TLS and limits.
ldap3, the other choice, has had no release since 2021. Versions before 3.4.5 escape some keys wrongly
(CVE-2025-61911, CVE-2025-61912).
"""

# python-ldap has no type hints.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import contextlib
import enum
import re
import signal
import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import ldap
import ldap.sasl
import ldapurl
from ldap.dn import escape_dn_chars
from ldap.filter import escape_filter_chars
from ldap.ldapobject import SimpleLDAPObject

from prefork_socketmap import settings
from prefork_socketmap.maps import host as host_setting
from prefork_socketmap.maps import template
from prefork_socketmap.maps.base import LookupFailedError, log
from prefork_socketmap.maps.host import Host
from prefork_socketmap.maps.network import NetworkMap, Trouble, UnreachableError
from prefork_socketmap.maps.secret import Secret, secret
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.template import Address, Template
from prefork_socketmap.socketmap.messages import Reply, to_text

_PORT = 389
_TLS_PORT = 636
# RFC 4511, 4.14.1, in BER: message 1, an extended request.
_START_TLS = b"\x30\x1d\x02\x01\x01\x77\x18\x80\x16" + b"1.3.6.1.4.1.1466.20037"
_SERVER = re.compile(r"ldap[si]?://[^/?@\s]*/?", re.IGNORECASE)
_SCOPES = {"sub": ldap.SCOPE_SUBTREE, "one": ldap.SCOPE_ONELEVEL, "base": ldap.SCOPE_BASE}
_DEREFERENCE = (ldap.DEREF_NEVER, ldap.DEREF_SEARCHING, ldap.DEREF_FINDING, ldap.DEREF_ALWAYS)
_SAMPLE = Address.split("u@1.2.3.4.5.6.7.8.9")  # a key with all parts
_LOST = (ldap.SERVER_DOWN, ldap.CONNECT_ERROR, ldap.UNAVAILABLE, OSError)


def _host(key: str, value: str) -> None:
    """Check a host, or a URL of one and nothing else: the log names hosts, and a URL can have X-BINDPW=password."""
    if not ldapurl.isLDAPUrl(value):
        host_setting.host(key, value)
    elif not _SERVER.fullmatch(value):
        raise settings.wrong(key, value, "a URL with a host and port and nothing behind; bind_dn and bind_pw log in")


def _hosts(key: str, value: object) -> tuple[str, ...]:
    return host_setting.hosts(key, value, _host)


def _dn(key: str, value: object) -> Template:
    """Read a template of a DN."""
    base = template.template(key, value)
    if not ldap.dn.is_dn(base.expand(_SAMPLE)):
        raise settings.wrong(key, value, "a DN (RFC 4514)")
    return base


def _scope(key: str, value: object) -> str:
    return settings.choice(key, value, _SCOPES)


def _dereference(key: str, value: object) -> int:
    return settings.count(key, value, maximum=len(_DEREFERENCE) - 1)


def _bind(key: str, value: object) -> str:
    return settings.choice(key, value, ("simple", "sasl"))


def _version(key: str, value: object) -> int:
    return settings.count(key, value, minimum=ldap.VERSION2, maximum=ldap.VERSION3)


class _Kind(enum.Enum):
    """What an attribute is for."""

    TERMINAL = enum.auto()
    LEAF = enum.auto()
    RESULT = enum.auto()
    SPECIAL = enum.auto()


class _Search(NamedTuple):
    base: str
    scope: int
    filter: str
    attributes: Sequence[str]


class LdapMap(NetworkMap[SimpleLDAPObject]):
    """Answers with the values of the result attributes of every entry that the search finds."""

    hosts = setting(_hosts)
    """LDAP URLs, or hosts (default port: 389); "server_host" of ldap_table(5)."""
    version = setting(_version, ldap.VERSION3)
    """The protocol's version."""
    bind = setting(_bind, "simple")
    """How to log in: ``"simple"`` or ``"sasl"``."""
    bind_dn = setting(settings.text, "")
    """The entry to log in as, with SASL the name; by default anonymously."""
    bind_pw = setting(secret, "")
    bind_pw_file = setting(secret, "")
    bind_pw_env = setting(secret, "")
    sasl_mechs = setting(settings.texts, ())
    """SASL mechanisms to try; by default those that the server offers."""
    sasl_realm = setting(settings.text, "")
    sasl_authz_id = setting(settings.text, "")
    """The SASL identity to act as, if it is another one."""
    sasl_minssf = setting(settings.count, 0)
    """The least strength of encryption that is asked of SASL."""
    search_base = setting(_dn)
    """Where to search; may have parts of the key, which are quoted as RFC 4514 says."""
    scope = setting(_scope, "sub")
    """``"sub"``, ``"one"`` or ``"base"``."""
    query_filter = setting(template.template, Template("mailacceptinggeneralid=%s"))
    """What to search for; parts of the key are quoted as RFC 4515 says."""
    result_attribute = setting(settings.texts, ("maildrop",))
    """Attributes whose values are the result."""
    special_result_attribute = setting(settings.texts, ())
    """Attributes with DNs or LDAP URLs, of entries that are taken into the result as well."""
    terminal_result_attribute = setting(settings.texts, ())
    """Attributes that, when an entry has them, are its result, and nothing else is."""
    leaf_result_attribute = setting(settings.texts, ())
    """Attributes that count as result attributes in an entry without special ones."""
    recursion_limit = setting(lambda key, value: settings.count(key, value, minimum=1), 1000)
    """How deeply special attributes may lead from entry to entry."""
    size_limit = setting(settings.count, None)
    """The most entries of one search; more is an error. Default: ``expansion_limit``."""
    dereference = setting(_dereference, 0)
    """When aliases are followed: 0 never, 1 in searching, 2 in finding the base, 3 always."""
    chase_referrals = setting(settings.boolean, False)
    """Whether the library follows referrals to other servers."""
    start_tls = setting(settings.boolean, False)
    """Whether to turn TLS on after connecting. With ldaps URLs it is there from the start."""
    tls_ca_cert_file = setting(settings.text, "")
    """Certificates, in PEM, of the authorities that are believed."""
    tls_ca_cert_dir = setting(settings.text, "")
    """A directory of them; ignored if there is a ``tls_ca_cert_file``."""
    tls_cert = setting(settings.text, "")
    """The client's certificate."""
    tls_key = setting(settings.text, "")
    """Its key."""
    tls_cipher_suite = setting(settings.text, "")
    """Which ciphers, in the words of the TLS library that OpenLDAP's was built with."""
    tls_require_cert = setting(settings.boolean, True)
    """Whether the server's certificate must be valid and name the server. Postfix's default is no, which protects
    from nobody who can be between the two machines."""

    errors = (ldap.LDAPError, OSError)
    account = ("bind", "bind_dn", "bind_pw", "bind_pw_file", "bind_pw_env")
    of_the_query = (
        "search_base",
        "scope",
        "query_filter",
        "result_attribute",
        "special_result_attribute",
        "terminal_result_attribute",
        "leaf_result_attribute",
        "recursion_limit",
        "size_limit",
    )

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        self._password = Secret(self, "bind_pw")
        # An attribute that is named twice counts as the first of what it is named as, as in Postfix.
        self._kinds = [
            (attribute.casefold(), kind)
            for kind, attributes in (
                (_Kind.TERMINAL, self.terminal_result_attribute),
                (_Kind.LEAF, self.leaf_result_attribute),
                (_Kind.RESULT, self.result_attribute),
                (_Kind.SPECIAL, self.special_result_attribute),
            )
            for attribute in attributes
        ]
        self._attributes = tuple(attribute for attribute, _ in self._kinds)
        if not self._attributes:
            # To the server, no attribute at all would mean all attributes.
            raise settings.wrong(f"maps.{name}.result_attribute", [], "a list of at least one attribute")
        self._require_sasl()
        self._require_filter()

    def _require_filter(self) -> None:
        """Raise SettingError if the library does not take the filter. It looks at that before it connects."""
        nowhere = ldap.initialize("ldapi://%2Fnonexistent")
        try:
            nowhere.search_ext("", ldap.SCOPE_BASE, self.query_filter.expand(_SAMPLE, escape_filter_chars))
        except ldap.FILTER_ERROR as error:
            key = f"maps.{self.name}.query_filter"
            raise settings.wrong(key, self.query_filter.text, "a filter (RFC 4515)") from error
        except ldap.LDAPError:
            pass  # that there is nobody is as it should be

    def _require_sasl(self) -> None:
        if self.bind == "sasl":
            if self.version != ldap.VERSION3:
                raise settings.SettingError(f"maps.{self.name}.version", 'has to be 3 with bind = "sasl"')
            return
        for key in ("sasl_mechs", "sasl_realm", "sasl_authz_id", "sasl_minssf"):
            if getattr(self, key):
                raise settings.SettingError(f"maps.{self.name}.{key}", 'goes with bind = "sasl" only')

    def dial(self, host: str, timeout: float) -> SimpleLDAPObject:
        """Connect to *host* and log in."""
        with _undisturbed():
            return self._open(host, timeout)

    def _open(self, host: str, timeout: float) -> SimpleLDAPObject:
        deadline = time.monotonic() + timeout
        url = _url(host)
        _require_answer(url, self.start_tls, timeout)
        connection = ldap.initialize(url)
        try:
            connection.protocol_version = self.version
            connection.deref = _DEREFERENCE[self.dereference]
            connection.set_option(ldap.OPT_REFERRALS, int(self.chase_referrals))
            connection.network_timeout = connection.timeout = _left(deadline)
            self._set_tls_options(connection)
            if self.start_tls:
                connection.start_tls_s()
            self._log_in(connection)
        except BaseException:
            connection.unbind_s()
            raise
        return connection

    def _log_in(self, connection: SimpleLDAPObject) -> None:
        if self.bind == "simple":
            # Also without a name: it is what opens the connection.
            connection.simple_bind_s(self.bind_dn, self._password.read())
            return
        _require_word(connection)
        connection.set_option(ldap.OPT_X_SASL_SECPROPS, f"minssf={self.sasl_minssf}")
        answers = {
            ldap.sasl.CB_AUTHNAME: self.bind_dn,
            ldap.sasl.CB_PASS: self._password.read(),
            ldap.sasl.CB_GETREALM: self.sasl_realm,
            ldap.sasl.CB_USER: self.sasl_authz_id,
        }
        connection.sasl_interactive_bind_s("", ldap.sasl.sasl(answers, " ".join(self.sasl_mechs)))

    def ask(self, connection: SimpleLDAPObject, key: str) -> Sequence[str] | None:
        """Search for *key*, and for what the entries found refer to."""
        address = Address.split(key)
        search = _Search(
            self.search_base.expand(address, escape_dn_chars),
            _SCOPES[self.scope],
            self.query_filter.expand(address, escape_filter_chars),
            self._attributes,
        )
        try:
            with _undisturbed():
                return list(self._results(connection, search, time.monotonic() + self.timeout, 1))
        except (ldap.NO_SUCH_OBJECT, ldap.INVALID_DN_SYNTAX):
            # A base that is made of the key may be wrong for this key; one that is not is a mistake.
            if self.search_base.letters:
                return None
            raise

    def examine(self, connection: SimpleLDAPObject) -> None:
        """See whether the base is there, if it is one for all keys."""
        if self.search_base.letters:
            return
        base = self.search_base.text.replace("%%", "%")
        try:
            connection.search_ext_s(base, ldap.SCOPE_BASE, attrlist=["1.1"], timeout=self.timeout)
        except (ldap.NO_SUCH_OBJECT, ldap.INVALID_DN_SYNTAX) as error:
            raise settings.SettingError(f"maps.{self.name}.search_base", f"the server has no {base!r}") from error
        except self.errors as error:
            raise UnreachableError(str(error)) from error

    def blamed(self, error: Exception) -> str:
        """A wrong password is the password's fault."""
        return "bind_pw" if isinstance(error, ldap.INVALID_CREDENTIALS) else super().blamed(error)

    def hang_up(self, connection: SimpleLDAPObject) -> None:
        """Say goodbye and close."""
        connection.unbind_s()

    def trouble(self, connection: SimpleLDAPObject, error: Exception) -> Trouble:  # noqa: ARG002
        """python-ldap has a class for each."""
        if isinstance(error, ldap.TIMEOUT):
            return Trouble.SLOW
        return Trouble.LOST if isinstance(error, _LOST) else Trouble.REFUSED

    def _results(self, connection: SimpleLDAPObject, search: _Search, deadline: float, depth: int) -> Iterator[str]:
        """Iterate over the results of *search*; *depth* is how deeply it is nested, 1 for the first."""
        if depth > self.recursion_limit:
            problem = f"more than recursion_limit = {self.recursion_limit} entries lead to each other"
            raise LookupFailedError(Reply.temp_fail(f"map {self.name}: {problem}"))
        log.debug("map %s: search for %s at %s", self.name, search.filter, search.base)
        found = connection.search_ext_s(
            search.base,
            search.scope,
            search.filter,
            search.attributes,
            timeout=_left(deadline),
            sizelimit=self.expansion_limit if self.size_limit is None else self.size_limit,
        )
        for dn, attributes in found:
            if dn is not None:  # else it is a referral
                yield from self._entry(connection, attributes, deadline, depth)

    def _entry(
        self, connection: SimpleLDAPObject, entry: Mapping[str, list[bytes]], deadline: float, depth: int
    ) -> Iterator[str]:
        """Iterate over the results of *entry* and of what it refers to, in the order in which the server has them."""
        found = [(self._kind(name), values) for name, values in entry.items() if values]
        kinds = {kind for kind, _ in found}
        wanted = {_Kind.TERMINAL} & kinds or {_Kind.RESULT, _Kind.SPECIAL}
        if not kinds & {_Kind.TERMINAL, _Kind.SPECIAL}:
            wanted.add(_Kind.LEAF)
        for kind, values in found:
            if kind not in wanted:
                continue
            for value in map(to_text, values):
                if kind is _Kind.SPECIAL:
                    yield from self._referred(connection, value, deadline, depth)
                else:
                    yield value

    def _referred(self, connection: SimpleLDAPObject, reference: str, deadline: float, depth: int) -> Iterator[str]:
        """Iterate over the results of what *reference*, a DN or an LDAP URL, means."""
        try:
            yield from self._results(connection, self._follow(reference), deadline, depth + 1)
        except ldap.NO_SUCH_OBJECT:
            # A group may well outlive a member.
            log.debug("map %s: there is no %s", self.name, reference)

    def _kind(self, name: str) -> _Kind | None:
        """Return what the attribute *name* is for; a subtype, ``mail;lang-de``, is for what the type is for."""
        folded = name.casefold()
        for attribute, kind in self._kinds:
            if folded == attribute or folded.startswith(f"{attribute};"):
                return kind
        return None

    def _follow(self, reference: str) -> _Search:
        """Return the search for what *reference*, a DN or an LDAP URL, means."""
        if not ldapurl.isLDAPUrl(reference):
            return _Search(reference, ldap.SCOPE_BASE, "(objectClass=*)", self._attributes)
        url = ldapurl.LDAPUrl(reference)
        wanted = [name for name in self._attributes if not url.attrs or name.casefold() in _folded(url.attrs)]
        scope = ldap.SCOPE_BASE if url.scope is None else url.scope
        # "1.1" asks for no attribute (RFC 4511), where an empty list would ask for all.
        return _Search(url.dn, scope, url.filterstr or "(objectClass=*)", wanted or ["1.1"])

    def _set_tls_options(self, connection: SimpleLDAPObject) -> None:
        files = {
            ldap.OPT_X_TLS_CACERTFILE: self.tls_ca_cert_file,
            ldap.OPT_X_TLS_CACERTDIR: self.tls_ca_cert_dir,
            ldap.OPT_X_TLS_CERTFILE: self.tls_cert,
            ldap.OPT_X_TLS_KEYFILE: self.tls_key,
        }
        for option, file in files.items():
            if file:
                connection.set_option(option, str(self.base / file))
        if self.tls_cipher_suite:
            connection.set_option(ldap.OPT_X_TLS_CIPHER_SUITE, self.tls_cipher_suite)
        required = ldap.OPT_X_TLS_DEMAND if self.tls_require_cert else ldap.OPT_X_TLS_NEVER
        connection.set_option(ldap.OPT_X_TLS_REQUIRE_CERT, required)
        try:
            connection.set_option(ldap.OPT_X_TLS_NEWCTX, 0)  # takes the options above over
        except ValueError as error:
            raise ConnectionError("the TLS library does not accept the settings tls_...") from error


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off the signal by which other workers ask for connections: OpenLDAP's library takes it for an error."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGURG])


def _url(host: str) -> str:
    if ldapurl.isLDAPUrl(host):
        return host
    address = Host.parse(host, _PORT)
    if address.path:
        return f"ldapi://{quote(address.path, safe='')}"
    name = f"[{address.name}]" if ":" in address.name else address.name
    return f"ldap://{name}:{address.port}"


def _require_answer(url: str, start_tls: bool, timeout: float) -> None:
    """Raise OSError if TLS is wanted and the server does not answer the first message about it within *timeout*.

    OpenLDAP's library waits for TLS without any limit. So a connection of our own finds out first, if the server is
    alive; what freezes in the moment between the two is left to the watchdog.
    """
    parts = urlsplit(url)
    if parts.scheme == "ldapi" or not (start_tls or parts.scheme == "ldaps"):
        return
    address = (parts.hostname or "localhost", parts.port or (_PORT if start_tls else _TLS_PORT))
    with socket.create_connection(address, timeout) as probe:
        probe.sendall(_START_TLS if start_tls else _client_hello())
        if not probe.recv(1):
            raise ConnectionError("the server closes the connection")


def _require_word(connection: SimpleLDAPObject) -> None:
    """Raise ldap.TIMEOUT if the server does not answer in time.

    OpenLDAP's library waits for SASL without any limit; what freezes from here on is left to the watchdog.
    """
    try:
        connection.search_ext_s("", ldap.SCOPE_BASE, attrlist=["1.1"], timeout=connection.timeout)
    except (ldap.TIMEOUT, *_LOST):
        raise
    except ldap.LDAPError:
        pass  # also an answer


def _client_hello() -> bytes:
    sent = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
    return sent.read()


def _left(deadline: float) -> float:
    """Return the seconds that are left; raise ldap.TIMEOUT if none are, since 0 would mean any time."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise ldap.TIMEOUT({"desc": "Timed out"})
    return left


def _folded(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.casefold() for name in names)
