"""The process policy: who counts as a spare worker, so that neither too few are ready nor too many are started."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest

from prefork_socketmap import Config
from prefork_socketmap.prefork.connection import Job
from prefork_socketmap.prefork.policy import ProcessPolicy
from prefork_socketmap.prefork.scoreboard import Row, Scoreboard, State

SPARE = 3


class Workers:
    """As many idle workers as shall be spare, and a policy that counts how many it wants beside them."""

    def __init__(self) -> None:
        self.board = Scoreboard()
        self.rows = [self.board.claim(1) for _ in range(SPARE)]
        for row in self.rows:
            row.set_state(State.IDLE)
        self.children = {row.slot: SimpleNamespace(row=row) for row in self.rows}
        self.started = 0
        pool: Any = self
        table: Any = None
        generation: Any = SimpleNamespace(plan=SimpleNamespace(limits=Config(min_spare=SPARE)))
        self._policy = ProcessPolicy(self.board, pool, table)
        self._policy.generation = generation

    def of(self, _generation: object) -> list[object]:
        return list(self.children.values())

    def fork(self, _generation: object, number: int) -> None:
        self.started += number

    def missing(self) -> int:
        """Return how many the policy starts now."""
        self.started = 0
        self._policy.replenish(monotonic())
        return self.started


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.board.close()


def begin_job(row: Row, seconds_ago: float) -> None:
    name, started = row.job_cells()
    name[0] = 1
    started[0] = monotonic() - seconds_ago


def test_enough_idle_workers_are_enough(workers: Workers) -> None:
    assert workers.missing() == 0


def test_a_quick_lookup_is_no_reason_for_another_worker(workers: Workers) -> None:
    workers.rows[0].set_state(State.SERVING)
    begin_job(workers.rows[0], 0.0001)
    assert workers.missing() == 0


def test_a_lookup_that_turns_out_long_is(workers: Workers) -> None:
    workers.rows[0].set_state(State.SERVING)
    begin_job(workers.rows[0], 1.0)
    assert workers.missing() == 1


def test_a_lookup_that_is_expected_to_take_long_is_one_from_its_first_moment(workers: Workers) -> None:
    row = workers.rows[0]
    counters = workers.board.open_counters(row.slot, workers.board.labels())["slow"]
    counters.pace[0] = 1.0
    seen = []

    def before_long() -> None:
        row.set_state(State.BUSY)
        seen.append(workers.missing())

    Job(row.job_cells(), 100, before_long).begin(counters)
    assert seen == [1]


def test_who_looks_whether_it_may_stay_on_duty_is_not_missed(workers: Workers) -> None:
    """It says BUSY for a moment every hundred turns. When the master looked just then it started a worker."""
    workers.rows[0].set_state(State.BUSY)
    assert workers.missing() == 0
