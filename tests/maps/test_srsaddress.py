"""Addresses of the Sender Rewriting Scheme: made, undone, and refused when anything about them is wrong."""

from __future__ import annotations

import pytest

from prefork_socketmap.maps import srsaddress
from prefork_socketmap.maps.srsaddress import Flaw, FlawedAddressError, Scheme, split

SECRETS = [b"secret1", b"secret2"]
TODAY = 20782  # 2026-11-25
DAY = "JO"
SCHEME = Scheme()


def flaw_of(local: str, scheme: Scheme = SCHEME, today: int = TODAY) -> Flaw:
    with pytest.raises(FlawedAddressError) as caught:
        scheme.undo(local, SECRETS, today)
    return caught.value.flaw


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
