"""The type ``file``."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefork_socketmap.maps.file import FileMap
from prefork_socketmap.maps.sharedtable import SharedTable
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply

Make = Callable[..., FileMap]


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


@pytest.mark.parametrize("change", [replace, rewrite])
def test_a_change_is_seen_by_the_next_lookup_of_every_worker(
    make: Make, text: Path, change: Callable[[Path, str], None]
) -> None:
    workers = [make(), make()]
    # The same size each time, and as fast as can be: neither size nor a coarse clock may hide a change.
    for value in ("two", "six", "ten"):
        change(text, f"Key {value}\n")
        assert [worker.lookup("key") for worker in workers] == [Reply.ok(value)] * 2


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


def test_the_old_table_stays_when_the_new_one_does_not_parse(
    make: Make, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = make()
    replace(text, "key two\nbroken\n")
    assert table.lookup("key") == Reply.ok("one")
    assert "line 2: 'broken' is not an entry" in caplog.text
    assert "the table stays as it was" in caplog.text
    replace(text, "key three\n")
    assert table.lookup("key") == Reply.ok("three")


def test_a_file_that_does_not_parse_is_read_once(make: Make, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make()
    replace(text, "broken\n")
    table.lookup("key")
    monkeypatch.setattr(SharedTable, "_written", lambda self: pytest.fail("read again"))
    assert table.lookup("key") == Reply.ok("one")


def test_the_old_table_stays_while_there_is_no_file(make: Make, text: Path) -> None:
    table = make()
    text.unlink()
    assert table.lookup("key") == Reply.ok("one")
    text.write_text("key two\n")
    assert table.lookup("key") == Reply.ok("two")


def test_a_file_is_parsed_once_for_all_workers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    monkeypatch.setattr(SharedTable, "_written", lambda self: pytest.fail("parsed again"))
    assert make().lookup("key") == Reply.ok("one")


def test_while_one_worker_reads_a_new_file_the_others_answer_from_the_old(make: Make, text: Path) -> None:
    table = make()
    replace(text, "key two\n")
    other = os.open(text.parent / "index", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert table.lookup("key") == Reply.ok("one")
    os.close(other)
    assert table.lookup("key") == Reply.ok("two")


def test_an_index_that_is_damaged_is_made_anew(make: Make, text: Path) -> None:
    make().close()
    (index,) = (text.parent / "index").iterdir()
    index.write_bytes(index.read_bytes()[:-1])
    assert make().lookup("key") == Reply.ok("one")


def test_an_index_that_is_removed_under_a_worker_does_no_harm(make: Make, text: Path) -> None:
    table = make()
    (index,) = (text.parent / "index").iterdir()
    index.unlink()
    assert table.lookup("key") == Reply.ok("one")
    replace(text, "key two\n")
    assert table.lookup("key") == Reply.ok("two")


def test_a_directory_that_is_removed_under_a_worker_does_no_harm(make: Make, text: Path) -> None:
    table = make()
    shutil.rmtree(text.parent / "index")
    replace(text, "key two\n")
    assert table.lookup("key") == Reply.ok("two")


def test_what_a_killed_worker_left_is_removed(make: Make, text: Path) -> None:
    make()
    (index,) = (text.parent / "index").iterdir()
    index.with_suffix(".12345").touch()
    replace(text, "key two\n")
    make()
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
    monkeypatch.setattr(SharedTable, "_written", lambda self: pytest.fail("parsed again"))
    assert make().lookup("key") == Reply.not_found()


WORKER = """
import sys
from pathlib import Path
from prefork_socketmap.maps.file import FileMap
directory = Path(sys.argv[1])
table = FileMap("m", {"path": "table", "index_dir": "index"}, directory)
table.open()
for number in range(0, 100_000, 7):
    assert table.lookup(f"key{number}").text == f"value{number}"
print("ready", flush=True)
sys.stdin.read()
"""
SIZE = 100_000


def test_workers_that_start_together_share_one_copy(text: Path) -> None:
    text.write_text("".join(f"key{number} value{number}\n" for number in range(SIZE)))
    command = [sys.executable, "-c", WORKER, str(text.parent)]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        (index,) = (text.parent / "index").iterdir()
        mapped = [mapping(worker.pid, index) for worker in workers]
        assert all(sizes["Rss"] > 1000 for sizes in mapped)
        # Each has it all, and together they have it once.
        assert sum(sizes["Pss"] for sizes in mapped) <= index.stat().st_size / 1024 + 4 * 4
    finally:
        for worker in workers:
            worker.communicate()
    assert [worker.returncode for worker in workers] == [0] * 4


def mapping(pid: int, path: Path) -> dict[str, int]:
    """Return the numbers, in KiB, that smaps has for the mapping of *path* in process *pid*."""
    sizes: dict[str, int] = {}
    is_it = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if "-" in name.split(" ")[0]:
            is_it = line.endswith(str(path))
        elif is_it and rest.endswith(" kB"):
            sizes[name] = int(rest.removesuffix(" kB"))
    return sizes
