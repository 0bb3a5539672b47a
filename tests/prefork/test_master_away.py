"""A master that is killed leaves nothing behind, soon; and it is not killed by just any signal."""

from __future__ import annotations

import ctypes
import signal
import time
from collections.abc import Callable

import pytest

from prefork_socketmap import Config
from tests.crowd import Board, GoodClient, Log, echo
from tests.processes import await_end, is_alive, kill
from tests.serving import DEADLINE, Client, Gate, Serve, Site
from tests.waiting import eventually

SOON = 10.0  # seconds, for what takes three or so


def sleep(key: str) -> str:
    """Be stuck where signals interrupt it: after a handler it sleeps on."""
    time.sleep(1000)
    return key


def ignore_and_sleep(key: str) -> str:
    """Be stuck where nothing but the kernel ends it: in C, with all signals blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.CDLL(None).sleep(1000)
    return key


def ignore_signals_and_sleep(key: str) -> str:
    for number in (signal.SIGUSR2, signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)
    return key


STUCK = [sleep, ignore_and_sleep, ignore_signals_and_sleep]


def is_refused(endpoint: str) -> bool:
    try:
        Client(endpoint).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except ConnectionResetError:
        return False
    return False


def kill_master(site: Site) -> list[int]:
    workers = site.workers
    kill(site.pid, signal.SIGKILL)
    return workers


def test_idle_workers_end_with_their_master(serve: Serve, endpoint: str) -> None:
    site = serve({"echo": echo}, None, endpoint)
    good = GoodClient(site)
    good.ask()
    workers = kill_master(site)
    await_end(*workers)
    assert is_refused(site.endpoint)


def test_a_lookup_under_way_is_answered_after_the_master_s_death(serve: Serve, gate: Gate, endpoint: str) -> None:
    site = serve({"slow": gate.lookup}, None, endpoint)
    client = site.connect()
    client.request(b"slow key")
    gate.await_arrival()
    workers = kill_master(site)
    eventually(lambda: is_refused(site.endpoint), DEADLINE)
    gate.open()
    assert client.reply() == b"OK done"
    await_end(*workers)


@pytest.mark.parametrize("stuck", STUCK)
def test_a_stuck_worker_ends_within_seconds_and_its_address_is_free_at_once(
    serve: Serve, endpoint: str, stuck: Callable[[str], str]
) -> None:
    site = serve({"stuck": stuck, "echo": echo}, Config(lookup_timeout=0), endpoint)
    client = site.connect()
    client.request(b"stuck key")
    GoodClient(site).ask()
    workers = kill_master(site)
    eventually(lambda: is_refused(site.endpoint), 2.0, "refusal")
    successor = serve({"echo": echo}, None, site.endpoint)
    GoodClient(successor).ask()
    await_end(*workers, within=SOON)
    GoodClient(successor).ask()


def test_workers_that_are_all_stuck_end_within_seconds(serve: Serve) -> None:
    """Nobody is idle, who could see to it: each gets a signal."""
    site = serve({"stuck": STUCK[0]}, Config(lookup_timeout=0, process_limit=2, min_spare=1))
    clients = [site.connect() for _ in range(3)]
    for client in clients:
        client.request(b"stuck key")
    eventually(lambda: Board(site.pid).counter("workers", "exhausted") == 1, DEADLINE, "two stuck workers")
    workers = kill_master(site)
    try:
        await_end(*workers, within=SOON)
        assert is_refused(site.endpoint)
    finally:
        for worker in filter(is_alive, workers):  # the site waits for the end of all
            kill(worker)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1,
        signal.SIGALRM,
        signal.SIGVTALRM,
        signal.SIGPROF,
        signal.SIGIO,
        signal.SIGPWR,
        signal.SIGUSR2,
        signal.SIGPIPE,
        signal.SIGWINCH,
        signal.SIGXFSZ,
    ],
)
def test_a_signal_that_means_nothing_does_not_kill_the_master(
    serve: Serve, server_log: Log, number: signal.Signals
) -> None:
    site = serve({"echo": echo})
    kill(site.pid, number)
    if number in (signal.SIGUSR1, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR):
        eventually(server_log.has(f"signal {signal.Signals(number).name} ignored"), DEADLINE)
    good = GoodClient(site)
    for _ in range(10):
        good.ask()
    assert is_alive(site.pid)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM, signal.SIGQUIT]
)
def test_signals_that_workers_get_harm_nobody(serve: Serve, number: signal.Signals) -> None:
    site = serve({"echo": echo})
    good = GoodClient(site)
    good.ask()
    workers = site.workers
    for worker in workers:
        kill(worker, number)
    for _ in range(50):
        good.ask()
    good.ask_anew()
    assert site.workers == workers
