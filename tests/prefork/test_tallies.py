"""Tallies: how a time is counted, and what can be said of many."""

from __future__ import annotations

import pytest

from prefork_socketmap.prefork.tallies import BOUNDS, BUCKETS, TALLY_SIZE, Tally, Totals


def tally() -> Tally:
    return Tally(0, memoryview(bytearray(TALLY_SIZE)))


def totals(*times: float) -> Totals:
    """Return the totals of jobs that took so many seconds."""
    counted = tally()
    for seconds in times:
        counted.count(0, seconds)
    found = Totals()
    found.add(counted)
    return found


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (0.9e-6, 0), (1.1e-6, 1), (1.9e-6, 1), (2.1e-6, 2), (0.001, 10), (1.0, 20), (67.0, 26), (68.0, 27)],
)
def test_a_time_falls_between_the_bounds_of_its_bucket(seconds: float, bucket: int) -> None:
    counted = tally()
    counted.count(0, seconds)
    assert [index for index, number in enumerate(counted.buckets) if number] == [bucket]
    upper = (*BOUNDS, float("inf"))
    assert (0.0, *BOUNDS)[bucket] <= seconds < upper[bucket]


def test_the_longest_job_has_room() -> None:
    counted = tally()
    counted.count(0, 1e15)
    assert counted.buckets[BUCKETS - 1] == 1
    assert counted.worst == 1e15


def test_columns_times_and_extras_do_not_mix() -> None:
    counted = tally()
    counted.extras[3] = 42
    for column in (0, 1, 1, 7):
        counted.count(column, 0.5)
    assert list(counted.columns) == [1, 2, 0, 0, 0, 0, 0, 1]
    assert list(counted.extras) == [0, 0, 0, 42]
    assert (counted.seconds, counted.worst) == (2.0, 0.5)


def test_totals_add_up() -> None:
    found = totals(0.5, 1.5)
    other = tally()
    other.count(3, 4.0)
    found.add(other)
    assert found.columns == [2, 0, 0, 1, 0, 0, 0, 0]
    assert (found.jobs, found.seconds, found.worst, found.mean) == (3, 6.0, 4.0, 2.0)


def test_of_nothing_there_is_no_mean_and_no_quantile() -> None:
    assert (Totals().mean, Totals().quantile(0.5)) == (None, None)


def test_a_quantile_lies_in_the_bucket_of_the_job_that_it_is_about() -> None:
    found = totals(*[100e-6] * 98, 0.010, 1.0)
    median, ninetieth, last = found.quantile(0.5), found.quantile(0.9), found.quantile(0.99)
    assert median is not None
    assert ninetieth is not None
    assert last is not None
    assert 64e-6 < median < ninetieth <= 128e-6
    assert 0.008 < last <= 0.017
    assert found.quantile(1.0) == 1.0


def test_no_quantile_is_above_the_worst_time() -> None:
    assert totals(70e-6).quantile(0.99) == 70e-6
    assert totals(100.0, 200.0).quantile(1.0) == 200.0
