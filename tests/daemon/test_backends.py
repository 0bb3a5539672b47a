"""What the workers of a server share about backends: taken from whom it belongs to, given back by whoever dies."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import pytest

from prefork_socketmap.daemon import backends
from prefork_socketmap.daemon.backends import Memory, WorkerBackends
from prefork_socketmap.maps.backend import Link
from tests.waiting import eventually

DEADLINE = 30.0
BACKEND = ("FakeMap", ("127.0.0.1:1",), "postfix", "hunter2")
LABEL = "fake postfix@127.0.0.1:1"


class FakeConnection:
    def __init__(self) -> None:
        self.is_open = True


class Owner:
    """A map, as far as a link knows it."""

    errors: ClassVar[tuple[type[Exception], ...]] = (OSError,)

    def hang_up(self, connection: FakeConnection) -> None:
        connection.is_open = False


class Worker:
    """What a worker has, in whichever process it is made: a link to the backend, without a server."""

    def __init__(self, memory: Memory, workers: int, identity: object = BACKEND) -> None:
        self.backends = WorkerBackends(memory, workers)
        self.link: Link[FakeConnection] = self.backends.links.link(Owner(), identity, (), ["127.0.0.1:1"], LABEL)
        self.link.max_idle = 3600.0

    def connect(self, most: int) -> bool:
        """Get a connection if there may be one more; return whether there is one now."""
        if not self.link.take_slot(most):
            return False
        self.link.opened(FakeConnection())
        return True

    def has_connection(self) -> bool:
        return self.link.connection is not None

    def begin(self) -> None:
        self.link.begin()

    def end(self) -> None:
        self.link.end()

    def ask_for_slot(self, most: int) -> float:
        return self.link.standing.ask_for_slot(most)

    def enter(self, share: float) -> bool:
        return self.link.standing.enter(share)

    def defers(self, reserve: int) -> bool:
        return self.backends.defers(reserve)

    def serves_others(self) -> bool:
        return self.link.standing.serves_others()

    def take_turn(self) -> bool:
        return self.link.standing.take_turn()

    def note_outage(self) -> float:
        return self.link.health.note_outage()

    def refuses(self) -> bool:
        return bool(self.link.health.cells.trouble[0]) and self.link.health.refuses()

    def note_whole_answer(self) -> None:
        self.link.health.note_whole_answer()

    def set_max_idle(self, seconds: float) -> None:
        self.link.max_idle = seconds
        self.backends.links.look()


class Peer:
    """A ``Worker`` in a process of its own, which does what it is told to."""

    def __init__(self, memory: Memory, workers: int, identity: object) -> None:
        fork = multiprocessing.get_context("fork")
        self._here, there = fork.Pipe()
        self._process = fork.Process(target=_serve, args=(there, memory, workers, identity), daemon=True)
        self._process.start()
        there.close()
        self("has_connection")  # it is ready

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    def __call__(self, method: str, *arguments: object) -> Any:
        """Have a method called there; return its result."""
        self._here.send((method, arguments))
        assert self._here.poll(DEADLINE), f"no answer to {method}"
        return self._here.recv()

    def kill(self) -> None:
        """Kill it, without a chance to give anything back."""
        self._process.kill()
        self._process.join(DEADLINE)


def _serve(connection: Connection, memory: Memory, workers: int, identity: object) -> None:
    worker = Worker(memory, workers, identity)
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(worker, method)(*arguments))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    memory = Memory.make(tmp_path / "backends")
    yield memory
    os.close(memory.board)
    os.close(memory.private)


@pytest.fixture
def without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a slot be used again at once."""
    monkeypatch.setattr(backends, "_SECOND", 0.0)
    monkeypatch.setattr(backends, "_BREATH", 0.0)


StartPeer = Callable[..., Peer]


@pytest.fixture
def start(memory: Memory) -> Iterator[StartPeer]:
    """Return what starts a peer."""
    peers: list[Peer] = []

    def start(workers: int = 8, identity: object = BACKEND) -> Peer:
        peers.append(Peer(memory, workers, identity))
        return peers[-1]

    yield start
    for peer in peers:
        peer.kill()


def wait_until_connected(peer: Peer, most: int) -> None:
    """Have *peer* wait for a connection as a lookup does."""

    def connects() -> bool:
        if peer("connect", most):
            return True
        peer("ask_for_slot", most)
        return False

    eventually(connects, within=DEADLINE)


# Connections.


def test_all_workers_together_have_no_more_connections_than_there_may_be(start: StartPeer) -> None:
    assert [start()("connect", 3) for _ in range(5)] == [True, True, True, False, False]


def test_backends_do_not_share_connections(start: StartPeer) -> None:
    assert start()("connect", 1)
    assert start(identity=(*BACKEND[:-1], "another password"))("connect", 1)
    assert not start()("connect", 1)


@pytest.mark.usefixtures("without_rest")
def test_the_connection_of_a_worker_that_was_killed_is_free_at_once(start: StartPeer) -> None:
    holder, other = start(), start()
    assert holder("connect", 1)
    holder("begin")
    assert not other("connect", 1)
    holder.kill()
    assert other("connect", 1)


