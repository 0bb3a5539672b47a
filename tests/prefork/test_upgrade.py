"""What passes from one program to the next in the same process: the state, its descriptors, the signals."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from prefork_socketmap.prefork import upgrade
from prefork_socketmap.prefork.channel import Given
from prefork_socketmap.prefork.connections import ConnectionsState
from prefork_socketmap.prefork.duty import DutyState
from prefork_socketmap.prefork.listener import ListenerState
from prefork_socketmap.prefork.signals import Signals
from prefork_socketmap.prefork.table import TableState
from prefork_socketmap.prefork.upgrade import Check, ChildState, MasterState, refuse_another_layout
from tests.processes import await_end
from tests.waiting import eventually

SUCCESSOR = """
import dataclasses, json, os
from prefork_socketmap.prefork.upgrade import MasterState

def inheritable():
    fds = [fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")]
    return {fd for fd in fds if os.get_inheritable(fd)}

state = MasterState.from_environment()
before = inheritable()
state.take_descriptors()
print(json.dumps([dataclasses.asdict(state), list(before - inheritable()), list(before)]))
"""


@pytest.fixture
def state() -> Iterator[MasterState]:
    """A state whose descriptors are open, as if a master had made them."""
    fds = [os.open("/dev/null", os.O_RDWR) for _ in range(18)]
    yield MasterState(
        generation=7,
        listeners=[ListenerState(fds[0], "inet:[::1]:27823", created=True)],
        inherited=[fds[1]],
        children=[ChildState(4711, 3, 12.5, ready=True, leaves_by=20.5, inherited=7, horizon=9)],
        connections=ConnectionsState(
            places=[Given(fds[2], 5, 11, 2, fds[2]), Given(fds[3], 6, 12, 10, fds[3])],
            newest=12,
            latest_serial=7,
            next_free=1030,
            free=[1026],
            reserved={3: {1028: 7}},
        ),
        inbox=(fds[4], fds[5]),
        bell=fds[6],
        lifeline=(fds[7], fds[8]),
        table=TableState(1024, fds[9], fds[10], fds[11], fds[17]),
        duty=DutyState(fds[12], fds[13], fds[14], fds[15]),
        board=fds[16],
        others={"pid_file": fds[1]},
    )
    for fd in fds:
        os.close(fd)


def _open() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def named_by(state: MasterState) -> set[int]:
    """Return all descriptors that *state* names."""
    table, duty = state.table, state.duty
    return {
        *(each.fd for each in state.listeners),
        *state.inherited,
        *(place.fd for place in state.connections.places),
        *state.inbox,
        state.bell,
        *state.lifeline,
        *(table.set, table.memory, table.buffers, table.nudged),
        *(duty.reserve, duty.calls, duty.dismissals, duty.gong),
        state.board,
        *state.others.values(),
    }


def test_the_next_program_gets_the_state_and_its_descriptors_and_no_others(state: MasterState) -> None:
    stranger = os.open("/dev/null", os.O_RDWR)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.dup2(writer, 1)
            state.execute([sys.executable, "-c", SUCCESSOR])
        finally:
            os._exit(1)
    os.close(writer)
    os.close(stranger)
    with os.fdopen(reader) as output:
        arrived, taken, opened = json.load(output)
    assert os.waitpid(child, 0)[1] == 0
    assert arrived == json.loads(json.dumps(asdict(state)))
    assert stranger not in opened
    # What the next program executes does not get them by accident.
    assert named_by(state) == set(taken)


def test_a_program_that_was_simply_started_has_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFORK_SOCKETMAP_STATE", raising=False)
    assert MasterState.from_environment() is None


def test_a_program_that_cannot_be_executed_changes_nothing(state: MasterState) -> None:
    opened = _open()
    with pytest.raises(FileNotFoundError):
        state.execute(["/nowhere/python", "-c", ""])
    assert "PREFORK_SOCKETMAP_STATE" not in os.environ
    assert not any(os.get_inheritable(fd) for fd in named_by(state))
    assert _open() == opened


def test_a_signal_that_nobody_has_taken_yet_is_left_to_the_next_program() -> None:
    signals = Signals([signal.SIGHUP])
    signals.install()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        with signals.left_to_successor():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.SIGHUP in signal.sigpending()
            assert not signals.take()
        # There is no next program: it is ours again.
        assert list(signals.take()) == [signal.SIGHUP]
    finally:
        signals.close()


def outcome(check: Check) -> str | None:
    """Wait for the end of a check, and return the problem."""
    eventually(check.is_over, what="the end of the check")
    return check.problem()


def test_a_check_that_succeeds_finds_no_problem() -> None:
    assert outcome(Check(["sh", "-c", "echo fine"])) is None


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo prefork-socketmap: a warning; echo prefork-socketmap: maps.m: wrong >&2; exit 78", "maps.m: wrong"),
        ("exit 3", "its check ended with status 3"),
        ("kill -9 $$", "its check ended with status -9"),
    ],
)
def test_the_problem_that_a_check_finds_is_what_it_said_last(script: str, problem: str) -> None:
    assert outcome(Check(["sh", "-c", script])) == problem


# What a map that cannot be opened makes of a check: it waits for a child that waits for ever.
STUCK = ["sh", "-c", 'sleep 1000 & echo $! >"$0"; echo opening; wait']


def child_of_stuck_check(file: Path) -> int:
    """Wait until the check has started its child; return the child's process id."""
    return int(eventually(lambda: file.exists() and file.read_text().strip(), what="the child"))


def test_a_check_that_takes_too_long_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check([*STUCK, str(tmp_path / "pid")])
    child = child_of_stuck_check(tmp_path / "pid")
    assert not check.is_over()
    check.deadline = 0
    assert check.is_over()
    assert check.problem() == "its check takes longer than 60 s"
    await_end(child)


def test_a_check_that_is_cancelled_is_ended_with_its_children(tmp_path: Path) -> None:
    check = Check([*STUCK, str(tmp_path / "pid")])
    child = child_of_stuck_check(tmp_path / "pid")
    check.cancel()
    await_end(check.pid, child)


def test_a_check_learns_the_layout_of_the_running_program(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", f"from {upgrade.__name__} import *; refuse_another_layout()"]
    assert outcome(Check(command)) is None
    monkeypatch.setattr(upgrade, "LAYOUT", "of another version")
    problem = outcome(Check(command))
    assert problem
    assert "cannot take over from the running one (layout of another version): stop and start it" in problem


def test_who_is_not_asked_by_a_running_program_refuses_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFORK_SOCKETMAP_LAYOUT", raising=False)
    refuse_another_layout()
