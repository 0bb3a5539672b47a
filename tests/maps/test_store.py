"""Answers that processes share: nothing is lost, blocked or wrong, whatever becomes of those who write."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from prefork_socketmap.maps import page, store
from prefork_socketmap.maps.page import Entry
from prefork_socketmap.maps.store import Store
from tests.waiting import eventually

WITHIN = 30
KILLS = 300

_forking = multiprocessing.get_context("fork")


def entry(value: bytes, stored: float = 1.0, kept_until: float = 1e9) -> Entry:
    return Entry(0, value, stored, kept_until, kept_until)


def put(table: Store, key: bytes, value: bytes) -> bool:
    return table.put(key, entry(value), table.purges)


def value_of(table: Store, key: bytes) -> bytes | None:
    found = table.get(key)
    return found and found.value


@contextlib.contextmanager
def opened(pages: int, identity: bytes = b"") -> Iterator[Store]:
    fd = store.create("test", pages)
    try:
        yield Store(store.shared(fd, identity))
    finally:
        os.close(fd)


@pytest.fixture
def table() -> Iterator[Store]:
    with opened(200) as made:
        yield made


def places(table: Store) -> range:
    return table._places()


@contextlib.contextmanager
def process(work: Callable[[], object]) -> Iterator[int]:
    """Do *work* in a process of its own, until it is killed in the end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# What it holds.


def test_what_was_put_is_there_until_it_is_replaced_or_removed(table: Store) -> None:
    assert table.get(b"key") is None
    assert put(table, b"key", b"one")
    assert table.get(b"key") == entry(b"one")
    assert put(table, b"key", b"two")
    assert (value_of(table, b"key"), table.answers) == (b"two", 1)
    assert table.remove(b"key")
    assert not table.remove(b"key")
    assert (table.get(b"key"), table.answers) == (None, 0)


def test_all_answers_that_there_is_room_for_are_there() -> None:
    with opened(store.pages_for(10_000)) as table:
        keys = [b"someone%d@example.com" % number for number in range(10_000)]
        for key in keys:
            assert put(table, key, b"mailbox of " + key)
        assert [key for key in keys if value_of(table, key) != b"mailbox of " + key] == []
        assert table.answers == 10_000
        assert dict(table).keys() == set(keys)
        assert table.clear() == 10_000
        assert list(table) == []
        assert table.answers == 0


def test_it_never_grows_and_the_least_recently_used_goes_first(table: Store) -> None:
    size = os.fstat(table._fd).st_size
    for number in range(20_000):
        put(table, b"key%d" % number, b"x" * (number % 200))
        if number % 500 == 0:
            put(table, b"used", b"value") if not number else None
        assert value_of(table, b"used") == b"value"
    assert os.fstat(table._fd).st_size == size
    assert value_of(table, b"key19999") is not None
    assert value_of(table, b"key0") is None
    assert table.answers == len(dict(table))


def test_what_has_expired_goes_before_anything_else() -> None:
    with opened(1) as table:
        put(table, b"kept", b"x" * 900)
        for number in range(100):
            table.put(b"short%d" % number, entry(b"x" * 900, stored=number, kept_until=number + 0.5), 0)
        assert value_of(table, b"kept") == b"x" * 900


@pytest.mark.parametrize("size", [0, 1, 1024, 1025, 5000, 50_000])
def test_a_value_of_any_size_is_there_again(table: Store, size: int) -> None:
    values = [os.urandom(size), os.urandom(size), os.urandom(max(size - 1, 0)), b"short"]
    for value in values:
        assert put(table, b"key", value)
        assert value_of(table, b"key") == value
    assert [(key, found.value) for key, found in table] == [(b"key", b"short")]
    assert table.answers == 1


def test_a_value_that_would_take_much_of_the_whole_is_not_remembered(table: Store) -> None:
    assert not put(table, b"key", b"x" * 52_000)
    assert not put(table, b"k" * 1001, b"x")
    assert list(table) == []


def test_a_large_value_that_has_lost_a_part_is_not_there(table: Store) -> None:
    put(table, b"key", os.urandom(5000))
    for place in places(table):
        data = os.pread(table._fd, page.SIZE, place)
        if any(not block.is_answer for block in page.split(data)):
            os.pwrite(table._fd, bytes(page.SIZE), place)
            break
    assert table.get(b"key") is None


def test_answers_that_depend_on_something_else_are_not_found(table: Store) -> None:
    other = Store(store.shared(table._fd, b"other"))
    put(table, b"key", b"one")
    assert other.get(b"key") is None
    assert list(other) == []
    put(other, b"key", b"two")
    assert (value_of(table, b"key"), value_of(other, b"key")) == (b"one", b"two")
    assert [found.value for _, found in other] == [b"two"]
    assert other.clear() == 2


@pytest.mark.parametrize("identity", [b"\0" * 15 + b"x", b"x" + b"\0" * 15])
def test_what_the_answers_depend_on_is_noted_in_the_file(table: Store, identity: bytes) -> None:
    assert store.published(table._fd) == b""
    store.publish(store.shared(table._fd, identity))
    assert store.published(table._fd) == identity


def test_where_a_key_stands_is_a_secret_of_the_file() -> None:
    """Or somebody could choose keys that all meet in the page of another one."""

    def place_of(key: bytes) -> int:
        with opened(1000) as table:
            put(table, key, b"value")
            return next(place for place in places(table) if any(os.pread(table._fd, 16, place)))

    assert len({place_of(b"key") for _ in range(8)}) > 1


def test_what_was_asked_for_before_a_purge_is_not_put_after_it(table: Store) -> None:
    before = table.purges
    table.remove(b"another key")
    assert not table.put(b"key", entry(b"old"), before)
    assert table.get(b"key") is None


