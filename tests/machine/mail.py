"""Mail on a machine: its Postfix, set up with lines for main.cf, and what became of a mail."""

from __future__ import annotations

import re

from tests.machine.machine import Machine
from tests.waiting import eventually

_SEND = """\
import smtplib, sys
with smtplib.SMTP("127.0.0.1", timeout=100) as session:
    session.ehlo()
    session.mail("sender@client.example")
    code, text = session.rcpt(sys.argv[1])
    if code == 250:
        code, text = session.data(b"Subject: hello\\r\\n\\r\\nhello\\r\\n")
    print(code, text.decode())
"""


def configure(machine: Machine, *lines: str) -> None:
    """Have the machine's Postfix, chrooted, take mail as *lines* of main.cf say; what it delivers is thrown away."""
    machine.run("postconf", "virtual_transport=discard:", "mynetworks=", "maillog_file=/var/log/mail.log", *lines)
    machine.run("postconf", "-F", "smtp/inet/chroot=y", "cleanup/unix/chroot=y")
    # What postfix(1) copies into the chroot at a start is not needed; to reload keeps systemd's idea of it right.
    machine.run("postfix", "stop", check=False)
    machine.run("systemctl", "restart", "postfix")
    eventually(lambda: _answers(machine), within=60, what="Postfix answers")


def _answers(machine: Machine) -> bool:
    listening = machine.run("ss", "--listening", "--tcp", "--numeric", "--no-header").stdout
    return re.search(r":25\b", listening) is not None


def send(machine: Machine, recipient: str) -> str:
    """Send a mail to *recipient*; return what smtpd(8) said: its last code and text."""
    return machine.run("python3", "-c", _SEND, recipient).stdout.strip()


def deliver(machine: Machine, recipient: str, final: str) -> str:
    """Send a mail to *recipient* and return the line of the log that says what became of it, for address *final*."""
    answer = send(machine, recipient)
    assert answer.startswith("250 "), answer
    queue_id = answer.rpartition(" ")[2]

    def line() -> str:
        log = machine.run("cat", "/var/log/mail.log").stdout
        found = re.search(rf"^.*\b{queue_id}: to=<{re.escape(final)}>.* status=.*$", log, flags=re.MULTILINE)
        assert found, log
        return found[0]

    return eventually(line, within=60)


def assert_the_samples_deliver(machine: Machine) -> None:
    """Have a chrooted Postfix ask the maps of the sample configuration, over TCP and over the Unix socket."""
    configure(
        machine,
        "virtual_mailbox_domains=socketmap:inet:127.0.0.1:27823:domains",
        "virtual_alias_maps=socketmap:unix:socketmap/sock:aliases",
    )
    assert "status=sent" in deliver(machine, "info@example.com", "alice@example.com")
    assert send(machine, "somebody@elsewhere.example").startswith("454 ")