def test_an_idle_connection_is_given_up_for_a_worker_that_needs_one(start: StartPeer) -> None:
    holder, other = start(), start()
    assert holder("connect", 1)
    wait_until_connected(other, 1)
    assert not holder("has_connection")


@pytest.mark.usefixtures("without_rest")
def test_a_connection_in_use_is_given_up_after_the_lookup_and_not_before(start: StartPeer) -> None:
    holder, other = start(), start()
    holder("begin")
    assert holder("connect", 1)
    other("ask_for_slot", 1)
    assert not other("connect", 1)
    assert holder("has_connection")
    holder("end")
    assert not holder("has_connection")
    assert other("connect", 1)


def test_the_connection_that_has_not_been_used_for_longest_is_given_up(start: StartPeer) -> None:
    idle, busy, other = start(), start(), start()
    assert idle("connect", 2)
    assert busy("connect", 2)

    def connects() -> bool:
        for method in ("begin", "end"):
            busy(method)
        if other("connect", 2):
            return True
        other("ask_for_slot", 2)
        return False

    eventually(connects, within=DEADLINE)
    assert (idle("has_connection"), busy("has_connection")) == (False, True)


@pytest.mark.usefixtures("without_rest")
def test_who_has_waited_longest_is_first(start: StartPeer) -> None:
    holder, first, second = start(), start(), start()
    holder("begin")
    assert holder("connect", 1)
    for peer in (first, second):
        assert not peer("connect", 1)
        peer("ask_for_slot", 1)
    holder("end")
    assert not second("connect", 1)
    assert first("connect", 1)


def test_one_who_waits_and_does_not_move_holds_nobody_up(start: StartPeer) -> None:
    holder, stuck, other = start(), start(), start()
    assert holder("connect", 1)
    stuck("ask_for_slot", 1)
    os.kill(stuck.pid, signal.SIGSTOP)
    wait_until_connected(other, 1)


def test_no_more_connections_are_opened_in_a_second_than_there_may_be(start: StartPeer) -> None:
    peer = start()
    assert peer("connect", 2)
    begin = time.monotonic()
    opened = 1
    while time.monotonic() < begin + 3 * backends._SECOND:
        peer("set_max_idle", 0.0)  # closes it
        opened += peer("connect", 2)
    assert 4 <= opened <= 2 * (1 + (time.monotonic() - begin) / backends._SECOND)


def test_a_connection_that_nobody_uses_is_closed(start: StartPeer, memory: Memory) -> None:
    peer = start()
    assert peer("connect", 1)
    peer("set_max_idle", 0.2)
    # It is told nothing more: a timer wakes it.
    eventually(lambda: [each.connections for each in read(memory)] == [0], within=DEADLINE)
    assert not peer("has_connection")


@pytest.mark.usefixtures("without_rest")
def test_a_worker_without_a_connection_leaves_calls_to_those_that_have_one(start: StartPeer) -> None:
    holder, other = start(), start()
    assert holder("connect", 1)
    assert not other("connect", 1)
    assert not other("defers", 2)  # nobody has asked it for any
    other("ask_for_slot", 1)
    # It has one, or the holder still has; whoever has not is the one that defers, while another one is there.
    wait_until_connected(other, 1)
    assert (holder("defers", 2), other("defers", 2)) == (True, False)
    assert not holder("defers", 1)


