"""Few descriptors, many open files, vanished socket files: it serves, or says what it needs."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from prefork_socketmap import Config, Server
from prefork_socketmap.prefork.reload import StartError
from tests.crowd import Board, Crowd, GoodClient, echo
from tests.integration.servers.process import free_port
from tests.processes import children, descriptors, kill
from tests.serving import DEADLINE, Client, Serve, serving
from tests.waiting import eventually

_forking = multiprocessing.get_context("fork")


def outcome(limit: int, open_files: int, use: Callable[[str, Server], None]) -> str:
    """Return what becomes of a server that starts, and is used, under a limit, in a program with some open files."""
    reader, writer = _forking.Pipe(duplex=False)

    def run() -> None:
        results = _have_open_nothing_but(writer)
        files = [os.open("/dev/null", os.O_RDONLY) for _ in range(open_files)]
        if limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        server = Server(Config(process_limit=4, min_spare=2, idle_timeout=0.1))
        server.register_map("echo", echo)
        server.listen(f"inet:127.0.0.1:{free_port()}")
        try:
            with server.start() as running:
                use(running.endpoints[0], server)
            results.send("served")
        except StartError as error:
            results.send(str(error))
        except BaseException as error:  # noqa: BLE001
            results.send(f"failed: {error!r}")
        del files

    process = _forking.Process(target=run)
    process.start()
    try:
        assert reader.poll(2 * DEADLINE), "neither serves nor says why"
        return str(reader.recv())
    finally:
        process.kill()
        process.join()


def _have_open_nothing_but(pipe: Connection[str, str]) -> Connection[str, str]:
    """Close what the test has open, and give *pipe* the lowest number: a high one takes the room of the server's."""
    os.dup2(pipe.fileno(), 3)
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return Connection(3, readable=False)


def ask_some(endpoint: str, server: Server) -> None:
    """Some clients ask, again and again, each over its connection."""
    clients = [Client(endpoint) for _ in range(3)]
    for turn in range(10):
        for client in clients:
            client.sock.settimeout(5)
            assert client.ask(b"echo %d" % turn) == b"OK %d" % turn
    for client in clients:
        client.close()


LIMITS = [24, 28, 32, 40, 48, 56, 64, 72, 80, 96, 110, 128, 160, 200, 256, 300, 400, 512, 700, 1000, 1024, 1200, 4096]


@pytest.mark.parametrize("limit", LIMITS)
def test_under_any_limit_it_serves_or_names_the_limit_that_it_needs(limit: int) -> None:
    found = outcome(limit, 0, ask_some)
    if found != "served":
        needed = int(re.search(r"at least (\d+) are needed", found)[1])  # type: ignore[index]
        assert "RLIMIT_NOFILE" in found
        assert needed > limit
        assert outcome(needed, 0, ask_some) == "served"
    else:
        assert limit > 80


@pytest.mark.parametrize(("limit", "open_files"), [(1024, 300), (0, 1100), (1024, 700), (2048, 1100), (4096, 3000)])
def test_a_program_with_many_open_files_serves(limit: int, open_files: int) -> None:
    assert outcome(limit, open_files, ask_some) == "served"


def test_files_that_leave_no_room_for_connections_are_an_error() -> None:
    assert "RLIMIT_NOFILE" in outcome(1024, 1000, ask_some)


@pytest.mark.parametrize("limit", [128, 160, 256, 400])
def test_with_few_descriptors_a_crowd_is_served_by_workers_that_know_none_of_it(limit: int) -> None:
    """All at once, after a reload: each new worker has to receive whatever there is."""

    def use(endpoint: str, server: Server) -> None:
        clients: list[Client] = []
        for turn in range(3):
            while len(clients) < limit // 2 - 30:
                clients.append(Client(endpoint))
            for client in clients:
                client.sock.settimeout(5)
                client.request(b"echo %d" % turn)
            for client in clients:
                assert client.reply() == b"OK %d" % turn
        for client in clients:
            client.close()

    # The test's own descriptors are in another process than the server's, but under the same limit.
    assert outcome(limit, 0, use) == "served"


def test_a_worker_that_comes_late_receives_a_crowd_under_a_low_limit() -> None:
    def use(endpoint: str, server: Server) -> None:
        clients = [Client(endpoint) for _ in range(110)]
        for client in clients:
            client.sock.settimeout(5)
            assert client.ask(b"echo key") == b"OK key"
        background = server._background
        assert background
        first, *others = children(background.pid)
        kill(first)
        answered = 0
        for _ in range(5):
            for client in clients:
                try:
                    assert client.ask(b"echo key") == b"OK key"
                except OSError:
                    continue
                answered += 1
        assert answered >= 5 * 109
        assert set(others) <= set(children(background.pid)), "workers have died"

    assert outcome(256, 0, use) == "served"


def test_a_socket_file_that_is_gone_is_bound_anew_by_reload(serve: Serve, directory: Path) -> None:
    path = directory / "socket"
    site = serve({"echo": echo}, None, f"unix:{path}")
    good = GoodClient(site)
    good.ask()
    for _ in range(3):
        path.unlink()
        with pytest.raises(FileNotFoundError):
            Client(site.endpoint)
        kill(site.pid, signal.SIGHUP)
        eventually(path.exists, DEADLINE)
        good.ask()
        serving(site.endpoint).close()
        good.ask_anew()
    assert path.stat().st_mode & 0o777 == 0o666
    site.server.shutdown(timeout=DEADLINE)
    assert not path.exists()


def test_a_socket_file_of_somebody_else_in_its_place_is_left_alone(serve: Serve, directory: Path) -> None:
    path = directory / "socket"
    site = serve({"echo": echo}, None, f"unix:{path}")
    path.unlink()
    path.write_text("something else")
    kill(site.pid, signal.SIGHUP)
    good_before = Board(site.pid)
    eventually(lambda: good_before.counter("reloads", "refused") == 1, DEADLINE)
    site.server.shutdown(timeout=DEADLINE)
    assert path.read_text() == "something else"


def test_descriptors_of_clients_that_have_gone_do_not_pile_up_in_workers(serve: Serve, endpoint: str) -> None:
    site = serve({"echo": echo}, None, endpoint)
    good = GoodClient(site)
    fresh = max(descriptors(pid).total() for pid in site.workers)
    for _ in range(5):
        with Crowd(site.endpoint) as crowd:
            crowd.join(300, b"8:echo key,")
            eventually(lambda crowd=crowd: crowd.heard() == 300, DEADLINE)  # type: ignore[misc]
            good.ask()
        # Or the next one would have other numbers.
        eventually(lambda: Board(site.pid).connections == 1, DEADLINE)
    for _ in range(100):
        good.ask()
    # Those of one crowd may still be there, until its numbers are used again.
    assert max(descriptors(pid).total() for pid in site.workers) <= fresh + 310
