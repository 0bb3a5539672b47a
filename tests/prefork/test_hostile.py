"""A worker that is captured, by the code of a map or by what a client sent it, stops neither the master nor others.

Each deed is done in a real worker, to the objects and descriptors that it has. The master goes on, and so does
everybody else's service; what can be told from honest work costs the worker its life.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefork_socketmap import Config
from prefork_socketmap.prefork.channel import Kind
from prefork_socketmap.prefork.scoreboard import MAX_SLOTS, RETIRED, STOPPING
from prefork_socketmap.prefork.worker import Worker
from tests.crowd import GoodClient, echo
from tests.integration.servers.process import free_port
from tests.processes import is_alive, kill, open_files
from tests.serving import DEADLINE, Client, Gate, Serve, Site, scoreboard
from tests.waiting import eventually

HUGE = (1 << 64) - 1
NAN = math.nan
HEADER = struct.Struct("=BQQ")

Deed = Callable[[Worker], object]


def worker_at_work() -> Worker:
    """Return the worker whose lookup calls this."""
    frame = sys._getframe()
    while not isinstance(frame.f_locals.get("self"), Worker):
        assert frame.f_back
        frame = frame.f_back
    worker: Worker = frame.f_locals["self"]
    return worker


def channel_of(worker: Worker) -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, os.dup(worker._to_master.fileno()))


def send(worker: Worker, data: bytes, *enclosed: int) -> None:
    socket.send_fds(channel_of(worker), [data], enclosed)


def say(
    kind: int, number: int = 1, serial: int = 1, text: bytes = b"", enclose: Callable[[], int] | None = None
) -> Deed:
    def deed(worker: Worker) -> None:
        send(worker, HEADER.pack(kind, number, serial) + text, *([enclose()] if enclose else []))

    return deed


def a_stream() -> int:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()


def a_listener() -> int:
    sock = socket.create_server(("127.0.0.1", free_port()))
    return sock.detach()


def a_pipe() -> int:
    return os.pipe()[0]


def a_file() -> int:
    return os.open("/dev/zero", os.O_RDONLY)


def a_channel() -> int:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[1].detach()


def a_reservation(worker: Worker) -> tuple[int, int]:
    return next(place for place in worker.row.reservations() if place[0])


def keep_a_reserved_place(kind: Kind, enclose: Callable[[], int]) -> Deed:
    def deed(worker: Worker) -> None:
        send(worker, HEADER.pack(kind, *a_reservation(worker)), enclose())

    return deed


def again_and_again(deed: Deed, times: int) -> Deed:
    def deeds(worker: Worker) -> None:
        for _ in range(times):
            with contextlib.suppress(BlockingIOError):
                deed(worker)

    return deeds


def end_what_another_accepted(kind: Kind) -> Deed:
    """Of the connections that came after this worker, and that it has never asked for."""

    def deed(worker: Worker) -> None:
        descriptors, table = worker._descriptors, worker._table
        serials = table.serials.tolist()
        known = {each.serial for each in descriptors.known.values()}
        reserved = {serial for row in worker._board.rows() for _, serial in row.reservations()}
        for index in range(len(serials) - 1, -1, -1):
            serial = serials[index]
            inherited = descriptors._inherited.get(table.first + index)
            if serial and serial not in known | reserved and not (inherited and inherited.serial == serial):
                send(worker, HEADER.pack(kind, table.first + index, serial))
                return
        raise RuntimeError("this worker has met all connections")

    return deed


CRIMES: dict[str, Deed] = {
    "an empty packet": lambda worker: send(worker, b""),
    "one byte": lambda worker: send(worker, b"x"),
    "a packet that is too long": say(Kind.FAILED, text=b"x" * 10_000),
    "a kind that there is not": say(200),
    "the same, a thousand times": again_and_again(say(200), 1000),
    "READY twice": say(Kind.READY),
    "READY with a descriptor": say(Kind.READY, enclose=a_stream),
    "FAILED after READY": say(Kind.FAILED, text=b"no reason"),
    "KEEP without a connection": say(Kind.KEEP),
    "KEEP of a pipe": say(Kind.KEEP, enclose=a_pipe),
    "KEEP of a listener": keep_a_reserved_place(Kind.KEEP, a_listener),
    "KEEP of a channel": keep_a_reserved_place(Kind.KEEP, a_channel),
    "KEEP for a place of nobody": say(Kind.KEEP, HUGE, HUGE, enclose=a_stream),
    "OFFER of a pipe": say(Kind.OFFER, enclose=a_pipe),
    "OFFER for a place of nobody": say(Kind.OFFER, 1, 1, enclose=a_stream),
    "FETCH without a channel": say(Kind.FETCH),
    "FETCH into a file": say(Kind.FETCH, serial=0, enclose=a_file),
    "FETCH into a connection": say(Kind.FETCH, serial=0, enclose=a_stream),
    "FETCH of what nobody has": say(Kind.FETCH, serial=HUGE, enclose=a_channel),
    "GONE for a number out of range": say(Kind.GONE, HUGE, 1),
    "GONE for a serial that nobody had": say(Kind.GONE, 1024, HUGE),
    "ENDED for a number out of range": say(Kind.ENDED, 3, 1),
    "ENDED for a serial that nobody had": say(Kind.ENDED, 1024, HUGE),
}
"""Each costs the worker its life."""


def write(field: str, value: float) -> Deed:
    """Write into the worker's own row, as the master reads it."""

    def deed(worker: Worker) -> None:
        row = worker.row
        name, started = row.job_cells()
        if field == "state":
            worker._board.states[row.slot] = int(value)
        elif field == "job name":
            name[0] = int(value)
        else:
            (started if field == "job started" else worker._cells.since)[0] = value

    return deed