def test_a_call_that_comes_back_is_taken(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = WorkerBackends(memory, 8)
    worker.note_lack(True)
    now = time.monotonic()
    monkeypatch.setattr(backends, "monotonic", lambda: now)
    assert [worker.defers(5) for _ in range(2)] == [True, False]
    now += backends._ROUND
    assert worker.defers(5)


@pytest.mark.usefixtures("without_rest")
def test_who_gets_a_connection_again_leaves_calls_to_nobody(start: StartPeer) -> None:
    holder, other = start(), start()
    assert holder("connect", 1)
    wait_until_connected(other, 1)
    other.kill()
    wait_until_connected(holder, 1)
    assert not holder("defers", 2)


# Who is held by lookups.


def test_lookups_at_one_backend_hold_no_more_than_their_share_of_the_workers(start: StartPeer) -> None:
    peers = [start(workers=8) for _ in range(6)]
    assert [peer("enter", 0.5) for peer in peers] == [True] * 4 + [False] * 2
    assert start(identity="another")("enter", 0.5)


def test_a_single_worker_is_enough_for_a_lookup(start: StartPeer) -> None:
    assert start(workers=1)("enter", 0.1)


def test_a_worker_that_was_killed_in_a_lookup_is_not_counted_any_more(start: StartPeer) -> None:
    peers = [start(workers=4) for _ in range(3)]
    assert [peer("enter", 0.5) for peer in peers] == [True, True, False]
    peers[0].kill()
    eventually(lambda: peers[2]("enter", 0.5), within=DEADLINE)


def test_a_worker_is_not_taken_for_one_that_was_killed_and_had_its_number(
    start: StartPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkerBackends, "span", 2)
    peers = [start(workers=2) for _ in range(2)]
    assert peers[0]("enter", 0.5)
    peers[0].kill()
    start(workers=2, identity="another")  # it has the number, and nothing to do with the backend
    assert peers[1]("enter", 0.5)


# Health.


def test_what_one_finds_out_all_know(start: StartPeer) -> None:
    one, other = start(), start()
    one("note_outage")
    assert other("refuses")
    one("note_whole_answer")
    assert not other("refuses")


def test_one_tries_and_the_others_do_not_until_it_has_died(start: StartPeer) -> None:
    peers = [start() for _ in range(4)]
    peers[0]("note_outage")
    (prober,) = eventually(lambda: [peer for peer in peers if not peer("refuses")], within=DEADLINE)
    assert [peer("refuses") for peer in peers if peer is not prober] == [True] * 3
    prober.kill()
    assert sum(not peer("refuses") for peer in peers if peer is not prober) == 1


def test_who_cannot_connect_while_others_are_served_takes_it_for_trouble_of_its_own(start: StartPeer) -> None:
    served, other = start(), start()
    assert not other("serves_others")
    assert served("connect", 2)
    eventually(lambda: [served(method) for method in ("begin", "end")] and other("serves_others"), within=DEADLINE)
    assert not served("serves_others")
    served.kill()
    assert not other("serves_others")


# Memory.


def read(memory: Memory) -> list[backends.BackendReport]:
    assert memory.path
    return backends.read(memory.path)


def test_a_backend_is_shown_while_a_worker_has_it(start: StartPeer, memory: Memory) -> None:
    peer = start()
    assert peer("connect", 5)
    assert read(memory) == [backends.BackendReport(LABEL, 1, None)]
    peer("note_outage")
    assert [each.is_up for each in read(memory)] == [False]
    peer.kill()
    assert read(memory) == []


def test_no_secret_and_no_digest_of_one_is_where_others_can_read_it(start: StartPeer, memory: Memory) -> None:
    start()
    assert memory.path
    board = memory.path.read_bytes()
    private = os.pread(memory.private, backends._PRIVATE_SIZE, 0)
    digest = private[backends._DIGESTS : backends._DIGESTS + backends._DIGEST_SIZE]
    assert digest != bytes(len(digest))
    assert b"hunter2" not in board + private
    assert digest not in board


def test_there_is_room_for_new_backends_when_no_worker_has_the_old_ones(start: StartPeer, memory: Memory) -> None:
    for number in range(backends.MAX_BACKENDS + 3):
        peer = start(identity=number)
        assert peer("connect", 1)
        assert len(read(memory)) == 1
        peer.kill()


def test_a_backend_for_which_there_is_no_room_is_asked_all_the_same(memory: Memory) -> None:
    worker = WorkerBackends(memory, 8)
    standings = [worker.standing(number, "x") for number in range(backends.MAX_BACKENDS + 1)]
    assert [type(standing).__name__ for standing in standings[-2:]] == ["SharedStanding", "Private"]


@pytest.mark.parametrize("fill", ["ones", "random", "huge times", "not a number"])
def test_whatever_a_captured_worker_writes_others_go_on(start: StartPeer, memory: Memory, fill: str) -> None:
    peers = [start() for _ in range(2)]
    data = {
        "ones": b"\xff" * backends._PRIVATE_SIZE,
        "random": random.Random(1).randbytes(backends._PRIVATE_SIZE),
        "huge times": (b"\0\0\0\0\0\0\xf0\x7e" * backends._PRIVATE_SIZE)[: backends._PRIVATE_SIZE],
        "not a number": (b"\0\0\0\0\0\0\xf8\x7f" * backends._PRIVATE_SIZE)[: backends._PRIVATE_SIZE],
    }[fill]
    begin = backends._BACKENDS
    os.pwrite(memory.private, data[: 2 * backends._BACKEND_SIZE], begin)
    os.pwrite(memory.board, data[: backends._BOARD_SIZE - 4096], 4096)
    for _ in range(2):
        for peer in peers:
            assert not peer("refuses")
            wait_until_connected(peer, 2)
            eventually(lambda peer=peer: peer("enter", 0.25), within=DEADLINE)  # type: ignore[misc]
            peer("note_outage")
            peer("note_whole_answer")
        read(memory)
    assert start(identity="new")("connect", 1)


def test_an_upgrade_goes_on_with_what_is_known(memory: Memory, start: StartPeer) -> None:
    start()("note_outage")
    successor = Memory.resume(memory.path, os.dup(memory.board), os.dup(memory.private))
    assert successor
    worker = Worker(successor, 8)
    assert worker.link.health.cells.since[0] > 0
    assert memory.descriptors().keys() == set(backends.DESCRIPTORS)


def test_a_board_that_the_disk_has_no_room_for_is_named_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(fd: int, begin: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fill)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/backends'"):
        Memory.make(tmp_path / "backends")
    assert list(tmp_path.iterdir()) == []


def test_memory_of_another_layout_is_not_used(memory: Memory) -> None:
    os.pwrite(memory.board, b"\0" * 8, 8)
    assert Memory.resume(memory.path, memory.board, memory.private) is None
    assert read(memory) == []
