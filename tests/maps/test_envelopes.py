"""The database of original envelopes, in each of the servers that it may be in."""

from __future__ import annotations

import contextlib
import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from prefork_socketmap.maps import envelopes, registry
from prefork_socketmap.maps.backend import Links, Private, Standing
from prefork_socketmap.maps.envelopes import DOMAIN, Envelopes
from prefork_socketmap.maps.sqlitefile import use_wal
from prefork_socketmap.maps.srs import SrsMap
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.integration.servers import mariadb as mariadb_server
from tests.integration.servers import postgresql as postgresql_server
from tests.integration.servers import redis as redis_server_module
from tests.integration.servers.mariadb import Mariadb
from tests.integration.servers.postgresql import Postgresql
from tests.integration.servers.redis import Redis
from tests.maps.opening import OpenMap
from tests.test_manual import SECTIONS, displays

# What prefork-socketmap.toml(5) says to be done.
(TABLE,) = (text for text in displays(SECTIONS["Type srs"]) if "CREATE TABLE" in text)
STATEMENTS = TABLE.rstrip().rstrip(";").split(";")
SENDER = '"a\'b\\\\c %s ü"@sender.example'


class Kind:
    """A kind of database: its table, how to look into it, and how to make all its entries expire."""

    def __init__(self, table: Mapping[str, object], count: Callable[[], int], expire: Callable[[], object]) -> None:
        self.table = table
        self.count = count
        self.expire = expire


