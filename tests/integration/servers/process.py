"""A server program under test: found or skipped, started on a port and in a directory of its own, stopped, frozen.

What the programs need to be told is left to the modules beside this one.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

import pytest

from tests.processes import children
from tests.waiting import eventually

# Debian keeps PostgreSQL's programs, of which several versions can be installed, out of PATH; sbin may not be in it.
_PROGRAM_PATHS = [
    *os.environ.get("PATH", os.defpath).split(os.pathsep),
    "/usr/local/sbin",
    "/usr/sbin",
    *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)),
]


class Startable(Protocol):
    """What can be started, and closed even if it could not."""

    def start(self) -> None: ...
    def close(self) -> None: ...


S = TypeVar("S", bound=Startable)


@contextlib.contextmanager
def running(server: S) -> Iterator[S]:
    """Run *server* for as long as the context lasts."""
    try:
        server.start()
        yield server
    finally:
        server.close()


def unavailable(what: str) -> NoReturn:
    """Skip the test, since *what* is missing; in CI fail, or nobody would notice."""
    if os.environ.get("CI"):
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def program(name: str, package: str) -> str:
    """Return the path of the program *name*, which is in Debian's *package*; skip the test if it is not installed."""
    path = shutil.which(name, path=os.pathsep.join(_PROGRAM_PATHS))
    if path is None:
        unavailable(f"{name} is missing: apt install {package}")
    return path


def library(name: str, extra: str) -> Any:
    """Return the module *name*, which *extra* of the package brings; skip the test if it is not installed.

    Imported like this, and late, a missing library costs its own tests alone.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        unavailable(f"the module {name} is missing: pip install prefork-socketmap[{extra}]")


def free_port() -> int:
    """Return a TCP port that nobody uses, and that this function returns to no other process.

    It is none that the kernel gives to a client meanwhile: a server could not be stopped and started again there.
    """
    while True:
        port = next(_ports)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def _ports_of_this_process() -> Iterator[int]:
    """Iterate, again and again, over ports that nobody else is given until this process ends."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    blocks = range(max(first - 20_000, 1024), first - _BLOCK + 1, _BLOCK)
    for block in random.sample(blocks, len(blocks)):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as reservation:
            reservation.bind(f"\0socketmap-test-ports-{block}")
            while True:
                yield from range(block, block + _BLOCK)
    raise AssertionError(f"no port below {first} is free")


def _begin_anew() -> None:
    global _ports
    _ports = _ports_of_this_process()


_BLOCK = 200
_ports = _ports_of_this_process()
os.register_at_fork(after_in_child=_begin_anew)


def answers_at(port: int) -> bool:
    """Whether somebody listens on *port* of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Certificate:
    """A self-signed certificate for 127.0.0.1 and localhost, which is its own authority."""

    def __init__(self, directory: Path, user: str) -> None:
        self.certificate = directory / "certificate.pem"
        self.key = directory / "key.pem"
        request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
        files = ["-keyout", str(self.key), "-out", str(self.certificate)]
        openssl = program("openssl", "openssl")
        subprocess.run([openssl, *request.split(), *names, *files], check=True, capture_output=True)
        self.key.chmod(0o600)
        if os.geteuid() == 0:
            shutil.chown(self.key, user)


class Server(abc.ABC):
    """A server process in a directory of its own, which is removed when it is closed.

    A subclass prepares the directory in its ``__init__`` and defines ``command`` and ``is_ready``.
    """

    user: ClassVar[str] = "root"
    """Whose process it is when the tests run as root."""
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self) -> None:
        # Not pytest's directory: only its owner can get into that, and a socket's path would be too long in it.
        self.directory = Path(tempfile.mkdtemp(prefix="socketmap-test-"))
        self.log = self.directory / "log"
        self.log.touch()
        if self.user != "root":
            self.give_away(self.directory)
            self.give_away(self.log)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen: list[int] = []

    @abc.abstractmethod
    def command(self) -> list[str]:
        """Return the command line of the server in the foreground."""

    @abc.abstractmethod
    def is_ready(self) -> bool:
        """Whether the server answers."""

    def give_away(self, path: Path) -> None:
        """Give *path* to the server's user, if the tests may."""
        if os.geteuid() == 0:
            entry = pwd.getpwnam(self.user)
            os.chown(path, entry.pw_uid, entry.pw_gid)

    def run(self, *command: str | Path) -> None:
        """Run *command*, which prepares the server, as the server's user."""
        with self.log.open("ab") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, cwd=self.directory, user=self._switch_to())

    def start(self) -> None:
        """Start the server and wait until it answers; if it runs, do nothing."""
        if self._process is not None:
            return
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory,
                user=self._switch_to(),
            )  # fmt: skip
        eventually(self._is_ready, within=60, what=f"{type(self).__name__} answers")

    def stop(self) -> None:
        """Stop the server, frozen or not, and wait for its end."""
        if self._process is None:
            return
        self.thaw()
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def freeze(self) -> None:
        """Stop the server's processes in their tracks: the kernel still accepts connections, nobody answers."""
        assert self._process is not None
        self._frozen = [self._process.pid]
        # Parents first, so that none is born behind us.
        for pid in self._frozen:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                os.kill(pid, signal.SIGSTOP)
                # A thread on another CPU may go on for a moment.
                eventually(lambda: _is_stopped(pid), what=f"process {pid} is stopped")  # noqa: B023 - called here
                self._frozen += children(pid)

    def thaw(self) -> None:
        """Undo ``freeze``."""
        for pid in self._frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._frozen = []

    def restore(self) -> None:
        """Bring the server back from whatever a test did to it."""
        self.thaw()
        self.start()

    def close(self) -> None:
        """Stop the server and remove its directory."""
        self.stop()
        shutil.rmtree(self.directory)

    def _switch_to(self) -> str | None:
        return self.user if os.geteuid() == 0 and self.user != "root" else None

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            pytest.fail(f"{self._process.args!r} ended with {self._process.returncode}:\n{self.log.read_text()}")
        return self.is_ready()


def _is_stopped(pid: int) -> bool:
    """Whether every thread of *pid* is stopped, or has ended; proc(5), "/proc/pid/stat"."""
    try:
        threads = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        return False  # one has just ended
    return {thread.rpartition(")")[2].split()[0] for thread in threads} <= {"T", "Z", "X"}
