"""Where TLS policies are remembered: both stores keep the same promises."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefork_socketmap.maps.base import UncheckedError
from prefork_socketmap.maps.policymemory import PolicyMemory
from prefork_socketmap.maps.policyredis import RedisStore
from prefork_socketmap.maps.policystore import SqliteStore, Store, Stored, StoreError
from prefork_socketmap.maps.registry import build
from prefork_socketmap.socketmap.messages import Reply
from tests.integration.servers.redis import PASSWORD, Cluster, Redis
from tests.waiting import eventually

MakeStore = Callable[..., Store]


def stored(answer: str, life: float = 1000.0, failure: str = "", keep: float = 0.0) -> Stored:
    now = time.time()
    return Stored(answer, failure, "basis", now, now + life / 2, now + life, now + max(life, keep), "details")


def remember(store: Store, key: str, value: Stored) -> None:
    claim = store.claim(key, 10)
    assert claim
    store.put(key, value, claim)


@pytest.fixture(params=["sqlite", "redis", "redis_cluster"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    """Return a maker of stores over one place; each is what a process has."""
    tmp_path.chmod(0o700)
    made: list[Store] = []

    def make(name: str = "m") -> Store:
        store: Store
        if request.param == "sqlite":
            store = SqliteStore(tmp_path / "policies", name, 1000)
        elif request.param == "redis":
            server: Redis = request.getfixturevalue("redis_server")
            store = RedisStore(name, {"hosts": [f"127.0.0.1:{server.port}"], "password": PASSWORD}, tmp_path)
        else:
            cluster: Cluster = request.getfixturevalue("redis_cluster")
            hosts = [f"127.0.0.1:{node.port}" for node in cluster.nodes]
            store = RedisStore(name, {"hosts": hosts, "cluster": True}, tmp_path)
        store.prepare()
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()


def test_what_one_process_stores_the_others_have(make_store: MakeStore) -> None:
    one, other = make_store(), make_store()
    value = stored("dane-only")
    assert other.get("x.test") is None
    remember(one, "x.test", value)
    assert other.get("x.test") == value
    assert other.get("y.test") is None


def test_maps_do_not_share_what_they_remember(make_store: MakeStore) -> None:
    one, other = make_store("m"), make_store("m2")
    remember(one, "x.test", stored("dane"))
    assert other.get("x.test") is None
    assert list(other.all()) == []
    assert other.clear() == 0
    assert other.claim("x.test", 10)
    assert one.get("x.test")


def test_one_process_at_a_time_has_a_claim(make_store: MakeStore) -> None:
    one, other = make_store(), make_store()
    claim = one.claim("x.test", 100)
    assert claim
    assert other.claim("x.test", 100) is None
    assert other.claim("y.test", 100)
    one.give_back("x.test", claim)
    assert other.claim("x.test", 100)
    assert one.claim("x.test", 100) is None


def test_storing_ends_a_claim(make_store: MakeStore) -> None:
    one, other = make_store(), make_store()
    remember(one, "x.test", stored("dane"))
    assert other.claim("x.test", 100)


def test_a_claim_ends_by_itself(make_store: MakeStore) -> None:
    one, other = make_store(), make_store()
    old = one.claim("x.test", 0.05)
    assert old
    assert eventually(lambda: other.claim("x.test", 100))
    # And who had it changes nothing any more.
    one.put("x.test", stored("dane"), old)
    assert one.get("x.test") is None
    one.give_back("x.test", old)
    assert one.claim("x.test", 100) is None


def test_what_is_forgotten_is_not_brought_back_by_who_looks_for_it(make_store: MakeStore) -> None:
    store = make_store()
    remember(store, "x.test", stored("dane"))
    claim = store.claim("x.test", 100)
    assert claim
    assert store.remove("x.test")
    store.put("x.test", stored("dane-only"), claim)
    assert store.get("x.test") is None
    assert not store.remove("x.test")


def test_everything_can_be_listed_and_forgotten(make_store: MakeStore) -> None:
    store = make_store()
    values = {f"{number}.test": stored(f"answer {number}") for number in range(5)}
    for key, value in values.items():
        remember(store, key, value)
    assert store.claim("being-looked-for.test", 100)
    assert dict(store.all()) == values
    assert store.clear() == 5
    assert dict(store.all()) == {}


def test_threads_can_use_a_store_at_a_time(make_store: MakeStore) -> None:
    store = make_store()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                remember(store, f"{number}-{turn}.test", stored("dane"))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)
        finally:
            store.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(dict(store.all())) == 80


def test_the_command_cache_sees_and_purges_next_hops(make_store: MakeStore) -> None:
    store = make_store()
    remember(store, "x.test", stored("dane-only", 1000))
    remember(store, "[mx.x.test]:587", stored("", 500, keep=5000))
    remember(store, "y.test", stored("", failure="bogus"))
    memory = PolicyMemory(store)
    found = {each.key: each for each in memory.recall_all()}
    assert found["x.test"].reply == Reply.ok("dane-only")
    assert found["[mx.x.test]:587"].reply == Reply.not_found()
    assert found["y.test"].reply == Reply.temp_fail("bogus")
    assert round(found["x.test"].fresh_until - found["x.test"].stored) == 1000
    assert round(found["[mx.x.test]:587"].kept_until - found["[mx.x.test]:587"].stored) == 5000
    assert memory.recall("x.test") == found["x.test"]
    assert memory.recall("127.0.0.1") is None
    assert memory.forget("x.test")
    assert not memory.forget("x.test")
    assert memory.recall("x.test") is None
    assert memory.forget_all() == 2


# SQLite.


def test_what_has_expired_is_removed_and_beyond_the_size_what_protects_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr("prefork_socketmap.maps.policystore._BETWEEN_TIDYINGS", 0)
    store = SqliteStore(tmp_path / "policies", "m", 3)
    store.prepare()
    remember(store, "policy.test", stored("secure match=x", 50))
    remember(store, "expired.test", stored("dane", -1))
    for number in range(5):
        remember(store, f"{number}.test", stored("", 100 + number))
    assert [key for key, _ in store.all()] == ["3.test", "4.test", "policy.test"]
    store.close()


def test_a_file_of_another_layout_is_begun_anew(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with sqlite3.connect(tmp_path / "policies") as connection:
        connection.execute("CREATE TABLE policies (x)")
        connection.execute("PRAGMA user_version = 99")
    store = SqliteStore(tmp_path / "policies", "m", 3)
    store.prepare()
    remember(store, "x.test", stored("dane"))
    assert store.get("x.test")
    store.close()


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "policies").write_text("hello " * 1000)
    with pytest.raises(StoreError, match="not a database"):
        SqliteStore(tmp_path / "policies", "m", 3).prepare()


def test_the_file_is_for_its_owner_and_no_link(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    store = SqliteStore(tmp_path / "policies", "m", 3)
    store.prepare()
    remember(store, "x.test", stored("dane"))
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}
    store.close()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError):
        SqliteStore(tmp_path / "link", "m", 3).prepare()
    assert not (tmp_path / "elsewhere").exists()


def test_what_root_makes_belongs_to_the_owner_of_the_directory(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    (tmp_path / "of-workers").mkdir(mode=0o700)
    os.chown(tmp_path / "of-workers", 65534, 65534)
    store = SqliteStore(tmp_path / "of-workers" / "policies", "m", 3)
    store.prepare()
    remember(store, "x.test", stored("dane"))
    assert {path.stat().st_uid for path in (tmp_path / "of-workers").iterdir()} == {65534}
    store.close()


# Redis.


def test_redis_forgets_what_has_expired(redis_server: Redis, tmp_path: Path) -> None:
    store = RedisStore("m", {"hosts": [f"127.0.0.1:{redis_server.port}"], "password": PASSWORD}, tmp_path)
    remember(store, "x.test", stored("dane", 0.01))
    eventually(lambda: store.get("x.test") is None)
    store.close()


def test_a_redis_that_is_down_defers_and_is_used_again(redis_server: Redis, tmp_path: Path) -> None:
    where = {"hosts": [f"127.0.0.1:{redis_server.port}"], "password": PASSWORD, "timeout": 1}
    table = build({"m": {"type": "tls-policy", "redis": where, "resolver": ["127.0.0.1:1"]}}, tmp_path)["m"]
    table.open()
    with pytest.raises(UncheckedError, match=r"maps\.m\.resolver: "):  # it is the only one that is down
        table.verify()
    redis_server.stop()
    assert table.lookup("x.test") == Reply.temp_fail("map m: the cache is not available")
    with pytest.raises(UncheckedError, match=r"maps\.m\.redis\.hosts: cannot connect: "):
        table.verify()
    redis_server.start()
    down = Reply.temp_fail("map m: the cache is not available")
    eventually(lambda: table.lookup("x.test") != down, 30)
    table.close()


def test_what_others_have_written_is_nothing(redis_server: Redis, tmp_path: Path) -> None:
    store = RedisStore("m", {"hosts": [f"127.0.0.1:{redis_server.port}"], "password": PASSWORD}, tmp_path)
    for value in ("hello", "[]", "{}", "3", '["a", "b"]'):
        redis_server.client().set("prefork-socketmap:m:{x.test}", value)
        assert store.get("x.test") is None
    store.close()
