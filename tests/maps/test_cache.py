"""Remembered answers."""

from __future__ import annotations

import logging

import pytest

from prefork_socketmap.maps.base import LookupFailedError
from prefork_socketmap.maps.cache import Cache
from prefork_socketmap.maps.ratelimit import RateLimitedLogger
from prefork_socketmap.socketmap.messages import Reply
from tests.maps.doubles import Clock, DictMap


class Backend:
    """Answers what it is told to, and counts."""

    def __init__(self) -> None:
        self.reply = Reply.ok("one")
        self.error: Exception | None = None
        self.asked = 0

    def __call__(self, key: str) -> Reply:
        self.asked += 1
        if self.error:
            raise self.error
        return self.reply


class Setup:
    def __init__(self, *, ttl: float = 0, negative_ttl: float = 0, stale_ttl: float = 0) -> None:
        self.clock = Clock()
        self.backend = Backend()
        self.cache = Cache(
            self.backend,
            RateLimitedLogger(logging.getLogger("test")),
            pages=1,
            ttl=ttl,
            negative_ttl=negative_ttl,
            stale_ttl=stale_ttl,
            clock=self.clock,
        )


def test_an_answer_is_remembered_for_its_time() -> None:
    setup = Setup(ttl=10)
    setup.cache.get("key")
    setup.backend.reply = Reply.ok("two")
    setup.clock.now += 9.9
    assert setup.cache.get("key") == Reply.ok("one")
    setup.clock.now += 0.1
    assert setup.cache.get("key") == Reply.ok("two")
    assert (setup.cache.hits, setup.cache.misses, setup.backend.asked) == (1, 2, 2)


def test_not_found_has_a_time_of_its_own() -> None:
    setup = Setup(ttl=100, negative_ttl=10)
    setup.backend.reply = Reply.not_found()
    setup.cache.get("key")
    setup.backend.reply = Reply.ok("now")
    assert setup.cache.get("key") == Reply.not_found()
    setup.clock.now += 10
    assert setup.cache.get("key") == Reply.ok("now")


def test_not_found_is_not_remembered_without_a_time() -> None:
    setup = Setup(ttl=100)
    setup.backend.reply = Reply.not_found()
    setup.cache.get("key")
    setup.backend.reply = Reply.ok("now")
    assert setup.cache.get("key") == Reply.ok("now")


@pytest.mark.parametrize("failure", [Reply.temp_fail("x"), Reply.perm_fail("x"), Reply.timeout("x")])
def test_a_failure_is_not_remembered(failure: Reply) -> None:
    setup = Setup(ttl=100, negative_ttl=100, stale_ttl=100)
    setup.backend.reply = failure
    assert setup.cache.get("key") == failure
    setup.backend.reply = Reply.ok("now")
    assert setup.cache.get("key") == Reply.ok("now")


@pytest.mark.parametrize("known", [Reply.ok("one"), Reply.not_found()])
@pytest.mark.parametrize(
    "failure", [Reply.temp_fail("x"), LookupFailedError(Reply.temp_fail("x")), TimeoutError(), KeyError("bug")]
)
def test_the_last_known_answer_stands_in_for_a_failure(known: Reply, failure: Reply | Exception) -> None:
    setup = Setup(ttl=10, negative_ttl=10, stale_ttl=100)
    setup.backend.reply = known
    setup.cache.get("key")
    if isinstance(failure, Exception):
        setup.backend.error = failure
    else:
        setup.backend.reply = failure
    setup.clock.now += 109.9
    assert setup.cache.get("key") == known
    assert setup.cache.stale == 1
    setup.clock.now += 0.1
    if isinstance(failure, Exception):
        with pytest.raises(type(failure)):
            setup.cache.get("key")
    else:
        assert setup.cache.get("key") == failure


def test_a_stale_answer_is_not_given_while_the_map_answers() -> None:
    setup = Setup(stale_ttl=100)
    setup.cache.get("key")
    setup.backend.reply = Reply.ok("two")
    assert setup.cache.get("key") == Reply.ok("two")


def test_a_stale_answer_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup(stale_ttl=100)
    setup.cache.get("key")
    setup.backend.reply = Reply.temp_fail("database is down")
    setup.cache.get("key")
    assert "database is down" in caplog.text


def test_the_cache_keeps_its_size_and_forgets_what_was_not_used() -> None:
    setup = Setup(ttl=100)
    for number in range(500):
        setup.cache.get("used")
        setup.cache.get(f"key{number}")
    assert setup.backend.asked == 501
    assert 20 < len(setup.cache) < 100
    setup.cache.get("key0")
    assert setup.backend.asked == 502


def test_an_answer_to_a_key_longer_than_any_address_takes_no_memory() -> None:
    setup = Setup(ttl=10, negative_ttl=10)
    assert setup.cache.get("a" * 99_000) == Reply.ok("one")
    assert len(setup.cache) == 0


@pytest.mark.parametrize("key", ["cache_ttl", "stale_ttl"])
def test_a_map_has_a_cache_when_a_time_says_so(key: str) -> None:
    assert DictMap({}).cache is None
    assert DictMap({}, **{key: 10}).cache is not None
    assert DictMap({}, **{key: 10}, cache_size=0).cache is None


def test_a_map_looks_a_folded_key_up_once() -> None:
    table = DictMap({"key": ["x"]}, cache_ttl=100)
    assert table.lookup("Key") == table.lookup("KEY") == Reply.ok("x")
    assert table.asked == ["key"]


def test_a_map_gives_a_stale_answer_when_its_backend_fails() -> None:
    table = DictMap({"key": ["x"]}, stale_ttl=100)
    table.lookup("key")
    table.error = LookupFailedError(Reply.temp_fail("down"))
    assert table.lookup("key") == Reply.ok("x")
    assert table.lookup("other") == Reply.temp_fail("down")
