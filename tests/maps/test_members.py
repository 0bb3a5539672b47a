"""The types that are made of other maps, ``unionmap`` and ``pipemap``, and ``randmap``. For ``chain`` see its own."""

from __future__ import annotations

import pytest

from prefork_socketmap.maps import registry
from prefork_socketmap.maps.base import Map
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply


def build(kind: str, maps: list[str]) -> dict[str, Map]:
    return registry.build(
        {
            "m": {"type": kind, "maps": maps},
            "a": {"type": "static", "entries": {"key": "one", "list": ["x", "y"], "only": "a"}},
            "b": {"type": "static", "entries": {"key": "two", "one": "three", "x,y": "z"}},
        }
    )


def test_a_union_has_what_all_maps_find_in_their_order() -> None:
    table = build("unionmap", ["a", "b"])["m"]
    assert table.lookup("key") == Reply.ok("one,two")
    assert table.lookup("ONLY") == Reply.ok("a")
    assert table.lookup("list") == Reply.ok("x,y")
    assert table.lookup("none") == Reply.not_found()


def test_a_pipe_looks_up_what_was_found() -> None:
    table = build("pipemap", ["a", "b"])["m"]
    assert table.lookup("KEY") == Reply.ok("three")
    assert table.lookup("list") == Reply.ok("z")
    assert table.lookup("only") == Reply.not_found()
    assert table.lookup("none") == Reply.not_found()


@pytest.mark.parametrize("kind", ["unionmap", "pipemap"])
def test_a_map_that_fails_ends_the_lookup(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    maps = build(kind, ["a", "b"])
    monkeypatch.setattr(maps["b"], "lookup", lambda key: Reply.temp_fail(f"no {key}"))
    assert maps["m"].lookup("key").text.startswith("no ")


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"type": "unionmap", "maps": ["other"]}, r"maps\.m\.maps: there is no map 'other'"),
        ({"type": "pipemap", "maps": ["m"]}, r"maps\.m\.maps: 'm' leads back to itself"),
        ({"type": "pipemap", "maps": []}, r"maps\.m\.maps: \[\] is not accepted here; expected a list of at least"),
        ({"type": "randmap", "results": []}, r"maps\.m\.results: \[\] is not accepted here; expected a list of"),
        ({"type": "randmap"}, r"maps\.m\.results: is missing"),
    ],
)
def test_a_wrong_setting_is_named(table: dict[str, object], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        registry.build({"m": table})


def test_circles_are_found_through_maps_of_all_these_types() -> None:
    tables = {
        "m": {"type": "chain", "maps": ["u"]},
        "u": {"type": "unionmap", "maps": ["p"]},
        "p": {"type": "pipemap", "maps": ["m"]},
    }
    with pytest.raises(SettingError, match="leads back to itself"):
        registry.build(tables)


def test_a_random_map_gives_all_its_values_to_any_key() -> None:
    table = registry.build({"m": {"type": "randmap", "results": ["a", "b", "c"]}})["m"]
    assert {table.lookup(f"key {number}").text for number in range(200)} == {"a", "b", "c"}
