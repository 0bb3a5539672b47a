"""What a server costs: the CPU time and the memory of all its processes, from proc(5)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from tests.waiting import eventually

_TICKS = os.sysconf("SC_CLK_TCK")
# Fields of /proc/PID/stat behind the program's name in parentheses, which may hold anything.
_SESSION = 3
_CPU_TIMES = slice(11, 15)  # utime stime cutime cstime: its own and its reaped children's


class ServerProcess:
    """A server program in a session of its own, by which all its processes are found; stopped with the block."""

    def __init__(self, module: str, arguments: Sequence[str], port: int) -> None:
        """*arguments* are those of the program ``python -m MODULE``, which listens on *port*."""
        self.port = port
        self._command = [sys.executable, "-m", module, *arguments]

    def __enter__(self) -> ServerProcess:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(self._command, start_new_session=True, stderr=self._log)
        eventually(self._accepts, within=120, what=f"{self._command} accepts connections")
        return self

    def _accepts(self) -> bool:
        if self._process.poll() is not None:
            self._log.seek(0)
            raise RuntimeError(f"{self._command} ended:\n{self._log.read().decode()}")
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def cpu(self) -> float:
        """Return the CPU time, in seconds, that its processes have used so far."""
        return sum(sum(map(int, fields[_CPU_TIMES])) for _, fields in self._processes()) / _TICKS

    def pss(self) -> int:
        """Return the proportional set size of all its processes, in bytes: shared pages are counted once."""
        return sum(_pss(process) for process, _ in self._processes())

    def _processes(self) -> Iterator[tuple[Path, list[str]]]:
        """Return each process of the session: its directory in /proc, and its stat fields behind the name."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[_SESSION]) == self._process.pid:
                yield process, fields

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


def _pss(process: Path) -> int:
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:  # it is gone, or a zombie
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
