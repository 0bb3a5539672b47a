"""A private OpenLDAP server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.integration.servers.process import Certificate, Server, free_port, library, program, running

SUFFIX = "dc=example,dc=com"
MANAGER = f"cn=manager,{SUFFIX}"
READER = f"uid=postfix,{SUFFIX}"
PASSWORD = "a pass'word"

_CONFIGURATION = """
include /etc/ldap/schema/core.schema
include /etc/ldap/schema/cosine.schema
include /etc/ldap/schema/inetorgperson.schema
modulepath /usr/lib/ldap
moduleload back_mdb
pidfile {directory}/pid
# Who logs in by SASL, with the password that is in the entry or over the Unix socket, is the reader.
authz-regexp "uid=([^,]*),(cn=[^,]*,)?cn=[^,]*,cn=auth" "uid=$1,{suffix}"
authz-regexp "gidNumber=[0-9]*\\+uidNumber=[0-9]*,cn=peercred,cn=external,cn=auth" "uid=postfix,{suffix}"
TLSCertificateFile {certificate}
TLSCertificateKeyFile {key}
TLSCACertificateFile {certificate}
database mdb
suffix "{suffix}"
rootdn "{manager}"
rootpw "{password}"
directory {directory}/data
dbnosync
# A client that follows a referral comes back without a name.
access to dn.subtree="ou=public,{suffix}" by * read
# Anonymous clients may only log in, so a test that binds notices when it has not.
access to * by users read by anonymous auth
"""


class Slapd(Server):
    """slapd with StartTLS, ldaps on ``tls_port``, and a Unix socket. Who has logged in may read."""

    user = "openldap"

    def __init__(self) -> None:
        super().__init__()
        self._ldap = library("ldap", "ldap")
        self.tls = Certificate(self.directory, self.user)
        self.tls_port = free_port()
        self.socket_url = f"ldapi://{quote(str(self.directory / 'socket'), safe='')}"
        data = self.directory / "data"
        data.mkdir()
        self.give_away(data)
        self._configuration = self.directory / "slapd.conf"
        self._configuration.write_text(
            _CONFIGURATION.format(
                directory=self.directory,
                certificate=self.tls.certificate,
                key=self.tls.key,
                suffix=SUFFIX,
                manager=MANAGER,
                password=PASSWORD,
            )
        )

    def command(self) -> list[str]:
        urls = f"ldap://127.0.0.1:{self.port} ldaps://127.0.0.1:{self.tls_port} {self.socket_url}"
        return [program("slapd", "slapd"), "-d", "0", "-f", str(self._configuration), "-h", urls]

    def is_ready(self) -> bool:
        with contextlib.suppress(self._ldap.SERVER_DOWN):
            self._bound().unbind_s()
            return True
        return False

    def add(self, dn: str, **attributes: str | list[str]) -> None:
        """Add an entry below the suffix."""
        values = [
            (name, [value.encode() for value in ([found] if isinstance(found, str) else found)])
            for name, found in attributes.items()
        ]
        connection = self._bound()
        connection.add_s(f"{dn},{SUFFIX}" if dn else SUFFIX, values)
        connection.unbind_s()

    def clear(self) -> None:
        """Remove what ``add`` has added, and leave the suffix and the reader."""
        connection = self._bound()
        with contextlib.suppress(self._ldap.NO_SUCH_OBJECT):
            # Of an entry that refers to another server the entry itself, and not the other server, is meant.
            itself = [library("ldap.controls.simple", "ldap").ManageDSAITControl()]
            found = connection.search_ext_s(SUFFIX, self._ldap.SCOPE_SUBTREE, attrlist=["1.1"], serverctrls=itself)
            for dn in sorted((dn for dn, _ in found), key=len, reverse=True):
                connection.delete_ext_s(dn, serverctrls=itself)
        connection.unbind_s()
        self.add("", objectClass=["dcObject", "organization"], o="Example", dc="example")
        self.add("uid=postfix", objectClass=["account", "simpleSecurityObject"], uid="postfix", userPassword=PASSWORD)

    def _bound(self) -> Any:
        connection = self._ldap.initialize(f"ldap://127.0.0.1:{self.port}")
        connection.set_option(self._ldap.OPT_NETWORK_TIMEOUT, 5)
        connection.simple_bind_s(MANAGER, PASSWORD)
        return connection


@pytest.fixture(scope="session")
def _slapd() -> Iterator[Slapd]:
    with running(Slapd()) as server:
        yield server


@pytest.fixture
def slapd(_slapd: Slapd) -> Iterator[Slapd]:
    """An slapd that runs, with nothing below its suffix but the entry that logs in."""
    _slapd.clear()
    yield _slapd
    _slapd.restore()
