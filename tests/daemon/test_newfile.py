"""Files of the server never follow what somebody else has put in their place."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from prefork_socketmap.daemon import newfile, state
from prefork_socketmap.daemon.configfile import PID_FILE_NAME, Places
from prefork_socketmap.daemon.state import StateFile
from prefork_socketmap.prefork.scoreboard import Scoreboard


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    file = tmp_path / "precious"
    file.write_text("data")
    file.chmod(0o600)
    return file


def names(name: str) -> set[str]:
    """Return under which names a file may be made that becomes *name*."""
    stem = name.partition(".")[0]
    return {name, f"{name}.{os.getpid()}.new", f"{name}.new", f"{stem}.new"}


def places(directory: Path) -> Places:
    return Places(directory, directory / PID_FILE_NAME)


@pytest.mark.parametrize("hard", [False, True], ids=["symbolic link", "hard link"])
@pytest.mark.parametrize("name", ["state.json", "scoreboard"])
def test_a_link_in_the_place_of_a_file_of_runtime_dir_is_replaced_and_not_followed(
    tmp_path: Path, precious: Path, name: str, *, hard: bool
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    for each in names(name):
        (directory / each).hardlink_to(precious) if hard else (directory / each).symlink_to(precious)
    if name == "scoreboard":
        Scoreboard(directory / name).close()
    else:
        StateFile(tmp_path / "config", places(directory)).ready(1)
    assert precious.read_text() == "data"
    assert stat.S_IMODE(precious.stat().st_mode) == 0o600
    assert stat.S_IMODE((directory / name).lstat().st_mode) == 0o644
    assert (directory / name).is_file()
    assert not (directory / name).is_symlink()


def test_what_goes_wrong_leaves_everything_as_it_was(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError), newfile.in_place_of(tmp_path / "directory") as descriptor:
        os.write(descriptor, b"x")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "directory", precious]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_no_link_and_nothing_that_blocks_is_read_for_the_state(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        state.read(tmp_path / "link")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not the state of a server"):  # it is empty, for nobody waits for a writer
        state.read(tmp_path / "fifo")


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"reload": 1}', '{"reload": {"x": 1}}', "\xff"])
def test_what_is_not_the_state_of_a_server_is_an_error_that_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(OSError, match=r"not the state of a server.*state\.json"):
        state.read(tmp_path / "state.json")


def test_a_server_that_is_upgraded_goes_on_whatever_has_become_of_its_state(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "state.json").symlink_to(precious)
    memory = StateFile(tmp_path / "config", places(tmp_path)).fileno()
    # A duplicate: each would close it in every child that this process has later, whatever has the number by then.
    StateFile(tmp_path / "config", places(tmp_path), os.dup(memory)).ready(3)
    found = state.read(tmp_path / "state.json")
    assert found is not None
    assert found.generation == 3
    assert precious.read_text() == "data"
