"""The type ``memcache``, against a real server."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from prefork_socketmap.maps.base import Map
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply
from tests.integration.servers.memcached import Memcached, MemcachedSocket
from tests.maps.opening import OpenMap

Make = Callable[..., Map]


@pytest.fixture
def make(open_map: OpenMap, memcached: Memcached) -> Make:
    """Return a maker of maps on the server, which has some keys."""
    memcached.set(
        {"info@example.com": "staff@example.net", "aliases:müller": "utf-8", "empty": "", "lines": "a\r\nEND"}
    )

    def make(**table: object) -> Map:
        return open_map("memcache", hosts=[f"127.0.0.1:{memcached.port}"], **table)

    return make


@pytest.mark.parametrize(
    ("table", "key", "reply"),
    [
        ({}, "info@example.com", Reply.ok("staff@example.net")),
        ({}, "INFO@example.com", Reply.ok("staff@example.net")),
        ({}, "missing", Reply.not_found()),
        ({}, "empty", Reply.not_found()),
        ({}, "lines", Reply.ok("a\r\nEND")),
        ({"key_format": "aliases:%s"}, "MÜLLER", Reply.ok("utf-8")),
        ({"key_format": "%u@%d"}, "info@example.com", Reply.ok("staff@example.net")),
        ({"key_format": "%d"}, "info", Reply.not_found()),
    ],
)
def test_the_value_at_the_key_answers(make: Make, table: dict[str, object], key: str, reply: Reply) -> None:
    assert make(**table).lookup(key) == reply


@pytest.mark.parametrize(
    "key",
    ["a b", "x\r\nget info@example.com", "x info@example.com", "\t", "x" * 251, "ü" * 126, "x" * 90_000, "\x01"],
)
def test_a_key_that_no_server_can_have_is_not_found(make: Make, key: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    table = make()
    assert table.lookup("missing") == Reply.not_found()
    assert table.lookup(key) == Reply.not_found()
    assert table.lookup("info@example.com") == Reply.ok("staff@example.net")
    assert caplog.text.count("connected to") == 1


def test_a_unix_socket_is_asked(open_map: OpenMap, memcached_socket: MemcachedSocket) -> None:
    assert open_map("memcache", hosts=[f"unix:{memcached_socket.socket}"]).lookup("x") == Reply.not_found()


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({}, r"maps\.m\.hosts: is missing"),
        ({"hosts": ["a:b:c"]}, r"maps\.m\.hosts: 'a:b:c' is not accepted here"),
        ({"hosts": ["a"], "key_format": "%x"}, r"maps\.m\.key_format: '%x' is no part of a key"),
    ],
)
def test_a_wrong_setting_is_named(open_map: OpenMap, table: dict[str, object], error: str) -> None:
    with pytest.raises(SettingError, match=error):
        open_map("memcache", **table)
