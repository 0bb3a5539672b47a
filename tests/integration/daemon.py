"""The daemon as an administrator runs it, with a config file in a directory of its own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.integration.servers.process import free_port
from tests.waiting import eventually

_READY = ": serving "


class Daemon:
    """``prefork-socketmap serve`` in the foreground, on a free TCP port and on a Unix socket.

    *config* is the config file but for ``listen`` and ``runtime_dir``; *files* are what lies beside it, by name. All
    of them have *mode*.
    """

    def __init__(self, config: str, files: Mapping[str, str] | None = None, mode: int = 0o644) -> None:
        # Not pytest's directory: Postfix's processes, which run as user postfix, could not get into that.
        self.directory = Path(tempfile.mkdtemp(prefix="socketmap-daemon-"))
        self.directory.chmod(0o755)
        listen = f'listen = ["inet:127.0.0.1:{free_port()}", "unix:{self.directory}/socket"]\nruntime_dir = "run"\n'
        for name, text in {**(files or {}), "config.toml": listen + config}.items():
            (self.directory / name).write_text(text)
            (self.directory / name).chmod(mode)
        self._log = self.directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "prefork_socketmap", "serve", "-c", str(self.directory / "config.toml")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually(self._is_ready, within=30)

    def _is_ready(self) -> bool:
        assert self._process
        assert self._process.poll() is None, f"the daemon ended:\n{self.log()}"
        return _READY in self.log()

    def log(self) -> str:
        """Return what it has logged so far."""
        return self._log.read_text()

    def table(self, kind: str, name: str) -> str:
        """Return the table *name* as main.cf names it, at the ``"inet"`` or the ``"unix"`` endpoint."""
        line = next(line for line in self.log().splitlines() if _READY in line)
        endpoint = next(word for word in line.partition(_READY)[2].split(", ") if word.startswith(kind))
        return f"socketmap:{endpoint}:{name}"

    def close(self) -> None:
        """Stop it gracefully and remove its directory."""
        assert self._process
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(60)
            assert status == 0, f"the daemon's exit status is {status}:\n{self.log()}"
        finally:
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self.directory)
