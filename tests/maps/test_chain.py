"""The type ``chain``."""

from __future__ import annotations

import pytest

from prefork_socketmap.maps import registry
from prefork_socketmap.maps.base import Map
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status


def build(**chain: object) -> dict[str, Map]:
    def static(**entries: str) -> dict[str, object]:
        return {"type": "static", "entries": {key.replace("_at_", "@"): value for key, value in entries.items()}}

    return registry.build(
        {
            "chain": {"type": "chain", "maps": ["a", "b"], **chain},
            "a": static(both="from a", only_a="a", _at_d="catch-all a"),
            "b": static(both="from b", only_b="b", user_at_d="user b"),
        }
    )


def test_the_first_map_that_finds_something_answers() -> None:
    chain = build()["chain"]
    assert chain.lookup("both") == Reply.ok("from a")
    assert chain.lookup("only_b") == Reply.ok("b")
    assert chain.lookup("none") == Reply.not_found()


def test_the_maps_fold_for_themselves() -> None:
    assert build()["chain"].lookup("ONLY_B") == Reply.ok("b")


def test_with_a_search_of_its_own_each_key_is_tried_in_all_maps_before_the_next() -> None:
    assert build(search="address")["chain"].lookup("user@d") == Reply.ok("user b")


def test_a_map_that_fails_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = build()
    monkeypatch.setattr(maps["a"], "lookup", lambda key: Reply.temp_fail(f"no {key}"))
    assert maps["chain"].lookup("only_b") == Reply.temp_fail("no only_b")


def test_an_empty_value_that_a_map_passes_on_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = build()
    monkeypatch.setattr(maps["a"], "lookup", lambda _key: Reply(Status.OK, ""))
    assert maps["chain"].lookup("only_b") == Reply(Status.OK, "")


def test_opening_the_chain_opens_its_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = build()
    opened: list[str] = []
    for name in "ab":
        monkeypatch.setattr(maps[name], "prepare", lambda name=name: opened.append(name))
    maps["chain"].open()
    maps["a"].open()
    assert opened == ["a", "b"]


def test_a_chain_of_a_map_that_is_not_there_is_an_error() -> None:
    with pytest.raises(SettingError, match=r"maps\.chain\.maps: there is no map 'c'"):
        build(maps=["a", "c"])


@pytest.mark.parametrize(
    "tables",
    [{"x": ["x"]}, {"x": ["y"], "y": ["x"]}, {"x": ["y"], "y": ["z"], "z": ["y"]}],
    ids=["itself", "each-other", "further-down"],
)
def test_a_chain_that_leads_back_to_itself_is_an_error(tables: dict[str, list[str]]) -> None:
    with pytest.raises(SettingError, match="leads back to itself"):
        registry.build({name: {"type": "chain", "maps": maps} for name, maps in tables.items()})


def test_a_map_may_be_in_several_chains() -> None:
    tables: dict[str, dict[str, object]] = {
        "s": {"type": "static", "entries": {"k": "v"}},
        "x": {"type": "chain", "maps": ["s", "y"]},
        "y": {"type": "chain", "maps": ["s"]},
    }
    assert registry.build(tables)["x"].lookup("k") == Reply.ok("v")
