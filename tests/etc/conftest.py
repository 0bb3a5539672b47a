"""Fixtures of the tests of etc/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.installation import Installation

ETC = Path(__file__).parent.parent.parent / "etc"


@pytest.fixture
def installation() -> Iterator[Installation]:
    """A directory with a config file, whose server is stopped in the end."""
    with Installation() as made:
        yield made


@pytest.fixture
def etc() -> Path:
    """The directory etc/."""
    return ETC
