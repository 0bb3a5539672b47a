"""No lookup takes forever: it is interrupted, or its worker is killed, and nobody else is harmed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from time import monotonic
from typing import cast

import pytest

from prefork_socketmap import Config
from prefork_socketmap.prefork import watchdog
from prefork_socketmap.prefork.generation import Generation
from prefork_socketmap.prefork.pool import Child
from prefork_socketmap.prefork.scoreboard import Row, Scoreboard
from prefork_socketmap.service import Lookup
from tests.processes import await_end, descriptors, is_alive, kill
from tests.serving import DEADLINE, Client, Serve, abrupt, who
from tests.waiting import eventually

TIMED_OUT = b"TIMEOUT lookup timed out"


def loop(key: str) -> str:
    while True:
        pass


def sleep(key: str) -> str:
    time.sleep(1000)
    return "slept"


def swallow_exceptions(key: str) -> str:
    while True:
        with contextlib.suppress(Exception):  # as careless code has it
            time.sleep(1000)


def swallow_everything(key: str) -> str:
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(1000)


def wait_for_a_lock(key: str) -> str:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
    return "locked"


def hang_in_c(key: str) -> str:
    """Wait for a mutex that this thread holds: no signal ends that, and Python's handlers do not run."""
    mutex = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
    return "locked"


def ends_in_time(key: str) -> str:
    time.sleep(0.3)
    return "slept"


MAPS = {"who": who, "loop": loop, "sleep": sleep, "lock": wait_for_a_lock, "exceptions": swallow_exceptions}


def worker_of(client: Client) -> int:
    return int(client.ask(b"who key").removeprefix(b"OK "))


@pytest.mark.parametrize("name", ["loop", "sleep", "lock", "exceptions"])
def test_a_lookup_in_python_is_interrupted_and_its_worker_goes_on(serve: Serve, endpoint: str, name: str) -> None:
    site = serve(MAPS, Config(lookup_timeout=0.3, process_limit=1), endpoint)
    [worker] = site.await_workers(1)
    fresh = descriptors(worker)
    with site.connect() as client:
        began = time.monotonic()
        assert client.ask(f"{name} key".encode()) == TIMED_OUT
        assert time.monotonic() - began >= 0.3
        assert worker_of(client) == worker
        assert client.ask(f"{name} key".encode()) == TIMED_OUT
        assert worker_of(client) == worker
    eventually(lambda: descriptors(worker) == fresh, DEADLINE)


class BetweenLookups(Row):
    """The row of a worker that ends its lookup just when the master looks."""

    @property
    def job_started(self) -> float:
        times = vars(self).setdefault("times", [monotonic()])
        return times.pop() if times else 0.0


class Spared(Child):
    """Nobody's process."""

    def send(self, number: int) -> None:
        pytest.fail(f"it is sent signal {number}")


def test_a_worker_that_ends_its_lookup_while_the_master_looks_is_not_taken_for_stuck() -> None:
    board = Scoreboard()
    row = BetweenLookups(board, board.claim(1).slot)
    child = Spared(0, row, cast("Generation", None), monotonic(), ready=True)
    watchdog.check([child], board, 30.0, monotonic())
    assert not child.killed
    board.close()


def test_a_lookup_within_its_time_is_not_interrupted(serve: Serve, endpoint: str) -> None:
    site = serve({"slow": ends_in_time}, Config(lookup_timeout=5, process_limit=1), endpoint)
    with site.connect() as client:
        for _ in range(3):
            assert client.ask(b"slow key") == b"OK slept"


def test_lookups_that_take_longer_than_the_limit_together_are_not_interrupted(serve: Serve, endpoint: str) -> None:
    site = serve({"slow": ends_in_time}, Config(lookup_timeout=1, process_limit=1), endpoint)
    with site.connect() as client:
        for _ in range(5):
            client.request(b"slow key")
        assert [client.reply() for _ in range(5)] == [b"OK slept"] * 5


