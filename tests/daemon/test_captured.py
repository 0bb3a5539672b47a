"""What the code of a map cannot do, however hostile it is, where the server was started as root.

Each test is a row of the manual's section SECURITY.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from prefork_socketmap.client import SocketmapClient
from tests.daemon.installation import TIMEOUT, Installation
from tests.processes import await_end, children, is_alive, process_status
from tests.serving import Client
from tests.waiting import eventually

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can have workers of another user")

CODE = """
import os, signal, time
from pathlib import Path

def run(key):
    # What the test wants to know, in words of Python.
    return str(eval(key)) or "nothing"

def files(key):
    found = (Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    return " ".join(os.readlink(each) for each in found if each.is_symlink())

def spawn(key):
    reader, writer = os.pipe()
    os.waitpid(os.posix_spawn(key, [key, "-u"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)]), 0)
    return os.read(reader, 100).decode().strip()

def fork(key):
    # A child that lives on, and does nothing.
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    Path(key).write_text(str(child))
    if "wait" in key:
        signal.pause()
    return str(child)

def fork_and_return(key):
    child = os.fork()
    if child == 0:
        return "the child"
    Path(key).write_text(str(child))
    return "the parent"

def connections(key):
    child = os.fork()
    if child == 0:
        Path(key).write_text(files(key))
        os._exit(0)
    os.waitpid(child, 0)
    return Path(key).read_text() or "nothing"
"""
NAMES = ("run", "files", "spawn", "fork", "fork_and_return", "connections")
MAPS = "".join(f'[maps.{name}]\ntype = "python"\npath = ["."]\nfunction = "hostile:{name}"\n' for name in NAMES)
NOBODY = pwd.getpwnam("nobody")


@pytest.fixture
def captured(installation: Installation) -> Installation:
    """An installation whose workers, of the user nobody, do what they are asked for."""
    (installation.directory / "hostile.py").write_text(CODE)
    installation.configure('user = "nobody"', maps=MAPS)
    return installation


@pytest.fixture
def yard(captured: Installation) -> Path:
    """A directory of the workers' user."""
    yard = captured.directory / "yard"
    yard.mkdir()
    os.chown(yard, NOBODY.pw_uid, NOBODY.pw_gid)
    return yard


# Privileges.


def test_a_worker_has_no_capability_and_no_way_to_any(captured: Installation) -> None:
    captured.start()
    for worker in captured.idle_workers():
        status = process_status(worker)
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert status[name] == ["0" * 16]
        assert status["NoNewPrivs"] == ["1"]
    assert process_status(captured.pid)["NoNewPrivs"] == ["0"]


def test_a_set_user_id_program_does_not_make_a_worker_root(captured: Installation) -> None:
    program = captured.directory / "id"
    shutil.copy(shutil.which("id") or "", program)
    program.chmod(0o4755)
    captured.start()
    assert captured.lookup("spawn", str(program)) == str(NOBODY.pw_uid)


def test_a_check_gives_up_what_a_worker_gives_up(captured: Installation) -> None:
    captured.configure('user = "nobody"', maps=MAPS + 'setup = "checked:setup"\n')
    (captured.directory / "checked.py").write_text(
        "from pathlib import Path\n"
        "def setup():\n    raise ValueError([line for line in Path('/proc/self/status').read_text().splitlines()"
        " if line.startswith(('CapBnd', 'NoNewPrivs', 'Umask'))])\n"
    )
    said = captured.run("check").stderr
    assert "NoNewPrivs:\\t1" in said
    assert "Umask:\\t0077" in said
    assert "CapBnd:\\t" + "0" * 16 in said


