"""The scoreboard as a file: who can read it, what is refused, and what it costs. Its counts: see ``test_status``."""

from __future__ import annotations

import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefork_socketmap import Config
from prefork_socketmap.prefork import scoreboard
from prefork_socketmap.prefork.connection import Job
from prefork_socketmap.prefork.counters import (
    ENDINGS,
    MAX_NAMES,
    NOTE_SIZE,
    OTHER,
    SERVER_COUNTERS,
    ServerCounter,
    server_counter,
)
from prefork_socketmap.prefork.scoreboard import (
    LAYOUT,
    MAX_SLOTS,
    Row,
    Scoreboard,
    ScoreboardError,
    State,
    client_label,
)
from tests.serving import Serve


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scoreboard"


def spawned(board: Scoreboard) -> int:
    return board.server_counters()[server_counter("workers", "spawned")]


def write_client(row: Row, client: str) -> None:
    row.cells().client[:] = client_label(client)


@pytest.fixture
def nameless() -> Iterator[Scoreboard]:
    """A board without a path: nobody else's tests shall find it."""
    board = Scoreboard()
    yield board
    board.close()


def test_a_reader_sees_what_is_written_while_it_looks(path: Path) -> None:
    board = Scoreboard(path)
    board.learn(["users"])
    row = board.claim(generation=3)
    reader = Scoreboard.read(path)
    board.increment("workers", "spawned")
    row.pid = 4711
    write_client(row, "2001:db8::1")
    row.set_state(State.BUSY)
    users = board.open_counters(row.slot, board.labels())["users"]
    Job(row.job_cells(), left=5, before_long=lambda: None).begin(users)
    users.count(2, 0.5)
    (read,) = reader.rows()
    assert (reader.pid, spawned(reader)) == (os.getpid(), 1)
    assert (read.pid, read.generation, read.client, read.state) == (4711, 3, "2001:db8::1", State.BUSY)
    assert read.job_started == row.job_started > 0
    assert reader.names()[read.job_name] == "users"
    assert list(reader.counters(0)["users"].endings) == [0, 0, 1, 0, 0, 0, 0, 0]


def test_a_reader_cannot_write(path: Path) -> None:
    Scoreboard(path).claim(1)
    reader = Scoreboard.read(path)
    with pytest.raises(TypeError):
        reader.connections = 1
    with pytest.raises(TypeError):
        reader.counters(0)[OTHER].count(0, 1.0)


def test_everybody_may_read_it_whatever_the_umask(path: Path) -> None:
    mask = os.umask(0o077)
    try:
        Scoreboard(path)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_new_board_replaces_an_old_one_whole(path: Path) -> None:
    old = Scoreboard(path)
    old.learn(["old"])
    reader = Scoreboard.read(path)
    new = Scoreboard(path)
    new.learn(["new"])
    assert reader.names() == [OTHER, "old"]
    assert Scoreboard.read(path).names() == [OTHER, "new"]
    assert list(path.parent.iterdir()) == [path]


def test_a_link_that_lies_in_wait_is_not_followed(path: Path) -> None:
    victim = path.with_name("victim")
    victim.write_text("precious")
    path.symlink_to(victim)
    path.with_name("scoreboard.new").symlink_to(victim)
    Scoreboard(path)
    assert victim.read_text() == "precious"
    assert path.is_file()
    assert not path.is_symlink()


def test_it_is_removed_with_the_server_and_only_once(path: Path) -> None:
    board = Scoreboard(path)
    board.remove()
    assert not path.exists()
    board.remove()


