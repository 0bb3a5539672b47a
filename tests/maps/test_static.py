"""The type ``static``."""

from __future__ import annotations

from pathlib import Path

from prefork_socketmap.maps.static import StaticMap
from prefork_socketmap.socketmap.messages import Reply


def test_an_entry_is_a_string_or_a_list_of_strings() -> None:
    table = StaticMap("m", {"entries": {"one": "1", "two": ["1", "2"]}}, Path())
    assert table.lookup("one") == Reply.ok("1")
    assert table.lookup("two") == Reply.ok("1,2")
    assert table.lookup("three") == Reply.not_found()


def test_entries_are_folded_like_the_keys() -> None:
    assert StaticMap("m", {"entries": {"Key": "1"}}, Path()).lookup("kEY") == Reply.ok("1")
    exact = StaticMap("m", {"entries": {"Key": "1"}, "fold": False}, Path())
    assert exact.lookup("Key") == Reply.ok("1")
    assert exact.lookup("key") == Reply.not_found()
