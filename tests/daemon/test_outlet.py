"""Lines leave the process, or wait for whoever reads them; the process waits for nobody."""

from __future__ import annotations

import os
import pty
import re
import socket
import syslog
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefork_socketmap.daemon.outlet import MAX_QUEUE, PATIENCE, Outlet, Stderr, Syslog

LINE = "warning: " + "x" * 200
SOME = 5000  # lines, more than any buffer holds


class Pipe:
    """A pipe, and an outlet that writes into it."""

    def __init__(self, max_queue: int = MAX_QUEUE) -> None:
        self.reader, self.writer = os.pipe()
        self.outlet = Stderr("name", max_queue, descriptor=self.writer)

    def read(self) -> list[str]:
        """Return the lines that are in the pipe now."""
        os.set_blocking(self.reader, False)
        data = b""
        try:
            while piece := os.read(self.reader, 65536):
                data += piece
        except BlockingIOError:
            pass
        return [line.partition(": ")[2] for line in data.decode().splitlines()]

    def close(self) -> None:
        self.outlet.close()
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_a_line_has_the_name_and_the_process_id(pipe: Pipe) -> None:
    pipe.outlet.write(syslog.LOG_INFO, "text")
    assert os.read(pipe.reader, 100).decode() == f"name[{os.getpid()}]: text\n"


def overfill(outlet: Outlet) -> None:
    """Write more than a reader who does not read, and the queue, take. Who waits here waits for ever."""
    for number in range(SOME):
        outlet.write(syslog.LOG_INFO, f"{number} {LINE}")


def check_lines(lines: list[str]) -> None:
    """Check that of SOME lines the first are there, in order, then the number of those that are lost."""
    *whole, notice = lines
    assert [line.partition(" ")[0] for line in whole] == [str(number) for number in range(len(whole))]
    assert all(line.endswith(LINE) for line in whole)
    assert notice == f"warning: {SOME - len(whole)} lines of this log are lost: nobody read it"


def test_a_pipe_that_nobody_reads_is_not_waited_for_and_what_is_lost_is_counted(pipe: Pipe) -> None:
    overfill(pipe.outlet)
    lines = pipe.read()
    while not pipe.outlet.flush():
        lines += pipe.read()
    check_lines(lines + pipe.read())
    pipe.outlet.write(syslog.LOG_INFO, "it flows again")
    assert pipe.read() == ["it flows again"]


def test_the_count_of_the_lost_comes_before_the_lines_that_follow(pipe: Pipe) -> None:
    overfill(pipe.outlet)
    lines: list[str] = []
    while "next" not in lines:
        lines += pipe.read()
        pipe.outlet.write(syslog.LOG_INFO, "next")
    place = lines.index("next")
    assert re.fullmatch(r"warning: \d+ lines of this log are lost: .*", lines[place - 1])


def test_the_queue_is_bounded() -> None:
    pipe = Pipe(max_queue=10_000)
    overfill(pipe.outlet)
    assert sum(map(len, pipe.outlet._queue)) == pipe.outlet._size < 10_000 + 500
    pipe.close()


def test_the_open_file_that_others_write_to_as_well_is_not_made_non_blocking(pipe: Pipe) -> None:
    overfill(pipe.outlet)
    assert os.get_blocking(pipe.writer)


