"""The log: Postfix's look, one line per event that nobody can forge, and repetitions counted."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import select
import signal
import socket
import syslog
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefork_socketmap.client import SocketmapClient, TempFail
from prefork_socketmap.daemon import log
from prefork_socketmap.daemon.budget import Budget
from prefork_socketmap.daemon.configfile import LogSettings
from prefork_socketmap.daemon.line import MAX_LENGTH, LineFormatter
from prefork_socketmap.daemon.outlet import Stderr, Syslog
from tests.daemon.installation import Installation
from tests.waiting import eventually

logger = logging.getLogger("prefork_socketmap.worker.test")
# Known to nobody else, or pytest would format the records, too.
alone = logging.Logger("prefork_socketmap.worker.test")


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What is logged, one record a line."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    alone.addHandler(handler)
    yield stream
    alone.removeHandler(handler)


@pytest.fixture
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("prefork_socketmap").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_restored")
def test_a_line_on_stderr_looks_as_one_in_syslog(capfd: pytest.CaptureFixture[str]) -> None:
    log.set_up("master", LogSettings())
    logging.getLogger("prefork_socketmap.master").warning("text")
    assert capfd.readouterr().err == f"prefork-socketmap/master[{os.getpid()}]: warning: text\n"


@pytest.mark.usefixtures("_restored")
def test_syslog_gets_the_lines_of_facility_mail_and_stderr_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Syslog, "path", tmp_path / "log")
    with SyslogDaemon(tmp_path / "log") as daemon:
        log.set_up("worker", LogSettings(to="syslog"))
        logging.getLogger("prefork_socketmap.worker").info("told")
        logging.getLogger("prefork_socketmap.worker").error("wrong")
        tag = f"prefork-socketmap/worker[{os.getpid()}]"
        assert daemon.logged("told") == (syslog.LOG_MAIL | syslog.LOG_INFO, f"{tag}: told")
        assert daemon.logged("wrong") == (syslog.LOG_MAIL | syslog.LOG_ERR, f"{tag}: error: wrong")
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_restored")
def test_lines_below_the_level_are_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    log.set_up("master", LogSettings(level="warning"))
    logging.getLogger("prefork_socketmap.master").info("text")
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_restored")
def test_libraries_are_not_debugged_with_us(capfd: pytest.CaptureFixture[str]) -> None:
    log.set_up("master", LogSettings(level="debug"))
    logging.getLogger("some.library").debug("secret")
    logging.getLogger("prefork_socketmap.master").debug("ours")
    assert "secret" not in (printed := capfd.readouterr().err)
    assert "ours" in printed


@pytest.mark.usefixtures("_restored")
def test_a_process_logs_so_many_bytes_a_minute_and_no_more(capfd: pytest.CaptureFixture[str]) -> None:
    log.set_up("worker", LogSettings(budget=1000))
    for number in range(1000):
        logger.warning("code of a map that puts this into its text: %s" % number)  # noqa: UP031
    lines = capfd.readouterr().err.splitlines()
    assert 500 < sum(len(line.partition(": ")[2]) for line in lines) <= 1000
    assert log.look() < math.inf, "the master comes back to tell how many were held back"
    logging.getLogger().handlers[0].close()
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.endswith(
        f"warning: {1000 - len(lines)} lines were held back: a minute's would be more than log.budget"
    )


@pytest.mark.usefixtures("_restored")
def test_lookups_and_debugging_that_were_asked_for_have_no_budget(capfd: pytest.CaptureFixture[str]) -> None:
    log.set_up("worker", LogSettings(level="debug", lookups=True, budget=1000))
    for _ in range(100):
        logging.getLogger("prefork_socketmap.worker.lookups").info("lookup")
        logging.getLogger("prefork_socketmap.worker").debug("how it is found")
    assert len(capfd.readouterr().err.splitlines()) == 200


@pytest.mark.usefixtures("_restored")
def test_a_setup_leaves_no_descriptor_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Syslog, "path", tmp_path / "log")
    with SyslogDaemon(tmp_path / "log"):

        def reload(destination: str) -> int:
            log.set_up("master", LogSettings(to=destination))
            logger.warning("text")
            return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

        first = reload("syslog")
        for _ in range(10):
            reload("stderr")
            assert reload("syslog") == first


@pytest.mark.parametrize("hostile", ["a\nb", "a\r\nb", "a\0b", "a\x1b[2Jb", "a\u2028b", "a\x85b", "a\udcffb"])
def test_what_a_client_writes_stays_printable_and_on_its_line(lines: io.StringIO, hostile: str) -> None:
    alone.info("key=<%s>", hostile)
    text = lines.getvalue()
    assert text.count("\n") == 1
    assert text.rstrip("\n").isprintable()
    assert len(text.splitlines()) == 1


def test_plain_text_of_any_script_is_logged_as_it_is(lines: io.StringIO) -> None:
    alone.info("key=<%s>", "jörg@例え.jp")
    assert lines.getvalue() == "key=<jörg@例え.jp>\n"


def test_a_traceback_is_indented_so_that_it_cannot_pass_for_other_lines(lines: io.StringIO) -> None:
    try:
        raise ValueError("x\nlookup: client=127.0.0.1, status=OK")
    except ValueError:
        alone.exception("map %s: lookup failed", "m")
    first, *rest = lines.getvalue().splitlines()
    assert first == "error: map m: lookup failed"
    assert all(line.startswith("  ") for line in rest)
    assert any("lookup: client" in line for line in rest)


def test_a_line_is_cut_before_syslog_does_it(lines: io.StringIO) -> None:
    alone.info("x" * 10000)
    assert len(lines.getvalue()) == MAX_LENGTH + 1


@pytest.mark.parametrize("key", ["a" * 99_000, "ü" * 40_000, "\0" * 99_000, "\n" * 99_000, "\U000f0000" * 20_000])
@pytest.mark.parametrize("template", ["map <%s>, key <%s>: lookup failed", "map %s, key %r: lookup failed"])
def test_a_long_argument_does_not_push_out_what_the_server_says(lines: io.StringIO, key: str, template: str) -> None:
    alone.error(template, key, key)
    line = lines.getvalue().removesuffix("\n")
    assert len(line.encode()) <= MAX_LENGTH
    assert line.isprintable()
    assert line.endswith(": lookup failed")


def test_a_client_cannot_write_itself_out_of_the_brackets(lines: io.StringIO) -> None:
    alone.info("lookup: map=<%s>, key=<%s>", "m>, key=<forged>", "k>, status=OK, key=<forged>")
    assert re.fullmatch(r"lookup: map=<[^>]*>, key=<[^>]*>\n", lines.getvalue())


def test_a_traceback_has_no_more_lines_than_it_needs_whatever_the_key_is(lines: io.StringIO) -> None:
    try:
        raise ValueError("\n" * 99_000 + "x" * 99_000)
    except ValueError:
        alone.exception("lookup failed")
    found = lines.getvalue().splitlines()
    assert len(found) <= 42
    assert sum(map(len, found)) < 5000
    assert any("Traceback" in line for line in found)


def test_a_record_that_cannot_be_formatted_is_logged_and_raises_nothing(
    lines: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    alone.error("%d keys", "many")
    assert lines.getvalue() == "error: %d keys (not formatted: TypeError)\n"
    assert capfd.readouterr().err == ""


class SyslogDaemon:
    """A syslog daemon at *path*."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
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

    def __enter__(self) -> SyslogDaemon:
        return self

    def __exit__(self, *_error: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ending:
            ending.sendto(b"", str(self._path))
        self._reader.join()
        self._sock.close()
        self._path.unlink()


@pytest.fixture
def syslog_daemon() -> Iterator[SyslogDaemon]:
    if Syslog.path.exists() or os.geteuid() != 0:
        pytest.skip("this needs root, and a machine without a syslog daemon")
    with SyslogDaemon(Syslog.path) as daemon:
        yield daemon


def test_a_daemon_logs_to_syslog_as_postfix_does(syslog_daemon: SyslogDaemon, installation: Installation) -> None:
    (installation.directory / "broken.py").write_text("def f(key): raise ValueError(key)\n")
    installation.configure(maps='[maps.m]\ntype = "python"\npath = ["."]\nfunction = "broken:f"\n')
    installation.run("serve", "--daemon")
    serving = f"prefork-socketmap/master[{installation.pid}]: serving {installation.endpoint}"
    assert syslog_daemon.logged(serving) == (syslog.LOG_MAIL | syslog.LOG_INFO, serving)

    with pytest.raises(TempFail):
        installation.lookup("m", "some key")
    priority, line = syslog_daemon.logged("lookup failed")
    assert priority == syslog.LOG_MAIL | syslog.LOG_ERR
    assert re.fullmatch(r"prefork-socketmap/worker\[\d+\]: error: .*<some key>.*", line)
    assert syslog_daemon.logged("ValueError")[1].partition("]: ")[2].startswith("  ")


def test_each_lookup_is_logged_with_client_status_time_map_and_key(installation: Installation) -> None:
    installation.configure("[log]\nlookups = true\n")
    installation.start()
    installation.lookup("colours", "sky")
    installation.lookup("colours", "no\nkey")
    line = installation.logged("key=<sky>")
    tag, _, text = line.partition(": ")
    assert re.fullmatch(r"prefork-socketmap/worker\[\d+\]", tag)
    assert re.fullmatch(r"lookup: client=127.0.0.1, status=OK, time=\d+\.\d ms, map=<colours>, key=<sky>", text)
    assert "status=NOTFOUND" in installation.logged(r"key=<no\nkey>")


def test_lookups_are_not_logged_unless_wanted(installation: Installation) -> None:
    installation.start()
    installation.lookup()
    installation.run("stop")
    assert "lookup:" not in installation.log.read_text()


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe with no room left in it."""
    reader, writer = os.pipe()
    filling = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(filling, b"x" * select.PIPE_BUF)
    os.close(filling)
    yield reader, writer
    os.close(reader)
    os.close(writer)


@pytest.mark.usefixtures("_restored")
def test_a_process_that_is_forked_off_repeats_nothing_that_waits_in_its_parent(full_pipe: tuple[int, int]) -> None:
    outlet = Stderr("name", descriptor=full_pipe[1])
    handler = log.Handler(outlet, Budget(0))
    logging.getLogger().handlers.append(handler)
    logger.error("text")
    logger.error("text")
    child = os.fork()
    if child == 0:
        os._exit(outlet.is_waiting or handler.look() < math.inf)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert outlet.is_waiting
    assert handler.look() < math.inf


@pytest.mark.usefixtures("_restored")
def test_a_reload_forgets_nothing_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Syslog, "path", tmp_path / "log")
    settings = LogSettings(to="syslog")
    log.set_up("master", settings)
    logger.error("before the reload")
    log.set_up("master", settings)
    with SyslogDaemon(tmp_path / "log") as daemon:
        logger.error("after the reload")
        assert daemon.logged("before the reload")


def check_that_nothing_stops(installation: Installation) -> None:
    """Check that lookups, replacements of workers, reloads and the stop do not wait for the log's reader."""
    for _ in range(400):  # each of them is a line
        assert installation.lookup("colours", "sky" + " " * 300) is None
    for generation in range(2, 5):
        assert installation.run("reload").returncode == 0
        assert installation.state()["generation"] == generation
    killed = installation.workers()[0]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: killed not in (workers := installation.workers()) and len(workers) >= 2)
    assert installation.lookup() == "blue"
    assert installation.run("stop").returncode == 0


