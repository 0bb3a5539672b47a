"""The pid file: one server at a time, and no signal to anybody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefork_socketmap.daemon import pidfile
from prefork_socketmap.daemon.pidfile import AlreadyRunningError, PidFile
from tests.daemon.installation import Installation

HOLDER = """
import sys
from pathlib import Path
from prefork_socketmap.daemon.pidfile import PidFile
PidFile(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "test.pid"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the pid file."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of ours."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_the_file_holds_the_pid_while_it_is_held_and_is_gone_afterwards(path: Path) -> None:
    held = PidFile(path)
    assert path.read_text() == f"{os.getpid()}\n"
    held.remove()
    assert not path.exists()


def test_a_second_holder_is_refused_and_told_the_first_ones_pid(path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(AlreadyRunningError, match=f"already running with pid {holder.pid}"):
        PidFile(path)
    assert path.read_text() == f"{holder.pid}\n"


def test_the_holder_is_known_from_the_lock_whatever_the_file_says(path: Path, holder: subprocess.Popen[str]) -> None:
    path.write_text("1\n")
    assert pidfile.holder(path) == holder.pid


def test_the_file_of_a_process_that_was_killed_is_taken_over(path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert path.exists()
    assert pidfile.holder(path) is None
    held = PidFile(path)
    assert path.read_text() == f"{os.getpid()}\n"
    held.remove()


def test_a_child_neither_holds_the_lock_nor_can_write_the_file(path: Path) -> None:
    held = PidFile(path)
    child = os.fork()
    if child == 0:
        open_files = {entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
        os._exit(path in open_files)
    _, status = os.waitpid(child, 0)
    assert status == 0
    held.remove()


def test_a_symbolic_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    path.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        PidFile(path)
    assert precious.read_text() == "data"


def test_a_file_that_others_have_a_name_of_is_replaced_and_not_written_to(path: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    path.hardlink_to(precious)
    held = PidFile(path)
    assert precious.read_text() == "data"
    assert path.read_text() == f"{os.getpid()}\n"
    assert pidfile.holder(path) is None  # but for us: a process does not hinder itself
    held.remove()


def test_a_file_that_has_taken_the_place_of_ours_is_not_removed(path: Path) -> None:
    held = PidFile(path)
    path.unlink()
    path.write_text("somebody else's")
    held.remove()
    assert path.read_text() == "somebody else's"


def test_of_many_that_start_at_once_over_a_stale_file_one_holds_it(path: Path) -> None:
    path.write_text("1\n")
    command = [sys.executable, "-c", HOLDER, str(path)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(8)
    ]
    try:
        said = [process.stdout.readline() for process in processes if process.stdout]
        assert sorted(said) == [""] * 7 + ["locked\n"]
        holder = processes[said.index("locked\n")]
        assert (pidfile.holder(path), path.read_text()) == (holder.pid, f"{holder.pid}\n")
        assert list(path.parent.iterdir()) == [path]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("kind", ["fifo", "link to a fifo"])
def test_what_would_block_is_an_error_that_names_it(path: Path, tmp_path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to("fifo")
    for use in (pidfile.holder, PidFile):
        with pytest.raises(OSError, match=r"test\.pid"):
            use(path)


@pytest.mark.parametrize("command", ["stop", "reload"])
def test_a_process_whose_pid_stands_in_a_stale_file_gets_no_signal(
    installation: Installation, stranger: subprocess.Popen[bytes], command: str
) -> None:
    installation.runtime_dir.mkdir()
    installation.pid_file.write_text(f"{stranger.pid}\n")
    installation.run(command)
    # TERM and HUP would both have ended it; a signal that is sent now is the first.
    stranger.send_signal(signal.SIGUSR1)
    assert stranger.wait() == -signal.SIGUSR1


def test_a_second_server_is_refused_with_the_pid_of_the_first(installation: Installation) -> None:
    first = installation.start()
    second = installation.run("serve")
    assert second.returncode == 1
    assert f"already running with pid {first.pid}" in second.stderr
    assert installation.lookup() == "blue"


def test_a_server_takes_over_what_a_killed_one_left(installation: Installation) -> None:
    first = installation.start()
    first.kill()
    first.wait()
    assert installation.pid_file.exists()
    (installation.runtime_dir / "state.json").unlink()
    second = installation.start()
    assert installation.pid == second.pid
    assert installation.lookup() == "blue"
