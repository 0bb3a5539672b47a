"""The pool of workers: it grows for those who wait, shrinks when they leave, and serves more clients than it has."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from prefork_socketmap import Config
from prefork_socketmap.prefork.channel import make_inbox
from prefork_socketmap.prefork.connections import Connections
from prefork_socketmap.prefork.counters import server_counter
from prefork_socketmap.prefork.duty import Duty
from prefork_socketmap.prefork.generation import Generation
from prefork_socketmap.prefork.plan import Plan
from prefork_socketmap.prefork.pool import Pool
from prefork_socketmap.prefork.scoreboard import Scoreboard, State
from prefork_socketmap.prefork.shared import Bell, Lifeline, Shared
from prefork_socketmap.prefork.signals import Signals
from prefork_socketmap.prefork.table import ConnectionTable
from prefork_socketmap.socketmap import netstring
from tests.processes import await_end, descriptors, is_alive, kill
from tests.serving import DEADLINE, MAPS, Gate, Serve, Site, abrupt, end_of_newcomer, scoreboard
from tests.waiting import eventually


def test_min_spare_workers_are_ready_before_anybody_comes(serve: Serve) -> None:
    site = serve(MAPS, Config(process_limit=10, min_spare=3))
    site.await_workers(3)


def test_process_limit_bounds_min_spare(serve: Serve) -> None:
    site = serve(MAPS, Config(process_limit=2, min_spare=5))
    site.await_workers(2)


def test_the_pool_grows_until_everybody_has_a_worker(serve: Serve, endpoint: str, gate: Gate) -> None:
    site = serve({"slow": gate.lookup}, Config(process_limit=8, min_spare=1), endpoint)
    clients = [site.connect() for _ in range(8)]
    gate.gather(clients)


def test_the_pool_grows_for_clients_that_were_silent(serve: Serve, endpoint: str, gate: Gate) -> None:
    site = serve({**MAPS, "slow": gate.lookup}, Config(process_limit=8, min_spare=1), endpoint)
    clients = [site.connect() for _ in range(8)]
    for client in clients:
        assert client.ask(b"ok key") == b"OK ok"
    site.await_idle()
    gate.gather(clients)


def test_the_pool_does_not_grow_beyond_process_limit(serve: Serve, endpoint: str, gate: Gate) -> None:
    site = serve({**MAPS, "slow": gate.lookup}, Config(process_limit=3, min_spare=2), endpoint)
    clients = [site.connect() for _ in range(9)]
    for client in clients:
        client.request(b"slow key")
    for _ in range(3):
        gate.await_arrival()
    assert len(site.workers) == 3
    for _ in clients[3:]:
        gate.open()
        gate.await_arrival()
        assert len(site.workers) == 3
    for _ in range(3):
        gate.open()
    assert [client.reply() for client in clients] == [b"OK done"] * 9


def test_workers_that_nobody_needs_leave_after_max_idle(serve: Serve, endpoint: str, gate: Gate) -> None:
    site = serve({**MAPS, "slow": gate.lookup}, Config(process_limit=8, min_spare=2, max_idle=0.5), endpoint)
    fresh = descriptors(site.pid)
    clients = [site.connect() for _ in range(6)]
    gate.gather(clients)
    site.await_workers(2)
    assert all(client.is_open for client in clients)
    assert clients[0].ask(b"ok key") == b"OK ok"
    for client in clients:
        client.close()
    eventually(lambda: descriptors(site.pid) == fresh, DEADLINE)


def test_a_worker_is_replaced_after_about_max_use_lookups(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=1, max_use=100), endpoint)
    with site.connect() as client:
        served = Counter(client.ask(b"who key") for _ in range(500))
    whole = list(served.values())[:-1]
    assert len(whole) >= 3
    assert all(90 <= uses <= 110 for uses in whole)


def test_lookups_beyond_max_use_in_one_packet_are_answered_and_the_worker_leaves(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=1, max_use=2), endpoint)
    with site.connect() as client:
        client.send(netstring.encode(b"who key") * 10)
        workers = {client.reply() for _ in range(10)}
        assert client.ask(b"who key") not in workers


def test_a_client_whose_worker_leaves_after_its_first_answer_is_kept(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=4, max_use=1), endpoint)
    clients = []
    for _ in range(100):
        clients.append(site.connect())
        assert clients[-1].ask(b"ok key") == b"OK ok"
    for client in clients:
        assert client.ask(b"ok key") == b"OK ok"
    assert site.counted("connections", "refused") == 0


def test_more_busy_clients_than_workers_are_all_served(serve: Serve, endpoint: str) -> None:
    """Each wants a hundred answers and pauses for nothing: a starved one would never get them."""
    site = serve(MAPS, Config(process_limit=2), endpoint)
    wanted = dict.fromkeys((site.connect() for _ in range(16)), 100)
    with selectors.DefaultSelector() as waiting:
        for client in wanted:
            waiting.register(client.sock, selectors.EVENT_READ, client)
            client.request(b"ok key")
        deadline = time.monotonic() + DEADLINE
        while any(left > 0 for left in wanted.values()):
            assert time.monotonic() < deadline, f"starved: {list(wanted.values())}"
            for key, _ in waiting.select(1):
                assert key.data.reply() == b"OK ok"
                wanted[key.data] -= 1
                # On and on: those that have enough go on asking, and must not keep the others from theirs.
                key.data.request(b"ok key")


def test_pipelining_clients_do_not_keep_others_waiting_forever(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=1), endpoint)
    with site.connect() as greedy, site.connect() as modest:
        deadline = time.monotonic() + DEADLINE
        modest.request(b"ok key")
        while modest.is_open:
            assert time.monotonic() < deadline, "the modest client starves"
            for _ in range(50):
                greedy.request(b"ok key")
            for _ in range(50):
                assert greedy.reply() == b"OK ok"
        assert modest.reply() == b"OK ok"


def test_silent_newcomers_keep_nobody_from_being_served(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=2), endpoint)
    silent = [site.connect() for _ in range(50)]
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"
    for client in silent:
        assert client.ask(b"ok key") == b"OK ok"


def test_workers_that_are_killed_all_at_once_are_replaced(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=4, min_spare=4), endpoint)
    fresh = descriptors(site.pid)
    for _ in range(3):
        workers = site.await_workers(4)
        for worker in workers:
            kill(worker)
        await_end(*workers)
    site.await_workers(4)
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"
    eventually(lambda: descriptors(site.pid) == fresh, DEADLINE)


def test_clients_that_come_and_go_leave_bounded_traces_in_the_workers(serve: Serve, endpoint: str) -> None:
    """A worker keeps a connection that it has met, but not for long after its end."""
    site = serve(MAPS, Config(process_limit=2), endpoint)
    workers = site.await_workers(2)
    fresh = {worker: descriptors(worker).total() for worker in workers}
    for _ in range(10):
        clients = [site.connect() for _ in range(10)]
        for _ in range(5):
            for client in clients:
                assert client.ask(b"ok key") == b"OK ok"
        for client in clients:
            client.close()
    site.await_idle()
    for worker in workers:
        assert is_alive(worker)
        assert descriptors(worker).total() <= fresh[worker] + 30


# Limits.


def test_a_connection_beyond_max_connections_is_closed_at_once(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(max_connections=3, idle_timeout=1000), endpoint)
    clients = [site.connect() for _ in range(3)]
    for client in clients:
        assert client.ask(b"ok key") == b"OK ok"
    for _ in range(2):
        assert end_of_newcomer(site.endpoint) is abrupt(endpoint)
    site.await_count("connections", "refused", 2)
    for client in clients:
        assert client.ask(b"ok key") == b"OK ok"


def test_there_is_room_again_when_a_client_has_left(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(max_connections=2, idle_timeout=0), endpoint)
    for _ in range(3):
        clients = [site.connect() for _ in range(2)]
        for client in clients:
            assert client.ask(b"ok key") == b"OK ok"
        for client in clients:
            client.close()

        def is_served() -> bool:
            try:
                with site.connect() as client:
                    return client.ask(b"ok key") == b"OK ok"
            except (ConnectionError, AssertionError):
                return False

        eventually(is_served, DEADLINE)
        eventually(lambda: scoreboard(site.pid).connections == 0, DEADLINE, "the end of all connections")


# What it costs.


def context_switches(site: Site) -> int:
    """Return how often the workers have waited for something, all together."""
    statuses = "".join(Path(f"/proc/{pid}/status").read_text() for pid in site.workers)
    return sum(map(int, re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", statuses, re.M)))


def test_a_connection_wakes_one_worker(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=10, min_spare=10), endpoint)
    site.await_workers(10)
    before = context_switches(site)
    for _ in range(50):
        with site.connect() as client:
            assert client.ask(b"ok key") == b"OK ok"
    site.await_idle()
    # Some for each connection, its worker's; were all to wake for each, it would be hundreds more.
    assert context_switches(site) - before < 50 * 5


def test_a_lookup_on_a_busy_connection_costs_at_most_five_system_calls(
    serve: Serve, endpoint: str, tmp_path: Path
) -> None:
    if not shutil.which("strace"):
        if "CI" in os.environ:
            pytest.fail("strace is missing: apt install strace")
        pytest.skip("install strace: apt install strace")
    site = serve(MAPS, Config(process_limit=2, min_spare=2), endpoint)
    workers = site.await_workers(2)
    output = tmp_path / "strace"
    tracer = subprocess.Popen(
        ["strace", "-o", str(output), *(f"--attach={worker}" for worker in workers)], stderr=subprocess.PIPE
    )
    assert tracer.stderr
    for _ in workers:
        assert b"attached" in tracer.stderr.readline()
    with site.connect() as client:
        for _ in range(1000):
            assert client.ask(b"ok key") == b"OK ok"
        tracer.terminate()
        tracer.communicate()
    calls = Counter(re.findall(r"^\d+ +(\w+)\(", output.read_text(), re.M))
    assert calls["recvfrom"] >= 1000
    assert calls["sendto"] >= 1000
    assert calls["epoll_wait"] >= 900  # a new client is answered a few times on the spot
    assert calls["epoll_ctl"] >= 900
    # One more at times, when a worker leaves nobody waiting; and those at the connection's beginning and end.
    assert calls.total() < 5000, calls


# The forks themselves.


def test_workers_that_the_system_lets_us_start_are_kept_when_it_refuses_more(monkeypatch: pytest.MonkeyPatch) -> None:
    board, lifeline = Scoreboard(), Lifeline.new()
    shared = Shared(board, ConnectionTable(700, 800), Bell(), *make_inbox(), lifeline)
    plan = Plan(endpoints=(), limits=Config(), start=lambda _counters: lambda _connection: None)
    duty = Duty(board, lifeline.fd)
    generation = Generation(1, plan, duty, existing=(), inherited=())
    pool = Pool(shared, Connections(shared.table, board), Signals([]), in_child=lambda _generation: None)
    pids = iter([4711, 4712])

    def fork() -> int:
        pid = next(pids, 0)
        if not pid:
            raise BlockingIOError
        return pid

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(BlockingIOError):
        pool.fork(generation, 5)
    assert list(pool.children) == [4711, 4712]
    assert [(row.pid, row.state) for row in shared.board.rows()] == [
        (4711, State.STARTING),
        (4712, State.STARTING),
        *[(0, State.FREE)] * 3,
    ]
    assert board.server_counters()[server_counter("workers", "spawned")] == 2
    duty.close_at(shared.table)
    shared.close()
