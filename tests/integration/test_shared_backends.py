"""What the workers of a server share about their backends, against real ones: one budget, one state of health.

The rows of figures that the issue began with, each as a test.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from prefork_socketmap.client import LookupFailed, SocketmapClient, TempFail
from prefork_socketmap.daemon.backends import Memory, WorkerBackends
from prefork_socketmap.maps import registry
from prefork_socketmap.maps.backend import Links
from prefork_socketmap.maps.base import Map
from prefork_socketmap.socketmap.messages import Reply
from tests.daemon.installation import Installation
from tests.daemon.load import Load
from tests.integration.servers import mariadb, postgresql, redis
from tests.integration.servers.httpd import Httpd
from tests.integration.servers.process import free_port
from tests.threads import Threads
from tests.waiting import eventually

KEY = "info@example.com"
VALUE = "staff@example.net"
SQL = "SELECT goto FROM alias WHERE address = '%s'"
DEADLINE = 60.0


@pytest.fixture
def installation() -> Iterator[Installation]:
    with Installation() as made:
        yield made


def toml(maps: Mapping[str, Mapping[str, object]]) -> str:
    """Return *maps* as sections of a config file."""
    # A string, a number or a list of strings is the same in JSON and in TOML.
    return "\n".join(
        "\n".join([f"[maps.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())])
        for name, table in maps.items()
    )


def on_postgresql(server: postgresql.Postgresql, **settings: object) -> dict[str, object]:
    login = {"user": "postfix", "password": postgresql.PASSWORD, "dbname": postgresql.DATABASE}
    where = {"type": "postgresql", "hosts": [f"127.0.0.1:{server.port}"], "query": SQL, "sslmode": "disable"}
    return {**where, **login, **settings}


def on_mariadb(server: mariadb.Mariadb, **settings: object) -> dict[str, object]:
    login = {"user": "postfix", "password": mariadb.PASSWORD, "dbname": mariadb.DATABASE}
    return {"type": "mysql", "hosts": [f"127.0.0.1:{server.port}"], "query": SQL, **login, **settings}


def on_redis(server: redis.Redis, **settings: object) -> dict[str, object]:
    where = {"type": "redis", "hosts": [f"127.0.0.1:{server.port}"], "query": "GET %s"}
    return {**where, "password": redis.PASSWORD, **settings}


# The budget.


def test_many_clients_of_several_maps_stay_within_the_budget_and_all_are_answered(
    installation: Installation, postgresql: postgresql.Postgresql
) -> None:
    postgresql.execute(f"INSERT INTO alias VALUES ('{KEY}', '{VALUE}')")
    slow = f"{SQL} AND pg_sleep(0.02) IS NOT NULL"
    queries = {"one": SQL, "two": SQL, "three": SQL, "slow": slow}
    maps = {name: on_postgresql(postgresql, query=query, timeout=30) for name, query in queries.items()}
    installation.configure(maps=toml(maps))
    installation.start()
    most = 0
    with contextlib.ExitStack() as stack:
        loads = [stack.enter_context(Load(installation.endpoint, name, KEY, 15)) for name in queries]

        def has_seen_enough() -> bool:
            nonlocal most
            most = max(most, connections(postgresql))
            return most >= 20 and all(load.answers.total() > 100 for load in loads)

        eventually(has_seen_enough, within=DEADLINE)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            has_seen_enough()
    assert [set(load.answers) for load in loads] == [{VALUE}] * 4
    assert most <= 20


def connections(server: postgresql.Postgresql) -> int:
    """Return how many connections the maps have."""
    with server._psycopg.connect(
        host=str(server.directory), port=server.port, user="postgres", dbname="postgres"
    ) as connection:
        row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = 'postfix'").fetchone()
    return int(row[0])


def test_who_finds_no_connection_free_waits_and_then_is_told_why(
    installation: Installation, postgresql: postgresql.Postgresql
) -> None:
    postgresql.execute(f"INSERT INTO alias VALUES ('{KEY}', '{VALUE}')")
    slow = f"{SQL} AND pg_sleep(4) IS NOT NULL"
    common = {"max_connections": 1, "timeout": 60}
    maps = {
        "slow": on_postgresql(postgresql, query=slow, **common),
        "patient": on_postgresql(postgresql, **common),
        "impatient": on_postgresql(postgresql, **{**common, "timeout": 0.5}),
    }
    installation.configure('lookup_timeout = "2m"\n', maps=toml(maps))
    installation.start()
    answers: list[str | None] = []
    holder = threading.Thread(target=lambda: answers.append(installation.lookup("slow", KEY)))
    holder.start()
    eventually(lambda: connections(postgresql) == 1, within=DEADLINE)
    with pytest.raises(TempFail, match=r"all connections that .* \(max_connections = 1\) are in use"):
        installation.lookup("impatient", KEY)
    assert installation.lookup("patient", KEY) == VALUE
    assert answers == [VALUE]
    holder.join(DEADLINE)


def test_connections_that_nobody_uses_are_closed(
    installation: Installation, postgresql: postgresql.Postgresql
) -> None:
    postgresql.execute(f"INSERT INTO alias VALUES ('{KEY}', '{VALUE}')")
    installation.configure(maps=toml({"m": on_postgresql(postgresql, max_connection_idle=1)}))
    installation.start()
    assert installation.lookup("m", KEY) == VALUE
    eventually(lambda: connections(postgresql) == 0, within=DEADLINE)
    assert installation.lookup("m", KEY) == VALUE


@pytest.mark.parametrize("kind", ["postgresql", "mysql", "redis"])
def test_maps_with_the_same_server_and_account_share_a_connection(request: pytest.FixtureRequest, kind: str) -> None:
    tables, connected = SHARERS[kind](request)
    links = Links()
    maps = registry.build(tables)
    for each in maps.values():
        each.share(lambda: links)
        each.open()
    for _ in range(2):
        assert [each.lookup(KEY) for each in maps.values()] == [Reply.ok(f"{name} {VALUE}") for name in maps]
    assert connected() == 1
    for each in maps.values():
        each.close()


def _postgresql_maps(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Callable[[], int]]:
    server = request.getfixturevalue("postgresql")
    server.execute(f"INSERT INTO alias VALUES ('{KEY}', '{VALUE}')")
    query = SQL.replace("goto", "'{} ' || goto", 1)
    return {name: on_postgresql(server, query=query.format(name)) for name in ("a", "b")}, lambda: connections(server)


def _mysql_maps(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Callable[[], int]]:
    server = request.getfixturevalue("mariadb")
    server.execute(f"INSERT INTO alias VALUES ('{KEY}', '{VALUE}')")
    query = SQL.replace("goto", "CONCAT('{} ', goto)", 1)

    def connected() -> int:
        count = "SELECT CAST(COUNT(*) AS CHAR) FROM information_schema.processlist WHERE user = 'postfix'"
        ((number,),) = server.fetch(count)
        return int(number)

    return {name: on_mariadb(server, query=query.format(name)) for name in ("a", "b")}, connected


def _redis_maps(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Callable[[], int]]:
    server = request.getfixturevalue("redis_server")
    client = server.client()
    for name in ("a", "b"):
        client.set(f"{name}:{KEY}", f"{name} {VALUE}")
    # Its own connection is one, too.
    return (
        {name: on_redis(server, query=f"GET {name}:%s") for name in ("a", "b")},
        lambda: len(client.client_list(_type="normal")) - 1,
    )


SHARERS = {"postgresql": _postgresql_maps, "mysql": _mysql_maps, "redis": _redis_maps}


def test_a_limit_of_the_server_that_is_too_low_is_warned_of(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    for kind, maker in SHARERS.items():
        tables, _ = maker(request)
        caplog.clear()
        if kind == "redis":
            request.getfixturevalue("redis_server").client().config_set("maxclients", 100)
        table = registry.build({"a": {**tables["a"], "max_connections": 500}})["a"]
        table.lookup(KEY)
        table.lookup(KEY)
        table.close()
        warnings = [record.getMessage() for record in caplog.records if "in all" in record.getMessage()]
        assert len(warnings) == 1, kind
        assert warnings[0].startswith("map a: the server takes ")
        assert warnings[0].endswith(" connections in all, and max_connections of the maps that ask it is 500")


# Health.


class Notes(Threads):
    """Clients that ask again and again, and note when each lookup began and ended, and whether it was answered."""

    def __init__(self, endpoint: str, name: str, key: str, clients: int) -> None:
        super().__init__([self._ask] * clients)
        self._endpoint, self._question = endpoint, (name, key)
        self.noted: list[tuple[float, float, bool]] = []

    def _ask(self) -> None:
        with SocketmapClient(self._endpoint) as client:
            while not self.enough.is_set():
                begin = time.monotonic()
                try:
                    client.lookup(*self._question)
                except LookupFailed:
                    answered = False
                else:
                    answered = True
                self.noted.append((begin, time.monotonic(), answered))
                self.enough.wait(0.01)

    def first_answer_after(self, moment: float) -> float:
        """Wait for a lookup that has begun after *moment* and was answered; return when it ended."""

        def ends() -> list[float]:
            return [end for begin, end, answered in list(self.noted) if begin > moment and answered]

        return min(eventually(ends, within=DEADLINE))

    def failed_after(self, moment: float) -> int:
        """Return how many lookups that have begun after *moment* were not answered."""
        return sum(begin > moment and not answered for begin, _, answered in self.noted)


def test_when_one_worker_has_found_a_server_up_again_none_fails_any_more(
    installation: Installation, redis_server: redis.Redis
) -> None:
    redis_server.client().set(KEY, VALUE)
    installation.configure(maps=toml({"m": on_redis(redis_server)}))
    installation.start()
    with Notes(installation.endpoint, "m", KEY, 16) as notes:
        notes.first_answer_after(0)
        redis_server.stop()
        down = time.monotonic()
        eventually(lambda: time.monotonic() > down + 8, within=DEADLINE)
        redis_server.start()
        first = notes.first_answer_after(down)
        eventually(lambda: sum(begin > first for begin, *_ in list(notes.noted)) > 500, within=DEADLINE)
    assert notes.failed_after(down) > 0
    assert notes.failed_after(first) == 0
    assert "m: cannot connect" in installation.log.read_text()
    assert "answers again, after" in installation.log.read_text()


def test_one_key_that_makes_a_server_hang_up_fails_alone(installation: Installation, httpd: Httpd) -> None:
    table = {"type": "http", "url": f"http://127.0.0.1:{httpd.port}/echo/%s", "timeout": 30}
    installation.configure(maps=toml({"m": table}))
    installation.start()
    with (
        Load(installation.endpoint, "m", "good", 4) as good,
        Load(installation.endpoint, "m", "bad", 1) as bad,
    ):
        eventually(lambda: bad.answers.total() >= 10 and good.answers.total() > 200, within=DEADLINE)
    assert set(good.answers) == {"good"}
    assert set(bad.answers) == {"failed: map m: the backend is not available"}


def test_beside_a_frozen_server_other_maps_are_answered_and_its_own_clients_told_at_once(
    installation: Installation, postgresql: postgresql.Postgresql, redis_server: redis.Redis
) -> None:
    redis_server.client().set(KEY, VALUE)
    maps: dict[str, dict[str, object]] = {
        "frozen": on_postgresql(postgresql, timeout=120),
        "other": on_redis(redis_server),
        "static": {"type": "static", "entries": {}},
    }
    text = toml(maps).replace("entries = {}", f'entries = {{ "{KEY}" = "{VALUE}" }}')
    installation.configure("process_limit = 8\nlookup_timeout = 0", maps=text)
    installation.start()
    postgresql.freeze()
    results: list[str] = []

    def ask() -> None:
        try:
            installation.lookup("frozen", KEY)
        except LookupFailed as error:
            results.append(str(error))

    clients = [threading.Thread(target=ask) for _ in range(12)]
    for client in clients:
        client.start()
    # Three quarters of the workers wait for it, and no more.
    eventually(lambda: len(results) == 6, within=DEADLINE)
    assert set(results) == {"map frozen: max_workers_share = 0.75 of all workers wait for the backend"}
    for name in ("static", "other") * 10:
        assert installation.lookup(name, KEY) == VALUE
    assert len(results) == 6
    postgresql.thaw()
    for client in clients:
        client.join(DEADLINE)
    assert len(results) == 6


# Storms.


@pytest.fixture
def slammed_port() -> Iterator[tuple[int, list[float]]]:
    """A server that hangs up on everybody at once: its port, and when somebody has connected."""
    attempts: list[float] = []

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()
                attempts.append(time.monotonic())

    with socket.create_server(("127.0.0.1", free_port()), backlog=512) as listener:
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        yield listener.getsockname()[1], attempts
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


WORKERS = 100


def test_a_hundred_workers_are_no_storm_for_a_server_in_trouble(
    tmp_path: Path, slammed_port: tuple[int, list[float]]
) -> None:
    port, attempts = slammed_port
    memory = Memory.make(tmp_path / "backends")
    fork = multiprocessing.get_context("fork")
    ready, go = fork.Semaphore(0), fork.Event()
    seconds = 3.0

    def work(number: int) -> None:
        table = one_map({"type": "memcache", "hosts": [f"127.0.0.1:{port}"], "timeout": 1}, memory)
        ready.release()
        go.wait()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            table.lookup(f"{number}@example.com")
            time.sleep(0.02)

    workers = [fork.Process(target=work, args=(number,), daemon=True) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    for _ in workers:
        assert ready.acquire(timeout=DEADLINE)
    begin = time.monotonic()
    go.set()
    for worker in workers:
        worker.join(DEADLINE)
    elapsed = time.monotonic() - begin
    assert 2 <= len(attempts) <= 20 * (1 + elapsed)


def one_map(table: Mapping[str, object], memory: Memory) -> Map:
    """Return an open map as a worker has it."""
    (found,) = registry.build({"m": table}).values()
    backends = WorkerBackends(memory, WORKERS)
    found.share(lambda: backends.links)
    found.open()
    return found


# The life of a server.


def test_what_is_known_of_a_backend_outlives_a_reload_and_an_upgrade(installation: Installation) -> None:
    port = free_port()
    table = {"type": "redis", "hosts": [f"127.0.0.1:{port}"], "query": "GET %s", "password": "hunter2"}
    installation.configure(maps=toml({"m": table}))
    process = installation.start()

    def seconds_down() -> float:
        found = json.loads(installation.run("status", "--json").stdout)["backends"]
        (backend,) = found.values()
        assert list(found) == [f"redis 127.0.0.1:{port}"]
        assert backend["up"] is False
        return float(backend["down_seconds"])

    with pytest.raises(TempFail, match="the backend is not available"):
        installation.lookup("m", KEY)
    seen = seconds_down()
    assert installation.run("reload").returncode == 0
    assert seconds_down() > seen
    seen = seconds_down()
    assert installation.run("upgrade").returncode == 0
    assert seconds_down() > seen
    assert process.poll() is None
    assert "hunter2" not in (installation.runtime_dir / "backends").read_bytes().decode("latin-1")
    lines = installation.run("status").stdout
    assert f"redis 127.0.0.1:{port}  down" in lines
    assert 'backend_up{backend="redis 127.0.0.1' in installation.run("status", "--prometheus").stdout


def test_a_server_without_backends_shows_none(installation: Installation) -> None:
    installation.start()
    assert installation.lookup() == "blue"
    assert json.loads(installation.run("status", "--json").stdout)["backends"] == {}
    assert "backend" not in installation.run("status").stdout
