"""What every map type does around its own find()."""

from __future__ import annotations

import logging

import pytest

from prefork_socketmap.maps.base import LookupFailedError
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply
from tests.maps.doubles import DictMap

NOT_FOUND = Reply.not_found()


def test_what_is_found_is_ok_and_the_rest_not_found() -> None:
    table = DictMap({"key": ["value"], "none": []})
    assert table.lookup("key") == Reply.ok("value")
    assert table.lookup("other") == NOT_FOUND
    assert table.lookup("none") == NOT_FOUND


def test_several_values_are_joined_with_commas() -> None:
    assert DictMap({"key": ["a", "b"]}).lookup("key") == Reply.ok("a,b")


@pytest.mark.parametrize(
    ("asked", "folded"), [("USER@Example.COM", "user@example.com"), ("ÜML@straße.test", "üml@strasse.test")]
)
def test_keys_are_folded(asked: str, folded: str) -> None:
    assert DictMap({folded: ["x"]}).lookup(asked) == Reply.ok("x")


def test_folding_can_be_turned_off() -> None:
    table = DictMap({"Key": ["x"]}, fold=False)
    assert table.lookup("Key") == Reply.ok("x")
    assert table.lookup("key") == NOT_FOUND


@pytest.mark.parametrize("key", ["", "\udcff", "a\0b"])
def test_a_key_that_is_no_text_is_not_found_without_asking(key: str) -> None:
    table = DictMap({key: ["x"]})
    assert table.lookup(key) == NOT_FOUND
    assert table.asked == []


def test_a_type_may_ask_for_any_key() -> None:
    class AnyKeyMap(DictMap):
        takes_any_key = True

    assert AnyKeyMap({"\udcff": ["x"], "": ["y"]}).lookup("\udcff") == Reply.ok("x")
    assert AnyKeyMap({"\udcff": ["x"], "": ["y"]}).lookup("") == Reply.ok("y")


@pytest.mark.parametrize("search", ["address", "transport", "access", "domain", "network"])
def test_a_key_longer_than_postfix_sends_is_not_found_and_no_part_of_it_is_asked(search: str) -> None:
    table = DictMap({"com": ["x"], "*": ["x"]}, search=search)
    assert table.lookup("." * 98_000) == NOT_FOUND
    assert table.lookup("a." * 5000 + "com") == NOT_FOUND
    assert table.asked == []


def test_how_long_a_key_can_be_is_configurable() -> None:
    values = {"com": ["x"]}
    assert DictMap(values, search="domain", max_key_size=10).lookup("a.test.com") == Reply.ok("x")
    assert DictMap(values, search="domain", max_key_size=10).lookup("a.test2.com") == NOT_FOUND
    assert DictMap(values, search="domain", max_key_size=0).lookup("a." * 5000 + "com") == Reply.ok("x")


def test_a_key_that_is_looked_up_as_it_is_may_be_of_any_length() -> None:
    key = "x" * 98_000
    assert DictMap({key: ["x"]}, max_key_size=10).lookup(key) == Reply.ok("x")


def test_a_long_key_is_asked_where_it_is_the_only_one() -> None:
    assert DictMap({"a" * 20_000: ["x"]}).lookup("a" * 20_000) == Reply.ok("x")


@pytest.mark.parametrize("empty", ["", " ", "\t\n"])
def test_an_empty_value_is_not_found_and_a_warning(empty: str, caplog: pytest.LogCaptureFixture) -> None:
    assert DictMap({"key": [empty]}).lookup("key") == NOT_FOUND
    assert "map test: 'key' has an empty value" in caplog.text


def test_an_empty_value_among_others_is_dropped() -> None:
    assert DictMap({"key": ["a", "", "b"]}).lookup("key") == Reply.ok("a,b")


def test_a_warning_does_not_repeat_at_every_lookup(caplog: pytest.LogCaptureFixture) -> None:
    table = DictMap({"key": [""]})
    for _ in range(1000):
        table.lookup("key")
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("result_format", "values", "expected"),
    [
        ("smtp:[%s]", ["host"], "smtp:[host]"),
        ("%u=%d", ["a@b", "c", "@d", "e@f"], "a=b,e=f"),
        ("%U@%s", ["x", "y"], "user@x,user@y"),
    ],
)
def test_every_value_goes_through_the_result_format(result_format: str, values: list[str], expected: str) -> None:
    table = DictMap({"user@example.com": values}, result_format=result_format)
    assert table.lookup("User@example.com") == Reply.ok(expected)


def test_when_the_result_format_drops_every_value_the_key_is_not_found() -> None:
    assert DictMap({"key": ["a", "b"]}, result_format="%d").lookup("key") == NOT_FOUND


