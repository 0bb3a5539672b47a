"""What is done to a server while clients and a Postfix ask it, and what of that they notice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import smtplib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Self

from prefork_socketmap.client import LookupFailed, SocketmapClient
from tests.daemon.installation import Installation
from tests.integration.audience import Audience
from tests.integration.postfix import Postfix
from tests.integration.servers.redis import Redis
from tests.processes import descriptors, process_status
from tests.smalldisk import SmallDisk
from tests.threads import Threads
from tests.waiting import eventually

CLIENTS = 200
SETTLED = 60.0  # seconds, within which a busy machine has come to rest
_BREATH = 0.2  # seconds between two things that happen
_STOPPED = 0.3  # seconds for which a worker is stopped
_CUT = 1.0  # seconds for which the backend is away
_FULL = 0.5  # seconds for which there is no room on the disk
_NOTICED = 5.0  # seconds, within which a backend that is back is used again
_FIRST_CONNECTION = 1024  # descriptors from here on are connections
_MOST_GROWTH = 16 << 10  # kB that the master may have grown: fragments, not leaks

_ANSWERS = """
def echo(key):
    return key
"""

_MAPS = """
[maps.echo]
type = "python"
path = ["."]
function = "answers:echo"

[maps.stock]
type = "redis"
hosts = ["127.0.0.1:{port}"]
timeout = 1
query = "GET %s"
"""


@dataclass(frozen=True)
class Census:
    """What a server at rest is made of."""

    workers: int
    descriptors: Counter[str]
    memory: int
    """Of the master, in kB."""


@dataclass
class Result:
    """What was counted."""

    before: Census
    after: Census
    done: Counter[str]
    mails: int = 0
    sent: int = 0
    deferred: int = 0
    """Recipients that Postfix did not accept at once, and mails that it could not deliver at once."""
    lookup_errors: int = 0
    """Warnings and lookup errors in the mail log."""
    in_queue: str = ""
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    """Connections that ended, and answers that did not come."""
    stock: Counter[str] = field(default_factory=Counter)
    """What became of the lookups in the map with a backend."""

    def problems(self) -> list[str]:
        """Return what must not be."""
        found = {
            "wrong answers": self.wrong,
            "more ends of connections than workers killed": len(self.ends) > self.done["kill"] and self.ends,
            "more deferrals than workers killed": self.deferred > self.done["kill"] and self.deferred,
            "more lookup errors than workers killed": self.lookup_errors > self.done["kill"] and self.lookup_errors,
            "mails that were not delivered": self.mails - self.sent,
            "mails in the queue": self.in_queue,
            "lookups that failed although the backend was there": self.stock["failed"],
            "wrong answers of the backend": self.stock["wrong"],
            "other numbers of workers": self.after.workers != self.before.workers and self.after.workers,
            "more descriptors": self.after.descriptors - self.before.descriptors,
            "more memory (kB)": max(self.after.memory - self.before.memory - _MOST_GROWTH, 0),
        }
        return [f"{what}: {value}" for what, value in found.items() if value]

    def __str__(self) -> str:
        lines = {
            "done": dict(self.done),
            "mails accepted, delivered": (self.mails, self.sent),
            "deferrals, lookup errors": (self.deferred, self.lookup_errors),
            "answers": self.answers,
            "wrong answers, ends of connections": (len(self.wrong), len(self.ends)),
            "lookups with a backend": dict(self.stock),
            "workers": (self.before.workers, self.after.workers),
            "descriptors": (self.before.descriptors.total(), self.after.descriptors.total()),
            "memory of the master, kB": (self.before.memory, self.after.memory),
        }
        return "\n".join(f"{what}: {value}" for what, value in lines.items())


class Campaign:
    """A server, a Postfix that asks it, and a Redis that it asks."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._done: Counter[str] = Counter()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._backend = Redis()
            stack.callback(self._backend.close)
            self._backend.start()
            self._backend.client().set("apples", "12")
            self._installation = stack.enter_context(Installation())
            self._disk = self._small_disk(stack)
            self._start_server()
            self._postfix = stack.enter_context(Postfix(self._parameters()))
            self._postfix.start()
            self._stack = stack.pop_all()
        return self

    def _small_disk(self, stack: contextlib.ExitStack) -> SmallDisk | None:
        """Return a disk of its own for what the server writes; None where that is not allowed."""
        self._installation.runtime_dir.mkdir()
        with contextlib.suppress(PermissionError):
            disk = stack.enter_context(SmallDisk(self._installation.runtime_dir))
            stack.callback(self._installation.run, "stop")  # while the pid file is still to be seen
            return disk
        return None

    def _start_server(self) -> None:
        installation = self._installation
        self._endpoints = [installation.endpoint, f"unix:{installation.directory}/sock"]
        (installation.directory / "answers.py").write_text(_ANSWERS)
        listen = ", ".join(f'"{endpoint}"' for endpoint in self._endpoints)
        maps = _MAPS.format(port=self._backend.port)
        installation.configure("max_idle = 2\n", listen=f"[{listen}]", maps=maps)
        self._master = installation.start().pid

    def _parameters(self) -> dict[str, str]:
        inet, unix = (f"socketmap:{endpoint}:echo" for endpoint in self._endpoints)
        return {
            "virtual_mailbox_domains": unix,
            "virtual_mailbox_maps": inet,
            "virtual_alias_maps": f"{unix}, {inet}",
            "max_use": "5",  # processes come and go, and their connections with them
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def logs(self) -> str:
        """Return the end of what server and Postfix have logged, and all that the latter complains of."""
        return "\n".join([*self._installation.log.read_text().splitlines()[-100:], *self._postfix.complaints()])

    def run(self, seconds: float) -> Result:
        """Let things happen for so long, each at least once; return what was counted."""
        self._reload()  # what a first one takes is not a leak
        before = self._census()
        mailer, stock = Mailer(self._postfix), Stock(self._installation.endpoint)
        with Audience(self._endpoints, "echo", CLIENTS, interval=0.5) as audience, mailer, stock:
            self._suffer(stock, monotonic() + seconds)
        eventually(lambda: not self._postfix.queue(), SETTLED, "all mail has left")
        log = self._postfix.log()
        losses = audience.failures
        return Result(
            before,
            self._census(before),
            self._done,
            mails=mailer.accepted,
            sent=log.count("status=sent"),
            deferred=mailer.deferred + log.count("status=deferred"),
            lookup_errors=len(self._postfix.complaints()),
            in_queue=self._postfix.queue(),
            answers=audience.answers,
            wrong=[each for each in losses if "in place of" in each],
            ends=[each for each in losses if "in place of" not in each],
            stock=stock.counted,
        )

    def _suffer(self, stock: Stock, end: float) -> None:
        hardships: dict[str, Callable[[], None]] = {
            "kill": self._kill,
            "kill all": self._kill_all,
            "stop": self._stop,
            "reload": self._reload,
            "upgrade": self._upgrade,
            "cut": partial(self._cut, stock),
        }
        if self._disk:
            hardships["fill the disk"] = partial(self._fill, self._disk)
        order = list(hardships)
        while order or monotonic() < end:
            order = order or self._chance.choices(list(hardships), k=len(hardships))
            name = order.pop()
            hardships[name]()
            self._done[name] += 1
            time.sleep(_BREATH)

    # What happens.

    def _worker(self) -> int:
        return self._chance.choice(self._ready())

    def _ready(self) -> list[int]:
        return eventually(self._installation.workers, SETTLED, "workers")

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._worker(), signal.SIGKILL)

    def _kill_all(self) -> None:
        for worker in self._ready():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
            self._done["kill"] += 1

    def _stop(self) -> None:
        worker = self._worker()
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGSTOP)
            time.sleep(_STOPPED)
            os.kill(worker, signal.SIGCONT)

    def _reload(self) -> None:
        self._change(signal.SIGHUP)

    def _upgrade(self) -> None:
        self._change(signal.SIGUSR2)

    def _change(self, number: signal.Signals) -> None:
        generation = self._installation.state()["generation"] + 1
        os.kill(self._master, number)
        self._installation.await_generation(generation, SETTLED)

    def _cut(self, stock: Stock) -> None:
        stock.is_excused = True
        self._backend.freeze()
        time.sleep(_CUT)
        self._backend.thaw()
        stock.excuse_until(monotonic() + _NOTICED)

    def _fill(self, disk: SmallDisk) -> None:
        """Leave no room on the disk; a worker dies then, and a reload can be noted nowhere."""
        disk.fill()
        self._kill()
        self._done["kill"] += 1
        os.kill(self._master, signal.SIGHUP)
        time.sleep(_FULL)
        disk.empty()
        eventually(lambda: self._installation.run("reload").returncode == 0, SETTLED, "a reload succeeds")

    # What is counted.

    def _census(self, like: Census | None = None) -> Census:
        """Count when all is at rest; with *like*, wait until there is no more of anything than then."""

        def counted() -> Census:
            return Census(
                len(self._installation.idle_workers()),
                descriptors(self._master, below=_FIRST_CONNECTION),
                int(process_status(self._master)["VmRSS"][0]),
            )

        def at_rest() -> Census:
            found = counted()
            assert not like or (found.workers == like.workers and not found.descriptors - like.descriptors)
            return found

        with contextlib.suppress(AssertionError):
            return eventually(at_rest, SETTLED)
        return counted()


