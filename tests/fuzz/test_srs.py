"""The type ``srs`` with addresses of every shape: what is rewritten comes back, and no key does any harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefork_socketmap.maps import envelopes, srsaddress
from prefork_socketmap.maps.base import Map
from prefork_socketmap.maps.srsaddress import FlawedAddressError, Scheme, join, split
from prefork_socketmap.socketmap.messages import Reply
from tests.fuzz import repeat, unlimited
from tests.maps.opening import OpenMap

SECRETS = [b"secret1", b"secret2"]
TODAY = 20782  # 2026-11-25

atext = st.text(st.sampled_from("abcXYZ019!#$%&'*+/=?^_`{|}~-üß漢"), min_size=1, max_size=20)
dot_strings = st.lists(atext, min_size=1, max_size=3).map(".".join)
contents = dot_strings | st.text(
    st.characters(min_codepoint=32, exclude_characters="\x7f", exclude_categories=["Cs"])
)
labels = st.text(st.sampled_from("abcXYZ019-ü"), min_size=1, max_size=10)
domains = st.lists(labels, min_size=1, max_size=4).map(".".join) | st.sampled_from(
    ["[192.0.2.1]", "[IPv6:2001:db8::1]", "example.org."]
)


# "1" is no domain of a host: it stands for a sender in the database.
senders = st.tuples(
    contents.filter(lambda local: local and not srsaddress.is_srs(local)),
    domains.filter(lambda domain: domain != envelopes.DOMAIN),
)


@pytest.fixture
def maps(open_map: OpenMap, tmp_path: Path) -> tuple[Map, Map]:
    """A map in each direction."""
    file = tmp_path / "secrets"
    file.write_bytes(b"\n".join(SECRETS))
    file.chmod(0o600)
    common = {"domain": "fwd.example", "secret_file": "secrets"}
    return open_map("srs", direction="forward", **common), open_map("srs", direction="reverse", **common)


@unlimited
def test_a_sender_comes_back_as_it_was(maps: tuple[Map, Map]) -> None:
    forward, reverse = maps

    @given(senders)
    @example(("SRS2=a=b=c=d", "example.org"))
    @example(('a"b\\c@d', "example.org"))
    @example(("=", "example.org"))
    @example(("x" * 300, "example.org"))
    def check(sender: tuple[str, str]) -> None:
        address = join(*sender)
        rewritten = forward.lookup(address).text
        assert split(rewritten) is not None
        assert rewritten.endswith("@fwd.example")
        assert reverse.lookup(rewritten) == Reply.ok(address)

    repeat(check)


@unlimited
def test_a_sender_comes_back_with_any_separator_hash_and_secret() -> None:
    @given(senders, st.sampled_from(srsaddress.SEPARATORS), st.integers(4, 27), st.integers(0, 1), st.integers(0, 21))
    def check(sender: tuple[str, str], separator: str, length: int, secret: int, age: int) -> None:
        scheme = Scheme(separator, length, length)
        original = scheme.undo(scheme.rewrite(*sender, SECRETS[secret], TODAY - age), SECRETS, TODAY)
        assert (original.local, original.domain, original.secret, original.age) == (*sender, secret, age)

    repeat(check)


@unlimited
def test_the_address_of_any_chain_of_forwarders_comes_back_to_the_first_one_in_two_steps() -> None:
    @given(senders, st.integers(0, 5))
    def check(sender: tuple[str, str], more: int) -> None:
        scheme = Scheme()
        first = scheme.rewrite(*sender, b"of the first", TODAY)
        last = scheme.rewrite(first, "first.example", SECRETS[0], TODAY)
        length = len(last)
        for number in range(more):
            last = scheme.rewrite(last, f"forwarder{number}.example", SECRETS[0], TODAY)
        assert len(last) == length
        back = scheme.undo(last, SECRETS, TODAY)
        assert (back.local, back.domain, back.age) == (first, "first.example", None)

    repeat(check)


@unlimited
def test_nothing_but_a_flaw_comes_of_whatever_is_no_address_of_ours() -> None:
    @given(st.text())
    @example("a=")
    @example("aaaa=ß!=c=d")
    @example("=" * 5000)
    def check(text: str) -> None:
        for local in (text, f"SRS0={text}", f"SRS1+{text}", f"SRS0={text}=JO={text}=x"):
            if srsaddress.is_srs(local):
                with pytest.raises(FlawedAddressError):
                    Scheme().undo(local, SECRETS, TODAY)

    repeat(check)


@unlimited
def test_no_key_raises(maps: tuple[Map, Map]) -> None:
    @given(st.text())
    def check(text: str) -> None:
        for table in maps:
            for key in (text, f"{text}@{text}", f"SRS0={text}@x.org", f"SRS1={text}={text}={text}@{text}"):
                reply = table.lookup(key)
                assert reply == Reply.not_found() or reply.text.endswith("@fwd.example")

    repeat(check)
