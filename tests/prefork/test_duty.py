"""Duty and reserve: who has a place, who sleeps, and who hears a call, a dismissal or the gong."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from prefork_socketmap.prefork.duty import PLACES, Duty, DutyState, is_held_up
from prefork_socketmap.prefork.scoreboard import Row, Scoreboard, State
from prefork_socketmap.prefork.shared import Lifeline
from prefork_socketmap.prefork.table import ConnectionTable
from tests.processes import descriptors
from tests.serving import DEADLINE
from tests.waiting import eventually


class Post:
    """What a generation's duty needs: a board, a table, the master's lifeline."""

    def __init__(self) -> None:
        self.board = Scoreboard()
        self.table = ConnectionTable(700, 800)
        self.lifeline = Lifeline.new()
        self.duty = Duty(self.board, self.lifeline.fd)
        self.duty.open_at(self.table)

    def worker(self, state: State) -> Row:
        row = self.board.claim(1)
        row.set_state(state)
        return row

    def close(self) -> None:
        self.duty.close_at(self.table)
        for each in (self.board, self.table, self.lifeline):
            each.close()


@pytest.fixture
def post() -> Iterator[Post]:
    post = Post()
    yield post
    post.close()


class Reserve:
    """Threads that wait in reserve, as workers do; ``heard`` is what they have heard: whether it was a call."""

    def __init__(self, post: Post, number: int) -> None:
        self.heard: list[bool] = []
        self._duty = post.duty
        self.threads = [threading.Thread(target=self._wait, daemon=True) for _ in range(number)]
        for thread in self.threads:
            post.worker(State.RESERVE)
            thread.start()

    def _wait(self) -> None:
        self.heard.append(self._duty.wait_in_reserve())

    def await_heard(self, *expected: bool) -> None:
        eventually(lambda: sorted(self.heard) == sorted(expected), DEADLINE, f"{expected}, heard was {self.heard}")

    def join(self) -> None:
        for thread in self.threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()


def test_who_defers_leaves_a_call_to_another_one(post: Post) -> None:
    asked: list[int] = []

    def defers(reserve: int) -> bool:
        asked.append(reserve)
        return len(asked) < 3

    for _ in range(4):
        post.worker(State.RESERVE)
    threads = [threading.Thread(target=post.duty.wait_in_reserve, args=[defers], daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    post.duty.call()
    eventually(lambda: sum(not thread.is_alive() for thread in threads) == 1, DEADLINE)
    assert asked == [4, 4, 4]
    post.duty.retire()
    for thread in threads:
        thread.join(DEADLINE)
    assert asked == [4, 4, 4]


def job(row: Row, seconds: float) -> None:
    """Let the worker of *row* be so long in a job."""
    row.job_cells()[1][0] = monotonic() - seconds


# Places.


def test_there_are_as_many_places_as_processors(post: Post) -> None:
    assert len(os.sched_getaffinity(0)) == PLACES
    for _ in range(PLACES):
        assert post.duty.free_places(monotonic())
        post.worker(State.IDLE)
    assert not post.duty.free_places(monotonic())


def test_who_serves_has_a_place_and_who_is_off_duty_has_none(post: Post) -> None:
    for state in (State.STARTING, State.RESERVE, State.BUSY, State.LEAVING, State.STOPPED):
        for _ in range(PLACES):
            post.worker(state)
    assert post.duty.free_places(monotonic())
    rows = [post.worker(State.SERVING) for _ in range(PLACES)]
    assert not post.duty.free_places(monotonic())
    rows[0].set_state(State.BUSY)
    assert post.duty.free_places(monotonic())


def test_who_is_held_up_by_one_job_loses_its_place(post: Post) -> None:
    rows = [post.worker(State.SERVING) for _ in range(PLACES)]
    for row in rows:
        job(row, 0.0)
    assert not post.duty.free_places(monotonic())
    job(rows[0], 1.0)
    assert post.duty.free_places(monotonic())
    assert is_held_up(rows[0], monotonic())


def test_who_has_no_job_is_not_held_up_however_long_it_serves(post: Post) -> None:
    row = post.worker(State.SERVING)
    assert not is_held_up(row, monotonic() + 1000)


# The reserve.


def test_where_nobody_is_in_reserve_nobody_can_be_called(post: Post) -> None:
    post.worker(State.IDLE)
    assert not post.duty.call()
    reserve = Reserve(post, 1)
    assert post.duty.call()  # and the call in vain before has not been kept for it
    reserve.await_heard(True)


def test_a_call_is_for_one(post: Post) -> None:
    reserve = Reserve(post, 5)
    assert post.duty.call()
    reserve.await_heard(True)
    assert post.duty.call()
    assert post.duty.call()
    reserve.await_heard(True, True, True)
    post.duty.retire()
    reserve.join()
    reserve.await_heard(True, True, True, False, False)


def test_as_many_leave_as_are_dismissed(post: Post) -> None:
    reserve = Reserve(post, 5)
    post.duty.dismiss(2)
    reserve.await_heard(False, False)
    assert post.duty.call()
    reserve.await_heard(False, False, True)
    post.duty.retire()
    reserve.join()


def test_the_gong_is_for_all_and_for_those_who_come_late(post: Post) -> None:
    reserve = Reserve(post, 3)
    post.duty.retire()
    reserve.join()
    assert reserve.heard == [False] * 3
    assert not post.duty.wait_in_reserve()


def test_the_reserve_notices_the_end_of_the_master(post: Post) -> None:
    reserve = Reserve(post, 3)
    os.close(post.lifeline.held)
    reserve.join()
    assert reserve.heard == [False] * 3
    post.lifeline.held = os.open(os.devnull, os.O_RDONLY)


# On duty.


def heard_on_duty(post: Post) -> list[int]:
    return [fd for fd, _ in post.table.wait(0, 10)]


def test_a_dismissal_that_is_heard_on_duty_is_for_one(post: Post) -> None:
    assert heard_on_duty(post) == []
    post.duty.dismiss(1)
    (fd,) = heard_on_duty(post)
    assert post.duty.is_dismissal(fd)
    assert not post.duty.is_dismissal(fd)  # another one had heard it, too, and was slower
    assert heard_on_duty(post) == []


def test_the_gong_is_heard_on_duty_by_everybody(post: Post) -> None:
    post.duty.retire()
    for _ in range(3):
        (fd,) = heard_on_duty(post)
        assert fd == post.duty.gong
        assert post.duty.is_dismissal(fd)


def test_a_call_is_not_heard_on_duty(post: Post) -> None:
    post.worker(State.RESERVE)
    assert post.duty.call()
    assert heard_on_duty(post) == []


def test_what_is_no_dismissal_is_not_taken_for_one(post: Post) -> None:
    assert not post.duty.is_dismissal(post.lifeline.fd)


def test_generations_do_not_hear_each_other(post: Post) -> None:
    other = Duty(post.board, post.lifeline.fd)
    other.open_at(post.table)
    reserve = Reserve(post, 1)
    other.retire()
    other.dismiss(1)
    assert post.duty.call()
    reserve.await_heard(True)
    assert not any(post.duty.is_dismissal(fd) for fd in heard_on_duty(post))
    other.close_at(post.table)


def test_a_process_that_leaves_a_generation_takes_nothing_from_the_others(post: Post) -> None:
    pid = os.fork()
    if not pid:
        post.duty.leave()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    post.duty.dismiss(1)
    (fd,) = heard_on_duty(post)
    assert post.duty.is_dismissal(fd)
    reserve = Reserve(post, 1)
    assert post.duty.call()
    reserve.await_heard(True)


def test_the_next_program_goes_on_with_it(post: Post) -> None:
    state = post.duty.state()
    copies = map(os.dup, (state.reserve, state.calls, state.dismissals, state.gong))
    resumed = Duty.resume(post.board, DutyState(*copies))
    reserve = Reserve(post, 3)
    assert resumed.call()
    reserve.await_heard(True)
    resumed.dismiss(1)
    reserve.await_heard(True, False)
    resumed.retire()
    reserve.join()
    reserve.await_heard(True, False, False)
    resumed.close_at(post.table)


def test_it_leaves_no_descriptor() -> None:
    before = descriptors(os.getpid())
    Post().close()
    assert descriptors(os.getpid()) == before
