"""A disk that is full: nobody goes without an answer, nothing is lost, and it says what is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from tests.daemon.installation import Installation
from tests.smalldisk import SmallDisk
from tests.waiting import eventually

NO_SPACE = "No space left on device"


@pytest.fixture
def disk(installation: Installation) -> Iterator[SmallDisk]:
    installation.runtime_dir.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(SmallDisk(installation.runtime_dir))
        except PermissionError as error:
            pytest.skip(str(error))
        stack.callback(installation.run, "stop")  # while the pid file is still to be seen
        stack.callback(disk.empty)
        yield disk


def test_a_server_on_a_full_disk_does_not_start_and_says_why(installation: Installation, disk: SmallDisk) -> None:
    disk.fill()
    result = installation.run("serve")
    assert result.returncode == os.EX_UNAVAILABLE
    assert NO_SPACE in result.stderr
    assert str(installation.runtime_dir) in result.stderr
    assert "Traceback" not in result.stderr


def test_who_serves_goes_on_when_the_disk_fills_up(installation: Installation, disk: SmallDisk) -> None:
    installation.start()
    disk.fill()
    assert installation.lookup() == "blue"
    for worker in installation.workers():
        os.kill(worker, signal.SIGKILL)
        assert eventually(installation.lookup) == "blue"


def test_a_reload_that_the_disk_has_no_room_for_is_refused_with_the_reason_and_later_succeeds(
    installation: Installation, disk: SmallDisk
) -> None:
    installation.start()
    # More names than the scoreboard has room for without growing.
    maps = "".join(f'[maps.colours{n}]\ntype = "static"\nentries = {{ sky = "blue" }}\n' for n in range(100))
    installation.configure(maps=maps)
    disk.fill()
    os.kill(installation.pid, signal.SIGHUP)
    line = installation.logged("reload refused")
    assert NO_SPACE in line
    assert str(installation.runtime_dir) in line
    assert installation.lookup() == "blue"
    disk.empty()
    assert installation.run("reload").returncode == 0
    assert installation.lookup("colours99") == "blue"
    assert "Traceback" not in installation.log.read_text()
