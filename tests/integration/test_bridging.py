"""``stale_ttl``: an outage of the database is bridged for every key that was asked before, by whichever worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from prefork_socketmap.client import LookupFailed, SocketmapClient
from tests.integration.conftest import StartDaemon
from tests.integration.daemon import Daemon
from tests.integration.servers.postgresql import DATABASE, PASSWORD, Postgresql
from tests.processes import children
from tests.waiting import eventually

KEYS = [f"user{number}@example.com" for number in range(10)]
WITHIN = 30


def config(postgresql: Postgresql, settings: str) -> str:
    return (
        "min_spare = 6\n[maps.aliases]\n"
        f'type = "postgresql"\nhosts = ["127.0.0.1:{postgresql.port}"]\ndbname = "{DATABASE}"\nuser = "postfix"\n'
        f"password = {json.dumps(PASSWORD)}\ntimeout = 1\n"
        f"query = \"SELECT goto FROM alias WHERE address = '%s'\"\n{settings}\n"
    )


def ask(daemon: Daemon, keys: list[str]) -> list[str | LookupFailed | None]:
    """Ask for each of *keys* over a connection of its own; return the answers, or the failures."""
    endpoint = f"unix:{daemon.directory}/socket"
    answers: list[str | LookupFailed | None] = []
    for key in keys:
        with SocketmapClient(endpoint) as client:
            try:
                answers.append(client.lookup("aliases", key))
            except LookupFailed as error:
                answers.append(error)
    return answers


def master(daemon: Daemon) -> int:
    return int((daemon.directory / "run" / "prefork-socketmap.pid").read_text())


def run(daemon: Daemon, command: str) -> None:
    arguments = [sys.executable, "-m", "prefork_socketmap", command, "-c", str(daemon.directory / "config.toml")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def replace_workers(daemon: Daemon) -> None:
    former = set(children(master(daemon)))
    for pid in former:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: children(master(daemon)) and not former & set(children(master(daemon))), WITHIN, "new workers")


def warm(daemon: Daemon, postgresql: Postgresql) -> list[str]:
    """Ask for each key once, and return the answers."""
    postgresql.execute(*(f"INSERT INTO alias VALUES ('{key}', 'box-{key}')" for key in KEYS))
    assert ask(daemon, KEYS) == [f"box-{key}" for key in KEYS]
    return [f"box-{key}" for key in KEYS]


@pytest.mark.parametrize("outage", ["stop", "freeze"])
def test_600_of_600_lookups_are_bridged_by_workers_old_and_new_and_after_a_reload(
    start_daemon: StartDaemon, postgresql: Postgresql, outage: str
) -> None:
    daemon = start_daemon(config(postgresql, 'stale_ttl = "1d"'))
    expected = warm(daemon, postgresql)
    getattr(postgresql, outage)()
    assert ask(daemon, KEYS * 20) == expected * 20
    replace_workers(daemon)
    assert ask(daemon, KEYS * 20) == expected * 20
    run(daemon, "reload")
    assert ask(daemon, KEYS * 20) == expected * 20
    assert all(isinstance(each, LookupFailed) for each in ask(daemon, ["unknown@example.com"]))
    getattr(postgresql, "start" if outage == "stop" else "thaw")()
    postgresql.execute("UPDATE alias SET goto = 'new-' || goto")
    eventually(lambda: ask(daemon, KEYS) == [f"new-{each}" for each in expected], WITHIN, "new answers")


def test_an_outage_is_bridged_through_an_upgrade_and_a_crash_of_the_server(
    start_daemon: StartDaemon, postgresql: Postgresql
) -> None:
    daemon = start_daemon(config(postgresql, 'stale_ttl = "1d"\ncache_file = "aliases.cache"'))
    expected = warm(daemon, postgresql)
    postgresql.stop()
    run(daemon, "upgrade")
    assert ask(daemon, KEYS * 20) == expected * 20
    crash(daemon)
    daemon.start()
    assert ask(daemon, KEYS * 20) == expected * 20


def crash(daemon: Daemon) -> None:
    pids = [master(daemon), *children(master(daemon))]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert daemon._process
    daemon._process.wait()


def test_an_address_that_is_gone_is_gone_for_all_workers_at_once(
    start_daemon: StartDaemon, postgresql: Postgresql
) -> None:
    daemon = start_daemon(config(postgresql, 'negative_cache_ttl = "1h"\nstale_ttl = "1d"'))
    warm(daemon, postgresql)
    postgresql.execute(f"DELETE FROM alias WHERE address = '{KEYS[0]}'")
    assert ask(daemon, KEYS[:1]) == [None]
    postgresql.stop()
    replace_workers(daemon)
    assert ask(daemon, KEYS[:1] * 20) == [None] * 20
