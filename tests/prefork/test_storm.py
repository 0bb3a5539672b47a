"""Workers that are killed while they serve, and more clients than there may be."""

from __future__ import annotations

import contextlib
import random
import selectors
import signal
import time

import pytest

from prefork_socketmap import Config
from tests.crowd import Board, Crowd, GoodClient, echo
from tests.processes import kill
from tests.serving import DEADLINE, Client, Serve, Site
from tests.waiting import eventually


class Asker:
    """A client that asks on and on, without a pause, and comes again after a reset."""

    def __init__(self, site: Site, name: int) -> None:
        self._site = site
        self._name = name
        self.resets = 0
        self.answers = 0
        self.since = 0.0
        self.client = self._begin()

    def _begin(self) -> Client:
        client = Client(self._site.endpoint)
        self._ask(client)
        return client

    def _ask(self, client: Client) -> None:
        self.since = time.monotonic()
        client.request(b"echo %d.%d" % (self._name, self.answers))

    def hear(self) -> None:
        try:
            reply = self.client.reply()
            assert reply == b"OK %d.%d" % (self._name, self.answers)
            self.answers += 1
            self._ask(self.client)
        except (ConnectionError, AssertionError) as error:
            if isinstance(error, AssertionError) and "ended" not in str(error):
                raise
            self.resets += 1
            self.client.close()
            self.client = self._begin()


def test_nobody_starves_while_workers_are_killed_all_the_time(serve: Serve, endpoint: str) -> None:
    site = serve({"echo": echo}, Config(), endpoint)
    chance = random.Random(7)
    askers = [Asker(site, name) for name in range(150)]
    kills = 0
    end = time.monotonic() + 4
    next_kill = 0.0
    try:
        while time.monotonic() < end:
            if time.monotonic() >= next_kill:
                # Those on duty: they hold connections, and have just taken some.
                with contextlib.suppress(IndexError, ProcessLookupError):
                    kill(chance.choice(Board(site.pid).on_duty()), signal.SIGKILL)
                    kills += 1
                next_kill = time.monotonic() + 0.4
            with selectors.DefaultSelector() as selector:
                for asker in askers:
                    selector.register(asker.client.sock, selectors.EVENT_READ, asker)
                for key, _ in selector.select(0.1):
                    key.data.hear()
            longest = time.monotonic() - min(asker.since for asker in askers)
            assert longest < 5, "somebody starves"
        assert kills >= 5
        assert all(asker.answers for asker in askers)
        # A worker has one connection in hand, and perhaps one that it has accepted.
        assert sum(asker.resets for asker in askers) <= 2 * kills
    finally:
        for asker in askers:
            asker.client.close()
    GoodClient(site).ask()


@pytest.mark.usefixtures("room_for_many")
def test_max_connections_is_exact_under_a_storm(serve: Serve, endpoint: str) -> None:
    site = serve({"echo": echo}, Config(max_connections=50, idle_timeout=0), endpoint)
    board = Board(site.pid)
    with Crowd(site.endpoint) as crowd:
        highest = 0
        for _ in range(20):
            crowd.join(25)
            highest = max(highest, board.connections)

        def all_decided() -> bool:
            return board.connections + board.counter("connections", "refused") >= 500

        eventually(all_decided, DEADLINE)
        assert highest <= 50
        assert board.connections == 50
        assert board.counter("connections", "refused") == 450
        assert board.counter("connections", "evicted") == 0
        answered = 0
        for sock in crowd.sockets:
            with contextlib.suppress(OSError):
                sock.settimeout(DEADLINE)
                sock.send(b"8:echo key,")
                answered += sock.recv(100) == b"6:OK key,"
        assert answered == 50


def test_the_connection_silent_for_longest_makes_room(serve: Serve, endpoint: str) -> None:
    site = serve({"echo": echo}, Config(max_connections=5, idle_timeout=0.3), endpoint)
    clients = [site.connect() for _ in range(5)]
    for client in clients:
        assert client.ask(b"echo key") == b"OK key"
    time.sleep(0.5)  # longer than idle_timeout: that is the test
    for client in clients[1:]:
        assert client.ask(b"echo key") == b"OK key"
    newcomer = site.connect()
    assert newcomer.ask(b"echo key") == b"OK key"
    clients[0].end()
    assert all(client.is_open for client in clients[1:])
    assert Board(site.pid).counter("connections", "evicted") == 1


def test_a_client_that_asks_is_kept_beyond_keepalive_timeout(serve: Serve, endpoint: str) -> None:
    site = serve({"echo": echo}, Config(keepalive_timeout=1), endpoint)
    busy, silent = site.connect(), site.connect()
    assert silent.ask(b"echo key") == b"OK key"
    asked = 0
    while silent.is_open:
        assert busy.ask(b"echo key") == b"OK key"
        asked += 1
        assert asked < 10_000
        time.sleep(0.05)
    for _ in range(30):
        assert busy.ask(b"echo key") == b"OK key"
        time.sleep(0.05)
    assert Board(site.pid).counter("connections", "expired") == 1
