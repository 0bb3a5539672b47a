"""The same table, served by Postfix itself and by this server: the answers are equal.

Whole keys are compared through postmap(1). The partial keys, which Postfix generates for its own tables alone, are
compared through smtpd(8): two Postfixes of the same configuration, but for where the tables are, answer the same
dialogues.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import smtplib
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integration.conftest import StartDaemon, StartPostfix
from tests.integration.daemon import Daemon
from tests.integration.postfix import Postfix
from tests.integration.servers.process import program, unavailable

# ---- Whole keys ----

ROWS = [
    ("user@example.com", "box@host.test"),
    ("user+ext@example.com", "ext@host.test"),
    ("user", "local"),
    ("many@example.com", "a@host.test"),
    ("many@example.com", "b"),
    ("many@example.com", "@host.test"),
    ("@example.com", "catch-all@host.test"),
    ("example.com", "domain"),
    ("sub.example.com", "subdomain"),
    (".example.com", "parent"),
    ("com", "top"),
    ('"quoted user"@example.com', "quoted@host.test"),
    ("quoted user@example.com", "unquoted@host.test"),
    ('"a@b"@example.com', "at@host.test"),
    ("it's@example.com", "apostrophe@host.test"),
    ("50%@example.com", "percent@host.test"),
    ("back\\slash@example.com", "backslash@host.test"),
    ("ümlaut@example.com", "umlaut@host.test"),
    ("strasse@example.com", "sharp-s@host.test"),
    ("用户@例え.test", "utf8@host.test"),
    ("user@[192.0.2.1]", "literal@host.test"),
    ("[192.0.2.1]", "a literal"),
    ("192.0.2.1", "an address"),
    ("<>", "null sender"),
    ('""', "empty local part"),
    ("*", "wildcard"),
    ("postmaster@", "any domain"),
    ("a b", "blanks"),
    ("null@example.com", None),
    ("empty@example.com", ""),
    ("number@example.com", 42),
    ("real@example.com", 1.5),
    ("comma@example.com", "x@host.test, y@host.test"),
]
KEYS = [
    *dict.fromkeys(key for key, _ in ROWS),
    "USER@example.com",
    "User+Ext@Example.COM",
    "user+other@example.com",
    "user-ext@example.com",
    "nobody@example.com",
    "user@sub.example.com",
    "user@deep.sub.example.com",
    "user@a.b.c.d.e.f.g.h.i.example.com",
    "user@com",
    "user@",
    "@",
    "@other.test",
    "user@example..com",
    "user@.example.com",
    "user@example.com.",
    "user@@example.com",
    "ÜMLAUT@EXAMPLE.com",
    "straße@example.com",
    "STRASSE@example.com",
    "\u212aelvin@example.com",
    '"<>"',
    "'",
    "''",
    "x' OR '1'='1",
    "x'; DROP TABLE aliases; --",
    "\\' OR 1=1 --",
    "%s",
    "%",
    "_____example.com",
    "user@example.com ",
    " user@example.com",
    "MANY@example.com",
    "many@example.org",
    "com.example",
]
SELECT = "SELECT result FROM aliases WHERE key = '%s'"
# What sqlite_table(5) and the table of the configuration have in common.
TABLES: dict[str, dict[str, str | int | list[str]]] = {
    "plain": {"query": SELECT},
    "parts": {"query": "SELECT result FROM aliases WHERE key = '%u@%d'"},
    "capitals": {"query": "SELECT result FROM aliases WHERE key = '%U@%D' OR key = '%S'"},
    "domain_part": {"query": "SELECT result FROM aliases WHERE key = '%d'"},
    "local_part": {"query": "SELECT result FROM aliases WHERE key = '%u'"},
    "labels": {"query": "SELECT result FROM aliases WHERE key = '%2.%1'"},
    "three_labels": {"query": "SELECT result FROM aliases WHERE key = '%3.%2.%1'"},
    "pattern": {"query": "SELECT result FROM aliases WHERE key LIKE '%%@%d' ORDER BY result"},
    "columns": {"query": "SELECT key, result FROM aliases WHERE key = '%s' ORDER BY result"},
    "domain": {"query": SELECT, "domain": ["example.com", "other.test"]},
    "format": {"query": SELECT, "result_format": "smtp:[%s]%%"},
    "format_parts": {"query": SELECT, "result_format": "%u|%d"},
    "format_local_part": {"query": SELECT, "result_format": "%u"},
    "format_key": {"query": SELECT, "result_format": "%s <%S> %U at %D"},
    "format_labels": {"query": SELECT, "result_format": "%2.%1:%s"},
    "limit": {"query": SELECT, "expansion_limit": 3},
}
LOW_LIMIT = "low_limit"


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A directory that Postfix's processes, which run as user postfix, can get into."""
    path = Path(tempfile.mkdtemp(prefix="socketmap-tables-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def sqlite_daemon(start_daemon: StartDaemon, directory: Path) -> Daemon:
    if "sqlite" not in subprocess.check_output([program("postconf", "postfix"), "-m"], text=True).split():
        unavailable("Postfix has no SQLite: apt install postfix-sqlite")
    with contextlib.closing(sqlite3.connect(directory / "database")) as database, database:
        database.execute("CREATE TABLE aliases (key TEXT, result)")
        database.executemany("INSERT INTO aliases VALUES (?, ?)", ROWS)
    tables = TABLES | {LOW_LIMIT: TABLES["limit"] | {"expansion_limit": 2}}
    for name, table in tables.items():
        lines = {key: ", ".join(value) if isinstance(value, list) else value for key, value in table.items()}
        (directory / f"{name}.cf").write_text(
            "".join(f"{key} = {value}\n" for key, value in {"dbpath": directory / "database", **lines}.items())
        )
    return start_daemon("".join(toml(name, "sqlite", directory, table) for name, table in tables.items()))


def toml(name: str, kind: str, directory: Path, table: Mapping[str, object]) -> str:
    """Return a table of the daemon's configuration; the file it answers from is in *directory*."""
    place = {"sqlite": {"dbpath": f"{directory}/database"}, "file": {"path": f"{directory}/{name}"}}[kind]
    values = {"type": kind, **place, **table}
    # JSON's strings, numbers and lists of strings are TOML's, too.
    return f"[maps.{name}]\n" + "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()
    )


def ask(postfix: Postfix, table: str) -> list[str]:
    """Ask *table* for all keys; return postmap's lines, ``key<TAB>value`` for each that is found."""
    done = postfix.postmap("-q", "-", table, stdin="".join(f"{key}\n" for key in KEYS).encode())
    assert done.returncode in (0, 1), done.stderr.decode()
    assert b"fatal" not in done.stderr, done.stderr.decode()
    return done.stdout.decode().splitlines()


def test_there_are_keys_enough() -> None:
    assert len(set(KEYS)) >= 60


@pytest.mark.parametrize("name", TABLES)
def test_sqlite_answers_as_postfix_does(
    unstarted_postfix: Postfix, sqlite_daemon: Daemon, directory: Path, name: str
) -> None:
    native = ask(unstarted_postfix, f"sqlite:{directory}/{name}.cf")
    assert native, "a table that finds nothing compares nothing"
    assert ask(unstarted_postfix, sqlite_daemon.table("inet", name)) == native


def test_more_results_than_the_limit_are_an_error_as_in_postfix(
    unstarted_postfix: Postfix, sqlite_daemon: Daemon, directory: Path
) -> None:
    for table in (f"sqlite:{directory}/{LOW_LIMIT}.cf", sqlite_daemon.table("inet", LOW_LIMIT)):
        done = unstarted_postfix.postmap("-q", "many@example.com", table)
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"fatal" in done.stderr
        assert unstarted_postfix.postmap("-q", "user@example.com", table).stdout == b"box@host.test\n"


TEXT = """\
# A comment.
user@example.com box@host.test
User+Ext@Example.COM   ext@host.test  \t
"quoted user"@example.com quoted@host.test
"a\\" b"@example.com escaped@host.test
ümlaut@example.com umlaut@host.test
straße@example.com sharp-s@host.test
用户@例え.test utf8@host.test
@example.com catch-all@host.test,
    second@host.test,
# A comment inside of an entry.

\tthird@host.test
user@[192.0.2.1] literal@host.test
user@example.com the same key again
50%@example.com percent@host.test # no comment
<> null sender
* wildcard
last no newline"""


def test_a_text_file_answers_as_postfix_does(
    unstarted_postfix: Postfix, start_daemon: StartDaemon, directory: Path
) -> None:
    (directory / "text").write_text(TEXT)
    daemon = start_daemon(toml("text", "file", directory, {"index_dir": f"{directory}/index"}))
    native = ask(unstarted_postfix, f"texthash:{directory}/text")
    assert len(native) > 10
    assert ask(unstarted_postfix, daemon.table("inet", "text")) == native


# ---- Partial keys ----

ADDRESS = """\
user@moved.test         user
user+ext@moved.test     user with extension
other@moved.test        other
"quoted user"@moved.test quoted
"quoted user+ext"@quoted.test quoted with extension
.dot@moved.test         dot without quotes
"..dot"@moved.test      dot with quotes
üser@moved.test         UTF-8
@catch-all.test         catch-all
user@catch-all.test     user before catch-all
here                    local
here+ext                local with extension
"quoted here"           local, quoted
@here.test              local catch-all
here@here.test          local with domain
user@[192.0.2.1]        literal
@[192.0.2.2]            any at literal
not-here                never
moved.test              never
"""

TRANSPORT = """\
user@route.test         error:5.1.1 user
user+ext@route.test     error:5.1.1 user with extension
"quoted user"@route.test error:5.1.1 quoted
route.test              error:5.1.1 domain
.parent.route.test      error:5.1.1 parent
.route.test             error:5.1.1 grandparent
sub.parent.route.test   error:5.1.1 subdomain
.top                    error:5.1.1 top
[192.0.2.3]             error:5.1.1 literal
.2.4]                   error:5.1.1 end of literal
üser@route.test         error:5.1.1 UTF-8
*                       error:5.1.1 wildcard
moved.test              discard:
access.test             discard:
.access.test            discard:
here.test               discard:
alias.test              discard:
domain.test             discard:
"""

ACCESS = """\
user@access.test        REJECT user
user+ext@access.test    REJECT user with extension
"quoted user"@access.test REJECT quoted
üser@access.test        REJECT UTF-8
domain.access.test      REJECT domain
.dotted.access.test     REJECT never
everywhere@             REJECT everywhere
everywhere+ext@         REJECT everywhere with extension
"quoted everywhere"@    REJECT quoted everywhere
[192.0.2.5]             REJECT literal
2.6]                    REJECT end of literal
<>                      REJECT null sender
sender@access.test      REJECT sender
client.access.test      REJECT client
helo.access.test        REJECT helo
203.0.113.7             REJECT address
203.0.112               REJECT network
203.1                   REJECT large network
2001:db8:1::1           REJECT IPv6 address
2001:db8:2              REJECT IPv6 network
2001:db8:3:             REJECT IPv6 network with colon
"""

RELAY = """\
relay.test              here
sub.other.test          here
.dotted.test            here
[192.0.2.7]             here
"""

SEARCHES = {"address": ADDRESS, "transport": TRANSPORT, "access": ACCESS, "domain": RELAY}

ALIASES = """\
user@alias.test         "a b"@moved.test, bare, c@moved.test
"quoted user"@alias.test quoted@moved.test
@alias.test             catch-all@moved.test
@domain.test            @moved.test
aliased                 local@moved.test
"""
ALIASED = [
    "user@alias.test",
    "user+ext@alias.test",
    "User-Ext@alias.test",
    "user+@alias.test",
    '"quoted user+ext"@alias.test',
    "other+ext@alias.test",
    "anyone+ext@domain.test",
    "aliased+ext@here.test",
]


class Dialogue(NamedTuple):
    """An SMTP dialogue up to RCPT TO. *client* is what XCLIENT says of the client, nothing for a trusted one."""

    recipient: str
    sender: str = "sender@example.org"
    helo: str = "client.example.org"
    client: str = "NAME=trusted.example.org ADDR=127.0.0.1"

    def take_place(self, postfix: Postfix) -> list[tuple[int, bytes]]:
        """Hold the dialogue; return the replies to MAIL FROM and RCPT TO."""
        with smtplib.SMTP("127.0.0.1", postfix.port, local_hostname="test", timeout=150) as session:
            session.command_encoding = "utf-8"
            session.ehlo()
            assert session.docmd("XCLIENT", self.client)[0] == 220
            session.ehlo(self.helo)
            mail = session.docmd("MAIL", f"FROM:<{self.sender}>")
            return [mail, session.docmd("RCPT", f"TO:<{self.recipient}>")]


STRANGER = "NAME=stranger.example.org ADDR=198.51.100.1"
DIALOGUES = [
    *map(
        Dialogue,
        # address
        [
            "user@moved.test",
            "User@Moved.TEST",
            "user+ext@moved.test",
            "user+unknown@moved.test",
            "user+@moved.test",
            "user-ext@moved.test",
            "user+a+b@moved.test",
            "user-a+b@moved.test",
            "+ext@moved.test",
            "other+ext@moved.test",
            "nobody@moved.test",
            '"quoted user"@moved.test',
            '"Quoted User"@moved.test',
            '"quoted user+ext"@moved.test',
            '"quoted user+ext"@quoted.test',
            '"quoted user"@quoted.test',
            '"user"@moved.test',
            '".dot"@moved.test',
            '".dot+ext"@moved.test',
            '"..dot"@moved.test',
            '"..dot+ext"@moved.test',
            "üser@moved.test",
            "ÜSER+ext@moved.test",
            "anyone@catch-all.test",
            "anyone+ext@catch-all.test",
            "user@catch-all.test",
            "user+ext@catch-all.test",
            "user@sub.catch-all.test",
            '"quoted one"@catch-all.test',
            "here@local.test",
            "here+ext@local.test",
            "here+other@local.test",
            '"quoted here"@local.test',
            '"quoted here+ext"@local.test',
            "here@here.test",
            "here+ext@here.test",
            "anyone@here.test",
            "not-here@moved.test",
            "nobody@local.test",
            "user@[192.0.2.1]",
            "user+ext@[192.0.2.1]",
            "anyone@[192.0.2.2]",
            "mailer-daemon@moved.test",
            "mailer-daemon+ext@catch-all.test",
            # transport
            "user@route.test",
            "user+ext@route.test",
            "user+other@route.test",
            "anyone@route.test",
            '"quoted user"@route.test',
            '"quoted user+ext"@route.test',
            "üser+ext@route.test",
            "user@sub.parent.route.test",
            "user@other.parent.route.test",
            "user@deep.other.parent.route.test",
            "user@parent.route.test",
            "user@other.route.test",
            "user@domain.top",
            "user@top",
            "user@[192.0.2.3]",
            "user@[192.1.2.4]",
            "user@nowhere.test",
            # access
            "user@access.test",
            "USER+Ext@access.test",
            "user+other@access.test",
            "nobody@access.test",
            '"quoted user"@access.test',
            '"quoted user+ext"@access.test',
            "üser+ext@access.test",
            "anyone@domain.access.test",
            "anyone@sub.domain.access.test",
            "anyone@sub.dotted.access.test",
            "everywhere@access.test",
            "everywhere+ext@access.test",
            "everywhere+other@access.test",
            '"quoted everywhere"@access.test',
            '"quoted everywhere+ext"@access.test',
            "user@[192.0.2.5]",
            "user@[192.0.2.6]",
        ],
    ),
    Dialogue("nobody@moved.test", sender=""),
    Dialogue("nobody@moved.test", sender="sender@access.test"),
    Dialogue("nobody@moved.test", sender="Sender+ext@Access.test"),
    Dialogue("nobody@moved.test", helo="helo.access.test"),
    Dialogue("nobody@moved.test", helo="Sub.Helo.Access.test"),
    Dialogue("nobody@moved.test", helo="[192.0.2.6]"),
    Dialogue("nobody@moved.test", helo="[203.0.113.7]"),
    *(
        Dialogue("user@relay.test", client=client)
        for client in (
            "NAME=client.access.test ADDR=198.51.100.2",
            "NAME=Sub.Client.access.test ADDR=198.51.100.2",
            "NAME=other.access.test ADDR=198.51.100.2",
            "NAME=[UNAVAILABLE] ADDR=203.0.113.7",
            "NAME=[UNAVAILABLE] ADDR=203.0.113.8",
            "NAME=[UNAVAILABLE] ADDR=203.0.112.8",
            "NAME=[UNAVAILABLE] ADDR=203.1.2.3",
            "NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8:1::1",
            "NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8:1::2",
            "NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8:2::1",
            "NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8:2:3::1",
            "NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8:3::1",
            "NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8:3:4::1",
        )
    ),
    *(
        Dialogue(recipient, client=STRANGER)
        for recipient in (
            "user@relay.test",
            "user@sub.relay.test",
            "user@deep.sub.relay.test",
            "user@other.test",
            "user@sub.other.test",
            "user@dotted.test",
            "user@sub.dotted.test",
            "user@[192.0.2.7]",
            "user@test",
        )
    ),
]


@pytest.fixture(scope="module")
def native_postfix(start_postfix: StartPostfix, directory: Path) -> Postfix:
    tables = SEARCHES | {"aliases": ALIASES}
    for name, text in tables.items():
        (directory / name).write_text(text)
    return start_postfix(main({name: f"texthash:{directory}/{name}" for name in tables}))


@pytest.fixture(scope="module")
def socketmap_postfix(
    native_postfix: Postfix, start_postfix: StartPostfix, start_daemon: StartDaemon, directory: Path
) -> Postfix:
    common = {"recipient_delimiter": "+-", "index_dir": f"{directory}/index"}
    address = {"search": "address", "local_domains": ["local.test", "here.test"]}
    tables: dict[str, dict[str, object]] = {search: {"search": search} for search in SEARCHES}
    tables["address"] |= address
    tables["aliases"] = {**address, "propagate_extension": True}
    daemon = start_daemon("".join(toml(name, "file", directory, common | table) for name, table in tables.items()))
    return start_postfix(main({name: daemon.table("unix", name) for name in tables}))


def main(table: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of a Postfix whose tables show in what it says to a client."""
    access = table["access"]
    return {
        "recipient_delimiter": "+-",
        "inet_protocols": "all",
        "mynetworks": "127.0.0.0/8",
        "mydestination": "local.test, here.test",
        "local_recipient_maps": "",
        "local_transport": "discard:",
        "relay_transport": "discard:",
        "default_transport": "discard:",
        "relocated_maps": table["address"],
        "transport_maps": table["transport"],
        "relay_domains": table["domain"],
        "virtual_alias_maps": table["aliases"],
        "smtpd_recipient_restrictions": ", ".join(
            f"check_{what}_access {access}" for what in ("client", "helo", "sender", "recipient")
        ),
        "smtpd_authorized_xclient_hosts": "127.0.0.1",
    }


@pytest.fixture(scope="module")
def native_replies(native_postfix: Postfix) -> dict[Dialogue, list[tuple[int, bytes]]]:
    return {dialogue: dialogue.take_place(native_postfix) for dialogue in DIALOGUES}


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=lambda dialogue: "-".join(dialogue)[:60])
def test_smtpd_says_the_same(
    native_replies: dict[Dialogue, list[tuple[int, bytes]]], socketmap_postfix: Postfix, dialogue: Dialogue
) -> None:
    assert dialogue.take_place(socketmap_postfix) == native_replies[dialogue]


@pytest.mark.parametrize("text", [ADDRESS, TRANSPORT, ACCESS], ids=["address", "transport", "access"])
def test_the_dialogues_show_what_the_tables_hold(
    native_replies: dict[Dialogue, list[tuple[int, bytes]]], text: str
) -> None:
    said = [replies[-1][1].decode() for replies in native_replies.values()]
    for key, value in re.findall(r'^("[^"]*"\S*|\S+) +(?:REJECT |error:5.1.1 )?(.*)$', text, re.MULTILINE):
        if value != "discard:":
            assert any(reply.endswith(f" {value}") for reply in said) is (value != "never"), key


def deliver(postfix: Postfix) -> list[str]:
    """Send one mail to all of ALIASED; return what became of them."""
    with smtplib.SMTP("127.0.0.1", postfix.port, local_hostname="test", timeout=150) as session:
        session.ehlo()
        session.mail("sender@example.org")
        for recipient in ALIASED:
            assert session.docmd("RCPT", f"TO:<{recipient}>")[0] == 250
        queue_id = session.data(b"Subject: test\r\n\r\ntest\r\n")[1].decode().rpartition(" ")[2]
    postfix.logged(f"{queue_id}: removed")
    return sorted(re.findall(r"to=<.*>, orig_to=<.*>", postfix.log()))


def test_an_extension_is_propagated_as_postfix_propagates_it(
    native_postfix: Postfix, socketmap_postfix: Postfix
) -> None:
    native = deliver(native_postfix)
    assert 'to=<"a b+ext"@moved.test>, orig_to=<user+ext@alias.test>' in native
    assert deliver(socketmap_postfix) == native
