"""Connections outlive workers: a silent client occupies none, and never sees that workers come and go."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import time
from pathlib import Path

import pytest

from prefork_socketmap import Config, Server
from tests.serving import (
    DEADLINE,
    MAPS,
    Client,
    End,
    Fork,
    Gate,
    Serve,
    Site,
    await_end,
    descriptors,
    kill,
    say_ok,
    serving,
    title,
)
from tests.waiting import eventually


def ask_each(clients: list[Client]) -> None:
    for client in clients:
        assert client.ask(b"ok key") == b"OK ok"


def await_idle(site: Site) -> None:
    """Wait until no worker serves anybody."""
    eventually(lambda: all(title(pid).endswith("idle") for pid in site.workers), DEADLINE, "idle workers")


def test_a_silent_connection_outlives_idle_timeout_and_occupies_no_worker(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0.2), endpoint)
    clients = [site.connect() for _ in range(3)]
    ask_each(clients)
    await_idle(site)
    time.sleep(0.5)  # longer than idle_timeout: that is the test
    assert all(client.is_open for client in clients)
    ask_each(clients)


def test_a_connection_that_has_never_said_a_word_is_kept_too(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0.2), endpoint)
    client = site.connect()
    time.sleep(0.5)
    assert client.is_open
    assert client.ask(b"ok key") == b"OK ok"


def test_few_workers_serve_many_silent_clients(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=2), endpoint)
    clients = [site.connect() for _ in range(200)]
    for _ in range(3):
        ask_each(clients)
    assert len(site.workers) == 2


def test_a_connection_survives_a_worker_that_is_replaced_after_max_use(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=2, max_use=5), endpoint)
    clients = [site.connect() for _ in range(3)]
    seen = {client.ask(b"who key") for _ in range(20) for client in clients}
    assert len(seen) >= 10
    assert all(client.is_open for client in clients)


def test_a_request_that_follows_the_last_one_of_a_worker_is_answered_by_another(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=2, max_use=1), endpoint)
    client = site.connect()
    for _ in range(30):
        client.request(b"ok key")
    assert [client.reply() for _ in range(30)] == [b"OK ok"] * 30


def test_a_connection_survives_the_workers_that_it_has_met(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=3), endpoint)
    clients = [site.connect() for _ in range(10)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        ask_each(clients)
        await_idle(site)
        workers = site.workers
        for worker in workers:
            kill(worker, number)
        await_end(*workers)
        assert all(client.is_open for client in clients)
        ask_each(clients)


def test_connections_survive_reload_after_reload(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=3), endpoint)
    clients = [site.connect() for _ in range(50)]
    for generation in range(2, 7):
        ask_each(clients)
        kill(site.pid, signal.SIGHUP)
        ask_each(clients)
        name = f"generation {generation}"
        eventually(lambda name=name: all(name in title(pid) for pid in site.workers), DEADLINE)  # type: ignore[misc]
    ask_each(clients)
    assert all(client.is_open for client in clients)


def test_a_silent_connection_is_closed_by_reset_after_park_timeout(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0.1, park_timeout=0.5), endpoint)
    client = site.connect()
    ask_each([client] * 3)
    await_idle(site)
    ask_each([client])  # every worker that has met it holds a duplicate, and the reset is for all
    assert client.end() is (End.RESET if endpoint.startswith("inet:") else End.ORDERLY)


def test_beyond_max_parked_the_oldest_is_closed(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0.1, max_parked=3), endpoint)
    clients = []
    for _ in range(5):
        clients.append(site.connect())
        ask_each(clients[-1:])
        await_idle(site)
    for client in clients[:2]:
        assert client.end() is (End.RESET if endpoint.startswith("inet:") else End.ORDERLY)
    assert all(client.is_open for client in clients[2:])
    ask_each(clients[2:])


def test_where_descriptors_are_few_old_connections_make_room_for_new_ones(fork: Fork, directory: Path) -> None:
    endpoint = f"unix:{directory}/socket"

    def serve_with_few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        server = Server(Config(process_limit=2, idle_timeout=0.1))
        server.register_map("ok", say_ok)
        server.listen(endpoint)
        server.serve_forever()

    process = fork(serve_with_few_descriptors)
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(300):
            clients.append(stack.enter_context(serving(endpoint)))
            ask_each(clients[-1:])
        eventually(lambda: sum(client.is_open for client in clients) <= 128, DEADLINE, "half of the descriptors")
        ask_each(clients[-100:])
    assert process.is_alive()


def test_a_refusal_reaches_a_client_that_was_parked_before(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0.1), endpoint)
    client = site.connect()
    for _ in range(5):
        ask_each([client])
        await_idle(site)
    client.send(b"garbage" + b"x" * 500_000)
    await_idle(site)
    assert client.reply() == b"PERM malformed request"
    assert client.end() is End.ORDERLY


def test_a_last_request_with_the_end_of_the_client_is_answered_after_parking(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0.1), endpoint)
    client = site.connect()
    for _ in range(5):
        ask_each([client])
        await_idle(site)
    client.request(b"ok key")
    client.sock.shutdown(socket.SHUT_WR)
    assert client.reply() == b"OK ok"


def test_a_client_that_hangs_up_while_it_is_parked_leaves_nothing_in_the_master(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=2, idle_timeout=0.1), endpoint)
    site.await_workers(2)
    fresh = descriptors(site.pid)
    for _ in range(3):
        clients = [site.connect() for _ in range(20)]
        ask_each(clients)
        await_idle(site)
        eventually(lambda: descriptors(site.pid).total() == fresh.total() + 20, DEADLINE, "parked connections")
        for client in clients:
            client.close()
        eventually(lambda: descriptors(site.pid) == fresh, DEADLINE, "a master without connections")


def test_a_number_that_is_used_again_is_not_taken_for_the_connection_before(serve: Serve, endpoint: str) -> None:
    """A worker keeps what it has met: it must not answer a new client over an old client's connection."""
    site = serve({"echo": lambda key: key}, Config(process_limit=3, idle_timeout=0.1), endpoint)
    for life in range(10):
        clients = [site.connect() for _ in range(10)]
        for turn in range(3):
            for index, client in enumerate(clients):
                client.request(f"echo {life}.{turn}.{index}".encode())
            for index, client in enumerate(clients):
                assert client.reply() == f"OK {life}.{turn}.{index}".encode()
        for client in clients:
            client.close()


def test_a_slow_lookup_holds_up_its_own_client_alone(serve: Serve, endpoint: str) -> None:
    gate = Gate()
    site = serve({**MAPS, "slow": gate.lookup}, Config(process_limit=2), endpoint)
    clients = [site.connect() for _ in range(20)]
    ask_each(clients)
    slow = clients.pop()
    slow.request(b"slow key")
    gate.await_arrival()
    for _ in range(5):
        ask_each(clients)
    gate.open()
    assert slow.reply() == b"OK done"


@pytest.mark.parametrize("ending", ["kill", "close"])
def test_all_connections_end_with_the_server(serve: Serve, endpoint: str, ending: str) -> None:
    site = serve(MAPS, Config(process_limit=3, idle_timeout=0.1), endpoint)
    clients = [site.connect() for _ in range(10)]
    for _ in range(3):
        ask_each(clients)
    await_idle(site)
    if ending == "kill":
        kill(site.pid)
    else:
        site.server.close()
    for client in clients:
        assert client.end() is (End.RESET if endpoint.startswith("inet:") else End.ORDERLY)
