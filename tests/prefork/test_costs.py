"""What a lookup costs, and what nothing costs: nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefork_socketmap.client import SocketmapClient
from prefork_socketmap.prefork.duty import PLACES
from tests.crowd import Board, echo
from tests.daemon.installation import Installation
from tests.serving import DEADLINE, Serve
from tests.waiting import eventually

CALLS = 25
SYSTEM_CALLS = 5


class Trace:
    """The system calls of some processes, once they are known: after the block."""

    calls: Counter[str]


@contextmanager
def traced(pids: Sequence[int], path: Path) -> Iterator[Trace]:
    """Trace the system calls of processes."""
    if not shutil.which("strace"):
        if "CI" in os.environ:
            pytest.fail("strace is missing: apt install strace")
        pytest.skip("install strace: apt install strace")
    tracer = subprocess.Popen(
        ["strace", "-o", str(path), *(f"--attach={pid}" for pid in pids)], stderr=subprocess.PIPE
    )
    assert tracer.stderr
    for _ in pids:
        assert b"attached" in tracer.stderr.readline()
    trace = Trace()
    try:
        yield trace
    finally:
        tracer.terminate()
        tracer.communicate()
    # What was under way when the tracer came or went is no call of its own.
    lines = [line for line in path.read_text().splitlines() if "detached" not in line and "+++" not in line]
    trace.calls = Counter(re.findall(r"^\d+ +(\w+)\(", "\n".join(lines), re.M))


def test_nobody_makes_a_system_call_while_nobody_asks(serve: Serve, endpoint: str, tmp_path: Path) -> None:
    site = serve({"echo": echo}, None, endpoint)
    clients = [site.connect() for _ in range(100)]

    def all_are_answered_by_as_many_as_there_are_places() -> bool:
        # Where a lookup was slow, since the machine is busy, there are more on duty until some more are quick.
        for client in clients:
            assert client.ask(b"echo key") == b"OK key"
        return len(Board(site.pid).on_duty()) == PLACES

    eventually(all_are_answered_by_as_many_as_there_are_places, DEADLINE)
    time.sleep(0.5)  # for what is done a moment after the last lookup
    with traced([site.pid, *site.workers], tmp_path / "strace") as trace:
        time.sleep(10)
    # The tracer shows the wait that it has found each in.
    assert trace.calls.total() <= 1 + len(site.workers), trace.calls


@pytest.mark.parametrize("number", [1, 8, 500])
def test_a_lookup_costs_few_system_calls(serve: Serve, endpoint: str, tmp_path: Path, number: int) -> None:
    """Busy ones, and many that each ask once in a while."""
    site = serve({"echo": echo}, None, endpoint)
    clients = [site.connect() for _ in range(number)]
    for _ in range(10):
        for client in clients:
            assert client.ask(b"echo key") == b"OK key"
    # A worker that had not met the clients before fetches them from the master, once; and one may just be starting.
    for _ in range(len(site.workers) + 1):
        lookups, workers = 0, site.workers
        with traced(workers, tmp_path / "strace") as trace:
            while lookups < 1000:
                for client in clients:
                    client.request(b"echo key")
                for client in clients:
                    assert client.reply() == b"OK key"
                lookups += number
        all_are_traced = trace.calls["sendto"] >= lookups - len(workers)  # the tracer may miss the last ones
        if all_are_traced and trace.calls.total() <= SYSTEM_CALLS * lookups:
            return
    pytest.fail(f"{lookups} lookups cost {trace.calls}")


PROFILED = """
import sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event == "call"
def lookup(key):
    if key == "on":
        sys.setprofile(count)
    if key == "count":
        return str(calls)
    return key
"""


def test_a_lookup_costs_few_python_calls() -> None:
    """In the daemon, with a map of type python: its own call and the one of this profile included."""
    with Installation() as installation:
        (installation.directory / "profiled.py").write_text(PROFILED)
        installation.configure(
            "process_limit = 1",
            maps='[maps.p]\ntype = "python"\nfunction = "profiled:lookup"\n',
        )
        installation.start(env={"PYTHONPATH": os.pathsep.join([str(installation.directory), *sys.path])})
        with SocketmapClient(installation.endpoint) as client:
            for _ in range(10):
                client.lookup("p", "warm")
            client.lookup("p", "on")
            before = int(client.lookup("p", "count") or 0)
            for _ in range(100):
                assert client.lookup("p", "key") == "key"
            after = int(client.lookup("p", "count") or 0)
        per_lookup = (after - before) / 101
        assert 5 < per_lookup <= CALLS, per_lookup
