"""Settings: what is accepted means the same everywhere, and what is refused is told with its key."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork_socketmap import settings
from prefork_socketmap.settings import SettingError

DAY = 86400
# What a TOML file can hold.
anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**400, max_value=10**401),
    st.floats(),
    st.text(),
    st.from_regex(r"[0-9]+[smhdw]?", fullmatch=True),
    st.lists(st.integers() | st.text(), max_size=3),
    st.dictionaries(st.text(), st.integers(), max_size=3),
)
readers: list[Callable[[str, object], object]] = [
    settings.seconds,
    settings.count,
    settings.boolean,
    settings.text,
    settings.texts,
    settings.table,
    lambda key, value: settings.choice(key, value, ["a", "b"]),
]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0.0),
        (10, 10.0),
        (0.5, 0.5),
        ("0", 0.0),
        ("10", 10.0),
        ("10s", 10.0),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("2d", 2.0 * DAY),
        ("1w", 7.0 * DAY),
        (2**31 - 1, 2.0**31 - 1),
    ],
)
def test_a_time_is_a_number_or_a_postfix_time_value(value: object, expected: float) -> None:
    read = settings.seconds("idle_timeout", value)
    assert read == expected
    assert isinstance(read, float)


@pytest.mark.parametrize(
    "value",
    [
        -1,
        -0.5,
        float("nan"),
        float("inf"),
        2**31,
        10**400,
        True,
        None,
        [],
        "",
        "m",
        "-5s",
        "1.5h",
        "5 m",
        " 5m",
        "5m ",
        "5m30s",
        "5 minutes",
        "5M",
        "\N{ARABIC-INDIC DIGIT FIVE}s",
        "9999999999w",
        "9" * 5000,
    ],
)
def test_what_is_no_time_is_refused(value: object) -> None:
    with pytest.raises(SettingError, match=r"^idle_timeout: .* is not accepted here; expected a number of seconds"):
        settings.seconds("idle_timeout", value)


@pytest.mark.parametrize(("minimum", "maximum", "value"), [(0, None, 0), (0, None, 10**30), (1, 5, 1), (1, 5, 5)])
def test_a_count_is_a_whole_number_within_its_bounds(minimum: int, maximum: int | None, value: int) -> None:
    assert settings.count("port", value, minimum, maximum) == value


@pytest.mark.parametrize("value", [0, 6, 2.0, "2", True, None])
def test_what_is_no_such_count_is_refused(value: object) -> None:
    with pytest.raises(SettingError, match=r"^port: .*; expected a whole number of at least 1 and at most 5$"):
        settings.count("port", value, 1, 5)


def test_a_count_without_a_maximum_names_none() -> None:
    with pytest.raises(SettingError, match=r"; expected a whole number of at least 0$"):
        settings.count("max_use", -1)


@pytest.mark.parametrize("value", [True, False])
def test_a_boolean_is_true_or_false(value: bool) -> None:
    assert settings.boolean("fold", value) is value


@pytest.mark.parametrize("value", [0, 1, "true", "", None])
def test_what_is_no_boolean_is_refused(value: object) -> None:
    with pytest.raises(SettingError, match=r"^fold: .*; expected true or false$"):
        settings.boolean("fold", value)


def test_a_text_is_a_string_that_is_not_empty() -> None:
    assert settings.text("query", "SELECT 1") == "SELECT 1"
    for value in ("", 1, None, ["a"]):
        with pytest.raises(SettingError, match=r"^query: .*; expected a string that is not empty$"):
            settings.text("query", value)


def test_texts_are_a_list_of_strings() -> None:
    assert settings.texts("hosts", ["a", "b"]) == ("a", "b")
    assert settings.texts("hosts", []) == ()
    for value in ("a", [1], ["a", ""], None, {"a": 1}):
        with pytest.raises(SettingError, match=r"^hosts: .*; expected a list of strings$"):
            settings.texts("hosts", value)


def test_a_choice_is_one_of_the_words() -> None:
    assert settings.choice("scope", "sub", ["sub", "base"]) == "sub"
    for value in ("SUB", "", 1, None, ["sub"]):
        with pytest.raises(SettingError, match=r'^scope: .*; expected one of "sub", "base"$'):
            settings.choice("scope", value, ["sub", "base"])


def test_a_table_is_a_table() -> None:
    assert settings.table("maps", {"a": 1}) == {"a": 1}
    for value in ([1], "a", None):
        with pytest.raises(SettingError, match=r"^maps: .*; expected a table$"):
            settings.table("maps", value)


def test_an_unknown_key_names_the_nearest_known_one() -> None:
    with pytest.raises(SettingError, match=r'^maps\.users\.qeury: unknown key; did you mean "query"\?$'):
        settings.reject_unknown("maps.users.", ["type", "qeury"], ["type", "query", "dbpath"])


def test_an_unknown_key_like_no_other_lists_the_known_ones() -> None:
    with pytest.raises(SettingError, match=r"^xyzzy: unknown key; known here: dbpath, query$"):
        settings.reject_unknown("", ["xyzzy"], ["query", "dbpath"])


def test_known_keys_are_not_rejected() -> None:
    settings.reject_unknown("", ["query"], ["query", "dbpath"])


def test_what_was_found_is_shown_as_it_is_written() -> None:
    with pytest.raises(SettingError, match=r"^port: '25' is not accepted here"):
        settings.count("port", "25")


@given(st.sampled_from(readers), anything)
def test_a_reader_raises_nothing_but_a_setting_error(read: Callable[[str, object], object], value: object) -> None:
    problem = None
    try:
        read("maps.users.key", value)
    except SettingError as error:
        problem = error
    assert problem is None or str(problem).startswith("maps.users.key: ")


def test_a_setting_error_without_a_key_is_its_problem() -> None:
    assert str(SettingError("", "no map is configured")) == "no map is configured"


def test_a_setting_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(SettingError("port", "taken")))
    assert (type(error), error.key, error.problem, str(error)) == (SettingError, "port", "taken", "port: taken")