def test_the_next_program_goes_on_with_it(path: Path) -> None:
    board = Scoreboard(path)
    board.learn(["users"])
    row = board.claim(1)
    board.open_counters(row.slot, board.labels())["users"].count(0, 0.1)
    board.connections = 7
    resumed = Scoreboard.resume(os.dup(board.fileno()), path)
    resumed.learn(["users", "groups"])
    assert (resumed.connections, resumed.names()) == (7, [OTHER, "users", "groups"])
    assert resumed.claim(2).slot == 1
    assert resumed.open_counters(0, resumed.labels())["users"].endings[0] == 1
    assert Scoreboard.read(path).names() == resumed.names()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda whole: b"", "it has 0 bytes"),
        (lambda whole: whole[: len(whole) // 2], "not a scoreboard, or cut short"),
        (lambda whole: bytes(len(whole)), "not a scoreboard$"),
        (lambda whole: b"\x7fELF" * (len(whole) // 4), "not a scoreboard$"),
        (
            lambda whole: whole[:8] + (LAYOUT ^ 1).to_bytes(8, sys.byteorder) + whole[16:],
            f"layout {LAYOUT ^ 1:08x}, of another version of the program; this one reads layout {LAYOUT:08x}",
        ),
    ],
    ids=["empty", "torn", "zeros", "foreign", "other layout"],
)
def test_a_file_that_is_no_board_of_this_program_is_refused(path: Path, damage: object, problem: str) -> None:
    assert callable(damage)
    Scoreboard(path).remove()
    Scoreboard(path).close()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ScoreboardError, match=problem) as caught:
        Scoreboard.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(ScoreboardError, match=problem):
        Scoreboard.resume(fd, path)
    os.close(fd)


# The names.


def test_a_name_keeps_its_place(path: Path) -> None:
    board = Scoreboard(path)
    board.learn(["a", "b", "a"])
    board.learn(["c", "b"])
    assert board.names() == [OTHER, "a", "b", "c"]


def test_names_beyond_the_limit_are_counted_together(nameless: Scoreboard) -> None:
    board = nameless
    names = [f"map{number}" for number in range(MAX_NAMES + 10)]
    board.learn(names)
    counters = board.open_counters(board.claim(1).slot, board.labels())
    for name in names:
        counters[name].count(0, 0.001)
    assert len(board.names()) == MAX_NAMES
    assert [each.endings[0] for each in counters] == [11] + [1] * (MAX_NAMES - 1)


def test_a_name_of_any_bytes_and_length_has_its_own_counters(nameless: Scoreboard) -> None:
    board = nameless
    names = ["\u00e9", "\udc80", "x" * 1000, "y" * 127 + "\u00e9"]
    board.learn(names)
    board.learn(names)
    counters = board.open_counters(board.claim(1).slot, board.labels())
    assert [counters[name].index for name in names] == [1, 2, 3, 4]
    assert board.names() == [OTHER, "\u00e9", "\ufffd", "x" * 128, "y" * 127 + "\ufffd"]


def test_a_worker_that_starts_while_names_are_added_is_not_disturbed(nameless: Scoreboard) -> None:
    board = nameless
    row = board.claim(1)
    board.learn([f"map{number}" for number in range(MAX_NAMES)])
    board.open_counters(row.slot, board.labels())[OTHER].count(0, 0.001)


# The slots.


def test_counts_go_on_when_the_next_worker_takes_the_slot(path: Path) -> None:
    board = Scoreboard(path)
    board.learn(["users"])
    for _ in range(3):
        row = board.claim(1)
        assert row.slot == 0
        board.open_counters(row.slot, board.labels())["users"].count(0, 0.25)
        row.end()
    users = Scoreboard.read(path).counters(0)["users"]
    assert (users.endings[0], users.seconds, users.worst) == (3, 0.75, 0.25)


def test_slots_do_not_touch_each_other(path: Path) -> None:
    board = Scoreboard(path)
    board.learn([f"map{number}" for number in range(MAX_NAMES)])
    rows = [board.claim(1) for _ in range(3)]
    for row in rows:
        write_client(row, "x" * 200)
        row.pid = row.slot + 1
        for each in board.open_counters(row.slot, board.labels()):
            for ending in range(ENDINGS):
                each.count(ending, 10.0**row.slot)
            each.extras[:] = memoryview(bytes([row.slot] * 32)).cast("Q")
    reader = Scoreboard.read(path)
    assert len(reader.names()) == MAX_NAMES
    for row in reader.rows():
        assert row.pid == row.slot + 1
        counters = list(reader.counters(row.slot))
        assert len(counters) == MAX_NAMES
        for each in counters:
            assert list(each.endings) == [1] * ENDINGS
            assert (each.worst, each.seconds) == (10.0**row.slot, ENDINGS * 10.0**row.slot)
            assert sum(each.buckets) == ENDINGS


def test_there_is_room_for_all_slots(path: Path) -> None:
    board = Scoreboard(path)
    for _ in range(MAX_SLOTS):
        row = board.claim(1)
    row.pid = 5
    assert Scoreboard.read(path).rows()[-1].pid == 5


# What it costs.


def test_a_worker_writes_only_where_room_was_reserved(nameless: Scoreboard) -> None:
    board = nameless  # in a file of the kernel's own: others have more blocks than what is in them
    board.learn([f"map{number}" for number in range(40)])
    row = board.claim(1)
    before = os.fstat(board.fileno()).st_blocks
    write_client(row, "192.0.2.1")
    row.increment("connections", "accepted")
    for each in board.open_counters(row.slot, board.labels()):
        each.count(0, 0.1)
    assert os.fstat(board.fileno()).st_blocks == before


def test_what_nobody_uses_takes_no_room(path: Path) -> None:
    board = Scoreboard(path)
    board.learn(["users"])
    for _ in range(10):
        board.claim(1)
    assert path.stat().st_blocks * 512 < 256 * 1024 < path.stat().st_size


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_an_error_of_the_start_of_a_worker(tmp_path: Path) -> None:
    if os.system(f"mount -t tmpfs -o size=256k none {tmp_path} 2>/dev/null"):
        pytest.skip("this environment does not let us mount")
    try:
        board = Scoreboard(tmp_path / "scoreboard")
        with pytest.raises(OSError, match="No space left"):
            deque(board.claim(1) for _ in range(1000))
    finally:
        os.system(f"umount -l {tmp_path}")  # lazily: the board is still mapped


def test_the_library_needs_no_file(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    site = serve({"ok": lambda key: key}, Config(process_limit=2))
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK key"
    assert list(tmp_path.iterdir()) == []


def _more_room_for_names() -> dict[str, object]:
    return {"MAX_NAMES": MAX_NAMES + 1}


def _one_more_word_in_a_row() -> dict[str, object]:
    return {"_LATEST": 6}


def _one_more_counter() -> dict[str, object]:
    return {"SERVER_COUNTERS": (*SERVER_COUNTERS, ServerCounter("workers", "promoted", "Workers promoted."))}


def _counters_in_another_order() -> dict[str, object]:
    return {"SERVER_COUNTERS": SERVER_COUNTERS[::-1]}


def _another_word_in_the_header() -> dict[str, object]:
    moved = type("Board", (), dict(vars(Scoreboard)) | {"pid": vars(Scoreboard)["generation"]})
    return {"Scoreboard": moved}


@pytest.mark.parametrize(
    "change",
    [
        _more_room_for_names,
        _one_more_word_in_a_row,
        _one_more_counter,
        _counters_in_another_order,
        _another_word_in_the_header,
    ],
)
def test_the_number_of_the_layout_changes_with_the_layout(change: Callable[[], dict[str, object]]) -> None:
    assert scoreboard.layout_of(vars(scoreboard)) == LAYOUT
    assert scoreboard.layout_of({**vars(scoreboard), **change()}) != LAYOUT


def test_what_is_no_layout_does_not_change_its_number() -> None:
    assert scoreboard.layout_of({**vars(scoreboard), "SLOW": 5.0, "_HELP": "text"}) == LAYOUT


def test_a_note_is_kept_cut_off_and_read_by_others(path: Path) -> None:
    board = Scoreboard(path)
    board.learn(["users"])
    row = board.claim(1)
    users = board.open_counters(row.slot, board.labels())["users"]
    users.count(0, 1e9)  # the last bucket: next to the note
    users.note = "x" * 200
    found = list(Scoreboard.read(path).counters(row.slot))[1]
    assert found.note == "x" * NOTE_SIZE
    assert found.buckets[-1] == 1
    users.note = "short\udcff"
    assert list(Scoreboard.read(path).counters(row.slot))[1].note == "short\ufffd"
    assert found.buckets[-1] == 1
