"""Fixtures of the daemon's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.daemon.installation import Installation


@pytest.fixture
def installation() -> Iterator[Installation]:
    """A directory with a config file, whose server is stopped in the end."""
    with Installation() as made:
        yield made
