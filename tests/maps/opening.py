"""Maps for tests: built as the config file's are, opened, and closed after the test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefork_socketmap.maps import filestate, registry, watched
from prefork_socketmap.maps.base import Map

OpenMap = Callable[..., Map]


@pytest.fixture
def open_map(tmp_path: Path) -> Iterator[OpenMap]:
    """Return a maker of open maps with the name "m" from a type and its settings; files begin at ``tmp_path``."""
    with contextlib.ExitStack() as stack:

        def make(kind: str, **table: object) -> Map:
            found = registry.build({"m": {"type": kind, **table}}, tmp_path)["m"]
            found.open()
            stack.callback(found.close)
            return found

        yield make


@pytest.fixture
def eager_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let readers wait less for a file that is being written, and until they try again."""
    monkeypatch.setattr(filestate, "_QUIET", 0.05)
    monkeypatch.setattr(watched, "_PAUSE", 0.2)
