"""The command ``status``: exact counts in every format, and no need for the server to answer."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from prefork_socketmap.client import TempFail
from prefork_socketmap.daemon import report, tables
from prefork_socketmap.daemon.report import Finding
from prefork_socketmap.maps.srsaddress import Flaw
from prefork_socketmap.prefork import scoreboard
from prefork_socketmap.prefork.counters import OWN, SERVER_COUNTERS
from prefork_socketmap.socketmap.netstring import encode
from tests.daemon.installation import COMMAND, TIMEOUT, Installation
from tests.processes import process_status
from tests.serving import Client, end_of_newcomer
from tests.waiting import eventually

CODE = """
import os
from prefork_socketmap import Reply

def look_up(key):
    if key == "temp":
        return Reply.temp_fail("later")
    if key == "perm":
        return Reply.perm_fail("never")
    if key == "timeout":
        raise TimeoutError
    if key == "raise":
        raise ValueError
    if key == "large":
        return "x" * 200_000
    if key == "die":
        os._exit(1)
    if key == "block":
        with open("fifo") as fifo:
            return fifo.read()
    return None
"""
STUCK = """
import signal
def f(key):
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    while True:
        pass
"""
WORKER = report.WorkerReport(0, 4711, 1, "busy", 0.0, "slow", 2.0, "192.0.2.1", report.Counters())
MAPS = """
[maps.colours]
type = "static"
entries = { sky = "blue", grass = "green" }

[maps.code]
type = "python"
path = ["."]
function = "code_of_map:look_up"

[maps.remembered]
type = "static"
entries = { sky = "blue" }
cache_ttl = "1h"