def test_without_proc_a_full_pipe_is_not_waited_for_either(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    pipe.outlet.close()
    overfill(pipe.outlet)
    lines = pipe.read()
    while not pipe.outlet.flush():
        lines += pipe.read()
    check_lines(lines + pipe.read())


def test_a_pipe_whose_reader_is_gone_is_not_waited_for(pipe: Pipe) -> None:
    os.close(pipe.reader)
    overfill(pipe.outlet)
    assert pipe.outlet.is_waiting
    pipe.reader, writer = os.pipe()
    os.close(writer)


def test_a_stream_socket_that_nobody_reads_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair()
    outlet = Stderr("name", descriptor=theirs.fileno())
    overfill(outlet)
    assert os.get_blocking(theirs.fileno())
    data = b""
    ours.setblocking(False)
    while not outlet.flush():
        data += ours.recv(65536)
    while b"are lost" not in data:
        data += ours.recv(65536)
    check_lines([line.partition(": ")[2] for line in data.decode().splitlines()])
    outlet.close()
    ours.close()
    theirs.close()


def test_a_terminal_that_was_stopped_is_not_waited_for() -> None:
    master, terminal = pty.openpty()
    outlet = Stderr("name", descriptor=terminal)
    overfill(outlet)
    assert outlet.is_waiting
    assert os.get_blocking(terminal)
    outlet.close()
    os.close(master)
    os.close(terminal)


def test_a_file_gets_lines_behind_what_others_write_to_it(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb", buffering=0) as file:
        outlet = Stderr("name", descriptor=file.fileno())
        outlet.write(syslog.LOG_INFO, "one")
        file.write(b"two\n")
        outlet.write(syslog.LOG_INFO, "three")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["one", "two", "three"]


def test_a_child_process_does_not_repeat_what_waits_in_its_parent(pipe: Pipe) -> None:
    overfill(pipe.outlet)
    pipe.outlet.forget()
    pipe.read()
    pipe.outlet.write(syslog.LOG_INFO, "the child's")
    assert pipe.read() == ["the child's"]


class Daemon:
    """A syslog daemon that reads when it is told to."""

    def __init__(self, path: Path, kind: int = socket.SOCK_DGRAM) -> None:
        path.unlink(missing_ok=True)
        self.sock = socket.socket(socket.AF_UNIX, kind)
        self.sock.bind(str(path))
        self.sock.settimeout(10)

    def read(self) -> str:
        """Wait for a line, and return what stands behind the time and the tag."""
        match = re.fullmatch(
            rb"<(\d+)>\w{3} [ \d]\d \d\d:\d\d:\d\d name\[(\d+)\]: (.*)\0", self.sock.recv(4096), re.DOTALL
        )
        assert match
        assert int(match[2]) == os.getpid()
        return match[3].decode()


@pytest.fixture
def dev_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Syslog, "path", tmp_path / "log")
    return tmp_path / "log"


@pytest.fixture
def outlet(dev_log: Path) -> Iterator[Syslog]:
    outlet = Syslog("name")
    yield outlet
    outlet.close()


def test_a_syslog_daemon_gets_facility_priority_and_time(dev_log: Path, outlet: Syslog) -> None:
    daemon = Daemon(dev_log)
    outlet.write(syslog.LOG_ERR, "text")
    assert daemon.sock.recv(4096).startswith(b"<%d>" % (syslog.LOG_MAIL | syslog.LOG_ERR))
    outlet.write(syslog.LOG_ERR, "text")
    assert daemon.read() == "text"
    daemon.sock.close()


def test_a_syslog_daemon_that_does_not_read_is_not_waited_for_and_what_is_lost_is_counted(
    dev_log: Path, outlet: Syslog
) -> None:
    daemon = Daemon(dev_log)
    overfill(outlet)
    lines: list[str] = []
    while not lines or "are lost" not in lines[-1]:
        outlet.flush()
        lines.append(daemon.read())
    check_lines(lines)
    daemon.sock.close()


def test_a_syslog_daemon_that_reads_gets_more_lines_at_once_than_its_socket_holds(
    dev_log: Path, outlet: Syslog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "_patience", 30.0)  # the daemon reads, but on a busy machine its turn comes late
    daemon = Daemon(dev_log)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(daemon.read() for _ in range(300)))
    reader.start()
    for number in range(300):
        outlet.write(syslog.LOG_INFO, str(number))
    assert not outlet.is_waiting
    reader.join()
    assert lines == [str(number) for number in range(300)]
    daemon.sock.close()


def test_the_patience_with_a_reader_that_has_stopped_is_short(
    dev_log: Path, outlet: Syslog, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def has_room(_descriptor: int, timeout: float) -> bool:
        waited.append(timeout)
        time.sleep(timeout)
        return False

    monkeypatch.setattr("prefork_socketmap.daemon.outlet._has_room", has_room)
    daemon = Daemon(dev_log)
    overfill(outlet)
    assert waited == [PATIENCE]
    daemon.sock.close()


def test_a_syslog_daemon_that_starts_late_gets_what_waited_for_it(dev_log: Path, outlet: Syslog) -> None:
    outlet.write(syslog.LOG_INFO, "before it")
    daemon = Daemon(dev_log)
    outlet.write(syslog.LOG_INFO, "after it")
    assert [daemon.read(), daemon.read()] == ["before it", "after it"]
    daemon.sock.close()


@pytest.mark.parametrize("is_stuck", [False, True])
def test_a_syslog_daemon_that_was_restarted_is_found_again(dev_log: Path, outlet: Syslog, is_stuck: bool) -> None:
    daemon = Daemon(dev_log)
    outlet.write(syslog.LOG_INFO, "one")
    while is_stuck and not outlet.is_waiting:  # the first one does not read, and lives on
        outlet.write(syslog.LOG_INFO, "one")
    if not is_stuck:
        daemon.sock.close()
    successor = Daemon(dev_log)
    outlet.write(syslog.LOG_INFO, "two")
    assert successor.read() == ("one" if is_stuck else "two")
    successor.sock.close()
    daemon.sock.close()


def test_a_syslog_daemon_with_a_stream_gets_lines_that_end(dev_log: Path, outlet: Syslog) -> None:
    daemon = Daemon(dev_log, socket.SOCK_STREAM)
    daemon.sock.listen()
    outlet.write(syslog.LOG_INFO, "one")
    outlet.write(syslog.LOG_INFO, "two")
    connection, _ = daemon.sock.accept()
    assert [line[-3:] for line in connection.recv(4096).split(b"\0")] == [b"one", b"two", b""]
    connection.close()
    daemon.sock.close()