def test_no_other_process_of_the_user_reads_the_memory_of_a_worker(captured: Installation) -> None:
    captured.start()
    for worker in captured.idle_workers():
        result = subprocess.run(
            ["head", "-c", "1", f"/proc/{worker}/mem"],
            user="nobody",
            group=NOBODY.pw_gid,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
        assert "Permission denied" in result.stderr
    assert captured.lookup("run", "__import__('ctypes').CDLL(None).prctl(3)") == "0"


def test_what_a_worker_writes_is_for_its_user_alone(captured: Installation, yard: Path) -> None:
    captured.start()
    captured.lookup("run", f"Path('{yard}/file').touch()")
    assert stat.S_IMODE((yard / "file").stat().st_mode) == 0o600


# Environment and descriptors.

ENVELOPES = """type = "srs"
direction = "reverse"
secret_file = "secrets"
original_envelope = "database"
envelope_database = { type = "redis", hosts = ["127.0.0.1"], password_env = "FOR_ENVELOPES" }
"""


def test_workers_have_the_variables_that_are_documented_and_those_that_are_asked_for(captured: Installation) -> None:
    captured.configure(
        'user = "nobody"\nenvironment = ["FOR_THEM", "NOT_THERE"]\n',
        maps=MAPS + '[maps.r]\ntype = "redis"\nhosts = ["127.0.0.1"]\nquery = "GET %s"\npassword_env = "FOR_REDIS"\n'
        "[maps.s]\n" + ENVELOPES,
    )
    (captured.directory / "secrets").write_text("secret\n")
    shutil.chown(captured.directory / "secrets", "nobody")
    (captured.directory / "secrets").chmod(0o400)
    names = ["SECRET", "FOR_THEM", "FOR_REDIS", "FOR_ENVELOPES", "LC_TEST", "TZ", "LD_LIBRARY_PATH_X"]
    captured.start(env=dict.fromkeys(names, "x"))
    found = captured.lookup("run", "' '.join(sorted(os.environ))") or ""
    always = {"PATH", "HOME", "USER", "LOGNAME"}
    assert always | {"FOR_THEM", "FOR_REDIS", "FOR_ENVELOPES", "LC_TEST", "TZ"} <= set(found.split())
    assert not {"SECRET", "LD_LIBRARY_PATH_X", "NOT_THERE"} & set(found.split())
    assert captured.lookup("run", "os.environ['HOME']") == NOBODY.pw_dir


@pytest.mark.parametrize("how", ["serve", "upgrade"])
def test_workers_do_not_have_what_whoever_started_the_server_had_open(captured: Installation, how: str) -> None:
    precious = captured.directory / "precious"
    precious.write_text("for root's eyes only")
    precious.chmod(0o600)
    with precious.open() as file:
        captured.start(pass_fds=[file.fileno()])
    if how == "upgrade":
        assert captured.run("upgrade").returncode == 0
    found = captured.lookup("files", "") or ""
    assert str(precious) not in found
    assert "prefork-socketmap.pid" not in found


# Clients.


@pytest.mark.parametrize("served_before", [False, True], ids=["newcomer", "in the table"])
def test_a_connection_ends_with_its_worker_whatever_children_live_on(
    captured: Installation, yard: Path, *, served_before: bool
) -> None:
    captured.start()
    file = yard / "wait"
    with Client(captured.endpoint) as client:
        if served_before:
            client.ask(b"run 1")
            captured.idle_workers()
        client.request(f"fork {file}".encode())
        child = eventually(lambda: int(file.read_text()) if file.exists() and file.read_text() else 0, what="a child")
        (worker,) = [pid for pid in captured.workers() if child in children(pid)]
        os.kill(worker, signal.SIGKILL)
        try:
            with pytest.raises(ConnectionResetError):
                client.reply()
            assert is_alive(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_connection_that_the_client_ends_is_not_kept_by_children(captured: Installation, yard: Path) -> None:
    captured.start()
    with SocketmapClient(captured.endpoint) as client, SocketmapClient(captured.endpoint) as other:
        other.lookup("run", "1")
        found = client.lookup("connections", str(yard / "file")) or ""
        again = client.lookup("connections", str(yard / "file")) or ""
    for each in (found, again):
        inodes = [line.removeprefix("socket:[").rstrip("]") for line in each.split() if line.startswith("socket:")]
        tcp = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
        assert not tcp & set(inodes)
        assert "eventpoll" in each  # that of the places on duty, which has no client


def test_a_child_that_comes_back_from_the_code_of_a_map_ends_and_answers_nobody(
    captured: Installation, yard: Path
) -> None:
    captured.start()
    with SocketmapClient(captured.endpoint) as client:
        for number in range(3):
            file = yard / f"returned{number}"
            assert client.lookup("fork_and_return", str(file)) == "the parent"
            await_end(int(file.read_text()), within=10)
        assert client.lookup("run", "7") == "7"
    assert captured.lookup("run", "8") == "8"


# Paths.


@pytest.mark.parametrize("command", ["reload", "upgrade"])
def test_a_worker_that_exchanges_its_socket_for_a_link_opens_no_file_of_roots(
    captured: Installation, yard: Path, command: str
) -> None:
    precious = captured.directory / "precious"
    precious.write_text("for root's eyes only")
    precious.chmod(0o600)
    socket = yard / "socket"
    captured.configure(
        'user = "nobody"',
        listen=f'["{captured.endpoint}", {{ endpoint = "unix:{socket}", mode = "0666", group = "nogroup" }}]',
        maps=MAPS,
    )
    captured.start()
    assert captured.lookup("run", f"(os.unlink('{socket}'), os.symlink('{precious}', '{socket}'))")
    captured.run(command)
    status = precious.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o600, 0, 0)
    assert captured.lookup("run", "1") == "1"
    assert socket.is_symlink()
