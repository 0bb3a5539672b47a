"""Hundreds of clients ask all the time, while everything that can happen to workers happens: nobody notices.

How fast it all is, the bench measures; here only what must hold on any machine is asserted.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.daemon.installation import Installation
from tests.integration.audience import Audience
from tests.integration.conftest import StartPostfix
from tests.integration.postfix import Postfix
from tests.processes import descriptors
from tests.threads import Threads
from tests.waiting import eventually

SETTLED = 60.0  # seconds, within which a busy machine has come to rest
SLEEP = 2.0  # seconds that a lookup in the map sleepy takes
_FIRST_CONNECTION = 1024  # connections have the numbers from here on

ECHO = """
import time

def echo(key):
    return key

def sleepy(key):
    time.sleep(SLEEP)
    return key
"""

MAPS = """
[maps.echo]
type = "python"
path = ["."]
function = "answers:echo"

[maps.sleepy]
type = "python"
path = ["."]
function = "answers:sleepy"
"""


class House:
    """An installation that answers every key with itself, on TCP and on a Unix socket."""

    def __init__(self, installation: Installation, limits: str = "") -> None:
        self.installation = installation
        self.endpoints = [installation.endpoint, f"unix:{installation.directory}/sock"]
        (installation.directory / "answers.py").write_text(f"SLEEP = {SLEEP}\n{ECHO}")
        listen = ", ".join(f'"{endpoint}"' for endpoint in self.endpoints)
        # Workers that the crowd has brought forth leave soon after it.
        installation.configure(f"max_idle = 2\n{limits}", listen=f"[{listen}]", maps=MAPS)
        self._process = installation.start()
        self._fresh = self._descriptors()

    def change(self, number: signal.Signals) -> None:
        """Reload, or upgrade, and wait until it has taken effect."""
        generation = self.installation.state()["generation"] + 1
        self._process.send_signal(number)
        self.installation.await_generation(generation, SETTLED)

    def assert_descriptors_are_those_of_a_fresh_start(self) -> None:
        """All clients have left: so has whatever was opened for them."""

        def level() -> bool:
            try:
                found = self._descriptors()
            except FileNotFoundError:
                return False  # a worker was just leaving
            assert found == self._fresh, f"{found - self._fresh} more, {self._fresh - found} less"
            return True

        eventually(level, SETTLED)

    def _descriptors(self) -> Counter[tuple[str, str]]:
        """Return the kinds of descriptors in the master, and in each of the workers, if these do not differ."""
        workers = self.installation.idle_workers()
        # Those that workers keep of connections which they have served are no concern: see descriptors.py.
        in_workers = [descriptors(worker, below=_FIRST_CONNECTION) for worker in workers]
        assert all(each == in_workers[0] for each in in_workers), in_workers
        master = descriptors(self._process.pid)
        return Counter({("master", kind): number for kind, number in master.items()}) + Counter(
            {("worker", kind): number for kind, number in in_workers[0].items()}
        )


@pytest.fixture
def installation() -> Iterator[Installation]:
    with Installation() as made:
        yield made
        print(made.log.read_text())  # what pytest shows of a test that failed


def assert_everybody_was_answered(audience: Audience) -> None:
    assert audience.failures == []
    assert min(member.answers for member in audience.members) > 0


@pytest.mark.parametrize("limits", ["", "max_use = 10\n"], ids=["long lives", "max_use = 10"])
def test_nobody_notices_50_reloads(installation: Installation, limits: str) -> None:
    house = House(installation, limits)
    with Audience(house.endpoints, "echo", 500, interval=1) as audience:
        for _ in range(50):
            house.change(signal.SIGHUP)
            audience.await_answers(30)  # each generation serves, and nobody is left out however fast the machine is
    assert_everybody_was_answered(audience)
    house.assert_descriptors_are_those_of_a_fresh_start()


def test_postfix_delivers_all_mail_during_5_upgrades(installation: Installation, start_postfix: StartPostfix) -> None:
    house = House(installation)
    inet, unix = (f"socketmap:{endpoint}:echo" for endpoint in house.endpoints)
    postfix = start_postfix(
        {
            "virtual_mailbox_domains": unix,
            "virtual_mailbox_maps": inet,
            "virtual_alias_maps": f"{unix}, {inet}",
            # Processes come and go, and their connections with them.
            "max_use": "5",
        }
    )
    with Audience(house.endpoints, "echo", 500, interval=1) as audience, Sender(postfix) as sender:
        for _ in range(5):
            house.change(signal.SIGUSR2)
            sender.await_mails(10)
            audience.await_answers(200)
    assert_everybody_was_answered(audience)
    eventually(lambda: not postfix.queue(), SETTLED, "all mail has left")
    log = postfix.log()
    assert log.count("status=sent") == sender.sent
    assert "status=deferred" not in log
    assert postfix.complaints() == []


class Sender(Threads):
    """Somebody who sends mail without a pause for as long as the context lasts."""

    def __init__(self, postfix: Postfix) -> None:
        super().__init__([self._send])
        self._postfix = postfix
        self.sent = 0
        """Mails that Postfix has accepted."""

    def _send(self) -> None:
        while not self.enough.is_set():
            with self._postfix.transaction() as session:
                session.deliver(f"user{self.sent}@example.com")
            self.sent += 1

    def await_mails(self, number: int) -> None:
        """Wait until so many more have been accepted."""
        goal = self.sent + number
        eventually(lambda: self.sent >= goal or not self.are_alive, SETTLED, f"{number} mails")
        assert self.are_alive, "Postfix has refused a mail"


def test_2000_clients_that_ask_once_a_second_are_all_answered_by_16_workers(installation: Installation) -> None:
    house = House(installation, "process_limit = 16\n")
    with Audience(house.endpoints, "echo", 2000, interval=1) as audience:
        time.sleep(20)  # not for something to happen: for nothing to happen
    assert_everybody_was_answered(audience)
    house.assert_descriptors_are_those_of_a_fresh_start()


def test_16_workers_share_themselves_out_among_200_busy_clients(installation: Installation) -> None:
    house = House(installation, "process_limit = 16\n")
    with Audience(house.endpoints[:1], "echo", 200, interval=0) as audience:
        eventually(lambda: audience.answers > 40_000, SETTLED, "40000 answers")
    assert_everybody_was_answered(audience)
    answers = [member.answers for member in audience.members]
    assert min(answers) >= statistics.median(answers) / 3
    house.assert_descriptors_are_those_of_a_fresh_start()


def test_lookups_that_sleep_do_not_hold_up_the_others(installation: Installation) -> None:
    house = House(installation, "process_limit = 30\n")

    def p90(audience: Audience) -> float:
        # Not p99: one moment in which the machine stands still would be all of it.
        return statistics.quantiles(audience.latencies, n=10)[8]

    with Audience(house.endpoints, "echo", 100, interval=0.2) as undisturbed:
        time.sleep(5)
    with (
        Audience(house.endpoints, "sleepy", 10, interval=0) as sleepers,
        Audience(house.endpoints, "echo", 100, interval=0.2) as disturbed,
    ):
        eventually(lambda: sleepers.answers >= 30, SETTLED, "30 lookups that sleep")
    for audience in undisturbed, sleepers, disturbed:
        assert_everybody_was_answered(audience)
    # A lookup that waits for one of the others to end takes a second on average. What a busy machine does is less.
    assert p90(disturbed) < p90(undisturbed) + SLEEP / 4
    house.assert_descriptors_are_those_of_a_fresh_start()
