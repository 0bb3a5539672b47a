"""From configuration tables to maps."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from prefork_socketmap.maps import registry
from prefork_socketmap.maps.base import MissingLibraryError
from prefork_socketmap.maps.static import StaticMap
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status

STATIC: dict[str, object] = {"type": "static", "entries": {"a": "1"}}


def test_maps_are_built_by_their_type() -> None:
    maps = registry.build({"one": STATIC, "two": STATIC})
    assert list(maps) == ["one", "two"]
    assert maps["two"].lookup("a") == Reply.ok("1")


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({}, "maps.m.type: is missing"),
        ({"type": 1}, "maps.m.type: 1 is not accepted"),
        ({"type": "statik"}, "maps.m.type: 'statik' is not accepted here; expected one of cdb, chain, "),
        ({"type": "static"}, "maps.m.entries: is missing"),
        ({"type": "static", "entires": {}}, 'maps.m.entires: unknown key; did you mean "entries"?'),
        ({"type": "static", "entries": []}, "maps.m.entries: [] is not accepted here"),
        ({"type": "static", "entries": {}, "fold": 1}, "maps.m.fold: 1 is not accepted"),
        ({"type": "static", "entries": {}, "search": "adress"}, "maps.m.search: 'adress' is not accepted"),
        ({"type": "static", "entries": {}, "result_format": "%x"}, "maps.m.result_format: '%x' is no part"),
    ],
)
def test_a_wrong_table_is_an_error_that_names_the_key(table: dict[str, object], problem: str) -> None:
    with pytest.raises(SettingError) as error:
        registry.build({"m": table})
    assert str(error.value).startswith(problem)
    assert error.value.key == problem.partition(":")[0]


def test_an_unknown_type_is_told_all_known_ones() -> None:
    with pytest.raises(SettingError) as error:
        registry.build({"m": {"type": "sql"}})
    assert str(error.value).endswith("expected one of " + ", ".join(sorted(registry._BUILT_IN)))


@pytest.mark.parametrize("name", ["", "a b"])
def test_a_name_that_no_request_can_have_is_an_error(name: str) -> None:
    with pytest.raises(SettingError, match="a word without spaces"):
        registry.build({name: STATIC})


def test_a_type_is_imported_only_when_it_is_used() -> None:
    script = (
        "import sys; from prefork_socketmap.maps import registry;"
        "registry.build({'m': {'type': 'static', 'entries': {}}});"
        "unused = {'sqlite3', 'hashlib', 'prefork_socketmap.maps.file', 'prefork_socketmap.maps.cache'};"
        "print([name for name in unused if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def entry_point(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    point = importlib.metadata.EntryPoint("phonebook", value, registry.GROUP)
    found = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selected: found.select(**selected))


def test_another_package_can_add_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_point(monkeypatch, "prefork_socketmap.maps.static:StaticMap")
    assert isinstance(registry.build({"m": STATIC | {"type": "phonebook"}})["m"], StaticMap)


def test_an_added_type_is_known_in_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_point(monkeypatch, "prefork_socketmap.maps.static:StaticMap")
    with pytest.raises(SettingError, match="pcre, phonebook, pipemap"):
        registry.build({"m": {"type": "other"}})


def test_an_added_type_that_is_no_map_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_point(monkeypatch, "pathlib:Path")
    with pytest.raises(SettingError, match=r"maps\.m\.type: pathlib:Path is not a subclass of"):
        registry.build({"m": {"type": "phonebook"}})


def test_a_missing_library_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefork_socketmap.maps.sqlite", None)
    with pytest.raises(MissingLibraryError, match=r"maps\.m\.type.*install prefork-socketmap\[sqlite\]"):
        registry.build({"m": {"type": "sqlite"}})


def test_a_missing_library_leaves_the_other_maps_to_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefork_socketmap.maps.sqlite", None)
    told: list[MissingLibraryError] = []
    maps = registry.build({"bad": {"type": "sqlite"}, "good": STATIC}, on_missing=told.append)
    assert [error.key for error in told] == ["maps.bad.type"]
    assert maps["good"].lookup("a") == Reply.ok("1")
    reply = maps["bad"].lookup("a")
    assert reply.status is Status.PERM
    assert "install prefork-socketmap[sqlite]" in reply.text


def test_relative_paths_begin_at_the_base(tmp_path: Path) -> None:
    (tmp_path / "table").write_text("key value\n")
    table = {"type": "file", "path": "table", "index_dir": "index"}
    found = registry.build({"m": table}, base=tmp_path)["m"]
    found.open()
    assert found.lookup("key") == Reply.ok("value")
    found.close()
