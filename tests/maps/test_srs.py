"""The type ``srs``: whose senders are rewritten, with which secret, and what is told of the rest."""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from prefork_socketmap.maps import srs, srsaddress
from prefork_socketmap.maps.base import MissingLibraryError
from prefork_socketmap.maps.srs import SrsMap
from prefork_socketmap.maps.srsaddress import Flaw
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply
from tests.maps.opening import OpenMap
from tests.waiting import eventually

TODAY = 20782  # 2026-11-25
WITHIN = 30.0
Make = Callable[..., SrsMap]


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    file = tmp_path / "secrets"
    file.write_text("secret1\nsecret2\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def make(open_map: OpenMap, secrets: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a maker of open maps, by default for the forward direction, on a day that is always the same."""
    monkeypatch.setattr(srs, "_today", lambda: TODAY)

    def make(direction: str = "forward", **table: object) -> SrsMap:
        if direction == "forward":
            table = {"domain": "fwd.example", **table}
        found = open_map("srs", direction=direction, **{"secret_file": "secrets", **table})
        assert isinstance(found, SrsMap)
        return found

    return make


def make_error(make: Make, direction: str = "forward", **table: object) -> str:
    with pytest.raises(SettingError) as caught:
        make(direction, **table)
    return str(caught.value)


def test_a_sender_is_rewritten_and_comes_back(make: Make) -> None:
    rewritten = "SRS0=2MIC=JO=Sender.ORG=A.User+ext@fwd.example"
    assert make().lookup("A.User+ext@Sender.ORG") == Reply.ok(rewritten)
    assert make("reverse").lookup(rewritten) == Reply.ok("A.User+ext@Sender.ORG")


@pytest.mark.parametrize(
    "key", ["", "<>", "user", "user@", "@sender.org", "user@a=b", "user@1", "a\0@x.org", "\udcff@x.org"]
)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_what_is_no_address_stays_as_it_is(make: Make, direction: str, key: str) -> None:
    assert make(direction).lookup(key) == Reply.not_found()


@pytest.mark.parametrize("key", ['"a b"@x.org', '"a@b"@x.org', "ü@bücher.example", "u@[1.2.3.4]", '"a..b"@x.org'])
def test_any_kind_of_address_comes_back(make: Make, key: str) -> None:
    rewritten = make().lookup(key)
    assert rewritten.text.isprintable()
    assert srsaddress.split(rewritten.text) is not None
    assert make("reverse").lookup(rewritten.text) == Reply.ok(key)


@pytest.mark.parametrize(
    ("domain", "is_local"),
    [
        ("local.example", True),
        ("LOCAL.Example", True),
        ("fwd.example", True),
        ("x.local.example", False),
        ("sub.example", False),
        ("x.sub.example", True),
        ("y.X.sub.Example", True),
        ("xsub.example", False),
        ("bücher.example", True),
        ("sender.org", False),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_senders_of_local_domains_stay_as_they_are(
    make: Make, tmp_path: Path, domain: str, is_local: bool, as_file: bool
) -> None:
    domains = ["Local.example", ".sub.example", "Bücher.example"]
    (tmp_path / "domains").write_text("# ours\n\n" + "\n".join(f" {each} # one of them" for each in domains))
    local_domains = "domains" if as_file else domains
    reply = make(local_domains=local_domains).lookup(f"user@{domain}")
    assert (reply == Reply.not_found()) == is_local
    assert make(local_domains=local_domains, always_rewrite=True).lookup(f"user@{domain}") != Reply.not_found()


@pytest.mark.usefixtures("eager_readers")
def test_a_file_of_local_domains_is_read_again_when_it_changes(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "domains"
    file.write_text("local.example\n")
    table = make(local_domains="domains")
    file.write_text("sender.org\n")
    eventually(lambda: table.lookup("user@sender.org") == Reply.not_found(), WITHIN)
    assert table.lookup("user@local.example") != Reply.not_found()
    file.write_text("other.example\nno domain\n")
    assert table.lookup("user@sender.org") == Reply.not_found()
    eventually(lambda: "the local domains stay as they were" in caplog.text, WITHIN)
    assert "line 2: 'no...' is not accepted here" in caplog.text
    assert table.lookup("user@sender.org") == Reply.not_found()
    file.unlink()
    assert table.lookup("user@sender.org") == Reply.not_found()


@pytest.mark.usefixtures("eager_readers")
def test_the_first_secret_signs_and_all_verify(make: Make, secrets: Path) -> None:
    forward, reverse = make(), make("reverse")
    old = forward.lookup("user@sender.org").text
    secrets.write_text("new secret\r\n\nsecret1\n")
    eventually(lambda: forward.lookup("user@sender.org").text != old, WITHIN)
    new = forward.lookup("user@sender.org").text
    eventually(lambda: reverse.lookup(new) == Reply.ok("user@sender.org"), WITHIN)
    assert reverse.lookup(old) == Reply.ok("user@sender.org")
    secrets.write_text("new secret\n")
    eventually(lambda: reverse.lookup(old) == Reply.not_found(), WITHIN)
    assert reverse.lookup(new) == Reply.ok("user@sender.org")


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o666])
def test_secrets_that_everybody_can_read_or_write_are_refused(make: Make, secrets: Path, mode: int) -> None:
    secrets.chmod(mode)
    assert make_error(make).endswith("everybody may read or write it; chmod o= it")
    secrets.chmod(mode & ~0o007)
    make()


@pytest.mark.usefixtures("eager_readers")
def test_secrets_that_become_everybodys_are_not_taken_until_that_is_mended(
    make: Make, secrets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = make()
    before = table.lookup("user@sender.org")
    secrets.chmod(0o644)
    secrets.write_text("another\n")
    assert table.lookup("user@sender.org") == before
    problem = "everybody may read or write it; chmod o= it; the secrets stay as they were"
    eventually(lambda: problem in caplog.text, WITHIN)
    assert table.lookup("user@sender.org") == before
    assert "another" not in caplog.text
    secrets.chmod(0o640)
    eventually(lambda: table.lookup("user@sender.org") != before, WITHIN)


def test_a_file_without_a_secret_is_an_error_that_does_not_show_its_name(make: Make, secrets: Path) -> None:
    secrets.write_text("\n\r\n")
    assert make_error(make) == "maps.m.secret_file: cannot use the file: there is no secret in it"
    assert (
        make_error(make, secret_file="hunter2")
        == "maps.m.secret_file: cannot use the file: No such file or directory"
    )


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            {"direction": "both"},
            'maps.m.direction: \'both\' is not accepted here; expected one of "forward", "reverse"',
        ),
        ({"domain": "a b"}, "maps.m.domain: 'a...' is not accepted here; expected a domain, such as example.com"),
        ({"domain": "[1.2.3.4]"}, "expected a domain"),
        ({"domain": ".example.com"}, "expected a domain"),
        ({"local_domains": ["a=b"]}, "or .example.com for all below it"),
        ({"local_domains": 1}, "a list of domains, or the name of a file of them"),
        ({"local_domains": "missing"}, "maps.m.local_domains: 'missing': No such file"),
        ({"hash_length": 3}, "maps.m.hash_length: 3 is not accepted here; expected a whole number of at least 4"),
        ({"hash_length": 28}, "at most 27"),
        ({"hash_minimum": 5}, "maps.m.hash_minimum: is 5, more than hash_length, which is 4"),
        ({"max_age": 3600}, "expected a time from 1d to 1023d"),
        ({"max_age": "1024d"}, "expected a time from 1d to 1023d"),
        ({"separator": "#"}, 'expected one of "=", "+", "-"'),
        ({"original_envelope": "x"}, 'expected one of "embedded", "database"'),
        ({"envelope_database": {}}, 'maps.m.envelope_database: goes with original_envelope = "database" only'),
        ({"search": "address"}, "maps.m.search: unknown key"),
        ({"fold": True}, "maps.m.fold: unknown key"),
        ({"propagate_extension": True}, "maps.m.propagate_extension: unknown key"),
    ],
)
def test_a_wrong_setting_is_told_with_what_is_accepted(make: Make, table: dict[str, object], problem: str) -> None:
    direction = str(table.pop("direction", "forward"))
    assert problem in make_error(make, direction, **table)


