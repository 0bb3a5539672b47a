"""A real Postfix that forwards mail with the type ``srs``: out with the rewritten sender, and the bounce comes back.

The rest of the world, whose mail is forwarded and where to, is another Postfix. What it logs is what it was told.
"""

from __future__ import annotations

import re

import pytest

from tests.integration.conftest import StartDaemon, StartPostfix
from tests.integration.daemon import Daemon
from tests.integration.postfix import Postfix

CONFIG = "".join(
    f"""
[maps.{original_envelope}-{direction}]
type = "srs"
direction = "{direction}"
domain = "fwd.test"
local_domains = [".forwarder.test"]
secret_file = "secrets"
original_envelope = "{original_envelope}"
{'envelope_database = { dbpath = "senders.sqlite" }' if original_envelope == "database" else ""}
"""
    for original_envelope in ("embedded", "database")
    for direction in ("forward", "reverse")
)
SENDERS = [
    "sender@sender.test",
    "A.Sender+ext@Sender.TEST",
    "s=s=s@sender.test",
    '"a sender"@sender.test',
    '"a\\"b"@sender.test',
    "ü@sender.test",
    "x" * 60 + "@sender.test",
    "SRS0=abcd=AA=first.test=sender@sender.test",
]


@pytest.fixture(scope="module")
def daemon(start_daemon: StartDaemon) -> Daemon:
    return start_daemon(CONFIG, {"secrets": "secret\n"}, mode=0o600)


@pytest.fixture(scope="module")
def world(start_postfix: StartPostfix) -> Postfix:
    return start_postfix(
        {
            "virtual_mailbox_domains": "sender.test destination.test",
            "virtual_mailbox_maps": "static:found",
            "smtpd_recipient_restrictions": "check_recipient_access inline:{refused@destination.test=REJECT}",
        }
    )


@pytest.fixture(scope="module", params=["embedded", "database"])
def forwarder(request: pytest.FixtureRequest, daemon: Daemon, world: Postfix, start_postfix: StartPostfix) -> Postfix:
    aliases = "alias@forwarder.test=user@destination.test, broken@forwarder.test=refused@destination.test"
    return start_postfix(
        {
            "sender_canonical_maps": daemon.table("unix", f"{request.param}-forward"),
            "sender_canonical_classes": "envelope_sender",
            "recipient_canonical_maps": daemon.table("unix", f"{request.param}-reverse"),
            "recipient_canonical_classes": "envelope_recipient, header_recipient",
            "recipient_delimiter": "+",
            "virtual_alias_domains": "forwarder.test fwd.test",
            "virtual_alias_maps": f"inline:{{{aliases}}}",
            "relayhost": f"[127.0.0.1]:{world.port}",
        }
    )


def send(postfix: Postfix, sender: str, recipient: str) -> str:
    """Send a mail; return its queue id."""
    with postfix.smtp() as session:
        session.ehlo()
        code, text = session.mail(sender, [] if f"{sender}{recipient}".isascii() else ["SMTPUTF8"])
        assert code == 250, text
        return session.deliver(recipient)


def sender_seen_by(world: Postfix, forwarder: Postfix, queue_id: str) -> str:
    """Return the sender with which the mail *queue_id* has arrived in the world."""
    line = forwarder.logged(queue_id, "status=sent")
    match = re.search(r"queued as (\w+)", line)
    assert match, line
    from_ = re.search("from=<(.*)>, size=", world.logged(match[1], "qmgr", "from="))
    assert from_
    return from_[1]


@pytest.mark.parametrize("sender", SENDERS)
def test_forwarded_mail_leaves_with_the_rewritten_sender_and_a_bounce_comes_back(
    forwarder: Postfix, world: Postfix, sender: str
) -> None:
    rewritten = sender_seen_by(world, forwarder, send(forwarder, sender, "alias@forwarder.test"))

    assert rewritten.endswith("@fwd.test")
    assert "SRS" in rewritten[:5]

    world.clear_log()
    bounce = send(forwarder, "", rewritten)

    line = forwarder.logged(bounce, "status=sent")
    assert f"to=<{sender}>, " in line
    assert sender_seen_by(world, forwarder, bounce) == ""


def test_a_bounce_of_the_forwarder_itself_goes_to_the_first_sender(forwarder: Postfix) -> None:
    forwarder.clear_log()
    queue_id = send(forwarder, "sender@sender.test", "broken@forwarder.test")

    match = re.search("sender non-delivery notification: ([0-9A-Za-z]+)", forwarder.logged(queue_id, "notification"))
    assert match
    assert "to=<sender@sender.test>" in forwarder.logged(match[1], "status=sent")


def test_a_local_sender_stays_as_it_is(forwarder: Postfix, world: Postfix) -> None:
    queue_id = send(forwarder, "user@sub.forwarder.test", "alias@forwarder.test")

    assert sender_seen_by(world, forwarder, queue_id) == "user@sub.forwarder.test"


def test_a_bounce_stays_one_when_it_is_forwarded(forwarder: Postfix, world: Postfix) -> None:
    assert sender_seen_by(world, forwarder, send(forwarder, "", "alias@forwarder.test")) == ""


def test_mail_to_a_forged_or_cut_off_address_is_rejected_in_the_session(forwarder: Postfix, world: Postfix) -> None:
    rewritten = sender_seen_by(world, forwarder, send(forwarder, "sender@sender.test", "alias@forwarder.test"))
    local = rewritten.partition("@")[0]

    for forged in (f"SRS0=XXXX{local[9:]}@fwd.test", f"{local[:-1]}@fwd.test", "SRS0=@fwd.test"):
        with forwarder.smtp() as session:
            session.ehlo()
            session.docmd("MAIL FROM:<>")
            code, text = session.try_recipient(forged)
            assert (code, "User unknown" in text) == (550, True), text
