"""What all maps that ask a server have in common: when they connect, try again, wait, and give up."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from prefork_socketmap.maps.backend import FIRST_PAUSE, LONGEST_PAUSE
from prefork_socketmap.maps.base import LookupFailedError
from prefork_socketmap.maps.network import NetworkMap, Trouble
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply
from tests.maps.doubles import Clock

UNAVAILABLE = Reply.temp_fail("map m: the backend is not available")


class DriverError(Exception):
    """What this driver raises; says itself what it means."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.name)
        self.trouble = trouble


class Connection:
    def __init__(self, host: str) -> None:
        self.host = host
        self.is_open = True


class FakeMap(NetworkMap[Connection]):
    """Its servers are ``up`` or not; ``errors_to_come`` are raised by the next queries, None by none."""

    errors = (OSError, DriverError)

    def __init__(self, **table: object) -> None:
        super().__init__("m", {"hosts": ["a"], **table}, Path())
        self.up = set(self.hosts)
        self.dialed: list[tuple[str, float]] = []
        self.connections: list[Connection] = []
        self.errors_to_come: list[Exception | None] = []

    def dial(self, host: str, timeout: float) -> Connection:
        self.dialed.append((host, timeout))
        if host not in self.up:
            raise ConnectionRefusedError("refused")
        self.connections.append(Connection(host))
        return self.connections[-1]

    def ask(self, connection: Connection, key: str) -> Sequence[str] | None:
        assert connection.is_open
        error = self.errors_to_come.pop(0) if self.errors_to_come else None
        if error is not None:
            raise error
        return [f"{key} from {connection.host}"]

    def hang_up(self, connection: Connection) -> None:
        connection.is_open = False

    def trouble(self, connection: Connection, error: Exception) -> Trouble:
        return error.trouble if isinstance(error, DriverError) else Trouble.LOST


def next_attempt(table: FakeMap) -> float:
    """Return when the server is tried again."""
    return table.own_link.health.cells.retry[0]


def about(pause: float) -> object:
    """Return what equals *pause*, or up to a quarter less."""
    return pytest.approx(pause * 7 / 8, rel=1 / 7)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_one_connection_is_made_at_first_use_and_kept() -> None:
    table = FakeMap()
    table.open()
    assert table.dialed == []
    assert table.lookup("k") == table.lookup("k") == Reply.ok("k from a")
    assert len(table.connections) == 1


def test_it_can_be_made_at_start() -> None:
    table = FakeMap(connect="start")
    table.open()
    assert len(table.connections) == 1


def test_a_server_that_is_down_at_start_keeps_the_map_from_opening() -> None:
    table = FakeMap(hosts=["a", "b"], connect="start")
    table.up.clear()
    with pytest.raises(SettingError, match=r"maps\.m\.hosts: cannot connect: a: refused; b: refused"):
        table.open()
    table.up.add("b")
    table.open()
    assert table.lookup("k") == Reply.ok("k from b")


def test_closing_the_map_closes_the_connection() -> None:
    table = FakeMap(connect="start")
    table.open()
    table.close()
    assert not table.connections[0].is_open


def test_a_lookup_on_a_broken_connection_is_tried_once_more_on_a_new_one() -> None:
    table = FakeMap(connect="start")
    table.open()
    table.errors_to_come = [DriverError(Trouble.LOST)]
    assert table.lookup("k") == Reply.ok("k from a")
    assert [connection.is_open for connection in table.connections] == [False, True]


def test_once_and_no_more() -> None:
    table = FakeMap(connect="start")
    table.open()
    table.errors_to_come = [ConnectionResetError(), ConnectionResetError()]
    assert table.lookup("k") == UNAVAILABLE
    assert [connection.is_open for connection in table.connections] == [False, False]


def test_a_server_that_does_not_answer_in_time_is_not_asked_again() -> None:
    table = FakeMap(connect="start")
    table.open()
    table.errors_to_come = [DriverError(Trouble.SLOW)]
    assert table.lookup("k") == UNAVAILABLE
    assert [connection.is_open for connection in table.connections] == [False]


def test_an_error_that_the_server_answers_leaves_the_connection() -> None:
    table = FakeMap()
    table.errors_to_come = [DriverError(Trouble.REFUSED)]
    assert table.lookup("k") == Reply.temp_fail("map m: the query failed")
    assert table.lookup("k") == Reply.ok("k from a")
    assert len(table.connections) == 1


@pytest.mark.parametrize("error", [TimeoutError(), KeyError("bug")])
def test_a_lookup_that_is_interrupted_gives_its_connection_up(error: Exception) -> None:
    table = FakeMap()
    table.errors_to_come = [error]
    with pytest.raises(type(error)):
        table.lookup("k")
    assert not table.connections[0].is_open
    assert table.lookup("k") == Reply.ok("k from a")


def test_a_reply_that_the_type_chose_leaves_the_connection() -> None:
    table = FakeMap()
    table.errors_to_come = [LookupFailedError(Reply.perm_fail("no"))]
    assert table.lookup("k") == Reply.perm_fail("no")
    assert table.connections[0].is_open