def test_only_the_forward_direction_needs_a_domain(make: Make, open_map: OpenMap) -> None:
    make("reverse")
    with pytest.raises(SettingError, match=r"maps\.m\.domain: is missing"):
        open_map("srs", direction="forward", secret_file="secrets")


def test_the_settings_of_the_hash_are_those_of_the_addresses(make: Make) -> None:
    long = make(hash_length=8, separator="+").lookup("user@sender.org").text
    assert long.startswith("SRS0+qMMERY9X=JO=")
    short = make().lookup("user@sender.org").text
    strict = make("reverse", hash_length=8)
    assert strict.lookup(long) == Reply.ok("user@sender.org")
    assert strict.lookup(short) == Reply.not_found()
    assert make("reverse", hash_length=8, hash_minimum=4).lookup(short) == Reply.ok("user@sender.org")


def test_an_address_expires(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten = make().lookup("user@sender.org").text
    reverse = make("reverse", max_age="36h")
    monkeypatch.setattr(srs, "_today", lambda: TODAY + 1)
    assert reverse.lookup(rewritten) == Reply.ok("user@sender.org")
    monkeypatch.setattr(srs, "_today", lambda: TODAY + 2)
    assert reverse.lookup(rewritten) == Reply.not_found()
    assert reverse.flaws[Flaw.EXPIRED] == 1


@pytest.mark.parametrize(
    ("key", "flaw", "told"),
    [
        (
            "SRS0=XXXX=JO=sender.org=user@fwd.example",
            Flaw.FORGED,
            "forged: its hash is made with none of the 2 secrets",
        ),
        ("SRS0=qMME=JO=sender.org=use@fwd.example", Flaw.FORGED, "forged"),
        ("SRS0=qM=JO=sender.org=user@fwd.example", Flaw.FORGED, "its hash has 2 characters, not 4 to 27"),
        ("SRS0=qMME=JO=sender.org@fwd.example", Flaw.MALFORMED, "malformed: parts of it are missing"),
        ("SRS0=qMME=JO=sender.org=user@FWD.example", None, "secret 1 of 2, 0 days ago"),
        ("SRS0=XXXX=JO=sender.org=user@elsewhere.example", Flaw.FOREIGN, "foreign: its hash"),
        ("SRS0=qMME=JO=sender.org=user@elsewhere.example", None, "secret 1 of 2, 0 days ago"),
        ("user@elsewhere.example", None, "it is no SRS address"),
    ],
)
def test_what_is_wrong_with_an_address_is_counted_and_at_debug_logged(
    make: Make, caplog: pytest.LogCaptureFixture, key: str, flaw: Flaw | None, told: str
) -> None:
    caplog.set_level(logging.DEBUG)
    table = make("reverse", domain="fwd.example")
    table.lookup(key)
    assert table.flaws == {**dict.fromkeys(Flaw, 0), **({flaw: 1} if flaw else {})}
    assert told in caplog.text
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []
    assert "secret1" not in caplog.text


def test_an_address_of_another_forwarder_is_undone_step_by_step_as_postfix_asks(make: Make) -> None:
    first = "SRS0=abcd=AA=sender.org=user@first.example"
    last = make().lookup(first).text
    assert last.startswith("SRS1=")
    reverse = make("reverse", domain="fwd.example")
    assert reverse.lookup(last) == Reply.ok(first)
    assert reverse.lookup(first) == Reply.not_found()
    assert reverse.flaws[Flaw.FOREIGN] == 1
    assert reverse.flaws[Flaw.FORGED] == 0


def test_what_postsrsd_has_signed_with_quotes_is_undone_when_it_comes_back_without(make: Make) -> None:
    # PostSRSd 2.4.1, for "a b"@x.org and the secret "secret1"; Postfix puts the quotes around the whole.
    assert make("reverse").lookup('"SRS0=s5Ya=JO=x.org=a b"@fwd.example') == Reply.ok('"a b"@x.org')
    assert make("reverse").lookup('SRS0=s5Ya=JO=x.org="a b"@fwd.example') == Reply.ok('"a b"@x.org')


def test_a_local_part_that_is_too_long_for_some_is_counted_and_warned_of(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    table = make()
    fits, long = ("x" * (64 - len("SRS0=abcd=JO=sender.org=") + more) + "@sender.org" for more in (0, 1))
    assert len(table.lookup(fits).text.partition("@")[0]) == 64
    assert table.flaws[Flaw.LONG] == 0
    rewritten = table.lookup(long).text
    assert make("reverse").lookup(rewritten) == Reply.ok(long)
    assert table.flaws[Flaw.LONG] == 1
    assert "a local part of 65 octets, more than the 64 that every server takes" in caplog.text


@pytest.mark.parametrize("sender", ["user@sender.org", "user@fwd.example", "SRS0=abcd=AA=x.org=user@other.org"])
def test_an_address_that_is_always_rewritten_comes_back_as_postfix_asks(make: Make, sender: str) -> None:
    def until_it_stays(table: SrsMap, address: str) -> list[str]:
        """Ask again for each answer, as cleanup(8) does, until it is what was asked."""
        steps = [address]
        while (reply := table.lookup(steps[-1])).text not in ("", steps[-1]):
            steps.append(reply.text)
        return steps

    there = until_it_stays(make(always_rewrite=True), sender)
    assert there[-1].startswith("SRS1=")
    assert sender in until_it_stays(make("reverse"), there[-1])[-1:]


DATABASE = {"original_envelope": "database", "envelope_database": {"dbpath": "senders.sqlite"}}
LONG = f'"{"x" * 150} ü"@sender.example'


@pytest.mark.parametrize("sender", ["user@sender.org", LONG, '"a b"@x.org', "A.User+ext@Sender.ORG", "u@[1.2.3.4]"])
def test_a_sender_in_the_database_comes_back(make: Make, sender: str) -> None:
    rewritten = make(**DATABASE).lookup(sender).text
    assert len(rewritten.partition("@")[0]) == 47
    for form in (rewritten, rewritten.upper(), rewritten.lower()):
        assert make("reverse", **DATABASE).lookup(form) == Reply.ok(sender)


def test_the_address_of_another_forwarder_is_kept_in_the_database_only_if_it_is_too_long(make: Make) -> None:
    forward, reverse = make(**DATABASE), make("reverse", **DATABASE)
    short = "SRS0=abcd=AA=sender.org=user@other.org"
    assert forward.lookup(short).text.startswith("SRS1=")
    long = f"SRS0=abcd=AA=sender.org={'x' * 40}@other.org"
    rewritten = forward.lookup(long).text
    assert len(rewritten.partition("@")[0]) == 47
    assert reverse.lookup(rewritten) == Reply.ok(long)


def test_a_sender_whose_entry_has_expired_is_not_found_and_removed(make: Make, tmp_path: Path) -> None:
    forward, reverse = make(**DATABASE), make("reverse", **DATABASE)
    rewritten = forward.lookup("user@sender.org").text
    with closing(sqlite3.connect(tmp_path / "senders.sqlite")) as database:
        database.execute("UPDATE kv SET lt = unixepoch()")
        database.commit()
        assert reverse.lookup(rewritten) == Reply.not_found()
        assert reverse.flaws[Flaw.EXPIRED] == 1
        make(**DATABASE).lookup("other@sender.org")
        assert [row[0] for row in database.execute("SELECT v FROM kv")] == ["other@sender.org"]


def test_a_sender_that_is_seen_again_is_kept_longer(make: Make, tmp_path: Path) -> None:
    forward = make(**DATABASE, max_age="10d")
    forward.lookup("user@sender.org")
    with closing(sqlite3.connect(tmp_path / "senders.sqlite")) as database:
        database.execute("UPDATE kv SET lt = lt - 86400")
        database.commit()
        forward.lookup("user@sender.org")
        ((left, number),) = database.execute("SELECT lt - unixepoch(), count(*) FROM kv")
    assert number == 1
    assert 10.9 * 86400 < left <= 11 * 86400  # its last day counts whole


def test_a_long_hash_makes_long_addresses_even_with_the_database(make: Make) -> None:
    for length, is_long in ((21, False), (22, True)):
        table = make(**DATABASE, hash_length=length)
        assert (len(table.lookup("user@sender.org").text.partition("@")[0]) > 64) == is_long
        assert table.flaws[Flaw.LONG] == is_long


def test_without_the_database_its_addresses_are_not_found(make: Make) -> None:
    rewritten = make(**DATABASE).lookup("user@sender.org").text
    reverse = make("reverse")
    assert reverse.lookup(rewritten) == Reply.not_found()
    assert reverse.flaws[Flaw.EXPIRED] == 1


def test_nobody_can_ask_the_database_without_a_signature(make: Make) -> None:
    alias = make(**DATABASE).lookup("user@sender.org").text.partition("=1=")[2].partition("@")[0]
    assert make("reverse", **DATABASE).lookup(f"SRS0=XXXX=JO=1={alias}@fwd.example") == Reply.not_found()


def test_the_database_is_the_servers_alone(make: Make, tmp_path: Path) -> None:
    before = os.umask(0o077)  # that of a worker
    try:
        make(**DATABASE).lookup("user@sender.org")
    finally:
        os.umask(before)
    assert (tmp_path / "senders.sqlite").stat().st_mode & 0o077 == 0


def test_a_database_that_fails_defers_the_mail(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = make(original_envelope="database", envelope_database={"dbpath": "senders.sqlite", "timeout": 0.1})
    with closing(sqlite3.connect(tmp_path / "senders.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert table.lookup("user@sender.org") == Reply.temp_fail("map m.envelope_database: the database failed")
        assert "database is locked" in caplog.text
    assert table.lookup("user@sender.org") != Reply.not_found()


@pytest.mark.parametrize(("kind", "driver"), [("redis", "redis"), ("postgresql", "psycopg"), ("mysql", "pymysql")])
def test_a_database_whose_library_is_missing_says_what_to_install(
    make: Make, monkeypatch: pytest.MonkeyPatch, kind: str, driver: str
) -> None:
    monkeypatch.setitem(sys.modules, driver, None)
    monkeypatch.delitem(sys.modules, f"prefork_socketmap.maps.{kind}", raising=False)
    with pytest.raises(MissingLibraryError) as caught:
        make(original_envelope="database", envelope_database={"type": kind, "hosts": ["x"]})
    assert str(caught.value).startswith(f'maps.m.envelope_database.type: "{kind}" needs a Python package')
    assert str(caught.value).endswith(f"install prefork-socketmap[{kind}]")


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"type": "file"}, "maps.m.envelope_database.type: 'file' is not accepted here; expected one of \"sqlite\""),
        ({"dbpath": "missing/x"}, "maps.m.envelope_database.dbpath: cannot open 'missing/x': unable to open"),
        ({"hosts": ["x"]}, "maps.m.envelope_database.hosts: unknown key"),
        ({"type": "redis"}, "maps.m.envelope_database.hosts: is missing"),
        ({"type": "redis", "hosts": ["x"], "query": "GET x"}, "maps.m.envelope_database.query: unknown key"),
        ({"type": "mysql", "hosts": ["x"], "search": "address"}, "maps.m.envelope_database.search: unknown key"),
        ({"type": "postgresql", "hosts": ["a@b"]}, "maps.m.envelope_database.hosts"),
    ],
)
def test_a_wrong_database_is_told_with_its_key(make: Make, table: dict[str, object], problem: str) -> None:
    assert problem in make_error(make, original_envelope="database", envelope_database=table)