def test_a_reader_of_stderr_that_has_stopped_stops_nothing(
    installation: Installation, full_pipe: tuple[int, int]
) -> None:
    installation.configure("[log]\nlookups = true\n")
    installation.start(stderr=full_pipe[1])
    check_that_nothing_stops(installation)


def test_a_syslog_daemon_that_has_stopped_stops_nothing(installation: Installation) -> None:
    if Syslog.path.exists() or os.geteuid() != 0:
        pytest.skip("this needs root, and a machine without a syslog daemon")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as never_read:
        never_read.bind(str(Syslog.path))
        try:
            installation.configure('[log]\nto = "syslog"\nlookups = true\n')
            installation.start()
            check_that_nothing_stops(installation)
        finally:
            Syslog.path.unlink()


def test_what_waits_in_the_master_is_sent_when_it_is_read_and_nothing_else_happens(
    installation: Installation, full_pipe: tuple[int, int]
) -> None:
    installation.start(stderr=full_pipe[1])
    os.set_blocking(full_pipe[0], False)
    written = b""

    def is_told() -> bool:
        nonlocal written
        with contextlib.suppress(BlockingIOError):
            written += os.read(full_pipe[0], 65536)
        return installation.endpoint.encode() in written

    eventually(is_told)


def test_the_reader_of_stderr_learns_how_many_lines_were_lost(
    installation: Installation, full_pipe: tuple[int, int]
) -> None:
    installation.configure("process_limit = 1\n[log]\nlookups = true\n")
    installation.start(stderr=full_pipe[1])
    for _ in range(1000):
        installation.lookup("colours", "sky" + " " * 300)
    os.set_blocking(full_pipe[0], False)
    written = b""
    asked = 1000

    def is_every_lookup_told() -> bool:
        nonlocal asked, written
        with contextlib.suppress(BlockingIOError):
            while True:
                written += os.read(full_pipe[0], 65536)
        lost = re.search(rb"worker\[\d+\]: warning: (\d+) lines of this log are lost", written)
        if lost and written.count(b"lookup: ") + int(lost[1]) == asked:
            return True
        if not lost:
            installation.lookup()
            asked += 1
        return False

    eventually(is_every_lookup_told)