@pytest.fixture(params=["sqlite", "redis", "postgresql", "mysql"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    makers = {"sqlite": _sqlite, "redis": _redis, "postgresql": _postgresql, "mysql": _mysql}
    return makers[request.param](request, tmp_path)


def _sqlite(_request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    import sqlite3

    def execute(statement: str) -> list[tuple[int]]:
        with sqlite3.connect(tmp_path / "senders") as connection:
            return connection.execute(statement).fetchall()

    return Kind(
        {"type": "sqlite", "dbpath": "senders"},
        lambda: execute("SELECT count(*) FROM kv")[0][0],
        lambda: execute("UPDATE kv SET lt = unixepoch()"),
    )


def _redis(request: pytest.FixtureRequest, _tmp_path: Path) -> Kind:
    server: Redis = request.getfixturevalue("redis_server")
    client = server.client()

    def expire() -> None:
        for key in client.keys("PostSRSd/*"):
            client.pexpire(key, 0)

    table = {"type": "redis", "hosts": [f"127.0.0.1:{server.port}"], "password": redis_server_module.PASSWORD}
    return Kind(table, lambda: len(client.keys("PostSRSd/*")), expire)


def _postgresql(request: pytest.FixtureRequest, _tmp_path: Path) -> Kind:
    server: Postgresql = request.getfixturevalue("postgresql")
    server.execute(
        "DROP TABLE IF EXISTS srs_envelopes",
        *STATEMENTS,
        "GRANT SELECT, INSERT, UPDATE, DELETE ON srs_envelopes TO postfix",
    )

    def count() -> int:
        psycopg = pytest.importorskip("psycopg")
        with psycopg.connect(
            host=str(server.directory), port=server.port, user="postgres", dbname="mail"
        ) as connection:
            return int(connection.execute("SELECT count(*) FROM srs_envelopes").fetchone()[0])

    table = {
        "type": "postgresql",
        "hosts": [f"127.0.0.1:{server.port}"],
        "dbname": postgresql_server.DATABASE,
        "user": "postfix",
        "password": postgresql_server.PASSWORD,
    }
    expire = "UPDATE srs_envelopes SET expires = floor(extract(epoch from now()))"
    return Kind(table, count, lambda: server.execute(expire))


def _mysql(request: pytest.FixtureRequest, _tmp_path: Path) -> Kind:
    server: Mariadb = request.getfixturevalue("mariadb")
    server.execute(
        "DROP TABLE IF EXISTS srs_envelopes",
        *STATEMENTS,
        "GRANT INSERT, UPDATE, DELETE ON srs_envelopes TO postfix@'%'",
    )

    def count() -> int:
        pymysql = pytest.importorskip("pymysql")
        with (
            pymysql.connect(unix_socket=str(server.socket), user="root", database="mail") as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("SELECT count(*) FROM srs_envelopes")
            return int(cursor.fetchone()[0])

    table = {
        "type": "mysql",
        "hosts": [f"127.0.0.1:{server.port}"],
        "dbname": mariadb_server.DATABASE,
        "user": "postfix",
        "password": mariadb_server.PASSWORD,
    }
    return Kind(table, count, lambda: server.execute("UPDATE srs_envelopes SET expires = unix_timestamp()"))


@pytest.fixture
def database(kind: Kind, tmp_path: Path) -> Iterator[Envelopes]:
    with contextlib.closing(envelopes.make("m.envelope_database", kind.table, tmp_path)) as made:
        made.open()
        yield made


def test_a_sender_is_found_by_its_alias_alone(database: Envelopes) -> None:
    alias = envelopes.alias_of(SENDER)
    database.verify()
    assert database.get(alias) is None
    database.put(alias, SENDER, 100)
    assert database.get(alias) == SENDER
    assert database.get(envelopes.alias_of("other@sender.example")) is None


def test_a_sender_that_is_put_again_is_kept_longer(database: Envelopes, kind: Kind) -> None:
    alias = envelopes.alias_of(SENDER)
    database.put(alias, SENDER, 100)
    kind.expire()
    assert database.get(alias) is None
    database.put(alias, SENDER, 100)
    assert database.get(alias) == SENDER
    assert kind.count() == 1


def test_what_has_expired_is_removed(database: Envelopes, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    database.put(envelopes.alias_of("a@x"), "a@x", 100)
    kind.expire()
    monkeypatch.setattr(database, "_tidy_at", float("-inf"), raising=False)
    database.put(envelopes.alias_of("b@x"), "b@x", 100)
    assert kind.count() == 1
    assert database.get(envelopes.alias_of("b@x")) == "b@x"


def test_a_sender_survives_those_who_have_put_it(database: Envelopes, kind: Kind, tmp_path: Path) -> None:
    database.put(envelopes.alias_of(SENDER), SENDER, 100)
    database.close()
    other = envelopes.make("m.envelope_database", kind.table, tmp_path)
    other.open()
    assert other.get(envelopes.alias_of(SENDER)) == SENDER
    other.close()
    database.open()


def test_a_map_writes_and_reads_by_way_of_the_database(kind: Kind, open_map: OpenMap, tmp_path: Path) -> None:
    (tmp_path / "secrets").write_text("secret\n")
    (tmp_path / "secrets").chmod(0o600)
    common: dict[str, object] = {"secret_file": "secrets", "domain": "fwd.example"}
    common |= {"original_envelope": "database", "envelope_database": kind.table}
    forward = open_map("srs", direction="forward", **common)
    reverse = open_map("srs", direction="reverse", **common)
    reply = forward.lookup("user@sender.org")
    assert f"={DOMAIN}={envelopes.alias_of('user@sender.org')}@" in reply.text
    assert reverse.lookup(reply.text) == Reply.ok("user@sender.org")
    kind.expire()
    assert reverse.lookup(reply.text) == Reply.not_found()
    for each in (forward, reverse):
        each.verify()


def test_redis_forgets_by_itself(redis_server: Redis, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with contextlib.closing(envelopes.make("m", _redis(request, tmp_path).table, tmp_path)) as made:
        made.open()
        made.put("ALIAS", SENDER, 100)
    assert 0 < redis_server.client().ttl("PostSRSd/ALIAS@1") <= 100


@pytest.mark.parametrize("kind", ["redis", "postgresql", "mysql"], indirect=True)
def test_a_server_that_is_down_defers_the_mail(kind: Kind, open_map: OpenMap, tmp_path: Path) -> None:
    (tmp_path / "secrets").write_text("secret\n")
    (tmp_path / "secrets").chmod(0o600)
    common = {"secret_file": "secrets", "domain": "fwd.example", "original_envelope": "database"}
    dead = {**kind.table, "hosts": ["127.0.0.1:1"]}
    forward = open_map("srs", direction="forward", **common, envelope_database=dead)
    begin = time.monotonic()
    assert forward.lookup("user@sender.org").status is Status.TEMP
    assert forward.lookup("user@local.example").status is Status.TEMP
    assert forward.lookup("user@fwd.example") == Reply.not_found()
    assert time.monotonic() - begin < 30


class Backends:
    """Where standings come from; tells of which backends."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def standing(self, identity: Hashable, label: str) -> Standing:
        """Return a new one."""
        self.labels.append(label)
        return Private()

    def set_alarm(self, seconds: float) -> None:
        """Ring never."""


QUERIES = {"redis": "GET PostSRSd/%s", "postgresql": "SELECT '%s'", "mysql": "SELECT '%s'"}


@pytest.mark.parametrize("kind", QUERIES, indirect=True)
def test_both_directions_and_other_maps_have_one_backend_and_one_connection(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secrets").write_text("secret\n")
    (tmp_path / "secrets").chmod(0o600)
    common: dict[str, object] = {"type": "srs", "secret_file": "secrets", "domain": "fwd.example"}
    common |= {"original_envelope": "database", "envelope_database": kind.table}
    other = {**kind.table, "query": QUERIES[str(kind.table["type"])]}
    maps = registry.build(
        {
            "forward": {**common, "direction": "forward"},
            "reverse": {**common, "direction": "reverse"},
            "other": other,
        },
        tmp_path,
    )
    backends = Backends()
    links = Links(backends)
    with contextlib.ExitStack() as stack:
        for each in maps.values():
            each.share(lambda: links)
            each.open()
            stack.callback(each.close)
        forward = maps["forward"]
        assert isinstance(forward, SrsMap)
        monkeypatch.setattr(forward._envelopes, "_tidy_at", float("-inf"), raising=False)
        address = forward.lookup("user@sender.org").text
        assert maps["reverse"].lookup(address) == Reply.ok("user@sender.org")
        maps["other"].lookup("key")
        user = f"{kind.table['user']}@" if "user" in kind.table else ""
        assert backends.labels == [f"{kind.table['type']} {user}{kind.table['hosts'][0]}"]  # type: ignore[index]
        assert len([link for link in links._of_all() if link.connection]) == 1


def _put_and_get(directory: Path, number: int, start: Event, results: Queue[bool]) -> None:
    start.wait()
    with contextlib.closing(envelopes.make("m", {"dbpath": "senders"}, directory)) as database:
        database.open()
        senders = [f"user{number}.{each}@sender.org" for each in range(20)]
        for sender in senders:
            database.put(envelopes.alias_of(sender), sender, 100)
        results.put([database.get(envelopes.alias_of(sender)) for sender in senders] == senders)


def test_workers_that_start_at_once_make_one_file_and_do_not_get_in_each_other_s_way(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start, results = fork.Event(), fork.Queue()
    workers = [fork.Process(target=_put_and_get, args=(tmp_path, number, start, results)) for number in range(8)]
    for worker in workers:
        worker.start()
    start.set()
    assert [results.get(timeout=60) for _ in workers] == [True] * 8
    for worker in workers:
        worker.join()


def test_who_comes_while_another_one_has_the_file_waits_for_it(tmp_path: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(tmp_path / "senders", isolation_level=None)) as other,
        contextlib.closing(sqlite3.connect(tmp_path / "senders", timeout=0, check_same_thread=False)) as ours,
    ):
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            use_wal(ours, 0)
        waiting = threading.Thread(target=use_wal, args=(ours, 60))
        waiting.start()
        other.execute("COMMIT")
        waiting.join(60)
        assert ours.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_alias_of_a_sender_is_that_of_postsrsd() -> None:
    # base32hex, as in RFC 4648, of the SHA-1: printf %s user@sender.org | openssl sha1 -binary | basenc --base32hex
    assert envelopes.alias_of("user@sender.org") == "BGJ9GEHDJM1URLOLJHS0BTEQUSNOKO7C"
