"""The ports of tests: none that the kernel may give to a client meanwhile, and none that another run of tests has."""

from __future__ import annotations

import multiprocessing
import re
import socket
import subprocess
import sys
from pathlib import Path

from tests.integration.servers.process import free_port

TESTS = Path(__file__).parent
MANY = 60


def some_ports(_number: int = 0) -> list[int]:
    return [free_port() for _ in range(MANY)]


def test_they_lie_below_those_of_clients_and_are_free() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        for port in some_ports():
            assert 1024 <= port < client.getsockname()[1]
            socket.create_server(("127.0.0.1", port)).close()


def test_a_port_that_is_taken_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        for _ in range(10):  # they come around again
            assert taken.getsockname()[1] not in some_ports()


def test_no_two_processes_get_the_same() -> None:
    script = "from tests.test_ports import some_ports; print(*some_ports()); input()"
    command = [sys.executable, "-c", script]
    others = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent)
        for _ in range(2)
    ]
    ports = some_ports()
    for other in others:
        assert other.stdout
        ports += map(int, other.stdout.readline().split())
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for found in pool.map(some_ports, range(2), 1):
            ports += found
    for other in others:
        other.communicate("\n")
    assert len(set(ports)) == len(ports) == 5 * MANY


def test_tests_take_their_ports_from_there() -> None:
    probe = re.compile(r'(?:bind|create_server)\(\("[^"]*", 0\)')
    assert [path for path in TESTS.rglob("*.py") if probe.search(path.read_text())] == [Path(__file__)]
