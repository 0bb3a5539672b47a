"""Files that workers read for themselves: a change is seen, no lookup waits for it, a broken file changes nothing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

from prefork_socketmap.maps.cdb import Cdb
from prefork_socketmap.maps.watched import WatchedFileMap
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.integration.servers.process import library, program
from tests.integration.test_native_files import require_types
from tests.maps.doubles import damaged
from tests.maps.opening import OpenMap
from tests.waiting import eventually

DATABASES = ("cdb", "lmdb")
DEADLINE = 30.0


def pattern(value: str) -> bytes:
    return f"/^key$/ {value}\n".encode()


def network(value: str) -> bytes:
    return f"192.0.2.1 {value}\n".encode()


TEXTS: dict[str, tuple[str, Callable[[str], bytes]]] = {
    "cidr": ("192.0.2.1", network),
    "regexp": ("key", pattern),
    "pcre": ("key", pattern),
}


@dataclass
class Text:
    """A map that answers from a text, and the text."""

    table: WatchedFileMap[object]
    key: str
    line: Callable[[str], bytes]
    path: Path

    def answer(self, value: str) -> None:
        """Ask until the map answers with *value*."""
        eventually(lambda: self.table.lookup(self.key) == Reply.ok(value), within=DEADLINE, what=f"the value {value}")


def postmap(path: Path, kind: str, entries: dict[str, str]) -> Path:
    """Make a database file with *entries*, by postmap(1), beside *path*; in place, if it is there and LMDB."""
    require_types(kind)
    path.write_text("".join(f"{key} {value}\n" for key, value in entries.items()))
    subprocess.run([program("postmap", "postfix"), f"{kind}:{path}"], check=True)
    return path.with_name(f"{path.name}.{kind}")


@pytest.fixture(autouse=True)
def hurry(eager_readers: None) -> None:
    """Read soon."""


@pytest.fixture(params=TEXTS)
def text(request: pytest.FixtureRequest, open_map: OpenMap, tmp_path: Path) -> Text:
    """An open map of each type whose file is a text."""
    key, line = TEXTS[request.param]
    (tmp_path / "table").write_bytes(line("one"))
    table = open_map(request.param, path="table")
    assert isinstance(table, WatchedFileMap)
    return Text(table, key, line, tmp_path / "table")


def test_a_changed_text_is_seen(text: Text) -> None:
    # The same size each time, and as fast as can be.
    for value in ("two", "six", "ten"):
        text.path.write_bytes(text.line(value))
        text.answer(value)
    new = text.path.with_name("new")
    new.write_bytes(text.line("new"))
    new.replace(text.path)
    text.answer("new")


def test_lookups_go_on_while_a_text_is_read(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, opened = threading.Event(), threading.Event()
    read = text.table.read

    def slow(file: BinaryIO) -> object:
        arrived.set()
        assert opened.wait(DEADLINE)
        return read(file)

    monkeypatch.setattr(text.table._followed, "_make", slow)
    text.path.write_bytes(text.line("two"))
    assert text.table.lookup(text.key) == Reply.ok("one")
    assert arrived.wait(DEADLINE)
    reader = text.table._followed._thread
    for _ in range(10):
        assert text.table.lookup(text.key) == Reply.ok("one")
        assert text.table._followed._thread is reader
    opened.set()
    text.answer("two")


def test_a_text_that_is_written_while_it_is_read_changes_nothing_until_it_is_whole(
    text: Text, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = text.table.read
    rest = [text.line("half") + text.line("whole")]

    def overtaken(file: BinaryIO) -> object:
        found = read(file)
        if rest:
            text.path.write_bytes(rest.pop())
        return found

    monkeypatch.setattr(text.table._followed, "_make", overtaken)
    text.path.write_bytes(text.line("begun"))
    assert text.table.lookup(text.key) == Reply.ok("one")
    eventually(lambda: "it is being written; the table stays as it was" in caplog.text, within=DEADLINE)
    assert text.table.lookup(text.key) == Reply.ok("one")
    text.answer("half")


def test_a_text_that_does_not_parse_changes_nothing_and_is_read_once(
    text: Text, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text.path.write_bytes(text.line("two") + b"broken\n")
    assert text.table.lookup(text.key) == Reply.ok("one")
    eventually(lambda: "the table stays as it was" in caplog.text, within=DEADLINE)
    assert "line 2: 'broken'" in caplog.text
    text.table._followed._thread.join()  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(text.table._followed, "_read", lambda *_: pytest.fail("read again"))
        assert text.table.lookup(text.key) == Reply.ok("one")
    text.path.unlink()
    assert text.table.lookup(text.key) == Reply.ok("one")
    text.path.write_bytes(text.line("three"))
    text.answer("three")


def test_a_pipe_in_the_place_of_a_text_holds_nobody_up(text: Text, caplog: pytest.LogCaptureFixture) -> None:
    text.path.unlink()
    os.mkfifo(text.path)
    assert text.table.lookup(text.key) == Reply.ok("one")
    eventually(lambda: "it is no regular file" in caplog.text, within=DEADLINE)


@pytest.mark.parametrize("kind", DATABASES)
def test_a_database_that_postmap_makes_anew_is_seen_by_the_next_lookup(
    open_map: OpenMap, tmp_path: Path, kind: str
) -> None:
    path = postmap(tmp_path / "table", kind, {"key": "one"})
    table = open_map(kind, path=path.name)
    for value in ("two", "six"):
        postmap(tmp_path / "table", kind, {"key": value, value: "x"})
        assert table.lookup("key") == Reply.ok(value)
        assert table.lookup("KEY") == Reply.ok(value)
        assert table.lookup("one") == Reply.not_found()


@pytest.mark.parametrize("kind", DATABASES)
def test_a_database_that_takes_the_place_of_another_is_opened(open_map: OpenMap, tmp_path: Path, kind: str) -> None:
    path = postmap(tmp_path / "table", kind, {"key": "one"})
    table = open_map(kind, path=path.name)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for value in ("two", "six"):
        postmap(tmp_path / "other", kind, {"key": value}).replace(path)
        assert table.lookup("key") == Reply.ok(value)
    path.unlink()
    assert table.lookup("key") == Reply.ok("six")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("kind", DATABASES)
def test_two_maps_may_have_the_same_database(open_map: OpenMap, tmp_path: Path, kind: str) -> None:
    path = postmap(tmp_path / "table", kind, {"key": "one"})
    tables = [open_map(kind, path=path.name), open_map(kind, path=str(path), result_format="<%s>")]
    assert [table.lookup("key") for table in tables] == [Reply.ok("one"), Reply.ok("<one>")]
    tables[0].close()
    assert tables[1].lookup("key") == Reply.ok("<one>")
    tables[0].open()
    assert tables[0].lookup("key") == Reply.ok("one")


def test_an_lmdb_database_that_outgrows_its_file_is_still_read(open_map: OpenMap, tmp_path: Path) -> None:
    path = postmap(tmp_path / "table", "lmdb", {"key": "one"})
    table = open_map("lmdb", path=path.name)
    assert table.lookup("key") == Reply.ok("one")
    postmap(tmp_path / "table", "lmdb", {f"key{number}": "x" * 400 for number in range(50_000)})
    assert path.stat().st_size > 20_000_000
    assert table.lookup("key49999") == Reply.ok("x" * 400)


@pytest.mark.parametrize("kind", DATABASES)
@pytest.mark.parametrize("content", [b"", b"x" * 100, b"x" * 10_000, b"\xff" * 10_000, bytes(10_000)])
def test_a_file_that_is_no_database_is_refused_or_empty(
    open_map: OpenMap, tmp_path: Path, kind: str, content: bytes
) -> None:
    (tmp_path / "table").write_bytes(content)
    if kind == "cdb" and content == bytes(10_000):
        assert open_map(kind, path="table").lookup("key") == Reply.not_found()
        return
    with pytest.raises(SettingError, match=r"maps\.m\.path: 'table': is no"):
        open_map(kind, path="table")


def test_a_damaged_cdb_raises_and_never_more_than_that(tmp_path: Path) -> None:
    path = postmap(tmp_path / "table", "cdb", {f"key{number}": "value" for number in range(20)})
    whole = path.read_bytes()
    source = random.Random(1)
    outcomes = set()
    for _ in range(2000):
        changed = damaged(whole, 3, source)
        path.write_bytes(changed[: source.choice([len(whole), source.randrange(len(whole))])])
        descriptor = os.open(path, os.O_RDONLY)
        try:
            outcomes.add(Cdb(descriptor).get(b"key7"))
        except ValueError as error:
            outcomes.add(str(error).encode())
        finally:
            os.close(descriptor)
    assert outcomes >= {b"value", None, b"is no cdb file, or not a whole one"}


def test_a_cdb_that_is_cut_short_under_the_map_is_a_failed_lookup(open_map: OpenMap, tmp_path: Path) -> None:
    path = postmap(tmp_path / "table", "cdb", {f"key{number}": "value" for number in range(200)})
    table = open_map("cdb", path=path.name)
    os.truncate(path, 2048)
    with pytest.raises(ValueError, match="has been cut short"):
        table.lookup("key1")
    postmap(tmp_path / "table", "cdb", {"key1": "back"})
    assert table.lookup("key1") == Reply.ok("back")


LOCK = (
    "import fcntl, sys; file = open(sys.argv[1], 'r+b'); fcntl.lockf(file, fcntl.LOCK_EX);"
    "print('locked', flush=True); sys.stdin.read()"
)
LOOKUP = (
    "import sys; from prefork_socketmap.maps import registry;"
    "table = registry.build({'m': {'type': 'lmdb', 'path': sys.argv[1]}})['m'];"
    "table.open(); print(table.lookup('key').text)"
)


def test_a_lookup_waits_for_postmap_to_finish_with_an_lmdb_database(tmp_path: Path) -> None:
    """Postfix locks the file while it writes; who reads it meanwhile could see neither the old nor the new table."""
    library("lmdb", "lmdb")
    path = postmap(tmp_path / "table", "lmdb", {"key": "one"})
    with run(LOCK, path) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "locked\n"
        with run(LOOKUP, path) as reader:
            eventually(lambda: waits_for_a_lock(reader.pid), what="the reader waits")
            writer.communicate()
            assert reader.communicate()[0] == "one\n"


def run(script: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def waits_for_a_lock(pid: int) -> bool:
    """Whether the kernel lists *pid* as waiting: proc(5), "/proc/locks"."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and str(pid) in line.split() for line in lines)


def test_a_key_that_is_longer_than_any_in_the_database_is_not_found(open_map: OpenMap, tmp_path: Path) -> None:
    for kind in DATABASES:
        path = postmap(tmp_path / "table", kind, {"key": "one"})
        assert open_map(kind, path=path.name).lookup("x" * 90_000).status is Status.NOT_FOUND
