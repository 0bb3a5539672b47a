"""Where there is no epoll, workers wait each for themselves, and keep a client until it falls silent."""

from __future__ import annotations

import select
import signal

import pytest

from prefork_socketmap import Config
from tests.serving import DEADLINE, MAPS, End, Gate, Serve, await_end, kill
from tests.waiting import eventually


@pytest.fixture(autouse=True)
def no_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll")


def test_lookups_are_answered(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=4), endpoint)
    for _ in range(3):
        clients = [site.connect() for _ in range(3)]
        for client in clients * 5:
            assert client.ask(b"ok key") == b"OK ok"
        for client in clients:
            client.close()


def test_a_silent_client_is_closed_by_reset_after_idle_timeout(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0.2), endpoint)
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"
        assert client.end() is (End.RESET if endpoint.startswith("inet:") else End.ORDERLY)


def test_a_silent_client_makes_room_for_one_that_waits(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=2, idle_timeout=100), endpoint)
    for _ in range(5):
        client = site.connect()
        assert client.ask(b"ok key") == b"OK ok"


def test_the_pool_grows(serve: Serve, endpoint: str, gate: Gate) -> None:
    site = serve({"slow": gate.lookup}, Config(process_limit=6, min_spare=1), endpoint)
    clients = [site.connect() for _ in range(6)]
    gate.gather(clients)


def test_workers_are_replaced_when_they_die_and_when_that_is_asked_for(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=2), endpoint)
    workers = site.await_workers(2)
    kill(workers[0])
    await_end(workers[0])
    workers = site.await_workers(2)
    kill(site.pid, signal.SIGHUP)
    await_end(*workers)
    site.await_workers(2)
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"


def test_a_killed_master_leaves_no_worker(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=3), endpoint)
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"
        workers = site.workers
        kill(site.pid)
        await_end(site.pid, *workers)


def test_a_stop_leaves_no_worker(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=3), endpoint)
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"
        workers = site.workers
        site.server.shutdown(DEADLINE)
        eventually(lambda: client.end(), DEADLINE)
    await_end(*workers)
