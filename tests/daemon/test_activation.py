"""Socket activation: listening sockets come from the service manager, as LISTEN_FDS says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefork_socketmap.client import SocketmapClient
from prefork_socketmap.daemon.activation import inherited_sockets
from tests.daemon.installation import COMMAND, Installation
from tests.integration.servers.process import free_port
from tests.waiting import eventually

# What a service manager does: the descriptors from 3 on, then the program in the same process, whose pid it knows.
MANAGER = """
import os, sys
for number, descriptor in enumerate(map(int, sys.argv[1].split(",")), 3):
    os.dup2(descriptor, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(sys.argv[1].split(","))), LISTEN_FDNAMES="a:b")
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def inet() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", free_port())) as sock:
        yield _beyond_the_first(sock)


@pytest.fixture
def unix(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(tmp_path / "sock"))
        sock.listen()
        yield _beyond_the_first(sock)


def _beyond_the_first(sock: socket.socket) -> socket.socket:
    """Return *sock* with a number that the manager's own copies, from 3 on, do not overwrite."""
    copies = [sock.dup()]
    while copies[-1].fileno() < 20:
        copies.append(sock.dup())
    *low, high = copies
    for copy in low:
        copy.close()
    return high


def serve(
    installation: Installation, *sockets: socket.socket, arguments: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start ``serve`` with *sockets* handed over, and wait until it serves."""
    numbers = ",".join(str(sock.fileno()) for sock in sockets)
    with installation.log.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", MANAGER, numbers, *COMMAND, "serve", "-c", installation.config, *arguments],
            pass_fds=[sock.fileno() for sock in sockets],
            stderr=log,
        )
    eventually((installation.runtime_dir / "state.json").exists, within=30)
    return process


def test_inherited_sockets_are_served_beside_the_configured_ones(
    installation: Installation, inet: socket.socket, unix: socket.socket
) -> None:
    process = serve(installation, inet, unix)
    endpoints = [
        f"inet:127.0.0.1:{inet.getsockname()[1]}",
        f"unix:{unix.getsockname()}",
        installation.endpoint,
    ]
    for endpoint in endpoints:
        with SocketmapClient(endpoint) as client:
            assert client.lookup("colours", "sky") == "blue"
    process.terminate()
    assert process.wait(30) == 0
    # It is the service manager's: it stays, so that clients wait for the next server instead of failing.
    assert Path(unix.getsockname()).exists()


def test_an_inherited_socket_may_stand_in_the_config_file(installation: Installation, inet: socket.socket) -> None:
    endpoint = f"inet:127.0.0.1:{inet.getsockname()[1]}"
    installation.configure(listen=f'["{endpoint}"]')
    process = serve(installation, inet)
    with SocketmapClient(endpoint) as client:
        assert client.lookup("colours", "sky") == "blue"
    process.terminate()
    assert process.wait(30) == 0


def test_inherited_sockets_survive_a_reload(installation: Installation, inet: socket.socket) -> None:
    process = serve(installation, inet)
    assert installation.run("reload").returncode == 0
    with SocketmapClient(f"inet:127.0.0.1:{inet.getsockname()[1]}") as client:
        assert client.lookup("colours", "sky") == "blue"
    process.terminate()
    assert process.wait(30) == 0


def test_inherited_sockets_survive_an_upgrade(
    installation: Installation, inet: socket.socket, unix: socket.socket
) -> None:
    installation.configure(listen=f'["inet:127.0.0.1:{inet.getsockname()[1]}"]')  # which may name them
    process = serve(installation, inet, unix)
    for _ in range(2):
        assert installation.run("upgrade").returncode == 0
    for endpoint in f"inet:127.0.0.1:{inet.getsockname()[1]}", f"unix:{unix.getsockname()}":
        with SocketmapClient(endpoint) as client:
            assert client.lookup("colours", "sky") == "blue"
    process.terminate()
    assert process.wait(30) == 0
    # It is still the service manager's.
    assert Path(unix.getsockname()).exists()


def test_inherited_sockets_survive_the_way_into_the_background(
    installation: Installation, inet: socket.socket
) -> None:
    process = serve(installation, inet, arguments=("--daemon",))
    assert process.wait(30) == 0
    with SocketmapClient(f"inet:127.0.0.1:{inet.getsockname()[1]}") as client:
        assert client.lookup("colours", "sky") == "blue"


def test_sockets_for_another_process_are_left_alone() -> None:
    environment = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"}
    assert inherited_sockets(environment) == []
    # And what a child inherits of it cannot mislead the child.
    assert environment == {}


def test_nothing_is_inherited_when_nothing_is_announced() -> None:
    assert inherited_sockets({}) == []
