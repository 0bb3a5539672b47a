"""The parts that are no server can be imported where there is no Linux under them."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What other systems do not have: a module that uses one of these when it is imported fails there.
_ELSEWHERE = """
import ctypes, fcntl, mmap, os, select, sys
for module, names in {
    os: ["eventfd", "memfd_create", "sched_getaffinity", "fork", "pidfd_open", "posix_fallocate"],
    select: ["epoll", "EPOLLIN", "EPOLLOUT", "EPOLLONESHOT", "poll"],
    fcntl: ["F_ADD_SEALS", "F_SEAL_SHRINK", "F_DUPFD_CLOEXEC"],
    mmap: ["MADV_REMOVE"],
}.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in ("grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
ctypes.CDLL = None
"""


@pytest.mark.parametrize(
    "use",
    [
        "from prefork_socketmap.socketmap import netstring; netstring.Decoder(10).feed(b'1:x,')",
        "from prefork_socketmap import Reply, Status; Reply.ok('x')",
        "from prefork_socketmap import Config, Endpoint, SettingError; Config()",
        "import prefork_socketmap.client",
    ],
)
def test_what_is_no_server_runs_anywhere(use: str) -> None:
    done = subprocess.run([sys.executable, "-c", _ELSEWHERE + use], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_name_is_an_attribute_error() -> None:
    import prefork_socketmap

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = prefork_socketmap.nothing
    assert set(prefork_socketmap.__all__) == set(dir(prefork_socketmap)) == set(prefork_socketmap._MODULES)


def test_a_program_that_only_registers_does_not_load_the_process_model() -> None:
    """What is loaded is what an import takes: two thirds of it are for serving, and wait until somebody serves."""
    program = (
        "import sys; from prefork_socketmap import Config, Server, SettingError;"
        "Server(Config()).register_map('map', str); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "prefork_socketmap.server" in loaded
    assert loaded.isdisjoint(
        {"prefork_socketmap.prefork", "prefork_socketmap.service", "asyncio", "logging", "pathlib"}
    )
