"""Addresses of the Sender Rewriting Scheme: made, undone, and refused when anything about them is wrong."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefork_socketmap.maps import srsaddress
from prefork_socketmap.maps.srsaddress import Flaw, FlawedAddressError, Scheme, join, split

SECRETS = [b"secret1", b"secret2"]
TODAY = 20782  # 2026-11-25
DAY = "JO"
SCHEME = Scheme()

atext = st.text(st.sampled_from("abcXYZ019!#$%&'*+/=?^_`{|}~-üß漢"), min_size=1, max_size=20)
dot_strings = st.lists(atext, min_size=1, max_size=3).map(".".join)
contents = dot_strings | st.text(
    st.characters(min_codepoint=32, exclude_characters="\x7f", exclude_categories=["Cs"])
)
labels = st.text(st.sampled_from("abcXYZ019-ü"), min_size=1, max_size=10)
domains = st.lists(labels, min_size=1, max_size=4).map(".".join) | st.sampled_from(
    ["[192.0.2.1]", "[IPv6:2001:db8::1]", "example.org."]
)


def flaw_of(local: str, scheme: Scheme = SCHEME, today: int = TODAY) -> Flaw:
    with pytest.raises(FlawedAddressError) as caught:
        scheme.undo(local, SECRETS, today)
    return caught.value.flaw


@given(contents.filter(bool), domains, st.sampled_from(srsaddress.SEPARATORS), st.integers(4, 27), st.integers(0, 1))
@example("SRS2=a=b=c=d", "example.org", "=", 4, 0)
@example('a"b\\c@d', "example.org", "=", 4, 1)
@example("=", "example.org", "=", 4, 1)
def test_an_address_is_undone_to_what_it_was_made_of(
    local: str, domain: str, separator: str, length: int, secret: int
) -> None:
    if srsaddress.is_srs(local):
        return
    scheme = Scheme(separator, length, length)
    new = scheme.rewrite(local, domain, SECRETS[secret], TODAY)
    original = scheme.undo(new, SECRETS, TODAY)
    assert (original.local, original.domain, original.secret, original.age) == (local, domain, secret, 0)
    # And by way of what stands in a lookup and its answer.
    address = join(new, "fwd.example")
    assert split(address) == (new, "fwd.example")
    assert split(join(local, domain)) == (local, domain)


@given(contents.filter(bool), domains, st.integers(0, 5))
def test_the_address_of_any_chain_of_forwarders_comes_back_to_the_first_one_in_two_steps(
    local: str, domain: str, more: int
) -> None:
    if srsaddress.is_srs(local):
        return
    first = SCHEME.rewrite(local, domain, b"of the first", TODAY)
    last = SCHEME.rewrite(first, "first.example", SECRETS[0], TODAY)
    length = len(last)
    for number in range(more):
        last = SCHEME.rewrite(last, f"forwarder{number}.example", SECRETS[0], TODAY)
    assert len(last) == length
    back = SCHEME.undo(last, SECRETS, TODAY)
    assert (back.local, back.domain, back.age) == (first, "first.example", None)


@given(st.text())
@example("SRS0=")
@example("SRS1=a=")
@example("srs0-a=b=c")
@example("SRS0=aaaa=ß!=c=d")
@example("SRS0=" + "=" * 5000)
def test_nothing_but_a_flaw_comes_of_whatever_is_no_address_of_ours(text: str) -> None:
    split(f"{text}@{text}")
    for local in (text, f"SRS0={text}", f"SRS1+{text}", f"SRS0={text}=JO={text}=x"):
        if srsaddress.is_srs(local):
            with pytest.raises(FlawedAddressError):
                SCHEME.undo(local, SECRETS, TODAY)


def test_a_sender_is_rewritten_as_the_paper_says() -> None:
    assert SCHEME.rewrite("user", "sender.org", SECRETS[0], TODAY) == f"SRS0=qMME={DAY}=sender.org=user"
    assert Scheme("+").rewrite("user", "sender.org", SECRETS[0], TODAY) == f"SRS0+qMME={DAY}=sender.org=user"
    assert Scheme(hash_length=8).rewrite("user", "sender.org", SECRETS[0], TODAY).startswith("SRS0=qMMERY9X=")


@pytest.mark.parametrize("tag", ["SRS0=", "SRS0+", "SRS0-", "srs0="])
def test_the_address_of_another_forwarder_keeps_what_only_he_can_undo(tag: str) -> None:
    new = SCHEME.rewrite(f"{tag}abcd=AA=host.tld=user", "other.org", SECRETS[0], TODAY)
    kept = f"other.org={tag[4]}abcd=AA=host.tld=user"
    assert new.startswith("SRS1=")
    assert new.endswith(kept)
    again = SCHEME.rewrite(f"SRS1+wxyz={kept}", "third.org", SECRETS[0], TODAY)
    assert again == new  # the second forwarder is left out


@pytest.mark.parametrize("local", ["SRS1=", "SRS1=abcd", "SRS1=abcd=host", "SRS1=abcd=host=", "SRS1=abcd==x"])
def test_half_an_address_of_another_forwarder_is_not_rewritten(local: str) -> None:
    with pytest.raises(FlawedAddressError) as caught:
        SCHEME.rewrite(local, "other.org", SECRETS[0], TODAY)
    assert caught.value.flaw is Flaw.MALFORMED


@pytest.mark.parametrize(
    "change",
    [str.lower, str.upper, lambda text: text.replace("sender.org", "SENDER.org"), lambda text: f"srs0+{text[5:]}"],
)
def test_an_address_that_has_lost_its_case_is_undone(change: type[str]) -> None:
    original = SCHEME.undo(change("SRS0=qMME=JO=sender.org=user"), SECRETS, TODAY)
    assert (original.local.lower(), original.domain.lower()) == ("user", "sender.org")


def test_a_hash_in_the_alphabet_for_urls_is_believed() -> None:
    # PostSRSd 2.2.6 and newer write it so.
    for number in range(200):
        new = Scheme(hash_length=8, hash_minimum=8).rewrite(f"u{number}", "x.org", SECRETS[1], TODAY)
        given = new[5:13]
        assert SCHEME.undo(new.replace(given, given.replace("+", "-").replace("/", "_")), SECRETS, TODAY).secret == 1


@pytest.mark.parametrize("place", range(len("SRS0=qMME=JO=sender.org=user")))
def test_an_address_with_any_letter_changed_is_not_undone(place: int) -> None:
    local = "SRS0=qMME=JO=sender.org=user"
    changed = local[:place] + ("z" if local[place] != "z" else "y") + local[place + 1 :]
    if srsaddress.is_srs(changed):
        assert flaw_of(changed) in (Flaw.FORGED, Flaw.MALFORMED)


@pytest.mark.parametrize("length", range(5, len("SRS0=qMME=JO=sender.org=user")))
def test_a_cut_off_address_is_not_undone(length: int) -> None:
    assert flaw_of("SRS0=qMME=JO=sender.org=user"[:length]) in (Flaw.FORGED, Flaw.MALFORMED)


def test_a_hash_is_as_long_as_it_must_be_and_all_of_it_is_right() -> None:
    long = Scheme(hash_length=8, hash_minimum=6)
    for length in (6, 7, 8, 27):
        hash_ = Scheme(hash_length=length).rewrite("user", "sender.org", SECRETS[0], TODAY)
        assert long.undo(hash_, SECRETS, TODAY).local == "user"
    assert flaw_of("SRS0=qMMER=JO=sender.org=user", long) is Flaw.FORGED
    assert flaw_of("SRS0=qMMERYZZ=JO=sender.org=user", long) is Flaw.FORGED
    assert flaw_of("SRS0=" + "qMME" * 7 + "=JO=sender.org=user") is Flaw.FORGED


@pytest.mark.parametrize("age", [0, 1, 21])
def test_an_address_is_undone_until_it_is_too_old(age: int) -> None:
    new = SCHEME.rewrite("user", "sender.org", SECRETS[0], TODAY - age)
    assert SCHEME.undo(new, SECRETS, TODAY).age == age


@pytest.mark.parametrize("age", [22, 1002, -1, -22])
def test_an_address_from_long_ago_or_from_the_future_is_expired(age: int) -> None:
    new = SCHEME.rewrite("user", "sender.org", SECRETS[0], TODAY - age)
    assert flaw_of(new) is Flaw.EXPIRED


@pytest.mark.parametrize("day", ["A1", "J", "JOO", "J=", "ßß", "  "])
def test_a_day_that_is_none_is_malformed_even_if_it_is_signed(day: str) -> None:
    signed = srsaddress._hash(SECRETS[0], (day, "sender.org", "user"))[:4].decode()
    assert flaw_of(f"SRS0={signed}={day}=sender.org=user") in (Flaw.MALFORMED, Flaw.FORGED)


def test_a_domain_with_a_separator_is_none() -> None:
    # user@a=b would come back as b=user@a, with the same hash.
    assert split("user@a=b") is None


@pytest.mark.parametrize(
    "address",
    [
        *("", "user", "user@", "@sender.org", "<>", "user@a b", "a\nb@x.org", "a\x7f@x.org", '""@x.org'),
        *("a@[", "a@[]", "a@[x=y]", "a@[1.2.3.4", "a@x@", "a@x\0.org", "a@<x.org>", "a@" + "x" * 256),
    ],
)
def test_what_no_mail_comes_from_is_no_address(address: str) -> None:
    assert split(address) is None


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ('"a b"@x.org', "a b"),
        ('"a\\"b\\\\c"@x.org', 'a"b\\c'),
        ('"a@b"@x.org', "a@b"),
        ("a b@x.org", "a b"),  # as Postfix asks the second time
        ('"plain"@x.org', "plain"),
        ('SRS0=abcd=JO=x.org="a b"@x.org', "SRS0=abcd=JO=x.org=a b"),
        ('a"b@x.org', 'a"b'),
        ("a\\@x.org", "a\\"),
        ("ü@x.org", "ü"),
    ],
)
def test_a_local_part_is_freed_of_its_quotes(address: str, local: str) -> None:
    assert split(address) == (local, "x.org")


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ("user+ext", "user+ext"),
        ("a.b", "a.b"),
        ("a..b", '"a..b"'),
        (".a", '".a"'),
        ("a b", '"a b"'),
        ('a"b\\c', '"a\\"b\\\\c"'),
        ("SRS0=abcd=JO=[1.2.3.4]=u", '"SRS0=abcd=JO=[1.2.3.4]=u"'),
        ("ü漢", "ü漢"),
    ],
)
def test_a_local_part_gets_quotes_where_it_needs_them(local: str, expected: str) -> None:
    assert srsaddress.quoted(local) == expected
