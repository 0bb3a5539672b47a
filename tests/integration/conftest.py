"""A real Postfix, and the daemon that it asks, for the tests that name them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon
from tests.integration.postfix import Postfix, Session

StartPostfix = Callable[[Mapping[str, str]], Postfix]
StartDaemon = Callable[..., Daemon]


@pytest.fixture(scope="module")
def open_directory() -> Iterator[Path]:
    """A directory that Postfix's processes can get into, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="socketmap-") as directory:
        path = Path(directory)
        path.chmod(0o755)
        yield path


@pytest.fixture(scope="session")
def unstarted_postfix() -> Iterator[Postfix]:
    """A Postfix that does not run: its configuration is enough for postmap(1)."""
    with Postfix({}) as postfix:
        yield postfix


@pytest.fixture(scope="module")
def start_postfix() -> Iterator[StartPostfix]:
    """Start a Postfix with the parameters that are given; it is stopped after the module's tests."""
    with contextlib.ExitStack() as stack:

        def start(main: Mapping[str, str]) -> Postfix:
            postfix = stack.enter_context(Postfix(main))
            postfix.start()
            # What pytest shows of a test that failed.
            stack.callback(lambda: print(postfix.log()))
            return postfix

        yield start


@pytest.fixture(scope="module")
def start_daemon() -> Iterator[StartDaemon]:
    """Start a daemon with the configuration that is given; it is stopped after the module's tests."""
    with contextlib.ExitStack() as stack:

        def start(config: str, files: Mapping[str, str] | None = None, mode: int = 0o644) -> Daemon:
            daemon = Daemon(config, files, mode)
            stack.callback(daemon.close)
            daemon.start()
            stack.callback(lambda: print(daemon.log()))
            return daemon

        yield start


@pytest.fixture
def session(postfix: Postfix) -> Iterator[Session]:
    """An SMTP session with the ``postfix`` of the module, ready for recipients."""
    with postfix.transaction() as session:
        yield session
