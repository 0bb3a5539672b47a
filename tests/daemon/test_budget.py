"""What is worth a line: repetitions are counted, by what the server knows of them; and a minute has so many bytes."""

from __future__ import annotations

import gc
import io
import logging
import tracemalloc
import weakref
from collections.abc import Iterator

import pytest

from prefork_socketmap.daemon.budget import Budget, CountingHandler
from prefork_socketmap.daemon.line import LineFormatter
from prefork_socketmap.socketmap.netstring import FramingError

# Known to nobody, or pytest would keep the records.
logger = logging.Logger("prefork_socketmap.worker")


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def handler(stream: io.StringIO, clock: Clock) -> Iterator[CountingHandler]:
    """Writes to ``stream`` what is logged when repetitions are counted for 60 seconds of ``clock``."""
    target = logging.StreamHandler(stream)
    target.setFormatter(LineFormatter())
    handler = CountingHandler(target, 60, clock)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture
def counted(stream: io.StringIO, handler: CountingHandler) -> io.StringIO:
    return stream


def test_what_is_no_warning_is_counted_when_it_asks_for_that(counted: io.StringIO, clock: Clock) -> None:
    for _ in range(3):
        logger.info("as usual")
        logger.info("[%s]: closed", "192.0.2.1", extra={"counted": True})
    clock.now = 61
    logger.info("later")
    lines = counted.getvalue().splitlines()
    assert lines == [
        *["as usual", "[192.0.2.1]: closed"],
        *["as usual"] * 2,
        "2 more times: [192.0.2.1]: closed",
        "later",
    ]


def test_an_error_that_repeats_is_logged_once_and_then_counted(counted: io.StringIO, clock: Clock) -> None:
    for number in range(5):
        logger.error("map %s: %r: %s", "m", f"key{number}", OSError("down"))
        clock.now += 1
    assert counted.getvalue() == "error: map m: 'key0': down\n"
    clock.now = 61
    logger.info("something else")
    assert counted.getvalue().splitlines()[1:] == ["error: 4 more times: map m: 'key0': down", "something else"]


def test_an_error_that_comes_back_after_the_interval_is_logged_again(counted: io.StringIO, clock: Clock) -> None:
    logger.error("map %s: down", "m")
    clock.now = 61
    logger.error("map %s: down", "m")
    assert counted.getvalue() == "error: map m: down\n" * 2


def test_errors_of_different_maps_or_kinds_do_not_hide_each_other(counted: io.StringIO) -> None:
    logger.error("map %s: %s", "m", OSError("down"), extra={"map": "m"})
    logger.error("map %s: %s", "n", OSError("down"), extra={"map": "n"})
    logger.error("map %s: %s", "m", ValueError("wrong"), extra={"map": "m"})
    logger.warning("map %s: %s", "m", OSError("down"), extra={"map": "m"})
    logger.error("another text of map %s: %s", "m", OSError("down"), extra={"map": "m"})
    assert counted.getvalue().count("\n") == 5


def test_different_names_that_clients_ask_for_are_one_failing_default_map(counted: io.StringIO) -> None:
    for number in range(1000):
        try:
            raise KeyError(number)
        except KeyError:
            logger.exception("map <%s>, key <%s>: lookup failed", f"name{number}", "key", extra={"map": "(default)"})
    first, *rest = counted.getvalue().splitlines()
    assert first == "error: map <name0>, key <key>: lookup failed"
    assert all(line.startswith("  ") for line in rest)


def test_malformed_requests_from_any_number_of_addresses_are_one_line(counted: io.StringIO) -> None:
    for number in range(2000):
        error = FramingError(f"not a length: {number}")
        logger.warning("%s: malformed request: %s", f"127.0.{number // 250}.{number % 250}", error)
    assert counted.getvalue() == "warning: 127.0.0.0: malformed request: not a length: 0\n"


def test_what_is_no_warning_is_always_logged(counted: io.StringIO) -> None:
    logger.info("lookup")
    logger.info("lookup")
    assert counted.getvalue() == "lookup\n" * 2


def test_counts_that_are_open_are_told_at_the_end(counted: io.StringIO, handler: CountingHandler) -> None:
    logger.error("down")
    logger.error("down")
    handler.close()
    assert counted.getvalue() == "error: down\nerror: 1 more times: down\n"


def test_counts_can_be_told_when_nothing_else_is_logged(
    counted: io.StringIO, handler: CountingHandler, clock: Clock
) -> None:
    assert handler.look() == float("inf")
    logger.error("down")
    assert handler.look() == float("inf")
    logger.error("down")
    assert handler.look() == 60
    clock.now = 60
    assert handler.look() == float("inf")
    assert counted.getvalue() == "error: down\nerror: 1 more times: down\n"


def test_a_process_that_was_forked_off_does_not_tell_its_parents_counts(
    counted: io.StringIO, handler: CountingHandler
) -> None:
    logger.error("down")
    logger.error("down")
    handler.forget()
    handler.close()
    assert counted.getvalue() == "error: down\n"


def test_texts_that_code_of_a_map_varies_take_no_memory(counted: io.StringIO, handler: CountingHandler) -> None:
    logger.warning("x" * 99_000)
    tracemalloc.start()
    for number in range(3000):
        logger.warning(f"{number} " + "x" * 99_000)
        counted.truncate(counted.seek(0))
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 3_000_000
    assert len(handler._repetitions) <= 500


def test_long_names_and_keys_take_no_memory(counted: io.StringIO) -> None:
    tracemalloc.start()
    for number in range(1000):
        logger.error("map <%s>, key <%s>: lookup failed", f"{number}" + "n" * 99_000, "k" * 99_000)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 300_000


def test_no_frame_and_none_of_its_objects_is_kept_alive(counted: io.StringIO) -> None:
    class Held:
        """Something that a lookup holds, such as a connection."""

    def fail() -> weakref.ref[Held]:
        held = Held()
        try:
            raise ValueError(held)
        except ValueError as error:
            logger.exception("lookup failed: %s", error)
        return weakref.ref(held)

    reference = fail()
    gc.collect()
    assert reference() is None


def test_a_minute_has_its_bytes_and_then_the_lines_that_were_held_back_are_told(clock: Clock) -> None:
    budget = Budget(100, clock)
    assert budget.settle() == 0
    assert budget.admits(1, 60)
    assert not budget.admits(3, 60)
    assert budget.admits(1, 40)
    assert not budget.admits(1, 1)
    assert budget.due == 60
    assert budget.settle() == 0
    clock.now = 60
    assert budget.settle() == 4
    assert budget.settle() == 0
    assert budget.due == float("inf")
    assert budget.admits(1, 100)


def test_one_record_passes_however_long_it_is(clock: Clock) -> None:
    budget = Budget(100, clock)
    budget.settle()
    assert budget.admits(1, 1000)
    assert not budget.admits(1, 1)


def test_a_budget_of_0_is_none(clock: Clock) -> None:
    budget = Budget(0, clock)
    budget.settle()
    assert all(budget.admits(1, 10**6) for _ in range(1000))