# Those who write.


def test_a_process_that_is_killed_in_a_write_loses_blocks_and_breaks_nothing() -> None:
    with opened(2000) as table:
        _kill_writers(table)


def _kill_writers(table: Store) -> None:
    keys = [b"key%d" % number for number in range(300)]
    values = (b"one" * 30, b"two" * 600)  # within a page, and in parts
    for key in keys:
        put(table, key, values[0])
    for number in range(KILLS):
        reader, writer = os.pipe()

        def write(writer: int = writer) -> None:
            for index in itertools.count():
                put(table, keys[index % len(keys)], random.choice(values))
                os.write(writer, b".")

        with process(write):
            left = random.randrange(1, 30)
            while left:
                left -= len(os.read(reader, left))
        os.close(reader)
        os.close(writer)
        assert put(table, b"another%d" % (number % 10), b"value"), "a lock is held by nobody"
        for key in keys:
            assert value_of(table, key) in values
    assert dict(table).keys() >= set(keys)


def test_processes_that_write_to_the_same_page_lose_nothing_of_each_other() -> None:
    with opened(1) as table:

        def write(first: int) -> None:
            for number in range(first, first + 10):
                while not put(table, b"%d" % number, b"value"):
                    pass

        for _ in range(20):
            table.clear()
            writers = [_forking.Process(target=write, args=[first]) for first in (0, 10, 20)]
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join(WITHIN)
            assert dict(table).keys() == {b"%d" % number for number in range(30)}
            assert table.answers == 30


def test_who_reads_while_others_write_sees_every_value_whole(table: Store) -> None:
    values = [bytes([number]) * (number * 17) for number in range(1, 250)]
    keys = [b"a", b"b", b"c"]
    for key in keys:
        put(table, key, values[0])

    def write() -> NoReturn:
        while True:
            for value in values:
                put(table, random.choice(keys), value)

    with process(write):
        seen: set[bytes] = set()
        deadline = time.monotonic() + WITHIN
        while len(seen) < 100 and time.monotonic() < deadline:
            for key in keys:
                # What is being written may be missed once, not twice.
                found = next(filter(None, (value_of(table, key) for _ in range(20))))
                assert found in values
                seen.add(found)
        assert len(seen) >= 100


def test_somebody_who_keeps_all_locks_keeps_nobody_from_reading_and_from_going_on(table: Store) -> None:
    put(table, b"key", b"value")
    reader, writer = os.pipe()

    def lock() -> None:
        fcntl.lockf(table._fd, fcntl.LOCK_EX)
        os.write(writer, b".")
        signal.pause()

    with process(lock):
        os.read(reader, 1)
        assert value_of(table, b"key") == b"value"
        assert not put(table, b"key", b"two")
        with pytest.raises(OSError, match="keeps others from writing"):
            table.clear()
    os.close(reader)
    os.close(writer)
    assert put(table, b"key", b"two")


@pytest.mark.parametrize("leaves_a_child", [False, True])
def test_the_right_to_ask_ends_with_the_process_even_if_that_leaves_a_child(
    table: Store, *, leaves_a_child: bool
) -> None:
    reader, writer = os.pipe()

    def ask() -> None:
        table.flight(b"key").take()
        child = os.fork() if leaves_a_child else -1
        if child:
            os.write(writer, b"%d\n" % child)
        signal.pause()

    with process(ask):
        child = int(os.read(reader, 100))
        assert not table.flight(b"key").take()
        assert table.flight(b"another").take()
    with table.flight(b"key") as flight:
        eventually(flight.take, WITHIN, "the right to ask")
    if leaves_a_child:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    os.close(writer)


# What is not whole.


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.binary(max_size=page.SIZE), st.integers(0, page.SIZE))
def test_rubbish_is_not_there_and_no_reason_to_fail(rubbish: bytes, place: int) -> None:
    with opened(1) as table:
        for number in range(20):
            put(table, b"key%d" % number, b"value%d" % number)
        os.pwrite(table._fd, rubbish[: page.SIZE - place], places(table)[0] + place)
        for number in range(20):
            assert value_of(table, b"key%d" % number) in (None, b"value%d" % number)
        assert all(found.value == key.replace(b"key", b"value") for key, found in table)
        assert put(table, b"key", b"value")
        assert value_of(table, b"key") == b"value"


def test_half_a_page_has_what_is_whole_in_it() -> None:
    """A machine that crashes may have written so much of a page, or so little."""
    with opened(1) as table:
        for number in range(30):
            put(table, b"key%d" % number, b"value")
        before = os.pread(table._fd, page.SIZE, places(table)[0])
        put(table, b"new", b"a longer value than those of before")
        after = os.pread(table._fd, page.SIZE, places(table)[0])
        for torn in range(0, page.SIZE, 7):
            os.pwrite(table._fd, after[:torn] + before[torn:], places(table)[0])
            found = {key: each.value for key, each in table}
            assert set(found.values()) <= {b"value", b"a longer value than those of before"}


def test_a_file_that_was_made_shorter_has_nothing_in_it_and_is_filled_again() -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, store.file_size(10))
    store.lay_out(fd, "test", 10)
    table = Store(store.shared(fd))
    put(table, b"key", b"value")
    os.ftruncate(fd, 0)
    assert table.get(b"key") is None
    assert list(table) == []
    assert put(table, b"key", b"value")
    assert value_of(table, b"key") == b"value"
    os.close(fd)


def test_nobody_can_change_the_size_of_a_store_in_memory(table: Store) -> None:
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(table._fd, size)
