"""What the service manager is told, over a socket that stands for systemd's."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefork_socketmap.daemon.notify import ServiceManager, notify
from tests.daemon.installation import Installation


class Manager:
    """A service manager that listens at ``address``."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._sock.settimeout(20)
        self.address = str(path)

    def told(self) -> dict[str, str]:
        """Wait for the next message, and return its assignments."""
        lines = self._sock.recv(4096).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


def test_start_reload_and_stop_are_told(installation: Installation, manager: Manager) -> None:
    process = installation.start(env={"NOTIFY_SOCKET": manager.address})
    assert manager.told() == {"READY": "1", "STATUS": "Answering lookups, generation 1"}
    assert installation.lookup() == "blue"

    before = time.monotonic_ns() // 1000
    process.send_signal(signal.SIGHUP)
    reloading = manager.told()
    assert reloading["RELOADING"] == "1"
    assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert manager.told() == {"READY": "1", "STATUS": "Answering lookups, generation 2"}

    process.send_signal(signal.SIGTERM)
    assert manager.told()["STOPPING"] == "1"
    assert process.wait() == 0


def test_an_upgrade_is_told_as_a_reload(installation: Installation, manager: Manager) -> None:
    installation.start(env={"NOTIFY_SOCKET": manager.address})
    manager.told()
    assert installation.run("upgrade").returncode == 0
    assert manager.told()["RELOADING"] == "1"
    assert manager.told() == {"READY": "1", "STATUS": "Answering lookups, generation 2"}


def test_a_reload_that_is_refused_ends_with_ready_and_the_reason(
    installation: Installation, manager: Manager
) -> None:
    process = installation.start(env={"NOTIFY_SOCKET": manager.address})
    manager.told()
    installation.config.write_text("nonsense = 1\n")
    process.send_signal(signal.SIGHUP)
    assert manager.told()["RELOADING"] == "1"
    told = manager.told()
    assert told["READY"] == "1"
    assert "generation 1; reload refused:" in told["STATUS"]
    assert "nonsense: unknown key" in told["STATUS"]


def test_an_abstract_socket_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"prefork-socketmap-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        sock.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify("READY=1")
        assert sock.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "vsock:2:1", "/nowhere/notify"])
def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


def test_the_watchdog_gets_a_sign_twice_in_its_time(monkeypatch: pytest.MonkeyPatch, manager: Manager) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    observer = ServiceManager()
    start = time.monotonic()
    first = observer.due(start)
    assert start + 9 < first < start + 11
    assert observer.due(first) == first + 10
    assert manager.told() == {"WATCHDOG": "1"}


@pytest.mark.parametrize(("usec", "pid"), [("", ""), ("20000000", "1"), ("soon", str(os.getpid()))])
def test_a_watchdog_that_is_not_ours_gets_no_sign(monkeypatch: pytest.MonkeyPatch, usec: str, pid: str) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert ServiceManager().due(time.monotonic()) == float("inf")
