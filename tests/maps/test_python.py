"""The type ``python``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefork_socketmap.maps.python import PythonMap
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status

SOURCE = """
from prefork_socketmap.socketmap.messages import Reply

calls = []

def setup():
    calls.append("setup")

def broken():
    raise RuntimeError("no database")

def answer(key):
    calls.append(key)
    return eval(key)

class Holder:
    @staticmethod
    def method(key):
        return "method"

constant = 1
"""
Make = Callable[..., PythonMap]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Return a maker of maps whose functions are in a module of their own."""
    (tmp_path / "user_code.py").write_text(SOURCE)
    path = list(sys.path)

    def make(function: str = "user_code:answer", **table: object) -> PythonMap:
        return PythonMap("m", {"function": function, "path": ["."], **table}, tmp_path)

    yield make
    sys.path[:] = path
    sys.modules.pop("user_code", None)


@pytest.mark.parametrize(
    ("key", "reply"),
    [
        ("'value'", Reply.ok("value")),
        ("None", Reply.not_found()),
        ("Reply.ok('value')", Reply.ok("value")),
        ("Reply.not_found()", Reply.not_found()),
        ("Reply.temp_fail('x')", Reply.temp_fail("x")),
        ("Reply.perm_fail('x')", Reply.perm_fail("x")),
        ("Reply.timeout('x')", Reply.timeout("x")),
    ],
)
def test_a_function_returns_a_reply_a_string_or_none(make: Make, key: str, reply: Reply) -> None:
    table = make()
    table.open()
    assert table.lookup(key) == reply


@pytest.mark.parametrize("empty", ["", " ", "\t\n"])
def test_an_empty_value_is_passed_on_as_the_mistake_that_it_is(make: Make, empty: str) -> None:
    table = make()
    table.open()
    assert table.lookup(repr(empty)) == Reply(Status.OK, empty)


def test_anything_else_that_a_function_returns_is_an_error(make: Make) -> None:
    table = make()
    table.open()
    with pytest.raises(TypeError, match="return a Reply, a str or None"):
        table.lookup("42")


def test_what_a_function_raises_goes_to_the_caller(make: Make) -> None:
    table = make()
    table.open()
    with pytest.raises(ZeroDivisionError):
        table.lookup("1/0")


def test_the_function_gets_the_key_as_it_came(make: Make) -> None:
    table = make()
    table.open()
    assert table.lookup("'Value'") == Reply.ok("Value")
    with pytest.raises(UnicodeEncodeError):
        # eval() does not take bytes that are not UTF-8, but they came so far.
        table.lookup("'\udcff'")
    assert sys.modules["user_code"].calls[-1] == "'\udcff'"


def test_a_key_is_folded_when_the_configuration_says_so(make: Make) -> None:
    table = make(fold=True)
    table.open()
    assert table.lookup("'VALUE'") == Reply.ok("value")


def test_setup_runs_when_the_map_is_opened_and_before_any_lookup(make: Make) -> None:
    table = make(setup="user_code:setup")
    assert "user_code" not in sys.modules
    table.open()
    table.lookup("'x'")
    assert sys.modules["user_code"].calls == ["setup", "'x'"]


def test_what_setup_raises_keeps_the_map_from_opening(make: Make) -> None:
    with pytest.raises(
        SettingError, match=r"maps\.m\.setup: .* RuntimeError: no database \(.*, line \d+\)$"
    ) as caught:
        make(setup="user_code:broken").open()
    assert caught.value.may_pass  # there may be a database later


def test_a_name_may_have_dots(make: Make) -> None:
    table = make("user_code:Holder.method")
    table.open()
    assert table.lookup("x") == Reply.ok("method")


@pytest.mark.parametrize("reference", ["user_code", "user_code:", ":answer", "user code:answer", "user_code:a()"])
def test_a_reference_has_a_module_and_a_name(make: Make, reference: str) -> None:
    with pytest.raises(SettingError, match=r'maps\.m\.function: .* expected "module:name"'):
        make(reference)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("no_such_module:f", "cannot load 'no_such_module:f': No module named"),
        ("user_code:missing", "cannot load 'user_code:missing': module 'user_code' has no attribute"),
        ("user_code:constant", "user_code:constant is not a function"),
    ],
)
def test_a_function_that_is_not_there_is_an_error_at_open(make: Make, reference: str, problem: str) -> None:
    with pytest.raises(SettingError) as error:
        make(reference).open()
    assert str(error.value).startswith(f"maps.m.function: {problem}")


def test_a_directory_is_added_to_the_path_once(make: Make) -> None:
    before = len(sys.path)
    make().open()
    make().open()
    assert len(sys.path) == before + 1
