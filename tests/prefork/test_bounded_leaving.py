"""Whoever has to leave leaves, whatever the code of a map has done to signals, and however long its lookup takes."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from prefork_socketmap import Config
from tests.crowd import Board, Crowd, GoodClient, Log, echo
from tests.processes import await_end, kill
from tests.serving import DEADLINE, Gate, Serve, Site
from tests.waiting import eventually

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM]


def ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def handle_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)


def block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def generations_are(site: Site, *wanted: int) -> Callable[[], bool]:
    def check() -> bool:
        found = Board(site.pid).generations()
        assert found == set(wanted)
        return True

    return check


@pytest.mark.parametrize("spoil", [ignore_signals, handle_signals, block_signals])
def test_workers_leave_whatever_a_map_has_done_to_signals(
    serve: Serve, endpoint: str, spoil: Callable[[], None]
) -> None:
    def answer(key: str) -> str:
        spoil()
        return key

    site = serve({"echo": answer}, Config(lookup_timeout=2), endpoint, on_worker_start=spoil)
    good = GoodClient(site)
    for generation in (2, 3, 4):
        for _ in range(20):
            good.ask()
        kill(site.pid, signal.SIGHUP)
        eventually(generations_are(site, generation), DEADLINE)
    good.ask_anew()
    workers = site.workers
    site.server.shutdown(timeout=DEADLINE)
    await_end(*workers)


def test_a_worker_that_does_not_leave_is_killed_and_the_log_says_so(serve: Serve, server_log: Log) -> None:
    """In C code, as it were, that no signal interrupts, and for ever."""

    def stick(key: str) -> str:
        block_signals()
        threading.Event().wait()
        return key

    site = serve({"stuck": stick, "echo": echo}, Config(lookup_timeout=0.5))
    client = site.connect()
    client.request(b"stuck key")
    good = GoodClient(site)
    good.ask()
    kill(site.pid, signal.SIGHUP)
    eventually(generations_are(site, 2), DEADLINE)
    assert server_log.lines(": killed")
    assert Board(site.pid).counter("workers", "killed") == 1
    client.end()
    good.ask()


def test_a_lookup_that_is_interrupted_is_answered_and_its_worker_leaves(serve: Serve) -> None:
    def sleep(key: str) -> str:
        time.sleep(1000)
        return key

    site = serve({"long": sleep, "echo": echo}, Config(lookup_timeout=1))
    client = site.connect()
    client.request(b"long key")
    kill(site.pid, signal.SIGHUP)
    assert client.reply().startswith(b"TIMEOUT ")
    eventually(generations_are(site, 2), DEADLINE)


def test_a_server_stops_at_once_while_workers_are_starting(serve: Serve, gate: Gate) -> None:
    """The first ones are ready; then others take for ever to start."""
    shut = multiprocessing.get_context("fork").Event()

    def begin() -> None:
        if shut.is_set():
            gate.arrive()
            time.sleep(1000)

    site = serve({"echo": echo}, Config(stop_timeout=1000), on_worker_start=begin)
    shut.set()
    kill(site.pid, signal.SIGHUP)
    gate.await_arrival()
    GoodClient(site).ask()
    workers = site.workers
    site.server.shutdown(timeout=DEADLINE)
    await_end(*workers)


def test_generations_together_stay_within_their_bound_and_the_refused_reload_says_why(
    serve: Serve, gate: Gate, server_log: Log
) -> None:
    limits = Config(process_limit=6, min_spare=2, lookup_timeout=1000)
    site = serve({"slow": gate.lookup, "echo": echo}, limits)
    most = 0
    stuck = []
    good = GoodClient(site)

    def settled(generation: int) -> bool:
        nonlocal most
        most = max(most, len(site.workers))
        return bool(server_log.lines(f"reloaded: generation {generation} ") or server_log.lines("reload refused"))

    for generation in range(2, 7):
        for _ in range(4):
            client = site.connect()
            client.request(b"slow key")
            stuck.append(client)
        kill(site.pid, signal.SIGHUP)
        eventually(partial(settled, generation), DEADLINE)
        most = max(most, len(site.workers))
    assert most <= 6 + 2
    assert server_log.lines("so many workers of former generations have not left yet")
    for _ in stuck:
        gate.open()
    assert [client.reply() for client in stuck] == [b"OK done"] * len(stuck)
    good.ask()
    kill(site.pid, signal.SIGHUP)
    eventually(lambda: len(Board(site.pid).generations()) == 1, DEADLINE)
    good.ask()


def test_half_requests_do_not_keep_a_server_from_stopping(serve: Serve, endpoint: str) -> None:
    site = serve({"echo": echo}, Config(stop_timeout=1000), endpoint)
    with Crowd(site.endpoint) as crowd:
        crowd.join(100, b"5:ab")
        GoodClient(site).ask()
        site.server.shutdown(timeout=DEADLINE)


class EndlessHandler(logging.Handler):
    """What a library may leave behind: something that takes for ever at the end of the process."""

    def flush(self) -> None:
        block_signals()
        threading.Event().wait()


def test_a_worker_that_is_stuck_outside_of_a_lookup_is_killed_when_it_has_to_leave(
    serve: Serve, server_log: Log
) -> None:
    kept: list[object] = []
    site = serve(
        {"echo": echo},
        Config(min_spare=1, lookup_timeout=0.1),
        on_worker_start=lambda: kept.append(EndlessHandler()),
    )
    good = GoodClient(site)
    good.ask()
    kill(site.pid, signal.SIGHUP)
    eventually(generations_are(site, 2), DEADLINE)
    assert server_log.lines("has not left, as it was told to: killed")
    good.ask()
    site.server.close()
