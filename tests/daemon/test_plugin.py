"""The map type of prefork-socketmap-maps(7), built and installed as a package, is served like any other."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from urllib.parse import quote, unquote

import pytest

from prefork_socketmap.client import SocketmapClient, TempFail
from tests.daemon.installation import Installation
from tests.integration.servers.process import free_port, library, program
from tests.test_manual import MAN, displays
from tests.waiting import eventually

PAGE = MAN / "prefork-socketmap-maps.7"
MODULE, PROJECT, CONFIGURATION = (re.sub(r"\\e", r"\\", each) for each in displays(PAGE.read_text()))


class Table(socketserver.ThreadingTCPServer):
    """A server for tcp_table(5)."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.entries = {"info@example.com": "staff members@example.net", "bad": "", "@example.org": "100%"}
        self.asked: list[str] = []
        self.clients: list[socketserver.StreamRequestHandler] = []
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def stop(self) -> None:
        """Refuse new clients, and hang up on those that there are."""
        self.shutdown()
        self.server_close()
        for client in self.clients:
            with contextlib.suppress(OSError):  # it has hung up itself
                client.connection.shutdown(socket.SHUT_RDWR)


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Table)
        self.server.clients.append(self)
        for line in self.rfile:
            command, _, key = unquote(line.decode()).rstrip("\n").partition(" ")
            self.server.asked.append(key)
            value = self.server.entries.get(key)
            reply = "400 out of order" if key == "bad" else "500 no" if value is None else f"200 {quote(value)}"
            self.wfile.write(reply.encode() + b"\n" if command == "get" else b"hello\n")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has the package installed, from a wheel, beside all that this one has."""
    library("hatchling", "test")
    directory = tmp_path_factory.mktemp("plugin")
    source, installed = directory / "socketmap-tcp", directory / "venv"
    source.mkdir()
    (source / "socketmap_tcp.py").write_text(MODULE)
    (source / "pyproject.toml").write_text(PROJECT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-index", "--no-deps"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(directory), str(source)]
    subprocess.run(build, check=True, stdin=subprocess.DEVNULL)
    (wheel,) = directory.glob("*.whl")
    venv.create(installed, with_pip=False)
    subprocess.run([*pip, "--python", str(installed), "install", *offline, str(wheel)], check=True)
    (packages,) = installed.glob("lib/python*/site-packages")
    assert (packages / "socketmap_tcp.py").exists()
    return {"PYTHONPATH": str(packages)}


@pytest.fixture
def table() -> Iterator[Table]:
    server = Table(free_port())
    yield server
    server.stop()


def configure(installation: Installation, table: Table, text: str = CONFIGURATION, limits: str = "") -> None:
    """Use the manual's configuration."""
    port = table.server_address[1]
    assert "5001" in text
    installation.configure(limits, maps=text.replace("5001", str(port)))


def test_the_type_has_no_more_lines_than_its_promise() -> None:
    assert len([line for line in MODULE.splitlines() if line.strip()]) <= 35


def test_the_type_is_served_as_native_postfix_has_it(
    installation: Installation, environment: dict[str, str], table: Table
) -> None:
    configure(installation, table)
    assert installation.run("check", env=environment).returncode == 0
    installation.start(env=environment)
    native = f"tcp:127.0.0.1:{table.server_address[1]}"
    keys = ["info@example.com", "INFO@example.com", "none@example.com", "a b%c@example.com"]
    postmap = program("postmap", "postfix")
    with SocketmapClient(installation.endpoint) as client:
        for key in keys:
            found = subprocess.run([postmap, "-q", key.lower(), native], capture_output=True, text=True, check=False)
            assert client.lookup("aliases", key) == (found.stdout.rstrip("\n") or None)
        # The search is that of every type.
        assert client.lookup("aliases", "any+one@example.org") == "100%"
        with pytest.raises(TempFail, match="out of order"):
            client.lookup("aliases", "bad")


def test_cache_and_health_are_there_without_a_line_for_them(
    installation: Installation, environment: dict[str, str], table: Table
) -> None:
    # One worker: each remembers for itself.
    configure(installation, table, CONFIGURATION.replace('"1m"', "0.01"), "process_limit = 1")
    installation.start(env=environment)
    with SocketmapClient(installation.endpoint) as client:
        assert client.lookup("aliases", "info@example.com") == "staff members@example.net"
        table.stop()
        # What is remembered bridges the outage.
        unavailable = "failed: map aliases: the backend is not available"
        eventually(lambda: answer(client) == unavailable, within=30, what="the outage")
        eventually(lambda: answer(client, "info@example.com") == "answered", within=30, what="what is remembered")
        again = Table(table.server_address[1])
        try:
            eventually(lambda: answer(client) == "answered", within=30, what="the recovery")
        finally:
            again.stop()
    installation.logged("map aliases: cannot connect: 127.0.0.1:")


def answer(client: SocketmapClient, key: str = "other@example.com") -> str:
    """Ask for *key*, which is not remembered by default."""
    try:
        client.lookup("aliases", key)
    except TempFail as error:
        return f"failed: {error}"
    return "answered"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (CONFIGURATION + "comand = 'put'\n", r'maps.aliases.comand: unknown key; did you mean "command"?'),
        (CONFIGURATION + "command = 1\n", "maps.aliases.command: 1 is not accepted"),
        (CONFIGURATION.replace('"tcp"', '"tpc"'), "tcp"),
    ],
)
def test_its_settings_are_checked(
    installation: Installation, environment: dict[str, str], table: Table, text: str, problem: str
) -> None:
    configure(installation, table, text)
    result = installation.run("check", env=environment)
    assert result.returncode == os.EX_CONFIG
    assert problem in result.stderr
