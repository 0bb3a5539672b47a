"""postmap(1) asks the daemon: the simplest Postfix client there is."""

from __future__ import annotations

import pytest

from tests.integration.conftest import StartDaemon
from tests.integration.daemon import Daemon
from tests.integration.postfix import Postfix

KEYS = 3000
LONGEST = 100_000 - len("OK ")

CONFIG = """
[maps.numbers]
type = "python"
function = "numbers:square"
path = ["."]
fold = false

[maps.virtual]
type = "static"
entries = { "user@example.com" = "box", "two words" = "found", "grün@example.com" = "ja, natürlich" }
"""

NUMBERS = f"""
from prefork_socketmap import Reply

def square(key):
    if key == "longest":
        return "x" * {LONGEST}
    if key == "temp":
        return Reply.temp_fail("no database")
    return str(int(key) ** 2) if key.isdigit() else None
"""


@pytest.fixture(scope="module")
def daemon(start_daemon: StartDaemon) -> Daemon:
    return start_daemon(CONFIG, {"numbers.py": NUMBERS})


@pytest.fixture(params=["inet", "unix"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("key", "value"),
    [("user@example.com", "box"), ("two words", "found"), ("grün@example.com", "ja, natürlich")],
)
def test_postmap_finds_a_key(unstarted_postfix: Postfix, daemon: Daemon, kind: str, key: str, value: str) -> None:
    done = unstarted_postfix.postmap("-q", key, daemon.table(kind, "virtual"))

    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, value + "\n", b"")


def test_postmap_does_not_find_an_unknown_key(unstarted_postfix: Postfix, daemon: Daemon, kind: str) -> None:
    done = unstarted_postfix.postmap("-q", "nobody@example.com", daemon.table(kind, "virtual"))

    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_postmap_gets_every_answer_of_a_batch(unstarted_postfix: Postfix, daemon: Daemon, kind: str) -> None:
    keys = "".join(f"{number}\nno {number}\n" for number in range(KEYS))

    done = unstarted_postfix.postmap("-q", "-", daemon.table(kind, "numbers"), stdin=keys.encode())

    assert done.returncode == 0
    assert done.stdout.decode() == "".join(f"{number}\t{number**2}\n" for number in range(KEYS))


def test_postmap_accepts_the_longest_reply(unstarted_postfix: Postfix, daemon: Daemon, kind: str) -> None:
    done = unstarted_postfix.postmap("-q", "longest", daemon.table(kind, "numbers"))

    assert done.returncode == 0
    assert done.stdout == b"x" * LONGEST + b"\n"


def test_postmap_reports_the_reason_of_a_temporary_failure(
    unstarted_postfix: Postfix, daemon: Daemon, kind: str
) -> None:
    done = unstarted_postfix.postmap("-q", "temp", daemon.table(kind, "numbers"))

    assert done.returncode == 1
    assert b"socketmap server temporary error: no database" in done.stderr