def test_while_a_server_is_down_the_answer_is_given_at_once_and_the_pauses_grow(clock: Clock) -> None:
    table = FakeMap()
    table.up.clear()
    pauses = []
    for _ in range(12):
        attempts = len(table.dialed)
        assert table.lookup("k") == UNAVAILABLE
        assert len(table.dialed) == attempts + 1
        # Again and again, and nobody is dialed.
        assert table.lookup("k") == table.lookup("k") == UNAVAILABLE
        assert len(table.dialed) == attempts + 1
        pauses.append(next_attempt(table) - clock.now)
        clock.now = next_attempt(table)
    assert pauses[:2] == [about(FIRST_PAUSE), about(FIRST_PAUSE * 2)]
    assert pauses[-1] == about(LONGEST_PAUSE)
    assert len(set(pauses[2:])) > 1


def test_when_the_server_is_back_so_are_the_answers_and_the_next_pause_is_short(clock: Clock) -> None:
    table = FakeMap()
    for _ in range(2):
        table.up.clear()
        for _ in range(5):
            table.lookup("k")
            clock.now = max(clock.now, next_attempt(table))
        table.up.add("a")
        assert table.lookup("k") == Reply.ok("k from a")
        table.errors_to_come = [DriverError(Trouble.SLOW)]
        table.lookup("k")
        assert next_attempt(table) == 0
        table.up.clear()
        table.lookup("k")
        assert next_attempt(table) - clock.now == about(FIRST_PAUSE)
        clock.now = next_attempt(table)
        table.up.add("a")
        table.lookup("k")


def test_a_connection_too_many_is_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    table = FakeMap()
    table.up.clear()
    monkeypatch.setattr(table.own_link.standing, "serves_others", lambda: True)
    assert table.lookup("k") == UNAVAILABLE
    table.up.add("a")
    assert table.lookup("k") == Reply.ok("k from a")


def test_the_answer_to_one_key_that_breaks_is_no_outage_until_that_to_another_does(clock: Clock) -> None:
    table = FakeMap()

    def breaks(key: str) -> None:
        table.errors_to_come = [DriverError(Trouble.LOST)] * (1 + (table.own_link.connection is not None))
        assert table.lookup(key) == UNAVAILABLE
        assert table.errors_to_come == []

    table.lookup("k")
    for _ in range(3):
        breaks("bad")
    assert next_attempt(table) == 0
    assert table.lookup("k") == Reply.ok("k from a")
    breaks("worse")
    assert next_attempt(table) == 0
    breaks("bad")
    assert next_attempt(table) > 0


def test_a_key_that_twice_gets_no_answer_in_time_is_an_outage(clock: Clock) -> None:
    table = FakeMap()
    table.errors_to_come = [DriverError(Trouble.SLOW)] * 2
    table.lookup("k")
    assert next_attempt(table) == 0
    table.lookup("k")
    assert next_attempt(table) > 0


def test_the_next_host_is_tried_when_one_is_down() -> None:
    table = FakeMap(hosts=["a", "b", "c"], timeout=6)
    table.up = {"c"}
    assert table.lookup("k") == Reply.ok("k from c")
    assert [host for host, _ in table.dialed] == ["a", "b", "c"]


def test_the_time_to_connect_is_shared_among_the_hosts(clock: Clock) -> None:
    table = FakeMap(hosts=["a", "b", "c"], timeout=6)
    table.up = {"c"}
    table.lookup("k")
    # No time passed, so each gets its part of all of it.
    assert [timeout for _, timeout in table.dialed] == pytest.approx([2, 3, 6])


def test_a_dead_host_uses_up_its_share_and_no_more(clock: Clock) -> None:
    class SlowMap(FakeMap):
        def dial(self, host: str, timeout: float) -> Connection:
            clock.now += timeout
            return super().dial(host, timeout)

    table = SlowMap(hosts=["a", "b", "c"], timeout=6)
    table.up.clear()
    begin = clock.now
    assert table.lookup("k") == UNAVAILABLE
    assert clock.now - begin == pytest.approx(6)


@pytest.mark.parametrize("trouble", [Trouble.LOST, Trouble.SLOW])
def test_a_host_that_fails_a_lookup_is_left_for_the_next(clock: Clock, trouble: Trouble) -> None:
    table = FakeMap(hosts=["a", "b"])
    table.errors_to_come = [None, DriverError(trouble)]
    assert table.lookup("k") == Reply.ok("k from a")
    table.lookup("k")
    clock.now += FIRST_PAUSE
    assert table.lookup("k") == Reply.ok("k from b")


def test_a_host_that_answers_is_kept_when_the_first_is_back() -> None:
    table = FakeMap(hosts=["a", "b"])
    table.up = {"b"}
    table.lookup("k")
    table.up = {"a", "b"}
    assert table.lookup("k") == Reply.ok("k from b")


def test_the_log_tells_why_and_the_client_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    table = FakeMap(hosts=["a", "b"])
    table.up.clear()
    assert table.lookup("k") == UNAVAILABLE
    assert "map m: cannot connect: a: refused; b: refused; next attempt in 0.1 s" in caplog.text


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"timeout": 0}, r"maps\.m\.timeout: 0 is not accepted here; expected a time above 0"),
        ({"connect": "never"}, r"maps\.m\.connect: 'never' is not accepted"),
        ({"hosts": "a"}, r"maps\.m\.hosts: 'a' is not accepted"),
        ({"hosts": []}, r"maps\.m\.hosts: \[\] is not accepted here; expected a list of at least one host"),
    ],
)
def test_wrong_settings_are_errors(table: dict[str, object], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        FakeMap(**table)
