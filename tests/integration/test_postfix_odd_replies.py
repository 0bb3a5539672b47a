"""Lookup functions that return what Postfix cannot take: it costs that one lookup, and never the ones behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefork_socketmap import Server
from tests.integration.conftest import StartPostfix
from tests.integration.postfix import Postfix, Session
from tests.integration.servers.process import free_port

TABLES = {
    "domains": {"example.com": "found"},
    "mailboxes": {"user@example.com": "found"},
    "aliases": {"alias@example.com": "user@example.com"},
    "access": {"rejected@example.com": "REJECT not welcome"},
}

# What is odd, by how the key begins: long-access@example.com, or long-domains.test for a domain.
ODD = {
    # Postfix would go on reading it as the answers to the next lookups.
    "long": "x" * 150_000,
    # Postfix would cut it, and accept the mail.
    "nul": "OK\0 or not",
    "empty": "",
    "blank": " ",
}


def lookup_in(name: str) -> Callable[[str], str | None]:
    """Return the lookup function of the table *name*, which is odd for those keys that have the name in them."""

    def lookup(key: str) -> str | None:
        what, dash, where = key.lower().partition("-")
        return ODD[what] if dash and where.startswith(name) else TABLES[name].get(key.lower())

    return lookup


@pytest.fixture(scope="module", params=["inet", "unix"])
def endpoint(request: pytest.FixtureRequest, open_directory: Path) -> Iterator[str]:
    server = Server()
    for name in TABLES:
        server.register_map(name, lookup_in(name))
    server.listen(f"inet:127.0.0.1:{free_port()}" if request.param == "inet" else f"unix:{open_directory}/socket")
    with server.start() as running:
        yield running.endpoints[0]


@pytest.fixture(scope="module")
def postfix(endpoint: str, start_postfix: StartPostfix) -> Postfix:
    return start_postfix(
        {
            "virtual_mailbox_domains": f"socketmap:{endpoint}:domains",
            "virtual_mailbox_maps": f"socketmap:{endpoint}:mailboxes",
            "virtual_alias_maps": f"socketmap:{endpoint}:aliases",
            "smtpd_recipient_restrictions": f"check_recipient_access socketmap:{endpoint}:access",
        }
    )


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("what", ODD)
def test_the_lookups_after_an_odd_reply_are_right(postfix: Postfix, session: Session, what: str, name: str) -> None:
    postfix.clear_log()
    recipient = f"user@{what}-{name}.test" if name == "domains" else f"{what}-{name}@example.com"

    assert session.try_recipient(recipient)[0] == 451

    reason = "reply too large" if what == "long" else "invalid reply"
    postfix.logged(f":{name} socketmap server temporary error: {reason}")
    # Each map finds something and does not find something, over the same connections.
    assert session.try_recipient("user@example.com")[0] == 250
    assert session.try_recipient("alias@example.com")[0] == 250
    assert session.try_recipient("nobody@example.com")[0] == 550
    assert "not welcome" in session.try_recipient("rejected@example.com")[1]
    assert "Relay access denied" in session.try_recipient("user@elsewhere.test")[1]
    assert session.try_recipient("user@example.com")[0] == 250
