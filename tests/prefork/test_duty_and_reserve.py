"""Duty and reserve: as many workers as CPUs do all that is quick, the others sleep until they are called."""

from __future__ import annotations

import time

from prefork_socketmap import Config
from prefork_socketmap.prefork.duty import PLACES
from prefork_socketmap.prefork.scoreboard import State
from tests.crowd import Board, GoodClient, Log, echo, switches
from tests.serving import DEADLINE, Client, Gate, Serve, Site
from tests.threads import Threads
from tests.waiting import eventually


def nap(key: str) -> str:
    """Be a lookup that takes long."""
    time.sleep(0.02)
    return key


def fast_clients(site: Site, number: int) -> Threads:
    """Return clients that ask, one thing after the other, without a pause."""

    def ask() -> None:
        with Client(site.endpoint) as client:
            while not threads.enough.is_set():
                assert client.ask(b"echo key") == b"OK key"

    threads = Threads([ask] * number)
    return threads


def await_full_duty(board: Board) -> list[int]:
    """Wait until the places on duty are taken, no more and no fewer; return who has them."""

    def pids() -> list[int]:
        found = board.on_duty()
        assert len(found) == PLACES, board.states()
        return found

    return eventually(pids, DEADLINE)


def test_the_reserve_sleeps_while_lookups_are_fast(serve: Serve, endpoint: str) -> None:
    site = serve({"echo": echo}, Config(process_limit=PLACES + 6, min_spare=PLACES + 6), endpoint)
    site.await_workers(PLACES + 6)
    board = Board(site.pid)
    with fast_clients(site, 8):
        GoodClient(site).ask_for(0.3)  # until everybody is met
        on_duty = await_full_duty(board)
        reserve = [pid for pid in site.workers if pid not in on_duty]
        before = {pid: switches(pid) for pid in reserve}
        good = GoodClient(site)
        good.ask_for(0.7)
        after = {pid: switches(pid) for pid in reserve}
    woken = [pid for pid in reserve if after[pid] > before[pid]]
    # A CPU that somebody else has taken makes a fast lookup slow; that may call one or two.
    assert len(woken) <= 2, (before, after)
    assert len(reserve) == 6


def test_places_of_slow_lookups_go_to_the_reserve(serve: Serve, gate: Gate, endpoint: str) -> None:
    """By surprise: nobody knows yet that the map is slow. More of them than places, and a fast client beside."""
    site = serve({"slow": gate.lookup, "echo": echo}, Config(), endpoint)
    slow = [site.connect() for _ in range(3 * PLACES)]
    good = GoodClient(site)
    for client in slow:
        client.request(b"slow key")
        gate.await_arrival()
        good.ask()
    good.ask_anew()
    for _ in slow:
        gate.open()
    assert [client.reply() for client in slow] == [b"OK done"] * len(slow)


def test_who_has_been_slow_by_surprise_is_expected_to_be_slow(serve: Serve) -> None:
    """Then its worker says that it is busy, before it is, and there is no wait for the master's eye."""
    site = serve({"nap": nap, "echo": echo}, Config())
    client = site.connect()
    for _ in range(5):
        client.ask(b"nap key")
    client.request(b"nap key")
    eventually(lambda: State.BUSY in Board(site.pid).states().values(), DEADLINE)
    client.reply()


def test_slow_lookups_on_all_places_delay_no_fast_client(serve: Serve, endpoint: str) -> None:
    site = serve({"nap": nap, "echo": echo}, Config(), endpoint)
    naps: list[bytes] = []

    def take_naps() -> None:
        with Client(site.endpoint) as client:
            while not threads.enough.is_set():
                naps.append(client.ask(b"nap key"))

    threads = Threads([take_naps] * 20)
    good = GoodClient(site)
    with threads:
        asked = good.ask_for(1.5)
        good.ask_anew()
    assert set(naps) == {b"OK key"}
    # A client that had to wait for one nap or another would come no further than those who take them.
    assert asked > 5 * len(naps) / 20


def test_after_slow_lookups_as_many_as_before_are_on_duty(serve: Serve, gate: Gate) -> None:
    site = serve({"slow": gate.lookup, "nap": nap, "echo": echo}, Config())
    board = Board(site.pid)
    await_full_duty(board)
    for _ in range(5):
        gate.gather([site.connect() for _ in range(3 * PLACES)])
        clients = [site.connect() for _ in range(10)]
        for client in clients:
            client.request(b"nap key")
        assert [client.reply() for client in clients] == [b"OK key"] * 10
    with fast_clients(site, 4):
        GoodClient(site).ask_for(0.5)
        await_full_duty(board)


def test_that_process_limit_is_reached_is_logged_once_with_the_map_and_counted(
    serve: Serve, gate: Gate, server_log: Log
) -> None:
    site = serve({"slow": gate.lookup, "echo": echo}, Config(process_limit=4, min_spare=1))
    slow = [site.connect() for _ in range(4)]
    for client in slow:
        client.request(b"slow key")
        gate.await_arrival()
    assert not server_log.lines("lookups wait")  # nobody does yet
    waiting = site.connect()
    waiting.request(b"echo key")
    line = "lookups wait: process_limit = 4 is reached; workers are held by [slow] (4)"
    eventually(server_log.has(line), DEADLINE)
    assert Board(site.pid).counter("workers", "exhausted") == 1
    time.sleep(0.3)  # a few looks more: that is the test
    assert len(server_log.lines("lookups wait")) == 1
    for _ in slow:
        gate.open()
    assert waiting.reply() == b"OK key"
    assert [client.reply() for client in slow] == [b"OK done"] * 4
    assert Board(site.pid).counter("workers", "exhausted") == 1


def test_with_process_limit_workers_slow_lookups_wait_and_all_are_answered(serve: Serve, endpoint: str) -> None:
    site = serve({"nap": nap}, Config(process_limit=3, min_spare=1), endpoint)
    clients = [site.connect() for _ in range(60)]
    for index, client in enumerate(clients):
        client.request(b"nap %d" % index)
    assert [client.reply() for client in clients] == [b"OK %d" % index for index in range(60)]
    assert len(site.workers) <= 3
