"""A complaint is made once per interval."""

from __future__ import annotations

import logging

import pytest

from prefork_socketmap.maps.ratelimit import RateLimitedLogger
from tests.maps.doubles import Clock


def test_one_message_passes_per_interval_and_the_next_tells_what_was_kept_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    complaints = RateLimitedLogger(logging.getLogger("test"), "map 100%: ", interval=60, clock=clock)
    for number in range(3):
        complaints.log(logging.WARNING, "number %d", number)
    clock.now += 60
    complaints.log(logging.ERROR, "number %d", 3)
    assert [record.getMessage() for record in caplog.records] == [
        "map 100%: number 0",
        "map 100%: number 3 (and 2 times something like it since the last such line)",
    ]
