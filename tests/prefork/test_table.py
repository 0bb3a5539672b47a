"""The connection table: who speaks is handed to one worker, what waits is kept, and its memory is given back."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
from collections.abc import Iterator

import pytest

from prefork_socketmap.prefork.channel import Given
from prefork_socketmap.prefork.connections import Connections
from prefork_socketmap.prefork.scoreboard import Scoreboard
from prefork_socketmap.prefork.table import BUFFER_LIMIT, Buffers, ConnectionTable, Stage, TableState
from tests.processes import descriptors

FIRST, LIMIT = 700, 800


@pytest.fixture
def table() -> Iterator[ConnectionTable]:
    table = ConnectionTable(FIRST, LIMIT)
    yield table
    table.close()


class Standing:
    """A connection that stands in a table; ``client`` is the other end."""

    def __init__(self, table: ConnectionTable, serial: int = 1) -> None:
        self.client, end = socket.socketpair()
        self.number = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, FIRST)
        end.close()
        self.sock = socket.socket(fileno=self.number)
        self.index = self.number - FIRST
        table.begin(self.number, serial)
        table.arm(self.number)

    def close(self) -> None:
        self.sock.close()
        self.client.close()


@pytest.fixture
def standing(table: ConnectionTable) -> Iterator[Standing]:
    connection = Standing(table)
    yield connection
    connection.close()


def ready(table: ConnectionTable) -> list[int]:
    """Return who is handed out now."""
    return [number for number, _ in table.wait(0, 10)]


def memory(buffers: Buffers) -> int:
    """Return how many bytes of memory they take."""
    return os.fstat(buffers.fileno()).st_blocks * 512


# The set.


def test_who_speaks_is_handed_out_once_until_it_is_put_back(table: ConnectionTable, standing: Standing) -> None:
    assert ready(table) == []
    standing.client.send(b"word")
    assert ready(table) == [standing.number]
    standing.client.send(b"another")
    assert ready(table) == []
    table.arm(standing.number)
    assert ready(table) == [standing.number]


def test_a_new_connection_is_handed_out_when_it_has_been_armed(table: ConnectionTable) -> None:
    client, sock = socket.socketpair()
    number = fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, FIRST)
    client.send(b"word")
    table.begin(number, 1)
    assert ready(table) == []
    assert table.disarmed() == {number}
    table.arm(number)
    assert ready(table) == [number]
    os.close(number)


def test_who_hangs_up_is_handed_out(table: ConnectionTable, standing: Standing) -> None:
    standing.client.close()
    assert ready(table) == [standing.number]


@pytest.mark.parametrize("stage", [Stage.TURN, Stage.READER])
def test_who_waits_for_a_turn_or_reads_slowly_is_handed_out_when_it_can_be_written_to(
    table: ConnectionTable, standing: Standing, stage: Stage
) -> None:
    standing.client.send(b"more")
    assert ready(table) == [standing.number]
    standing.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while standing.sock.send(bytes(65536)):
            pass
    table.stages[standing.index] = stage
    table.arm(standing.number)
    assert ready(table) == []  # though it has spoken
    while select.select([standing.client], [], [], 0)[0]:
        standing.client.recv(1 << 20)
    assert ready(table) == [standing.number]


@pytest.mark.parametrize("stage", [Stage.REST, Stage.END])
def test_who_has_not_said_all_is_handed_out_when_it_goes_on(
    table: ConnectionTable, standing: Standing, stage: Stage
) -> None:
    standing.client.send(b"5:")
    assert ready(table) == [standing.number]
    standing.sock.recv(100)
    table.stages[standing.index] = stage
    table.arm(standing.number)
    assert ready(table) == []  # though it could be written to
    standing.client.send(b"h")
    assert ready(table) == [standing.number]


def test_a_stage_that_does_not_exist_does_no_harm(table: ConnectionTable, standing: Standing) -> None:
    """A worker may write anything there."""
    table.stages[standing.index] = (1 << 64) - 1
    table.arm(standing.number)
    table.end(standing.number)
    assert table.stages[standing.index] == Stage.REQUEST


def test_a_nudge_wakes_one(table: ConnectionTable) -> None:
    assert ready(table) == []
    table.nudge()
    assert ready(table) == [table.nudged]
    assert ready(table) == []


def test_a_connection_that_is_astray_is_brought_back_once(table: ConnectionTable, standing: Standing) -> None:
    assert not table.bring_back(standing.number, 1)
    table.leave_astray(standing.number, 1)
    assert not table.bring_back(standing.number, 2)
    assert table.bring_back(standing.number, 1)
    assert not table.bring_back(standing.number, 1)


def test_to_put_back_what_was_closed_is_an_error(table: ConnectionTable, standing: Standing) -> None:
    standing.sock.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        table.arm(standing.number)


def test_it_tells_who_was_handed_out_and_not_put_back(table: ConnectionTable, standing: Standing) -> None:
    other = Standing(table, serial=2)
    assert table.disarmed() == set()
    standing.client.send(b"word")
    assert ready(table) == [standing.number]
    assert table.disarmed() == {standing.number}
    table.arm(standing.number)
    assert table.disarmed() == set()
    other.close()


def test_to_ask_whether_somebody_waits_hands_nobody_out(table: ConnectionTable, standing: Standing) -> None:
    assert not table.has_work()
    standing.client.send(b"word")
    assert table.has_work()
    assert table.has_work()
    assert ready(table) == [standing.number]
    assert not table.has_work()


def test_the_end_of_a_connection_leaves_nothing_of_it(table: ConnectionTable, standing: Standing) -> None:
    index = standing.index
    table.buffers.put(index, 0, b"x" * 10_000)
    table.buffers.put(index, Buffers.OUTPUT, b"y" * 10_000)
    table.kept[index] = table.output[index] = 10_000
    table.missing[index], table.deadlines[index], table.stages[index] = 5_000, 1.0, Stage.READER
    table.end(standing.number)
    assert memory(table.buffers) == 0
    assert (table.kept[index], table.output[index], table.missing[index], table.deadlines[index]) == (0, 0, 0, 0.0)
    assert (table.serials[index], table.stages[index]) == (0, Stage.REQUEST)
    standing.client.send(b"word")
    assert ready(table) == []


def test_the_next_program_goes_on_with_it(table: ConnectionTable, standing: Standing) -> None:
    table.buffers.put(standing.index, 0, b"5:hel")
    table.kept[standing.index] = 5
    state = table.state()
    copies = map(os.dup, (state.set, state.memory, state.buffers, state.nudged))
    resumed = ConnectionTable.resume(TableState(state.first, *copies))
    standing.client.send(b"lo,")
    assert ready(resumed) == [standing.number]
    assert (resumed.first, resumed.size) == (table.first, table.size)
    assert resumed.serials[standing.index] == 1
    assert resumed.buffers.get(standing.index, 0, resumed.kept[standing.index]) == b"5:hel"
    resumed.close()


def test_it_takes_no_memory_for_connections_that_do_not_exist() -> None:
    table = ConnectionTable(FIRST, 1 << 20)
    assert os.fstat(table.state().memory).st_blocks * 512 < 16 * mmap.PAGESIZE
    table.close()


def test_it_leaves_no_descriptor() -> None:
    before = descriptors(os.getpid())
    ConnectionTable(FIRST, LIMIT).close()
    assert descriptors(os.getpid()) == before


# What is kept.


def test_what_was_put_can_be_had_again(table: ConnectionTable) -> None:
    buffers = table.buffers
    for index in (10, 11, 99):
        assert buffers.put(index, 0, b"input %d" % index)
        assert buffers.put(index, 8, b", more of %d" % index)
        assert buffers.put(index, Buffers.OUTPUT, b"output %d" % index)
    for index in (10, 11, 99):
        assert buffers.get(index, 0, 20) == b"input %d, more of %d" % (index, index)
        assert buffers.get(index, Buffers.OUTPUT, 9) == b"output %d" % index


@pytest.mark.parametrize("size", [1, 476, mmap.PAGESIZE, mmap.PAGESIZE + 1, 100_000])
@pytest.mark.parametrize("offset", [0, Buffers.OUTPUT])
def test_memory_is_given_back(table: ConnectionTable, size: int, offset: int) -> None:
    buffers = table.buffers
    for _ in range(3):
        assert buffers.put(5, offset, b"x" * size)
        assert memory(buffers) >= size
        buffers.free(5, offset, size)
        assert memory(buffers) == 0


def test_to_give_back_takes_nothing_from_others(table: ConnectionTable) -> None:
    buffers = table.buffers
    for index in range(3):
        for offset in (0, Buffers.OUTPUT):
            buffers.put(index, offset, b"x" * 10_000)
    buffers.free(1, 0, 10_000)
    for index, offset in ((0, 0), (0, Buffers.OUTPUT), (1, Buffers.OUTPUT), (2, 0), (2, Buffers.OUTPUT)):
        assert buffers.get(index, offset, 10_000) == b"x" * 10_000


def test_to_give_back_what_is_not_there_does_no_harm(table: ConnectionTable) -> None:
    table.buffers.free(7, 0, 100_000)
    table.buffers.free(7, 0, 0)
    assert memory(table.buffers) == 0


def test_all_connections_together_take_no_more_memory_than_the_limit(table: ConnectionTable) -> None:
    buffers, piece = table.buffers, bytes(1 << 20)
    index = 0
    while buffers.put(index % table.size, index // table.size * len(piece), piece):
        index += 1
        assert index * len(piece) <= BUFFER_LIMIT
    assert index == BUFFER_LIMIT // len(piece)
    assert memory(buffers) <= BUFFER_LIMIT
    assert not buffers.put(98, 0, b"x")  # nobody gets the last page by being small
    buffers.free(0, 0, len(piece))
    assert buffers.put(98, 0, b"x")


def test_a_small_beginning_costs_a_page(table: ConnectionTable) -> None:
    for index in range(10):
        table.buffers.put(index, 0, b"5:ab")
    assert memory(table.buffers) == 10 * mmap.PAGESIZE


def test_a_worker_that_got_no_place_gets_the_next_one_that_comes_free(table: ConnectionTable) -> None:
    board = Scoreboard()
    connections = Connections(table, board)
    rows = [board.claim(1) for _ in range(LIMIT - FIRST + 1)]
    for row in rows:
        connections.reserve(row)
    *lucky, unlucky = rows
    assert unlucky.take_reservation() is None
    place = lucky[0].take_reservation()
    assert place
    ends = socket.socketpair()
    given = Given(*place, arrival=0, family=socket.AF_UNIX, fd=ends[0].detach(), keeper=1)
    connections.keep(lucky[0], given, LIMIT, 0, is_armed=False)
    connections.drop(place[0])
    assert unlucky.take_reservation() is not None
    ends[1].close()
    board.close()
