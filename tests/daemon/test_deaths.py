"""The end of a worker that nobody wanted is told in the log, in one line each."""

from __future__ import annotations

import contextlib

from prefork_socketmap.client import SocketmapClient, TempFail
from tests.daemon.installation import Installation
from tests.waiting import eventually

MAPS = """
[maps.fatal]
type = "python"
path = ["."]
function = "answers:{name}"
"""

ANSWERS = """
import contextlib
import os
import socket
import sys
import time

def leave(key):
    os._exit(0)

def talk_rubbish(key):
    frame = sys._getframe()
    while not hasattr(frame.f_locals.get("self"), "_to_master"):
        frame = frame.f_back
    fd = os.dup(frame.f_locals["self"]._to_master.fileno())
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
    for _ in range(1000):
        with contextlib.suppress(BlockingIOError):
            sock.send(b"x", socket.MSG_DONTWAIT)
    time.sleep(60)
"""


def start(installation: Installation, name: str) -> None:
    (installation.directory / "answers.py").write_text(ANSWERS)
    installation.configure(maps=MAPS.format(name=name))
    installation.start()
    with contextlib.suppress(TempFail), SocketmapClient(installation.endpoint) as client:
        client.lookup("fatal", "key")


def test_a_worker_that_ends_itself_in_a_lookup_is_told_with_its_map(installation: Installation) -> None:
    start(installation, "leave")
    assert "exited with status 0 in a lookup in [fatal]; it is replaced" in installation.logged("exited with status")


def test_a_worker_that_sends_a_thousand_bad_messages_costs_one_line(installation: Installation) -> None:
    start(installation, "talk_rubbish")
    installation.logged("is killed: it has sent a packet of 1 bytes with 0 descriptors")
    eventually(lambda: len(installation.idle_workers()) == 2, what="its replacement")
    told = [line.partition("worker ")[2].split()[0] for line in lines(installation) if "it has sent" in line]
    assert len(told) == len(set(told)), "more than one line for a worker"


def lines(installation: Installation) -> list[str]:
    return installation.log.read_text().splitlines()
