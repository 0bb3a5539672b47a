"""A directory with a config file, and the commands of prefork-socketmap run on it as a user would run them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from prefork_socketmap.client import SocketmapClient
from prefork_socketmap.daemon import state
from tests.integration.servers.process import free_port
from tests.processes import children, process_title
from tests.waiting import eventually

COMMAND = [sys.executable, "-m", "prefork_socketmap"]
TIMEOUT = 60


class Installation:
    """A directory that any user can enter, a config file in it, and at most one server that runs from it."""

    def __init__(self) -> None:
        # Not pytest's directory: workers that run as another user could not get into that.
        self.directory = Path(tempfile.mkdtemp(prefix="socketmap-test-"))
        self.directory.chmod(0o755)
        self.config = self.directory / "prefork-socketmap.toml"
        self.runtime_dir = self.directory / "run"
        self.pid_file = self.runtime_dir / "prefork-socketmap.pid"
        self.port = free_port()
        self._process: subprocess.Popen[str] | None = None
        self.configure()

    @property
    def endpoint(self) -> str:
        """Where the server of the plain configuration listens."""
        return f"inet:127.0.0.1:{self.port}"

    def configure(self, text: str = "", *, listen: str | None = None, maps: str | None = None) -> None:
        """Write the config file: a listener, a few workers, *text*, and *maps* or else a static map ``colours``."""
        listen = f'["{self.endpoint}"]' if listen is None else listen
        maps = '[maps.colours]\ntype = "static"\nentries = { sky = "blue" }\n' if maps is None else maps
        self.config.write_text(f'listen = {listen}\nruntime_dir = "run"\nmin_spare = 2\n{text}\n{maps}')

    def run(
        self, command: str, *arguments: str | Path, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the config file and return its result."""
        return subprocess.run(
            [*COMMAND, command, "-c", self.config, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
            env=os.environ | dict(env or {}),
        )

    def start(self, *arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        """Start ``serve`` in the foreground and wait until it serves. Its stderr goes to ``log``, or where told."""
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [*COMMAND, "serve", "-c", self.config, *arguments],
                text=True,
                env=os.environ | dict(env or {}),
                **{"stderr": log, **options},
            )
        eventually(self._is_ready, within=30, what="the server serves")
        return self._process

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"the server ended with {self._process.returncode}:\n{self.log.read_text()}")
        return _generation(self._process.pid) > 0

    @property
    def log(self) -> Path:
        """The stderr of the server in the foreground."""
        return self.directory / "log"

    def logged(self, text: str) -> str:
        """Wait for a log line with *text*; return it."""

        def line() -> str:
            lines = self.log.read_text().splitlines()
            found = next((line for line in lines if text in line), "")
            assert found, f"no line with {text!r} in\n" + "\n".join(lines)
            return found

        return eventually(line)

    def state(self) -> dict[str, Any]:
        """Return what the state file says."""
        document: dict[str, Any] = json.loads((self.runtime_dir / "state.json").read_text())
        return document

    def await_generation(self, number: int, within: float = 30) -> None:
        """Wait until the generation with this number serves."""
        master = self.state()["pid"]
        eventually(lambda: _generation(master) == number, within, f"generation {number}")

    @property
    def pid(self) -> int:
        """The master's pid, as the pid file has it."""
        return int(self.pid_file.read_text())

    def workers(self) -> list[int]:
        """Return the pids of the master's children."""
        return children(self.pid)

    def idle_workers(self) -> list[int]:
        """Wait until all workers have started and wait for connections; return their pids."""

        def all_idle() -> list[int]:
            pids = self.workers()
            return pids if all(process_title(pid).endswith(", idle") for pid in pids) else []

        return eventually(all_idle, what="idle workers")

    def lookup(self, name: str = "colours", key: str = "sky") -> str | None:
        """Ask the server over TCP."""
        with SocketmapClient(self.endpoint) as client:
            return client.lookup(name, key)

    def close(self) -> None:
        """Stop the server, however it was started, and remove the directory."""
        if self.pid_file.exists():
            self.run("stop")
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self.directory)

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def impostor(config: Path) -> Iterator[int]:
    """A process of the user nobody that says of itself to be the server of *config*; give its pid. Needs root."""
    said = {"pid": 0, "reload": None, "config": str(config)}
    # It begins as root: Python may be installed where nobody else can read it.
    code = f"""
import json, os, setproctitle, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.write(os.memfd_create("prefork-socketmap-state"), json.dumps({said!r} | {{"pid": os.getpid()}}).encode())
setproctitle.setproctitle("prefork-socketmap: master [{config}]")
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        assert process.poll() is None, "it got a signal"


def _generation(master: int) -> int:
    """Return which generation serves, as the master says once it has told everybody else; 0 if none does."""
    told = state.of_process(master)
    return told.generation if told else 0