DAMAGES: dict[str, Deed] = {
    "an unknown state": write("state", 0xFF),
    "a lookup since never": write("job started", NAN),
    "a lookup since the end of time": write("job started", math.inf),
    "a lookup since before the beginning": write("job started", -1.0),
    "a lookup from tomorrow": write("job started", 1e300),
    "a state since never": write("since", NAN),
}
"""They cost the worker its life as soon as the master looks."""


def to_header(index: int, value: int) -> Deed:
    def deed(worker: Worker) -> None:
        worker._board.words[index] = value

    return deed


def to_table(column: str, value: float) -> Deed:
    """Write into the table's row of every connection."""

    def deed(worker: Worker) -> None:
        cells = getattr(worker._table, column)
        for known in list(worker._descriptors.known.values()):
            cells[known.number - worker._table.first] = value

    return deed


def cut_off(worker: Worker) -> None:
    """Cut off all files that it has open."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            os.ftruncate(int(link.name), 0)


def cut_off_and_touch(worker: Worker) -> None:
    cut_off(worker)
    bytes(worker._board.view)
    worker._table.serials.tolist()


def ring(worker: Worker) -> None:
    for _ in range(200_000):
        worker._shared.bell.ring()


def fill_semaphores(worker: Worker) -> None:
    """Let who gives wait: what all share is full, and blocks."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "eventfd" in str(link.readlink()):
                fd = int(link.name)
                os.set_blocking(fd, False)
                for bit in range(63, -1, -1):
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_write(fd, 1 << bit)
                os.set_blocking(fd, True)


def linger(worker: Worker) -> None:
    """Have a connection closed by the master whose close(2) would take an hour."""
    with socket.create_server(("127.0.0.1", free_port())) as server:
        peer = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(b"x" * 65536)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 3600))
    number, serial = a_reservation(worker)
    send(worker, HEADER.pack(Kind.KEEP, number, serial), ours.fileno())
    ours.close()
    send(worker, HEADER.pack(Kind.ENDED, number, serial))
    globals()["_stays_open"] = peer


def dismiss_all(worker: Worker) -> None:
    """Tell all workers to leave, those that are not born yet among them."""
    worker._duty.retire()


def dismiss_on_and_on(worker: Worker) -> None:
    worker._duty.dismiss(1 << 62)


def take_everybody_out(worker: Worker) -> None:
    """Stop watching the listeners, and what wakes workers."""
    for number in [*worker._listeners, worker._table.nudged]:
        worker._table.discard(number)
    os._exit(1)


def damage_and_die(name: str, value: int) -> Deed:
    def deed(worker: Worker) -> None:
        write(name, value)(worker)
        os._exit(1)

    return deed


def hold_and_die(worker: Worker) -> None:
    worker.row.held = HUGE
    os._exit(1)


def without_names(worker: Worker) -> None:
    worker._board.words[3] = 0
    os._exit(1)


def flood(worker: Worker) -> None:
    """Send what means nothing, as fast as it goes, for a while."""
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            worker._to_master.send(Kind.GONE, worker._table.first, 1)


def shut_down_the_way(worker: Worker) -> None:
    channel_of(worker).shutdown(socket.SHUT_RDWR)


NUISANCES: dict[str, Deed] = {
    "all files cut off": cut_off,
    "all files cut off and their memory touched": cut_off_and_touch,
    "a bell that rings on and on": ring,
    "thousands of messages": flood,
    "a way to the master that is shut down": shut_down_the_way,
    "semaphores that are full and block": fill_semaphores,
    "a gong for all workers to come": dismiss_all,
    "a dismissal of all workers to come": dismiss_on_and_on,
    "a connection that takes an hour to close": linger,
    "an end with listeners out of the set": take_everybody_out,
    "an end with an unknown map": damage_and_die("job name", HUGE),
    "an end with a connection that cannot be": hold_and_die,
    "an end on a board without names": without_names,
    "2^62 slots": to_header(2, 1 << 62),
    "no slots": to_header(2, 0),
    "2^62 names": to_header(3, 1 << 62),
    "another magic": to_header(0, 0),
    "another layout": to_header(1, 99),
    "all generations retired": to_header(RETIRED, 1 << 62),
    "a server that stops": to_header(STOPPING, 1),
    "no connections allowed": to_header(8, 0),
    "more connections than can be": to_header(7, 1 << 62),
    "an unknown stage": to_table("stages", HUGE),
    "more kept than there is memory": to_table("kept", HUGE),
    "more missing than there is memory": to_table("missing", HUGE),
    "more output than there is memory": to_table("output", HUGE),
    "a deadline that is no time": to_table("deadlines", NAN),
    "a time that is none": to_table("since", NAN),
    "a time from tomorrow": to_table("since", math.inf),
    "all connections astray": to_table("astray", HUGE),
}
"""They may cost the worker its life or not, but nobody else anything that lasts."""

