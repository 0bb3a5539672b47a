"""Outages of the servers behind the network maps: stopped, restarted, frozen, unreachable, with and without TLS.

What is promised: "temporary failure" in time, then at once; the last known answer, if ``stale_ttl`` allows; the right
answer again, with no reload, when the server is back; and nothing lost.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from prefork_socketmap.maps import backend as backends
from prefork_socketmap.maps.base import Map
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.integration.servers import mariadb, memcached, postgresql, redis, slapd
from tests.integration.servers.process import Server, free_port
from tests.maps.opening import OpenMap
from tests.processes import descriptors
from tests.waiting import eventually

KEY = "info@example.com"
FOUND = Reply.ok("staff@example.net")
TEMP = Reply.temp_fail("map m: the backend is not available")
SQL = "SELECT goto FROM alias WHERE address = '%s'"
# Short for the tests' sake; asserted is MUCH_LONGER, which a busy machine can keep, and an endless wait cannot.
TIMEOUT = 0.5
MUCH_LONGER = 30.0


@dataclass
class Backend:
    """A server that has an answer, and the settings of a map that asks it."""

    server: Server
    kind: str
    port: int
    settings: dict[str, Any]
    open_map: OpenMap

    def open(self, *hosts: str, **settings: object) -> Map:
        """Open a map on *hosts*, by default the server."""
        where = {"hosts": list(hosts) or [self.host], "timeout": TIMEOUT}
        return self.open_map(self.kind, **{**self.settings, **where, **settings})

    @property
    def host(self) -> str:
        scheme = "ldaps://" if self.kind == "ldap" and self.port != self.server.port else ""
        return f"{scheme}127.0.0.1:{self.port}"


def _postgresql(server: postgresql.Postgresql, tls: bool) -> tuple[int, dict[str, Any]]:
    server.execute(f"INSERT INTO alias VALUES ('{KEY}', '{FOUND.text}')")
    secure = {"sslmode": "verify-full", "sslrootcert": str(server.tls.certificate)} if tls else {"sslmode": "disable"}
    login = {"user": "postfix", "password": postgresql.PASSWORD, "dbname": postgresql.DATABASE}
    return server.port, {"query": SQL, **login, **secure}


def _mysql(server: mariadb.Mariadb, tls: bool) -> tuple[int, dict[str, Any]]:
    server.execute(f"INSERT INTO alias VALUES ('{KEY}', '{FOUND.text}')")
    secure = {"tls_CAfile": str(server.tls.certificate)} if tls else {}
    login = {"user": "postfix", "password": mariadb.PASSWORD, "dbname": mariadb.DATABASE}
    return server.port, {"query": SQL, **login, **secure}


def _redis(server: redis.Redis, tls: bool) -> tuple[int, dict[str, Any]]:
    server.client().set(KEY, FOUND.text)
    secure = {"tls_CAfile": str(server.tls.certificate)} if tls else {}
    return server.tls_port if tls else server.port, {"query": "GET %s", "password": redis.PASSWORD, **secure}


def _ldap(server: slapd.Slapd, tls: bool) -> tuple[int, dict[str, Any]]:
    server.add("cn=info", objectClass="inetOrgPerson", sn="x", mail=KEY, description=FOUND.text)
    secure = {"tls_ca_cert_file": str(server.tls.certificate)} if tls else {}
    login = {"bind_dn": slapd.READER, "bind_pw": slapd.PASSWORD}
    search = {"search_base": slapd.SUFFIX, "query_filter": "(mail=%s)", "result_attribute": ["description"]}
    return server.tls_port if tls else server.port, {**search, **login, **secure}


def _ldap_start_tls(server: slapd.Slapd, tls: bool) -> tuple[int, dict[str, Any]]:
    return server.port, {**_ldap(server, tls=True)[1], "start_tls": tls}


def _ldap_sasl(server: slapd.Slapd, tls: bool) -> tuple[int, dict[str, Any]]:
    port, settings = _ldap(server, tls)
    return port, {**settings, "bind": "sasl", "bind_dn": "postfix", "sasl_mechs": ["SCRAM-SHA-256"]}


def _http(server: Any, tls: bool) -> tuple[int, dict[str, Any]]:
    if tls:
        return server.tls_port, {"url": "https://host/alias/%s", "tls_CAfile": str(server.tls.certificate)}
    return server.port, {"url": "http://host/alias/%s"}


def _memcache(server: memcached.Memcached, tls: bool) -> tuple[int, dict[str, Any]]:
    server.set({KEY: FOUND.text})
    return server.port, {}


_KINDS: dict[str, tuple[str, str, Callable[..., tuple[int, dict[str, Any]]], bool]] = {
    "postgresql": ("postgresql", "postgresql", _postgresql, False),
    "postgresql, TLS": ("postgresql", "postgresql", _postgresql, True),
    "mysql": ("mysql", "mariadb", _mysql, False),
    "mysql, TLS": ("mysql", "mariadb", _mysql, True),
    "redis": ("redis", "redis_server", _redis, False),
    "redis, TLS": ("redis", "redis_server", _redis, True),
    "ldap": ("ldap", "slapd", _ldap, False),
    "ldap, SASL": ("ldap", "slapd", _ldap_sasl, False),
    "ldaps": ("ldap", "slapd", _ldap, True),
    "ldap, StartTLS": ("ldap", "slapd", _ldap_start_tls, True),
    "http": ("http", "httpd", _http, False),
    "https": ("http", "httpd", _http, True),
    "memcache": ("memcache", "memcached", _memcache, False),
}


# For what happens above the connection, where TLS makes no difference.
without_tls = pytest.mark.parametrize(
    "backend", [name for name, (*_, tls) in _KINDS.items() if not tls], indirect=True
)


@pytest.fixture(params=_KINDS)
def backend(request: pytest.FixtureRequest, open_map: OpenMap) -> Backend:
    """Each kind of server in turn; whatever a test does to it, it runs again afterwards."""
    kind, fixture, prepare, tls = _KINDS[request.param]
    server = request.getfixturevalue(fixture)
    port, settings = prepare(server, tls)
    return Backend(server, kind, port, settings, open_map)


def lookup(table: Map) -> Reply:
    """Look ``KEY`` up, and assert that it does not take for ever."""
    begin = time.monotonic()
    reply = table.lookup(KEY)
    assert time.monotonic() - begin < MUCH_LONGER
    return reply


def wait_until_it_answers(table: Map) -> None:
    """Ask again and again; until the answer is there, it must be "temporary failure"."""

    def answers() -> bool:
        reply = lookup(table)
        assert reply in (TEMP, FOUND)
        return reply == FOUND

    eventually(answers, within=60)


def test_a_server_that_was_stopped_is_a_temporary_failure_until_it_is_back(backend: Backend) -> None:
    table = backend.open()
    assert lookup(table) == FOUND
    backend.server.stop()
    assert [lookup(table) for _ in range(3)] == [TEMP] * 3
    backend.server.start()
    wait_until_it_answers(table)


def test_a_server_that_was_restarted_between_two_lookups_is_not_noticed(backend: Backend) -> None:
    table = backend.open()
    assert lookup(table) == FOUND
    backend.server.stop()
    backend.server.start()
    assert lookup(table) == FOUND


def test_a_server_that_freezes_is_a_temporary_failure_until_it_goes_on(backend: Backend) -> None:
    table = backend.open()
    assert lookup(table) == FOUND
    backend.server.freeze()
    assert [lookup(table) for _ in range(3)] == [TEMP] * 3
    backend.server.thaw()
    wait_until_it_answers(table)


def test_a_server_that_is_frozen_from_the_start_is_a_temporary_failure(backend: Backend) -> None:
    table = backend.open()
    backend.server.freeze()
    assert lookup(table) == TEMP
    backend.server.thaw()
    wait_until_it_answers(table)


def test_a_port_that_drops_packets_is_a_temporary_failure(backend: Backend, dropping_port: int) -> None:
    assert lookup(backend.open(backend.host.replace(str(backend.port), str(dropping_port)))) == TEMP


@without_tls
@pytest.mark.parametrize("dead", ["refuses", "drops packets"])
def test_the_next_host_is_asked_when_one_is_dead(backend: Backend, dropping_port: int, dead: str) -> None:
    port = free_port() if dead == "refuses" else dropping_port
    table = backend.open(backend.host.replace(str(backend.port), str(port)), backend.host, timeout=4 * TIMEOUT)
    assert lookup(table) == FOUND


@without_tls
def test_during_the_pause_nobody_is_asked(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_PAUSE", "LONGEST_PAUSE"):
        monkeypatch.setattr(backends, name, 10 * MUCH_LONGER)
    table = backend.open()
    backend.server.stop()
    assert lookup(table) == TEMP
    backend.server.start()
    # It would answer by now.
    assert lookup(table) == TEMP


@without_tls
@pytest.mark.parametrize("outage", ["stop", "freeze"])
def test_the_last_known_answer_is_given_while_stale_ttl_lasts(backend: Backend, outage: str) -> None:
    table = backend.open(stale_ttl=10 * MUCH_LONGER)
    assert lookup(table) == FOUND
    getattr(backend.server, outage)()
    assert lookup(table) == FOUND
    assert table.lookup("other@example.com").status is Status.TEMP


def test_an_outage_costs_no_descriptor(backend: Backend) -> None:
    def outages() -> None:
        table = backend.open()
        for begin, end in (("freeze", "thaw"), ("stop", "start")):
            wait_until_it_answers(table)
            getattr(backend.server, begin)()
            assert lookup(table) == TEMP
            getattr(backend.server, end)()
        wait_until_it_answers(table)
        table.close()
        gc.collect()

    outages()  # opens what libraries keep open for good
    before = descriptors(os.getpid()).total()
    outages()
    assert descriptors(os.getpid()).total() == before


@without_tls
def test_connecting_at_the_start_needs_a_server(backend: Backend) -> None:
    backend.server.stop()
    with pytest.raises(SettingError, match=r"maps\.m\.hosts: cannot connect: "):
        backend.open(connect="start")
    backend.server.start()
    wait_until_it_answers(backend.open(connect="start"))
