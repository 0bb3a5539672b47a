"""Every network map as it is meant to be used: asked by a real Postfix, through the daemon, about a real server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.conftest import StartDaemon, StartPostfix
from tests.integration.daemon import Daemon
from tests.integration.postfix import Postfix
from tests.integration.servers.httpd import Httpd
from tests.integration.servers.mariadb import DATABASE as MARIADB_DATABASE
from tests.integration.servers.mariadb import PASSWORD as MARIADB_PASSWORD
from tests.integration.servers.mariadb import Mariadb
from tests.integration.servers.memcached import Memcached
from tests.integration.servers.postgresql import DATABASE as POSTGRESQL_DATABASE
from tests.integration.servers.postgresql import PASSWORD as POSTGRESQL_PASSWORD
from tests.integration.servers.postgresql import Postgresql
from tests.integration.servers.process import Server
from tests.integration.servers.redis import PASSWORD as REDIS_PASSWORD
from tests.integration.servers.redis import Redis
from tests.integration.servers.slapd import PASSWORD as SLAPD_PASSWORD
from tests.integration.servers.slapd import READER, SUFFIX, Slapd
from tests.processes import children
from tests.waiting import eventually

ALIASES = {"info@example.com": "staff@example.net", "@example.com": "rest@example.net"}
SQL = "SELECT goto FROM alias WHERE address = '%s'"
ROWS = "INSERT INTO alias VALUES " + ", ".join(map(str, ALIASES.items()))


def _postgresql(server: Postgresql) -> dict[str, object]:
    server.execute(ROWS)
    return {"query": SQL, "dbname": POSTGRESQL_DATABASE, "user": "postfix", "password": POSTGRESQL_PASSWORD}


def _mysql(server: Mariadb) -> dict[str, object]:
    server.execute(ROWS)
    return {"query": SQL, "dbname": MARIADB_DATABASE, "user": "postfix", "password": MARIADB_PASSWORD}


def _redis(server: Redis) -> dict[str, object]:
    server.client().hset("aliases", mapping=ALIASES)
    return {"query": "HGET aliases %s", "password": REDIS_PASSWORD}


def _ldap(server: Slapd) -> dict[str, object]:
    for address, target in ALIASES.items():
        server.add(f"cn={address}", objectClass="inetOrgPerson", sn="x", mail=address, description=target)
    search = {"search_base": SUFFIX, "query_filter": "(mail=%s)", "result_attribute": ["description"]}
    return {"bind_dn": READER, "bind_pw": SLAPD_PASSWORD, **search}


def _http(server: Httpd) -> dict[str, object]:
    # It knows the aliases by itself.
    return {"url": f"http://127.0.0.1:{server.port}/alias/%s"}


def _memcache(server: Memcached) -> dict[str, object]:
    server.set(ALIASES)
    return {}


_KINDS: dict[str, tuple[str, Callable[..., dict[str, object]]]] = {
    "postgresql": ("postgresql", _postgresql),
    "mysql": ("mariadb", _mysql),
    "redis": ("redis_server", _redis),
    "ldap": ("slapd", _ldap),
    "http": ("httpd", _http),
    "memcache": ("memcached", _memcache),
}


@pytest.fixture(params=_KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each type in turn."""
    return str(request.param)


@pytest.fixture
def server(request: pytest.FixtureRequest, kind: str) -> Any:
    """The type's server."""
    return request.getfixturevalue(_KINDS[kind][0])


@pytest.fixture
def daemon(start_daemon: StartDaemon, server: Server, kind: str) -> Daemon:
    """A daemon with the map "aliases" of that type."""
    table = {
        "type": kind,
        "search": "address",
        "recipient_delimiter": "+",
        "timeout": 1,
        "hosts": [f"127.0.0.1:{server.port}"],
        **_KINDS[kind][1](server),
    }
    # A string or a list of strings is the same in JSON and in TOML.
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items())
    return start_daemon(f"[maps.aliases]\n{lines}")


@pytest.fixture
def postfix(start_postfix: StartPostfix, daemon: Daemon) -> Postfix:
    """A Postfix that rewrites the addresses of example.com with the map, and has mailboxes in example.net."""
    return start_postfix(
        {
            "virtual_alias_domains": "example.com",
            "virtual_alias_maps": daemon.table("unix", "aliases"),
            "virtual_mailbox_domains": "example.net",
        }
    )


def test_virtual_alias_maps_with_a_catch_all_and_an_outage(server: Server, daemon: Daemon, postfix: Postfix) -> None:
    with postfix.smtp() as session:
        for recipient in ("Info+Tag@Example.com", "anybody@example.com"):
            session.sendmail("sender@example.org", recipient, "Subject: test\n\ntest\n")
        postfix.logged("to=<staff@example.net>, orig_to=<Info+Tag@Example.com>", "status=sent")
        postfix.logged("to=<rest@example.net>, orig_to=<anybody@example.com>", "status=sent")

        before = workers(daemon)
        server.freeze()
        begin = time.monotonic()
        assert rcpt(session, "frozen@example.com") == 451
        assert time.monotonic() - begin < 30
        server.thaw()
        server.stop()
        assert rcpt(session, "stopped@example.com") == 451
        server.start()
        eventually(lambda: rcpt(session, "back@example.com") == 250, within=60)

    assert "the backend is not available" in postfix.log()
    assert workers(daemon) >= before


def rcpt(session: Any, recipient: str) -> int:
    session.rset()
    session.mail("sender@example.org")
    return int(session.rcpt(recipient)[0])


def workers(daemon: Daemon) -> set[int]:
    """Return the pids of the daemon's workers."""
    master = json.loads((daemon.directory / "run/state.json").read_text())["pid"]
    return set(children(master))