FAILING_DEFAULT_MAP = """
[default_map]
type = "python"
path = ["."]
function = "failing:f"
"""


def resident_size(pid: int) -> int:
    """Return how much memory the process takes, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_failing_default_map_does_not_log_and_keep_what_clients_call_it(installation: Installation) -> None:
    (installation.directory / "failing.py").write_text("def f(key): raise ValueError(key)\n")
    installation.configure("process_limit = 1\n", maps=FAILING_DEFAULT_MAP)
    installation.start()
    (worker,) = installation.idle_workers()
    with SocketmapClient(installation.endpoint) as client:

        def ask(name: str) -> None:
            with pytest.raises(TempFail):
                client.lookup(name, "key")

        for number in range(10):
            ask(f"{number}" + "n" * 99_000)
        before = resident_size(worker)
        for number in range(1000):
            ask(f"{number}" + "n" * 99_000)
        for number in range(1000):
            ask(f"name{number}")
        assert installation.workers() == [worker]
        assert resident_size(worker) < before + 20_000_000
    assert installation.log.stat().st_size < 20_000


def test_a_failing_map_does_not_hide_that_another_fails(installation: Installation) -> None:
    (installation.directory / "failing.py").write_text("def f(key): raise ValueError(key)\n")
    maps = (FAILING_DEFAULT_MAP.replace("default_map", f"maps.{name}") for name in ("one", "two"))
    installation.configure("process_limit = 1\n", maps="".join(maps))
    installation.start()
    for name in ("one", "two"):
        with pytest.raises(TempFail):
            installation.lookup(name, "key")
    installation.run("stop")
    lines = installation.log.read_text().splitlines()
    assert [name for name in ("one", "two") if any(f"error: map <{name}>" in line for line in lines)] == [
        "one",
        "two",
    ]


def test_malformed_requests_from_many_addresses_do_not_fill_the_log(installation: Installation) -> None:
    installation.start()
    for number in range(2000):
        source = f"127.{number % 200 + 1}.{number % 250}.1"
        with socket.create_connection(("127.0.0.1", installation.port), 10, source_address=(source, 0)) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert sock.recv(100) == b"22:PERM malformed request,"
    assert installation.log.stat().st_size < 20_000
