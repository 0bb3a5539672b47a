"""Connections outlive workers: no client occupies one, and none sees that workers come and go."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import time
from pathlib import Path

import pytest

from prefork_socketmap import Config, Server
from tests.processes import await_end, descriptors, kill, process_title
from tests.serving import DEADLINE, MAPS, Client, End, Fork, Gate, Serve, abrupt, end_of_newcomer, say_ok, serving
from tests.waiting import eventually


def ask_each(clients: list[Client]) -> None:
    for client in clients:
        assert client.ask(b"ok key") == b"OK ok"


def test_a_silent_connection_outlives_idle_timeout_and_occupies_no_worker(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0.2), endpoint)
    clients = [site.connect() for _ in range(3)]
    ask_each(clients)
    site.await_idle()
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
    for _ in range(2):
        ask_each(clients)
        site.await_idle()
        workers = site.workers
        for worker in workers:
            kill(worker)
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
        eventually(lambda name=name: all(name in process_title(pid) for pid in site.workers), DEADLINE)  # type: ignore[misc]
    ask_each(clients)
    assert all(client.is_open for client in clients)


def test_a_silent_connection_is_closed_by_reset_after_keepalive_timeout(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(keepalive_timeout=1.5), endpoint)
    client = site.connect()
    ask_each([client] * 3)
    site.await_idle()
    began = time.monotonic()
    ask_each([client])  # every worker that has met it holds a duplicate, and the reset is for all
    assert client.end() is abrupt(endpoint)
    assert time.monotonic() - began >= 1.5
    site.await_count("connections", "expired", 1)


def test_a_connection_that_has_never_said_a_word_is_closed_after_keepalive_timeout_too(
    serve: Serve, endpoint: str
) -> None:
    site = serve(MAPS, Config(keepalive_timeout=0.3), endpoint)
    assert site.connect().end() is abrupt(endpoint)
    site.await_count("connections", "expired", 1)


def test_a_client_that_speaks_within_keepalive_timeout_is_not_closed(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(keepalive_timeout=2), endpoint)
    client = site.connect()
    for _ in range(30):
        ask_each([client])
        time.sleep(0.1)
    assert client.is_open
    assert site.counted("connections", "expired") == 0


def test_a_keepalive_timeout_of_0_waits_forever(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(keepalive_timeout=0, idle_timeout=0.1), endpoint)
    client = site.connect()
    ask_each([client])
    time.sleep(1)
    assert client.is_open
    ask_each([client])


def served(endpoint: str) -> Client:
    """Return a new client that was answered: once those that are in its way have been silent for long enough."""

    def attempt() -> Client:
        client = serving(endpoint)
        try:
            ask_each([client])
        except ConnectionError as error:
            client.close()
            raise AssertionError("refused") from error
        except AssertionError:
            client.close()
            raise
        return client

    return eventually(attempt, DEADLINE)


def test_beyond_max_connections_the_one_that_is_silent_longest_makes_room(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0.3, max_connections=3), endpoint)
    clients = [site.connect() for _ in range(3)]
    for client in [*clients, clients[0]]:  # which came first, and is not the one that is silent longest
        ask_each([client])
        site.await_idle()
    with served(site.endpoint) as fourth:
        assert clients[1].end() is abrupt(endpoint)
        ask_each([clients[0], clients[2], fourth])
        site.await_count("connections", "evicted", 1)


def test_who_has_not_been_silent_for_idle_timeout_makes_no_room(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=1000, max_connections=3), endpoint)
    clients = [site.connect() for _ in range(3)]
    ask_each(clients)
    for refused in range(1, 4):
        assert end_of_newcomer(site.endpoint) is abrupt(endpoint)
        site.await_count("connections", "refused", refused)
    ask_each(clients)
    assert site.counted("connections", "evicted") == 0


def test_with_an_idle_timeout_of_0_nobody_ever_makes_room(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0, max_connections=1), endpoint)
    client = site.connect()
    ask_each([client])
    time.sleep(0.3)
    assert end_of_newcomer(site.endpoint) is abrupt(endpoint)
    ask_each([client])
    site.await_count("connections", "refused", 1)


def test_a_client_whose_lookup_is_under_way_makes_no_room(serve: Serve, endpoint: str, gate: Gate) -> None:
    site = serve({**MAPS, "slow": gate.lookup}, Config(idle_timeout=0.1, max_connections=2), endpoint)
    slow, silent = site.connect(), site.connect()
    ask_each([slow])
    slow.request(b"slow key")
    gate.await_arrival()
    ask_each([silent])
    with served(site.endpoint):
        assert silent.end() is abrupt(endpoint)
        gate.open()
        assert slow.reply() == b"OK done"
        ask_each([slow])


def test_who_is_refused_is_not_answered_before_however_late_the_master_is(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=2, max_connections=1), endpoint)
    client = site.connect()
    ask_each([client])
    kill(site.pid, signal.SIGSTOP)
    # Workers have eight places each for newcomers while nobody gives them more.
    newcomers = [site.connect() for _ in range(30)]
    for newcomer in newcomers:
        newcomer.request(b"ok key")
    eventually(lambda: site.counted("connections", "refused"), DEADLINE, "those that found no place are refused")
    kill(site.pid, signal.SIGCONT)
    for newcomer in newcomers:
        newcomer.end()  # and nothing before
    ask_each([client])


def test_where_descriptors_are_few_old_connections_make_room_for_new_ones(fork: Fork, directory: Path) -> None:
    endpoint = f"unix:{directory}/socket"

    def serve_with_few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
        server = Server(Config(process_limit=2, idle_timeout=0.1))
        server.register_map("ok", say_ok)
        server.listen(endpoint)
        server.serve_forever()

    process = fork(serve_with_few_descriptors)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(served(endpoint)) for _ in range(600)]
        eventually(lambda: sum(client.is_open for client in clients) <= 512, DEADLINE, "as many as descriptors")
        ask_each(clients[-50:])
    assert process.is_alive()


def test_a_refusal_reaches_a_client_that_was_silent_before(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0.1), endpoint)
    client = site.connect()
    for _ in range(5):
        ask_each([client])
        site.await_idle()
    client.send(b"garbage" + b"x" * 500_000)
    site.await_idle()
    assert client.reply() == b"PERM malformed request"
    assert client.end() is End.ORDERLY


def test_a_last_request_with_the_end_of_the_client_is_answered_after_silence(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(idle_timeout=0.1), endpoint)
    client = site.connect()
    for _ in range(5):
        ask_each([client])
        site.await_idle()
    client.request(b"ok key")
    client.sock.shutdown(socket.SHUT_WR)
    assert client.reply() == b"OK ok"


def test_a_client_that_hangs_up_in_silence_leaves_nothing_in_the_master(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=2, idle_timeout=0.1), endpoint)
    site.await_workers(2)
    fresh = descriptors(site.pid)
    for _ in range(3):
        clients = [site.connect() for _ in range(20)]
        ask_each(clients)
        site.await_idle()
        eventually(lambda: descriptors(site.pid).total() == fresh.total() + 20, DEADLINE, "silent connections")
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
    site.await_idle()
    if ending == "kill":
        kill(site.pid)
    else:
        site.server.close()
    for client in clients:
        assert client.end() is abrupt(endpoint)
