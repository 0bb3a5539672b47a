"""The log: Postfix's look, one line per event that nobody can forge, and repetitions counted."""

from __future__ import annotations

import io
import logging
import os
import re
import socket
import syslog
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefork_socketmap.client import TempFail
from prefork_socketmap.daemon import log
from prefork_socketmap.daemon.configfile import LogSettings
from prefork_socketmap.daemon.log import CountingHandler, LineFormatter
from tests.daemon.installation import Installation
from tests.waiting import eventually

logger = logging.getLogger("prefork_socketmap.worker.test")


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What is logged, one record a line."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    yield from _logging_to(handler, stream)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counted(clock: Clock) -> Iterator[io.StringIO]:
    """What is logged when repetitions are counted for 60 seconds of *clock*."""
    stream = io.StringIO()
    target = logging.StreamHandler(stream)
    target.setFormatter(LineFormatter())
    yield from _logging_to(CountingHandler(target, 60, clock), stream)


def _logging_to(handler: logging.Handler, stream: io.StringIO) -> Iterator[io.StringIO]:
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield stream
    logger.removeHandler(handler)


@pytest.fixture
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("prefork_socketmap").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_restored")
def test_a_line_on_stderr_looks_as_one_in_syslog(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("master", LogSettings())
    logging.getLogger("prefork_socketmap.master").warning("text")
    assert capsys.readouterr().err == f"prefork-socketmap/master[{os.getpid()}]: warning: text\n"


@pytest.mark.usefixtures("_restored")
def test_syslog_gets_the_lines_of_facility_mail_and_stderr_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[tuple[object, ...]] = []
    sent: list[tuple[int, str]] = []
    monkeypatch.setattr(syslog, "openlog", lambda *arguments: opened.append(arguments))
    monkeypatch.setattr(syslog, "syslog", lambda priority, line: sent.append((priority, line)))
    log.set_up("worker", LogSettings(to="syslog"))
    logging.getLogger("prefork_socketmap.worker").info("told")
    logging.getLogger("prefork_socketmap.worker").error("wrong")
    assert opened == [("prefork-socketmap/worker", syslog.LOG_PID, syslog.LOG_MAIL)]
    assert sent == [(syslog.LOG_INFO, "told"), (syslog.LOG_ERR, "error: wrong")]
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_restored")
def test_lines_below_the_level_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("master", LogSettings(level="warning"))
    logging.getLogger("prefork_socketmap.master").info("text")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_restored")
def test_libraries_are_not_debugged_with_us(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("master", LogSettings(level="debug"))
    logging.getLogger("some.library").debug("secret")
    logging.getLogger("prefork_socketmap.master").debug("ours")
    assert "secret" not in (printed := capsys.readouterr().err)
    assert "ours" in printed


@pytest.mark.parametrize("hostile", ["a\nb", "a\r\nb", "a\0b", "a\x1b[2Jb", "a\u2028b", "a\x85b", "a\udcffb"])
def test_what_a_client_writes_stays_printable_and_on_its_line(lines: io.StringIO, hostile: str) -> None:
    logger.info("key=<%s>", hostile)
    text = lines.getvalue()
    assert text.count("\n") == 1
    assert text.rstrip("\n").isprintable()
    assert len(text.splitlines()) == 1


def test_plain_text_of_any_script_is_logged_as_it_is(lines: io.StringIO) -> None:
    logger.info("key=<%s>", "jörg@例え.jp")
    assert lines.getvalue() == "key=<jörg@例え.jp>\n"


def test_a_traceback_is_indented_so_that_it_cannot_pass_for_other_lines(lines: io.StringIO) -> None:
    try:
        raise ValueError("x\nlookup: client=127.0.0.1, status=OK")
    except ValueError:
        logger.exception("map %s: lookup failed", "m")
    first, *rest = lines.getvalue().splitlines()
    assert first == "error: map m: lookup failed"
    assert all(line.startswith("  ") for line in rest)
    assert any("lookup: client" in line for line in rest)


def test_a_line_is_cut_before_syslog_does_it(lines: io.StringIO) -> None:
    logger.info("%s", "x" * 10000)
    assert len(lines.getvalue()) == log.MAX_LENGTH + 1


def test_an_error_that_repeats_is_logged_once_and_then_counted(counted: io.StringIO, clock: Clock) -> None:
    for number in range(5):
        logger.error("map %s: %r: %s", "m", f"key{number}", OSError("down"))
        clock.now += 1
    assert counted.getvalue() == "error: map m: 'key0': down\n"
    clock.now = 61
    logger.info("something else")
    assert counted.getvalue().splitlines()[1:] == ["error: 4 more times: map m: 'key0': down", "something else"]


def test_an_error_that_comes_back_after_the_interval_is_logged_again(counted: io.StringIO, clock: Clock) -> None:
    logger.error("map %s: down", "m")
    clock.now = 61
    logger.error("map %s: down", "m")
    assert counted.getvalue() == "error: map m: down\n" * 2


def test_errors_of_different_maps_or_kinds_do_not_hide_each_other(counted: io.StringIO) -> None:
    logger.error("map %s: %s", "m", OSError("down"))
    logger.error("map %s: %s", "n", OSError("down"))
    logger.error("map %s: %s", "m", ValueError("wrong"))
    logger.warning("map %s: %s", "m", OSError("down"))
    assert counted.getvalue().count("\n") == 4


def test_what_is_no_warning_is_always_logged(counted: io.StringIO) -> None:
    logger.info("lookup")
    logger.info("lookup")
    assert counted.getvalue() == "lookup\n" * 2


def test_counts_that_are_open_are_told_at_the_end(counted: io.StringIO) -> None:
    logger.error("down")
    logger.error("down")
    logger.handlers[0].close()
    assert counted.getvalue() == "error: down\nerror: 1 more times: down\n"


def test_the_memory_for_repetitions_is_bounded(counted: io.StringIO) -> None:
    for number in range(5000):
        logger.warning("connection from %s refused", number)
    handler = logger.handlers[0]
    assert isinstance(handler, CountingHandler)
    assert len(handler._repetitions) <= 1000
    assert counted.getvalue().count("\n") == 5000


class SyslogDaemon:
    """A syslog daemon, on a machine that has none. It reads all the time: whoever logs waits when nobody reads."""

    PATH = Path("/dev/log")

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self.PATH))
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while line := self._sock.recv(4096):
            self._lines.append(line.decode())

    def logged(self, text: str) -> tuple[int, str]:
        """Wait for a line with *text*; return its priority, and what stands behind the time."""
        line = eventually(lambda: next((line for line in self._lines if text in line), ""), what=text)
        match = re.fullmatch(r"<(\d+)>\w{3} [ \d]\d \d\d:\d\d:\d\d (.*?)\0?", line)
        assert match, line
        return int(match[1]), match[2]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ending:
            ending.sendto(b"", str(self.PATH))
        self._reader.join()
        self._sock.close()
        self.PATH.unlink()


