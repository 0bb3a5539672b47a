"""Partial keys: the orders in which Postfix was seen to ask its own tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork_socketmap.maps.search import ORDERS, Candidate, Rules, bounded, propagate

RULES = Rules(recipient_delimiter="+-", local_domains=frozenset({"local.test", "[192.0.2.1]"}))


def tried(order: str, key: str) -> list[str]:
    return [candidate.key for candidate in ORDERS[order](key, RULES)]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("user@d.test", ["user@d.test", "@d.test"]),
        ("user+ext@d.test", ["user+ext@d.test", "user@d.test", "@d.test"]),
        ("user@local.test", ["user@local.test", "user", "@local.test"]),
        ("user+ext@LOCAL.test", ["user+ext@LOCAL.test", "user@LOCAL.test", "user+ext", "user", "@LOCAL.test"]),
        ("user@[192.0.2.1]", ["user@[192.0.2.1]", "user", "@[192.0.2.1]"]),
        # The first of several delimiters counts.
        ("user-a+b@d.test", ["user-a+b@d.test", "user@d.test", "@d.test"]),
        ("user+a-b@d.test", ["user+a-b@d.test", "user@d.test", "@d.test"]),
        ("user+@d.test", ["user+@d.test", "user@d.test", "@d.test"]),
        # No address is left without a local part.
        ("+ext@d.test", ["+ext@d.test", "@d.test"]),
        # Names of their own, whatever the delimiter.
        ("mailer-daemon@d.test", ["mailer-daemon@d.test", "@d.test"]),
        ("MAILER-DAEMON@d.test", ["MAILER-DAEMON@d.test", "@d.test"]),
        ("owner-list@d.test", ["owner-list@d.test", "@d.test"]),
        ("list-request@d.test", ["list-request@d.test", "@d.test"]),
        # Quoted, then not, at every step.
        (
            '"a b+ext"@local.test',
            [
                '"a b+ext"@local.test',
                "a b+ext@local.test",
                '"a b"@local.test',
                "a b@local.test",
                '"a b+ext"',
                "a b+ext",
                '"a b"',
                "a b",
                "@local.test",
            ],
        ),
        ("a b@d.test", ['"a b"@d.test', "a b@d.test", "@d.test"]),
        ('"simple"@d.test', ["simple@d.test", "@d.test"]),
        ('"a\\"b\\\\"@d.test', ['"a\\"b\\\\"@d.test', 'a"b\\@d.test', "@d.test"]),
        ('"a@b"@d.test', ['"a@b"@d.test', "a@b@d.test", "@d.test"]),
        (".dot@d.test", ['".dot"@d.test', ".dot@d.test", "@d.test"]),
        ("a..b@d.test", ['"a..b"@d.test', "a..b@d.test", "@d.test"]),
        ("dot.@d.test", ['"dot."@d.test', "dot.@d.test", "@d.test"]),
        ('""@d.test', ['""@d.test', "@d.test", "@d.test"]),
        ("üser+x@d.test", ["üser+x@d.test", "üser@d.test", "@d.test"]),
        # No address: a bare name or domain, or the null sender.
        ("name", ["name"]),
        ("d.test", ["d.test"]),
        ("<>", ['"<>"', "<>"]),
        ('"<>"', ['"<>"', "<>"]),
        ("", ['""', ""]),
    ],
)
def test_address_search_is_that_of_virtual(key: str, expected: list[str]) -> None:
    assert tried("address", key) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "user+ext@sub.example.com",
            ["user+ext@sub.example.com", "user@sub.example.com", "sub.example.com", ".example.com", ".com", "*"],
        ),
        ("user@[192.0.2.1]", ["user@[192.0.2.1]", "[192.0.2.1]", ".0.2.1]", ".2.1]", ".1]", "*"]),
        ('"a b"@d', ['"a b"@d', "a b@d", "d", "*"]),
        ("example.com", ["example.com", ".com", "*"]),
        ("*", ["*"]),
    ],
)
def test_transport_search_is_that_of_transport(key: str, expected: list[str]) -> None:
    assert tried("transport", key) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "user+ext@sub.example.com",
            [
                "user+ext@sub.example.com",
                "user@sub.example.com",
                "sub.example.com",
                "example.com",
                "com",
                "user+ext@",
                "user@",
            ],
        ),
        ('"a b"@d', ['"a b"@d', "a b@d", "d", '"a b"@', "a b@"]),
        ("user@[192.0.2.1]", ["user@[192.0.2.1]", "[192.0.2.1]", "0.2.1]", "2.1]", "1]", "user@"]),
        ("a.b.c", ["a.b.c", "b.c", "c"]),
        ("localhost.", ["localhost."]),
        ("unknown", ["unknown"]),
        ("<>", ["<>"]),
        ("192.0.2.77", ["192.0.2.77", "192.0.2", "192.0", "192"]),
        ("2001:db8::1", ["2001:db8::1", "2001:db8:", "2001:db8", "2001"]),
        ("[192.0.2.5]", ["[192.0.2.5]", "0.2.5]", "2.5]", "5]"]),
        ("[ipv6:2001:db8::1]", ["[ipv6:2001:db8::1]"]),
    ],
)
def test_access_search_is_that_of_access(key: str, expected: list[str]) -> None:
    assert tried("access", key) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("sub.example.com", ["sub.example.com", "example.com", "com"]),
        (".example.com", [".example.com", "com"]),
        ("com", ["com"]),
    ],
)
def test_domain_search_goes_up_to_the_parents(key: str, expected: list[str]) -> None:
    assert tried("domain", key) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("192.0.2.77", ["192.0.2.77", "192.0.2", "192.0", "192"]),
        ("2001:db8::1", ["2001:db8::1", "2001:db8:", "2001:db8", "2001"]),
        ("a.example.com", ["a.example.com"]),
        ("192.0.2", ["192.0.2"]),
    ],
)
def test_network_search_shortens_addresses(key: str, expected: list[str]) -> None:
    assert tried("network", key) == expected


@given(st.text())
def test_exact_search_tries_the_key_alone(key: str) -> None:
    assert list(ORDERS["exact"](key, RULES)) == [Candidate(key)]


@given(st.sampled_from(sorted(ORDERS)), st.text(alphabet='ab.@+-"\\ []:*1'))
def test_any_key_can_be_searched(order: str, key: str) -> None:
    assert tried(order, key) or not key


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize("key", ["." * 98_000, "a." * 4000, ":" * 9000, "a:" * 4000, "u@" + "a." * 4000, "+-" * 4000])
def test_no_key_has_more_candidates_than_an_address_or_a_host_name(order: str, key: str) -> None:
    # 127 parents of a name, the whole, "*", and eight forms of the local part.
    assert len(tried(order, key)) <= 127 + 10


def test_of_a_name_that_no_host_can_have_the_parents_are_those_that_one_can_have() -> None:
    key = "x." * 500 + "example.com"
    assert tried("domain", key)[0] == key
    assert tried("domain", key)[-2:] == ["example.com", "com"]
    assert [name.count(".") + 1 for name in tried("domain", key)[1:]] == list(range(127, 0, -1))


def test_the_longest_name_of_a_host_is_searched_up_to_the_top() -> None:
    key = ".".join("a" * 127)
    assert len(tried("domain", key)) == 127


def test_the_longest_address_of_a_network_is_shortened_up_to_the_top() -> None:
    assert tried("network", "1:2:3:4:5:6:7::")[-1] == "1"


@pytest.mark.parametrize(
    ("key", "is_tried"), [("a" * 10, True), ("a" * 11, False), ("é" * 5, True), ("é" * 6, False)]
)
def test_a_bounded_order_tries_nothing_for_a_key_of_more_bytes(key: str, is_tried: bool) -> None:
    assert list(bounded(ORDERS["domain"], 10)(key, RULES)) == [Candidate(key)] * is_tried


def test_without_a_delimiter_there_are_no_extensions() -> None:
    assert [candidate.key for candidate in ORDERS["address"]("a+b@d", Rules())] == ["a+b@d", "@d"]


def test_a_candidate_tells_the_extension_that_it_lacks() -> None:
    found = list(ORDERS["address"]("user+ext@local.test", RULES))
    assert [candidate.extension for candidate in found] == ["", "+ext", "", "+ext", ""]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("box@x.test", "box+ext@x.test"),
        ("box", "box+ext"),
        ("a@x.test, b@y.test,c", "a+ext@x.test, b+ext@y.test,c+ext"),
        ('"a b"@x.test', '"a b+ext"@x.test'),
        ('"a,b@c"@x.test, d@x.test', '"a,b@c+ext"@x.test, d+ext@x.test'),
        # Postfix itself puts the local part in front, with the extension.
        ("@x.test", "@x.test"),
    ],
)
def test_an_extension_is_added_to_every_address(result: str, expected: str) -> None:
    assert propagate("+ext", result) == expected
