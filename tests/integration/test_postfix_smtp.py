"""An SMTP session with a Postfix that asks the daemon about domains, mailboxes, aliases and access."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.conftest import StartDaemon, StartPostfix
from tests.integration.daemon import Daemon
from tests.integration.postfix import Postfix, Session
from tests.waiting import eventually

CONFIG = """
[maps.domains]
type = "static"
entries = { "example.com" = "found" }

[maps.mailboxes]
type = "static"
entries = { "user@example.com" = "found" }

[maps.aliases]
type = "static"
entries = { "alias@example.com" = "user@example.com" }

[maps.access]
type = "static"
entries = { "rejected@example.com" = "REJECT not welcome" }

[maps.trouble]
type = "python"
function = "trouble:lookup"
path = ["."]
"""

TROUBLE = '''
import os
import signal
from pathlib import Path

from prefork_socketmap import Reply


def lookup(key):
    match key.partition("@")[0]:
        case "temp":
            return Reply.temp_fail("no database")
        case "perm":
            return Reply.perm_fail("no table")
        case "late":
            raise TimeoutError
        case "broken":
            raise RuntimeError("a bug in the map")
        case "deadly":
            return die_once(key)
    return None


def die_once(key):
    """Wait to be killed; the second worker that is asked answers."""
    marker = Path(__file__).with_name("deadly.pid")
    if not marker.exists():
        marker.with_suffix(".new").write_text(str(os.getpid()))
        marker.with_suffix(".new").rename(marker)
        signal.pause()
    return "REJECT answered by the second worker"
'''


@pytest.fixture(scope="module")
def daemon(start_daemon: StartDaemon) -> Daemon:
    return start_daemon(CONFIG, {"trouble.py": TROUBLE})


@pytest.fixture(scope="module", params=["inet", "unix"])
def postfix(request: pytest.FixtureRequest, daemon: Daemon, start_postfix: StartPostfix) -> Postfix:
    def table(name: str) -> str:
        return daemon.table(request.param, name)

    return start_postfix(
        {
            "virtual_mailbox_domains": table("domains"),
            "virtual_mailbox_maps": table("mailboxes"),
            "virtual_alias_maps": table("aliases"),
            "smtpd_recipient_restrictions": (
                f"check_recipient_access {table('trouble')} check_recipient_access {table('access')}"
            ),
        }
    )


def test_mail_for_a_mailbox_is_accepted_and_delivered(postfix: Postfix, session: Session) -> None:
    queue_id = session.deliver("user@example.com")

    postfix.logged(queue_id, "to=<user@example.com>", "status=sent")


@pytest.mark.parametrize("alias", ["alias@example.com", "Alias@Example.COM"])
def test_mail_for_an_alias_is_delivered_to_its_target(postfix: Postfix, session: Session, alias: str) -> None:
    queue_id = session.deliver(alias)

    postfix.logged(queue_id, f"to=<user@example.com>, orig_to=<{alias}>", "status=sent")


def test_an_access_map_rejects_a_recipient_in_its_own_words(session: Session) -> None:
    code, text = session.try_recipient("rejected@example.com")

    assert (code, text) == (554, "5.7.1 <rejected@example.com>: Recipient address rejected: not welcome")


def test_a_mailbox_that_is_not_found_is_rejected_for_good(session: Session) -> None:
    code, text = session.try_recipient("nobody@example.com")

    assert code == 550
    assert "User unknown in virtual mailbox table" in text


def test_a_domain_that_is_not_found_is_not_ours(session: Session) -> None:
    code, text = session.try_recipient("user@elsewhere.test")

    assert code == 554
    assert "Relay access denied" in text


@pytest.mark.parametrize(
    ("user", "error"),
    [
        ("temp", "temporary error: no database"),
        ("perm", "permanent error: no table"),
        ("late", "timeout error: lookup timed out"),
        ("broken", "temporary error: lookup failed"),
    ],
)
def test_a_lookup_that_fails_defers_the_mail(postfix: Postfix, session: Session, user: str, error: str) -> None:
    assert session.try_recipient(f"{user}@example.com")[0] == 451

    postfix.logged(f"trouble socketmap server {error}")
    assert session.try_recipient("user@example.com")[0] == 250


def test_a_worker_that_is_killed_in_the_middle_of_a_lookup_costs_nothing(daemon: Daemon, session: Session) -> None:
    marker = daemon.directory / "deadly.pid"
    marker.unlink(missing_ok=True)

    with ThreadPoolExecutor() as threads:
        answer = threads.submit(session.try_recipient, "deadly@example.com")
        os.kill(eventually(lambda: _pid_in(marker)), signal.SIGKILL)
        _, text = answer.result(60)

    assert "answered by the second worker" in text
    assert session.try_recipient("user@example.com")[0] == 250


def _pid_in(marker: Path) -> int:
    return int(marker.read_text()) if marker.exists() else 0
