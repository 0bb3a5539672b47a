"""The type ``redis``, against real servers: one alone, Sentinel's, and a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from prefork_socketmap.maps.base import Map
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.integration.servers.process import Certificate
from tests.integration.servers.redis import PASSWORD, SERVICE, Cluster, Redis, Watched
from tests.maps.opening import OpenMap
from tests.waiting import eventually

Make = Callable[..., Map]


@pytest.fixture
def make(open_map: OpenMap, redis_server: Redis) -> Make:
    """Return a maker of maps on the server, which has some keys."""
    client = redis_server.client()
    client.set("virtual:info@example.com", "staff@example.net")
    client.set("virtual:empty", "")
    client.set("virtual:two words", "2")
    client.set("virtual:müller@example.com", b"\xff")
    client.set("secret", "secret")
    client.hset("aliases", mapping={"info@example.com": "staff@example.net", "@example.org": "catch-all"})
    client.sadd("domains", "example.com")

    def make(query: str = "GET virtual:%s", **table: object) -> Map:
        where = {"hosts": [f"127.0.0.1:{redis_server.port}"], "password": PASSWORD}
        return open_map("redis", query=query, **{**where, **table})

    return make


@pytest.mark.parametrize(
    ("query", "key", "reply"),
    [
        ("GET virtual:%s", "info@example.com", Reply.ok("staff@example.net")),
        ("GET virtual:%s", "INFO@example.com", Reply.ok("staff@example.net")),
        ("GET virtual:%u@%d", "info@example.com", Reply.ok("staff@example.net")),
        ("GET virtual:%s", "missing", Reply.not_found()),
        ("GET virtual:%s", "empty", Reply.not_found()),
        ("GET virtual:%s", "two words", Reply.ok("2")),
        ("GET virtual:%s", "müller@example.com", Reply.ok("\udcff")),
        ("GET virtual:%s", "\udcff", Reply.not_found()),
        ("HGET aliases %s", "info@example.com", Reply.ok("staff@example.net")),
        ("hget aliases %s", "missing", Reply.not_found()),
        ("SISMEMBER domains %s", "example.com", Reply.ok("example.com")),
        ("SISMEMBER domains %d", "info@example.com", Reply.ok("example.com")),
        ("SISMEMBER domains %s", "example.org", Reply.not_found()),
        ("SISMEMBER domains %d", "example.com", Reply.not_found()),
    ],
)
def test_the_command_answers(make: Make, query: str, key: str, reply: Reply) -> None:
    assert make(query).lookup(key) == reply


@pytest.mark.parametrize("key", ["x\r\nGET secret", "x GET secret", "x secret", "* secret", "'", '"', "%s", "*"])
@pytest.mark.parametrize("query", ["GET virtual:%s", "GET virtual:%u", "HGET aliases %s"])
def test_a_key_cannot_change_the_command(make: Make, query: str, key: str) -> None:
    assert make(query).lookup(key) == Reply.not_found()
    assert make("GET %s").lookup("secret") == Reply.ok("secret")


def test_a_catch_all_and_a_result_format_work(make: Make) -> None:
    table = make("HGET aliases %s", search="address", result_format="%s of %D")
    assert table.lookup("anybody@example.org") == Reply.ok("catch-all of example.org")


def test_a_value_of_the_wrong_type_is_a_temporary_failure(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    table = make("GET %s")
    assert table.lookup("aliases") == Reply.temp_fail("map m: the query failed")
    assert table.lookup("secret") == Reply.ok("secret")
    assert "WRONGTYPE" in caplog.text


def test_a_connection_that_was_cut_is_replaced_within_the_lookup(make: Make, redis_server: Redis) -> None:
    table = make("GET %s")
    table.lookup("secret")
    redis_server.terminate_clients()
    assert table.lookup("secret") == Reply.ok("secret")


def test_a_unix_socket_is_a_host(make: Make, redis_server: Redis) -> None:
    assert make("GET %s", hosts=[f"unix:{redis_server.socket}"]).lookup("secret") == Reply.ok("secret")


def test_a_database_is_named_by_its_number(make: Make) -> None:
    assert make("GET %s", dbname=1).lookup("secret") == Reply.not_found()


def test_a_user_of_an_access_control_list_logs_in(make: Make, redis_server: Redis) -> None:
    redis_server.client().acl_setuser(
        "postfix", enabled=True, reset=True, passwords=["+own"], commands=["+get"], keys=["virtual:*"]
    )
    table = make(user="postfix", password="own")
    assert table.lookup("info@example.com") == Reply.ok("staff@example.net")
    assert make("GET %s", user="postfix", password="own").lookup("secret").status is Status.TEMP


def test_tls_is_verified(make: Make, redis_server: Redis, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(redis_server.tls.certificate.read_bytes())
    hosts = [f"127.0.0.1:{redis_server.tls_port}"]
    other = Certificate(tmp_path, "root").certificate
    assert make("GET %s", hosts=hosts, tls_CAfile="ca.pem").lookup("secret") == Reply.ok("secret")
    assert make("GET %s", hosts=hosts, tls_CAfile=str(other)).lookup("secret").status is Status.TEMP
    assert make("GET %s", hosts=hosts, tls=True, tls_verify_cert=False).lookup("secret") == Reply.ok("secret")


def test_no_error_and_no_log_line_has_the_password(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    table = make(password="hunter2")
    reply = table.lookup("secret")
    assert reply == Reply.temp_fail("map m: the backend is not available")
    assert "invalid username-password pair" in caplog.text
    assert "hunter2" not in caplog.text + repr(reply) + repr(table)


def test_a_wrong_password_is_a_wrong_setting(make: Make) -> None:
    with pytest.raises(SettingError, match=r"^maps\.m\.password: 127\.0\.0\.1:\d+: "):
        make(password="wrong").verify()


def test_after_a_failover_the_primary_that_sentinel_names_is_asked(
    open_map: OpenMap, redis_sentinel: Watched
) -> None:
    redis_sentinel.primary.client().set("key", "value")
    redis_sentinel.primary.client().wait(1, 10_000)
    table = open_map(
        "redis", hosts=[f"127.0.0.1:{redis_sentinel.sentinel.port}"], sentinel=SERVICE, query="GET %s", timeout=1
    )
    assert table.lookup("key") == Reply.ok("value")
    redis_sentinel.primary.stop()
    assert table.lookup("key").status is Status.TEMP
    eventually(lambda: table.lookup("key") == Reply.ok("value"), within=60)


def test_a_sentinel_that_is_gone_is_passed_over(open_map: OpenMap, redis_sentinel: Watched) -> None:
    redis_sentinel.primary.client().set("key", "value")
    gone = redis_sentinel.replica.tls_port
    redis_sentinel.replica.stop()
    hosts = [f"127.0.0.1:{gone}", f"127.0.0.1:{redis_sentinel.sentinel.port}"]
    table = open_map("redis", hosts=hosts, sentinel=SERVICE, query="GET %s")
    assert table.lookup("key") == Reply.ok("value")


def test_every_node_of_a_cluster_is_asked_for_its_keys(open_map: OpenMap, redis_cluster: Cluster) -> None:
    keys = [f"user{number}@example.com" for number in range(20)]
    for key in keys:
        redis_cluster.client().set(key, "of " + key)
    table = open_map("redis", hosts=[f"127.0.0.1:{redis_cluster.nodes[0].port}"], cluster=True, query="GET %s")
    assert [table.lookup(key).text for key in keys] == ["of " + key for key in keys]
    assert all(node.client().dbsize() for node in redis_cluster.nodes)


def test_a_cluster_is_entered_by_any_of_its_nodes(open_map: OpenMap, redis_cluster: Cluster) -> None:
    redis_cluster.client().hset("aliases", "key", "value")
    hosts = ["127.0.0.1:1", f"127.0.0.1:{redis_cluster.nodes[2].port}"]
    table = open_map("redis", hosts=hosts, cluster=True, query="HGET aliases %s")
    assert table.lookup("key") == Reply.ok("value")


def test_a_node_of_a_cluster_that_was_down_is_asked_again_when_it_is_back(
    open_map: OpenMap, redis_cluster: Cluster
) -> None:
    keys = [f"user{number}@example.com" for number in range(20)]
    for key in keys:
        redis_cluster.client().set(key, "found")
    first, _, last = redis_cluster.nodes
    table = open_map("redis", hosts=[f"127.0.0.1:{first.port}"], cluster=True, query="GET %s", timeout=5)

    def statuses() -> set[Status]:
        return {table.lookup(key).status for key in keys}

    assert statuses() == {Status.OK}
    last.stop()
    assert Status.TEMP in statuses()
    last.start()
    eventually(lambda: statuses() == {Status.OK}, within=60)


def test_the_loss_of_a_node_of_a_cluster_costs_its_own_keys_alone(open_map: OpenMap, redis_cluster: Cluster) -> None:
    client = redis_cluster.client()
    keys = [f"user{number}@example.com" for number in range(90)]
    for key in keys:
        client.set(key, "found")
    first, _, last = redis_cluster.nodes
    lost = {key for key in keys if client.get_node_from_key(key).port == last.port}
    assert 0 < len(lost) < len(keys)
    hosts = [f"127.0.0.1:{node.port}" for node in (last, first)]
    table = open_map("redis", hosts=hosts, cluster=True, query="GET %s", timeout=5)
    assert {table.lookup(key) for key in keys} == {Reply.ok("found")}
    last.stop()
    for _ in range(3):
        assert {key for key in keys if table.lookup(key) != Reply.ok("found")} == lost
    # A worker that starts now does not know more than the configuration.
    another = open_map("redis", hosts=hosts, cluster=True, query="GET %s", timeout=5)
    assert {key for key in keys if another.lookup(key) != Reply.ok("found")} == lost
    last.start()
    eventually(lambda: {table.lookup(key) for key in keys} == {Reply.ok("found")}, within=60)


def test_a_key_that_has_moved_to_another_node_is_followed(open_map: OpenMap, redis_cluster: Cluster) -> None:
    client = redis_cluster.client()
    client.set("key", "found")
    owner = client.get_node_from_key("key").port
    source = next(node.client() for node in redis_cluster.nodes if node.port == owner)
    target_port = next(node.port for node in redis_cluster.nodes if node.port != owner)
    target = next(node.client() for node in redis_cluster.nodes if node.port == target_port)
    slot = client.cluster_keyslot("key")
    table = open_map("redis", hosts=[f"127.0.0.1:{owner}"], cluster=True, query="GET %s")
    assert table.lookup("key") == Reply.ok("found")
    source_id, target_id = (each.execute_command("CLUSTER MYID") for each in (source, target))
    target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", source_id)
    source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", target_id)
    source.execute_command("MIGRATE", "127.0.0.1", target_port, "key", 0, 5000)
    assert table.lookup("key") == Reply.ok("found")  # the one redirects to the other, for this time
    for each in (target, source):
        each.execute_command("CLUSTER SETSLOT", slot, "NODE", target_id)
    assert table.lookup("key") == Reply.ok("found")  # and now for good
    assert table.lookup("key") == Reply.ok("found")


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({"query": "SET %s x"}, r"maps\.m\.query: 'SET...' is no query; expected .GET key"),
        ({"query": "GET %s x"}, r"maps\.m\.query: 'GET...' is no query"),
        ({"query": "HGET aliases"}, r"maps\.m\.query: 'HGET...' is no query"),
        ({"query": " "}, r"maps\.m\.query: ' ' is no query"),
        ({"query": "GET key"}, r"maps\.m\.query: 'GET...' has no part of the lookup key"),
        ({"query": "GET %x"}, r"maps\.m\.query: '%x' is no part of a key"),
        ({"sentinel": "x", "cluster": True}, r"maps\.m\.sentinel: cannot be together with cluster"),
        ({"cluster": True, "hosts": ["unix:/run/redis"]}, r"maps\.m\.hosts: 'unix:/run/redis' is not accepted here"),
        ({"dbname": 1, "cluster": True}, r"maps\.m\.dbname: a cluster has one database, 0"),
        ({"tls_CAfile": "none"}, r"maps\.m\.tls_CAfile: cannot be used"),
    ],
)
def test_a_wrong_setting_is_named(open_map: OpenMap, table: dict[str, object], error: str) -> None:
    with pytest.raises(SettingError, match=error):
        open_map("redis", **{"hosts": ["h"], "query": "GET %s", **table})


@pytest.mark.parametrize("search", ["address", "transport", "access", "domain", "network"])
def test_one_request_is_a_bounded_number_of_commands(make: Make, redis_server: Redis, search: str) -> None:
    table = make(search=search, timeout=60, max_key_size=0)
    client = redis_server.client()
    client.config_resetstat()
    assert table.lookup("." * 98_000) == Reply.not_found()
    assert client.info("commandstats").get("cmdstat_get", {"calls": 0})["calls"] <= 127 + 2