class Mailer(Threads):
    """Sends mail without a pause."""

    def __init__(self, postfix: Postfix) -> None:
        super().__init__([self._send])
        self._postfix = postfix
        self.accepted = 0
        self.deferred = 0

    def _send(self) -> None:
        number = 0
        while not self.enough.is_set():
            number += 1
            try:
                with self._postfix.transaction() as session:
                    self._mail(session, f"user{number}@example.com")
            except smtplib.SMTPException:
                self.deferred += 1

    def _mail(self, session: smtplib.SMTP, recipient: str) -> None:
        if session.rcpt(recipient)[0] != 250:
            self.deferred += 1
        elif session.data("Subject: hello\r\n\r\nhello\r\n")[0] == 250:
            self.accepted += 1
        else:
            self.deferred += 1


class Stock(Threads):
    """Asks the map with a backend, as Postfix would; it may fail while the backend is away."""

    def __init__(self, endpoint: str) -> None:
        super().__init__([self._ask])
        self._endpoint = endpoint
        self._excused_until = 0.0
        self.is_excused = False
        self.counted: Counter[str] = Counter()

    def excuse_until(self, when: float) -> None:
        """A lookup that begins later has to be answered."""
        self._excused_until, self.is_excused = when, False

    def _ask(self) -> None:
        with SocketmapClient(self._endpoint) as client:
            while not self.enough.wait(0.01):
                began = monotonic()
                try:
                    self.counted["right" if client.lookup("stock", "apples") == "12" else "wrong"] += 1
                except LookupFailed:
                    excused = self.is_excused or began < self._excused_until
                    self.counted["failed, the backend being away" if excused else "failed"] += 1
