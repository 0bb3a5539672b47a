"""Templates: parts of a key, and which keys lack one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork_socketmap.maps.template import Address, ResultFormat, Template, result_format, template
from prefork_socketmap.settings import SettingError


def expand(text: str, key: str) -> str | None:
    """Expand *text* as a query does; None when the lookup is suppressed."""
    found = Template(text)
    address = Address.split(key)
    return found.expand(address) if address.has(found.needs_of_key) else None


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("%s", "user@sub.example.com", "user@sub.example.com"),
        ("%S", "user@sub.example.com", "user@sub.example.com"),
        ("%u", "user@sub.example.com", "user"),
        ("%U at %D", "user@sub.example.com", "user at sub.example.com"),
        ("%d", "user@sub.example.com", "sub.example.com"),
        ("%1|%2|%3", "user@sub.example.com", "com|example|sub"),
        ("%%%s%%", "key", "%key%"),
        ("no part", "key", "no part"),
        # What has no "@" is all local part.
        ("%u", "name", "name"),
        ("%d", "name", None),
        ("%u@%d", "name", None),
        ("%1", "name", None),
        # Split at the last one.
        ("%u|%d", '"a@b"@c', '"a@b"|c'),
        ("%u", "@example.com", None),
        ("%d", "@example.com", "example.com"),
        ("%s", "@example.com", "@example.com"),
        ("%d", "user@", None),
        ("%u", "user@", "user"),
        ("%1", "user@", None),
        ("%3", "user@example.com", None),
        ("%2", "user@example.com", "example"),
        # A run of dots is one.
        ("%2", "user@example..com", "example"),
        ("%3", "user@.example..com.", None),
        ("%1", "user@...", None),
        ("%d", "user@[192.0.2.1]", "[192.0.2.1]"),
        ("%s", "", None),
        ("%u", "", None),
    ],
)
def test_parts_of_a_key_are_those_of_postfix(text: str, key: str, expected: str | None) -> None:
    assert expand(text, key) == expected


@pytest.mark.parametrize("text", ["%x", "%0", "%", "50 %", "%s %i", "%\n"])
def test_any_other_letter_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(SettingError, match=r"maps\.a\.query.*is no part of a key"):
        template("maps.a.query", text)


def test_a_template_is_a_string() -> None:
    with pytest.raises(SettingError, match="a string that is not empty"):
        template("maps.a.query", 1)


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("%s", "value", "value"),
        ("%u", "box@host.test", "box"),
        ("%d", "box@host.test", "host.test"),
        ("%u", "box", "box"),
        ("%d", "box", None),
        ("%u", "@host.test", None),
        ("%s", "@host.test", "@host.test"),
        # Capitals and digits speak of the key.
        ("/mail/%D/%U/%s", "box", "/mail/sub.example.com/user/box"),
        ("%S", "box", "user@sub.example.com"),
        ("%1.%2:%u", "box@host.test", "com.example:box"),
        ("smtp:[%s]%%", "host", "smtp:[host]%"),
    ],
)
def test_a_result_format_speaks_of_the_result_in_lower_case(text: str, value: str, expected: str | None) -> None:
    found = ResultFormat(text)
    address = Address.split(value)
    key = Address.split("user@sub.example.com")
    assert (found.expand_result(address, key) if address.has(found.needs_of_value) else None) == expected


def test_a_result_format_needs_of_the_key_what_capitals_and_digits_name() -> None:
    assert result_format("result_format", "%s %u %d").needs_of_key == frozenset()
    assert result_format("result_format", "%s %U %D %2").needs_of_key == {"u", "d", "2"}


@given(st.text())
def test_a_part_is_quoted_and_nothing_else(key: str) -> None:
    assert Template("<%s>%%").expand(Address.split(key), lambda part: part.replace(">", "]")) == (
        "<" + key.replace(">", "]") + ">%"
    )