@pytest.mark.parametrize("limit", [0, 10])
def test_an_interruption_that_is_not_due_changes_nothing(serve: Serve, endpoint: str, limit: int) -> None:
    """It may come late, and hit the next lookup; or it comes from somebody else."""

    def interrupt_itself(key: str) -> str:
        kill(os.getpid(), signal.SIGUSR2)
        return "ok"

    site = serve({"interrupted": interrupt_itself}, Config(lookup_timeout=limit), endpoint)
    with site.connect() as client:
        assert client.ask(b"interrupted key") == b"OK ok"


@pytest.mark.parametrize("lookup", [hang_in_c, swallow_everything])
def test_a_worker_that_cannot_be_interrupted_is_killed_and_replaced(
    serve: Serve, endpoint: str, lookup: Lookup
) -> None:
    site = serve({**MAPS, "stuck": lookup}, Config(lookup_timeout=0.3, process_limit=2), endpoint)
    site.await_workers(2)
    fresh = descriptors(site.pid)
    with site.connect() as stuck, site.connect() as bystander:
        worker_of(bystander)
        stuck.request(b"stuck key")
        assert stuck.end() is abrupt(endpoint)
        site.await_workers(2)
        assert bystander.is_open
        worker_of(bystander)
    eventually(lambda: descriptors(site.pid) == fresh, DEADLINE)


def test_a_stopped_worker_is_replaced(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(lookup_timeout=0.3, process_limit=1), endpoint)
    [worker] = site.await_workers(1)
    kill(worker, signal.SIGSTOP)
    await_end(worker)
    [replacement] = site.await_workers(1)
    with site.connect() as client:
        assert worker_of(client) == replacement


def test_a_worker_that_is_continued_in_time_is_left_alone(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(lookup_timeout=1, process_limit=1), endpoint)
    [worker] = site.await_workers(1)
    kill(worker, signal.SIGSTOP)
    kill(worker, signal.SIGCONT)
    time.sleep(1.5)  # past the limit: that is the test
    assert is_alive(worker)
    with site.connect() as client:
        assert worker_of(client) == worker


def test_a_worker_that_is_stopped_in_a_lookup_costs_that_lookup(serve: Serve, endpoint: str) -> None:
    def stop(key: str) -> str:
        kill(os.getpid(), signal.SIGSTOP)
        return "continued"

    site = serve({**MAPS, "stop": stop}, Config(lookup_timeout=0.3, process_limit=2), endpoint)
    with site.connect() as client, site.connect() as bystander:
        worker_of(bystander)
        client.request(b"stop key")
        assert client.end() is abrupt(endpoint)
        site.await_workers(2)
        worker_of(bystander)


def test_memory_that_runs_out_costs_the_lookup_alone(serve: Serve, endpoint: str) -> None:
    def exhaust(key: str) -> str:
        return str(len(bytearray(1 << 62)))

    site = serve({**MAPS, "memory": exhaust}, Config(process_limit=1), endpoint)
    with site.connect() as client:
        worker = worker_of(client)
        assert client.ask(b"memory key") == b"TEMP lookup failed"
        assert worker_of(client) == worker


def test_a_recursion_without_end_costs_the_lookup_alone(serve: Serve, endpoint: str) -> None:
    def recurse(key: str) -> str:
        return recurse(key)

    site = serve({**MAPS, "deep": recurse}, Config(process_limit=1), endpoint)
    with site.connect() as client:
        worker = worker_of(client)
        assert client.ask(b"deep key") == b"TEMP lookup failed"
        assert worker_of(client) == worker


def test_stuck_lookups_keep_nobody_else_from_being_served(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(lookup_timeout=0.5, process_limit=4), endpoint)
    stuck = [site.connect() for _ in range(3)]
    others = [site.connect() for _ in range(10)]
    for client in stuck:
        client.request(b"sleep key")
    for _ in range(10):
        for client in others:
            worker_of(client)
    assert [client.reply() for client in stuck] == [TIMED_OUT] * 3


def test_more_stuck_lookups_than_workers_delay_the_others_for_the_limit_only(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(lookup_timeout=0.3, process_limit=2), endpoint)
    stuck = [site.connect() for _ in range(6)]
    for client in stuck:
        client.request(b"sleep key")
    with site.connect() as other:
        worker_of(other)
    assert [client.reply() for client in stuck] == [TIMED_OUT] * 6
