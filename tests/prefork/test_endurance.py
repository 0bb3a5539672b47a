"""Many clients ask on and on while workers come and go in every way: each gets its answers, over one connection."""

from __future__ import annotations

import os
import random
import selectors
import signal
import time
from collections.abc import Callable

import pytest

from prefork_socketmap import Config
from tests.processes import kill, process_title
from tests.serving import DEADLINE, Client, Serve, Site
from tests.waiting import eventually

CLIENTS = 200


class Crowd:
    """Clients that ask now and then, each over a connection of its own that it never gives up."""

    def __init__(self, site: Site, number: int) -> None:
        self._clients = [site.connect() for _ in range(number)]
        self._random = random.Random(number)
        self._asked = 0

    def ask_around(self) -> None:
        """Let some of the clients, another selection each time, ask at the same time; each has to get its answer."""
        waiting: dict[Client, bytes] = {}
        with selectors.DefaultSelector() as selector:
            for client in self._random.sample(self._clients, len(self._clients) // 5):
                self._asked += 1
                waiting[client] = f"OK {self._asked}".encode()
                selector.register(client.sock, selectors.EVENT_READ, client)
                client.request(f"echo {self._asked}".encode())
            deadline = time.monotonic() + DEADLINE
            while waiting:
                assert time.monotonic() < deadline, f"{len(waiting)} clients wait for an answer"
                for key, _ in selector.select(1):
                    assert key.data.reply() == waiting.pop(key.data)
                    selector.unregister(key.fileobj)

    def ask_all(self) -> None:
        """Let every client ask, one after the other."""
        for client in self._clients:
            assert client.ask(b"echo hello") == b"OK hello"


def echo(key: str) -> str:
    return key


def reload(site: Site) -> None:
    kill(site.pid, signal.SIGHUP)


def do_nothing(site: Site) -> None:
    pass


@pytest.mark.parametrize(
    ("limits", "disturb"),
    [
        (Config(process_limit=4), do_nothing),
        (Config(process_limit=4), reload),
        (Config(process_limit=4, max_use=10), do_nothing),
        (Config(process_limit=20, min_spare=1, max_idle=0.05), do_nothing),
    ],
    ids=["in peace", "reloads", "max_use", "growing and shrinking"],
)
def test_every_client_is_answered_over_its_one_connection(
    serve: Serve, endpoint: str, limits: Config, disturb: Callable[[Site], None]
) -> None:
    site = serve({"echo": echo}, limits, endpoint)
    crowd = Crowd(site, CLIENTS)
    crowd.ask_all()
    for _ in range(30):
        disturb(site)
        crowd.ask_around()
    eventually(lambda: bool(site.workers) and all("worker" in process_title(pid) for pid in site.workers), DEADLINE)
    crowd.ask_all()


def test_workers_that_die_harm_nobody_but_their_clients(serve: Serve, endpoint: str) -> None:
    def answer(key: str) -> str:
        if key == "die":
            os._exit(1)
        return key

    site = serve({"echo": answer}, Config(process_limit=4), endpoint)
    crowd = Crowd(site, CLIENTS)
    for _ in range(20):
        with site.connect() as suicidal:
            suicidal.request(b"echo die")
            crowd.ask_around()
            suicidal.end()
    crowd.ask_all()
