"""What the journal gets: each line with its priority, and no tag, for the journal has one already."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefork_socketmap.client import SocketmapClient, TempFail
from prefork_socketmap.daemon import journal
from tests.daemon.installation import COMMAND, TIMEOUT, Installation
from tests.waiting import eventually

MAPS = '[maps.code]\ntype = "python"\npath = ["."]\nfunction = "code_of_map:f"\n'


class Journal:
    """A socket as the one that systemd makes for stderr, and the lines that came through it."""

    def __init__(self) -> None:
        self._reader, self.writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._reader.setblocking(False)
        self._text = b""

    @property
    def stream(self) -> str:
        """What systemd says in JOURNAL_STREAM."""
        status = os.fstat(self.writer.fileno())
        return f"{status.st_dev}:{status.st_ino}"

    def lines(self) -> list[str]:
        """Return all lines that have come."""
        with contextlib.suppress(BlockingIOError):
            while piece := self._reader.recv(65536):
                self._text += piece
        return self._text.decode().splitlines()

    def line(self, pattern: str) -> str:
        """Wait for a line that matches *pattern*."""

        def found() -> str:
            return next((line for line in self.lines() if re.fullmatch(pattern, line)), "")

        return eventually(found, within=30, what=f"{pattern!r} in {self.lines()}")

    def close(self) -> None:
        self._reader.close()
        self.writer.close()


@pytest.fixture
def stderr() -> Iterator[Journal]:
    made = Journal()
    yield made
    made.close()


def test_a_server_tells_the_journal_priorities_and_one_tag(installation: Installation, stderr: Journal) -> None:
    (installation.directory / "code_of_map.py").write_text("def f(key):\n    raise ValueError('odd\\nline')\n")
    installation.configure(maps=MAPS)
    installation.start(env={"JOURNAL_STREAM": stderr.stream}, stderr=stderr.writer.fileno())
    with pytest.raises(TempFail), SocketmapClient(installation.endpoint) as client:
        client.lookup("code", "key")
    stderr.line(r"<6>master\[\d+\]: serving .*")
    stderr.line(r"<3>worker\[\d+\]: error: map <code>, key <key>: lookup failed")
    stderr.line(r"<3>worker\[\d+\]:   ValueError: odd")  # each line of a traceback
    os.kill(installation.idle_workers()[0], signal.SIGKILL)
    stderr.line(r"<4>master\[\d+\]: warning: worker \d+ was killed by signal 9; it is replaced")
    installation.configure("nonsense = 1")
    assert installation.run("reload").returncode == 1
    stderr.line(r"<3>master\[\d+\]: error: reload refused, .*")
    assert all(re.match(r"<[3-6]>(master|worker)\[\d+\]: ", line) for line in stderr.lines())


def test_a_start_that_fails_is_an_error_in_the_journal(installation: Installation, stderr: Journal) -> None:
    def start() -> int:
        command = [*COMMAND, "serve", "-c", str(installation.config)]
        environment = {**os.environ, "JOURNAL_STREAM": stderr.stream}
        return subprocess.run(
            command, env=environment, stderr=stderr.writer.fileno(), check=False, timeout=TIMEOUT
        ).returncode

    installation.configure(maps='[maps.m]\ntype = "statik"\n')
    assert start() == os.EX_CONFIG
    stderr.line(f"<3>{re.escape(str(installation.config))}: maps.m.type: 'statik' is not accepted here; .*")
    installation.config.write_text("listen = [\n")
    assert start() == os.EX_CONFIG
    stderr.line(f"<3>{re.escape(str(installation.config))}: not TOML: .*")


def test_a_stream_that_is_not_the_journal_is_a_log_as_any(installation: Installation) -> None:
    installation.start(env={"JOURNAL_STREAM": "1:2"})
    assert re.match(r"prefork-socketmap/master\[\d+\]: serving", installation.logged("serving"))


@pytest.mark.parametrize("value", ["", "x", "1:", ":1", "999999999:999999999"])
def test_nonsense_in_the_environment_is_no_journal(
    monkeypatch: pytest.MonkeyPatch, value: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", value)
    with (tmp_path / "file").open("w") as file:
        assert not journal.reads(file.fileno())
    assert not journal.reads(9999)