def test_a_result_format_that_speaks_of_the_key_suppresses_keys_that_lack_the_part() -> None:
    table = DictMap({"name": ["x"], "u@d": ["y"]}, result_format="%s %D")
    assert table.lookup("name") == NOT_FOUND
    assert table.lookup("u@d") == Reply.ok("y d")
    assert table.asked == ["u@d"]


def test_the_expansion_limit_counts_the_values_that_are_kept() -> None:
    table = DictMap({"a": ["1@x", "2", "3@x"], "b": ["1@x", "2@x", "3@x"]}, result_format="%d", expansion_limit=2)
    assert table.lookup("a") == Reply.ok("x,x")
    assert table.lookup("b") == Reply.temp_fail("map test: 3 results where expansion_limit = 2")


@pytest.mark.parametrize(
    ("key", "is_asked"),
    [
        ("user@served.test", True),
        ("user@SERVED.test", True),
        ("@served.test", False),
        ("user@sub.served.test", False),
        ("user@other.test", False),
        ("user@", False),
        ("user", False),
        ("served.test", False),
    ],
)
def test_with_a_domain_list_only_its_users_are_looked_up(key: str, is_asked: bool) -> None:
    table = DictMap({}, domain=["Served.test"], fold=False)
    table.lookup(key)
    assert table.asked == ([key] if is_asked else [])


def test_the_keys_of_the_search_are_tried_until_one_is_found() -> None:
    table = DictMap({"user@d.test": ["x"]}, search="address", recipient_delimiter="+")
    assert table.lookup("User+Ext@D.test") == Reply.ok("x")
    assert table.asked == ["user+ext@d.test", "user@d.test"]


def test_a_catch_all_answers_for_its_domain() -> None:
    table = DictMap({"@d.test": ["all"]}, search="address")
    assert table.lookup("anyone@d.test") == Reply.ok("all")
    assert table.lookup("anyone@other.test") == NOT_FOUND


def test_local_domains_are_searched_without_the_domain() -> None:
    table = DictMap({"user": ["x"]}, search="address", local_domains=["Local.test"])
    assert table.lookup("user@local.TEST") == Reply.ok("x")


def test_an_unmatched_extension_is_propagated_to_every_address() -> None:
    table = DictMap(
        {"user@d.test": ["a@x.test", "b"], "@d.test": ["c"]},
        search="address",
        recipient_delimiter="+-",
        propagate_extension=True,
        cache_ttl=100,
    )
    assert table.lookup("user-ext@d.test") == Reply.ok("a-ext@x.test,b-ext")
    # In the case in which it was asked.
    assert table.lookup("User-Ext@d.test") == Reply.ok("a-Ext@x.test,b-Ext")
    # A catch-all has none of the address, and Postfix adds nothing to it either.
    assert table.lookup("other+ext@d.test") == Reply.ok("c")


@pytest.mark.parametrize("key", ["propagate_extension", "local_domains"])
def test_settings_of_the_address_search_without_it_are_an_error(key: str) -> None:
    value: dict[str, object] = {"propagate_extension": True, "local_domains": ["d.test"]}
    with pytest.raises(SettingError, match=rf'maps\.test\.{key}: goes with search = "address" only'):
        DictMap({}, **{key: value[key]})


def test_a_foreseen_failure_becomes_its_reply() -> None:
    table = DictMap({})
    table.error = LookupFailedError(Reply.temp_fail("no"))
    assert table.lookup("key") == Reply.temp_fail("no")


def test_any_other_failure_is_left_to_the_caller() -> None:
    table = DictMap({})
    table.error = KeyError("bug")
    with pytest.raises(KeyError):
        table.lookup("key")


def test_a_failure_ends_the_search() -> None:
    table = DictMap({"@d.test": ["all"]}, search="address")
    table.error = LookupFailedError(Reply.temp_fail("no"))
    assert table.lookup("user@d.test") == Reply.temp_fail("no")
    assert table.asked == ["user@d.test"]


def test_the_debug_log_tells_every_key_that_was_tried(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    table = DictMap({"@d.test": ["all"]}, search="address", domain=["d.test"])
    table.open()
    table.lookup("user@d.test")
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "map test: 'user@d.test': not found",
        "map test: '@d.test' is not looked up: it is no text",
    ]


def test_a_map_is_opened_once_and_can_be_opened_again_when_closed() -> None:
    class CountedMap(DictMap):
        opened = released = 0

        def prepare(self) -> None:
            self.opened += 1

        def release(self) -> None:
            self.released += 1

    table = CountedMap({})
    table.open()
    table.open()
    assert table.opened == 1
    table.close()
    table.close()
    assert table.released == 1
    table.open()
    assert table.opened == 2