@pytest.fixture
def syslog_daemon() -> Iterator[SyslogDaemon]:
    if SyslogDaemon.PATH.exists() or os.geteuid() != 0:
        pytest.skip("this needs root, and a machine without a syslog daemon")
    daemon = SyslogDaemon()
    yield daemon
    daemon.close()


def test_a_daemon_logs_to_syslog_as_postfix_does(syslog_daemon: SyslogDaemon, installation: Installation) -> None:
    (installation.directory / "broken.py").write_text("def f(key): raise ValueError(key)\n")
    installation.configure(maps='[maps.m]\ntype = "python"\npath = ["."]\nfunction = "broken:f"\n')
    installation.run("serve", "--daemon")
    serving = f"prefork-socketmap/master[{installation.pid}]: serving {installation.endpoint}"
    assert syslog_daemon.logged("serving") == (syslog.LOG_MAIL | syslog.LOG_INFO, serving)

    with pytest.raises(TempFail):
        installation.lookup("m", "some key")
    priority, line = syslog_daemon.logged("lookup failed")
    assert priority == syslog.LOG_MAIL | syslog.LOG_ERR
    assert re.fullmatch(r"prefork-socketmap/worker\[\d+\]: error: .*'some key'.*", line)
    assert syslog_daemon.logged("ValueError")[1].partition("]: ")[2].startswith("  ")


def test_each_lookup_is_logged_with_client_status_time_map_and_key(installation: Installation) -> None:
    installation.configure("[log]\nlookups = true\n")
    installation.start()
    installation.lookup("colours", "sky")
    installation.lookup("colours", "no\nkey")
    line = installation.logged("key=<sky>")
    tag, _, text = line.partition(": ")
    assert re.fullmatch(r"prefork-socketmap/worker\[\d+\]", tag)
    assert re.fullmatch(r"lookup: client=127.0.0.1, status=OK, time=\d+\.\d ms, map=colours, key=<sky>", text)
    assert "status=NOTFOUND" in installation.logged(r"key=<no\nkey>")


def test_lookups_are_not_logged_unless_wanted(installation: Installation) -> None:
    installation.start()
    installation.lookup()
    installation.run("stop")
    assert "lookup:" not in installation.log.read_text()
