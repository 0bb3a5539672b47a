"""Counters: how a time is counted, what can be said of many, and what is expected of the next."""

from __future__ import annotations

import pytest

from prefork_socketmap.prefork.counters import (
    BOUNDS,
    BUCKETS,
    COUNTERS_SIZE,
    OTHER,
    OWN,
    SERVER_COUNTERS,
    JobCounters,
    SlotCounters,
    Totals,
    label,
    server_counter,
)
from prefork_socketmap.prefork.scoreboard import SLOW


def counters() -> JobCounters:
    return JobCounters(0, memoryview(bytearray(COUNTERS_SIZE)), memoryview(bytearray(8)).cast("d"))


def totals(*times: float) -> Totals:
    """Return the totals of jobs that took so many seconds."""
    counted = counters()
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
    counted = counters()
    counted.count(0, seconds)
    assert [index for index, number in enumerate(counted.buckets) if number] == [bucket]
    upper = (*BOUNDS, float("inf"))
    assert (0.0, *BOUNDS)[bucket] <= seconds < upper[bucket]


def test_the_longest_job_has_room() -> None:
    counted = counters()
    counted.count(0, 1e15)
    assert counted.buckets[BUCKETS - 1] == 1
    assert counted.worst == 1e15


def test_endings_times_and_extras_do_not_mix() -> None:
    counted = counters()
    counted.extras[3] = 42
    counted.own[OWN - 1] = 43
    for ending in (0, 1, 1, 7):
        counted.count(ending, 0.5)
    assert list(counted.endings) == [1, 2, 0, 0, 0, 0, 0, 1]
    assert list(counted.extras) == [0, 0, 0, 42]
    assert list(counted.own) == [*[0] * (OWN - 1), 43]
    assert sum(counted.buckets) == 4
    assert (counted.seconds, counted.worst) == (2.0, 0.5)


def test_totals_add_up() -> None:
    found = totals(0.5, 1.5)
    other = counters()
    other.count(3, 4.0)
    found.add(other)
    assert found.endings == [2, 0, 0, 1, 0, 0, 0, 0]
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


# The pace.


def test_a_map_that_is_slow_is_known_for_it_after_few_jobs() -> None:
    counted = counters()
    jobs = 0
    while counted.pace[0] <= SLOW:
        counted.count(0, 0.005)
        jobs += 1
    assert jobs <= 2
    for _ in range(100):
        counted.count(0, 0.005)
        assert SLOW < counted.pace[0] <= 0.005


def test_one_job_that_the_machine_held_up_makes_no_map_slow() -> None:
    counted = counters()
    for _ in range(100):
        counted.count(0, 20e-6)
    counted.count(0, 0.003)
    assert counted.pace[0] < SLOW


def test_a_map_that_was_slow_is_forgiven_when_its_jobs_are_quick_again() -> None:
    counted = counters()
    counted.count(0, 10.0)
    jobs = 0
    while counted.pace[0] > SLOW:
        counted.count(0, 20e-6)
        jobs += 1
    assert 10 < jobs < 1000


def test_all_slots_share_the_pace_of_a_name_and_no_name_has_that_of_another() -> None:
    paces = memoryview(bytearray(24)).cast("d")
    labels = [label(OTHER), label("slow"), label("quick")]
    slots = [SlotCounters(labels, memoryview(bytearray(3 * COUNTERS_SIZE)), paces) for _ in range(2)]
    slots[0]["slow"].count(0, 1.0)
    assert slots[1]["slow"].pace[0] == slots[0]["slow"].pace[0] > SLOW
    assert slots[1]["quick"].pace[0] == slots[1][OTHER].pace[0] == 0.0


# The server's.


def test_each_counter_of_the_server_has_a_place_of_its_own() -> None:
    places = [server_counter(each.group, each.name) for each in SERVER_COUNTERS]
    assert places == list(range(len(SERVER_COUNTERS)))


def test_a_counter_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="is not in list"):
        server_counter("connections", "parked")
