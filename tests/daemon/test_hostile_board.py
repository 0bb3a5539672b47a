"""What ``status`` reads was written by workers, and may be anything: it is shown in bounded time, as what it is."""

from __future__ import annotations

import json
import math
import mmap
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from prefork_socketmap.daemon import asjson, prometheus, report, tables
from prefork_socketmap.daemon.report import Finding
from prefork_socketmap.prefork.scoreboard import MAX_SLOTS, Scoreboard, ScoreboardError

HUGE = (1 << 64) - 1
PATIENCE = 20.0
"""Seconds; far more than it takes, and far less than what a board of 2^62 slots would take."""


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Scoreboard]:
    board = Scoreboard(tmp_path / "scoreboard")
    board.learn(["users", "groups"])
    for _ in range(3):
        board.claim(1)
    yield board
    board.close()


def show(path: Path) -> str:
    """Read the board at *path* and render it in all formats; return the text."""
    begin = time.monotonic()
    read = Scoreboard.read(path)
    time.localtime(read.started)
    finding = Finding(0, "it runs", 1, report.make(read))
    document = asjson.render(finding)
    json.loads(document, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    list(text_string_to_metric_families(prometheus.render(finding)))
    text = tables.render(finding)
    assert time.monotonic() - begin < PATIENCE
    return text


def word(index: int, value: int) -> Callable[[Scoreboard], None]:
    def deed(board: Scoreboard) -> None:
        board.words[index] = value

    return deed


def times(value: float) -> Callable[[Scoreboard], None]:
    """Write *value* wherever a worker writes a time."""

    def deed(board: Scoreboard) -> None:
        board.times[12] = value
        for row in board.rows():
            board.times[row.base + 2] = board.times[row.base + 3] = value
            for counters in board.open_counters(row.slot, board.labels()):
                counters.count(0, 0.5)
                counters._times[8] = counters._times[9] = value

    return deed


def counts(board: Scoreboard) -> None:
    """Write the largest number wherever a worker writes a number."""
    for row in board.rows():
        for index in (0, 1, 4, 5, *range(8, 24)):
            board.words[row.base + index] = HUGE
        for counters in board.open_counters(row.slot, board.labels()):
            counters._words[:] = memoryview(b"\xff" * len(counters._words) * 8).cast("Q")


def states(board: Scoreboard) -> None:
    board.states[:] = b"\xff" * MAX_SLOTS


def clients(board: Scoreboard) -> None:
    for row in board.rows():
        row.set_state(row.state.__class__(5))
        row.cells().client[:] = b"\x1b]0;owned\x07\n\r\xff".ljust(64, b"\x1b")


DAMAGES: dict[str, Callable[[Scoreboard], None]] = {
    "2^62 slots": word(2, 1 << 62),
    "2^62 names": word(3, 1 << 62),
    "no names": word(3, 0),
    "2^64 connections": word(7, HUGE),
    "NaN": times(math.nan),
    "infinity": times(math.inf),
    "a time before all times": times(-math.inf),
    "a time after all times": times(1e300),
    "the largest counts": counts,
    "unknown states": states,
    "escape sequences": clients,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_stands_on_a_board_is_shown_in_every_format(board: Scoreboard, tmp_path: Path, damage: str) -> None:
    DAMAGES[damage](board)
    text = show(tmp_path / "scoreboard")
    assert text.replace("\n", "").isprintable()


def test_a_board_of_random_bytes_is_shown_too(board: Scoreboard, tmp_path: Path) -> None:
    chance = random.Random(11)
    header = bytes(board.view[:16])
    for _ in range(5):
        for _ in range(2000):
            where = chance.choice((0, 0, 4096, 30_000)) + chance.randrange(60_000)
            board.view[where] = chance.randrange(256)
        board.view[:16] = header
        assert show(tmp_path / "scoreboard").replace("\n", "").isprintable()


def test_a_file_of_any_size_is_no_reason_to_hang(tmp_path: Path) -> None:
    board = Scoreboard(tmp_path / "scoreboard")
    with (tmp_path / "scoreboard").open("r+b") as file:
        file.truncate(1 << 40)
    show(tmp_path / "scoreboard")
    board.close()
    with (tmp_path / "scoreboard").open("r+b") as file:
        file.truncate(mmap.PAGESIZE)
    with pytest.raises(ScoreboardError, match="cut short"):
        Scoreboard.read(tmp_path / "scoreboard")
