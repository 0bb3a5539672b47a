"""How a map type declares its keys."""

from __future__ import annotations

import pytest

from prefork_socketmap import settings
from prefork_socketmap.maps.setting import read_table, setting
from prefork_socketmap.settings import SettingError


class Base:
    size = setting(settings.count, 3)
    name = setting(settings.text)


class Derived(Base):
    size = setting(settings.count, 5)
    color = setting(settings.text, None)


class Fixed(Base):
    name = "fixed"


def test_values_come_from_the_table_or_the_default() -> None:
    assert read_table(Base, "maps.a.", {"name": "x"}) == {"name": "x", "size": 3}
    assert read_table(Derived, "maps.a.", {"name": "x", "color": "red"}) == {"name": "x", "size": 5, "color": "red"}


def test_a_class_may_fix_what_its_base_lets_one_set() -> None:
    with pytest.raises(SettingError, match=r"maps\.a\.name: unknown key"):
        read_table(Fixed, "maps.a.", {"name": "x"})


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({}, "maps.a.name: is missing"),
        ({"name": ""}, "maps.a.name: '' is not accepted here; expected a string that is not empty"),
        ({"name": "x", "sise": 1}, 'maps.a.sise: unknown key; did you mean "size"?'),
        ({"name": "x", "qqq": 1}, "maps.a.qqq: unknown key; known here: name, size"),
    ],
)
def test_what_is_wrong_is_told_with_its_key(table: dict[str, object], problem: str) -> None:
    with pytest.raises(SettingError) as error:
        read_table(Base, "maps.a.", table)
    assert str(error.value) == problem
