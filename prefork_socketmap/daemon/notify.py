"""sd_notify(3): what the service manager is told, and how; nothing when no service manager listens."""

from __future__ import annotations

import os
import socket
import time

from prefork_socketmap.prefork.plan import Observer


def notify(*assignments: str) -> None:
    """Send *assignments* such as ``READY=1`` to the service manager, if the environment names its socket."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            # "@" stands for the NUL byte with which an abstract address begins.
            sock.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            sock.send("\n".join(assignments).encode())
        except OSError:
            return  # a service manager that does not listen is no reason not to serve


def watchdog_interval() -> float:
    """Return how often, in seconds, the service manager wants a sign of life from this process; infinity: never.

    Half of what it waits for, as sd_watchdog_enabled(3) recommends.
    """
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if pid != str(os.getpid()) or not microseconds.isdecimal():
        return float("inf")
    return int(microseconds) / 2e6


class ServiceManager(Observer):
    """Tells systemd what the master is about, and that it is alive."""

    def __init__(self) -> None:
        self._interval = watchdog_interval()
        self._next_sign = time.monotonic() + self._interval

    def ready(self, generation: int) -> None:
        """Tell that lookups are answered."""
        notify("READY=1", _status(generation))

    def reloading(self) -> None:
        """Tell that a reload has begun; without its time, systemd waits for ever with Type=notify-reload."""
        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=Reloading")

    def reloaded(self, generation: int, problem: str | None) -> None:
        """Tell that the reload is over; READY=1 also when it was refused, for the server goes on."""
        notify("READY=1", f"{_status(generation)}; reload refused: {problem}" if problem else _status(generation))

    def stopping(self) -> None:
        """Tell that the server stops."""
        notify("STOPPING=1", "STATUS=Finishing lookups")

    def due(self, now: float) -> float:
        """Give a sign of life if it is time for one; return when it is the next time."""
        if now >= self._next_sign:
            notify("WATCHDOG=1")
            self._next_sign = now + self._interval
        return self._next_sign


def _status(generation: int) -> str:
    return f"STATUS=Answering lookups, generation {generation}"