[maps.all]
type = "chain"
maps = ["colours", "remembered"]
"""
# Every kind of reply: what is asked, and how it is counted.
QUESTIONS = {
    b"colours sky": "OK",
    b"colours sea": "NOTFOUND",
    b"code temp": "TEMP",
    b"code raise": "TEMP",
    b"code large": "TEMP",
    b"code perm": "PERM",
    b"code timeout": "TIMEOUT",
    b"code other": "NOTFOUND",
    b"nosuchmap sky": "TEMP",
}
COUNTED = {
    "colours": {"OK": 1, "NOTFOUND": 1, "TEMP": 0, "TIMEOUT": 0, "PERM": 0},
    "code": {"OK": 0, "NOTFOUND": 1, "TEMP": 3, "TIMEOUT": 1, "PERM": 1},
    "(unknown)": {"OK": 0, "NOTFOUND": 0, "TEMP": 1, "TIMEOUT": 0, "PERM": 0},
}
_CLEAR_SCREEN = b"\x1b[H\x1b[2J"
NOTHING = {"OK": 0, "NOTFOUND": 0, "TEMP": 0, "TIMEOUT": 0, "PERM": 0}


@pytest.fixture
def site(installation: Installation) -> Installation:
    """A server whose maps give every kind of reply."""
    (installation.directory / "code_of_map.py").write_text(CODE)
    installation.configure("lookup_timeout = 0", maps=MAPS)
    installation.start(cwd=installation.directory)
    return installation


def told(site: Installation) -> dict[str, Any]:
    """Return what ``status --json`` says of a server that runs."""
    result = site.run("status", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    document: dict[str, Any] = json.loads(result.stdout)
    assert document["running"]
    return document


def ask_everything(site: Installation, times: int = 1) -> None:
    """Ask all QUESTIONS, and wait until the server has noticed that who asked has gone."""
    for _ in range(times):
        with Client(site.endpoint) as client:
            for question, status in QUESTIONS.items():
                assert client.ask(question).split(b" ")[0] == status.encode()

    def nobody_is_there() -> bool:
        document = told(site)
        return document["connections"]["silent"] == 0 and not any(slot["client"] for slot in document["slots"])

    eventually(nobody_is_there)


def times(counts: dict[str, dict[str, int]], factor: int) -> dict[str, dict[str, int]]:
    """Return *counts* as they are after *factor* times the questions."""
    return {name: {word: factor * number for word, number in replies.items()} for name, replies in counts.items()}


# Whether it runs.


def test_it_tells_pid_age_generation_and_workers(installation: Installation) -> None:
    process = installation.start()
    eventually(lambda: told(installation)["workers"]["states"]["idle"] == 2, what="two idle workers")
    first, second, *_ = installation.run("status").stdout.splitlines()
    pattern = rf"prefork-socketmap is running, pid {process.pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(pattern, first)
    assert second == "generation 1, 2 workers: 2 idle"


def test_without_a_server_the_exit_code_is_3(installation: Installation) -> None:
    result = installation.run("status")
    assert (result.returncode, result.stdout) == (3, "prefork-socketmap is not running\n")
    result = installation.run("status", "--json")
    assert (result.returncode, json.loads(result.stdout)) == (3, {"running": False})
    result = installation.run("status", "--prometheus")
    assert result.returncode == 3
    assert metrics(result.stdout) == {("prefork_socketmap_up", ()): 0}


def test_after_a_crash_the_exit_code_is_1(installation: Installation) -> None:
    process = installation.start()
    process.kill()
    process.wait()
    result = installation.run("status")
    assert result.returncode == 1
    assert result.stdout == f"prefork-socketmap is dead: it left {installation.pid_file} behind\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
def test_everybody_may_read_it_but_without_the_right_to_know_the_exit_code_is_4(installation: Installation) -> None:
    installation.start()
    # All modules first: Python may be installed where only root can read it.
    program = (
        "import os, pwd, sys; from prefork_socketmap.daemon import cli, control, status;"
        "cli.parser().parse_args(sys.argv[1:]); os.setuid(pwd.getpwnam('nobody').pw_uid);"
        "sys.exit(cli.main(sys.argv[1:]))"
    )

    def as_nobody(command: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", program, command, "-c", str(installation.config)]
        return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=TIMEOUT)

    status = as_nobody("status")
    assert status.returncode == 0
    assert "generation 1" in status.stdout
    stop = as_nobody("stop")
    assert (stop.returncode, stop.stderr) == (os.EX_NOPERM, "prefork-socketmap: [Errno 1] Operation not permitted\n")
    installation.pid_file.chmod(0o600)
    status = as_nobody("status")
    assert status.returncode == 4
    assert "Permission denied" in status.stderr
    assert installation.lookup() == "blue"


# What it counts.


def test_lookups_are_counted_by_map_and_reply(site: Installation) -> None:
    ask_everything(site, 3)
    maps = told(site)["maps"]
    assert {name: each["replies"] for name, each in maps.items() if each["lookups"]} == times(COUNTED, 3)
    assert maps["remembered"]["replies"] == NOTHING
    for each in maps.values():
        assert each["lookups"] == sum(each["replies"].values())
        assert sum(bucket["lookups"] for bucket in each["buckets"]) == each["lookups"]


def test_a_default_map_has_an_entry_for_all_names_that_are_none(installation: Installation) -> None:
    installation.configure(maps='[default_map]\ntype = "static"\nentries = { sky = "blue" }\n')
    installation.start()
    with Client(installation.endpoint) as client:
        for name in (b"one", b"two", b"(other)"):
            assert client.ask(name + b" sky") == b"OK blue"
    maps = told(installation)["maps"]
    assert {name: each["lookups"] for name, each in maps.items()} == {"(default)": 3}


def test_times_are_those_of_the_lookup(site: Installation) -> None:
    os.mkfifo(site.directory / "fifo")
    began = time.monotonic()
    with Client(site.endpoint) as client:
        client.request(b"code block")
        # A fifo opens for writing when its reader, the lookup, is there.
        with (site.directory / "fifo").open("w") as fifo:
            blocked = time.monotonic()
            eventually(lambda: time.monotonic() - blocked > 0.3, what="a slow lookup")
            held = time.monotonic() - blocked
            fifo.write("answer")
        assert client.reply() == b"OK answer"
    took = time.monotonic() - began
    code = told(site)["maps"]["code"]
    assert held < code["worst_seconds"] < took
    assert code["worst_seconds"] == code["total_seconds"] == code["mean_seconds"]
    (bucket,) = code["buckets"]
    assert bucket["below_seconds"] / 2 <= code["worst_seconds"] < bucket["below_seconds"]
    for quantile in ("p50_seconds", "p90_seconds", "p99_seconds"):
        assert bucket["below_seconds"] / 2 <= code[quantile] <= code["worst_seconds"]


def test_counts_outlive_workers_and_reloads(site: Installation) -> None:
    os.mkfifo(site.directory / "fifo")
    with Client(site.endpoint) as first, Client(site.endpoint) as second:
        first.request(b"code block")
        with (site.directory / "fifo").open("w") as fifo:
            assert second.ask(b"colours sky") == b"OK blue"  # another worker's
            fifo.write("answer")
        assert first.reply() == b"OK answer"
    assert sum(slot["lookups"] > 0 for slot in told(site)["slots"]) == 2
    ask_everything(site)
    with Client(site.endpoint) as client:
        client.request(b"code die")
        client.end()
    eventually(lambda: told(site)["workers"]["died"] == 1, what="the death is noticed")
    ask_everything(site)
    site.configure(
        "lookup_timeout = 0", maps=MAPS.replace("maps.colours", "maps.shades").replace('"colours"', '"shades"')
    )
    assert site.run("reload").returncode == 0
    with Client(site.endpoint) as client:
        assert client.ask(b"shades sky") == b"OK blue"
        assert client.ask(b"code other") == b"NOTFOUND "
    document = told(site)
    maps = {name: each["replies"] for name, each in document["maps"].items()}
    expected = times(COUNTED, 2)
    expected["colours"]["OK"] += 1
    expected["code"]["OK"] += 1
    expected["code"]["NOTFOUND"] += 1
    assert maps == expected | {"remembered": NOTHING, "all": NOTHING, "shades": NOTHING | {"OK": 1}}
    assert document["generation"] == 2
    assert document["reloads"] == {"good": 1, "refused": 0}


def test_counts_go_on_after_an_upgrade(site: Installation) -> None:
    ask_everything(site)
    before = told(site)
    assert site.run("upgrade").returncode == 0
    ask_everything(site)
    document = told(site)
    assert {name: each["replies"] for name, each in document["maps"].items() if each["lookups"]} == times(COUNTED, 2)
    assert (document["pid"], document["started"]) == (before["pid"], before["started"])


def test_a_reload_that_was_refused_is_counted_and_explained(site: Installation) -> None:
    site.configure(maps='[maps.m]\ntype = "statik"\n')
    assert site.run("reload").returncode == 1
    document = told(site)
    assert document["reloads"] == {"good": 0, "refused": 1}
    assert document["generation"] == 1
    assert document["problem"].startswith("the last reload was refused: ")
    assert document["problem"] in site.run("status").stdout.splitlines()


def test_what_is_wrong_with_addresses_is_told_by_map(site: Installation) -> None:
    assert len(Flaw) == OWN
    secrets = site.directory / "secrets"
    secrets.write_text("secret\n")
    secrets.chmod(0o600)
    srs = '[maps.srs]\ntype = "srs"\ndirection = "reverse"\ndomain = "fwd.example"\nsecret_file = "secrets"\n'
    site.configure(maps=MAPS + srs)
    assert site.run("reload").returncode == 0
    assert told(site)["maps"]["srs"]["flaws"] is None
    for key in (
        "SRS0=XXXX=JO=x.org=u@fwd.example",
        "SRS0=XXXX=JO=x.org=u@other.example",
        "SRS0=x@fwd.example",
        "u@x",
    ):
        assert site.lookup("srs", key) is None
    found = {"forged": 1, "expired": 0, "malformed": 1, "foreign": 1, "long": 0}
    assert eventually(lambda: told(site)["maps"]["srs"]["flaws"]) == found
    assert told(site)["maps"]["colours"]["flaws"] is None
    assert 'flaws_total{map="srs",flaw="forged"} 1' in site.run("status", "--prometheus").stdout
    header = next(line for line in site.run("status").stdout.splitlines() if line.startswith("map "))
    assert "  forged  malformed  foreign" in header


def test_the_server_that_an_srs_map_keeps_senders_in_is_a_backend(site: Installation) -> None:
    database = 'original_envelope = "database"\nenvelope_database = { type = "redis", hosts = ["127.0.0.1:1"] }\n'
    srs = (
        f'[maps.srs]\ntype = "srs"\ndirection = "forward"\ndomain = "x.example"\nsecret_file = "secrets"\n{database}'
    )
    (site.directory / "secrets").write_text("secret\n")
    (site.directory / "secrets").chmod(0o640)
    site.configure("", maps=srs)
    assert site.run("reload").returncode == 0
    with pytest.raises(TempFail):
        site.lookup("srs", "user@sender.org")
    assert [(name, each["up"]) for name, each in told(site)["backends"].items()] == [("redis 127.0.0.1:1", False)]


def test_the_state_of_caches_is_told_also_of_those_inside_a_chain(site: Installation) -> None:
    with Client(site.endpoint) as client:
        for question in (b"remembered sky", b"remembered sky", b"remembered sea", b"all x", b"all sky"):
            client.ask(question)
    maps = told(site)["maps"]
    # "sky" is in the first map of the chain; "x" and "sea" are not found, which is not remembered here.
    assert maps["remembered"]["cache"] == {"hits": 1, "misses": 3, "stale": 0, "entries": 1}
    assert maps["colours"]["cache"] is None
    assert re.search(r"^remembered .* 25% +1 +0$", site.run("status").stdout, re.MULTILINE)
    assert site.run("reload").returncode == 0
    assert told(site)["maps"]["remembered"]["cache"] == {"hits": 1, "misses": 3, "stale": 0, "entries": 1}
    with Client(site.endpoint) as client:
        assert client.ask(b"remembered sky").startswith(b"OK ")
    assert told(site)["maps"]["remembered"]["cache"] == {"hits": 2, "misses": 3, "stale": 0, "entries": 1}


def test_connections_are_counted(site: Installation) -> None:
    site.configure('lookup_timeout = 0\nallow = ["127.0.0.1"]', maps=MAPS)
    assert site.run("reload").returncode == 0
    with Client(site.endpoint) as silent:
        silent.ask(b"colours sky")
        eventually(lambda: told(site)["connections"]["silent"] == 1, what="the connection is silent")
        assert told(site)["connections"] == {
            "active": 0,
            "silent": 1,
            "accepted": 1,
            "refused": 0,
            "evicted": 0,
            "expired": 0,
            "timed_out": 0,
            "overflowed": 0,
            "lost": 0,
        }


@pytest.mark.parametrize(
    ("limits", "counter", "line"),
    [
        ("keepalive_timeout = 1", "expired", "silent connection closed after keepalive_timeout"),
        ("read_timeout = 1", "timed_out", "connection closed after read_timeout or write_timeout"),
    ],
)
def test_connections_that_limits_end_are_counted_and_logged(
    installation: Installation, limits: str, counter: str, line: str
) -> None:
    installation.configure(limits)
    installation.start()
    with Client(installation.endpoint) as client:
        client.ask(b"colours sky")
        client.send(b"5:" if counter == "timed_out" else b"")
        client.end()
        eventually(lambda: told(installation)["connections"][counter] == 1, what="it is counted")
        assert told(installation)["connections"]["silent"] == 0
    installation.logged(f"[127.0.0.1]: {line}")


def test_connections_that_make_room_are_counted(installation: Installation) -> None:
    installation.configure("max_connections = 1\nidle_timeout = 1")
    installation.start()

    def make_room() -> bool:
        with contextlib.suppress(ConnectionError, AssertionError), Client(installation.endpoint) as newer:
            newer.ask(b"colours sky")
            return True
        return False  # the other one has not been silent for long enough

    with Client(installation.endpoint) as oldest:
        oldest.ask(b"colours sky")
        eventually(make_room, what="room for a newer client")
        oldest.end()
        eventually(lambda: told(installation)["connections"]["evicted"] == 1, what="it is counted")
    installation.logged("[127.0.0.1]: idle connection closed to make room for a new one")


def test_refused_connections_are_counted(installation: Installation) -> None:
    installation.configure("max_connections = 1")
    installation.start()
    with Client(installation.endpoint) as client:
        client.ask(b"colours sky")
        eventually(lambda: told(installation)["connections"]["silent"] == 1, what="it is in the table")
        end_of_newcomer(installation.endpoint)
        eventually(lambda: told(installation)["connections"]["refused"] == 1, what="it is counted")
    installation.logged("[127.0.0.1]: connection refused: max_connections, or the limit of open files, is reached")


def test_workers_that_are_killed_are_counted(installation: Installation) -> None:
    installation.configure("lookup_timeout = 1")
    installation.start()
    os.kill(installation.idle_workers()[0], signal.SIGSTOP)
    eventually(lambda: told(installation)["workers"]["killed"] == 1, what="a stopped worker is killed")
    workers = told(installation)["workers"]
    assert (workers["died"], workers["throttled"]) == (0, 0)


def test_workers_that_die_in_a_lookup_are_counted_for_its_map(site: Installation) -> None:
    with Client(site.endpoint) as client:
        client.send(encode(b"code die"))
        client.end()
    eventually(lambda: told(site)["maps"]["code"]["deaths"] == 1, what="it is counted")
    found = told(site)
    assert found["maps"]["colours"]["deaths"] == 0
    assert found["connections"]["lost"] == 1
    assert found["workers"]["died"] == 1
    assert re.search(r"^map .* deaths$", site.run("status").stdout, re.MULTILINE)


def test_a_lookup_whose_worker_has_to_be_killed_is_counted_for_its_map(installation: Installation) -> None:
    (installation.directory / "stuck.py").write_text(STUCK)
    maps = '[maps.stuck]\ntype = "python"\npath = ["."]\nfunction = "stuck:f"\n'
    installation.configure("lookup_timeout = 0.5", maps=maps)
    installation.start()
    with Client(installation.endpoint) as client:
        client.send(encode(b"stuck key"))
        client.end()
    eventually(lambda: told(installation)["maps"]["stuck"]["deaths"] == 1, what="it is counted")


def test_a_name_that_is_no_map_is_told_in_log_and_status(site: Installation) -> None:
    with Client(site.endpoint) as client:
        for _ in range(3):
            assert client.ask(b"colour sky").startswith(b"TEMP ")
        assert "asked for, but no map: colour\n" in site.run("status").stdout
        assert told(site)["unknown_maps"] == ["colour"]
        assert client.ask(b"col\x1bour sky").startswith(b"TEMP ")
    assert "\x1b" not in site.run("status").stdout
    assert told(site)["maps"]["(unknown)"]["lookups"] == 4
    site.logged("there is no map <colour>, and no default map")
    assert site.log.read_text().count("there is no map <colour>") == 1


def test_endless_names_fill_neither_log_nor_memory(site: Installation) -> None:
    with Client(site.endpoint) as client:
        for number in range(500):
            assert client.ask(b"name%d key" % number).startswith(b"TEMP ")
    assert site.log.read_text().count("there is no map") <= 21 * 2  # workers
    assert 1 <= len(told(site)["unknown_maps"]) <= len(told(site)["slots"])


def test_a_pause_after_a_failed_start_is_counted(site: Installation) -> None:
    worker = site.idle_workers()[0]
    (site.directory / "code_of_map.py").write_text("raise ValueError")
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: told(site)["workers"]["throttled"] == 1, what="the start of its successor fails")
    assert told(site)["workers"]["died"] == 1


def test_a_worker_s_row_tells_what_it_is_doing(site: Installation) -> None:
    site.idle_workers()
    os.mkfifo(site.directory / "fifo")
    with Client(site.endpoint) as client:
        client.request(b"code block")
        with (site.directory / "fifo").open("w"):
            document = told(site)
            (busy,) = [slot for slot in document["slots"] if slot["state"] == "busy"]
            line = next(line for line in site.run("status").stdout.splitlines() if " busy " in line)
        client.reply()
    assert (busy["map"], busy["client"], busy["generation"]) == ("code", "127.0.0.1", 1)
    assert busy["pid"] in site.workers()
    assert 0 <= busy["lookup_seconds"] <= time.time() - busy["since"]
    assert re.search(r" code \(\S+s\) +127\.0\.0\.1$", line)
    assert document["connections"]["active"] == 1
    idle = next(slot for slot in document["slots"] if slot["state"] == "idle")
    assert (idle["map"], idle["lookup_seconds"], idle["client"]) == (None, None, None)


def test_a_stopped_worker_is_told_apart(site: Installation) -> None:
    worker = site.idle_workers()[0]
    os.kill(worker, signal.SIGSTOP)
    try:
        eventually(lambda: told(site)["workers"]["states"]["stopped"] == 1, what="the stop is noticed")
        assert {slot["pid"] for slot in told(site)["slots"] if slot["state"] == "stopped"} == {worker}
    finally:
        os.kill(worker, signal.SIGCONT)


# It does not need the server.


def test_it_works_while_the_master_is_stopped(site: Installation) -> None:
    ask_everything(site)
    os.kill(site.pid, signal.SIGSTOP)
    try:
        eventually(lambda: process_status(site.pid)["State"][0] == "T", what="the master is stopped")
        maps = told(site)["maps"]
    finally:
        os.kill(site.pid, signal.SIGCONT)
    assert {name: each["replies"] for name, each in maps.items() if each["lookups"]} == COUNTED


def test_a_scoreboard_that_cannot_be_read_is_named_and_the_server_still_found(installation: Installation) -> None:
    process = installation.start()
    file = installation.runtime_dir / "scoreboard"
    whole = file.read_bytes()
    another = scoreboard.LAYOUT ^ 1
    for content, problem in (
        (b"", "not a scoreboard, or cut short"),
        (whole[:100], "not a scoreboard, or cut short"),
        (bytes(len(whole)), "not a scoreboard"),
        (
            whole[:8] + another.to_bytes(8, sys.byteorder) + whole[16:],
            f"a scoreboard with layout {another:08x}, of another version",
        ),
    ):
        file.unlink()  # a new one: who cuts off what a server has mapped kills it
        file.write_bytes(content)
        result = installation.run("status")
        assert result.returncode == 0
        first, second = result.stdout.splitlines()
        assert first == f"prefork-socketmap is running, pid {process.pid}"
        assert second.startswith(f"what it does cannot be read: {file}: ")
        assert problem in second


def test_a_server_that_does_not_serve_yet_is_starting(installation: Installation) -> None:
    fifo = installation.directory / "fifo"
    os.mkfifo(fifo)
    (installation.directory / "slow.py").write_text(f"open({str(fifo)!r}).read()\ndef f(key): return None\n")
    installation.configure(maps='[maps.slow]\ntype = "python"\npath = ["."]\nfunction = "slow:f"\n')
    process = subprocess.Popen([*COMMAND, "serve", "-c", installation.config], stderr=subprocess.DEVNULL)
    try:
        # A fifo opens for writing when its reader, the worker that starts, is there.
        with fifo.open("w"):
            result = installation.run("status")
            assert (result.returncode, result.stdout) == (0, f"prefork-socketmap is starting, pid {process.pid}\n")
            document = json.loads(installation.run("status", "--json").stdout)
            assert document == {"running": True, "pid": process.pid}
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def test_the_file_goes_with_the_server(installation: Installation) -> None:
    installation.start()
    file = installation.runtime_dir / "scoreboard"
    assert file.stat().st_mode & 0o777 == 0o644
    assert installation.run("stop").returncode == 0
    assert list(installation.runtime_dir.iterdir()) == []


def test_a_start_that_cannot_make_the_file_names_it_and_leaves_nothing(installation: Installation) -> None:
    in_the_way = installation.runtime_dir / "scoreboard.new"
    in_the_way.mkdir(parents=True)
    result = installation.run("serve")
    assert result.returncode == os.EX_UNAVAILABLE
    assert str(in_the_way) in result.stderr
    assert list(installation.runtime_dir.iterdir()) == [in_the_way]


def test_a_file_that_a_crash_has_left_is_replaced(installation: Installation) -> None:
    process = installation.start()
    installation.lookup()
    process.kill()
    process.wait()
    (installation.runtime_dir / "state.json").unlink()
    installation.start()
    assert told(installation)["maps"]["colours"]["lookups"] == 0


# The formats.


def metrics(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the samples in *text*, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_the_same_counts(site: Installation) -> None:
    ask_everything(site, 2)
    document = told(site)
    found = metrics(site.run("status", "--prometheus").stdout)

    def value(name: str, **labels: str) -> float:
        return found["prefork_socketmap_" + name, tuple(sorted(labels.items()))]

    assert value("up") == 1
    assert value("start_time_seconds") == document["started"]
    for name, replies in times(COUNTED, 2).items():
        for status, number in replies.items():
            assert value("replies_total", map=name, status=status) == number
    for name, each in document["maps"].items():
        assert value("lookup_duration_seconds_count", map=name) == each["lookups"]
        assert value("lookup_duration_seconds_bucket", map=name, le="+Inf") == each["lookups"]
        assert value("lookup_duration_seconds_sum", map=name) == each["total_seconds"]
    assert document["connections"]["accepted"] == 2
    for counter in SERVER_COUNTERS:
        assert value(f"{counter.group}_{counter.name}_total") == document[counter.group][counter.name]
    for state in ("active", "silent"):
        assert value("connections", state=state) == document["connections"][state]


def test_prometheus_finds_help_type_and_a_rising_histogram(site: Installation) -> None:
    ask_everything(site)
    families = list(text_string_to_metric_families(site.run("status", "--prometheus").stdout))
    assert all(family.documentation and family.type in ("gauge", "counter", "histogram") for family in families)
    assert len({family.name for family in families}) == len(families)
    (histogram,) = [family for family in families if family.type == "histogram"]
    for name in COUNTED:
        buckets = [
            (float(sample.labels["le"]), sample.value)
            for sample in histogram.samples
            if sample.name.endswith("_bucket") and sample.labels["map"] == name
        ]
        assert buckets == sorted(buckets)
        assert [number for _, number in buckets] == sorted(number for _, number in buckets)


def test_a_name_is_quoted_where_a_format_demands_it(installation: Installation) -> None:
    name = 'a"b\\c\u00e9\u2028\x07'
    installation.configure(maps=f'[maps.{json.dumps(name)}]\ntype = "static"\nentries = {{ sky = "blue" }}\n')
    installation.start()
    assert installation.lookup(name) == "blue"
    assert told(installation)["maps"][name]["lookups"] == 1
    found = metrics(installation.run("status", "--prometheus").stdout)
    assert found["prefork_socketmap_replies_total", (("map", name), ("status", "OK"))] == 1
    assert '\na"b\\c\u00e9\\u2028\\x07 ' in installation.run("status").stdout


def test_the_columns_of_a_table_stand_below_each_other(site: Installation) -> None:
    ask_everything(site)
    _, maps, workers = site.run("status").stdout.split("\n\n")
    expected = "map lookups OK NOTFOUND TEMP TIMEOUT PERM p50 p90 p99 worst"
    assert maps.splitlines()[0].split() == expected.split()
    expected = "slot pid gen state for lookups OK NOTFOUND TEMP TIMEOUT PERM mean worst"
    assert workers.splitlines()[0].split() == expected.split()
    for table in (maps, workers):
        titles, *rows = table.splitlines()
        ends = [match.end() for match in re.finditer(r"lookups|OK|NOTFOUND|TEMP|TIMEOUT|PERM", titles)]
        for row in rows:
            assert all(row[end - 1].isdigit() and row[end] == " " for end in ends)
            assert len(row) <= 100


def test_watch_redraws_in_the_width_of_the_terminal_until_it_is_interrupted(installation: Installation) -> None:
    installation.start()
    master, terminal = pty.openpty()
    watch = subprocess.Popen(
        [*COMMAND, "status", "-c", installation.config, "--watch", "0.05"],
        stdout=terminal,
        env=os.environ | {"COLUMNS": "60"},
    )
    os.close(terminal)
    try:
        shown = b""
        while shown.count(_CLEAR_SCREEN + b"prefork-socketmap is running") < 3:
            shown += os.read(master, 65536)
        watch.send_signal(signal.SIGINT)
        assert watch.wait(TIMEOUT) == 0
    finally:
        watch.kill()
        watch.wait()
        os.close(master)
    assert b"colours" in shown
    assert max(len(line) for line in shown.replace(_CLEAR_SCREEN, b"").splitlines()) == 60


def frames(text: str) -> list[str]:
    """Return what was shown, each time."""
    return re.split(r"^(?=prefork-socketmap is )", text, flags=re.MULTILINE)[1:]


def test_watch_tells_rates_since_the_start_and_then_since_the_time_before(site: Installation) -> None:
    with Client(site.endpoint) as client:
        for _ in range(50):
            client.ask(b"colours sky")
        command = [*COMMAND, "status", "-c", str(site.config), "--watch", "0.2"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
            assert watch.stdout is not None
            shown = ""
            try:
                while "in the last" not in shown:
                    shown += watch.stdout.readline()
                for _ in range(20):
                    client.ask(b"colours sky")
                    client.ask(b"nothing sky")
                while not ("TEMP/s" in shown and re.search(r"^colours .* 70$", shown, re.MULTILINE)):
                    shown += watch.stdout.readline()
            finally:
                watch.send_signal(signal.SIGINT)
                rest, _ = watch.communicate(timeout=TIMEOUT)
            shown += rest
            assert watch.returncode == 0
    first, *_ = frames(shown)
    assert re.search(r"^since the start: [\d.]+ lookups/s, 0 failed/s$", first, re.MULTILINE)
    assert re.search(r"^since the start: 1 connections accepted", first, re.MULTILINE)
    later = next(frame for frame in frames(shown) if "TEMP/s" in frame)
    assert re.search(r"^in the last \d.*: [\d.]+ lookups/s, [\d.]+ failed/s$", later, re.MULTILINE)
    assert "asked for, but no map: nothing\n" in later


def test_watch_shows_who_is_busy_and_survives_a_restart_of_the_server(site: Installation) -> None:
    started = told(site)["started"]
    before = report.Report(1, started - 5, 1, 0, 0, {}, [], [])
    found = report.Report(1, started, 1, 1, 0, {"connections": {"evicted": 3}}, [], [WORKER], unknown=["na\x1bme"])
    text = tables.render_rates(Finding(0, "running", 1, found), before, 2.0)
    assert "since the start: 0 lookups/s" in text  # the totals of another server are no measure
    assert "since the start: 3 connections evicted\n" in text
    assert re.search(r"^busy worker +for +map +client\n +4711 +2\.0s +slow +192\.0\.2\.1$", text, re.MULTILINE)
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("number", "seconds", "shown"), [(0, 2.0, "0"), (1, 60.0, "<0.1"), (3, 2.0, "1.5"), (999, 2.0, "500")]
)
def test_a_rate_is_told_as_exactly_as_anybody_wants_to_know(number: int, seconds: float, shown: str) -> None:
    assert tables._rate(number, seconds) == shown


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_watch_accepts_a_time_only(installation: Installation, seconds: str) -> None:
    result = installation.run("status", f"--watch={seconds}")
    assert result.returncode == os.EX_USAGE
    assert f"'{seconds}' is not accepted here" in result.stderr
