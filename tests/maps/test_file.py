"""The type ``file``: one process reads, beside the lookups; all look up; what is broken changes nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from prefork_socketmap.maps import filestate, sharedtable, textfile
from prefork_socketmap.maps.file import FileMap
from prefork_socketmap.maps.sharedtable import SharedTable
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply
from tests.crowd import Log
from tests.processes import children, process_title
from tests.serving import Gate
from tests.waiting import eventually

Make = Callable[..., FileMap]

STAYS = "the table stays as it was"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let readers wait less for a file that is being written, and until they try again."""
    monkeypatch.setattr(filestate, "_QUIET", 0.05)
    monkeypatch.setattr(sharedtable, "_PAUSE", 0.2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "table"
    path.write_text("Key one\n")
    return path


@pytest.fixture
def make(text: Path) -> Iterator[Make]:
    """Return a maker of open maps on the same file, as several workers have them."""
    with contextlib.ExitStack() as closing:

        def make(**table: object) -> FileMap:
            found = FileMap("m", {"path": text.name, "index_dir": "index", **table}, text.parent)
            found.open()
            closing.callback(found.close)
            return found

        yield make


def replace(path: Path, content: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(content)
    new.replace(path)


def rewrite(path: Path, content: str) -> None:
    path.write_text(content)


def test_a_line_answers(make: Make) -> None:
    table = make()
    assert table.lookup("key") == Reply.ok("one")
    assert table.lookup("other") == Reply.not_found()


def test_keys_in_the_file_are_folded_like_those_that_are_asked(make: Make) -> None:
    folded, exact = make(), make(fold=False)
    assert folded.lookup("KEY") == Reply.ok("one")
    assert exact.lookup("Key") == Reply.ok("one")
    assert exact.lookup("key") == Reply.not_found()


def answer(table: FileMap, expected: Reply) -> None:
    """Ask until *table* answers as *expected*."""
    eventually(lambda: table.lookup("key") == expected, within=30, what=f"the answer {expected}")


@pytest.mark.parametrize("change", [replace, rewrite])
def test_a_change_is_seen_by_every_worker(make: Make, text: Path, change: Callable[[Path, str], None]) -> None:
    workers = [make(), make()]
    # The same size each time, and as fast as can be: neither size nor a coarse clock may hide a change.
    for value in ("two", "six", "ten"):
        change(text, f"Key {value}\n")
        for worker in workers:
            answer(worker, Reply.ok(value))


def test_a_change_within_one_tick_of_the_clock_is_seen(
    make: Make, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = text.stat()

    def rewrite_unseen(seconds: float) -> None:
        text.write_text("Key two\n")
        os.utime(text, ns=(written.st_atime_ns, written.st_mtime_ns))

    monkeypatch.setattr(time, "time", lambda: written.st_mtime + 0.001)
    monkeypatch.setattr(time, "sleep", rewrite_unseen)
    assert make().lookup("key") == Reply.ok("two")


def hold_readers(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Return a gate at which, from now on, whoever reads a file waits behind each line."""
    gate = Gate()
    entries = textfile.entries

    def slow(lines: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
        for entry in entries(lines):
            yield entry
            gate.lookup("")

    monkeypatch.setattr(textfile, "entries", slow)
    return gate


def readers() -> list[int]:
    """Return the readers that this process has forked."""
    return [pid for pid in children(os.getpid()) if "reader of" in process_title(pid)]


def test_while_a_file_is_read_every_worker_answers_from_the_old_table(
    make: Make, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [make() for _ in range(8)]
    gate = hold_readers(monkeypatch)
    replace(text, "key two\n")
    assert [worker.lookup("key") for worker in workers] == [Reply.ok("one")] * 8
    gate.await_arrival()
    # And one alone reads.
    for _ in range(20):
        assert [worker.lookup("key") for worker in workers] == [Reply.ok("one")] * 8
        time.sleep(sharedtable._LOOK)
    (reader,) = readers()
    assert os.getpriority(os.PRIO_PROCESS, reader) == sharedtable._LOWEST_PRIORITY
    gate.open()
    for worker in workers:
        answer(worker, Reply.ok("two"))


@pytest.fixture(params=[signal.SIGKILL, signal.SIGTERM])
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal, which this process ignores if it can, as workers do."""
    if request.param == signal.SIGKILL:
        yield signal.SIGKILL
        return
    before = signal.signal(request.param, signal.SIG_IGN)
    yield request.param
    signal.signal(request.param, before)


def test_a_reader_that_is_killed_is_followed_by_another(
    make: Make, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    table = make()
    gate = hold_readers(monkeypatch)
    replace(text, "key two\n")
    assert table.lookup("key") == Reply.ok("one")
    gate.await_arrival()
    (reader,) = readers()
    os.kill(reader, number)
    gate.open()  # for the next one
    answer(table, Reply.ok("two"))
    assert f"its reader was ended by signal {number}" in caplog.text
    eventually(lambda: not readers() and not list((text.parent / "index").glob("*.*")), what="nothing is left")


def test_a_file_that_is_written_while_it_is_read_changes_nothing_until_it_is_whole(
    make: Make, text: Path, server_log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make()
    gate = hold_readers(monkeypatch)
    with text.open("w") as file:
        file.write("key half\n")
        file.flush()
        assert table.lookup("key") == Reply.ok("one")
        gate.await_arrival()
        file.write("key2 whole\n")
    gate.open()
    eventually(server_log.has(f"it is being written; {STAYS}"), within=30)
    assert table.lookup("key") == Reply.ok("one")
    for _ in range(2):
        gate.open()
    answer(table, Reply.ok("half"))
    assert table.lookup("key2") == Reply.ok("whole")


def test_a_file_is_left_alone_before_it_is_read(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    """Who writes it in place begins with an empty file, and may need time for the rest."""
    monkeypatch.undo()
    slept: list[float] = []
    clock = iter([0.0, 0.3, 5.0, 5.0])
    with text.open("rb") as file:
        changed = text.stat().st_ctime
        monkeypatch.setattr(time, "time", lambda: changed + next(clock))
        monkeypatch.setattr(time, "sleep", slept.append)
        filestate.left_alone(file.fileno())
    assert slept == pytest.approx([1.0, 0.7], abs=1e-3)


@pytest.mark.parametrize("content", ["key two\nbroken\n", "key \xff\n"])
def test_a_broken_file_changes_nothing_and_is_told_once(
    make: Make, text: Path, server_log: Log, content: str
) -> None:
    workers = [make() for _ in range(4)]
    text.with_suffix(".new").write_bytes(content.encode("latin-1"))
    text.with_suffix(".new").replace(text)
    assert [worker.lookup("key") for worker in workers] == [Reply.ok("one")] * 4
    eventually(server_log.has(STAYS), within=30)

    def know_it() -> bool:
        """Whether all know that there is nothing to read."""
        assert [worker.lookup("key") for worker in workers] == [Reply.ok("one")] * 4
        return not readers() and all(len(worker._table._tags) == 2 for worker in workers)

    eventually(know_it, within=30)
    assert len(server_log.lines(STAYS)) == 1
    replace(text, "key three\n")
    for worker in workers:
        answer(worker, Reply.ok("three"))


def test_a_pipe_in_the_place_of_the_file_holds_nobody_up_and_is_told_once(
    make: Make, text: Path, server_log: Log
) -> None:
    table = make()
    text.unlink()
    os.mkfifo(text)
    assert table.lookup("key") == Reply.ok("one")
    eventually(server_log.has("it is no regular file"), within=30)
    (note,) = (text.parent / "index").glob("*.failed")
    noted = note.stat().st_mtime_ns

    def tried_again() -> bool:
        assert table.lookup("key") == Reply.ok("one")
        return note.stat().st_mtime_ns != noted

    eventually(tried_again, within=30)
    eventually(lambda: not readers(), within=30)
    assert len(server_log.lines(STAYS)) == 1
    text.unlink()
    text.write_text("key two\n")
    answer(table, Reply.ok("two"))


def test_no_room_for_the_new_table_leaves_the_old_one(make: Make, text: Path, server_log: Log) -> None:
    table = make()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        # Of this the index is larger.
        replace(text, "key two\n" + "".join(f"{number} x\n" for number in range(11_000)))
        assert table.lookup("key") == Reply.ok("one")
        eventually(server_log.has(f"File too large; {STAYS}"), within=30)
        assert table.lookup("key") == Reply.ok("one")
        assert sum(path.stat().st_size for path in (text.parent / "index").iterdir()) < 1000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    answer(table, Reply.ok("two"))


def test_the_old_table_stays_while_there_is_no_file(make: Make, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = make()
    text.unlink()
    assert table.lookup("key") == Reply.ok("one")
    assert f"No such file or directory; {STAYS}" in caplog.text
    text.write_text("key two\n")
    answer(table, Reply.ok("two"))


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedTable, "_read", lambda *_: pytest.fail("read again"))


def test_a_file_is_read_once_for_all_workers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    no_reading(monkeypatch)
    assert make().lookup("key") == Reply.ok("one")


def test_the_room_of_the_old_table_is_given_back_under_a_worker_that_has_it_open(make: Make, text: Path) -> None:
    asked, idle = make(), make()
    (index,) = (text.parent / "index").iterdir()
    with index.open("rb") as old:
        replace(text, "key two\n")
        answer(asked, Reply.ok("two"))
        assert os.fstat(old.fileno()).st_size == 0
    assert idle.lookup("key") == Reply.ok("two")


def test_who_starts_beside_a_reader_does_not_wait_for_it(make: Make, text: Path) -> None:
    make()
    replace(text, "key two\n")
    reader = os.open(text.parent / "index", os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_EX)
    table = make()
    assert table.lookup("key") == Reply.ok("one")
    os.close(reader)
    answer(table, Reply.ok("two"))


@pytest.mark.parametrize("content", [None, "broken\n"])
def test_who_starts_with_a_broken_file_has_the_earlier_table_and_check_tells(
    make: Make, text: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    """Or no worker could take the place of another until somebody has mended the file."""
    make().verify()
    text.unlink()
    if content is not None:
        text.write_text(content)
    for _ in range(2):
        caplog.clear()
        table = make()
        assert table.lookup("key") == Reply.ok("one")
        assert "an earlier table answers" in caplog.text
        with pytest.raises(SettingError, match=r"maps\.m\.path: 'table' cannot be read: "):
            table.verify()


def test_an_index_that_is_damaged_is_made_anew(make: Make, text: Path) -> None:
    make().close()
    (index,) = (text.parent / "index").iterdir()
    index.write_bytes(index.read_bytes()[:-1])
    assert make().lookup("key") == Reply.ok("one")


def test_whoever_cuts_the_index_short_kills_no_worker(make: Make, text: Path) -> None:
    """A worker that is captured by its key can write to the index, as any other worker's process can."""
    table = make()
    (index,) = (text.parent / "index").iterdir()
    os.truncate(index, 0)
    assert table.lookup("key") == Reply.temp_fail("map m: the file is being read")
    eventually(lambda: table.lookup("key") == Reply.ok("one"), within=30, what="a new index")


def test_an_index_that_is_removed_under_a_worker_does_no_harm(make: Make, text: Path) -> None:
    table = make()
    (index,) = (text.parent / "index").iterdir()
    index.unlink()
    assert table.lookup("key") == Reply.ok("one")
    replace(text, "key two\n")
    answer(table, Reply.ok("two"))


def test_a_directory_that_is_removed_under_a_worker_does_no_harm(make: Make, text: Path) -> None:
    table = make()
    shutil.rmtree(text.parent / "index")
    replace(text, "key two\n")
    answer(table, Reply.ok("two"))


def test_what_a_killed_reader_left_is_removed(make: Make, text: Path) -> None:
    make()
    (index,) = (text.parent / "index").iterdir()
    index.with_suffix(".new").write_bytes(b"x" * 10_000)
    replace(text, "key two\n")
    assert make().lookup("key") == Reply.ok("two")
    assert list(index.parent.iterdir()) == [index]


def test_only_its_user_can_read_the_index(make: Make, text: Path) -> None:
    make()
    directory = text.parent / "index"
    (index,) = directory.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert index.stat().st_mode & 0o777 == 0o600


def test_a_directory_where_others_may_write_is_refused(make: Make, text: Path) -> None:
    (text.parent / "index").mkdir()
    (text.parent / "index").chmod(0o777)
    with pytest.raises(SettingError, match=r"maps\.m\.index_dir: .*nobody else may write there"):
        make()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_that_another_user_has_made_first_is_refused(make: Make, text: Path) -> None:
    directory = text.parent / "index"
    directory.mkdir(mode=0o700)
    shutil.chown(directory, "nobody")
    with pytest.raises(SettingError, match=r"maps\.m\.index_dir: .*must be a directory of user 0"):
        make()


def test_a_directory_that_is_a_link_is_refused(make: Make, text: Path) -> None:
    (text.parent / "elsewhere").mkdir(mode=0o700)
    (text.parent / "index").symlink_to("elsewhere")
    with pytest.raises(SettingError, match=r"maps\.m\.index_dir"):
        make()


def test_without_a_setting_indexes_are_kept_with_the_temporary_files(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    FileMap("m", {"path": "table"}, tmp_path).open()
    assert len(list((tmp_path / f"prefork-socketmap-{os.geteuid()}").iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "No such file"), ("broken\n", "line 1: 'broken' is not an entry")],
)
def test_a_file_that_cannot_be_read_at_first_is_an_error(
    make: Make, text: Path, content: str | None, problem: str
) -> None:
    text.unlink()
    if content is not None:
        text.write_text(content)
    with pytest.raises(SettingError, match=problem) as error:
        make()
    assert error.value.key == "maps.m.path"


def test_a_file_without_entries_is_a_table(make: Make, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text.write_text("# nothing yet\n")
    make()
    no_reading(monkeypatch)
    assert make().lookup("key") == Reply.not_found()


WORKER = """
import sys
from pathlib import Path
from prefork_socketmap.maps.file import FileMap
directory = Path(sys.argv[1])
table = FileMap("m", {"path": "table", "index_dir": "index"}, directory)
def memory():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
before = memory()
table.open()
for number in range(0, 100_000, 7):
    assert table.lookup(f"key{number}").text == f"value{number}"
print(memory() - before, flush=True)
sys.stdin.read()
"""
SIZE = 100_000


def test_no_worker_has_the_table_in_its_own_memory(text: Path) -> None:
    text.write_text("".join(f"key{number} value{number}\n" for number in range(SIZE)))
    FileMap("m", {"path": "table", "index_dir": "index"}, text.parent).open()
    (index,) = (text.parent / "index").iterdir()
    worker = subprocess.run(
        [sys.executable, "-c", WORKER, str(text.parent)], input="", capture_output=True, text=True, check=True
    )
    assert int(worker.stdout) * 1024 < index.stat().st_size / 2
