"""The type ``srs`` beside Mail::SRS and PostSRSd: whoever has the secret undoes what the others have made.

All run on this very day; at midnight (UTC) a comparison is made once more.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from prefork_socketmap.maps.srsaddress import CYCLE, Scheme, join, split
from prefork_socketmap.socketmap.messages import Reply
from tests.integration.servers.postsrsd import PostSrsd
from tests.integration.servers.process import program, running
from tests.maps.opening import OpenMap

SECRETS = ["secret of today", "secret1"]
DOMAIN = "fwd.example"
DAY = 86400

PLAIN = [
    "user@sender.org",
    "A.User+ext@Sender.ORG",
    "user=with=signs@sender.org",
    "SRS2=user@sender.org",
    "srs@sender.org",
    "#!$%&'*/?^_`{|}~@sender.org",
    "x" * 64 + "@sender.org",
    "user@" + "a" * 60 + ".example.org",
]
OF_OTHERS = [
    f"{tag}{separator}{rest}"
    for separator in "=+-"
    for tag, rest in (
        ("SRS0", "abcd=AA=host.tld=user@other.org"),
        ("srs0", "ABCD=AA=host.tld=user+ext@other.org"),
        ("SRS1", "wxyz=first.org==abcd=AA=host.tld=user@other.org"),
        ("SRS1", "wxyz=first.org=+abcd=AA=host.tld=user@other.org"),
    )
]


class Peer(Protocol):
    """Another implementation; None stands for an address that it leaves alone."""

    def forward(self, *addresses: str) -> list[str | None]: ...
    def reverse(self, *addresses: str) -> list[str | None]: ...


class MailSrs:
    """Mail::SRS, by its command."""

    def __init__(self, hash_length: int = 4, separator: str = "=") -> None:
        secrets = [f"--secret={secret}" for secret in SECRETS]
        options = [f"--hashlength={hash_length}", f"--separator={separator}", f"--alias={DOMAIN}"]
        self._command = [program("srs", "srs"), *secrets, *options]

    def forward(self, *addresses: str) -> list[str | None]:
        return self._run("--forward", addresses)

    def reverse(self, *addresses: str) -> list[str | None]:
        return self._run("--reverse", addresses)

    def _run(self, direction: str, addresses: tuple[str, ...]) -> list[str | None]:
        """Run it for all *addresses* or, if it fails, which it does at the first that it does not like, for each."""
        options = [word for address in addresses for word in ("--address", address)]
        done = subprocess.run([*self._command, direction, *options], capture_output=True, check=False, timeout=60)
        lines = done.stdout.decode().splitlines()
        if done.returncode == 0 and len(lines) == len(addresses):
            return list(lines)
        return [None] if len(addresses) == 1 else [self._run(direction, (each,))[0] for each in addresses]


@pytest.fixture(scope="module", params=["Mail::SRS", "PostSRSd"])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    if request.param == "Mail::SRS":
        yield MailSrs()
    else:
        with running(PostSrsd(DOMAIN, SECRETS)) as server:
            yield server


@pytest.fixture
def ours(open_map: OpenMap, tmp_path: Path) -> Callable[..., list[str | None]]:
    """Ask a map of ours: its direction, the addresses, and settings."""
    (tmp_path / "secrets").write_text("".join(f"{secret}\n" for secret in SECRETS))
    (tmp_path / "secrets").chmod(0o600)

    def ask(direction: str, *addresses: str, **settings: object) -> list[str | None]:
        common: dict[str, object] = {"domain": DOMAIN, "secret_file": "secrets"}
        table = open_map("srs", direction=direction, **common, **settings)
        replies = [table.lookup(address) for address in addresses]
        return [None if reply == Reply.not_found() else reply.text for reply in replies]

    return ask


def on_one_day(compare: Callable[[], None]) -> None:
    """Call *compare*; once more if a new day has begun meanwhile."""
    today = time.time() // DAY
    try:
        compare()
    except AssertionError:
        if today == time.time() // DAY:
            raise
        compare()


def as_written_by(peer: Peer, address: str | None) -> str | None:
    """Return our *address* with its hash in the alphabet of *peer*."""
    if not isinstance(peer, PostSrsd) or not peer.writes_for_urls or address is None:
        return address
    tag, separator, rest = address[:4], address[4], address[5:]
    given, equals, rest = rest.partition("=")
    return tag + separator + given.replace("+", "-").replace("/", "_") + equals + rest


Ours = Callable[..., list[str | None]]


def test_addresses_are_the_same_byte_for_byte(peer: Peer, ours: Ours) -> None:
    def compare() -> None:
        addresses = [*PLAIN, *OF_OTHERS]
        expected = [as_written_by(peer, address) for address in ours("forward", *addresses)]
        assert None not in expected
        assert peer.forward(*addresses) == expected

    on_one_day(compare)


def test_what_the_other_has_made_is_undone(peer: Peer, ours: Ours) -> None:
    made = [address or "" for address in peer.forward(*PLAIN)]
    assert ours("reverse", *made) == PLAIN
    of_others = [address or "" for address in peer.forward(*OF_OTHERS)]
    assert ours("reverse", *of_others) == peer.reverse(*of_others)
    assert None not in ours("reverse", *of_others)


def test_what_is_made_here_the_other_undoes(peer: Peer, ours: Ours) -> None:
    made = [address or "" for address in ours("forward", *PLAIN, *OF_OTHERS)]
    undone = peer.reverse(*made)
    assert undone[: len(PLAIN)] == PLAIN
    assert undone == ours("reverse", *made)


def test_addresses_without_their_case_are_undone_by_both(peer: Peer, ours: Ours) -> None:
    made = [(address or "").lower() for address in ours("forward", *PLAIN)]
    undone = ours("reverse", *made)
    assert undone == [address.lower() for address in PLAIN]
    assert peer.reverse(*made) == undone


def test_an_older_secret_is_believed_by_both(peer: Peer, ours: Ours) -> None:
    local, domain = "user", "sender.org"
    today = int(time.time()) // DAY
    made = join(Scheme().rewrite(local, domain, SECRETS[1].encode(), today), DOMAIN)
    assert ours("reverse", made) == peer.reverse(made) == ["user@sender.org"]


@pytest.mark.parametrize(
    ("age", "is_good"), [(0, True), (1, True), (20, True), (23, False), (500, False), (-2, False)]
)
def test_the_age_of_an_address_is_judged_alike(peer: Peer, ours: Ours, age: int, is_good: bool) -> None:
    today = int(time.time()) // DAY
    made = join(Scheme().rewrite("user", "sender.org", SECRETS[0].encode(), (today - age) % CYCLE), DOMAIN)
    expected = ["user@sender.org"] if is_good else [None]
    assert ours("reverse", made) == expected
    assert peer.reverse(made) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda address: address.replace("user", "usor"),
        lambda address: address.replace("sender", "sander"),
        lambda address: "SRS0=XXXX" + address[9:],
        lambda address: "SRS0=X" + address[9:],
        lambda address: address[:12] + f"@{DOMAIN}",
        lambda address: f"user@{DOMAIN}",
    ],
)
def test_what_is_forged_or_cut_off_is_undone_by_neither(peer: Peer, ours: Ours, change: Callable[[str], str]) -> None:
    (made,) = ours("forward", "user@sender.org")
    changed = change(made or "")
    assert ours("reverse", changed) == peer.reverse(changed) == [None]


@pytest.mark.parametrize("length", [4, 5, 12, 27])
@pytest.mark.parametrize("separator", ["=", "+", "-"])
def test_the_hash_and_the_separator_are_those_of_the_others(ours: Ours, length: int, separator: str) -> None:
    def compare() -> None:
        made = ours("forward", *PLAIN, hash_length=length, separator=separator)
        assert made == MailSrs(length, separator).forward(*PLAIN)
        with running(PostSrsd(DOMAIN, SECRETS, min(length, 12), separator)) as postsrsd:
            theirs = postsrsd.forward(*PLAIN)
            short = ours("forward", *PLAIN, hash_length=min(length, 12), separator=separator)
            assert theirs == [as_written_by(postsrsd, address) for address in short]
            assert ours("reverse", *map(str, theirs), hash_minimum=4, hash_length=length) == PLAIN

    on_one_day(compare)


def test_any_address_is_rewritten_alike(peer: Peer, ours: Ours) -> None:
    chance = random.Random(15)
    letters = "abcxyzABCXYZ0189.!#$%&'*+-/=?^_`{|}~"

    def address() -> str:
        local = "".join(chance.choices(letters, k=chance.randint(1, 40)))
        host = ".".join(
            "".join(chance.choices("abcXYZ09-", k=chance.randint(1, 9))) for _ in range(chance.randint(1, 4))
        )
        return f"{local}@{host}.tld"

    # Not what begins with an option's dash, nor what only stands in quotes: the others leave them out.
    addresses = [each for each in (address() for _ in range(300)) if each[0] != "-" and join(*_parts(each)) == each]
    assert len(addresses) > 150

    def compare() -> None:
        made = [each or "" for each in ours("forward", *addresses)]
        assert peer.forward(*addresses) == [as_written_by(peer, each) for each in made]
        assert peer.reverse(*made) == ours("reverse", *made) == addresses

    on_one_day(compare)


def _parts(address: str) -> tuple[str, str]:
    found = split(address)
    assert found is not None
    return found


def test_the_others_undo_what_stands_in_quotes_once_these_are_taken_off(peer: Peer, ours: Ours) -> None:
    made = ours("forward", '"a b"@sender.org', "user@[192.0.2.1]", "ü@sender.org")
    bare = ["@".join(_parts(address or "")) for address in made]
    assert peer.reverse(*bare) == ["a b@sender.org", "user@[192.0.2.1]", "ü@sender.org"]