DEEDS = CRIMES | DAMAGES | NUISANCES
DEEDS |= {
    f"{kind.name} for another's connection": end_what_another_accepted(kind) for kind in (Kind.GONE, Kind.ENDED)
}


def evil(key: str) -> str:
    """Do the deed that the key names."""
    DEEDS[key](worker_at_work())
    return "done"


def evil_and_stay(key: str) -> str:
    """Do the deed, and then wait for the punishment."""
    DEEDS[key](worker_at_work())
    time.sleep(DEADLINE)
    return "unpunished"


@pytest.fixture
def site(serve: Serve) -> Site:
    maps = {"echo": echo, "evil": evil, "stay": evil_and_stay}
    site = serve(maps, Config(process_limit=6, min_spare=3, lookup_timeout=30))
    site.await_workers(3)
    return site


@pytest.fixture
def good(site: Site) -> GoodClient:
    client = GoodClient(site)
    client.ask()
    return client


def assert_all_is_well(site: Site) -> None:
    """The master is there, listens to its workers, and replaces them."""
    assert is_alive(site.pid)
    anew = GoodClient(site)
    for _ in range(3):
        anew.ask()
        anew.ask_anew()
    for worker in site.workers:
        with contextlib.suppress(ProcessLookupError):
            kill(worker)
    site.await_workers(3)
    GoodClient(site).ask()


@pytest.mark.parametrize("crime", CRIMES)
def test_what_is_no_message_of_an_honest_worker_costs_its_life(site: Site, good: GoodClient, crime: str) -> None:
    client = site.connect()
    client.request(b"stay " + crime.encode())
    client.end()
    site.await_count("workers", "killed", 1)
    good.ask()
    assert_all_is_well(site)


@pytest.mark.parametrize("kind", [Kind.GONE, Kind.ENDED])
def test_a_worker_cannot_end_a_connection_that_it_never_had(serve: Serve, kind: Kind) -> None:
    one, other = Gate(), Gate()
    maps = {"echo": echo, "one": one.lookup, "other": other.lookup, "stay": evil_and_stay}
    site = serve(maps, Config(process_limit=2, min_spare=2))
    site.await_workers(2)
    first = site.connect()
    first.request(b"one key")
    one.await_arrival()
    good = GoodClient(site)
    good.ask()  # by the worker that is left
    second = site.connect()
    second.request(b"other key")
    other.await_arrival()
    one.open()
    assert first.reply() == b"OK done"  # by the one that has not met the good client
    villain = site.connect()
    villain.request(f"stay {kind.name} for another's connection".encode())
    villain.end()
    site.await_count("workers", "killed", 1)
    other.open()
    assert second.reply() == b"OK done"
    good.ask()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_row_that_cannot_be_costs_the_worker_its_life(serve: Serve, gate: Gate, damage: str) -> None:
    def damage_and_stay(key: str) -> str:
        DEEDS[key](worker_at_work())
        return gate.lookup(key)

    site = serve({"echo": echo, "stay": damage_and_stay}, Config(process_limit=6, min_spare=3))
    site.await_workers(3)
    good = GoodClient(site)
    good.ask()
    client = site.connect()
    client.request(b"stay " + damage.encode())
    gate.await_arrival()
    kill(site.pid, signal.SIGCHLD)  # so that it looks now
    site.await_count("workers", "killed", 1)
    client.end()
    good.ask()
    assert_all_is_well(site)


@pytest.mark.parametrize("nuisance", NUISANCES)
def test_what_a_worker_does_to_what_all_share_lasts_no_longer_than_it(
    site: Site, good: GoodClient, nuisance: str
) -> None:
    client = site.connect()
    client.sock.settimeout(2)  # whose it was may be known to nobody now
    client.request(b"evil " + nuisance.encode())
    with contextlib.suppress(OSError, AssertionError):
        client.reply()

    def is_answered() -> bool:
        with contextlib.suppress(OSError, AssertionError), Client(site.endpoint) as newcomer:
            newcomer.sock.settimeout(1)
            return newcomer.ask(b"echo new") == b"OK new"
        return False

    eventually(is_answered, DEADLINE)
    assert is_alive(site.pid)
    for worker in site.workers:  # whatever they were told before
        with contextlib.suppress(ProcessLookupError):
            kill(worker)
    site.await_workers(3)
    eventually(is_answered, DEADLINE)
    board = scoreboard(site.pid)
    assert board.slots <= MAX_SLOTS
    assert_all_is_well(site)


def test_no_worker_has_a_descriptor_of_the_scoreboard(site: Site) -> None:
    for worker in site.workers:
        assert not any("scoreboard" in name for name in open_files(worker).values())
